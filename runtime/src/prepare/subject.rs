//! The model that is prepared, and engines that run it.

use std::path::Path;
use std::sync::Arc;

use pi_actors::LayerTap;
use pi_actors::trace::TraceBounds;
use pi_topology::Plan;

use crate::error::RuntimeError;
use crate::gguf::GgufFile;
use crate::head_sketch::Head;
use crate::model::predicting::{Predict, PredictBy, Predicting};
use crate::model::{GateKind, Hyperparameters, ModelError, ModelTensors, Sparsity};
use crate::predictor::FitGpu;
use crate::session::{LoadedModel, ModelOptions, Silent};
use crate::session::{OpenGpu, open_gpu};
use crate::tokenizer::Tokenizer;

/// A model's file, and how to run it.
#[derive(Debug)]
pub struct Subject {
    /// Its file.
    pub file: GgufFile,
    /// Its numbers.
    pub hyper: Hyperparameters,
    /// Its tensors.
    pub tensors: ModelTensors,
    /// Its tokenizer.
    pub tokenizer: Tokenizer,
    /// How to open it; mode, context and sidecar are chosen for each purpose.
    pub options: ModelOptions,
    /// The threads, and GPUs.
    pub plan: Plan,
    /// The threads alone.
    pub host: Plan,
}

/// How to decode where it is summed up what scores take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Traced {
    /// The mode; none: the file's default.
    pub mode: Option<Sparsity>,
    /// Who predicts, where something does.
    pub by: PredictBy,
    /// Which head computes logits.
    pub head: Head,
}

impl Subject {
    /// Opens the file that `options` name.
    ///
    /// # Errors
    /// It is no model that can be run.
    pub fn open(options: ModelOptions, plan: Plan) -> Result<Self, RuntimeError> {
        let path = options.path.clone();
        let in_file = |source: ModelError| RuntimeError::Model {
            path: path.clone(),
            source,
        };
        let file = GgufFile::open(&options.path)?;
        let hyper = Hyperparameters::read(&file).map_err(in_file)?;
        let tensors = ModelTensors::find(&file, &hyper).map_err(in_file)?;
        let tokenizer = Tokenizer::from_metadata(file.metadata()).map_err(|source| {
            RuntimeError::TokenizerOf {
                path: path.clone(),
                source,
            }
        })?;
        let host = Plan {
            gpus: vec![],
            ..plan.clone()
        };
        Ok(Self {
            file,
            // thresholds are for the host, so that nothing of such a model is to be found out on a GPU
            plan: match hyper.gate {
                GateKind::Relu => plan,
                GateKind::Silu | GateKind::Gelu => host.clone(),
            },
            host,
            hyper,
            tensors,
            tokenizer,
            options,
        })
    }

    /// Whether gates can be closed.
    pub fn is_relu(&self) -> bool {
        self.hyper.gate == GateKind::Relu
    }

    /// The token that begins every sequence, if the model wants one.
    pub fn bos(&self) -> Option<u32> {
        self.tokenizer.bos().filter(|_| self.tokenizer.adds_bos())
    }

    /// The first GPU, for fits; none where there is none, or one that is not required and cannot be used.
    ///
    /// # Errors
    /// A required GPU cannot be used.
    pub fn fit_gpu(&self) -> Result<Option<FitGpu>, RuntimeError> {
        let Some(config) = self.plan.gpus.first() else {
            return Ok(None);
        };
        match open_gpu(0, config) {
            Ok(OpenGpu { device, room, .. }) => {
                let bytes_max = room.budget.saturating_sub(room.overhead);
                Ok(Some(FitGpu::new(device, bytes_max)))
            }
            Err(error) if config.required => Err(RuntimeError::Model {
                path: self.options.path.clone(),
                source: error.into(),
            }),
            Err(error) => {
                tracing::warn!("{error}; the host fits in its place");
                Ok(None)
            }
        }
    }

    /// Starts an engine for the model in its default mode, whose hidden states `tap` sees, with a context of `n_ctx` tokens.
    ///
    /// # Errors
    /// As [`LoadedModel::open`].
    pub fn run_tapped(
        &self,
        n_ctx: usize,
        tap: Arc<dyn LayerTap>,
    ) -> Result<LoadedModel, RuntimeError> {
        let options = ModelOptions {
            tap: Some(tap),
            ..self.in_mode(None, n_ctx, None)
        };
        LoadedModel::open(&options, &self.plan, &Silent)
    }

    /// Starts an engine for the model in `mode`, to be timed.
    ///
    /// # Errors
    /// As [`LoadedModel::open`].
    pub fn run_timed(
        &self,
        mode: Sparsity,
        n_ctx: usize,
        sidecar: Option<&Path>,
    ) -> Result<LoadedModel, RuntimeError> {
        let options = self.in_mode(Some(mode), n_ctx, sidecar);
        LoadedModel::open(&options, &self.plan, &Silent)
    }

    /// The same on the host, where sketches decide for all neurons: a GPU computes all gates of those that it holds.
    ///
    /// # Errors
    /// As [`LoadedModel::open`].
    pub fn run_judged(
        &self,
        mode: Sparsity,
        n_ctx: usize,
        sidecar: Option<&Path>,
    ) -> Result<LoadedModel, RuntimeError> {
        let options = self.in_mode(Some(mode), n_ctx, sidecar);
        LoadedModel::open(&options, &self.host, &Silent)
    }

    fn in_mode(
        &self,
        mode: Option<Sparsity>,
        n_ctx: usize,
        sidecar: Option<&Path>,
    ) -> ModelOptions {
        ModelOptions {
            n_ctx,
            sparsity: mode,
            sidecar: sidecar.map(Path::to_owned),
            head: Head::Full,
            ..self.options.clone()
        }
    }

    /// The same as `how` says, traced: no event is kept.
    ///
    /// # Errors
    /// As [`LoadedModel::open`].
    pub fn run_traced(
        &self,
        n_ctx: usize,
        sidecar: &Path,
        how: Traced,
    ) -> Result<LoadedModel, RuntimeError> {
        let options = ModelOptions {
            n_ctx,
            sparsity: how.mode,
            sidecar: Some(sidecar.to_owned()),
            head: how.head,
            predicting: Predicting {
                by: Predict::All(how.by),
                ..self.options.predicting.clone()
            },
            trace: Some(TraceBounds {
                n_steps: 0,
                node_bytes_max: 0,
            }),
            ..self.options.clone()
        };
        LoadedModel::open(&options, &self.plan, &Silent)
    }

    /// The same in the file's default mode, with the sparse head of `sidecar`, which is the host's.
    ///
    /// # Errors
    /// As [`LoadedModel::open`].
    pub fn run_sparse_head(
        &self,
        n_ctx: usize,
        sidecar: &Path,
    ) -> Result<LoadedModel, RuntimeError> {
        let options = ModelOptions {
            n_ctx,
            sparsity: None,
            sidecar: Some(sidecar.to_owned()),
            head: Head::Sparse,
            ..self.options.clone()
        };
        LoadedModel::open(&options, &self.host, &Silent)
    }
}
