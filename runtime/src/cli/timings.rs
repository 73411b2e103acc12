//! The line of timings after an answer, and its JSON form.

use std::fmt;
use std::time::{Duration, Instant};

use pi_actors::counters::RunTotals;
use pi_actors::replan::Replans;
use serde_json::{Value, json};

use crate::session::Answer;

/// What an answer took, and what it read.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Timings {
    /// From the program's start to a model that is ready.
    pub load: Duration,
    /// From the program's start to the first token's logits; none when nothing was computed.
    pub first_token: Option<Duration>,
    /// Tokens of the prompt that were computed.
    pub n_prompt: usize,
    /// Time that these took.
    pub prompt: Duration,
    /// Tokens computed one by one after the prompt.
    pub n_decoded: usize,
    /// Time that these took.
    pub decode: Duration,
    /// Tokens computed again because the context was full; their time counts as decoding.
    pub n_refed: usize,
    /// Share of FFN neurons computed with an open gate while decoding; none when nothing was decoded.
    pub active_share: Option<f64>,
    /// Share of FFN neurons whose gate was computed while decoding; none when nothing was decoded.
    pub candidate_share: Option<f64>,
    /// Weight bytes read for a decoded token; none when nothing was decoded.
    pub bytes_per_token: Option<u64>,
    /// Bytes of cached keys and values read for a decoded token; none when nothing was decoded.
    pub kv_bytes_per_token: Option<u64>,
    /// Neurons that changed between GPU and host.
    pub replans: Replans,
    /// Every part that changes the output, in words.
    pub lossy: Vec<String>,
}

impl Timings {
    /// The times and counts of `answer`, of a program that began at `start` and had its model after `load`.
    pub fn of(answer: &Answer, start: Instant, load: Duration, lossy: Vec<String>) -> Self {
        let finished = &answer.finished;
        let RunTotals {
            decode,
            decode_tokens,
            replans,
            ..
        } = answer.totals;
        let per_token = |bytes: u64| bytes.checked_div(decode_tokens as u64);
        Self {
            load,
            first_token: finished.first_logits.map(|at| at.duration_since(start)),
            n_prompt: finished.n_prompt,
            prompt: finished.prompt,
            n_decoded: finished.n_decoded,
            decode: finished.decode,
            n_refed: finished.n_refed,
            active_share: decode.active_share(),
            candidate_share: decode.candidate_share(),
            bytes_per_token: per_token(decode.weight_bytes),
            kv_bytes_per_token: per_token(decode.kv_bytes),
            replans,
            lossy,
        }
    }

    /// Adds another answer of the same session; load, first token and lossy parts stay.
    pub fn add(&mut self, other: &Timings) {
        let (n_self, n_other) = (self.n_decoded as f64, other.n_decoded as f64);
        let mean = |a: Option<f64>, b: Option<f64>| match (a, b) {
            (Some(a), Some(b)) => Some((a * n_self + b * n_other) / (n_self + n_other)),
            (a, b) => a.or(b),
        };
        self.active_share = mean(self.active_share, other.active_share);
        self.candidate_share = mean(self.candidate_share, other.candidate_share);
        let mean_bytes = |a: Option<u64>, b: Option<u64>| {
            let mean = mean(a.map(|a| a as f64), b.map(|b| b as f64));
            mean.map(|bytes| bytes.round() as u64)
        };
        self.bytes_per_token = mean_bytes(self.bytes_per_token, other.bytes_per_token);
        self.kv_bytes_per_token = mean_bytes(self.kv_bytes_per_token, other.kv_bytes_per_token);
        self.n_prompt += other.n_prompt;
        self.prompt += other.prompt;
        self.n_decoded += other.n_decoded;
        self.decode += other.decode;
        self.n_refed += other.n_refed;
        self.replans += other.replans;
    }

    /// `timings` of `--json`, with llama.cpp's server's names where it has them.
    pub fn to_json(&self) -> Value {
        json!({
            "load_ms": ms(self.load),
            "first_token_ms": self.first_token.map(ms),
            "prompt_n": self.n_prompt,
            "prompt_ms": ms(self.prompt),
            "prompt_per_second": per_second(self.n_prompt, self.prompt),
            "predicted_n": self.n_decoded,
            "predicted_ms": ms(self.decode),
            "predicted_per_second": per_second(self.n_decoded, self.decode),
            "refed_n": self.n_refed,
            "active_share": self.active_share,
            "candidate_share": self.candidate_share,
            "bytes_per_token": self.bytes_per_token,
            "kv_bytes_per_token": self.kv_bytes_per_token,
            "replans": replans_json(&self.replans),
            "lossy": self.lossy,
        })
    }
}

impl fmt::Display for Timings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "load {:.0} ms", ms(self.load))?;
        if let Some(first_token) = self.first_token {
            write!(f, ", first token after {:.0} ms", ms(first_token))?;
        }
        let speed = |n: usize, time: Duration| match per_second(n, time) {
            Some(speed) => format!("{n} tokens, {speed:.1} tok/s"),
            None => format!("{n} tokens"),
        };
        write!(f, " | prompt {}", speed(self.n_prompt, self.prompt))?;
        write!(f, " | decode {}", speed(self.n_decoded, self.decode))?;
        if self.n_refed > 0 {
            write!(f, " with {} fed again", self.n_refed)?;
        }
        if let Some(share) = self.candidate_share.filter(|share| *share < 1.0) {
            write!(f, " | candidates {:.1} %", share * 100.0)?;
        }
        if let Some(share) = self.active_share {
            write!(f, " | active {:.1} %", share * 100.0)?;
        }
        if let Some(bytes) = self.bytes_per_token {
            write!(f, " | {:.1} MB/token", bytes as f64 / 1e6)?;
        }
        if let Some(bytes) = self.kv_bytes_per_token {
            write!(f, " and {:.1} MB of cache", bytes as f64 / 1e6)?;
        }
        if self.replans.times > 0 {
            write!(f, " | {}", self.replans)?;
        }
        let lossy = if self.lossy.is_empty() {
            "none".into()
        } else {
            self.lossy.join(", ")
        };
        write!(f, " | lossy: {lossy}")
    }
}

/// What moved; null where it was never asked what should.
fn replans_json(replans: &Replans) -> Value {
    if replans.times == 0 {
        return Value::Null;
    }
    json!({
        "times": replans.times,
        "moved": replans.moved,
        "mib": replans.bytes as f64 / f64::from(1 << 20),
        "ms": ms(Duration::from_nanos(replans.ns)),
        "hot_share": replans.hot_share(),
    })
}

fn ms(time: Duration) -> f64 {
    (time.as_secs_f64() * 1e6).round() / 1e3
}

fn per_second(n: usize, time: Duration) -> Option<f64> {
    (n > 0 && !time.is_zero()).then(|| n as f64 / time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn timings() -> Timings {
        Timings {
            load: Duration::from_millis(210),
            first_token: Some(Duration::from_millis(240)),
            n_prompt: 5,
            prompt: Duration::from_millis(20),
            n_decoded: 10,
            decode: Duration::from_millis(100),
            n_refed: 0,
            active_share: Some(0.1),
            candidate_share: Some(1.0),
            bytes_per_token: Some(60_000_000),
            kv_bytes_per_token: Some(1_200_000),
            replans: Replans::default(),
            lossy: vec![],
        }
    }

    #[test]
    fn line_names_every_figure() {
        assert_eq!(
            timings().to_string(),
            "load 210 ms, first token after 240 ms | prompt 5 tokens, 250.0 tok/s | decode 10 tokens, 100.0 tok/s \
             | active 10.0 % | 60.0 MB/token and 1.2 MB of cache | lossy: none"
        );
        let shifted = Timings {
            n_refed: 7,
            ..timings()
        };
        assert!(
            shifted
                .to_string()
                .contains("100.0 tok/s with 7 fed again |")
        );
        let predicted = Timings {
            candidate_share: Some(0.2),
            ..timings()
        };
        let line = predicted.to_string();
        assert!(
            line.contains("| candidates 20.0 % | active 10.0 % |"),
            "{line}"
        );
        let moved = Timings {
            replans: Replans {
                times: 2,
                moved: 30,
                bytes: 3 << 19,
                ns: 1_250_000,
                fired: 1000,
                fired_hot: 820,
            },
            ..timings()
        };
        let line = moved.to_string();
        assert!(
            line.contains(
                "| re-planned 2 times: 30 neurons, 1.5 MiB, 1.2 ms, 82.0 % of firings hot | lossy"
            ),
            "{line}"
        );
        let nothing = Timings {
            lossy: vec!["down re-quantised Q4_0 -> Q5_0".into()],
            ..Timings::default()
        };
        assert_eq!(
            nothing.to_string(),
            "load 0 ms | prompt 0 tokens | decode 0 tokens | lossy: down re-quantised Q4_0 -> Q5_0"
        );
    }

    #[test]
    fn turns_add_up_weighted_by_tokens() {
        let mut sum = timings();
        sum.add(&Timings {
            n_decoded: 30,
            active_share: Some(0.2),
            ..timings()
        });
        assert_eq!((sum.n_prompt, sum.n_decoded), (10, 40));
        assert!((sum.active_share.unwrap() - 0.175).abs() < 1e-12);
        assert_eq!(sum.bytes_per_token, Some(60_000_000));
    }

    #[test]
    fn json_has_null_where_nothing_was_measured() {
        let value = Timings::default().to_json();
        assert!(value["replans"].is_null());
        assert!(value["predicted_per_second"].is_null() && value["active_share"].is_null());
        assert_eq!(timings().to_json()["predicted_per_second"], 100.0);
    }
}
