//! `pi-runtime numa-bench`.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Args;
use pi_actors::latency::hop;
use pi_topology::{ColdPolicy, HugePages, Machine, SystemState};
use serde::de::value::{Error, StrDeserializer};
use serde::de::{DeserializeOwned, IntoDeserializer};

use super::args::ModelArgs;
use super::interrupt::Interrupt;
use super::output::Output;
use super::progress::Activity;
use super::topology_measure::{by_bandwidth, profile_of};
use crate::error::RuntimeError;
use crate::machine_profile::{Join, MachineProfile};
use crate::numa_bench::{Point, Prediction, Sweep, Verdict, csv, measure, svg, table, winner};
use crate::plan::{PlanRequest, plan};
use crate::session::{ModelOptions, warn_of_conflicts};
use crate::unfinished_file::UnfinishedFile;

/// Messages that are timed where the machine has not been measured.
const N_HOPS: usize = 20_000;

/// Flags of `numa-bench`.
#[derive(Debug, Clone, Args)]
pub struct NumaBenchArgs {
    /// Model, machine and arithmetic.
    #[command(flatten)]
    pub model: ModelArgs,
    /// Policies to try: shard, replicate, interleave, single:N; default: the first three and single:0
    #[arg(long, value_name = "POLICY", value_delimiter = ',', value_parser = from_text::<ColdPolicy>)]
    pub cold: Vec<ColdPolicy>,
    /// Pages to try: try, require, off; default: try and off
    #[arg(long, value_name = "PAGES", value_delimiter = ',', value_parser = from_text::<HugePages>)]
    pub huge_pages: Vec<HugePages>,
    /// Numbers of teams to try; default: one for each NUMA node, and one team (on one node two)
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..))]
    pub teams: Vec<u16>,
    /// Threads to try, over all teams; default: one for every core, and half as many
    #[arg(short = 't', long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u16).range(1..))]
    pub threads: Vec<u16>,
    /// Tokens decoded for each sample
    #[arg(short = 'n', long = "n-gen", value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    pub n_gen: u32,
    /// Rounds; every setting is measured once in each
    #[arg(short = 'r', long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub repetitions: u16,
    /// Where the samples (PREFIX.csv) and the picture (PREFIX.svg) are written
    #[arg(short = 'o', long, value_name = "PREFIX", default_value = "numa-bench")]
    pub output: PathBuf,
    /// On a machine with one NUMA node: speed of the other socket's memory over the own's, for the prediction
    #[arg(long, value_name = "SHARE", default_value_t = 0.5, value_parser = share)]
    pub remote_speed: f64,
}

/// Reads what a topology file would take as a text.
fn from_text<T: DeserializeOwned>(text: &str) -> Result<T, Error> {
    let text: StrDeserializer<'_, Error> = text.into_deserializer();
    T::deserialize(text)
}

fn share(text: &str) -> Result<f64, String> {
    let good = |share: &f64| *share > 0.0 && *share <= 1.0;
    let share = text.parse().ok().filter(good);
    share.ok_or_else(|| "give more than 0 and at most 1".to_owned())
}

/// Measures every setting in turns, prints what is fastest, and writes samples and a picture.
///
/// # Errors
/// The flags, the model, the machine, or files that cannot be written.
pub fn run(args: &NumaBenchArgs) -> Result<(), RuntimeError> {
    let machine = Machine::discover()?;
    let file = args.model.topology_file()?;
    let numbers = |numbers: &[u16]| numbers.iter().copied().map(usize::from).collect();
    let sweep = Sweep {
        cold: args.cold.clone(),
        huge_pages: args.huge_pages.clone(),
        teams: numbers(&args.teams),
        threads: numbers(&args.threads),
    };
    let points = (sweep.points(&file, &machine)?.into_iter())
        .map(|point| {
            let plan = by_bandwidth(point.plan)?;
            Ok(Point { plan, ..point })
        })
        .collect::<Result<Vec<Point>, RuntimeError>>()?;
    if let Some(widest) = points.iter().max_by_key(|point| point.plan.n_threads()) {
        warn_of_conflicts(&widest.plan);
    }
    let n_gen = args.n_gen as usize;
    let options = args.model.options(n_gen + 1)?;
    // Ctrl-C takes the unfinished file along
    let _interrupt = Interrupt::listen();
    // what cannot be written is refused before anything is measured
    let mut files = OutputFiles::create(&args.output)?;
    let single = points.iter().find(|point| point.plan.nodes.len() == 1);
    let single = single.cloned();
    let activity = Activity::new("measuring");
    let rounds = usize::from(args.repetitions);
    let all = measure(&options, points, n_gen, rounds, &|part| activity.say(part))?;
    activity.end();
    let verdict = Verdict::of(&all);
    let mut output = Output::default();
    output.text(&table(&all, &verdict))?;
    let is_virtual_machine = SystemState::read().is_virtual_machine;
    if let Some(text) = not_numa(machine.numas().len(), is_virtual_machine) {
        output.text(text)?;
    }
    if machine.numas().len() < 2 {
        match single {
            Some(point) => output.text(&predicted(args, &options, &point)?)?,
            None => output.text("no prediction: it takes one team's speed (--teams 1,2)\n")?,
        }
    }
    let title = format!("{}: decoding", options.path.display());
    let svg = svg(&title, &all, &verdict).map_err(|error| files.failed(error.to_string()))?;
    files.write(&csv(&all), &svg)?;
    output.text(&format!("\n{}", winner(&all, &verdict)))?;
    output.line(&format!(
        "\nsamples: {}, picture: {}",
        files.csv.display(),
        files.svg.display()
    ))
}

/// Why figures of this machine say nothing of real NUMA hardware, where that is so.
fn not_numa(n_numas: usize, is_virtual_machine: bool) -> Option<&'static str> {
    match (n_numas, is_virtual_machine) {
        (0 | 1, _) => Some(
            "\n\
             not measured on real NUMA hardware: this machine has one NUMA node. All memory is equally near, so that policies\n\
             differ here in who computes and in messages alone; teams and pages are measured as they are\n\n",
        ),
        (_, true) => Some(
            "\n\
             not measured on real NUMA hardware: this is a virtual machine, whose NUMA nodes are what its host makes of them.\n\
             Only the host knows whether their memory and CPUs lie on sockets of their own; measure there, or have it bind\n\
             them\n\n",
        ),
        (_, false) => None,
    }
}

/// The planner's view of two such machines as sockets of one.
fn predicted(
    args: &NumaBenchArgs,
    options: &ModelOptions,
    point: &Point,
) -> Result<String, RuntimeError> {
    let profile = profile_of(&point.plan)?;
    let cpus = &point.plan.nodes[0].cpus;
    let known = profile.as_ref().and_then(MachineProfile::hop_ns);
    let hop_ns = match (known, &cpus[..]) {
        (Some(hop_ns), _) => hop_ns,
        (None, [from, to, ..]) => hop(*from, *to, N_HOPS)?.median_ns,
        (None, _) => return Ok("no prediction: one core has no other to send to\n".to_owned()),
    };
    let joins = match &profile {
        Some(profile) if !profile.joins.is_empty() => profile.joins.clone(),
        _ => Join::measure(&point.plan.nodes[0])?,
    };
    let report = plan(&PlanRequest {
        active: None,
        model: ModelOptions {
            // of the context that it is asked for; the plan wants room to rehearse
            n_ctx: 0,
            ..options.clone()
        },
        plan: point.plan.clone(),
        depth: args.n_gen as usize / 2,
        profile,
        gpus: vec![],
    });
    let report = match report {
        Ok(report) => report,
        // parts that no plan knows, such as `threshold`
        Err(error @ RuntimeError::Flag { .. }) => return Ok(format!("no prediction: {error}\n")),
        Err(error) => return Err(error),
    };
    // the last but `predicted` is what runs where nothing is asked for
    let modes = report.modes.iter();
    let mut modes = modes.filter(|mode| options.sparsity.is_some() || mode.mode != "predicted");
    let Some(mode) = modes.next_back() else {
        return Ok(String::new());
    };
    // with `single:0` node 0 has the only sum; what that saves is next to nothing
    let join_ns = Join::more_ns(&joins, 2, report.n_embd);
    let prediction = Prediction::of(mode, report.n_layer, hop_ns, join_ns, args.remote_speed);
    Ok(prediction.to_string())
}

/// The samples' and the picture's files.
struct OutputFiles {
    csv: PathBuf,
    svg: PathBuf,
    unfinished: Option<(UnfinishedFile, fs::File)>,
}

impl OutputFiles {
    fn create(prefix: &Path) -> Result<Self, RuntimeError> {
        let with = |end: &str| {
            let mut name = prefix.as_os_str().to_owned();
            name.push(end);
            PathBuf::from(name)
        };
        let mut files = Self {
            csv: with(".csv"),
            svg: with(".svg"),
            unfinished: None,
        };
        let created = UnfinishedFile::create_beside(&files.csv);
        files.unfinished = Some(created.map_err(|error| files.failed(error.to_string()))?);
        Ok(files)
    }

    fn failed(&self, problem: String) -> RuntimeError {
        RuntimeError::Flag {
            flag: "-o",
            value: self.csv.with_extension("").display().to_string(),
            problem: format!("cannot write there: {problem}: name another place"),
        }
    }

    fn write(&mut self, csv: &str, svg: &str) -> Result<(), RuntimeError> {
        let written = match self.unfinished.take() {
            Some((unfinished, mut file)) => file
                .write_all(csv.as_bytes())
                .and_then(|()| unfinished.rename_to(&self.csv)),
            None => Ok(()),
        };
        written
            .and_then(|()| fs::write(&self.svg, svg))
            .map_err(|error| self.failed(error.to_string()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_numa_hardware_is_said() {
        let said = |n_numas, is_virtual_machine| {
            let text = not_numa(n_numas, is_virtual_machine)?;
            assert!(text.starts_with("\nnot measured on real NUMA hardware: "));
            Some(text.contains("virtual machine"))
        };
        assert_eq!(said(1, false), Some(false));
        assert_eq!(said(1, true), Some(false));
        assert_eq!(said(2, true), Some(true));
        assert_eq!(said(2, false), None);
    }
}
