//! Where threads and memory go: a topology file, or the machine as it is found.

use std::path::{Path, PathBuf};

use pi_topology::{
    Backends, ColdPolicy, Difference, Fit, HostConfig, HugePages, Machine, NodeCount, Plan,
    SystemState, TopologyConfig, conflicts,
};

use super::topology_syntax::parse;
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

#[cfg(test)]
mod tests {
    use super::*;

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
