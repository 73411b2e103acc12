//! What is said about a machine: a line each, with a state and a cure.

use serde::Serialize;

use super::facts::Facts;
use super::{gpu, memory, processor};

/// How good a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum State {
    /// As it should be.
    Ok,
    /// Worth knowing; it may cost some speed.
    Note,
    /// It costs much speed, or the program cannot run.
    Problem,
}

/// One thing that was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it is about.
    pub subject: &'static str,
    /// How good it is.
    pub state: State,
    /// What was found, and what follows.
    pub text: String,
    /// The command that mends it; every problem has one.
    pub cure: Option<String>,
    /// Whether the program cannot run because of it.
    pub prevents_running: bool,
}

impl Finding {
    /// All is well.
    pub(super) fn ok(subject: &'static str, text: impl Into<String>) -> Self {
        Self {
            subject,
            state: State::Ok,
            text: text.into(),
            cure: None,
            prevents_running: false,
        }
    }

    /// Worth knowing.
    pub(super) fn note(subject: &'static str, text: impl Into<String>) -> Self {
        Self {
            state: State::Note,
            ..Self::ok(subject, text)
        }
    }

    /// To be mended.
    pub(super) fn problem(
        subject: &'static str,
        text: impl Into<String>,
        cure: impl Into<String>,
    ) -> Self {
        Self {
            state: State::Problem,
            cure: Some(cure.into()),
            ..Self::ok(subject, text)
        }
    }

    /// With the command that mends it.
    pub(super) fn cure(mut self, cure: impl Into<String>) -> Self {
        self.cure = Some(cure.into());
        self
    }

    /// The program cannot run.
    pub(super) fn preventing(mut self) -> Self {
        self.prevents_running = true;
        self
    }
}

/// Everything that can be said of a machine, always in the same order.
pub fn findings(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![processor::system(&facts.system)];
    findings.push(processor::instruction_set(facts));
    findings.extend(processor::cores(facts));
    findings.push(processor::processor_time(facts));
    findings.push(processor::load(&facts.system));
    findings.push(processor::frequency(&facts.system));
    findings.extend(processor::pinning(facts));
    findings.extend(processor::numa_memory(facts));
    findings.push(memory::memory(&facts.system));
    findings.push(memory::model(facts));
    findings.push(memory::address_space(facts));
    findings.extend(memory::promised(facts));
    findings.push(memory::huge_pages(&facts.system));
    findings.extend(memory::reserved_huge_pages(&facts.system));
    findings.push(memory::locked(&facts.system));
    findings.push(gpu::nvidia(&facts.system));
    findings.extend(memory::bandwidth(facts));
    findings
}

/// A number of bytes for people.
pub(super) fn size(bytes: u64) -> String {
    let (unit, divisor) = match bytes {
        0..=0xf_ffff => ("KiB", 10),
        0x10_0000..=0x3fff_ffff => ("MiB", 20),
        _ => ("GiB", 30),
    };
    format!("{:.1} {unit}", bytes as f64 / (1u64 << divisor) as f64)
}
