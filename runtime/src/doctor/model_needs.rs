//! What a model file would need on this machine, without loading it.

use std::path::Path;

use pi_topology::{HugePages, NodePlan, NodeRooms, Plan};

use crate::error::RuntimeError;
use crate::gguf::GgufFile;
use crate::model::description::Description;
use crate::model::footprint::Footprint;
use crate::model::room::held_in;
use crate::model::sparsity::SparsityPlan;
use crate::model::{Hyperparameters, ModelTensors};
use crate::session::N_CTX_DEFAULT_MAX;
use crate::tokenizer::Tokenizer;

/// A model's demands, with the default flags.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelNeeds {
    /// Its file.
    pub path: String,
    /// Its type and quantisation, in words.
    pub name: String,
    /// Sparsity mode that it would run in.
    pub sparsity: &'static str,
    /// What could be better about the file.
    pub hint: Option<String>,
    /// Weights in memory.
    pub weights_bytes: u64,
    /// Key/value cache, once the context is full.
    pub cache_bytes: u64,
    /// The NUMA node whose memory does not take its part, and what would do.
    pub full_node: Option<String>,
    /// Tokens of the context.
    pub n_ctx: usize,
    /// Weights that a token reads when every neuron is active.
    pub token_bytes: u64,
}

impl ModelNeeds {
    /// Reads a file's header, tensors and vocabulary, for the threads of `plan`; of one without it.
    ///
    /// # Errors
    /// The file cannot be run: the message names it.
    pub fn of(path: &Path, plan: Option<&Plan>) -> Result<Self, RuntimeError> {
        let file = GgufFile::open(path)?;
        let in_file = |source| RuntimeError::Model {
            path: path.to_path_buf(),
            source,
        };
        let hyper = Hyperparameters::read(&file).map_err(in_file)?;
        let tensors = ModelTensors::find(&file, &hyper).map_err(in_file)?;
        let sparsity =
            SparsityPlan::resolve(None, hyper.gate, &tensors.stored_downs()).map_err(in_file)?;
        let n_ctx = hyper.n_ctx_max.min(N_CTX_DEFAULT_MAX);
        let one_thread = NodePlan {
            numa: None,
            cpus: vec![0],
        };
        let one_thread = Plan::of_nodes(vec![one_thread], HugePages::Off);
        let plan = plan.unwrap_or(&one_thread);
        let rooms = NodeRooms::read(plan)?;
        let (held, full_node) =
            held_in(plan, &rooms, &file, &hyper, &tensors, &sparsity, n_ctx).map_err(in_file)?;
        Tokenizer::from_metadata(file.metadata()).map_err(|source| RuntimeError::TokenizerOf {
            path: path.to_path_buf(),
            source,
        })?;
        Ok(Self {
            path: path.display().to_string(),
            name: Description::of(&file).name,
            sparsity: sparsity.mode.name(),
            hint: sparsity.hint.clone(),
            weights_bytes: held.weights.iter().sum(),
            cache_bytes: held.cache.iter().sum(),
            full_node,
            n_ctx,
            token_bytes: Footprint::of(&hyper, &tensors, &sparsity).bytes(1.0),
        })
    }

    /// Weights and full cache.
    pub fn memory_bytes(&self) -> u64 {
        self.weights_bytes.saturating_add(self.cache_bytes)
    }
}
