//! `pi-runtime topology measure`.

use std::path::PathBuf;

use clap::Args;
use pi_topology::{Machine, Plan};

use super::output::Output;
use super::progress::Activity;
use super::user_folder;
use crate::error::RuntimeError;
use crate::machine_profile::{MachineProfile, ProfileStore};
use crate::session::TopologyFile;

/// Flags of `topology measure`.
#[derive(Debug, Clone, Args)]
pub struct MeasureArgs {
    /// Topology file (TOML) with the teams that measure; default: one for every NUMA node
    #[arg(long, value_name = "FILE")]
    pub topology: Option<PathBuf>,
    /// Measure what --simulate would run: missing NUMA nodes as extra teams
    #[arg(long, requires = "topology")]
    pub simulate: bool,
    /// Threads, over all nodes; default: one for every core of the plan
    #[arg(short = 't', long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Option<u16>,
    /// Print one JSON object instead of tables
    #[arg(long)]
    pub json: bool,
}

/// Measures, prints, and keeps what was measured.
///
/// # Errors
/// The file, threads or memory that cannot be had, the output, or the folder where it is kept.
pub fn run(args: &MeasureArgs) -> Result<(), RuntimeError> {
    let file = TopologyFile::read(args.topology.as_deref())?.simulating(args.simulate);
    let machine = Machine::discover()?;
    let plan = file.plan_on(&machine, args.threads.map(usize::from))?;
    let activity = Activity::new("measuring");
    let profile = MachineProfile::measure(&machine, &plan, &|part| activity.say(part))?;
    activity.end();
    let mut output = Output::default();
    match args.json {
        true => output.line(&serde_json::to_string(&profile).map_err(|error| {
            RuntimeError::OutputFailed {
                source: error.into(),
            }
        })?)?,
        false => output.text(&profile.text())?,
    }
    match store() {
        Some(store) => {
            let path = store.save(&profile)?;
            if !args.json {
                output.line(&format!("kept for `plan` in {}", path.display()))?;
            }
        }
        None => tracing::warn!("not kept: there is no home; name a folder in XDG_CACHE_HOME"),
    }
    Ok(())
}

/// Where profiles are kept; nowhere without a home.
pub fn store() -> Option<ProfileStore> {
    user_folder::cache().map(ProfileStore::new)
}

/// A plan of this machine, with shares by bandwidth where that was measured with its threads.
///
/// # Errors
/// As [`profile_of`].
pub fn by_bandwidth(plan: Plan) -> Result<Plan, RuntimeError> {
    // one node has everything: nothing needs to be known
    if plan.nodes.len() < 2 {
        return Ok(plan);
    }
    Ok(with_profile(plan)?.0)
}

/// The same, with what was measured, which is looked up once.
///
/// # Errors
/// As [`profile_of`].
pub fn with_profile(plan: Plan) -> Result<(Plan, Option<MachineProfile>), RuntimeError> {
    let profile = profile_of(&plan)?;
    let plan = match &profile {
        Some(profile) if plan.nodes.len() > 1 => plan.by_bandwidth(&profile.memory),
        _ => plan,
    };
    Ok((plan, profile))
}

/// What was measured of this machine with the threads of `plan`, if it was.
///
/// # Errors
/// The machine cannot be discovered.
pub fn profile_of(plan: &Plan) -> Result<Option<MachineProfile>, RuntimeError> {
    let Some(store) = store() else {
        return Ok(None);
    };
    Ok(store.find(&Machine::discover()?, plan))
}
