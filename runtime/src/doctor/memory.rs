//! Findings about memory, and whether a model fits into it.

use pi_topology::{Limit, SystemState};

use super::facts::{Facts, ModelFacts};
use super::findings::{Finding, size};
use super::model_needs::ModelNeeds;

/// Linux's own limit of locked memory since 5.16; less comes from a container or an old system.
const MEMLOCK_DEFAULT_BYTES: u64 = 8 << 20;

pub(super) fn memory(system: &SystemState) -> Finding {
    let known = |bytes: Option<u64>| bytes.map_or("unknown".to_owned(), size);
    let mut text = format!(
        "{}, of which {} can be had",
        known(system.memory_bytes),
        known(system.available_bytes)
    );
    if let Some(limit_bytes) = system.memory_limit_bytes {
        text += &format!("; control groups allow {}", size(limit_bytes));
    }
    Finding::ok("memory", text)
}

pub(super) fn model(facts: &Facts) -> Finding {
    const SUBJECT: &str = "model";
    let needs = match &facts.model {
        ModelFacts::None(why) => return Finding::note(SUBJECT, why.as_str()),
        ModelFacts::Unusable(why) => {
            let cure = "give another file: pi-runtime doctor -m FILE";
            return Finding::problem(SUBJECT, why.as_str(), cure).preventing();
        }
        ModelFacts::Usable(needs) => needs,
    };
    let text = format!(
        "{}: {}, sparsity {}; {} of weights, and {} of cache for {} tokens",
        needs.path,
        needs.name,
        needs.sparsity,
        size(needs.weights_bytes),
        size(needs.cache_bytes),
        needs.n_ctx
    );
    let available_bytes = facts.system.available_bytes.unwrap_or(u64::MAX);
    if needs.weights_bytes > available_bytes {
        let text = format!(
            "{text}: more than the {} that can be had",
            size(available_bytes)
        );
        return Finding::problem(SUBJECT, text, more_memory(&facts.system)).preventing();
    }
    if needs.memory_bytes() > available_bytes {
        let text = format!(
            "{text}: more than the {} that can be had once the context is full",
            size(available_bytes)
        );
        return Finding::problem(SUBJECT, text, shorter_context(needs, available_bytes));
    }
    if let Some(problem) = &needs.full_node {
        let cure = "pi-runtime topology -m FILE --topology FILE.toml shows what each node would hold with another policy";
        return Finding::problem(SUBJECT, format!("{text}: {problem}"), cure).preventing();
    }
    match &needs.hint {
        Some(hint) => Finding::note(SUBJECT, format!("{text}; {hint}"))
            .cure(format!("pi-runtime pack {} -o OUT.gguf", needs.path)),
        None => Finding::ok(SUBJECT, text),
    }
}

fn more_memory(system: &SystemState) -> &'static str {
    match system.memory_limit_bytes {
        Some(_) => {
            "docker run --memory or systemctl set-property UNIT MemoryMax= raise the limit; or take a smaller model"
        }
        None => "top -o %MEM shows who has it: close what is not needed, or take a smaller model",
    }
}

/// A context whose cache fits beside the weights.
fn shorter_context(needs: &ModelNeeds, available_bytes: u64) -> String {
    let left_bytes = available_bytes - needs.weights_bytes;
    let token_bytes = (needs.cache_bytes / needs.n_ctx.max(1) as u64).max(1);
    format!("pi-runtime -c {}", (left_bytes / token_bytes).max(1))
}

pub(super) fn address_space(facts: &Facts) -> Finding {
    const SUBJECT: &str = "address space";
    const CURE: &str = "ulimit -v unlimited";
    let Limit::Bytes(bytes) = facts.system.address_space_bytes else {
        return Finding::ok(SUBJECT, "not limited");
    };
    // the file is mapped while its weights are copied
    let needed_bytes = facts
        .needs()
        .map_or(0, |needs| needs.memory_bytes() + needs.weights_bytes);
    let text = format!("limited to {}", size(bytes));
    if needed_bytes > bytes {
        let text = format!("{text}, and the model takes {} of it", size(needed_bytes));
        return Finding::problem(SUBJECT, text, CURE).preventing();
    }
    Finding::note(SUBJECT, text).cure(CURE)
}

pub(super) fn promised(facts: &Facts) -> Option<Finding> {
    const SUBJECT: &str = "overcommit";
    const CURE: &str = "sudo sysctl vm.overcommit_memory=0";
    let bytes = facts.system.promisable_bytes?;
    let text = format!(
        "the kernel promises no more memory than there is, and {} are left",
        size(bytes)
    );
    Some(match facts.needs() {
        Some(needs) if needs.memory_bytes() > bytes => {
            let text = format!(
                "{text}: less than the model's {}",
                size(needs.memory_bytes())
            );
            Finding::problem(SUBJECT, text, CURE).preventing()
        }
        _ => Finding::note(SUBJECT, text).cure(CURE),
    })
}

pub(super) fn huge_pages(system: &SystemState) -> Finding {
    const SUBJECT: &str = "huge pages";
    let on_the_host = match system.container {
        Some(_) => " (on the host)",
        None => "",
    };
    match system.transparent_huge_pages.as_deref() {
        Some("never") => Finding::problem(
            SUBJECT,
            "transparent huge pages are off: weights lie in pages of 4 KiB, and reading them misses in the TLB",
            format!(
                "echo madvise | sudo tee /sys/kernel/mm/transparent_hugepage/enabled{on_the_host}"
            ),
        ),
        Some(setting) => Finding::ok(SUBJECT, format!("transparent huge pages: {setting}")),
        None => Finding::note(
            SUBJECT,
            "this kernel has no transparent huge pages, or hides its setting",
        ),
    }
}

pub(super) fn reserved_huge_pages(system: &SystemState) -> Option<Finding> {
    (system.reserved_huge_bytes > 0).then(|| {
        let text = format!(
            "{} are set aside as reserved huge pages: each node's weights take theirs if all of them fit, and other programs \
             have that much less",
            size(system.reserved_huge_bytes)
        );
        Finding::note("huge pages", text).cure("sudo sysctl vm.nr_hugepages=0")
    })
}

pub(super) fn locked(system: &SystemState) -> Finding {
    const SUBJECT: &str = "locked memory";
    match system.memlock_bytes {
        Limit::Unknown => Finding::ok(SUBJECT, "the system does not tell the limit"),
        Limit::Unlimited => Finding::ok(SUBJECT, "not limited"),
        Limit::Bytes(bytes) if system.nvidia_gpus.is_empty() => {
            let text = format!(
                "limited to {}; nothing is locked without a GPU",
                size(bytes)
            );
            Finding::ok(SUBJECT, text)
        }
        Limit::Bytes(bytes) => {
            let text = format!(
                "limited to {}; prompts on a GPU lock the weights of the host that they read, and copy them more slowly where \
                 that is refused",
                size(bytes)
            );
            match bytes < MEMLOCK_DEFAULT_BYTES {
                true => Finding::note(SUBJECT, text).cure("ulimit -l unlimited"),
                false => Finding::ok(SUBJECT, text),
            }
        }
    }
}

pub(super) fn bandwidth(facts: &Facts) -> Option<Finding> {
    const SUBJECT: &str = "memory bandwidth";
    let measured = facts.bandwidth.as_ref()?;
    let n_threads = facts.planned().map_or(0, |plan| plan.n_threads);
    Some(match measured {
        Ok(bytes_per_second) => {
            let mut text = format!(
                "{:.1} GB/s read by {n_threads} threads",
                bytes_per_second / 1e9
            );
            if let Some(needs) = facts.needs() {
                text += &format!(
                    ": at most {:.1} tokens a second where all neurons are active",
                    bytes_per_second / needs.token_bytes.max(1) as f64
                );
            }
            Finding::ok(SUBJECT, text)
        }
        Err(error) => Finding::note(SUBJECT, format!("not measured: {error}")),
    })
}
