//! Whether a plan can be carried out, found out by trying.

use crate::error::TopologyError;
use crate::pin::pin_thread;
use crate::plan::Plan;

/// Binds a thread of its own to each CPU of the plan in turn.
///
/// # Errors
/// The thread cannot be started, or the system refuses a CPU.
pub fn try_pinning(plan: &Plan) -> Result<(), TopologyError> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new()
            .name("pi-probe".to_owned())
            .spawn_scoped(scope, || {
                let mut cpus = plan.nodes.iter().flat_map(|node| &node.cpus);
                cpus.try_for_each(|&cpu| pin_thread(cpu))
            })
            .map_err(|source| TopologyError::Thread { source })?;
        thread
            .join()
            .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Binds a page to each NUMA node of the plan, and says why that is not possible; none where it is, or where there is
/// but one node.
///
/// # Errors
/// There is no such node, or no memory.
#[cfg(feature = "hwloc")]
pub fn memory_binding_problem(plan: &Plan) -> Result<Option<String>, TopologyError> {
    use crate::arena::Arena;
    use crate::config::HugePages;
    use crate::hwloc::{AreaBinding, bind_area, has_several_nodes};

    if !has_several_nodes()? {
        return Ok(None);
    }
    for numa in plan.nodes.iter().filter_map(|node| node.numa) {
        let page = Arena::new(1, None, HugePages::Off)?;
        if let AreaBinding::Unsupported(problem) = bind_area(page.as_slice(), &[numa])? {
            return Ok(Some(problem));
        }
    }
    Ok(None)
}

/// Says that memory is never bound without hwloc.
///
/// # Errors
/// None.
#[cfg(not(feature = "hwloc"))]
pub fn memory_binding_problem(_plan: &Plan) -> Result<Option<String>, TopologyError> {
    Ok(Some("built without the feature hwloc".to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{HugePages, TopologyConfig};
    use crate::machine::Machine;
    use crate::plan::NodePlan;

    #[test]
    fn what_the_machine_has_can_be_bound_to() {
        let machine = Machine::discover().unwrap();
        let plan = Plan::new(&TopologyConfig::default(), &machine, None).unwrap();
        try_pinning(&plan).unwrap();
        let again = Machine::discover().unwrap();
        assert_eq!(again, machine, "the caller's own thread stays free");
        memory_binding_problem(&plan).unwrap();
    }

    #[test]
    fn a_cpu_that_is_not_there_is_named() {
        let team = NodePlan {
            numa: None,
            cpus: vec![1 << 20],
        };
        let plan = Plan::of_nodes(vec![team], HugePages::Off);
        let error = try_pinning(&plan).unwrap_err();
        assert!(
            matches!(error, TopologyError::Pin { cpu: 1_048_576, .. }),
            "{error}"
        );
    }
}
