//! Which hot neurons fired, token by token; and rows that go to other places.

use super::buffer::{DeviceBuffer, View, ViewMut};
use super::device::Device;
use super::rows::NeuronList;
use super::stream::{Grid, Stream};
use crate::error::KernelError;

/// Tokens whose marks are kept: that of position p takes place p mod this.
pub const MARK_TOKENS: usize = 64;

/// Neurons of a word of marks.
const WORD: usize = u32::BITS as usize;
/// Threads of a block of `mark_active`, and its neurons.
const MARK_THREADS: usize = 1024;
const MARK_NEURONS: usize = 8192;
/// Threads of a block of `count_marks`.
const COUNT_THREADS: usize = 256;
/// Threads of a block of `scatter`.
const SCATTER_THREADS: usize = 128;

/// Words that a token's marks of `n` neurons take.
pub fn mark_words(n: usize) -> usize {
    n.div_ceil(WORD)
}

#[repr(C)]
struct MarkArgs {
    act: u64,
    ids: u64,
    count: u64,
    position: u64,
    marks: u64,
    n_words: u64,
    first_word: u32,
    n: u32,
}

const _: () = assert!(size_of::<MarkArgs>() == 56);

/// Marks which neurons of a layer fired: those whose activation in `act` (`[n]` f32, of all neurons or of the list's) is not zero.
/// Bit i of the words `first_word ..` of the token at `position` (`[1]` u32) is overwritten for each neuron i, in `marks`
/// (`[MARK_TOKENS, n_words]` u32).
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit.
pub fn mark_active(
    stream: &Stream,
    act: View<'_, f32>,
    list: NeuronList<'_>,
    position: View<'_, u32>,
    marks: ViewMut<'_, u32>,
    first_word: usize,
) -> Result<(), KernelError> {
    let n = act.len();
    let n_words = marks.len() / MARK_TOKENS;
    assert_eq!(marks.len(), n_words * MARK_TOKENS, "marks of every token");
    assert!(first_word + mark_words(n) <= n_words, "a bit a neuron");
    assert_eq!(position.len(), 1, "one position");
    stream.check(&[act.device(), position.device(), marks.device()]);
    let (ids, count, n_max) = list.raw(stream, n);
    assert_eq!(n_max, n, "activations of all that may be listed");
    if n == 0 {
        return Ok(());
    }
    let args = MarkArgs {
        act: act.address(),
        ids,
        count,
        position: position.address(),
        marks: marks.address(),
        n_words: n_words as u64,
        first_word: first_word as u32,
        n: n as u32,
    };
    let grid = Grid {
        blocks: [n.div_ceil(MARK_NEURONS), 1],
        threads: MARK_THREADS,
        shared_bytes: 0,
    };
    let function = stream.functions().mark_active;
    // SAFETY: all lengths fit (asserted); ids are checked by the kernel.
    unsafe { stream.launch("launch mark_active", function, grid, args) }
}

#[repr(C)]
struct CountArgs {
    marks: u64,
    tokens: u64,
    counts: u64,
    n_words: u32,
}

const _: () = assert!(size_of::<CountArgs>() == 32);

/// Adds each neuron's marks to its count in `counts` (`[n_words · 32]` u32): those of the tokens whose place has its bit set in
/// `tokens`, in `marks` (`[MARK_TOKENS, n_words]` u32).
///
/// # Errors
/// The driver's.
///
/// # Panics
/// When shapes or devices do not fit.
pub fn count_marks(
    stream: &Stream,
    marks: View<'_, u32>,
    tokens: u64,
    counts: ViewMut<'_, u32>,
) -> Result<(), KernelError> {
    assert_eq!(
        marks.len() * WORD,
        counts.len() * MARK_TOKENS,
        "a count a neuron"
    );
    stream.check(&[marks.device(), counts.device()]);
    if counts.is_empty() || tokens == 0 {
        return Ok(());
    }
    let args = CountArgs {
        marks: marks.address(),
        tokens,
        counts: counts.address(),
        n_words: (counts.len() / WORD) as u32,
    };
    let grid = Grid {
        blocks: [counts.len().div_ceil(COUNT_THREADS), 1],
        threads: COUNT_THREADS,
        shared_bytes: 0,
    };
    let function = stream.functions().count_marks;
    // SAFETY: all lengths fit (asserted).
    unsafe { stream.launch("launch count_marks", function, grid, args) }
}

#[repr(C)]
struct ScatterArgs {
    from: u64,
    pieces: u64,
    to: u64,
}

const _: () = assert!(size_of::<ScatterArgs>() == 24);

/// Words of an entry of the table of pieces.
const ENTRY: usize = 4;

/// Memory through which many small pieces go to the device together.
#[derive(Debug)]
pub struct Scatter {
    /// Words on their way.
    words: DeviceBuffer<u32>,
    /// Where they go.
    table: DeviceBuffer<u32>,
}

impl Scatter {
    /// For so many bytes at a time, in up to `n_pieces` pieces.
    ///
    /// # Errors
    /// As [`Device::alloc`].
    pub fn new(device: &Device, bytes: usize, n_pieces: usize) -> Result<Self, KernelError> {
        Ok(Self {
            words: device.alloc(bytes.div_ceil(size_of::<u32>()).max(1))?,
            table: device.alloc(ENTRY * n_pieces.max(1))?,
        })
    }

    /// Bytes of device memory.
    pub fn bytes(&self) -> usize {
        self.words.bytes() + self.table.bytes()
    }

    /// Copies `pieces`, each a byte of `to` and what goes there on, and returns when they are there. They do not overlap.
    /// What is launched on other streams is not waited for.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// When a piece is not in `to`, or not of whole words, or devices differ.
    pub fn write<'p>(
        &mut self,
        stream: &Stream,
        pieces: impl IntoIterator<Item = (usize, &'p [u8])>,
        to: &mut ViewMut<'_, u8>,
    ) -> Result<(), KernelError> {
        stream.check(&[to.device(), self.words.device()]);
        assert!(to.address().is_multiple_of(4), "aligned words");
        let (room, n_max) = (self.words.len(), self.table.len() / ENTRY);
        let mut batch = Batch::default();
        for (at, mut bytes) in pieces {
            let whole = at.is_multiple_of(4) && bytes.len().is_multiple_of(4);
            assert!(whole && at + bytes.len() <= to.len(), "words of the memory");
            let mut at = at / 4;
            while !bytes.is_empty() {
                if batch.words.len() == room || batch.table.len() == ENTRY * n_max {
                    self.send(stream, &mut batch, to)?;
                }
                let n = (bytes.len() / 4).min(room - batch.words.len());
                let (now, later) = bytes.split_at(4 * n);
                batch.add(at, now);
                (at, bytes) = (at + n, later);
            }
        }
        self.send(stream, &mut batch, to)
    }

    fn send(
        &mut self,
        stream: &Stream,
        batch: &mut Batch,
        to: &mut ViewMut<'_, u8>,
    ) -> Result<(), KernelError> {
        let n_pieces = batch.table.len() / ENTRY;
        if n_pieces == 0 {
            return Ok(());
        }
        self.words.write(0, &batch.words)?;
        self.table.write(0, &batch.table)?;
        let args = ScatterArgs {
            from: self.words.view(..).address(),
            pieces: self.table.view(..).address(),
            to: to.address(),
        };
        let grid = Grid {
            blocks: [n_pieces, 1],
            threads: SCATTER_THREADS,
            shared_bytes: 0,
        };
        let function = stream.functions().scatter;
        // SAFETY: every piece is in `to` (asserted), and its words are in `words`.
        unsafe { stream.launch("launch scatter", function, grid, args) }?;
        batch.clear();
        // the memory is written again, and what is launched next reads weights early
        stream.synchronize()
    }
}

/// Pieces that go together.
#[derive(Default)]
struct Batch {
    words: Vec<u32>,
    table: Vec<u32>,
}

impl Batch {
    /// Bytes of whole words, to word `at`.
    fn add(&mut self, at: usize, bytes: &[u8]) {
        let (first, n) = (self.words.len(), bytes.len() / 4);
        let words = bytes.chunks_exact(4);
        (self.words)
            .extend(words.map(|word| u32::from_ne_bytes([word[0], word[1], word[2], word[3]])));
        let at = at as u64;
        (self.table).extend([at as u32, (at >> 32) as u32, first as u32, n as u32]);
    }

    fn clear(&mut self) {
        self.words.clear();
        self.table.clear();
    }
}
