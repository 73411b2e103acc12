//! What a preparation found out, in lines of text.

use std::fmt::Write;

use pi_actors::trace::Scorer;

use super::report::{LayerReport, Report};
use crate::model::Sparsity;
use crate::sidecar::Profile;

/// A profile's layers, line by line: how many neurons are active, and how few do most of it.
pub fn profile_table(profile: &Profile) -> String {
    let mut table = format!(
        "{:>5} {:>8} {:>8} {:>18} {:>18} {:>10} {:>10}\n",
        "layer", "active", "silent", "50 % done by", "90 % done by", "norm mean", "norm max"
    );
    for (index, layer) in profile.layers.iter().enumerate() {
        let n = layer.down_norms.len().max(1) as f32;
        let mean = layer.down_norms.iter().sum::<f32>() / n;
        let max = layer.down_norms.iter().copied().fold(0.0, f32::max);
        // a text never fails to be written to
        let _ = writeln!(
            table,
            "{index:>5} {:>6.1} % {:>8} {:>16.1} % {:>16.1} % {mean:>10.3} {max:>10.3}",
            layer.density(profile.n_tokens) * 100.0,
            layer.n_silent(),
            layer.neurons_with(0.5) * 100.0,
            layer.neurons_with(0.9) * 100.0,
        );
    }
    let _ = write!(
        table,
        "{:.1} % of all neurons are active in the mean, counted over {} tokens",
        profile.density() * 100.0,
        profile.n_tokens
    );
    table
}

/// A report's layers and modes, line by line.
pub fn report_table(report: &Report) -> String {
    let mut table = String::new();
    // a text never fails to be written to
    if !report.layers.is_empty() {
        let _ = writeln!(
            table,
            "{:>5} {:>9} {:>9} {:>9} {:>9} {:>9} {:>10} {:>9} {:>9} {:>12} {:>11}",
            "layer",
            "sketch",
            "mass kept",
            "found",
            "precision",
            "named",
            "candidates",
            "computed",
            "active",
            "ahead: kept",
            "candidates"
        );
        for (index, layer) in report.layers.iter().enumerate() {
            let _ = writeln!(
                table,
                "{index:>5} {:>9} {}",
                layer.sketch,
                layer_cells(layer)
            );
        }
        let mean = |figure: fn(&LayerReport) -> f64| report.mean(figure) * 100.0;
        let _ = writeln!(
            table,
            "in the mean {:.2} % of the mass kept with {:.1} % candidates, {:.1} % computed; {:.1} % are active; {} tokens of held-out text",
            mean(|layer| 1.0 - layer.in_layer.lost.mean),
            mean(|layer| layer.in_layer.candidates),
            mean(|layer| layer.in_layer.computed),
            mean(|layer| layer.in_layer.density),
            report.n_tokens,
        );
    }
    let _ = write!(table, "{}", mode_lines(report));
    table
}

fn layer_cells(layer: &LayerReport) -> String {
    let found = &layer.in_layer;
    let ahead = layer.ahead.map_or_else(
        || format!("{:>12} {:>11}", "", ""),
        |ahead| {
            let kept = (1.0 - ahead.lost.mean) * 100.0;
            format!("{kept:>10.2} % {:>9.1} %", ahead.candidates * 100.0)
        },
    );
    // by signs, before the next bit was looked at
    let named = match found.named > 0.0 {
        true => format!("{:>7.1} %", found.named * 100.0),
        false => format!("{:>9}", ""),
    };
    format!(
        "{:>7.2} % {:>7.1} % {:>7.1} % {named} {:>8.1} % {:>7.1} % {:>7.1} % {ahead}",
        (1.0 - found.lost.mean) * 100.0,
        found.found * 100.0,
        found.precision * 100.0,
        found.candidates * 100.0,
        found.computed * 100.0,
        found.density * 100.0,
    )
}

fn mode_lines(report: &Report) -> String {
    let mut lines = format!(
        "{:<10} {:>11} {:>9} {:>10} {:>9} {:>10}\n",
        "mode", "perplexity", "", "agreement", "tok/s", "MB/token"
    );
    let reference = report
        .modes
        .iter()
        .find(|mode| mode.mode == Sparsity::Exact);
    let reference = reference.or(report.modes.first());
    for mode in &report.modes {
        let rise = reference.map_or(0.0, |exact| mode.perplexity / exact.perplexity - 1.0);
        let _ = writeln!(
            lines,
            "{:<10} {:>11.4} {:>+7.2} % {:>8.2} % {:>9.1} {:>10.1}",
            mode.mode.name(),
            mode.perplexity,
            rise * 100.0,
            mode.agreement * 100.0,
            mode.speed.tok_s,
            mode.speed.bytes_per_token / 1e6,
        );
    }
    if let Some(head) = &report.head {
        let _ = writeln!(
            lines,
            "sparse head: likeliest token equal at {:.2} % of {} positions, drawn token at {:.2} %, total variation {:.4}; {:.0} candidates, {:.1} of {:.1} MB",
            head.greedy * 100.0,
            head.n_positions,
            head.sampled * 100.0,
            head.total_variation,
            head.candidates,
            head.sparse_bytes / 1e6,
            head.full_bytes / 1e6,
        );
    }
    lines.push_str(&cost_lines(report));
    let _ = write!(
        lines,
        "agreement: likeliest tokens equal at {} positions; speeds and times are this machine's, now",
        report.n_compared
    );
    lines
}

/// What each predictor takes of a token.
fn cost_lines(report: &Report) -> String {
    let has_any = !report.layers.is_empty() || report.head.is_some();
    if report.costs.is_empty() {
        return match has_any {
            true => "predictors' shares of a token are told where the host is the device\n".into(),
            false => String::new(),
        };
    }
    let mut lines = format!(
        "{:<14} {:>9} {:>9} {:>9} {:>9}  of a token with\n",
        "predictor", "MB/token", "of bytes", "ms/token", "of time"
    );
    for token in &report.costs {
        let mut line = |name: &str, bytes: f64, ns: f64| {
            let _ = writeln!(
                lines,
                "{name:<14} {:>9.3} {:>7.2} % {:>9.4} {:>7.2} %  {}",
                bytes / 1e6,
                bytes / token.bytes * 100.0,
                ns / 1e6,
                ns / token.ns * 100.0,
                token.flags,
            );
        };
        for cost in &token.scorers {
            line(scorer_name(cost.scorer), cost.bytes, cost.ns);
        }
        if token.scorers.len() > 1 {
            let (bytes, ns) = token.sum();
            line("in the layer", bytes, ns);
        }
    }
    lines
}

fn scorer_name(scorer: Scorer) -> &'static str {
    match scorer {
        Scorer::Signs => "signs",
        Scorer::SecondBits => "second bits",
        Scorer::LowRank => "low rank",
        Scorer::Ahead => "layer ahead",
        Scorer::Head => "head's sketch",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sidecar::profile::LayerProfile;

    #[test]
    fn a_line_for_each_layer() {
        let layer = LayerProfile {
            counts: vec![9, 1, 0, 0],
            down_norms: vec![1.0, 2.0, 3.0, 2.0],
        };
        let profile = Profile {
            n_tokens: 10,
            layers: vec![layer.clone(), layer],
        };
        let table = profile_table(&profile);
        let lines: Vec<&str> = table.lines().collect();
        assert_eq!(lines.len(), 4);
        let cells: Vec<&str> = lines[2].split_whitespace().collect();
        assert_eq!(
            cells,
            [
                "1", "25.0", "%", "2", "25.0", "%", "25.0", "%", "2.000", "3.000"
            ]
        );
        assert!(lines[3].starts_with("25.0 % of all neurons"));
    }
}
