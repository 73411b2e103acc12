//! What was measured as a table, as CSV, and as the lines of a topology file that won.

use std::fmt::{self, Write};

use super::setting::{name, plural};
use super::{Measured, Verdict, median};

/// All settings in the order of the sweep, with medians over the rounds, and what of them is noise.
pub fn table(all: &[Measured], verdict: &Verdict) -> String {
    let mut text = String::new();
    // a string takes everything
    let _ = write_table(&mut text, all, verdict);
    text
}

fn write_table(text: &mut String, all: &[Measured], verdict: &Verdict) -> fmt::Result {
    let n_nodes = all.iter().map(|measured| measured.point.plan.nodes.len());
    let width = (6 * n_nodes.max().unwrap_or(1)).max("GB/s by node".len() + 1);
    writeln!(
        text,
        "{:<12}{:>6}{:>9}{:>12}{:>10}{:>9}{:>width$}{:>8}{:>11}",
        "cold", "teams", "threads", "huge pages", "tok/s", "±", "GB/s by node", "remote", "join µs"
    )?;
    for (index, measured) in all.iter().enumerate() {
        let (setting, plan) = (&measured.point.setting, &measured.point.plan);
        let speeds = measured.tokens_per_s();
        let nodes: Vec<String> = (0..plan.nodes.len())
            .map(|node| {
                format!(
                    "{:.1}",
                    measured.median(|sample| sample.node_gb_per_s[node])
                )
            })
            .collect();
        let remote = match measured.samples[0].remote_share {
            Some(_) => {
                let percent = measured.median(|sample| sample.remote_share.unwrap_or(0.0)) * 100.0;
                format!("{percent:.0} %")
            }
            None => "?".to_owned(),
        };
        let mark = match verdict.alike.contains(&index) {
            _ if all.len() == 1 => "",
            true if index == verdict.best => "  fastest",
            true => "  within noise of it",
            false => "",
        };
        writeln!(
            text,
            "{:<12}{:>6}{:>9}{:>12}{:>10.2}{:>9.2}{:>width$}{remote:>8}{:>11.1}{mark}",
            setting.cold.to_string(),
            plan.nodes.len(),
            plan.n_threads(),
            name(setting.huge_pages),
            median(speeds.clone()),
            deviation(&speeds),
            nodes.join(" "),
            measured.median(|sample| sample.join_wait_us),
        )?;
    }
    writeln!(
        text,
        "medians of {} {} in turns; ±: standard deviation of a round; GB/s: weights and cache read; remote: share of the \
         weights on another NUMA node than their team; join: what node 0 waits in a layer",
        all[0].samples.len(),
        plural(all[0].samples.len(), "round")
    )
}

/// Of a sample; 0 of one value.
fn deviation(values: &[f64]) -> f64 {
    if values.len() < 2 {
        return 0.0;
    }
    let n = values.len() as f64;
    let mean = values.iter().sum::<f64>() / n;
    let squares = values.iter().map(|value| (value - mean) * (value - mean));
    (squares.sum::<f64>() / (n - 1.0)).sqrt()
}

/// Every sample as a line of comma-separated values, under a line of names.
pub fn csv(all: &[Measured]) -> String {
    let n_nodes = all.iter().map(|measured| measured.point.plan.nodes.len());
    let n_nodes = n_nodes.max().unwrap_or(0);
    let nodes: Vec<String> = (0..n_nodes)
        .map(|node| format!(",node{node}_gb_per_s"))
        .collect();
    let mut text = format!(
        "round,cold,teams,threads,huge_pages,tokens_per_s,join_wait_us,remote_share{}\n",
        nodes.concat()
    );
    for measured in all {
        let (setting, plan) = (&measured.point.setting, &measured.point.plan);
        for (round, sample) in measured.samples.iter().enumerate() {
            let remote = sample
                .remote_share
                .map_or(String::new(), |share| format!("{share:.4}"));
            let speeds = (0..n_nodes).map(|node| match sample.node_gb_per_s.get(node) {
                Some(speed) => format!(",{speed:.4}"),
                None => ",".to_owned(),
            });
            // a string takes everything
            let _ = writeln!(
                text,
                "{},{},{},{},{},{:.4},{:.3},{remote}{}",
                round + 1,
                setting.cold,
                plan.nodes.len(),
                plan.n_threads(),
                name(setting.huge_pages),
                sample.tokens_per_s,
                sample.join_wait_us,
                speeds.collect::<String>(),
            );
        }
    }
    text
}

/// What the fastest setting is and by how much, and the lines of a topology file that ask for the one to use.
pub fn winner(all: &[Measured], verdict: &Verdict) -> String {
    let speed = |index: usize| median(all[index].tokens_per_s());
    let (best, chosen) = (verdict.best, verdict.winner);
    let mut text = match (all[0].samples.len(), verdict.alike.len()) {
        _ if all.len() == 1 => "one setting was measured, and compared with nothing\n".to_owned(),
        (1, _) => "one round tells nothing of noise: measure more with -r\n".to_owned(),
        (_, n) if n == all.len() && n > 1 => format!(
            "no setting differs from another by more than noise ({})\n",
            all[best].point.setting
        ),
        (_, 1) => format!("fastest: {}, beyond noise\n", all[best].point.setting),
        (_, n) => format!(
            "fastest: {}; within noise of it {} {}\n",
            all[best].point.setting,
            n - 1,
            plural(n - 1, "other")
        ),
    };
    if chosen != 0 {
        let percent = (speed(chosen) / speed(0) - 1.0) * 100.0;
        text.push_str(&format!(
            "{percent:+.1} % against {}\n",
            all[0].point.setting
        ));
    }
    let setting = &all[chosen].point.setting;
    if chosen != best {
        text.push_str("of these the one nearest to the default is enough\n");
    }
    text.push_str(&format!("to use it ({setting}):\n\n"));
    text.push_str(&lines(&all[chosen]));
    text
}

/// The lines of a file that asks for a setting.
fn lines(measured: &Measured) -> String {
    let Some(config) = &measured.point.config else {
        let threads = measured.point.plan.n_threads();
        return format!(
            "# no file says that: the one that it was measured with, and -t {threads}\n"
        );
    };
    match config.to_short_toml() {
        text if text.is_empty() => "# the default: runs without --topology\n".to_owned(),
        text => text,
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::numa_bench::{Point, Sample, Setting};
    use pi_topology::{ColdPolicy, HugePages, MemoryConfig, NodePlan, Plan, TopologyConfig};

    /// Two teams whose rounds have these speeds.
    pub(crate) fn measured(cold: ColdPolicy, threads: Option<usize>, speeds: &[f64]) -> Measured {
        let node = |numa: usize| NodePlan {
            numa: Some(numa),
            cpus: vec![2 * numa, 2 * numa + 1],
        };
        let plan = Plan {
            cold,
            ..Plan::of_nodes(vec![node(0), node(1)], HugePages::Off)
        };
        let sample = |&tokens_per_s: &f64| Sample {
            tokens_per_s,
            node_gb_per_s: vec![tokens_per_s / 10.0, 1.25],
            remote_share: Some(0.5),
            join_wait_us: 3.0,
        };
        let setting = Setting {
            cold,
            huge_pages: HugePages::Off,
            teams: Some(2),
            threads,
        };
        let config = TopologyConfig {
            memory: MemoryConfig {
                cold,
                huge_pages: HugePages::Off,
                strict: false,
            },
            ..TopologyConfig::default()
        };
        Measured {
            point: Point {
                setting,
                plan,
                config: Some(config),
            },
            samples: speeds.iter().map(sample).collect(),
        }
    }

    fn three() -> Vec<Measured> {
        vec![
            measured(ColdPolicy::Shard, None, &[100.0, 101.0, 99.0]),
            measured(ColdPolicy::Interleave, None, &[50.0, 51.0, 49.0]),
            measured(ColdPolicy::Replicate, None, &[120.0, 121.0, 119.0]),
        ]
    }

    #[test]
    fn the_table_has_a_line_for_each_setting() {
        let all = three();
        let text = table(&all, &Verdict::of(&all));
        let words = |line: &str| line.split_whitespace().collect::<Vec<&str>>().join(" ");
        let lines: Vec<String> = text.lines().map(words).collect();
        assert_eq!(lines[1], "shard 2 4 off 100.00 1.00 10.0 1.2 50 % 3.0");
        assert_eq!(
            lines[3],
            "replicate 2 4 off 120.00 1.00 12.0 1.2 50 % 3.0 fastest"
        );
        assert!(lines[4].starts_with("medians of 3 rounds in turns"));
    }

    #[test]
    fn every_sample_is_a_line_of_the_csv() {
        let mut all = three();
        all[1].samples[0].remote_share = None;
        let text = csv(&all);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 10);
        assert_eq!(
            lines[0],
            "round,cold,teams,threads,huge_pages,tokens_per_s,join_wait_us,remote_share,node0_gb_per_s,node1_gb_per_s"
        );
        assert_eq!(
            lines[1],
            "1,shard,2,4,off,100.0000,3.000,0.5000,10.0000,1.2500"
        );
        assert_eq!(
            lines[4],
            "1,interleave,2,4,off,50.0000,3.000,,5.0000,1.2500"
        );
        let n_fields = |line: &&str| line.split(',').count() == 10;
        assert!(lines.iter().all(n_fields));
    }

    #[test]
    fn the_lines_are_the_configuration_that_won() {
        let mut all = three();
        let text = winner(&all, &Verdict::of(&all));
        assert!(text.starts_with("fastest: replicate, huge pages off, 2 teams, all threads, beyond noise\n+20.0 % against shard"), "{text}");
        let (_, toml) = text.split_once(":\n\n").unwrap();
        assert_eq!(
            toml,
            "[memory]\ncold = \"replicate\"\nhuge_pages = \"off\"\n"
        );
        all[2].point.config = Some(TopologyConfig::default());
        let text = winner(&all, &Verdict::of(&all));
        assert!(
            text.ends_with("\n# the default: runs without --topology\n"),
            "{text}"
        );
    }

    #[test]
    fn one_setting_is_compared_with_nothing() {
        let one = vec![measured(ColdPolicy::Shard, None, &[100.0, 101.0])];
        let verdict = Verdict::of(&one);
        let text = winner(&one, &verdict);
        assert!(
            text.starts_with("one setting was measured, and compared with nothing\nto use it"),
            "{text}"
        );
        assert!(!table(&one, &verdict).contains("fastest"));
    }

    #[test]
    fn noise_is_called_noise() {
        let all = vec![
            measured(ColdPolicy::Shard, None, &[100.0, 120.0, 80.0]),
            measured(ColdPolicy::Interleave, None, &[110.0, 90.0, 115.0]),
        ];
        let verdict = Verdict::of(&all);
        let text = winner(&all, &verdict);
        assert!(
            text.starts_with("no setting differs from another by more than noise"),
            "{text}"
        );
        assert!(text.contains("to use it (shard"), "{text}");
        let one = vec![
            measured(ColdPolicy::Shard, None, &[100.0]),
            measured(ColdPolicy::Interleave, None, &[110.0]),
        ];
        let text = winner(&one, &Verdict::of(&one));
        assert!(
            text.starts_with("one round tells nothing of noise"),
            "{text}"
        );
    }
}
