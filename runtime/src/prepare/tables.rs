//! What a preparation found out, in lines of text.

use std::fmt::Write;

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
