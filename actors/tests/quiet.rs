//! Invariant 2: between a token's start and end the team's threads make no allocation and no system
//! call but to park or to wake (futex).

#![cfg(target_os = "linux")]

mod common;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

use common::{Form, PlainModel, Predictors, Setup, SketchForm, Skip, engine, tokens};
use pi_actors::trace::TraceBounds;
use pi_actors::weights::{GateActivation, SparsityMode};
use pi_actors::{Candidates, Engine, Feed, Feeder, HeadWanted, LogitsWanted, Next};
use pi_kernels::ActivationMode;

/// Counts allocations of the team's threads while a token is under way.
struct Counting;

static TOKEN_UNDER_WAY: AtomicBool = AtomicBool::new(false);
static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);
const THREADS_MAX: usize = 8;
static TEAM: [AtomicI32; THREADS_MAX] = [const { AtomicI32::new(0) }; THREADS_MAX];

fn count() {
    // without a team to watch, no call: under the filter, a team that is done may still free what its run
    // had while the next one's token is under way
    let watched = TEAM[0].load(Ordering::SeqCst) != 0;
    if watched && TOKEN_UNDER_WAY.load(Ordering::SeqCst) {
        let me = gettid();
        if TEAM
            .iter()
            .any(|thread| thread.load(Ordering::SeqCst) == me)
        {
            ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        }
    }
}

fn gettid() -> i32 {
    // SAFETY: no arguments, no effect.
    unsafe { libc::gettid() }
}

// SAFETY: the system's allocator, which has the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count();
        // SAFETY: the caller's contract.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count();
        // SAFETY: the caller's contract.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Decodes tokens without doing anything itself.
struct Silent {
    tokens: Vec<u32>,
    position: usize,
    /// Tokens of the first feed.
    prompt: usize,
    /// Whether a sketch picks whose logits are computed.
    sparse: bool,
}

impl Feeder for Silent {
    fn next(&mut self) -> Next<'_> {
        let position = self.position;
        let len = if position == 0 { self.prompt } else { 1 };
        if position + len > self.tokens.len() {
            return Next::Done;
        }
        self.position += len;
        let tokens = &self.tokens[position..position + len];
        TOKEN_UNDER_WAY.store(position > 0, Ordering::SeqCst);
        Next::Feed(Feed {
            tokens,
            position,
            logits: LogitsWanted::Last,
        })
    }

    fn logits(&mut self, _: usize, _: &[f32]) {
        TOKEN_UNDER_WAY.store(false, Ordering::SeqCst);
    }

    fn head(&self) -> HeadWanted<'_> {
        match self.sparse {
            true => HeadWanted::Sparse {
                biases: &[(3, -1.0), (50, f32::NEG_INFINITY)],
            },
            false => HeadWanted::Full,
        }
    }

    fn candidates(&mut self, _: usize, candidates: Candidates<'_>) {
        TOKEN_UNDER_WAY.store(false, Ordering::SeqCst);
        assert!(self.sparse && candidates.ids.contains(&50));
    }
}

const N_TOKENS: usize = 100;

fn silent(sparse: bool) -> Silent {
    Silent {
        tokens: tokens(N_TOKENS + 20),
        position: 0,
        prompt: 20,
        sparse,
    }
}

fn remember_threads(engine: &Engine) {
    let next = AtomicUsize::new(0);
    TEAM.iter()
        .for_each(|thread| thread.store(0, Ordering::SeqCst));
    let remember = |_| TEAM[next.fetch_add(1, Ordering::SeqCst)].store(gettid(), Ordering::SeqCst);
    engine.teams().run(&remember).unwrap();
}

const EXACT: Form = Form::Neurons(SparsityMode::Exact);
const PREDICTED: Form = Form::Predicted(Predictors {
    sketch: SketchForm::LowRank,
    ahead: true,
    alone: false,
});
const SIGNS: Form = Form::Predicted(Predictors {
    sketch: SketchForm::Signs,
    ahead: false,
    alone: false,
});

const BY_GATE: Form = Form::Threshold(Skip {
    by_gate: true,
    tau: 0.1,
});
const BY_PRODUCT: Form = Form::Threshold(Skip {
    by_gate: false,
    tau: 0.1,
});

/// Nodes × threads of the engines that have to be quiet, whether they are traced, what they run, and whether the head is
/// sparse.
const TEAMS: [(usize, usize, bool, Form, bool); 10] = [
    (1, 2, false, EXACT, false),
    (2, 1, false, EXACT, false),
    (2, 2, false, PREDICTED, false),
    (1, 2, true, EXACT, false),
    (2, 2, true, EXACT, true),
    (1, 2, true, PREDICTED, false),
    (2, 1, false, SIGNS, false),
    (1, 2, false, EXACT, true),
    (2, 2, false, BY_GATE, false),
    (1, 2, false, BY_PRODUCT, false),
];

fn setup((n_nodes, n_threads, traced, form, sparse): (usize, usize, bool, Form, bool)) -> Setup {
    let bounds = TraceBounds {
        n_steps: 2 * N_TOKENS + 10,
        node_bytes_max: 1 << 24,
    };
    Setup {
        n_nodes,
        n_threads,
        form,
        activations: ActivationMode::Q8,
        trace: traced.then_some(bounds),
        sketch_groups: sparse.then_some(2),
        ..Setup::default()
    }
}

/// Thresholds are for gates that never close.
fn quiet_engine(team: (usize, usize, bool, Form, bool)) -> Engine {
    let activation = match team.3 {
        Form::Threshold(_) => GateActivation::Silu,
        _ => GateActivation::Relu,
    };
    engine(&PlainModel::random(41, activation), setup(team))
}

/// Every step has been recorded.
fn check_trace(engine: &Engine) {
    let Some(trace) = engine.trace() else { return };
    for node in trace.read() {
        assert_eq!(node.lost, 0);
        assert!(
            node.events.len() > 3 * N_TOKENS,
            "{} events",
            node.events.len()
        );
    }
}

#[test]
fn team_threads_allocate_nothing_and_call_nothing_but_futex() {
    if std::env::var_os(CHILD).is_some() {
        return decode_under_filter();
    }
    for team in TEAMS {
        let (.., sparse) = team;
        let engine = quiet_engine(team);
        remember_threads(&engine);
        let run = engine.run(silent(sparse)).unwrap();
        run.outcome.unwrap();
        assert_eq!(run.totals.decode_tokens, N_TOKENS);
        let allocations = ALLOCATIONS.swap(0, Ordering::SeqCst);
        assert_eq!(
            allocations, 0,
            "{team:?}: nodes, threads, traced, form, sparse head; {N_TOKENS} tokens"
        );
        check_trace(&engine);
    }
    no_system_call_but_futex();
}

/// Tells the child process that it is one.
const CHILD: &str = "PI_QUIET_CHILD";

/// A filter cannot be taken off a thread again, so a child process gets it.
fn no_system_call_but_futex() {
    let child = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "team_threads_allocate_nothing_and_call_nothing_but_futex",
            "--nocapture",
        ])
        .env(CHILD, "1")
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    if said.contains("filter refused") {
        eprintln!("skipped: this system does not let a thread filter its system calls");
        return;
    }
    let code = child.status.code();
    assert_eq!(
        code,
        Some(0),
        "a team thread made system call number {code:?}\n{said}"
    );
    assert!(
        said.contains("tokens decoded under the filter: 1000"),
        "{said}"
    );
}

fn decode_under_filter() {
    let engines = TEAMS.map(quiet_engine);
    let mut n_tokens = 0;
    for (engine, (.., sparse)) in engines.iter().zip(TEAMS) {
        // once without the filter, for what happens the first time only
        engine.run(silent(sparse)).unwrap().outcome.unwrap();
        let refused = AtomicBool::new(false);
        engine
            .teams()
            .run(&|_| {
                if !filter::install() {
                    refused.store(true, Ordering::SeqCst);
                }
            })
            .unwrap();
        if refused.load(Ordering::SeqCst) {
            println!("filter refused");
            return;
        }
        n_tokens += engine.run(silent(sparse)).unwrap().totals.decode_tokens;
        check_trace(engine);
    }
    println!("tokens decoded under the filter: {n_tokens}");
    // the filtered threads cannot even end
    // SAFETY: ends the process.
    unsafe { libc::_exit(0) }
}

mod filter {
    //! seccomp: every system call of the thread but futex ends the process with its number.

    use std::ffi::{c_int, c_void};

    const LOAD_NUMBER: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const JUMP_IF_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    const ALLOW: u32 = 0x7fff_0000;
    const TRAP: u32 = 0x0003_0000;

    extern "C" fn refused(_: c_int, info: *mut libc::siginfo_t, _: *mut c_void) {
        // the number lies behind the call's address, 24 bytes in
        // SAFETY: the kernel fills at least so much for SIGSYS.
        let number = unsafe { *info.cast::<u8>().add(24).cast::<c_int>() };
        // SAFETY: ends the process.
        unsafe { libc::_exit(number.clamp(1, 255)) }
    }

    /// Filters the calling thread; false when the system does not let it.
    pub fn install() -> bool {
        let op = |code, jt, jf, k| libc::sock_filter { code, jt, jf, k };
        let mut program = [
            op(LOAD_NUMBER, 0, 0, 0),
            op(JUMP_IF_EQUAL, 1, 0, libc::SYS_futex as u32),
            op(JUMP_IF_EQUAL, 0, 1, libc::SYS_exit_group as u32),
            op(RETURN, 0, 0, ALLOW),
            op(RETURN, 0, 0, TRAP),
        ];
        let filter = libc::sock_fprog {
            len: program.len() as u16,
            filter: program.as_mut_ptr(),
        };
        // SAFETY: the handler only ends the process; the program outlives the call.
        unsafe {
            let mut action: libc::sigaction = std::mem::zeroed();
            action.sa_sigaction = refused as *const () as usize;
            action.sa_flags = libc::SA_SIGINFO;
            libc::sigaction(libc::SIGSYS, &action, std::ptr::null_mut()) == 0
                && libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
                && libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &filter) == 0
        }
    }
}
