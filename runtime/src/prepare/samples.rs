//! Hidden states of a text, in a file: what enters each layer's FFN, for all tokens.
//!
//! The states of all layers at once are larger than the memory that a preparation may take, and each stage needs those
//! of one layer at a time: the file is written token by token and read layer by layer. It is part of what is kept of
//! an interrupted preparation.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use half::f16;
use half::slice::HalfFloatSliceExt;
use pi_actors::{Feed, Feeder, LayerTap, LogitsWanted, Next};
use pi_kernels::ActBatch;

use super::PrepareError;
use super::text::Passages;

/// Kinds of states: the normed state, and the residual stream.
const N_KINDS: usize = 2;

/// States `[n_layer, 2, n_tokens, n_embd]` f16 in a file: normed for the FFN, and the residual stream over its root
/// mean square.
#[derive(Debug)]
pub struct SampleFile {
    path: PathBuf,
    file: File,
    n_layer: usize,
    n_tokens: usize,
    n_embd: usize,
}

/// One layer's states.
#[derive(Debug, Clone, PartialEq)]
pub struct LayerStates {
    /// What enters the FFN, `[n_tokens, n_embd]`.
    pub normed: Vec<f32>,
    /// The residual stream after attention over its root mean square, `[n_tokens, n_embd]`.
    pub residual: Vec<f32>,
}

impl SampleFile {
    /// Opens the file for states of so many tokens; it is made where it is not there.
    ///
    /// # Errors
    /// What the file system refuses.
    pub fn open(
        path: &Path,
        n_layer: usize,
        n_tokens: usize,
        n_embd: usize,
    ) -> Result<Self, PrepareError> {
        let mut options = File::options();
        options.read(true).write(true).create(true).truncate(false);
        let samples = |file| Self {
            path: path.to_owned(),
            file,
            n_layer,
            n_tokens,
            n_embd,
        };
        options
            .open(path)
            .map(samples)
            .map_err(|source| PrepareError::Checkpoint {
                path: path.to_owned(),
                action: "keep",
                source,
            })
    }

    /// Tokens whose states fit.
    pub fn n_tokens(&self) -> usize {
        self.n_tokens
    }

    /// Bytes of the whole file.
    pub fn size_bytes(&self) -> u64 {
        self.offset(self.n_layer, 0, 0)
    }

    fn offset(&self, layer: usize, kind: usize, token: usize) -> u64 {
        let rows = (layer * N_KINDS + kind) * self.n_tokens + token;
        (rows * self.n_embd * size_of::<f16>()) as u64
    }

    fn write(&self, layer: usize, kind: usize, token: usize, rows: &[f16]) -> io::Result<()> {
        let bytes: Vec<u8> = rows
            .reinterpret_cast()
            .iter()
            .flat_map(|bits: &u16| bits.to_le_bytes())
            .collect();
        self.file
            .write_all_at(&bytes, self.offset(layer, kind, token))
    }

    /// The states of `layer`.
    ///
    /// # Errors
    /// The file cannot be read, or is shorter than it should be.
    pub fn layer(&self, layer: usize) -> Result<LayerStates, PrepareError> {
        Ok(LayerStates {
            normed: self.normed(layer, 0..self.n_tokens)?,
            residual: self.residual(layer, 0..self.n_tokens)?,
        })
    }

    /// What enters the FFN of `layer` for `tokens`, `[tokens.len(), n_embd]`.
    ///
    /// # Errors
    /// As [`Self::layer`].
    pub fn normed(&self, layer: usize, tokens: Range<usize>) -> Result<Vec<f32>, PrepareError> {
        self.read(layer, 0, tokens)
    }

    /// The residual stream of `layer` after attention over its root mean square, for `tokens`,
    /// `[tokens.len(), n_embd]`.
    ///
    /// # Errors
    /// As [`Self::layer`].
    pub fn residual(&self, layer: usize, tokens: Range<usize>) -> Result<Vec<f32>, PrepareError> {
        self.read(layer, 1, tokens)
    }

    fn read(
        &self,
        layer: usize,
        kind: usize,
        tokens: Range<usize>,
    ) -> Result<Vec<f32>, PrepareError> {
        let mut bytes = vec![0; tokens.len() * self.n_embd * size_of::<f16>()];
        let offset = self.offset(layer, kind, tokens.start);
        let read = self.file.read_exact_at(&mut bytes, offset);
        read.map_err(|source| self.error("read", source))?;
        let values = bytes.chunks_exact(2);
        Ok(values
            .map(|bytes| f16::from_le_bytes([bytes[0], bytes[1]]).to_f32())
            .collect())
    }

    /// Makes what was written outlive the machine's next failure.
    ///
    /// # Errors
    /// What the file system refuses.
    pub fn sync(&self) -> Result<(), PrepareError> {
        let synced = self.file.sync_data();
        synced.map_err(|source| self.error("keep", source))
    }

    fn error(&self, action: &'static str, source: io::Error) -> PrepareError {
        PrepareError::Checkpoint {
            path: self.path.clone(),
            action,
            source,
        }
    }
}

/// Writes the states of the passage under way into a file.
#[derive(Debug)]
pub struct StateTap {
    file: SampleFile,
    /// First token of the passage in the file.
    first: AtomicUsize,
    failed: Mutex<Option<io::Error>>,
}

impl StateTap {
    /// Writes into `file`.
    pub fn new(file: SampleFile) -> Self {
        Self {
            file,
            first: AtomicUsize::new(0),
            failed: Mutex::new(None),
        }
    }

    /// The file.
    pub fn file(&self) -> &SampleFile {
        &self.file
    }

    /// Why the file cannot be written, if it could not be.
    pub fn take_error(&self) -> Option<PrepareError> {
        let source = self.lock().take()?;
        Some(self.file.error("keep", source))
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<io::Error>> {
        self.failed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn keep(
        &self,
        layer: usize,
        first: usize,
        residual: &[f32],
        normed: &ActBatch,
    ) -> io::Result<()> {
        let n_embd = self.file.n_embd;
        let mut rows = vec![f16::ZERO; residual.len()];
        for (token, row) in rows.chunks_exact_mut(n_embd).enumerate() {
            row.convert_from_f32_slice(&normed.token(token).values[..n_embd]);
        }
        self.file.write(layer, 0, first, &rows)?;
        let mut scaled = vec![0.0; n_embd];
        for (x, row) in residual
            .chunks_exact(n_embd)
            .zip(rows.chunks_exact_mut(n_embd))
        {
            let scale = 1.0 / root_mean_square(x);
            for (value, x) in scaled.iter_mut().zip(x) {
                *value = x * scale;
            }
            row.convert_from_f32_slice(&scaled);
        }
        self.file.write(layer, 1, first, &rows)
    }
}

/// Root of the mean square, never zero.
pub fn root_mean_square(x: &[f32]) -> f32 {
    let sum: f32 = x.iter().map(|value| value * value).sum();
    (sum / x.len() as f32).sqrt().max(f32::MIN_POSITIVE)
}

impl LayerTap for StateTap {
    fn ffn_input(&self, layer: usize, first_position: usize, residual: &[f32], normed: &ActBatch) {
        let first = self.first.load(Ordering::Relaxed) + first_position;
        if let Err(source) = self.keep(layer, first, residual, normed) {
            self.lock().get_or_insert(source);
        }
    }
}

/// Called when so many passages are done.
pub type PassageDone = Box<dyn FnMut(usize) -> Result<(), PrepareError> + Send>;

/// Feeds passages, one after another, to a model that is tapped.
pub struct PassageFeeder {
    passages: Passages,
    tap: Arc<StateTap>,
    next: usize,
    /// A passage has been given.
    given: bool,
    stop: Arc<AtomicBool>,
    done: PassageDone,
    /// Why it ended early.
    pub outcome: Result<(), PrepareError>,
}

impl PassageFeeder {
    /// Feeds `passages` from `first` on, until `stop` is set.
    pub fn new(
        passages: Passages,
        first: usize,
        tap: Arc<StateTap>,
        stop: Arc<AtomicBool>,
        done: PassageDone,
    ) -> Self {
        Self {
            passages,
            tap,
            next: first,
            given: false,
            stop,
            done,
            outcome: Ok(()),
        }
    }

    /// Takes note of the passage that was given; whether to go on.
    fn finish_passage(&mut self) -> bool {
        if let Some(error) = self.tap.take_error() {
            self.outcome = Err(error);
            return false;
        }
        if std::mem::take(&mut self.given) {
            self.next += 1;
            self.outcome = (self.done)(self.next);
        }
        self.outcome.is_ok()
    }
}

impl Feeder for PassageFeeder {
    fn next(&mut self) -> Next<'_> {
        let goes_on = self.finish_passage();
        let stopped = self.stop.load(Ordering::Acquire);
        if !goes_on || stopped || self.next == self.passages.len() {
            return Next::Done;
        }
        self.given = true;
        let first = self.passages.at(self.next).start;
        self.tap.first.store(first, Ordering::Relaxed);
        Next::Feed(Feed {
            tokens: self.passages.get(self.next),
            position: 0,
            logits: LogitsWanted::None,
        })
    }

    fn logits(&mut self, _position: usize, _logits: &[f32]) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use pi_kernels::{ActivationMode, Cpu};

    #[test]
    fn states_come_back_by_layer() {
        let folder = tempfile::tempdir().unwrap();
        let cpu = Cpu::detect(ActivationMode::Q8);
        let file = SampleFile::open(&folder.path().join("s"), 2, 3, 2).unwrap();
        let tap = StateTap::new(file);
        let mut normed = ActBatch::new(cpu.mode(), 2, 2);
        normed.set(cpu, 0, &[1.0, 2.0]);
        normed.set(cpu, 1, &[-0.5, 0.25]);
        for layer in 0..2 {
            tap.ffn_input(layer, 1, &[3.0, 3.0, 0.0, 2f32.sqrt()], &normed);
            tap.ffn_input(layer, 0, &[0.0, 0.0], &normed);
        }
        assert!(tap.take_error().is_none());
        let states = tap.file().layer(1).unwrap();
        assert_eq!(states.normed, [1.0, 2.0, 1.0, 2.0, -0.5, 0.25]);
        let expected = [0.0, 0.0, 1.0, 1.0, 0.0, 2f32.sqrt()];
        for (found, expected) in states.residual.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-3, "{found} {expected}");
        }
    }

    #[test]
    fn a_short_file_is_an_error() {
        let folder = tempfile::tempdir().unwrap();
        let file = SampleFile::open(&folder.path().join("s"), 2, 3, 2).unwrap();
        assert_eq!(file.size_bytes(), 2 * 2 * 3 * 2 * 2);
        assert!(
            file.layer(0)
                .unwrap_err()
                .to_string()
                .contains("cannot read")
        );
    }
}
