//! What two sockets would do, from what one of them was measured to do: a prediction, and called one.

use std::fmt;

use crate::plan::{ModeReport, Part};

/// Messages on the way through a layer, one after the other: three forks and three joins.
const MESSAGES_A_LAYER: f64 = 6.0;

/// Tokens per second of two sockets like the one of this machine, by the plan of one.
///
/// Of the planned parts, what teams compute is divided by two where both sockets do it, and takes longer where it is read
/// across; what node 0 does alone stays; and each layer has six messages more, and two sums to join.
#[derive(Debug, Clone, PartialEq)]
pub struct Prediction {
    /// Speed at which memory of the other socket is read, over that of the own: assumed.
    pub remote_speed: f64,
    /// What a message takes between two cores here, ns.
    pub hop_ns: u64,
    /// What joining the sums of both takes longer than taking one, in each layer, ns.
    pub join_ns: f64,
    /// One socket, as it is planned.
    pub one_socket: f64,
    /// Each policy on two.
    pub policies: [(&'static str, f64); 3],
}

impl Prediction {
    /// From the plan of one team.
    pub fn of(
        mode: &ModeReport,
        n_layer: usize,
        hop_ns: u64,
        join_ns: f64,
        remote_speed: f64,
    ) -> Self {
        let ms = |part: Part| {
            let found = mode.parts.iter().find(|forecast| forecast.part == part);
            found.map_or(0.0, |forecast| forecast.ms)
        };
        let divided_ms = ms(Part::Attention) + ms(Part::Head);
        let neurons_ms = ms(Part::Gates) + ms(Part::Neurons);
        let alone_ms = ms(Part::HandOffs) + ms(Part::Other);
        let layer_ns = MESSAGES_A_LAYER * hop_ns as f64 + join_ns;
        let messages_ms = n_layer as f64 * layer_ns / 1e6;
        let speed = |divided_ms: f64, neurons_ms: f64| {
            1e3 / (divided_ms + neurons_ms + alone_ms + messages_ms)
        };
        // half of what a team reads is across, where pages go round both sockets
        let across = (1.0 + 1.0 / remote_speed) / 2.0;
        Self {
            remote_speed,
            hop_ns,
            join_ns,
            one_socket: 1e3 / (divided_ms + neurons_ms + alone_ms),
            policies: [
                (
                    "shard, replicate",
                    speed(divided_ms / 2.0, neurons_ms / 2.0),
                ),
                (
                    "interleave",
                    speed(divided_ms / 2.0 * across, neurons_ms / 2.0 * across),
                ),
                ("single:0", speed(divided_ms / 2.0, neurons_ms)),
            ],
        }
    }
}

impl fmt::Display for Prediction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "PREDICTED, not measured: two sockets, each with the threads and memory of this machine. Memory of the other\n\
             socket is read at {:.2} of the speed of the own (assumed: `topology measure` on such a machine says), and a\n\
             message between them takes {:.2} µs, joining two sums {:.2} (measured between two cores here; between sockets it\n\
             is more)",
            self.remote_speed,
            self.hop_ns as f64 / 1e3,
            self.join_ns / 1e3
        )?;
        let one = ("one socket", self.one_socket);
        for (name, speed) in [one].iter().chain(&self.policies) {
            let of_one = speed / self.one_socket;
            writeln!(f, "  {name:<18}{speed:>9.2} tok/s {of_one:>6.2} ×")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::PartForecast;

    fn mode(parts: [f64; 6]) -> ModeReport {
        let parts = Part::ALL.into_iter().zip(parts);
        ModeReport {
            mode: "exact",
            lossy: vec![],
            notes: vec![],
            parts: parts
                .map(|(part, ms)| PartForecast { part, ms, bytes: 0 })
                .collect(),
            bandwidth_bytes_per_s: 1e10,
            memory: vec![],
            groups: vec![],
            loaded: None,
            layer_costs: vec![],
            rehearsed: (1, 1),
            rehearsed_active: 0.0,
            decision: None,
            gpu: None,
        }
    }

    #[test]
    fn policies_differ_in_what_is_divided_and_what_is_read_across() {
        // attention 2, gates 1, neurons 3, head 2, hand-offs 1, other 1: 10 ms
        let mode = mode([2.0, 1.0, 3.0, 2.0, 1.0, 1.0]);
        let found = Prediction::of(&mode, 10, 0, 0.0, 0.5);
        assert_eq!(found.one_socket, 100.0);
        let ms = found.policies.map(|(_, speed)| 1e3 / speed);
        let near = |ms: f64, expected: f64| (ms - expected).abs() < 1e-9;
        assert!(near(ms[0], 2.0 + 2.0 + 2.0), "{ms:?}");
        assert!(near(ms[1], 3.0 + 3.0 + 2.0), "{ms:?}");
        assert!(near(ms[2], 2.0 + 4.0 + 2.0), "{ms:?}");
        // messages and joins cost the same whatever the policy
        let slow = Prediction::of(&mode, 10, 9_000, 6_000.0, 0.5);
        let slow = slow.policies.map(|(_, speed)| 1e3 / speed);
        assert!(ms.iter().zip(slow).all(|(ms, slow)| near(slow - ms, 0.6)));
        // memory that is as near as the own makes interleaving free
        let flat = Prediction::of(&mode, 10, 0, 0.0, 1.0);
        assert_eq!(flat.policies[0].1, flat.policies[1].1);
        assert!(flat.to_string().starts_with("PREDICTED, not measured"));
    }
}
