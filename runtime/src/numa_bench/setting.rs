//! What is tried: the settings of a sweep, each with its plan.

use std::cmp::Reverse;
use std::fmt;

use pi_topology::{ColdPolicy, HugePages, Machine, Plan, TopologyConfig, asking_for};

use crate::error::RuntimeError;
use crate::session::TopologyFile;

/// A choice of what a topology file says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setting {
    /// `memory.cold`.
    pub cold: ColdPolicy,
    /// `memory.huge_pages`.
    pub huge_pages: HugePages,
    /// `host.nodes`; none: as the file has it.
    pub teams: Option<usize>,
    /// Threads over all teams; none: as the file has it.
    pub threads: Option<usize>,
}

impl fmt::Display for Setting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, huge pages {}", self.cold, name(self.huge_pages))?;
        if let Some(teams) = self.teams {
            write!(f, ", {teams} {}", plural(teams, "team"))?;
        }
        match self.threads {
            Some(threads) => write!(f, ", {threads} {}", plural(threads, "thread")),
            None => f.write_str(", all threads"),
        }
    }
}

/// A kind of pages as topology files have it.
pub(super) fn name(huge_pages: HugePages) -> &'static str {
    match huge_pages {
        HugePages::Try => "try",
        HugePages::Require => "require",
        HugePages::Off => "off",
    }
}

pub(super) fn plural(n: usize, word: &str) -> String {
    format!("{word}{}", if n == 1 { "" } else { "s" })
}

/// A setting, and what becomes of it on the machine.
#[derive(Debug, Clone, PartialEq)]
pub struct Point {
    /// What is asked.
    pub setting: Setting,
    /// Threads and memory.
    pub plan: Plan,
    /// What asks for the plan alone, without a flag beside it; none where nothing does.
    pub config: Option<TopologyConfig>,
}

impl Point {
    /// How far it is from what runs without any configuration: keys that are changed first, then which and how far. No two
    /// points of a sweep are equally far, in whatever order they were asked for.
    pub(super) fn distance(&self) -> impl Ord + use<> {
        let n_changed = (self.config.as_ref()).map_or(usize::MAX, TopologyConfig::n_changed);
        let cold = match self.setting.cold {
            ColdPolicy::Shard => 0,
            ColdPolicy::Replicate => 1,
            ColdPolicy::Interleave => 2,
            ColdPolicy::Single(node) => 3 + node,
        };
        let pages = match self.setting.huge_pages {
            HugePages::Try => 0,
            HugePages::Off => 1,
            // does not run at all where there are none
            HugePages::Require => 2,
        };
        let n_threads = Reverse(self.plan.n_threads());
        (n_changed, cold, pages, self.plan.nodes.len(), n_threads)
    }
}

/// What to try; where a list is empty, what makes sense on the machine.
#[derive(Debug, Clone, Default)]
pub struct Sweep {
    /// Policies for cold neurons.
    pub cold: Vec<ColdPolicy>,
    /// Kinds of pages.
    pub huge_pages: Vec<HugePages>,
    /// Numbers of teams.
    pub teams: Vec<usize>,
    /// Threads over all teams.
    pub threads: Vec<usize>,
}

impl Sweep {
    /// Every combination that there is on `machine` under `file`, what runs without any setting first. With one team all
    /// policies are the same, and one of them is tried.
    ///
    /// # Errors
    /// A combination that the machine lacks, where it does not go without saying: other numbers of teams than the first
    /// leave out what they have no threads or team for.
    pub fn points(
        &self,
        file: &TopologyFile,
        machine: &Machine,
    ) -> Result<Vec<Point>, RuntimeError> {
        if !self.teams.is_empty() && file.lists_teams() {
            return Err(RuntimeError::Flag {
                flag: "--teams",
                value: words(&self.teams),
                problem: "the topology lists its teams CPU by CPU: leave the flag out, or the list"
                    .to_owned(),
            });
        }
        let mut points: Vec<Point> = Vec::new();
        for (index, teams) in self.team_counts(file, machine).into_iter().enumerate() {
            let setting = |cold, huge_pages, threads| Setting {
                cold,
                huge_pages,
                teams,
                threads,
            };
            let whole = file.varied(ColdPolicy::Shard, HugePages::Try, teams);
            let whole = whole.plan_on(machine, None)?;
            for threads in self.thread_counts(&whole) {
                for &huge_pages in &self.pages() {
                    for cold in self.policies(whole.nodes.len()) {
                        let setting = setting(cold, huge_pages, threads);
                        let varied = file.varied(cold, huge_pages, teams);
                        match varied.planned(machine, threads) {
                            Ok((config, plan)) => points.push(Point {
                                setting,
                                // the name is the file's, which this is not
                                config: asking_for(
                                    &TopologyConfig {
                                        name: None,
                                        ..config
                                    },
                                    &plan,
                                    machine,
                                ),
                                plan,
                            }),
                            Err(error) if index == 0 => return Err(error),
                            Err(error) => tracing::info!("{setting}: left out, for {error}"),
                        }
                    }
                }
            }
        }
        let mut tried: Vec<Plan> = Vec::new();
        points.retain(|point| {
            let is_new = !tried.contains(&point.plan);
            tried.push(point.plan.clone());
            is_new
        });
        Ok(points)
    }

    /// As many teams as the file has, and where nothing is said of them one more way: the first NUMA node alone, or on a
    /// machine with one the cores divided over two.
    fn team_counts(&self, file: &TopologyFile, machine: &Machine) -> Vec<Option<usize>> {
        if !self.teams.is_empty() {
            return self.teams.iter().map(|&teams| Some(teams)).collect();
        }
        if file.is_file() {
            return vec![None];
        }
        let other = match machine.nodes.len() {
            1 if machine.n_cores() < 2 => return vec![Some(1)],
            1 => 2,
            _ => 1,
        };
        vec![Some(machine.nodes.len()), Some(other)]
    }

    /// All threads of the plan, and half of them.
    fn thread_counts(&self, whole: &Plan) -> Vec<Option<usize>> {
        if !self.threads.is_empty() {
            return self.threads.iter().map(|&threads| Some(threads)).collect();
        }
        let half = whole.n_threads() / 2;
        let half = (half >= whole.nodes.len()).then_some(Some(half));
        [None].into_iter().chain(half).collect()
    }

    fn pages(&self) -> Vec<HugePages> {
        match self.huge_pages.is_empty() {
            true => vec![HugePages::Try, HugePages::Off],
            false => self.huge_pages.clone(),
        }
    }

    fn policies(&self, n_teams: usize) -> Vec<ColdPolicy> {
        let asked = match self.cold.is_empty() {
            true => vec![
                ColdPolicy::Shard,
                ColdPolicy::Replicate,
                ColdPolicy::Interleave,
                ColdPolicy::Single(0),
            ],
            false => self.cold.clone(),
        };
        match n_teams {
            1 => asked.into_iter().take(1).collect(),
            _ => asked,
        }
    }
}

fn words(numbers: &[usize]) -> String {
    let words: Vec<String> = numbers.iter().map(usize::to_string).collect();
    words.join(",")
}

#[cfg(test)]
mod tests {
    use super::*;
    use pi_topology::{Core, MachineNode, MachineSource};

    fn machine(n_nodes: usize, n_cores: usize) -> Machine {
        let node = |index: usize| MachineNode {
            os_index: Some(index),
            memory_bytes: 1 << 30,
            cores: (0..n_cores)
                .map(|core| Core {
                    cpus: vec![index * n_cores + core],
                    kind: 0,
                })
                .collect(),
        };
        Machine::of_nodes(
            (0..n_nodes).map(node).collect(),
            MachineSource::AffinityMask,
        )
    }

    /// Every setting's printed lines are a file that plans the same alone, whatever file it was a variation of.
    #[test]
    fn lines_plan_their_setting_without_a_flag() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.toml");
        let files = [
            "",
            "name = \"x\"\n[memory]\nstrict = true\n[host]\nnodes = 2\nreserved_cores = 1\n",
            "[host]\nnodes = 3\nthreads = 1\n[[gpu]]\n",
            "[memory]\nstrict = true\n[[host.node]]\nnuma = 1\ncpus = [5, 4]\n[[host.node]]\ncpus = [0, 3]\n",
        ];
        let mut n_points = 0;
        for text in files {
            std::fs::write(&path, text).unwrap();
            let file = TopologyFile::read(Some(&path)).unwrap();
            for threads in [vec![], vec![3, 4]] {
                let machine = machine(2, 4);
                let sweep = Sweep {
                    threads,
                    ..Sweep::default()
                };
                for point in sweep.points(&file, &machine).unwrap() {
                    let lines = point.config.as_ref().unwrap().to_short_toml();
                    std::fs::write(&path, &lines).unwrap();
                    let read = TopologyFile::read(Some(&path)).unwrap();
                    let plan = read.plan_on(&machine, None).unwrap();
                    assert_eq!(plan, point.plan, "{text}\n{}\n{lines}", point.setting);
                    n_points += 1;
                }
            }
        }
        assert!(n_points > 40, "{n_points}");
    }

    #[test]
    fn the_nearest_to_the_default_does_not_depend_on_the_order_of_flags() {
        use HugePages::{Off, Require, Try};
        let nearest = |huge_pages: &[HugePages], cold: &[ColdPolicy], threads: &[usize]| {
            let sweep = Sweep {
                cold: cold.to_vec(),
                huge_pages: huge_pages.to_vec(),
                threads: threads.to_vec(),
                teams: vec![2, 1],
            };
            let points = sweep.points(&TopologyFile::default(), &machine(2, 4));
            let points = points.unwrap();
            let nearest = points.iter().min_by_key(|point| point.distance()).unwrap();
            nearest.setting.to_string()
        };
        let (shard, single) = (ColdPolicy::Shard, ColdPolicy::Single(0));
        let default = "shard, huge pages try, 2 teams, 8 threads";
        assert_eq!(
            nearest(&[Require, Try, Off], &[single, shard], &[2, 8]),
            default
        );
        assert_eq!(
            nearest(&[Off, Try, Require], &[shard, single], &[8, 2]),
            default
        );
        for pages in [[Require, Off], [Off, Require]] {
            assert_eq!(
                nearest(&pages, &[shard], &[2, 8]),
                "shard, huge pages off, 2 teams, 8 threads"
            );
        }
    }

    fn texts(sweep: &Sweep, machine: &Machine) -> Vec<String> {
        let points = sweep.points(&TopologyFile::default(), machine).unwrap();
        points
            .iter()
            .map(|point| point.setting.to_string())
            .collect()
    }

    #[test]
    fn two_sockets_are_tried_in_every_way() {
        let found = texts(&Sweep::default(), &machine(2, 4));
        // two numbers of threads by two kinds of pages by four policies; one team has one policy
        assert_eq!(found.len(), 2 * 2 * 4 + 2 * 2);
        assert_eq!(found[0], "shard, huge pages try, 2 teams, all threads");
        for there in [
            "replicate, huge pages off, 2 teams, 4 threads",
            "single:0, huge pages try, 2 teams, all threads",
            "shard, huge pages off, 1 team, 2 threads",
        ] {
            assert!(found.iter().any(|text| text == there), "{there} {found:?}");
        }
    }

    #[test]
    fn one_node_is_tried_as_two_teams() {
        let found = texts(&Sweep::default(), &machine(1, 2));
        assert_eq!(found[0], "shard, huge pages try, 1 team, all threads");
        assert_eq!(found.len(), 2 * 2 + 2 * 4);
        // one core cannot be divided
        assert_eq!(texts(&Sweep::default(), &machine(1, 1)).len(), 2);
    }

    #[test]
    fn what_is_asked_for_is_tried_and_nothing_else() {
        let sweep = Sweep {
            cold: vec![ColdPolicy::Single(1), ColdPolicy::Shard],
            huge_pages: vec![HugePages::Off],
            teams: vec![2, 1],
            threads: vec![2, 4, 4],
        };
        assert_eq!(
            texts(&sweep, &machine(2, 2)),
            [
                "single:1, huge pages off, 2 teams, 2 threads",
                "shard, huge pages off, 2 teams, 2 threads",
                "single:1, huge pages off, 2 teams, 4 threads",
                "shard, huge pages off, 2 teams, 4 threads",
            ]
        );
    }

    #[test]
    fn what_the_first_teams_lack_is_an_error() {
        let refused = |sweep: Sweep, machine: &Machine| {
            let error = sweep.points(&TopologyFile::default(), machine).unwrap_err();
            assert_eq!(error.exit_code(), 2);
            error.to_string()
        };
        let many = Sweep {
            threads: vec![9],
            ..Sweep::default()
        };
        assert!(refused(many, &machine(2, 4)).contains("-t 9"));
        let missing = Sweep {
            cold: vec![ColdPolicy::Single(5)],
            teams: vec![2],
            ..Sweep::default()
        };
        assert!(refused(missing, &machine(2, 4)).contains("single:5"));
    }
}
