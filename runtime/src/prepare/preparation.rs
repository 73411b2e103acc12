//! A preparation on its way: stage after stage, each kept when it is done.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use pi_topology::Plan;

use super::PrepareError;
use super::activity::LayerActivity;
use super::checkpoint::{Checkpoint, Earlier};
use super::predictors::AheadKind;
use super::report::Report;
use super::samples::{PassageFeeder, SampleFile, StateTap};
use super::stage::Stage;
use super::subject::Subject;
use super::text::{CALIBRATION, PASSAGE_TOKENS, Passages, Text};
use crate::error::RuntimeError;
use crate::gguf::GgufFile;
use crate::session::ModelOptions;
use crate::sidecar::profile::LayerProfile;
use crate::sidecar::{ARCHITECTURE, Profile, Section, Sidecar, model_hash, sidecar_header};

/// Passages of the text by default.
const N_PASSAGES: usize = 40;
/// Fewest passages that anything can be learnt from.
pub const N_PASSAGES_MIN: usize = 8;
/// One of so many passages is kept back, to choose the thresholds' target by.
const VALIDATION_PART: usize = 4;
/// Bytes of one layer's states and activities that are worked on at once, at most.
const LAYER_BYTES_MAX: usize = 1 << 30;
/// Share of active neurons from which on skipping the others is worth nothing.
pub const DENSITY_MAX: f64 = 0.5;

/// What is to be prepared, and from what.
#[derive(Debug)]
pub struct PrepareOptions {
    /// The model, and its arithmetic.
    pub model: ModelOptions,
    /// The threads.
    pub plan: Plan,
    /// The sidecar to be.
    pub output: PathBuf,
    /// Names and contents of the texts; none: the built-in one.
    pub texts: Vec<(String, String)>,
    /// Passages of 512 tokens to learn from; none: as many as are worth it.
    pub n_passages: Option<usize>,
    /// Seed of all that is drawn.
    pub seed: u32,
    /// How predictors one layer ahead are fitted.
    pub ahead: AheadKind,
    /// How much higher than that of `exact` the perplexity may be, as a share.
    pub quality: f64,
    /// The stages to run.
    pub stages: Vec<Stage>,
}

/// Watches a preparation.
pub trait Observer: Send + Sync {
    /// A part of the work begins: what it is, and how many pieces it has.
    fn begin(&self, _what: &str, _total: usize) {}

    /// So many pieces are done.
    fn at(&self, _done: usize) {}

    /// The part has ended.
    fn end(&self) {}

    /// Something that the user may want to know.
    fn say(&self, _line: &str) {}
}

/// A preparation on its way.
pub struct Preparation {
    pub(super) subject: Subject,
    pub(super) options: PrepareOptions,
    pub(super) checkpoint: Checkpoint,
    /// What is learnt from, and what the target is chosen by.
    pub(super) passages: (Passages, Passages),
    pub(super) observer: Arc<dyn Observer>,
    pub(super) stop: Arc<AtomicBool>,
    /// The sidecar that is there, where only some stages run.
    pub(super) kept: Option<Sidecar>,
}

/// What a preparation gave.
#[derive(Debug)]
pub struct Prepared {
    /// The sidecar.
    pub path: PathBuf,
    /// Its bytes.
    pub size_bytes: u64,
    /// Whether the model's gates can be closed.
    pub is_relu: bool,
    /// Counts and norms, if they are in it.
    pub profile: Option<Profile>,
    /// Figures on held-out text, if the stage was run.
    pub report: Option<Report>,
}

impl Preparation {
    /// Opens model, text and what was done earlier.
    ///
    /// # Errors
    /// Any of them, or an output that is something else.
    pub fn open(
        options: PrepareOptions,
        observer: Arc<dyn Observer>,
        stop: Arc<AtomicBool>,
    ) -> Result<Self, RuntimeError> {
        refuse_output(&options.output)?;
        let subject = Subject::open(options.model.clone(), options.plan.clone())?;
        if options.stages == [Stage::Predictors] && !subject.is_relu() {
            return Err(PrepareError::NotForThisModel {
                stage: Stage::Predictors.name(),
                why: "this model's gates never close, so that there is nothing to predict: run `pi-runtime prepare thresholds`",
            }
            .into());
        }
        let text = calibration_text(&options, &subject)?;
        let n_ctx = PASSAGE_TOKENS.min(subject.hyper.n_ctx_max);
        let n = options
            .n_passages
            .unwrap_or_else(|| n_passages(&subject, n_ctx));
        let passages = text.passages(n_ctx, n, N_PASSAGES_MIN, subject.bos())?;
        let kept = match options.stages.len() == Stage::ALL.len() || !options.output.exists() {
            true => None,
            false => Some(Sidecar::open(
                &options.output,
                &subject.file,
                &subject.hyper,
            )?),
        };
        let key = key(&options, &subject, &text, passages.len());
        let (checkpoint, earlier) = Checkpoint::open(&options.output, &key)?;
        let folder = checkpoint.folder().display();
        match earlier {
            Earlier::None => {}
            Earlier::Same => observer.say(&format!("going on from what is done in {folder}")),
            Earlier::Other => observer.say(&format!(
                "what was done in {folder} was made from or with something else: starting anew"
            )),
        }
        Ok(Self {
            passages: split(&passages),
            subject,
            options,
            checkpoint,
            observer,
            stop,
            kept,
        })
    }

    /// Runs the stages and writes the sidecar.
    ///
    /// # Errors
    /// A stage, the file system, or `stop` was set; what is done so far stays.
    pub fn run(self) -> Result<Prepared, RuntimeError> {
        match self.run_stages() {
            Ok((sections, report)) => Ok(Prepared {
                report,
                ..self.write(&sections)?
            }),
            Err(error) => {
                if self.checkpoint.is_blank() {
                    self.clean_up();
                }
                Err(error)
            }
        }
    }

    fn run_stages(&self) -> Result<(Vec<Section>, Option<Report>), RuntimeError> {
        let mut sections = Vec::new();
        let mut report = None;
        for stage in Stage::ALL {
            let section = match self.options.stages.contains(&stage) {
                true if stage == Stage::Report => {
                    let figures = self.report(&sections)?;
                    report.insert(figures).section()?
                }
                true => self.stage(stage, &sections)?,
                false => self.kept(stage)?,
            };
            sections.push(section);
        }
        Ok((sections, report))
    }

    /// Removes the checkpoint; failing to is no reason to fail.
    fn clean_up(self) {
        if let Err(error) = self.checkpoint.remove() {
            self.observer.say(&format!("warning: {error}"));
        }
    }

    /// The section of a stage, which is run unless it was before.
    fn stage(&self, stage: Stage, before: &[Section]) -> Result<Section, RuntimeError> {
        if let Some(done) = self.checkpoint.section(stage.name()) {
            return Ok(done);
        }
        let section = match stage {
            Stage::Profile => self.profile()?,
            Stage::Predictors if self.is_worth_predicting(before)? => self.predictors()?,
            Stage::Thresholds if self.is_worth_predicting(before)? => self.sketch_thresholds()?,
            Stage::Thresholds if !self.subject.is_relu() => self.gate_thresholds()?,
            Stage::Head => self.head()?,
            _ => Section::new(),
        };
        self.checkpoint.keep(stage.name(), &section)?;
        Ok(section)
    }

    /// Whether there are neurons to skip, as far as a profile says so.
    fn is_worth_predicting(&self, before: &[Section]) -> Result<bool, RuntimeError> {
        if !self.subject.is_relu() {
            return Ok(false);
        }
        let Some(profile) = before.first().filter(|section| !section.is_empty()) else {
            return Ok(true);
        };
        Ok(self.read_profile(profile)?.density() <= DENSITY_MAX)
    }

    fn read_profile(&self, section: &Section) -> Result<Profile, RuntimeError> {
        let Subject { file, hyper, .. } = &self.subject;
        let path = self.checkpoint.folder().join("profile.sparse.gguf");
        section.write(sidecar_header(file, hyper)?, &path)?;
        let sidecar = Sidecar::open(&path, file, hyper)?;
        let profile = Profile::read(&sidecar, hyper.n_layer, hyper.n_ff)?;
        Ok(profile.ok_or_else(|| sidecar.missing("profile"))?)
    }

    /// What the sidecar that is there has of a stage.
    fn kept(&self, stage: Stage) -> Result<Section, RuntimeError> {
        match &self.kept {
            Some(sidecar) => Ok(Section::of(sidecar.file(), |name| stage.owns(name))?),
            None => Ok(Section::new()),
        }
    }

    fn write(self, sections: &[Section]) -> Result<Prepared, RuntimeError> {
        let mut all = Section::new();
        for section in sections {
            all.append(section)?;
        }
        let Subject { file, hyper, .. } = &self.subject;
        let output = &self.options.output;
        all.write(sidecar_header(file, hyper)?, output)?;
        let sidecar = Sidecar::open(output, file, hyper)?;
        let prepared = Prepared {
            path: output.clone(),
            size_bytes: sidecar.file().len_bytes() as u64,
            is_relu: self.subject.is_relu(),
            profile: Profile::read(&sidecar, hyper.n_layer, hyper.n_ff)?,
            report: None,
        };
        self.clean_up();
        Ok(prepared)
    }

    /// Fails when the preparation is to stop.
    pub(super) fn check_stop(&self) -> Result<(), RuntimeError> {
        match self.stop.load(Ordering::Acquire) {
            true => Err(RuntimeError::Interrupted),
            false => Ok(()),
        }
    }

    /// Hidden states of the passages that are learnt from; collected unless they are there.
    pub(super) fn states(&self) -> Result<SampleFile, RuntimeError> {
        let passages = &self.passages.0;
        let path = self.checkpoint.samples();
        let done = self.checkpoint.n_passages().min(passages.len());
        if done == passages.len() {
            return Ok(self.sample_file(&path, passages)?);
        }
        self.collect(passages, &path, done, self.checkpoint.noting())
    }

    fn sample_file(&self, path: &Path, passages: &Passages) -> Result<SampleFile, PrepareError> {
        let hyper = &self.subject.hyper;
        SampleFile::open(path, hyper.n_layer, passages.tokens().len(), hyper.n_embd)
    }

    /// Runs the model over passages from `first` on and writes the hidden states to `path`; `note` is told how many
    /// passages are safe.
    pub(super) fn collect(
        &self,
        passages: &Passages,
        path: &Path,
        first: usize,
        note: impl Fn(usize) -> Result<(), PrepareError> + Send + 'static,
    ) -> Result<SampleFile, RuntimeError> {
        let tap = Arc::new(StateTap::new(self.sample_file(path, passages)?));
        let model = self.subject.run_tapped(passages.n_ctx(), tap.clone())?;
        self.observer.begin("hidden states", passages.len());
        self.observer.at(first);
        let (observer, file) = (Arc::clone(&self.observer), Arc::clone(&tap));
        let done = move |n: usize| {
            observer.at(n);
            file.file().sync()?;
            note(n)
        };
        let stop = Arc::clone(&self.stop);
        let feeder = PassageFeeder::new(passages.clone(), first, tap, stop, Box::new(done));
        let run = model.engine.run(feeder)?;
        self.observer.end();
        run.outcome.map_err(|error| model.step_error(error))?;
        run.feeder.outcome?;
        self.check_stop()?;
        Ok(self.sample_file(path, passages)?)
    }

    /// What the neurons of `layer` do.
    pub(super) fn activity(&self, layer: usize) -> LayerActivity {
        let Subject { hyper, tensors, .. } = &self.subject;
        LayerActivity::new(
            self.subject.options.cpu,
            hyper.gate,
            &tensors.layers[layer],
            self.subject.plan.n_threads(),
        )
    }

    fn profile(&self) -> Result<Section, RuntimeError> {
        let states = self.states()?;
        let n_tokens = states.n_tokens();
        let layers = self.each_layer("profile", n_tokens, |layer| {
            let activity = self.activity(layer);
            Ok(LayerProfile {
                counts: activity.counts(&states.normed(layer, 0..n_tokens)?),
                down_norms: activity.down_norms().to_vec(),
            })
        })?;
        Ok(Profile { n_tokens, layers }.section()?)
    }
}

/// Every so-many-th passage apart, to choose the target by; of the others the last quarter lies over the whole text
/// too, as thresholds are fitted to it.
fn split(passages: &Passages) -> (Passages, Passages) {
    let part = VALIDATION_PART.min(passages.len());
    let (learnt, validation) = passages.split(part);
    (learnt.dealt(4), validation)
}

/// As many passages as are worth it, and as a layer's worth of memory holds.
fn n_passages(subject: &Subject, n_ctx: usize) -> usize {
    let hyper = &subject.hyper;
    let token_bytes = 2 * (hyper.n_ff + hyper.n_embd) * size_of::<f32>();
    let fit = LAYER_BYTES_MAX / (token_bytes * n_ctx);
    fit.clamp(N_PASSAGES_MIN, N_PASSAGES * PASSAGE_TOKENS / n_ctx.max(1))
}

fn calibration_text(options: &PrepareOptions, subject: &Subject) -> Result<Text, RuntimeError> {
    let tokenizer = &subject.tokenizer;
    if options.texts.is_empty() {
        return Ok(Text::new("the built-in text", &[CALIBRATION], tokenizer)?);
    }
    let names: Vec<&str> = options.texts.iter().map(|(name, _)| &**name).collect();
    let contents: Vec<&str> = options.texts.iter().map(|(_, text)| &**text).collect();
    Ok(Text::new(names.join(", "), &contents, tokenizer)?)
}

/// All that the parts of a preparation depend on.
fn key(options: &PrepareOptions, subject: &Subject, text: &Text, n_passages: usize) -> String {
    let stages: Vec<&str> = options.stages.iter().map(|stage| stage.name()).collect();
    // hidden states of a GPU are rounded in another way
    let gpus = match subject.plan.gpus.len() {
        0 => String::new(),
        n => format!("gpus = {n}\n"),
    };
    format!(
        "version = {}\nmodel = {}\ntext = {}\npassages = {n_passages}\nseed = {}\nahead = {}\nquality = {}\nactivations = {}\nkv = {}\nstages = {}\n{gpus}",
        env!("CARGO_PKG_VERSION"),
        model_hash(&subject.file),
        text.hash(),
        options.seed,
        options.ahead.name(),
        options.quality,
        subject.options.cpu.mode(),
        subject.options.kv_type,
        stages.join(" "),
    )
}

/// Only a sidecar is written over.
fn refuse_output(output: &Path) -> Result<(), RuntimeError> {
    let refused = |problem: &str| RuntimeError::Flag {
        flag: "-o",
        value: output.display().to_string(),
        problem: problem.into(),
    };
    if output.file_name().is_none() {
        return Err(refused("this names no file: give the sidecar's name"));
    }
    if !output.exists() {
        return Ok(());
    }
    let is_sidecar = output.is_file()
        && GgufFile::open(output).is_ok_and(|file| {
            file.metadata()
                .get_str("general.architecture")
                .ok()
                .flatten()
                == Some(ARCHITECTURE)
        });
    match is_sidecar {
        true => Ok(()),
        false => Err(refused(
            "this is there and is no sidecar: give another name, or remove it",
        )),
    }
}
