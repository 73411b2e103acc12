//! What disturbs a plan's threads, said at the start of a run.

use std::sync::Once;

use pi_topology::{Plan, SystemState, conflicts_here};

static SAID: Once = Once::new();

/// Logs, once in a process, what keeps the threads of `plan`, which is for this system, from their CPUs and memory or shares
/// them, with the cure.
pub fn warn_of_conflicts(plan: &Plan) {
    SAID.call_once(|| {
        for line in lines(plan, SystemState::read()) {
            tracing::warn!("{line}");
        }
    });
}

fn lines(plan: &Plan, system: SystemState) -> Vec<String> {
    // CPUs that are switched off, such as hyper-threads, are so for all programs: `topology` names them
    let system = SystemState {
        present_cpus: system.online_cpus.clone(),
        ..system
    };
    let conflicts = conflicts_here(Some(plan), &system).into_iter();
    conflicts
        .map(|conflict| format!("{}: {}", conflict.problem, conflict.cure))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use pi_topology::{HugePages, NodePlan};

    #[test]
    fn what_disturbs_the_plan_is_a_line_and_what_does_not_is_none() {
        let team = NodePlan {
            numa: Some(0),
            cpus: vec![0, 1],
        };
        let plan = Plan::of_nodes(vec![team], HugePages::Try);
        let clean = SystemState {
            online_cpus: (0..4).collect(),
            // hyper-threads that are switched off
            present_cpus: (0..8).collect(),
            affinity_cpus: (0..4).collect(),
            ..SystemState::default()
        };
        assert_eq!(lines(&plan, clean.clone()), [""; 0]);
        let limited = SystemState {
            affinity_cpus: vec![0, 1],
            cpu_limit: Some(1.0),
            ..clean
        };
        let lines = lines(&plan, limited);
        assert_eq!(lines.len(), 2, "{lines:?}");
        assert!(
            lines[0].starts_with("CPU 2-3: the affinity mask"),
            "{lines:?}"
        );
        assert!(
            lines[0].ends_with(": start it with taskset -c 0-1,2-3"),
            "{lines:?}"
        );
        assert!(
            lines[1].ends_with(": -t 1, or docker run --cpus 2"),
            "{lines:?}"
        );
    }
}
