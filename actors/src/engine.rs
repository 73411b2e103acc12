//! The engine: teams, actors and weights put together; the way in for everything above.

use std::any::Any;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use kameo::actor::{ActorRef, Spawn};
use pi_kernels::Cpu;
use pi_kernels::attention::KvType;
use tokio::runtime::{Builder, Runtime};

use crate::cold_layer::ColdLayer;
use crate::control::{
    self, Blueprint, Build, Counterpart, Died, Panic, ReadAll, Stats, Supervisor,
};
use crate::counters::{ActorCounters, RunTotals};
use crate::device_layer::DeviceLayer;
use crate::error::ActorError;
use crate::executor::{Attachment, Cells, Control, DeathNotice, Incarnation};
use crate::faults::Faults;
use crate::feeder::Feeder;
use crate::gpu::weights::GpuWeights;
use crate::gpu::{GpuModel, GpuOptions, GpuTimes};
use crate::kv::KvStore;
use crate::messages::ActorId;
use crate::model::Model;
use crate::pipeline::{Pipeline, RunState};
use crate::predictor::Predictor;
use crate::scratch::NodeScratch;
use crate::tap::LayerTap;
use crate::teams::Teams;
use crate::trace::{Trace, TraceBounds};
use crate::weights::{ModelShape, ModelWeights};

/// How an engine computes.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Instruction set and activation arithmetic.
    pub cpu: Cpu,
    /// Format of the key/value cache.
    pub kv_type: KvType,
    /// Most tokens that go through the layers together; more are fed in pieces.
    pub n_ubatch: usize,
    /// Longest wait for an actor before a step fails.
    pub wait_limit: Duration,
    /// Panics to inject, for tests.
    pub faults: Faults,
    /// How much of what the executors do is recorded; none: nothing.
    pub trace: Option<TraceBounds>,
    /// Who looks at the hidden states, if somebody does; not with a GPU.
    pub tap: Option<Arc<dyn LayerTap>>,
}

/// A feeder that has been served.
#[derive(Debug)]
pub struct Run<F> {
    /// The feeder.
    pub feeder: F,
    /// What was done.
    pub totals: RunTotals,
    /// Why the run ended early, if it did.
    pub outcome: Result<(), ActorError>,
}

/// An actor of the control plane.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ControlActor {
    /// Restarts actors.
    Supervisor,
    /// Collects counters.
    Stats,
}

/// A model ready to compute.
pub struct Engine {
    model: Arc<Model>,
    counterparts: HashMap<ActorId, ActorRef<Counterpart>>,
    stats: ActorRef<Stats>,
    supervisor: ActorRef<Supervisor>,
    /// Held while a run is under way.
    running: Mutex<()>,
    caches: Vec<Arc<KvStore>>,
    trace: Option<Arc<Trace>>,
    /// Declared before the teams: the control plane ends before the executors that it talks to.
    control: Option<Runtime>,
    teams: Option<Teams>,
}

impl std::fmt::Debug for Engine {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Engine")
            .field("shape", self.shape())
            .finish_non_exhaustive()
    }
}

impl Engine {
    /// Starts the actors of a model on running teams.
    ///
    /// # Errors
    /// Memory for the cache, or the control plane's thread, cannot be had.
    ///
    /// # Panics
    /// When the weights are divided over another number of nodes than there are teams.
    pub fn start(
        teams: Teams,
        weights: ModelWeights,
        options: EngineOptions,
    ) -> Result<Self, ActorError> {
        Self::start_on(teams, weights, vec![], options)
    }

    /// The same with what GPUs have of the model, its layers one after the other, which are the device then: the nodes have
    /// cold neurons alone.
    ///
    /// # Errors
    /// As [`Engine::start`], or the GPU's driver refuses.
    ///
    /// # Panics
    /// As [`Engine::start`], or when the GPUs' layers are not all of them, or none.
    pub fn start_on(
        teams: Teams,
        weights: ModelWeights,
        gpus: Vec<GpuWeights>,
        options: EngineOptions,
    ) -> Result<Self, ActorError> {
        let n_nodes = teams.plan().nodes.len();
        assert_eq!(
            weights.head.len(),
            n_nodes,
            "weights are divided over the teams' nodes"
        );
        let EngineOptions {
            cpu,
            kv_type,
            n_ubatch,
            wait_limit,
            faults,
            trace,
            tap,
        } = options;
        let n_ubatch = n_ubatch.clamp(1, weights.shape.n_ctx);
        let model = Model::new(weights, cpu, kv_type, n_ubatch).with_tap(tap);
        let gpu_options = GpuOptions {
            rope_len: model.rope.row_len(),
            mode: cpu.mode(),
            kv_type,
            n_tokens: n_ubatch,
            tapped: model.tap.is_some(),
            limit: wait_limit,
        };
        let mut next = 0;
        for gpu in &gpus {
            assert_eq!(gpu.first_layer, next, "GPUs have all layers, in order");
            next = gpu.range().end;
        }
        let is_whole = gpus.is_empty() || next == model.shape().n_layer;
        assert!(is_whole, "GPUs have all layers, or none");
        let gpus = (gpus.into_iter()).map(|gpu| GpuModel::new(gpu, &model.weights, gpu_options));
        let gpus = gpus
            .collect::<Result<_, _>>()
            .map_err(|source| ActorError::GpuStart { source })?;
        let model = Arc::new(model.with_gpus(gpus));
        let caches = caches(&teams, &model)?;
        let n_layer = model.shape().n_layer;
        let ahead = model.slots.sizes.ahead;
        let gpu = !model.gpus.is_empty();
        let trace = trace.map(|bounds| Arc::new(Trace::new(bounds, n_layer, n_nodes, ahead, gpu)));
        let cells = Arc::new(Cells::new(model.shape().n_layer, n_nodes, ahead));
        let control = Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("pi-control")
            .enable_time()
            .build()
            .map_err(|source| ActorError::Control { source })?;
        // the notice reaches counterparts that are started after it: they fill the table
        let table: Arc<Mutex<HashMap<ActorId, ActorRef<Counterpart>>>> = Arc::default();
        for node in 0..n_nodes {
            let attachment = Box::new(Attachment {
                model: Arc::clone(&model),
                faults: faults.clone(),
                cells: Arc::clone(&cells),
                death_notice: death_notice(Arc::clone(&table)),
                wait_limit,
                trace: trace.clone(),
            });
            let (done, answer) = sync_channel(1);
            teams.send(node, Control::Attach { attachment, done })?;
            answer.recv().map_err(|_| ActorError::Gone)?;
        }
        let supervisor = control.block_on(async { Supervisor::spawn(()) });
        let counterparts = start_actors(&control, &supervisor, &teams, &model, &caches, &cells);
        *lock(&table) = counterparts.clone();
        let mut listed: Vec<_> = counterparts
            .iter()
            .map(|(id, actor)| (*id, actor.clone()))
            .collect();
        listed.sort_by_key(|(id, _)| *id);
        let stats = control.block_on(async { Stats::spawn(Stats(listed)) });
        Ok(Self {
            model,
            counterparts,
            stats,
            supervisor,
            running: Mutex::new(()),
            caches,
            trace,
            control: Some(control),
            teams: Some(teams),
        })
    }

    /// The threads that the engine runs on; they take jobs between runs.
    pub fn teams(&self) -> &Teams {
        self.teams
            .as_ref()
            .expect("an engine has teams until it is dropped")
    }

    /// Name of each GPU; none where the host is the device.
    pub fn gpu_names(&self) -> Vec<&str> {
        self.model.gpus.iter().map(GpuModel::name).collect()
    }

    /// Has GPUs count from the next run on what they read, in graphs of their own, as this costs some time; or no longer. False where no
    /// GPU has such graphs.
    pub fn count_on_gpus(&self, on: bool) -> bool {
        let gpus = self.model.gpus.iter();
        gpus.fold(false, |any, gpu| gpu.count(on) | any)
    }

    /// Bytes of slots and of a team's working memory, of each node; node 0 has the slots that all
    /// nodes use.
    pub fn working_bytes(&self) -> Vec<usize> {
        let (shared, mut nodes) = self.model.slots.bytes();
        let threads = self.teams().n_threads();
        for (node, (bytes, n_threads)) in nodes.iter_mut().zip(threads).enumerate() {
            // made again to be measured: untouched, it takes no memory
            *bytes += NodeScratch::new(&self.model, node, n_threads).bytes();
        }
        nodes[0] += shared;
        nodes
    }

    /// Bytes of device memory of each GPU; none where the host is the device.
    pub fn gpu_bytes(&self) -> Vec<usize> {
        self.model.gpus.iter().map(GpuModel::bytes).collect()
    }

    /// Where the time of recent tokens went, by GPU.
    pub fn gpu_times(&self) -> Vec<GpuTimes> {
        self.model.gpus.iter().map(GpuModel::recent_times).collect()
    }

    /// Addresses of each node's cache of keys and values.
    pub fn cache_addresses(&self) -> Vec<Range<usize>> {
        let caches = self.caches.iter();
        caches.map(|cache| cache.addresses()).collect()
    }

    /// What the executors record, if they do.
    pub fn trace(&self) -> Option<&Arc<Trace>> {
        self.trace.as_ref()
    }

    fn control(&self) -> &Runtime {
        self.control
            .as_ref()
            .expect("an engine has a control plane until it is dropped")
    }

    /// Sizes and constants of the model.
    pub fn shape(&self) -> &ModelShape {
        self.model.shape()
    }

    /// Computes what `feeder` asks for until it is done. One run at a time: others wait.
    ///
    /// # Errors
    /// The engine is gone.
    pub fn run<F: Feeder>(&self, feeder: F) -> Result<Run<F>, ActorError> {
        let _running = lock(&self.running);
        let (reply, served) = sync_channel(1);
        let run = RunState::new(Box::new(feeder), reply, self.shape().n_ctx);
        self.teams().send(0, Control::Start(Box::new(run)))?;
        let served = served.recv().map_err(|_| ActorError::Gone)?;
        let feeder: Box<dyn Any> = served.feeder;
        let feeder = feeder.downcast().map_err(|_| ActorError::Gone)?;
        Ok(Run {
            feeder: *feeder,
            totals: served.totals,
            outcome: served.outcome,
        })
    }

    /// The counters of every actor that is not stopped, asked from each through its mailbox.
    ///
    /// # Errors
    /// The control plane does not answer.
    pub fn counters(&self) -> Result<Vec<ActorCounters>, ActorError> {
        let ask = self.stats.ask(ReadAll);
        self.control()
            .block_on(async { ask.await })
            .map_err(|_| ActorError::Gone)
    }

    /// Stops an actor for good: the next token that needs it fails with an error that names it.
    ///
    /// # Errors
    /// There is no such actor.
    pub fn stop_actor(&self, actor: ActorId) -> Result<(), ActorError> {
        let counterpart = self
            .counterparts
            .get(&actor)
            .ok_or(ActorError::NoSuchActor { actor })?;
        self.control().block_on(async {
            // one that is stopped already is as it should be
            let _ = counterpart.stop_gracefully().await;
            counterpart.wait_for_shutdown().await;
        });
        Ok(())
    }

    /// Makes an actor of the control plane panic, for tests.
    pub fn panic_control_actor(&self, actor: ControlActor) {
        self.control().block_on(async {
            // the panic is the answer
            let _ = match actor {
                ControlActor::Supervisor => self.supervisor.ask(Panic).await.map_err(drop),
                ControlActor::Stats => self.stats.ask(Panic).await.map_err(drop),
            };
        });
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if let Some(control) = self.control.take() {
            control.shutdown_timeout(Duration::from_secs(5));
        }
        // dropping the teams ends the executors, and with them the actors
        self.teams = None;
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(|broken| broken.into_inner())
}

/// Each node's cache.
fn caches(teams: &Teams, model: &Model) -> Result<Vec<Arc<KvStore>>, ActorError> {
    let shape = model.shape();
    let plan = teams.plan();
    (0..plan.nodes.len())
        .map(|node| {
            let heads = model.share(0, node).kv_heads.clone();
            let store = KvStore::new(
                plan,
                node,
                model.kv_type,
                shape.head_dim,
                shape.n_ctx,
                heads,
                shape.n_layer,
            )?;
            Ok(Arc::new(store))
        })
        .collect()
}

fn death_notice(table: Arc<Mutex<HashMap<ActorId, ActorRef<Counterpart>>>>) -> DeathNotice {
    Arc::new(move |actor, reason| {
        let counterpart = lock(&table).get(&actor).cloned();
        let told = counterpart.map(|counterpart| counterpart.tell(Died(reason)).try_send().is_ok());
        if told != Some(true) {
            tracing::error!("the control plane cannot be told that {actor} died");
        }
    })
}

/// Starts the counterparts, which start the actors, and waits until all are in their executors.
fn start_actors(
    control: &Runtime,
    supervisor: &ActorRef<Supervisor>,
    teams: &Teams,
    model: &Arc<Model>,
    caches: &[Arc<KvStore>],
    cells: &Arc<Cells>,
) -> HashMap<ActorId, ActorRef<Counterpart>> {
    let outboxes: Arc<[_]> = teams.outboxes().into();
    let mut counterparts = HashMap::new();
    for actor in cells.actors() {
        let Some(cell) = cells.get(actor).cloned() else {
            continue;
        };
        let blueprint = Blueprint {
            actor,
            cell: Arc::clone(&cell),
            build: build(actor, Arc::clone(model), caches, cell),
            outboxes: Arc::clone(&outboxes),
        };
        let started = control.block_on(async {
            let counterpart = control::start(supervisor, blueprint).await;
            counterpart.wait_for_startup().await;
            counterpart
        });
        counterparts.insert(actor, started);
    }
    counterparts
}

/// How to build an actor.
fn build(
    actor: ActorId,
    model: Arc<Model>,
    caches: &[Arc<KvStore>],
    cell: Arc<crate::counters::Cell>,
) -> Build {
    match actor {
        ActorId::Pipeline => Arc::new(move || {
            Incarnation::Pipeline(Pipeline::new(Arc::clone(&model), Arc::clone(&cell)))
        }),
        ActorId::Predictor => Arc::new(move || {
            Incarnation::Predictor(Predictor::new(Arc::clone(&model), Arc::clone(&cell)))
        }),
        ActorId::DeviceLayer { layer } => Arc::new(move || {
            let device = DeviceLayer::new(layer, Arc::clone(&model), Arc::clone(&cell));
            Incarnation::DeviceLayer(device)
        }),
        ActorId::ColdLayer { layer, node } => {
            let cache = Arc::clone(&caches[node]);
            Arc::new(move || {
                let (model, cache, cell) =
                    (Arc::clone(&model), Arc::clone(&cache), Arc::clone(&cell));
                Incarnation::ColdLayer(ColdLayer::new(layer, node, model, cache, cell))
            })
        }
    }
}
