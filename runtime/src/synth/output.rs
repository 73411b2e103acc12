//! Writing tensors while other threads make the next ones.

use std::ops::Range;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};

use super::plan::SynthTensor;
use super::random::Random;
use crate::gguf::{GgufError, GgufStream};
use crate::session::LoadObserver;

/// Bytes of rows that a thread makes before it hands them over.
const CHUNK_BYTES: usize = 2 << 20;

/// Rows of a tensor.
struct Chunk<'a> {
    tensor: &'a SynthTensor,
    rows: Range<usize>,
}

fn chunks(tensors: &[SynthTensor]) -> impl Iterator<Item = Chunk<'_>> {
    tensors.iter().flat_map(|tensor| {
        let step = (CHUNK_BYTES / tensor.row_bytes()).max(1);
        (0..tensor.n_rows).step_by(step).map(move |start| Chunk {
            tensor,
            rows: start..(start + step).min(tensor.n_rows),
        })
    })
}

impl Chunk<'_> {
    fn make(&self, seed: u64, out: &mut Vec<u8>) {
        let row_bytes = self.tensor.row_bytes();
        out.resize(row_bytes * self.rows.len(), 0);
        for (row, bytes) in self.rows.clone().zip(out.chunks_exact_mut(row_bytes)) {
            let random = Random::stream(seed, self.tensor.stream, row as u64);
            self.tensor.rows.write(row, random, bytes);
        }
    }
}

/// Writes `tensors` into `stream` in order; `before` bytes are written already. `stop` is asked now and then whether to
/// give up: the answer is whether all were written.
///
/// Chunk n is made by thread n mod `n_threads`, and every row from numbers of its own, so the bytes are the same with any
/// number of threads.
pub(super) fn write(
    stream: &mut GgufStream,
    tensors: &[SynthTensor],
    seed: u64,
    n_threads: usize,
    (before, observer): (u64, &dyn LoadObserver),
    stop: &dyn Fn() -> bool,
) -> Result<bool, GgufError> {
    std::thread::scope(|scope| {
        let makers: Vec<Maker> = (0..n_threads)
            .map(|thread| {
                let (full, made) = sync_channel(1);
                let (used, empty) = sync_channel(2);
                scope.spawn(move || make(tensors, seed, (thread, n_threads), &full, &empty));
                Maker { made, used }
            })
            .collect();
        let mut written = before;
        for (n, chunk) in chunks(tensors).enumerate() {
            if stop() {
                return Ok(false);
            }
            let maker = &makers[n % n_threads];
            let Ok(bytes) = maker.made.recv() else {
                unreachable!("a maker ends after its last chunk")
            };
            stream.write(&chunk.tensor.name, &bytes)?;
            written += bytes.len() as u64;
            observer.copied(written);
            // a maker that has ended needs no buffer
            let _ = maker.used.try_send(bytes);
        }
        Ok(true)
    })
}

/// The writer's ends of a maker's channels.
struct Maker {
    made: Receiver<Vec<u8>>,
    used: SyncSender<Vec<u8>>,
}

/// Makes every `n_threads`-th chunk, until the writer goes away.
fn make(
    tensors: &[SynthTensor],
    seed: u64,
    (thread, n_threads): (usize, usize),
    full: &SyncSender<Vec<u8>>,
    empty: &Receiver<Vec<u8>>,
) {
    for chunk in chunks(tensors).skip(thread).step_by(n_threads) {
        let mut bytes = empty.try_recv().unwrap_or_default();
        chunk.make(seed, &mut bytes);
        if full.send(bytes).is_err() {
            return;
        }
    }
}
