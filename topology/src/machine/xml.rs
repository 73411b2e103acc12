//! Machines from the XML that lstopo writes (hwloc 2).
//!
//! Read here and not by hwloc, which trusts such a file and ends the program where it is wrong.
//!
//! Source: hwloc's `hwloc2.dtd` and the description of its bitmaps (`hwloc_bitmap_snprintf`).

use roxmltree::{Document, Node, ParsingOptions};

use super::assembly::{FoundNode, assemble};
use super::{Cache, Core, Gpu, Machine, MachineSource, NodeDistances, Package, Withheld};
use crate::error::TopologyError;
use crate::gpu::{DISPLAY_CLASS, NVIDIA_VENDOR};

/// Words of a bitmap at most: more CPUs than any system has.
const N_WORDS_MAX: usize = 2048;

/// Bits of a word.
const WORD_BITS: usize = 32;

/// Elements within one another at most; a machine has a dozen.
const DEPTH_MAX: usize = 256;

/// Bytes of a file at most: hundreds of nodes with thousands of CPUs.
const BYTES_MAX: usize = 64 << 20;

/// The machine of the XML called `name`.
///
/// # Errors
/// The text is not such a file, or the machine has no CPU that its process could use.
pub(super) fn machine(name: &str, xml: &str) -> Result<Machine, TopologyError> {
    read(name, xml).map_err(|problem| TopologyError::Xml {
        name: name.to_owned(),
        problem,
    })
}

fn read(name: &str, xml: &str) -> Result<Machine, String> {
    if xml.len() > BYTES_MAX {
        return Err(format!("it has more than {BYTES_MAX} bytes"));
    }
    check_depth(xml)?;
    let options = ParsingOptions {
        allow_dtd: true,
        ..ParsingOptions::default()
    };
    let document = Document::parse_with_options(xml, options).map_err(|e| e.to_string())?;
    let topology = document.root_element();
    let version = topology.attribute("version").unwrap_or("none");
    if topology.tag_name().name() != "topology" || !version.starts_with("2.") {
        return Err(format!("it is no topology of hwloc 2 (version {version})"));
    }
    let root = (topology.children())
        .find(|node| node.has_tag_name("object"))
        .ok_or("it has no machine")?;
    let saved = Saved::new(topology, root)?;
    let machine = saved.machine(MachineSource::Xml(name.to_owned()))?;
    match machine.n_cpus() {
        0 => Err("the machine has no CPU".to_owned()),
        _ => Ok(machine),
    }
}

/// Refuses elements within too many others: the parser calls itself for each.
fn check_depth(xml: &str) -> Result<(), String> {
    let mut depth: usize = 0;
    for piece in xml.split('<').skip(1) {
        let tag = piece.split('>').next().unwrap_or_default();
        match tag.as_bytes() {
            [b'/', ..] => depth = depth.saturating_sub(1),
            [b'?' | b'!', ..] | [.., b'/'] => {}
            _ => depth += 1,
        }
        if depth > DEPTH_MAX {
            return Err(format!(
                "more than {DEPTH_MAX} elements are within one another"
            ));
        }
    }
    Ok(())
}

/// A parsed file, with what its process was allowed to use.
struct Saved<'a> {
    topology: Node<'a, 'a>,
    root: Node<'a, 'a>,
    /// CPUs that there are and may be used, ascending.
    cpus: Vec<usize>,
    /// NUMA nodes likewise.
    numas: Vec<usize>,
}

impl<'a> Saved<'a> {
    fn new(topology: Node<'a, 'a>, root: Node<'a, 'a>) -> Result<Self, String> {
        let usable = |there: &str, allowed: &str| -> Result<Vec<usize>, String> {
            let there = set(root, there)?.unwrap_or_default();
            Ok(match set(root, allowed)? {
                None => there,
                Some(allowed) => there
                    .into_iter()
                    .filter(|n| allowed.binary_search(n).is_ok())
                    .collect(),
            })
        };
        Ok(Self {
            topology,
            root,
            cpus: usable("cpuset", "allowed_cpuset")?,
            numas: usable("nodeset", "allowed_nodeset")?,
        })
    }

    fn machine(&self, source: MachineSource) -> Result<Machine, String> {
        let distances = self.distances()?;
        let kinds = self.kinds()?;
        let (nodes, memory_nodes) =
            assemble(&self.nodes()?, self.cores(&kinds)?, distances.as_ref());
        Ok(Machine {
            source,
            packages: self.packages()?,
            nodes,
            memory_nodes,
            distances,
            core_kinds: kinds.into_iter().map(|kind| kind.name).collect(),
            caches: self.caches()?,
            gpus: self.gpus()?,
            withheld: Withheld {
                cpus: missing(set(self.root, "complete_cpuset")?, &self.cpus),
                numas: missing(set(self.root, "complete_nodeset")?, &self.numas),
            },
        })
    }

    fn objects(&self, kind: &'static str) -> impl Iterator<Item = Node<'a, 'a>> {
        let all = self.root.descendants();
        all.filter(move |node| node.has_tag_name("object") && node.attribute("type") == Some(kind))
    }

    /// CPUs of an object that may be used.
    fn cpus_of(&self, object: Node<'_, '_>) -> Result<Vec<usize>, String> {
        let cpus = set(object, "cpuset")?.unwrap_or_default();
        let usable = |cpu: &usize| self.cpus.binary_search(cpu).is_ok();
        Ok(cpus.into_iter().filter(usable).collect())
    }

    fn nodes(&self) -> Result<Vec<FoundNode>, String> {
        let mut nodes = Vec::new();
        for object in self.objects("NUMANode") {
            let os_index = number(object, "os_index")?;
            if os_index.is_some_and(|numa| self.numas.binary_search(&numa).is_err()) {
                continue;
            }
            nodes.push(FoundNode {
                os_index,
                memory_bytes: number(object, "local_memory")?.unwrap_or(0) as u64,
                kind: object.attribute("subtype").map(str::to_owned),
                cpus: self.cpus_of(object)?,
            });
        }
        nodes.sort_by_key(|node| node.os_index);
        if nodes
            .windows(2)
            .any(|pair| pair[0].os_index == pair[1].os_index)
        {
            return Err("two NUMA nodes have the same number".to_owned());
        }
        Ok(nodes)
    }

    fn cores(&self, kinds: &[Kind]) -> Result<Vec<Core>, String> {
        let has_cores = self.objects("Core").next().is_some();
        let objects = self.objects(if has_cores { "Core" } else { "PU" });
        let mut taken = vec![false; self.cpus.last().map_or(0, |last| last + 1)];
        let mut cores = Vec::new();
        for object in objects {
            let cpus = self.cpus_of(object)?;
            for &cpu in &cpus {
                if std::mem::replace(&mut taken[cpu], true) {
                    return Err(format!("CPU {cpu} is in two cores"));
                }
            }
            let is_of = |kind: &Kind| cpus.iter().all(|cpu| kind.cpus.binary_search(cpu).is_ok());
            let kind = kinds.iter().position(is_of).unwrap_or(0);
            if !cpus.is_empty() {
                cores.push(Core { cpus, kind });
            }
        }
        Ok(cores)
    }

    fn packages(&self) -> Result<Vec<Package>, String> {
        let mut packages = Vec::new();
        for object in self.objects("Package") {
            let cpus = self.cpus_of(object)?;
            if !cpus.is_empty() {
                packages.push(Package {
                    os_index: number(object, "os_index")?,
                    name: info(object, "CPUModel").map(|name| name.trim().to_owned()),
                    cpus,
                });
            }
        }
        Ok(packages)
    }

    fn caches(&self) -> Result<Vec<Cache>, String> {
        let mut caches = Vec::new();
        for kind in ["L5Cache", "L4Cache", "L3Cache", "L2Cache", "L1Cache"] {
            for object in self.objects(kind) {
                let cpus = self.cpus_of(object)?;
                if !cpus.is_empty() {
                    caches.push(Cache {
                        level: kind[1..2].parse().unwrap_or(1),
                        bytes: number(object, "cache_size")?.unwrap_or(0) as u64,
                        line_bytes: number(object, "cache_linesize")?.unwrap_or(0),
                        cpus,
                    });
                }
            }
        }
        Ok(caches)
    }

    /// Kinds of core, slowest first; none where all are alike or nobody knows which are faster.
    fn kinds(&self) -> Result<Vec<Kind>, String> {
        let mut kinds = Vec::new();
        for element in self
            .topology
            .children()
            .filter(|node| node.has_tag_name("cpukind"))
        {
            let frequency = info(element, "FrequencyMaxMHz").and_then(|mhz| mhz.parse().ok());
            kinds.push(Kind {
                name: info(element, "CoreType").unwrap_or("kind").to_owned(),
                efficiency: number(element, "forced_efficiency")?,
                frequency_mhz: frequency,
                cpus: set(element, "cpuset")?.unwrap_or_default(),
            });
        }
        let is_known = |rank: fn(&Kind) -> Option<usize>| {
            let mut ranks: Vec<Option<usize>> = kinds.iter().map(rank).collect();
            ranks.sort_unstable();
            ranks.dedup();
            ranks.len() == kinds.len() && !ranks.contains(&None)
        };
        let ranks = [Kind::by_efficiency, Kind::by_type, Kind::by_frequency];
        match ranks.into_iter().find(|&rank| is_known(rank)) {
            Some(rank) if kinds.len() > 1 => {
                kinds.sort_by_key(rank);
                Ok(kinds)
            }
            _ => Ok(Vec::new()),
        }
    }

    fn distances(&self) -> Result<Option<NodeDistances>, String> {
        let is_latency = |node: &Node<'_, '_>| {
            node.has_tag_name("distances2")
                && node.attribute("type") == Some("NUMANode")
                && node.attribute("name") == Some("NUMALatency")
                && node.attribute("indexing") == Some("os")
        };
        let Some(element) = self.topology.children().find(is_latency) else {
            return Ok(None);
        };
        let list = |name: &str| -> Result<Vec<u64>, String> {
            let elements = element.children().filter(|node| node.has_tag_name(name));
            let words =
                elements.flat_map(|node| node.text().unwrap_or_default().split_whitespace());
            words
                .map(|word| {
                    word.parse()
                        .map_err(|_| format!("{word:?} among distances"))
                })
                .collect()
        };
        let numas: Vec<usize> = list("indexes")?.into_iter().map(|n| n as usize).collect();
        let values = list("u64values")?;
        match numas.len().checked_mul(numas.len()) == Some(values.len()) {
            true => Ok(Some(NodeDistances { numas, values })),
            false => Err(format!(
                "{} distances between {} NUMA nodes",
                values.len(),
                numas.len()
            )),
        }
    }

    /// NVIDIA's display controllers, with what NVML and CUDA said when the machine was saved.
    fn gpus(&self) -> Result<Vec<Gpu>, String> {
        let mut gpus = Vec::new();
        for object in self.objects("PCIDev") {
            let Some((class, vendor, device)) = object.attribute("pci_type").and_then(pci_type)
            else {
                continue;
            };
            if vendor != NVIDIA_VENDOR || u32::from(class) >> 8 != DISPLAY_CLASS {
                continue;
            }
            let told = |name: &str| object.children().find_map(|child| info(child, name));
            let kib = told("CUDAGlobalMemorySize").and_then(|kib| kib.parse::<u64>().ok());
            gpus.push(Gpu {
                pci_address: object
                    .attribute("pci_busid")
                    .unwrap_or("unknown")
                    .to_owned(),
                pci_device: device,
                name: told("GPUModel").map(str::to_owned),
                memory_bytes: kib.and_then(|kib| kib.checked_mul(1024)),
                compute_capability: None,
                numa: only_node(object)?,
            });
        }
        gpus.sort_by(|a, b| a.pci_address.cmp(&b.pci_address));
        Ok(gpus)
    }
}

/// A kind of core.
struct Kind {
    name: String,
    efficiency: Option<usize>,
    frequency_mhz: Option<usize>,
    cpus: Vec<usize>,
}

impl Kind {
    fn by_efficiency(&self) -> Option<usize> {
        self.efficiency
    }

    fn by_type(&self) -> Option<usize> {
        ["IntelAtom", "IntelCore"]
            .iter()
            .position(|name| *name == self.name)
    }

    fn by_frequency(&self) -> Option<usize> {
        self.frequency_mhz
    }
}

/// The NUMA node that a device hangs on, if it is one: that of the nearest object around it that has nodes.
fn only_node(device: Node<'_, '_>) -> Result<Option<usize>, String> {
    let around = device
        .ancestors()
        .find(|node| node.has_attribute("nodeset"));
    let nodes = around.map_or(Ok(None), |node| set(node, "nodeset"))?;
    Ok(match nodes.as_deref() {
        Some([numa]) => Some(*numa),
        _ => None,
    })
}

/// Class, vendor and device of `0300 [10de:2684] [10de:0000] a1`.
fn pci_type(text: &str) -> Option<(u16, u16, u16)> {
    let (class, rest) = text.split_once(" [")?;
    let (vendor, rest) = rest.split_once(':')?;
    let (device, _) = rest.split_once(']')?;
    let hex = |text: &str| u16::from_str_radix(text, 16).ok();
    Some((hex(class)?, hex(vendor)?, hex(device)?))
}

/// What an object's `<info name value>` says.
fn info<'a>(object: Node<'a, 'a>, name: &str) -> Option<&'a str> {
    let mut infos = object.children().filter(|node| node.has_tag_name("info"));
    let info = infos.find(|node| node.attribute("name") == Some(name))?;
    info.attribute("value")
}

/// A number, where the attribute is there.
fn number(object: Node<'_, '_>, name: &str) -> Result<Option<usize>, String> {
    let parse = |text: &str| {
        let number: Result<usize, _> = text.parse();
        number.map_err(|_| format!("{name} is {text:?}, which is no number"))
    };
    object.attribute(name).map(parse).transpose()
}

/// A set as hwloc writes it, words of 32 bits with the highest first (`0x00000003,,0x0`), ascending; none where the
/// attribute is not there.
fn set(object: Node<'_, '_>, name: &str) -> Result<Option<Vec<usize>>, String> {
    let Some(text) = object.attribute(name) else {
        return Ok(None);
    };
    let fail = || format!("{name} is {text:?}, which is no finite set");
    let words: Vec<&str> = text.split(',').collect();
    if words.len() > N_WORDS_MAX {
        return Err(fail());
    }
    let mut numbers = Vec::new();
    for (index, word) in words.iter().rev().enumerate() {
        let digits = word.strip_prefix("0x").unwrap_or(word);
        let bits = match digits {
            "" => 0,
            digits => u32::from_str_radix(digits, 16).map_err(|_| fail())?,
        };
        let set = (0..WORD_BITS).filter(|bit| bits >> bit & 1 == 1);
        numbers.extend(set.map(|bit| index * WORD_BITS + bit));
    }
    Ok(Some(numbers))
}

/// What of a set is not among what is usable.
fn missing(complete: Option<Vec<usize>>, usable: &[usize]) -> Vec<usize> {
    let mut complete = complete.unwrap_or_default();
    complete.retain(|number| usable.binary_search(number).is_err());
    complete
}
