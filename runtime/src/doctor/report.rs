//! Findings as text and as JSON.

use serde::Serialize;

use super::findings::{Finding, State};

/// Columns of the state and of the subject.
const STATE_WIDTH: usize = 8;
const SUBJECT_WIDTH: usize = 17;

#[derive(Serialize)]
struct Report<'a> {
    version: &'static str,
    can_run: bool,
    findings: &'a [Finding],
}

/// Whether nothing keeps the program from running.
pub(super) fn can_run(findings: &[Finding]) -> bool {
    !findings.iter().any(|finding| finding.prevents_running)
}

/// A line for each finding, one below it for its cure, and a sum at the end.
pub fn text(findings: &[Finding]) -> String {
    let mut text = String::new();
    for finding in findings {
        let state = match finding.state {
            State::Ok => "ok",
            State::Note => "note",
            State::Problem => "problem",
        };
        let subject = finding.subject;
        text += &format!(
            "{state:STATE_WIDTH$}{subject:SUBJECT_WIDTH$}{}\n",
            finding.text
        );
        if let Some(cure) = &finding.cure {
            text += &format!("{:1$}-> {cure}\n", "", STATE_WIDTH + SUBJECT_WIDTH);
        }
    }
    let count = |state: State| findings.iter().filter(|f| f.state == state).count();
    let verdict = match can_run(findings) {
        true => "can run here",
        false => "cannot run here",
    };
    text += &format!(
        "\npi-runtime {} {verdict}: {} ok, {} to note, {} to mend\n",
        env!("CARGO_PKG_VERSION"),
        count(State::Ok),
        count(State::Note),
        count(State::Problem)
    );
    text
}

/// One object: version, whether the program can run, and the findings.
///
/// # Errors
/// As [`serde_json::to_string_pretty`].
pub fn json(findings: &[Finding]) -> serde_json::Result<String> {
    serde_json::to_string_pretty(&Report {
        version: env!("CARGO_PKG_VERSION"),
        can_run: can_run(findings),
        findings,
    })
}
