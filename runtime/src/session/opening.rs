//! From a file's name to a model that is ready: the one place where file, machine, loader and engine meet.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use pi_actors::faults::Faults;
use pi_actors::trace::TraceBounds;
use pi_actors::{ActorError, Engine, EngineOptions, LayerTap, Teams};
use pi_kernels::attention::KvType;
use pi_kernels::ffn_sparse::FFN_GROUPS;
use pi_kernels::{ActivationMode, Cpu};
use pi_topology::{NodeRooms, Plan, Residence, TopologyError};

use super::conflict_log::warn_of_conflicts;
use super::gpu::OnGpus;
use super::replanning;
use super::sparsity::{self, ThresholdSource};
use crate::chat::SpecialTexts;
use crate::error::RuntimeError;
use crate::gguf::GgufFile;
use crate::head_sketch::{Head, SketchTensors};
use crate::model::description::Description;
use crate::model::footprint::{Footprint, HeadBytes};
use crate::model::gpu::GpuRequest;
use crate::model::load::model_shape;
use crate::model::node_memory::{PlacedWeights, VerifiedMemory};
use crate::model::predicting::{Predicting, predicts};
use crate::model::room::fitting_loader;
use crate::model::shares::Division;
use crate::model::sparsity::SparsityPlan;
use crate::model::{Hyperparameters, Loader, ModelError, ModelTensors, Sparsity};
use crate::sidecar::{self, Profile, Sidecar, SidecarError};
use crate::tokenizer::{Tokenizer, TokenizerError};

/// Context without `-c`, where the model knows a longer one: a larger cache has to be asked for.
pub(crate) const N_CTX_DEFAULT_MAX: usize = 4096;

/// Most tokens that go through the layers together.
pub const N_UBATCH: usize = 512;

/// Longest wait for an actor; a step of a large model from a cold disk takes seconds.
const WAIT_LIMIT: Duration = Duration::from_secs(60);

/// How a model is to be opened.
#[derive(Debug, Clone)]
pub struct ModelOptions {
    /// Its file.
    pub path: PathBuf,
    /// Tokens of the context; 0: the model's own, at most 4096.
    pub n_ctx: usize,
    /// The mode; none: `exact` where it is free.
    pub sparsity: Option<Sparsity>,
    /// Instruction set and activation arithmetic.
    pub cpu: Cpu,
    /// Format of the key-value cache.
    pub kv_type: KvType,
    /// How much of what runs is recorded, `usize::MAX` steps for as many as the context takes; none: nothing.
    pub trace: Option<TraceBounds>,
    /// Tokens that go through the layers together, at most [`N_UBATCH`]; the results do not depend on it.
    pub n_batch: usize,
    /// Who looks at the hidden states, if somebody does.
    pub tap: Option<Arc<dyn LayerTap>>,
    /// What shall fail. Empty but in tests.
    pub faults: Faults,
    /// The model's sidecar; none: the file beside the model, where a mode needs it.
    pub sidecar: Option<PathBuf>,
    /// Which head computes logits; the sparse one needs the sidecar.
    pub head: Head,
    /// How neurons are predicted, where they are.
    pub predicting: Predicting,
    /// Where the thresholds of `threshold` come from.
    pub thresholds: ThresholdSource,
    /// Tokens after which neurons change places between GPU and host, 0: never; none: as the topology has it.
    pub replan: Option<usize>,
    /// Whether GPUs can be asked to count what they read ([`Engine::count_on_gpus`]).
    pub counts: bool,
}

impl ModelOptions {
    /// The model at `path` with 8-bit activations, an f16 cache, and all else as it is without flags.
    pub fn new(path: PathBuf) -> Self {
        Self {
            path,
            n_ctx: 0,
            sparsity: None,
            cpu: Cpu::detect(ActivationMode::Q8),
            kv_type: KvType::F16,
            trace: None,
            n_batch: N_UBATCH,
            tap: None,
            faults: Faults::default(),
            sidecar: None,
            head: Head::Full,
            predicting: Predicting::default(),
            thresholds: ThresholdSource::default(),
            replan: None,
            counts: false,
        }
    }
}

/// Watches a model being loaded.
pub trait LoadObserver: Sync {
    /// Copying begins: so many bytes.
    fn begin(&self, _total_bytes: u64) {}

    /// So many bytes are copied so far; called from several threads.
    fn copied(&self, _bytes: u64) {}

    /// Copying has ended.
    fn end(&self) {}
}

/// Watches and says nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Silent;

impl LoadObserver for Silent {}

/// A model that is ready to compute.
#[derive(Debug)]
pub struct LoadedModel {
    /// Its file.
    pub path: PathBuf,
    /// What computes it.
    pub engine: Engine,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// Its name and size.
    pub description: Description,
    /// Its numbers.
    pub hyper: Hyperparameters,
    /// Tokens of the context.
    pub n_ctx: usize,
    /// Source of its chat template, if it has one.
    pub chat_template: Option<String>,
    /// The mode it runs in.
    pub sparsity: SparsityPlan,
    /// Weight bytes of a token.
    pub footprint: Footprint,
    /// Its sidecar, where it was named or is needed.
    pub sidecar: Option<Sidecar>,
    /// Which head computes the logits of answers.
    pub head: Head,
    /// What a head reads.
    pub head_bytes: HeadBytes,
    /// The weights where they lie, to be found again.
    pub placed: PlacedWeights,
    /// Where they lay when they were loaded.
    pub residence: Residence,
}

impl LoadedModel {
    /// Opens a model on the planned threads. The tokenizer is built on a thread of its own meanwhile.
    ///
    /// # Errors
    /// The file, the model, its tokenizer, or what the machine refuses; all name the file or what is missing.
    pub fn open(
        options: &ModelOptions,
        plan: &Plan,
        observer: &dyn LoadObserver,
    ) -> Result<Self, RuntimeError> {
        let file = GgufFile::open(&options.path)?;
        let in_file = |source| model_error(&options.path, source);
        let hyper = Hyperparameters::read(&file).map_err(in_file)?;
        let needed = sparsity::needs_sidecar(options, &hyper) || options.head == Head::Sparse;
        // its profile says which neurons are hot
        let wanted = !plan.gpus.is_empty() && sidecar::default_path(&options.path).exists();
        let sidecar = open_sidecar(options, needed || wanted, &file, &hyper)?;
        let (tokenizer, engine) = std::thread::scope(|scope| {
            let tokenizer = scope.spawn(|| Tokenizer::from_metadata(file.metadata()));
            let engine = start_engine(options, plan, &file, &hyper, sidecar.as_ref(), observer);
            let tokenizer = tokenizer
                .join()
                .unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            (tokenizer, engine)
        });
        let tokenizer = tokenizer.map_err(|source| tokenizer_error(&options.path, source))?;
        let Started {
            engine,
            sparsity,
            footprint,
            n_ctx,
            head_bytes,
            placed,
            residence,
        } = engine?;
        check_vocabulary(&tokenizer, &hyper).map_err(in_file)?;
        let chat_template = file
            .metadata()
            .get_str("tokenizer.chat_template")?
            .map(str::to_owned);
        Ok(Self {
            path: options.path.clone(),
            engine,
            tokenizer,
            description: Description::of(&file),
            hyper,
            n_ctx,
            chat_template,
            sparsity,
            footprint,
            sidecar,
            head: options.head,
            head_bytes,
            placed,
            residence,
        })
    }

    /// Finds out again, after decoding, page by page where weights lie, and now also the cache: on several NUMA nodes, or
    /// where the plan is strict.
    ///
    /// # Errors
    /// They lie elsewhere than planned, or nobody knows where, and the plan is strict.
    pub fn verify_again(&self) -> Result<(), TopologyError> {
        let plan = self.engine.teams().plan();
        if !plan.strict && plan.numas().len() < 2 {
            return Ok(());
        }
        let weights = self.placed.verify()?;
        let cache = plan.verify_caches(&self.engine.cache_addresses())?;
        tracing::info!("after decoding weights lie: {weights}; the cache: {cache}");
        Ok(())
    }

    /// Every part of the model that changes its output, in words.
    pub fn lossy(&self) -> Vec<String> {
        let mut lossy = self.sparsity.lossy();
        lossy.extend((self.head == Head::Sparse).then(|| "head sparse".to_owned()));
        lossy
    }

    /// Why a run ended early, with the model's file where its numbers are at fault.
    pub fn step_error(&self, source: ActorError) -> RuntimeError {
        match source {
            ActorError::NotFinite { .. } => RuntimeError::StepOf {
                path: self.path.clone(),
                source: Box::new(source),
            },
            source => source.into(),
        }
    }

    /// Texts of the begin- and end-of-text tokens, as templates write them.
    pub fn special_texts(&self) -> SpecialTexts {
        let text = |id: Option<u32>| {
            id.map_or_else(String::new, |id| {
                self.tokenizer.vocabulary().piece_text(id).into_owned()
            })
        };
        SpecialTexts {
            bos: text(self.tokenizer.bos()),
            eos: text(self.tokenizer.eos()),
        }
    }
}

/// The sidecar that was named, or the one beside the model where it is `needed`.
///
/// # Errors
/// It is not there, or not the model's.
pub(crate) fn open_sidecar(
    options: &ModelOptions,
    needed: bool,
    file: &GgufFile,
    hyper: &Hyperparameters,
) -> Result<Option<Sidecar>, RuntimeError> {
    let path = match &options.sidecar {
        Some(path) => path.clone(),
        None if needed => {
            let path = sidecar::default_path(&options.path);
            if !path.exists() {
                let model = options.path.clone();
                return Err(SidecarError::NotThere { path, model }.into());
            }
            path
        }
        None => return Ok(None),
    };
    Ok(Some(Sidecar::open(&path, file, hyper)?))
}

/// What [`start_engine`] makes.
struct Started {
    engine: Engine,
    sparsity: SparsityPlan,
    footprint: Footprint,
    n_ctx: usize,
    head_bytes: HeadBytes,
    placed: PlacedWeights,
    residence: Residence,
}

/// Logs how long `copy` takes for so many bytes of `what`.
fn timed<T, E>(what: &str, bytes: u64, copy: impl FnOnce() -> Result<T, E>) -> Result<T, E> {
    let start = std::time::Instant::now();
    let copied = copy()?;
    let seconds = start.elapsed().as_secs_f64();
    tracing::info!(
        "copied {what}: {} MiB in {:.2} s, {:.1} GB/s",
        bytes >> 20,
        seconds,
        bytes as f64 / 1e9 / seconds.max(1e-9)
    );
    Ok(copied)
}

/// Starts the teams, loads the weights with them and gives both to an engine.
fn start_engine(
    options: &ModelOptions,
    plan: &Plan,
    file: &GgufFile,
    hyper: &Hyperparameters,
    sidecar: Option<&Sidecar>,
    observer: &dyn LoadObserver,
) -> Result<Started, RuntimeError> {
    let in_file = |source| model_error(&options.path, source);
    let mut tensors = ModelTensors::find(file, hyper).map_err(in_file)?;
    tensors.head_sketch = match (options.head, sidecar) {
        (Head::Sparse, Some(sidecar)) => Some(SketchTensors::read(sidecar, hyper)?),
        _ => None,
    };
    let mut sparsity = sparsity::plan(options, hyper, &tensors.stored_downs(), sidecar)?;
    let n_ctx = match options.n_ctx {
        0 => hyper.n_ctx_max.min(N_CTX_DEFAULT_MAX),
        n_ctx => n_ctx,
    };
    let predictors = match (sparsity.mode, sidecar) {
        (Sparsity::Predicted, Some(sidecar)) => {
            let found = sidecar.predictors(hyper, &tensors)?;
            let all = found.ok_or_else(|| sidecar.missing("predictors"))?;
            Some(options.predicting.choose(sidecar, &all)?)
        }
        _ => None,
    };
    sparsity.predicts = predictors.as_deref().is_some_and(predicts);
    let shape = model_shape(hyper, &tensors, n_ctx).map_err(in_file)?;
    let profile = match sidecar {
        Some(sidecar) if !plan.gpus.is_empty() => {
            Profile::read(sidecar, hyper.n_layer, hyper.n_ff)?
        }
        _ => None,
    };
    let every = replanning::intervals(options, plan, &sparsity)?;
    let request = GpuRequest {
        shape: &shape,
        tensors: &tensors,
        sparsity: &sparsity,
        predictors: predictors.as_deref(),
        profile: profile.as_ref(),
        kv_type: options.kv_type,
        n_ubatch: options.n_batch.min(N_UBATCH),
        mode: options.cpu.mode(),
        groups_max: FFN_GROUPS,
        layers: 0..hyper.n_layer,
        replans: every.iter().any(|every| *every > 0),
    };
    let on_gpus = OnGpus::choose(options, plan, &request).map_err(in_file)?;
    let hot = on_gpus.as_ref().map(OnGpus::hot);
    let loader_of = |division: &Division| {
        Loader::predicted(
            file,
            hyper,
            &tensors,
            &sparsity,
            predictors.as_deref(),
            division,
            hot.as_deref(),
            n_ctx,
        )
        .map_err(in_file)
    };
    let rooms = NodeRooms::read(plan)?;
    let loader = fitting_loader(plan, &sparsity, &rooms, options.kv_type, loader_of)?;
    // a full node would end the program without a word
    loader.held_bytes(options.kv_type).check(plan, &rooms)?;
    warn_of_conflicts(plan);
    let teams = Teams::start(plan)?;
    let memory = VerifiedMemory::new(plan);
    let layouts = on_gpus.as_ref().map(|gpus| gpus.layouts(&request));
    let layouts = layouts.unwrap_or_default();
    let gpu_bytes: u64 = layouts.iter().map(|layout| layout.bytes as u64).sum();
    observer.begin(gpu_bytes + loader.copied_bytes());
    let gpus = match &on_gpus {
        Some(gpus) => timed("GPUs' weights", gpu_bytes, || {
            gpus.load(&layouts, &teams, &|bytes| observer.copied(bytes))
        }),
        None => Ok(vec![]),
    };
    let loaded = gpus.and_then(|gpus| {
        let copied = |bytes| observer.copied(gpu_bytes + bytes);
        let moves =
            (!gpus.is_empty()).then(|| loader.moves(gpus.iter().flat_map(|gpu| &gpu.layers)));
        let (weights, writers) = timed("the host's weights", loader.copied_bytes(), || {
            loader.load_with_writers(&teams, &memory, &copied)
        })?;
        let mut gpus = gpus;
        gpus.iter_mut().for_each(|gpu| gpu.counts = options.counts);
        if let Some(moves) = moves {
            replanning::set(&mut gpus, &every, moves, writers);
        }
        Ok((gpus, weights))
    });
    observer.end();
    let (gpus, weights) = loaded.map_err(in_file)?;
    let placed = memory.into_weights();
    let residence = placed.verify()?;
    tracing::info!(cold = %plan.cold, shares_by = %plan.proportion, "weights lie: {residence}");
    let engine = Engine::start_on(
        teams,
        weights,
        gpus,
        EngineOptions {
            cpu: options.cpu,
            kv_type: options.kv_type,
            n_ubatch: options.n_batch.min(N_UBATCH),
            wait_limit: WAIT_LIMIT,
            faults: options.faults.clone(),
            trace: options.trace.map(|bounds| fit(bounds, n_ctx)),
            tap: options.tap.clone(),
        },
    )?;
    if let Some(on_gpus) = &on_gpus {
        on_gpus.log(&engine.gpu_bytes());
    }
    let footprint = Footprint::of(hyper, &tensors, &sparsity);
    Ok(Started {
        engine,
        sparsity,
        footprint,
        n_ctx,
        head_bytes: HeadBytes::of(&tensors),
        placed,
        residence,
    })
}

/// Room for a prompt beside the steps, whose last tokens may go one by one; where nobody knows how many they are, for each position of the
/// context.
fn fit(bounds: TraceBounds, n_ctx: usize) -> TraceBounds {
    let n_steps = match bounds.n_steps {
        usize::MAX => n_ctx,
        n_steps => n_steps,
    };
    TraceBounds {
        n_steps: n_steps.saturating_add(n_ctx.div_ceil(N_UBATCH) + 32),
        ..bounds
    }
}

/// A token that the model has no row for would be read beside its embedding.
fn check_vocabulary(tokenizer: &Tokenizer, hyper: &Hyperparameters) -> Result<(), ModelError> {
    if tokenizer.n_vocab() == hyper.n_vocab {
        return Ok(());
    }
    Err(ModelError::BadKey {
        key: "tokenizer.ggml.tokens".into(),
        value: format!("a list of {}", tokenizer.n_vocab()),
        needed: format!("token_embd.weight has {} rows", hyper.n_vocab),
    })
}

fn model_error(path: &Path, source: ModelError) -> RuntimeError {
    RuntimeError::Model {
        path: path.to_path_buf(),
        source,
    }
}

fn tokenizer_error(path: &Path, source: TokenizerError) -> RuntimeError {
    RuntimeError::TokenizerOf {
        path: path.to_path_buf(),
        source,
    }
}
