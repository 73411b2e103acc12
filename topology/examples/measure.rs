//! Prints the machine, a plan for it, and what the plan's threads read from memory.
//!
//! `cargo run --release -p pi-topology --example measure -- [THREADS]`

use std::error::Error;

use pi_topology::{Machine, Plan, TopologyConfig, read_bandwidth};

fn main() -> Result<(), Box<dyn Error>> {
    let threads = std::env::args()
        .nth(1)
        .map(|text| text.parse())
        .transpose()?;
    let machine = Machine::discover()?;
    println!("{machine}");
    let plan = Plan::new(&TopologyConfig::default(), &machine, threads)?;
    for (index, node) in plan.nodes.iter().enumerate() {
        println!(
            "node {index}: NUMA node {:?}, CPUs {:?}",
            node.numa, node.cpus
        );
    }
    println!(
        "{:.1} GB/s read by {} threads",
        read_bandwidth(&plan)? / 1e9,
        plan.n_threads()
    );
    Ok(())
}
