//! `pi-runtime plan`: where a model goes on this machine, and what a token will cost.
//!
//! Placement is solved by [`pi_topology::placement`]; the costs are measured each time: a few of the model's layers,
//! with random bytes in the model's shapes and types, run on the planned threads through the real actors
//! (`rehearsal`, `costs`), and a token is the sum of its parts over all layers (`forecast`). Nothing that is
//! measured here changes what a model computes.
//!
//! Nothing runs on GPUs: with them a token is bytes over speeds, and what passes to and from them goes by the machine's
//! profile (`link`, `gpu`).

mod costs;
mod decision_report;
mod forecast;
mod gpu;
mod gpu_parts;
mod gpu_report;
mod link;
mod loads;
mod memory;
mod place;
mod predicted;
mod rehearsal;
mod report;
mod rows;
pub(crate) mod samples;
mod sketches;

use pi_topology::placement::LayerLoad;
use pi_topology::{NodeRooms, Plan, available_memory_bytes, read_bandwidth};

pub use costs::{Costs, LayerCost};
pub use forecast::{Part, PartForecast};
pub use gpu::{GpuForecast, PlannedGpu, PromptForecast};
pub use link::{Figure, LinkFigures};
pub use loads::{Frequencies, FrequencySource};
pub use memory::NodeMemory;
pub use predicted::{Decision, WayCost};
pub use report::{GroupRun, ModeReport, Report};

use crate::error::RuntimeError;
use crate::gguf::GgufFile;
use crate::head_sketch::Head;
use crate::machine_profile::MachineProfile;
use crate::model::description::Description;
use crate::model::gpu::{GpuPart, HotLayer};
use crate::model::room::fitting_loader;
use crate::model::shares::Division;
use crate::model::sparsity::SparsityPlan;
use crate::model::{Hyperparameters, Loader, ModelError, ModelTensors, Sparsity};
use crate::session::{ModelOptions, N_CTX_DEFAULT_MAX, open_sidecar};
use crate::sidecar::{LayerPredictors, Profile, Sidecar, default_path};
use forecast::{OtherBytes, forecast};
use loads::{Expected, LayerBytes, head_bytes, layer_bytes};
use memory::{budgets, check};
use place::Placed;
use predicted::Way;
pub use rehearsal::Class;
use rehearsal::{Rehearsal, choose_layers};

/// Weights that are rehearsed for each thread, as far as the model has as many: more than its share of a cache.
const REHEARSED_BYTES_A_THREAD: usize = 192 << 20;

/// What is to be planned.
#[derive(Debug, Clone)]
pub struct PlanRequest {
    /// The model; [`ModelOptions::sparsity`] asks for one mode, none for all that the model has. Its sidecar, named or
    /// beside it, is read if there is one.
    pub model: ModelOptions,
    /// The threads and nodes.
    pub plan: Plan,
    /// Tokens in the context.
    pub depth: usize,
    /// Share of neurons that a token activates, in the mean over all; none: as the sidecar's profile says.
    pub active: Option<f64>,
    /// What was measured of the machine with these threads, if it was; else what is needed of it is measured now, and
    /// what of a GPU's link is needed assumed.
    pub profile: Option<MachineProfile>,
    /// GPUs that are the device, in the order of their layers; none: the host computes everything.
    pub gpus: Vec<PlannedGpu>,
}

/// Plans, and measures for it: a second or two for each mode, several where ways to predict are compared.
///
/// # Errors
/// The model, its sidecar, memory and threads that cannot be had, or a GPU that is required and has no room.
pub fn plan(request: &PlanRequest) -> Result<Report, RuntimeError> {
    let path = &request.model.path;
    let file = GgufFile::open(path)?;
    let in_file = |source: ModelError| RuntimeError::Model {
        path: path.clone(),
        source,
    };
    let hyper = Hyperparameters::read(&file).map_err(in_file)?;
    let tensors = ModelTensors::find(&file, &hyper).map_err(in_file)?;
    let needed = request.model.sparsity == Some(Sparsity::Predicted) || default_path(path).exists();
    let sidecar = open_sidecar(&request.model, needed, &file, &hyper)?;
    let frequencies = Frequencies::find(&hyper, sidecar.as_ref())?;
    let frequencies = match request.active {
        Some(active) => frequencies.scaled_to(active),
        None => frequencies,
    };
    let n_ctx = match request.model.n_ctx {
        0 => hyper.n_ctx_max.min(N_CTX_DEFAULT_MAX),
        n_ctx => n_ctx,
    };
    let planning = Planning {
        request,
        options: ModelOptions {
            n_ctx,
            ..request.model.clone()
        },
        file: &file,
        hyper: &hyper,
        tensors: &tensors,
        expected: Expected::new(&frequencies, sidecar.as_ref())?,
        profile: match &sidecar {
            Some(sidecar) if !request.gpus.is_empty() => {
                Profile::read(sidecar, hyper.n_layer, hyper.n_ff)?
            }
            _ => None,
        },
        gpus: LinkFigures::of_all(&request.gpus, request.profile.as_ref()),
        rooms: NodeRooms::read(&request.plan)?,
    };
    planning.check_depth()?;
    planning.check_parts()?;
    let (modes, hint) = planning.modes(sidecar.as_ref())?;
    // what does not fit is refused before anything is measured
    let budgets = budgets(&request.plan, &planning.rooms)?;
    for mode in &modes {
        check(&planning.memory(mode, &budgets, None)?)?;
    }
    let parts = modes.iter().map(|mode| planning.gpu_parts(mode));
    let parts = parts.collect::<Result<Vec<_>, _>>()?;
    let bandwidth = match &request.profile {
        Some(profile) => profile.memory.together_bytes_per_s,
        None => read_bandwidth(&request.plan)?,
    };
    let reports = (modes.iter().zip(&parts))
        .map(|(mode, parts)| planning.mode(mode, parts, &budgets, bandwidth))
        .collect::<Result<Vec<_>, _>>()?;
    Ok(Report {
        model: Description::of(&file).name,
        path: path.clone(),
        threads: request.plan.team_sizes(),
        proportion: request.plan.proportion.clone(),
        tier: planning.options.cpu.tier().name(),
        activations: planning.options.cpu.mode().to_string(),
        n_layer: hyper.n_layer,
        n_embd: hyper.n_embd,
        n_ctx,
        depth: request.depth,
        bandwidth_bytes_per_s: bandwidth,
        bandwidth_measured: (request.profile.as_ref()).map(|profile| profile.measured.clone()),
        frequency_source: frequencies.source.clone(),
        active_share: frequencies.mean(),
        active_asked: request.active.is_some(),
        hint,
        modes: reports,
        gpus: planning.gpus,
    })
}

/// A request with what is known of its model.
struct Planning<'a> {
    request: &'a PlanRequest,
    options: ModelOptions,
    file: &'a GgufFile,
    hyper: &'a Hyperparameters,
    tensors: &'a ModelTensors,
    expected: Expected<'a>,
    /// How often neurons fired, where there are GPUs.
    profile: Option<Profile>,
    gpus: Vec<(PlannedGpu, LinkFigures)>,
    /// What is free on NUMA nodes.
    rooms: NodeRooms,
}

/// A mode, and who predicts in it.
#[derive(Debug)]
struct Mode {
    sparsity: SparsityPlan,
    predictors: Option<Vec<LayerPredictors>>,
    /// Ways to predict, among which nobody has chosen yet.
    ways: Vec<Way>,
}

impl Planning<'_> {
    fn in_model(&self, source: ModelError) -> RuntimeError {
        RuntimeError::Model {
            path: self.options.path.clone(),
            source,
        }
    }

    fn check_depth(&self) -> Result<(), RuntimeError> {
        let (depth, n_ctx) = (self.request.depth, self.options.n_ctx);
        if n_ctx >= depth + 2 {
            return Ok(());
        }
        Err(RuntimeError::Flag {
            flag: "-d",
            value: depth.to_string(),
            problem: format!(
                "behind it a context of {n_ctx} tokens has no room for two more: give fewer, or more context with -c"
            ),
        })
    }

    /// Parts of a model that no rehearsal has.
    fn check_parts(&self) -> Result<(), RuntimeError> {
        let refused = |flag, value: &str, cure: &str| {
            Err(RuntimeError::Flag {
                flag,
                value: value.to_owned(),
                problem: format!(
                    "what it costs is not forecast: {cure}, or measure it with `pi-runtime bench`"
                ),
            })
        };
        if self.options.sparsity == Some(Sparsity::Threshold) {
            return refused("--sparsity", "threshold", "plan another mode");
        }
        if self.options.head == Head::Sparse {
            return refused("--head", "sparse", "plan the full head");
        }
        Ok(())
    }

    /// The modes to plan: the one that is asked for, or all that the model and its sidecar have; and a hint.
    fn modes(
        &self,
        sidecar: Option<&Sidecar>,
    ) -> Result<(Vec<Mode>, Option<String>), RuntimeError> {
        let resolve = |asked| {
            SparsityPlan::resolve(asked, self.hyper.gate, &self.tensors.stored_downs())
                .map_err(|source| self.in_model(source))
        };
        let plain = |sparsity| Mode {
            sparsity,
            predictors: None,
            ways: vec![],
        };
        match self.options.sparsity {
            Some(Sparsity::Predicted) => {
                let predicted = self.predicted(sidecar, resolve(Some(Sparsity::Predicted))?)?;
                let missing = || sidecar.map(|sidecar| sidecar.missing("predictors"));
                match (predicted, missing()) {
                    (None, Some(missing)) => Err(missing.into()),
                    (predicted, _) => Ok((predicted.into_iter().collect(), None)),
                }
            }
            Some(mode) => Ok((vec![plain(resolve(Some(mode))?)], None)),
            None => {
                let mut modes = vec![plain(resolve(Some(Sparsity::Off))?)];
                let best = resolve(None)?;
                let hint = best.hint.clone();
                if best.mode != Sparsity::Off {
                    modes.push(plain(best));
                    match self.predicted(sidecar, resolve(Some(Sparsity::Predicted))?) {
                        Ok(predicted) => modes.extend(predicted),
                        // nobody asked for the mode
                        Err(error) => {
                            let hint = format!("no plan for predicted: {error}");
                            return Ok((modes, Some(hint)));
                        }
                    }
                }
                Ok((modes, hint))
            }
        }
    }

    /// The loader of what the host has, where `hot` neurons are on GPUs.
    fn loader<'t>(
        &'t self,
        mode: &'t Mode,
        hot: Option<&'t [HotLayer]>,
    ) -> Result<Loader<'t>, RuntimeError> {
        let loader_of = |division: &Division| {
            Loader::predicted(
                self.file,
                self.hyper,
                self.tensors,
                &mode.sparsity,
                mode.predictors.as_deref(),
                division,
                hot,
                self.options.n_ctx,
            )
            .map_err(|source| self.in_model(source))
        };
        let (plan, kv_type) = (&self.request.plan, self.options.kv_type);
        fitting_loader(plan, &mode.sparsity, &self.rooms, kv_type, loader_of)
    }

    /// What each node holds; without `costs` without its working memory.
    ///
    /// # Errors
    /// A NUMA node without room for it.
    fn memory(
        &self,
        mode: &Mode,
        budgets: &[Option<u64>],
        costs: Option<&Costs>,
    ) -> Result<Vec<NodeMemory>, RuntimeError> {
        let held = self.loader(mode, None)?.held_bytes(self.options.kv_type);
        held.check(&self.request.plan, &self.rooms)?;
        let nodes = held.weights.into_iter().zip(held.cache).zip(budgets);
        Ok(nodes
            .enumerate()
            .map(|(node, ((weights, cache), &budget))| {
                let working = costs.map_or(0, |costs| costs.working_bytes[node]);
                let huge_pages = self.request.plan.huge_pages;
                NodeMemory::new(huge_pages, weights, cache, working, budget)
            })
            .collect())
    }

    /// The layers as placement sees them.
    fn loads(&self, mode: &Mode, layers: &[LayerBytes]) -> Vec<LayerLoad> {
        let by_layer = layers.iter().zip(&self.expected.frequencies.by_layer);
        by_layer
            .map(|(layer, frequencies)| layer.load(mode.sparsity.mode, frequencies))
            .collect()
    }

    fn mode(
        &self,
        mode: &Mode,
        gpu_parts: &[GpuPart],
        budgets: &[Option<u64>],
        bandwidth_bytes_per_s: f64,
    ) -> Result<ModeReport, RuntimeError> {
        let costs = self.measure(&mode.sparsity, mode.predictors.as_deref())?;
        let memory = self.memory(mode, budgets, Some(&costs))?;
        check(&memory)?;
        let layers = self.layer_bytes(&mode.sparsity, mode.predictors.as_deref());
        let parts = forecast(
            mode.sparsity.mode,
            &costs,
            &layers,
            &self.expected,
            self.other_bytes(),
        );
        let placed = self.place(mode, &layers, &costs, &memory)?;
        let gpu = self.on_gpus(mode, gpu_parts, &layers, (&costs, &memory))?;
        let report = ModeReport::new(
            &mode.sparsity,
            parts,
            bandwidth_bytes_per_s,
            memory,
            placed,
            &costs,
        );
        let mut notes = report.notes.clone();
        notes.extend(self.assumed_candidates(mode));
        Ok(ModeReport {
            gpu,
            notes,
            decision: self.decide(mode, &costs)?,
            ..report
        })
    }

    /// Rehearses a mode's layers.
    fn measure(
        &self,
        sparsity: &SparsityPlan,
        predictors: Option<&[LayerPredictors]>,
    ) -> Result<Costs, RuntimeError> {
        let classes = Class::all(&self.tensors.layers, predictors);
        let layers = choose_layers(&self.tensors.layers, &classes, self.rehearsed_bytes());
        let rehearsal = Rehearsal::new(
            self.hyper,
            self.tensors,
            sparsity,
            predictors,
            &layers,
            &self.expected,
        );
        let planned = (&self.request.plan, &self.rooms);
        costs::measure(
            &rehearsal,
            self.file,
            &self.options,
            planned,
            self.request.depth,
        )
    }

    fn layer_bytes(
        &self,
        sparsity: &SparsityPlan,
        predictors: Option<&[LayerPredictors]>,
    ) -> Vec<LayerBytes> {
        layer_bytes(
            self.hyper,
            self.tensors,
            sparsity,
            predictors,
            &self.expected.shares,
        )
    }

    /// Weights to rehearse.
    fn rehearsed_bytes(&self) -> usize {
        let wanted = REHEARSED_BYTES_A_THREAD * self.request.plan.n_threads();
        // what is rehearsed is there twice for a moment
        let wanted = available_memory_bytes().map_or(wanted, |available| {
            wanted.min(usize::try_from(available / 4).unwrap_or(wanted))
        });
        // it is divided over the nodes as the model is, or lies on one of them
        let smallest = self.rooms.iter().map(|(_, free_bytes)| free_bytes).min();
        smallest.map_or(wanted, |free_bytes| {
            wanted.min(usize::try_from(free_bytes / 2).unwrap_or(wanted))
        })
    }

    fn other_bytes(&self) -> OtherBytes {
        let (head, other) = head_bytes(self.hyper, self.tensors);
        let hyper = self.hyper;
        let seen = self.request.depth + 1;
        let seen = hyper.window.map_or(seen, |window| seen.min(window));
        let row_bytes = self.options.kv_type.row_bytes(hyper.head_dim);
        OtherBytes {
            head,
            other,
            kv: (2 * seen * hyper.n_layer * hyper.n_head_kv * row_bytes) as u64,
        }
    }
}
