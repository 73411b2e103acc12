//! What actors, messages and supervision cost: decode of the demo model through the engine against
//! the same kernels in a plain loop, in turns.
//!
//! `cargo bench -p pi-benches --bench pipeline_cost`

use std::path::Path;
use std::time::{Duration, Instant};

use pi_actors::faults::Faults;
use pi_actors::weights::ModelWeights;
use pi_actors::{Engine, EngineOptions, Feed, Feeder, LogitsWanted, Next, Teams};
use pi_benches::PlainLoop;
use pi_kernels::attention::KvType;
use pi_kernels::{ActivationMode, Cpu};
use pi_runtime::gguf::GgufFile;
use pi_runtime::model::load::Loader;
use pi_runtime::model::node_memory::HeapMemory;
use pi_runtime::model::sparsity::SparsityPlan;
use pi_runtime::model::{Hyperparameters, ModelTensors, Sparsity};
use pi_topology::{HugePages, Machine, NodePlan, Plan};

const MODEL: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/../models/smollm2-135m-reglu-q4_0.gguf"
);
const TEXT: &str = include_str!("../../tests/fixtures/reference/smollm2-135m-reglu-q4_0.json");
const N_TOKENS: usize = 200;
const ROUNDS: usize = 9;

fn main() {
    // cargo passes --bench, and tests of benches --test: both run it all
    let cpus: Vec<usize> = Machine::discover()
        .expect("the machine can be looked at")
        .nodes
        .iter()
        .flat_map(|node| node.cores.iter().map(|core| core.cpus[0]))
        .collect();
    if cpus.len() < 2 {
        println!("skipped: the machine has one core");
        return;
    }
    let file = GgufFile::open(Path::new(MODEL)).expect("the demo model is there");
    let tokens = tokens();
    println!("decode of {N_TOKENS} tokens of text, {ROUNDS} rounds in turns, tok/s, medians");
    for sparsity in [Sparsity::Exact, Sparsity::Off] {
        for (n_nodes, n_threads) in [(1, 1), (1, 2), (2, 1)] {
            compare(&file, sparsity, n_nodes, n_threads, &cpus, &tokens);
        }
    }
}

/// Tokens of the longest reference prompt, a piece of an encyclopedia.
fn tokens() -> Vec<u32> {
    let reference: serde_json::Value = serde_json::from_str(TEXT).expect("a JSON file");
    let prompts = reference["variants"]["F32_dequant"]["prompts"]
        .as_array()
        .expect("prompts");
    let ids = prompts
        .iter()
        .filter_map(|prompt| prompt["prompt_tokens"].as_array())
        .max_by_key(|ids| ids.len())
        .expect("a prompt");
    ids.iter()
        .filter_map(|id| id.as_u64())
        .map(|id| id as u32)
        .take(N_TOKENS)
        .collect()
}

fn load(file: &GgufFile, sparsity: Sparsity, teams: &Teams) -> ModelWeights {
    let hyper = Hyperparameters::read(file).expect("a model");
    let tensors = ModelTensors::find(file, &hyper).expect("its tensors");
    let plan = SparsityPlan::resolve(Some(sparsity), hyper.gate, &tensors.stored_downs())
        .expect("a ReLU model");
    Loader::new(file, &hyper, &tensors, &plan, &teams.n_threads(), 1024)
        .and_then(|loader| loader.load(teams, &HeapMemory, &|_| ()))
        .expect("weights")
}

fn plan(n_nodes: usize, n_threads: usize, cpus: &[usize]) -> Plan {
    let node = |node: usize| NodePlan {
        numa: None,
        cpus: cpus[node * n_threads..(node + 1) * n_threads].to_vec(),
    };
    Plan::of_nodes((0..n_nodes).map(node).collect(), HugePages::Try)
}

fn compare(
    file: &GgufFile,
    sparsity: Sparsity,
    n_nodes: usize,
    n_threads: usize,
    cpus: &[usize],
    tokens: &[u32],
) {
    let cpu = Cpu::detect(ActivationMode::Q8);
    let total = n_nodes * n_threads;
    let loop_weights = {
        let teams = Teams::start(&plan(1, total, cpus)).expect("teams");
        load(file, sparsity, &teams)
    };
    let plain = PlainLoop::new(&loop_weights, cpu, total);
    let teams = Teams::start(&plan(n_nodes, n_threads, cpus)).expect("teams");
    let weights = load(file, sparsity, &teams);
    let options = EngineOptions {
        cpu,
        kv_type: KvType::F16,
        n_ubatch: 512,
        wait_limit: Duration::from_secs(60),
        faults: Faults::default(),
        trace: None,
        tap: None,
    };
    let engine = Engine::start(teams, weights, options).expect("an engine");
    let (mut ours, mut loops, mut ratios) = (vec![], vec![], vec![]);
    let mut sums = (0.0, 0.0);
    for round in 0..=ROUNDS {
        let clock = Clock::new(tokens);
        let run = engine.run(clock).expect("a run");
        run.outcome.expect("a run without failures");
        let mut clock = Clock::new(tokens);
        clock.begin();
        plain.run(&cpus[..total], tokens, |logits| clock.token(logits));
        if round > 0 {
            ours.push(run.feeder.speed());
            loops.push(clock.speed());
            ratios.push(run.feeder.speed() / clock.speed());
        }
        sums = (run.feeder.sum, clock.sum);
    }
    assert_eq!(sums.0, sums.1, "the loop computes what the engine computes");
    println!(
        "{:5} {n_nodes} node(s) x {n_threads} thread(s), {}: loop {:6.1}, engine {:6.1}, cost {:4.1} % ({:.1} to {:.1})",
        sparsity.name(),
        cpu.tier(),
        median(&mut loops),
        median(&mut ours),
        100.0 * (1.0 / median(&mut ratios) - 1.0),
        100.0 * (1.0 / ratios[ratios.len() - 1] - 1.0),
        100.0 * (1.0 / ratios[0] - 1.0),
    );
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Feeds tokens one by one and takes the time from the first token's end to the last one's.
struct Clock {
    tokens: Vec<u32>,
    position: usize,
    start: Option<Instant>,
    last: Option<Instant>,
    n_timed: usize,
    sum: f64,
}

impl Clock {
    fn new(tokens: &[u32]) -> Self {
        let tokens = tokens.to_vec();
        Self {
            tokens,
            position: 0,
            start: None,
            last: None,
            n_timed: 0,
            sum: 0.0,
        }
    }

    fn begin(&mut self) {
        self.start = None;
    }

    fn token(&mut self, logits: &[f32]) {
        self.sum = f64::from(logits[0]) + 0.5 * self.sum;
        let now = Instant::now();
        match self.start {
            None => self.start = Some(now),
            Some(_) => {
                self.last = Some(now);
                self.n_timed += 1;
            }
        }
    }

    fn speed(&self) -> f64 {
        let span = self.last.zip(self.start).map(|(last, start)| last - start);
        self.n_timed as f64 / span.map_or(f64::INFINITY, |span| span.as_secs_f64())
    }
}

impl Feeder for Clock {
    fn next(&mut self) -> Next<'_> {
        let position = self.position;
        if position == self.tokens.len() {
            return Next::Done;
        }
        self.position += 1;
        let tokens = &self.tokens[position..position + 1];
        Next::Feed(Feed {
            tokens,
            position,
            logits: LogitsWanted::Last,
        })
    }

    fn logits(&mut self, _: usize, logits: &[f32]) {
        self.token(logits);
    }
}
