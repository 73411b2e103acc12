//! Where threads and memory go: a topology file, or the machine as it is found.

use std::path::{Path, PathBuf};

use pi_topology::{
    Backends, ColdPolicy, Difference, Fit, HostConfig, HugePages, Machine, NodeCount, Plan,
    SystemState, TopologyConfig, conflicts,
};

use crate::error::RuntimeError;

/// What is asked of the machine, and the file that asks.
#[derive(Debug, Clone, Default)]
pub struct TopologyFile {
    path: Option<PathBuf>,
    config: TopologyConfig,
    simulate: bool,
}

/// Back ends for GPUs that this program has.
const BACKENDS: Backends = Backends { cuda: true };

impl TopologyFile {
    /// Reads the file at `path`; without one the discovered machine is used as it is.
    ///
    /// # Errors
    /// The file cannot be read or says something wrong: the message names file, line and key.
    pub fn read(path: Option<&Path>) -> Result<Self, RuntimeError> {
        let Some(path) = path else {
            return Ok(Self::default());
        };
        let text = std::fs::read_to_string(path).map_err(|source| RuntimeError::ReadTopology {
            path: path.to_path_buf(),
            source,
        })?;
        Ok(Self {
            path: Some(path.to_path_buf()),
            config: parse(&text).map_err(|(line, problem)| RuntimeError::TopologySyntax {
                path: path.to_path_buf(),
                line,
                problem,
            })?,
            simulate: false,
        })
    }

    /// The same, to be run on what there is where `simulate` is set.
    pub fn simulating(self, simulate: bool) -> Self {
        Self { simulate, ..self }
    }

    /// Whether there is a file at all.
    pub fn is_file(&self) -> bool {
        self.path.is_some()
    }

    /// Whether it lists its teams CPU by CPU.
    pub fn lists_teams(&self) -> bool {
        matches!(self.config.host, HostConfig::Listed(_))
    }

    /// The same with other memory, and with so many teams where a number is given and they are not listed.
    pub fn varied(&self, cold: ColdPolicy, pages: HugePages, teams: Option<usize>) -> Self {
        let mut varied = self.clone();
        varied.config.memory.cold = cold;
        varied.config.memory.huge_pages = pages;
        if let (Some(teams), HostConfig::Divided { nodes, .. }) = (teams, &mut varied.config.host) {
            *nodes = NodeCount::Number(teams);
        }
        varied
    }

    /// What is asked.
    pub fn config(&self) -> &TopologyConfig {
        &self.config
    }

    /// Fits it to the machine that this runs on, with `threads` over all nodes in place of the file's.
    ///
    /// # Errors
    /// The machine lacks what is asked for.
    pub fn plan(&self, threads: Option<usize>) -> Result<Plan, RuntimeError> {
        let mut machine = Machine::discover()?;
        if !self.config.gpus.is_empty() {
            machine.ask_gpu_driver();
        }
        self.plan_on(&machine, threads)
    }

    /// The same for any machine.
    ///
    /// # Errors
    /// As [`TopologyFile::plan`].
    pub fn plan_on(&self, machine: &Machine, threads: Option<usize>) -> Result<Plan, RuntimeError> {
        Ok(self.planned(machine, threads)?.1)
    }

    /// The same beside what is asked, as far as the machine has it.
    ///
    /// # Errors
    /// As [`TopologyFile::plan`].
    pub fn planned(
        &self,
        machine: &Machine,
        threads: Option<usize>,
    ) -> Result<(TopologyConfig, Plan), RuntimeError> {
        let config = self.fitting(machine)?;
        let plan = Plan::new(&config, machine, threads).map_err(|source| match &self.path {
            Some(path) if !source.is_environment() => RuntimeError::TopologyOf {
                path: path.clone(),
                source,
            },
            _ => RuntimeError::Topology(source),
        })?;
        tracing::info!(
            name = self.config.name.as_deref().unwrap_or("discovered machine"),
            nodes = plan.nodes.len(),
            threads = plan.n_threads(),
            "planned"
        );
        Ok((config, plan))
    }

    /// What is asked, as far as the machine has it; says (in the log) what the host does in a GPU's place.
    fn fitting(&self, machine: &Machine) -> Result<TopologyConfig, RuntimeError> {
        let Some(path) = &self.path else {
            return Ok(self.config.clone());
        };
        let fit = Fit::new(&self.config, machine, BACKENDS);
        let name = path.display();
        for difference in &fit.fallbacks {
            tracing::warn!("{name}: {difference}; the host computes in its place");
        }
        if fit.lacks.is_empty() {
            return Ok(fit.nearest);
        }
        if self.simulate {
            for difference in &fit.lacks {
                tracing::warn!("{name}: simulated, {difference}");
            }
            return Ok(fit.simulated);
        }
        let mut differences: Vec<String> = fit.lacks.iter().map(Difference::to_string).collect();
        let causes = conflicts(machine, None, &SystemState::read());
        differences
            .extend((causes.iter()).map(|cause| format!("({}: {})", cause.problem, cause.cure)));
        Err(RuntimeError::Lacking {
            path: path.clone(),
            differences,
            nearest: TopologyConfig {
                name: None,
                ..fit.nearest
            }
            .to_short_toml(),
        })
    }
}

/// Parses a topology; an error is a line, counted from 1, and what is wrong with which key there.
fn parse(text: &str) -> Result<TopologyConfig, (usize, String)> {
    toml::from_str(text).map_err(|error| {
        let start = error.span().map_or(0, |span| span.start).min(text.len());
        let line = 1 + text.as_bytes()[..start]
            .iter()
            .filter(|byte| **byte == b'\n')
            .count();
        let message = error.message().trim().replace('\n', ", ");
        let message = match suggestion(&message) {
            Some(key) => format!("{message}; did you mean `{key}`?"),
            None => message,
        };
        let problem = match key_on(text.lines().nth(line - 1).unwrap_or_default()) {
            Some(key) if !message.contains(&format!("`{key}`")) => format!("{key}: {message}"),
            _ => message,
        };
        (line, problem)
    })
}

/// The known key that is most like the unknown one of `message`, if one is.
///
/// serde names both: "unknown field `a`, expected one of `b`, `c`".
fn suggestion(message: &str) -> Option<&str> {
    let names = message.strip_prefix("unknown field `")?;
    let mut names = names.split('`').step_by(2);
    let unknown = names.next()?;
    let alike = |key: &&str| strsim::jaro_winkler(unknown, key);
    let best = names.max_by(|a, b| alike(a).total_cmp(&alike(b)))?;
    (alike(&best) > LIKENESS_MIN).then_some(best)
}

/// Likeness from which on a key is meant: 1 for the same, 0 for nothing in common.
const LIKENESS_MIN: f64 = 0.75;

/// The key or table that a line of TOML is about.
fn key_on(line: &str) -> Option<&str> {
    let line = line.trim();
    let key = if line.starts_with('[') {
        line.split(['#', ']'])
            .next()?
            .trim_start_matches('[')
            .trim()
    } else {
        line.split_once('=')?.0.trim()
    };
    (!key.is_empty()).then_some(key)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problem(text: &str) -> (usize, String) {
        parse(text).unwrap_err()
    }

    #[test]
    fn errors_carry_line_and_key() {
        let (line, text) = problem("name = \"x\"\n\n[host]\nthreads = \"many\"\n");
        assert_eq!(line, 4);
        assert!(text.contains("threads") && text.contains("many"), "{text}");
        let (line, text) = problem("[memory]\nhuge_page = \"try\"\n");
        assert_eq!(line, 2);
        assert!(text.contains("`huge_page`"), "{text}");
        assert!(text.ends_with("; did you mean `huge_pages`?"), "{text}");
        let (line, text) = problem("[memory]\n\nstrictly = true\n");
        assert!(
            line == 3 && text.ends_with("; did you mean `strict`?"),
            "{text}"
        );
        let (_, text) = problem("[gpus]\n");
        assert!(text.ends_with("; did you mean `gpu`?"), "{text}");
        let (_, text) = problem("[[gpu]]\nvram = \"1GiB\"\n");
        assert!(text.ends_with("; did you mean `vram_budget`?"), "{text}");
        let (_, text) = problem("[host]\nxyz = 1\n");
        assert!(!text.contains("did you mean"), "{text}");
        let (line, text) = problem("[host]\nthreads = 0\n");
        assert!(line == 2 && text.contains("threads"), "{line} {text}");
        let (line, text) = problem("name = \n");
        assert!(line == 1 && text.starts_with("name"), "{line} {text}");
    }

    #[test]
    fn shipped_topologies_are_read() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs");
        let mut n_files = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path
                .extension()
                .is_some_and(|extension| extension == "toml")
            {
                TopologyFile::read(Some(&path)).unwrap();
                n_files += 1;
            }
        }
        assert!(n_files > 0);
    }
}
