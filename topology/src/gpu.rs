//! NVIDIA's GPUs and their driver: what the system tells, and what the driver does when it is asked.

use std::fs;
use std::path::{Path, PathBuf};

use crate::machine::Gpu;

/// An NVIDIA GPU on the PCI bus.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NvidiaGpu {
    /// Address, such as `0000:01:00.0`.
    pub pci_address: String,
    /// Device number that PCI gives its model.
    pub pci_device: u16,
    /// NUMA node that it is attached to, where the system knows.
    pub numa: Option<usize>,
}

/// What there is of NVIDIA's driver.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct NvidiaDriver {
    /// Version of the kernel's part, when it is loaded.
    pub version: Option<String>,
    /// The programs' part, `libcuda.so.1`.
    pub libcuda: Option<PathBuf>,
}

pub(crate) const NVIDIA_VENDOR: u16 = 0x10de;

/// PCI's class of display controllers: VGA, 3D and others.
pub(crate) const DISPLAY_CLASS: u32 = 0x03;

/// Folders in which programs find shared libraries without being told.
const LIBRARY_FOLDERS: [&str; 7] = [
    "usr/lib/x86_64-linux-gnu",
    "usr/lib/aarch64-linux-gnu",
    "usr/lib64",
    "usr/lib",
    "lib64",
    "usr/local/nvidia/lib64",
    "usr/lib/wsl/lib",
];

/// The GPUs on the PCI bus, by address.
pub(crate) fn nvidia_gpus(root: &Path) -> Vec<NvidiaGpu> {
    let folder = root.join("sys/bus/pci/devices");
    let mut gpus: Vec<NvidiaGpu> = fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .filter_map(|entry| {
            let device = entry.path();
            let number = |name: &str| {
                let text = fs::read_to_string(device.join(name)).ok()?;
                u32::from_str_radix(text.trim().trim_start_matches("0x"), 16).ok()
            };
            let is_gpu = number("vendor")? == u32::from(NVIDIA_VENDOR)
                && number("class")? >> 16 == DISPLAY_CLASS;
            is_gpu.then(|| NvidiaGpu {
                pci_address: entry.file_name().to_string_lossy().into_owned(),
                pci_device: number("device").unwrap_or(0) as u16,
                // -1 where the system does not know
                numa: fs::read_to_string(device.join("numa_node"))
                    .ok()
                    .and_then(|text| text.trim().parse().ok()),
            })
        })
        .collect();
    gpus.sort_by(|a, b| a.pci_address.cmp(&b.pci_address));
    gpus
}

/// NUMA node that the NVIDIA GPU at a PCI address is attached to, where the system knows.
pub fn gpu_node(pci_address: &str) -> Option<usize> {
    let gpus = nvidia_gpus(Path::new("/"));
    let mut gpus = gpus.iter();
    gpus.find(|gpu| gpu.pci_address.eq_ignore_ascii_case(pci_address))?
        .numa
}

/// This system's GPUs, as far as is known without the driver.
pub(crate) fn system_gpus() -> Vec<Gpu> {
    let found = nvidia_gpus(Path::new("/")).into_iter();
    found
        .map(|gpu| Gpu {
            pci_address: gpu.pci_address,
            pci_device: gpu.pci_device,
            name: None,
            memory_bytes: None,
            compute_capability: None,
            numa: gpu.numa,
        })
        .collect()
}

/// Completes `gpus` with what the driver knows, and adds those that only it knows.
pub(crate) fn ask_driver(gpus: &mut Vec<Gpu>) {
    merge(gpus, crate::cuda::gpus());
}

fn merge(gpus: &mut Vec<Gpu>, told: Vec<Gpu>) {
    for told in told {
        match gpus
            .iter_mut()
            .find(|gpu| gpu.pci_address == told.pci_address)
        {
            Some(gpu) => {
                *gpu = Gpu {
                    pci_device: gpu.pci_device,
                    numa: gpu.numa,
                    ..told
                };
            }
            None => gpus.push(told),
        }
    }
    gpus.sort_by(|a, b| a.pci_address.cmp(&b.pci_address));
}

/// The driver's two parts.
pub(crate) fn nvidia_driver(root: &Path) -> NvidiaDriver {
    let version = fs::read_to_string(root.join("proc/driver/nvidia/version"))
        .ok()
        .and_then(|text| driver_version(&text));
    let libcuda = LIBRARY_FOLDERS
        .into_iter()
        .map(|folder| Path::new(folder).join("libcuda.so.1"))
        .find(|path| root.join(path).exists())
        .map(|path| Path::new("/").join(path));
    NvidiaDriver { version, libcuda }
}

/// The version in `NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 …`.
fn driver_version(text: &str) -> Option<String> {
    let line = text
        .lines()
        .find(|line| line.starts_with("NVRM version:"))?;
    let is_version =
        |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    line.split_whitespace().find(is_version).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn add_device(root: &Path, address: &str, files: &[(&str, &str)]) {
        let folder = root.join("sys/bus/pci/devices").join(address);
        fs::create_dir_all(&folder).unwrap();
        for (name, text) in files {
            fs::write(folder.join(name), text).unwrap();
        }
    }

    #[test]
    fn gpus_are_told_from_other_devices() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        let (nvidia, gpu) = (("vendor", "0x10de\n"), ("class", "0x030200\n"));
        add_device(
            root,
            "0000:41:00.0",
            &[nvidia, gpu, ("device", "0x2330\n"), ("numa_node", "1\n")],
        );
        add_device(root, "0000:01:00.0", &[nvidia, gpu, ("numa_node", "-1\n")]);
        add_device(root, "0000:01:00.1", &[nvidia, ("class", "0x040300\n")]);
        add_device(root, "0000:02:00.0", &[("vendor", "0x1002\n"), gpu]);
        add_device(root, "0000:03:00.0", &[]);
        let gpu = |address: &str, device, numa| NvidiaGpu {
            pci_address: address.to_owned(),
            pci_device: device,
            numa,
        };
        assert_eq!(
            nvidia_gpus(root),
            [
                gpu("0000:01:00.0", 0, None),
                gpu("0000:41:00.0", 0x2330, Some(1))
            ]
        );
    }

    #[test]
    fn the_driver_completes_what_the_bus_shows() {
        let gpu = |address: &str, name: Option<&str>, numa: Option<usize>| Gpu {
            pci_address: address.to_owned(),
            pci_device: if numa.is_some() { 0x2330 } else { 0 },
            name: name.map(str::to_owned),
            memory_bytes: name.map(|_| 1 << 30),
            compute_capability: name.map(|_| (9, 0)),
            numa,
        };
        let mut gpus = vec![
            gpu("0000:41:00.0", None, Some(1)),
            gpu("0000:01:00.0", None, Some(0)),
        ];
        let told = vec![
            gpu("0000:41:00.0", Some("H100"), None),
            gpu("0000:02:00.0", Some("T4"), None),
        ];
        merge(&mut gpus, told);
        assert_eq!(
            gpus,
            [
                gpu("0000:01:00.0", None, Some(0)),
                gpu("0000:02:00.0", Some("T4"), None),
                gpu("0000:41:00.0", Some("H100"), Some(1)),
            ]
        );
    }

    #[test]
    fn the_driver_has_two_parts() {
        let root = tempfile::tempdir().unwrap();
        let root = root.path();
        assert_eq!(nvidia_driver(root), NvidiaDriver::default());
        fs::create_dir_all(root.join("usr/lib64")).unwrap();
        fs::write(root.join("usr/lib64/libcuda.so.1"), "").unwrap();
        fs::create_dir_all(root.join("proc/driver/nvidia")).unwrap();
        for (text, version) in [
            (
                "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01  Sun May 12 19:39:15 UTC 2024\n",
                Some("535.183.01"),
            ),
            (
                "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build\n",
                Some("570.86.15"),
            ),
            ("GCC version: 12.2.0\n", None),
        ] {
            fs::write(root.join("proc/driver/nvidia/version"), text).unwrap();
            let driver = nvidia_driver(root);
            assert_eq!(driver.version.as_deref(), version);
            let libcuda = driver.libcuda.unwrap();
            assert_eq!(libcuda, Path::new("/usr/lib64/libcuda.so.1"));
        }
    }
}
