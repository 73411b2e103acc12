//! From the flags that name a model to the model.

use pi_actors::faults::Faults;
use pi_actors::trace::TraceBounds;
use pi_kernels::attention::KvType;
use pi_kernels::{Cpu, Tier};
use pi_topology::Plan;

use super::args::{KvArg, ModelArgs, PrefetchArg, SparsityArg};
use super::demo_model;
use super::progress::LoadBar;
use super::topology_measure::{by_bandwidth, with_profile};
use crate::error::RuntimeError;
use crate::machine_profile::MachineProfile;
use crate::model::Sparsity;
use crate::model::predicting::Predicting;
use crate::session::{LoadedModel, ModelOptions, N_UBATCH, ThresholdSource, TopologyFile};

impl ModelArgs {
    /// What the flags, and where they say nothing the topology file, ask for, with a context of `n_ctx` tokens (0: the model's own).
    ///
    /// # Errors
    /// No model is named or found, the machine lacks the tier, or the topology file is none.
    pub fn options(&self, n_ctx: usize) -> Result<ModelOptions, RuntimeError> {
        let tier = self.tier.unwrap_or_else(Tier::detect);
        Ok(ModelOptions {
            path: demo_model::or_demo(self.model.as_deref())?,
            n_ctx,
            counts: false,
            sparsity: self.sparsity.map(|mode| match mode {
                SparsityArg::Off => Sparsity::Off,
                SparsityArg::Exact => Sparsity::Exact,
                SparsityArg::Threshold => Sparsity::Threshold,
                SparsityArg::Predicted => Sparsity::Predicted,
            }),
            cpu: Cpu::new(tier, self.activations).map_err(RuntimeError::Tier)?,
            kv_type: match self.kv {
                KvArg::F16 => KvType::F16,
                KvArg::F32 => KvType::F32,
            },
            trace: None,
            tap: None,
            faults: Faults::default(),
            sidecar: self.sidecar.clone(),
            head: self.head,
            thresholds: if self.force_threshold {
                ThresholdSource::Forced
            } else {
                ThresholdSource::Sidecar
            },
            predicting: Predicting {
                by: match &self.predictor {
                    Some(predict) => predict.clone(),
                    None => self.topology_file()?.config().sparsity.predict.clone(),
                },
                prefetch: self.prefetch == PrefetchArg::On,
            },
            n_batch: usize::from(self.batch_size).min(N_UBATCH),
            replan: self.replan()?,
        })
    }

    /// What `--replan` asks for.
    ///
    /// # Errors
    /// It asks for re-planning, and there is no GPU in the topology.
    pub(super) fn replan(&self) -> Result<Option<usize>, RuntimeError> {
        let every = self.replan.map(|every| every as usize);
        if every.is_some_and(|every| every > 0) && self.topology_file()?.config().gpus.is_empty() {
            return Err(RuntimeError::Replan {
                problem: "there is no GPU whose neurons could change places with the host's",
                cure: "name a topology with a [[gpu]] (--topology FILE)",
            });
        }
        Ok(every)
    }

    /// The topology file's plan, or the discovered machine's, for `threads`, with shares by bandwidth where it was measured.
    ///
    /// # Errors
    /// As [`TopologyFile::read`] and [`TopologyFile::plan`].
    pub fn plan(&self, threads: Option<u16>) -> Result<Plan, RuntimeError> {
        by_bandwidth(self.topology_file()?.plan(threads.map(usize::from))?)
    }

    /// The same, with what was measured of the machine with these threads, if it was.
    ///
    /// # Errors
    /// As [`ModelArgs::plan`].
    pub fn plan_with_profile(
        &self,
        threads: Option<u16>,
    ) -> Result<(Plan, Option<MachineProfile>), RuntimeError> {
        with_profile(self.topology_file()?.plan(threads.map(usize::from))?)
    }

    /// The topology file that the flags name, or none, and whether it is simulated.
    ///
    /// # Errors
    /// As [`TopologyFile::read`].
    pub fn topology_file(&self) -> Result<TopologyFile, RuntimeError> {
        // once: a pipe gives its text once
        if let Some(file) = self.topology_read.get() {
            return Ok(TopologyFile::clone(file));
        }
        let file = TopologyFile::read(self.topology.as_deref())?;
        let file = file.simulating(self.simulate);
        let file = self.topology_read.get_or_init(|| file);
        Ok(TopologyFile::clone(file))
    }

    /// Opens the model, to record its work within `trace`, and says on stderr what a user may want to know of it.
    ///
    /// # Errors
    /// As [`ModelArgs::options`], [`ModelArgs::plan`] and [`LoadedModel::open`].
    pub fn open(
        &self,
        n_ctx: usize,
        threads: Option<u16>,
        trace: Option<TraceBounds>,
    ) -> Result<LoadedModel, RuntimeError> {
        let options = ModelOptions {
            trace,
            ..self.options(n_ctx)?
        };
        let plan = self.plan(threads)?;
        let model = LoadedModel::open(&options, &plan, &LoadBar::default())?;
        if self.topology.is_some() {
            eprintln!("weights: {}", model.residence);
        }
        if let Some(hint) = &model.sparsity.hint {
            eprintln!("hint: {hint}");
        }
        tracing::info!(
            model = %model.path.display(),
            tier = options.cpu.tier().name(),
            sparsity = model.sparsity.mode.name(),
            n_ctx = model.n_ctx,
            "ready"
        );
        Ok(model)
    }
}
