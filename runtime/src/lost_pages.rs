//! What happens when a mapped file's bytes are gone: another program shortened the file, or its disk
//! failed. The read raises `SIGBUS`, which cannot be turned into an error value; the handler here
//! names the file and ends the program, in place of a bare "Bus error".
//!
//! The mapped ranges lie in a static table that the handler reads without a lock: a place is free,
//! being written, or in use, and its state is written last (release) and read first (acquire). A
//! fault outside all ranges goes to whoever handled the signal before.
#![cfg(unix)]
#![allow(unsafe_code)]

use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Once;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, AtomicUsize, Ordering};

use crate::error::ENVIRONMENT_EXIT_CODE;

/// Files that are mapped at once; more go without a message.
const PLACES: usize = 64;
/// Bytes of a path that are shown.
const NAME_BYTES: usize = 512;

const FREE: u32 = 0;
const BEING_WRITTEN: u32 = 1;
const IN_USE: u32 = 2;

/// A mapped range and the name of its file.
struct Place {
    state: AtomicU32,
    start: AtomicUsize,
    end: AtomicUsize,
    name_bytes: AtomicUsize,
    name: [AtomicU8; NAME_BYTES],
}

static TABLE: [Place; PLACES] = [const {
    Place {
        state: AtomicU32::new(FREE),
        start: AtomicUsize::new(0),
        end: AtomicUsize::new(0),
        name_bytes: AtomicUsize::new(0),
        name: [const { AtomicU8::new(0) }; NAME_BYTES],
    }
}; PLACES];

/// What handled the signal before; never freed, so that the handler may read it at any time.
static BEFORE: AtomicPtr<libc::sigaction> = AtomicPtr::new(std::ptr::null_mut());

/// A range that is watched until this is dropped.
#[derive(Debug)]
pub struct Watched(Option<usize>);

impl Watched {
    /// Watches `range` (addresses) of a mapping of the file at `path`; the first call installs the
    /// handler.
    pub fn new(range: Range<usize>, path: &Path) -> Self {
        static INSTALLED: Once = Once::new();
        INSTALLED.call_once(install);
        let claim = |place: &Place| {
            let claimed = place.state.compare_exchange(
                FREE,
                BEING_WRITTEN,
                Ordering::Acquire,
                Ordering::Relaxed,
            );
            claimed.is_ok()
        };
        let Some(index) = TABLE.iter().position(claim) else {
            return Self(None);
        };
        let place = &TABLE[index];
        let name = path.as_os_str().as_bytes();
        for (byte, &value) in place.name.iter().zip(name) {
            byte.store(value, Ordering::Relaxed);
        }
        let name_bytes = name.len().min(NAME_BYTES);
        place.name_bytes.store(name_bytes, Ordering::Relaxed);
        place.start.store(range.start, Ordering::Relaxed);
        place.end.store(range.end, Ordering::Relaxed);
        place.state.store(IN_USE, Ordering::Release);
        Self(Some(index))
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        if let Some(index) = self.0 {
            TABLE[index].state.store(FREE, Ordering::Release);
        }
    }
}

fn install() {
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = on_lost_page;
    // SAFETY: the structures are plain data for which zeros are valid; the handler has the signature
    // that SA_SIGINFO asks for and calls only async-signal-safe functions.
    unsafe {
        let mut action: libc::sigaction = MaybeUninit::zeroed().assume_init();
        action.sa_sigaction = handler as libc::sighandler_t;
        // on the thread's own stack, which a lost page leaves as it is: what is saved of a thread that has used AMX fills the stack that
        // the standard library keeps for signals
        action.sa_flags = libc::SA_SIGINFO;
        libc::sigemptyset(&mut action.sa_mask);
        let before = Box::into_raw(Box::new(MaybeUninit::<libc::sigaction>::zeroed())).cast();
        // published first: the handler may run as soon as it is installed
        BEFORE.store(before, Ordering::Release);
        if libc::sigaction(libc::SIGBUS, &action, before) != 0 {
            tracing::debug!("SIGBUS cannot be handled: a file that is cut off will not be named");
        }
    }
}

/// Names the file that the address belongs to and ends the program; else lets the fault happen again
/// under the action that was there before.
extern "C" fn on_lost_page(_: i32, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    // SAFETY: the system passes a valid structure, and SIGBUS has an address.
    let address = unsafe { (*info).si_addr() } as usize;
    let holds = |place: &&Place| {
        place.state.load(Ordering::Acquire) == IN_USE
            && place.start.load(Ordering::Relaxed) <= address
            && address < place.end.load(Ordering::Relaxed)
    };
    let Some(place) = TABLE.iter().find(holds) else {
        let before = BEFORE.load(Ordering::Acquire);
        // SAFETY: `before` was filled by the system and is never freed; sigaction and signal are
        // async-signal-safe. The read is tried again on return.
        unsafe {
            if before.is_null() || libc::sigaction(libc::SIGBUS, before, std::ptr::null_mut()) != 0
            {
                libc::signal(libc::SIGBUS, libc::SIG_DFL);
            }
        }
        return;
    };
    let mut name = [0u8; NAME_BYTES];
    for (byte, stored) in name.iter_mut().zip(&place.name) {
        *byte = stored.load(Ordering::Relaxed);
    }
    let name_bytes = place.name_bytes.load(Ordering::Relaxed).min(NAME_BYTES);
    say(b"error: ");
    say(&name[..name_bytes]);
    say(
        b": the file was cut off, or its disk failed, while it was being read; copy or download it \
          again, and replace it only by another file of that name, never in place\n",
    );
    // SAFETY: async-signal-safe, and does not return.
    unsafe { libc::_exit(i32::from(ENVIRONMENT_EXIT_CODE)) }
}

/// Writes to stderr what can be written.
fn say(text: &[u8]) {
    // SAFETY: write is async-signal-safe; the bytes are there.
    unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
}
