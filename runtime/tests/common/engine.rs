//! An engine for a model file, and feeders that note what it computes.

use std::ops::Deref;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use pi_actors::faults::Faults;
use pi_actors::trace::TraceBounds;
use pi_actors::{Engine, EngineOptions, Feed, Feeder, LayerTap, LogitsWanted, Next, Teams};
use pi_kernels::attention::KvType;
use pi_kernels::{ActivationMode, Cpu, Tier};
use pi_runtime::gguf::GgufFile;
use pi_runtime::model::sparsity::SparsityPlan;
use pi_runtime::model::{Hyperparameters, Loader, ModelTensors, Sparsity};
use pi_topology::{HugePages, Machine, NodePlan, Plan, TopologyConfig};
use xxhash_rust::xxh3::Xxh3;

/// What an engine is started with.
#[derive(Debug, Clone)]
pub struct Setup {
    /// None: the default of the file.
    pub sparsity: Option<Sparsity>,
    pub activations: ActivationMode,
    pub tier: Tier,
    pub kv_type: KvType,
    pub n_ubatch: usize,
    pub n_ctx: usize,
    /// Threads of each node. Nodes are made up: they share this machine's CPUs and memory.
    pub threads: Vec<usize>,
    pub faults: Faults,
    pub trace: Option<TraceBounds>,
    pub tap: Option<Arc<dyn LayerTap>>,
}

impl Setup {
    /// 8-bit activations, on one node with a thread for each CPU, two at most.
    pub fn q8() -> Self {
        Self {
            sparsity: None,
            activations: ActivationMode::Q8,
            tier: Tier::detect(),
            kv_type: KvType::F16,
            n_ubatch: 512,
            n_ctx: 640,
            threads: vec![cpus().len().min(2)],
            faults: Faults::default(),
            trace: None,
            tap: None,
        }
    }

    /// f32 activations and cache.
    pub fn f32() -> Self {
        Self {
            activations: ActivationMode::F32,
            kv_type: KvType::F32,
            ..Self::q8()
        }
    }

    /// Loads the model and starts its actors, as soon as no other test runs an engine.
    ///
    /// A thread that has one must drop it before it starts another.
    pub fn start(&self, path: &Path) -> LoneEngine {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let file = GgufFile::open(path).unwrap();
        let hyper = Hyperparameters::read(&file).unwrap();
        let tensors = ModelTensors::find(&file, &hyper).unwrap();
        let sparsity =
            SparsityPlan::resolve(self.sparsity, hyper.gate, &tensors.stored_downs()).unwrap();
        let loader = Loader::new(
            &file,
            &hyper,
            &tensors,
            &sparsity,
            &self.threads,
            self.n_ctx,
        )
        .unwrap();
        let plan = plan(&self.threads);
        let teams = Teams::start(&plan).unwrap();
        let weights = loader.load(&teams, &plan, &|_| ()).unwrap();
        let options = EngineOptions {
            cpu: Cpu::new(self.tier, self.activations).unwrap(),
            kv_type: self.kv_type,
            n_ubatch: self.n_ubatch,
            wait_limit: Duration::from_secs(60),
            faults: self.faults.clone(),
            trace: self.trace,
            tap: self.tap.clone(),
        };
        LoneEngine {
            engine: Engine::start(teams, weights, options).unwrap(),
            _turn: turn,
        }
    }
}

/// Whose turn it is: engines are pinned to the same CPUs, and two at once would wait for one another at every step.
static TURN: Mutex<()> = Mutex::new(());

/// The only engine that runs.
pub struct LoneEngine {
    engine: Engine,
    _turn: MutexGuard<'static, ()>,
}

impl Deref for LoneEngine {
    type Target = Engine;

    fn deref(&self) -> &Engine {
        &self.engine
    }
}

/// This machine's CPUs, one of each core first.
fn cpus() -> Vec<usize> {
    let machine = Machine::discover().unwrap();
    let plan = Plan::new(&TopologyConfig::default(), &machine, Some(machine.n_cpus())).unwrap();
    plan.nodes.into_iter().flat_map(|node| node.cpus).collect()
}

/// Nodes with this many threads each, dealt to the machine's CPUs in turn.
fn plan(threads: &[usize]) -> Plan {
    let cpus = cpus();
    let mut next = cpus.iter().copied().cycle();
    let nodes = threads.iter().map(|&n| NodePlan {
        numa: None,
        cpus: next.by_ref().take(n).collect(),
    });
    Plan::of_nodes(nodes.collect(), HugePages::Try)
}

/// Gives sequences of tokens, each from position 0, and shows the logits of all positions from one on.
pub struct Forced<F> {
    /// Each with the first position whose logits are wanted.
    sequences: Vec<(Vec<u32>, usize)>,
    given: usize,
    /// Takes the sequence, position and logits.
    look: F,
}

impl<F: FnMut(usize, usize, &[f32]) + Send + 'static> Forced<F> {
    pub fn new(sequences: Vec<(Vec<u32>, usize)>, look: F) -> Self {
        Self {
            sequences,
            given: 0,
            look,
        }
    }

    /// Computes everything.
    pub fn run(self, engine: &Engine) {
        engine.run(self).unwrap().outcome.unwrap();
    }
}

impl<F: FnMut(usize, usize, &[f32]) + Send + 'static> Feeder for Forced<F> {
    fn next(&mut self) -> Next<'_> {
        let Some((tokens, first)) = self.sequences.get(self.given) else {
            return Next::Done;
        };
        self.given += 1;
        Next::Feed(Feed {
            tokens,
            position: 0,
            logits: LogitsWanted::From(*first),
        })
    }

    fn logits(&mut self, position: usize, logits: &[f32]) {
        (self.look)(self.given - 1, position, logits);
    }
}

/// A prompt in one feed, then the likeliest tokens one by one.
pub struct Greedy {
    prompt: Vec<u32>,
    n_predict: usize,
    /// Tokens chosen.
    pub tokens: Vec<u32>,
    started: bool,
    hash: Xxh3,
}

impl Greedy {
    /// Continues `prompt` by `n_predict` tokens and returns them, with the hash of all logits.
    pub fn run(engine: &Engine, prompt: &[u32], n_predict: usize) -> (Vec<u32>, u64) {
        let feeder = Self {
            prompt: prompt.to_vec(),
            n_predict,
            tokens: vec![],
            started: false,
            hash: Xxh3::new(),
        };
        let run = engine.run(feeder).unwrap();
        run.outcome.unwrap();
        (run.feeder.tokens, run.feeder.hash.digest())
    }
}

impl Feeder for Greedy {
    fn next(&mut self) -> Next<'_> {
        let position = match self.started {
            false => 0,
            true => self.prompt.len() + self.tokens.len() - 1,
        };
        let tokens = match self.started {
            false => &self.prompt,
            true => &self.tokens[self.tokens.len() - 1..],
        };
        self.started = true;
        if self.tokens.len() == self.n_predict {
            return Next::Done;
        }
        Next::Feed(Feed {
            tokens,
            position,
            logits: LogitsWanted::From(0),
        })
    }

    fn logits(&mut self, position: usize, logits: &[f32]) {
        hash_logits(&mut self.hash, logits);
        if position + 1 >= self.prompt.len() {
            self.tokens.push(argmax(logits));
        }
    }
}

/// Adds the values' bytes to `hash`.
pub fn hash_logits(hash: &mut Xxh3, logits: &[f32]) {
    let bytes: Vec<u8> = logits
        .iter()
        .flat_map(|logit| logit.to_le_bytes())
        .collect();
    hash.update(&bytes);
}

/// The first of the largest values; a value that is not a number fails the test.
pub fn argmax(logits: &[f32]) -> u32 {
    let mut best = 0;
    for (id, logit) in logits.iter().enumerate() {
        assert!(logit.is_finite(), "logit {id} is {logit}");
        if *logit > logits[best] {
            best = id;
        }
    }
    best as u32
}
