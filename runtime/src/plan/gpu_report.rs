//! What a plan says of GPUs, as text and as JSON.

use std::fmt::Write;
use std::ops::Range;

use pi_topology::placement::Part;
use serde_json::{Value, json};

use super::gpu::{GpuForecast, PlannedGpu, PromptForecast};
use super::link::LinkFigures;
use super::report::Report;

impl Report {
    pub(super) fn write_gpus(&self, text: &mut String) -> std::fmt::Result {
        for (gpu, link) in &self.gpus {
            writeln!(
                text,
                "GPU {}    {}, {:.1} GiB may be used, reads {:.0} GB/s ({}), a kernel takes {:.2} µs beside ({})",
                gpu.ordinal,
                gpu.name,
                gpu.room.budget as f64 / f64::from(1 << 30),
                link.memory_bytes_per_s.value / 1e9,
                link.memory_bytes_per_s.source(),
                link.launch_s.value * 1e6,
                link.launch_s.source(),
            )?;
            let [copies, hand_off] = [&link.to_device_bytes_per_s, &link.hand_off_s];
            writeln!(
                text,
                "         {:.1} GB/s from the host ({}), a layer's hand-off {:.2} µs ({})",
                copies.value / 1e9,
                copies.source(),
                hand_off.value * 1e6,
                hand_off.source(),
            )?;
        }
        if !self.gpus.is_empty() {
            writeln!(
                text,
                "         tables are of the host alone; lines \"with GPU\" are forecast from bytes over speeds, and kernels"
            )?;
        }
        Ok(())
    }

    pub(super) fn write_gpu(
        &self,
        text: &mut String,
        name: &str,
        gpu: &GpuForecast,
    ) -> std::fmt::Result {
        writeln!(
            text,
            "{name}: with GPU {:.3} ms a token, {:.1} tokens/s: {:.0} % of neurons hot, hand-offs {:.3} ms; longest: {}",
            gpu.token_ms(),
            gpu.tokens_per_s(),
            gpu.hot_share() * 100.0,
            gpu.hand_off_ms(),
            gpu.parts
                .first()
                .map_or(String::new(), |(part, ms)| format!("{part}, {ms:.3} ms")),
        )?;
        if let Some(ms) = gpu.saved_ms {
            writeln!(
                text,
                "{name}: with GPU and hot sets of single neurons, solved for by the figures above, {ms:.2} ms less a token"
            )?;
        }
        match gpu.prompt {
            PromptForecast::AllHot => Ok(()),
            PromptForecast::Streamed {
                n_tokens,
                bytes,
                ms,
            } => writeln!(
                text,
                "{name}: with GPU a prompt of {n_tokens} tokens streams {:.3} GB of cold neurons: at least {ms:.3} ms, at most {:.0} tokens/s ({})",
                bytes as f64 / 1e9,
                n_tokens as f64 / ms * 1e3,
                self.copies_text(gpu),
            ),
            PromptForecast::TokenByToken => writeln!(
                text,
                "{name}: with GPU prompts go token by token: too few go together for cold neurons to be streamed"
            ),
        }
    }

    /// The speeds at which the GPUs that are used are copied to.
    fn copies_text(&self, gpu: &GpuForecast) -> String {
        let used = self.gpus.iter().take(gpu.gpus.len());
        let speeds: Vec<String> = used
            .map(|(_, link)| {
                let copies = &link.to_device_bytes_per_s;
                format!("{:.1} GB/s {}", copies.value / 1e9, copies.source())
            })
            .collect();
        speeds.join(", ")
    }
}

pub(super) fn gpu_json((gpu, link): &(PlannedGpu, LinkFigures)) -> Value {
    json!({
        "ordinal": gpu.ordinal,
        "name": gpu.name,
        "budget_bytes": gpu.room.budget,
        "memory_gb_per_s": link.memory_bytes_per_s.json(1e-9),
        "launch_us": link.launch_s.json(1e6),
        "to_device_gb_per_s": link.to_device_bytes_per_s.json(1e-9),
        "hand_off_us": link.hand_off_s.json(1e6),
    })
}

pub(super) fn forecast_json(gpu: &GpuForecast) -> Value {
    let parts = gpu.parts.iter();
    let part = |(part, ms): &(Part, f64)| json!({"part": part.to_string(), "ms": ms});
    let prompt = match gpu.prompt {
        PromptForecast::AllHot => json!({"kind": "all_hot"}),
        PromptForecast::Streamed {
            n_tokens,
            bytes,
            ms,
        } => json!({
            "kind": "streamed",
            "n_tokens": n_tokens,
            "streamed_bytes": bytes,
            "ms_min": ms,
            "tokens_per_s_max": n_tokens as f64 / ms * 1e3,
        }),
        PromptForecast::TokenByToken => json!({"kind": "token_by_token"}),
    };
    let gpus = gpu.gpus.iter();
    let share = |(layers, [n_hot, n]): &(Range<usize>, [usize; 2])| json!({"layers": [layers.start, layers.end], "hot_neurons": n_hot, "neurons": n});
    json!({
        "ms_per_token": gpu.token_ms(),
        "tokens_per_s": gpu.tokens_per_s(),
        "hand_off_ms": gpu.hand_off_ms(),
        "parts": parts.map(part).collect::<Vec<_>>(),
        "gpus": gpus.map(share).collect::<Vec<_>>(),
        "solver_saves_ms_per_token": gpu.saved_ms,
        "prompt": prompt,
    })
}
