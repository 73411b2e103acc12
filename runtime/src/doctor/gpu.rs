//! Findings about GPUs.

use pi_topology::SystemState;

use super::findings::Finding;

const NOT_USED: &str = "cannot be used";

pub(super) fn nvidia(system: &SystemState) -> Finding {
    const SUBJECT: &str = "GPU";
    let driver = &system.nvidia_driver;
    if system.nvidia_gpus.is_empty() && driver.version.is_none() {
        return Finding::ok(SUBJECT, "no NVIDIA GPU: the host computes everything");
    }
    let gpus: Vec<String> = system
        .nvidia_gpus
        .iter()
        .map(|gpu| {
            let node = gpu
                .numa
                .map_or(String::new(), |n| format!(" at NUMA node {n}"));
            format!("{} (10de:{:04x}){node}", gpu.pci_address, gpu.pci_device)
        })
        .collect();
    let found = match gpus.is_empty() {
        true => "NVIDIA's driver".to_owned(),
        false => format!("NVIDIA {}", gpus.join(", ")),
    };
    match (&driver.version, &driver.libcuda) {
        (Some(version), Some(libcuda)) => Finding::ok(
            SUBJECT,
            format!(
                "{found}, driver {version}, {}: used where a topology file has [[gpu]]",
                libcuda.display()
            ),
        ),
        (Some(version), None) => Finding::note(
            SUBJECT,
            format!("{found}, driver {version}, but no libcuda.so.1 for programs: {NOT_USED}"),
        )
        .cure("sudo apt-get install libcuda1; in a container: docker run --gpus all"),
        (None, _) => Finding::note(
            SUBJECT,
            format!("{found}, and its driver is not loaded: {NOT_USED}"),
        )
        .cure("sudo apt-get install nvidia-driver (Debian's non-free), or sudo ubuntu-drivers install"),
    }
}
