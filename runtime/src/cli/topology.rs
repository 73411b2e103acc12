//! `pi-runtime topology`.

use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use pi_topology::{Machine, NodeRooms};

use super::output::Output;
use super::topology_measure::{self, MeasureArgs};
use crate::error::RuntimeError;
use crate::session::TopologyFile;
use crate::topology_view::{ModelBytes, TopologyView};

/// Flags of `topology`.
#[derive(Debug, Clone, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct TopologyArgs {
    /// What else to do with it
    #[command(subcommand)]
    pub action: Option<TopologyAction>,
    /// Model file (GGUF) whose bytes are shown where they would lie
    #[arg(short = 'm', long = "model", value_name = "FILE")]
    pub model: Option<PathBuf>,
    /// Topology file (TOML) with the teams to show; default: one for every NUMA node
    #[arg(long, value_name = "FILE")]
    pub topology: Option<PathBuf>,
    /// Show what --simulate would run: missing NUMA nodes as extra teams, missing GPUs on the host
    #[arg(long, requires = "topology")]
    pub simulate: bool,
    /// Threads, over all nodes; default: one for every core of the plan
    #[arg(short = 't', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Context in tokens, for the cache; 0: the model's own, at most 4096
    #[arg(short = 'c', long = "ctx-size", value_name = "N", default_value_t = 0)]
    pub n_ctx: u32,
    /// A made-up machine in place of this one, as hwloc describes them: "package:2 [numanode] core:16 pu:2"
    #[arg(long, value_name = "TEXT", conflicts_with = "xml")]
    pub synthetic: Option<String>,
    /// A saved machine in place of this one, from `lstopo FILE.xml`
    #[arg(long, value_name = "FILE")]
    pub xml: Option<PathBuf>,
    /// Print one JSON object instead of a drawing
    #[arg(long)]
    pub json: bool,
    /// Print the topology with every key and its default instead
    #[arg(long)]
    pub print_config: bool,
}

/// What `topology` does besides drawing.
#[derive(Debug, Clone, Subcommand)]
pub enum TopologyAction {
    /// Measure this machine, and keep the figures for `plan` and `numa-bench`
    Measure(MeasureArgs),
}

/// Draws the machine with what is planned on it.
///
/// # Errors
/// The files, the machine, a model that cannot be run, or the output.
pub fn run(args: &TopologyArgs) -> Result<(), RuntimeError> {
    if let Some(TopologyAction::Measure(args)) = &args.action {
        return topology_measure::run(args);
    }
    let file = TopologyFile::read(args.topology.as_deref())?.simulating(args.simulate);
    let mut output = Output::default();
    if args.print_config {
        return output.text(&file.config().to_toml());
    }
    let machine = args.machine()?;
    let plan = file.plan_on(&machine, args.threads.map(usize::from))?;
    let (plan, rooms) = match machine.is_this_system() {
        true => {
            let rooms = NodeRooms::read(&plan)?;
            (topology_measure::by_bandwidth(plan)?, rooms)
        }
        false => (plan, NodeRooms::of_machine(&machine)),
    };
    let model = match &args.model {
        Some(path) => Some(ModelBytes::of(path, &plan, &rooms, args.n_ctx as usize)?),
        None => None,
    };
    let view = TopologyView::new(machine, plan, model);
    match args.json {
        true => output.line(&view.json().map_err(|error| RuntimeError::OutputFailed {
            source: error.into(),
        })?),
        false => output.text(&view.text()),
    }
}

impl TopologyArgs {
    fn machine(&self) -> Result<Machine, RuntimeError> {
        if let Some(description) = &self.synthetic {
            return Ok(Machine::synthetic(description)?);
        }
        if let Some(path) = &self.xml {
            return saved(path);
        }
        let mut machine = Machine::discover()?;
        machine.ask_gpu_driver();
        Ok(machine)
    }
}

fn saved(path: &Path) -> Result<Machine, RuntimeError> {
    let xml = std::fs::read_to_string(path).map_err(|source| RuntimeError::ReadMachine {
        path: path.to_path_buf(),
        source,
    })?;
    Ok(Machine::from_xml(&path.display().to_string(), &xml)?)
}
