//! What passes between host and a GPU, and the GPU's own speed, as a plan counts them: figures of the machine's profile, or assumed
//! ones.

use pi_topology::GpuSync;
use serde_json::{Value, json};

use super::gpu::PlannedGpu;
use crate::machine_profile::{GpuLink, MachineProfile};

/// Bytes per second from pinned memory to a GPU, where they are not measured: what 16 lanes of PCIe 4.0 give.
const ASSUMED_BYTES_PER_S: f64 = 25e9;

/// A flag from the host to a GPU and one back, where they are not measured, seconds.
const ASSUMED_FLAGS_S: f64 = 5e-6;

/// What a layer's hand-off takes with events in place of flags, which nothing measures, seconds: a launch and the wait for
/// it.
const ASSUMED_EVENTS_S: f64 = 35e-6;

/// Bytes of its own memory that a GPU reads in a second, where that is not measured: about what the largest consumer cards have.
const ASSUMED_MEMORY_BYTES_PER_S: f64 = 1e12;

/// What a kernel takes beside the time for its bytes, where it is not measured, seconds.
const ASSUMED_LAUNCH_S: f64 = 4e-6;

/// A figure, and where it is from.
#[derive(Debug, Clone, PartialEq)]
pub struct Figure {
    /// In the unit that its owner says.
    pub value: f64,
    /// When `topology measure` found it, UTC; none where it is assumed.
    pub measured: Option<String>,
}

impl Figure {
    fn assumed(value: f64) -> Self {
        Self {
            value,
            measured: None,
        }
    }

    /// Where it is from, in words.
    pub fn source(&self) -> String {
        match &self.measured {
            Some(measured) => format!("measured on {measured}"),
            None => "assumed".to_owned(),
        }
    }

    /// The figure times `scale`.
    pub(super) fn json(&self, scale: f64) -> Value {
        json!({"value": self.value * scale, "measured": self.measured})
    }
}

/// What passes between the host and a GPU.
#[derive(Debug, Clone, PartialEq)]
pub struct LinkFigures {
    /// From the host's pinned memory to the GPU's, bytes per second.
    pub to_device_bytes_per_s: Figure,
    /// A layer's hand-off: the hidden state to the host and a sum back, seconds.
    pub hand_off_s: Figure,
    /// The GPU's own memory, bytes per second.
    pub memory_bytes_per_s: Figure,
    /// What each of its kernels takes beside the time for its bytes, seconds.
    pub launch_s: Figure,
}

impl LinkFigures {
    /// Each GPU with its figures.
    pub(super) fn of_all(
        gpus: &[PlannedGpu],
        profile: Option<&MachineProfile>,
    ) -> Vec<(PlannedGpu, Self)> {
        let gpus = gpus.iter();
        gpus.map(|gpu| (gpu.clone(), Self::of(gpu, profile)))
            .collect()
    }

    /// Of `gpu`, by what was measured of the GPU with its number and name; each figure that was not is assumed.
    pub fn of(gpu: &PlannedGpu, profile: Option<&MachineProfile>) -> Self {
        let known = profile.and_then(|profile| {
            let mut links = profile.gpus.iter();
            // the profile's machine is one without its GPUs, which may be others by now
            let link = links.find(|link| link.ordinal == gpu.ordinal && link.name == gpu.name)?;
            Some((link, &profile.measured))
        });
        let measured = |value: f64, on: &String| Figure {
            value,
            measured: Some(on.clone()),
        };
        let copies = known.map(|(link, on)| measured(link.to_device_bytes_per_s, on));
        let flags = known.and_then(|(link, on)| {
            let time = link.flag_round_trip?;
            Some(measured(time.median_ns as f64 / 1e9, on))
        });
        let own = |value: fn(&GpuLink) -> Option<f64>, assumed: f64| {
            let figure = known.and_then(|(link, on)| Some(measured(value(link)?, on)));
            figure.unwrap_or_else(|| Figure::assumed(assumed))
        };
        Self {
            memory_bytes_per_s: own(|link| link.memory_bytes_per_s, ASSUMED_MEMORY_BYTES_PER_S),
            launch_s: own(|link| link.launch_s, ASSUMED_LAUNCH_S),
            to_device_bytes_per_s: copies.unwrap_or_else(|| Figure::assumed(ASSUMED_BYTES_PER_S)),
            hand_off_s: match gpu.sync {
                GpuSync::Flags => flags.unwrap_or_else(|| Figure::assumed(ASSUMED_FLAGS_S)),
                GpuSync::Events => Figure::assumed(ASSUMED_EVENTS_S),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::gpu::tests::gpu;
    use super::*;
    use crate::machine_profile::Nanoseconds;
    use crate::machine_profile::tests::profile;

    fn with_link(flag_round_trip: Option<Nanoseconds>) -> MachineProfile {
        let link = |ordinal, to_device_bytes_per_s| GpuLink {
            ordinal,
            name: "Some GPU".to_owned(),
            to_device_bytes_per_s,
            to_host_bytes_per_s: 5e10,
            flag_round_trip,
            memory_bytes_per_s: flag_round_trip.map(|_| 3e12),
            launch_s: flag_round_trip.map(|_| 3e-6),
        };
        MachineProfile {
            gpus: vec![link(0, 1e10), link(1, 5.5e10)],
            ..profile(1e11)
        }
    }

    const FLAG: Option<Nanoseconds> = Some(Nanoseconds {
        median_ns: 6_200,
        p99_ns: 9_000,
    });

    #[test]
    fn what_was_measured_of_the_gpu_counts() {
        let gpu = PlannedGpu {
            ordinal: 1,
            ..gpu(0)
        };
        let link = LinkFigures::of(&gpu, Some(&with_link(FLAG)));
        assert_eq!(link.to_device_bytes_per_s.value, 5.5e10);
        assert_eq!(link.hand_off_s.value, 6.2e-6);
        assert_eq!(link.memory_bytes_per_s.value, 3e12);
        assert_eq!(link.launch_s.value, 3e-6);
        for figure in [
            &link.to_device_bytes_per_s,
            &link.hand_off_s,
            &link.memory_bytes_per_s,
            &link.launch_s,
        ] {
            assert_eq!(figure.source(), "measured on 2026-01-02T03:04:05Z");
        }
    }

    #[test]
    fn what_was_not_measured_is_assumed_figure_by_figure() {
        let assumed = LinkFigures {
            to_device_bytes_per_s: Figure::assumed(25e9),
            hand_off_s: Figure::assumed(5e-6),
            memory_bytes_per_s: Figure::assumed(1e12),
            launch_s: Figure::assumed(4e-6),
        };
        assert_eq!(LinkFigures::of(&gpu(0), None), assumed);
        assert_eq!(LinkFigures::of(&gpu(0), Some(&profile(1e11))), assumed);
        assert_eq!(assumed.hand_off_s.source(), "assumed");
        // a flag was lost, or flags are not what is used
        let events = PlannedGpu {
            sync: GpuSync::Events,
            ..gpu(0)
        };
        for (gpu, flag, hand_off_s) in [(gpu(0), None, 5e-6), (events, FLAG, 35e-6)] {
            let link = LinkFigures::of(&gpu, Some(&with_link(flag)));
            assert_eq!(link.to_device_bytes_per_s.value, 1e10);
            assert!(link.to_device_bytes_per_s.measured.is_some());
            assert_eq!(link.hand_off_s, Figure::assumed(hand_off_s));
        }
        // another GPU in its place
        let other = PlannedGpu {
            name: "Another GPU".to_owned(),
            ..gpu(0)
        };
        assert_eq!(LinkFigures::of(&other, Some(&with_link(FLAG))), assumed);
    }
}
