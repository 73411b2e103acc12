//! A configuration as a file that explains itself.

use std::fmt::Write;

use super::{
    CoreChoice, GpuConfig, GpuSync, HostConfig, HugePages, ListedTeam, NodeCount, ThreadsPerNode,
    TopologyConfig,
};

impl TopologyConfig {
    /// The file that has every key with its value, and what each means. A key that asks for nothing
    /// stands there as a comment.
    pub fn to_toml(&self) -> String {
        let mut text = String::new();
        for entry in self.entries() {
            text.push_str(&entry.explained());
        }
        text
    }

    /// Every key that there is, each with its table as a file writes it; the tables are in the order of a file.
    pub fn keys() -> Vec<(&'static str, &'static str)> {
        let mut entries = Self::default().entries();
        let team = ListedTeam {
            numa: None,
            cpus: Vec::new(),
        };
        entries.extend(host_entries(&HostConfig::Listed(vec![team])));
        entries.extend(gpu_entries(&GpuConfig::default()));
        let mut table = "";
        let mut keys = Vec::new();
        for entry in entries {
            match entry {
                Entry::Table { name, .. } => table = name,
                Entry::Key { name, .. } => keys.push((table, name)),
                Entry::Remark(_) => {}
            }
        }
        keys
    }

    /// Keys with another value than they have without a file.
    pub fn n_changed(&self) -> usize {
        let short = self.to_short_toml();
        short.lines().filter(|line| !line.starts_with('[')).count()
    }

    /// The shortest file that means the same.
    pub fn to_short_toml(&self) -> String {
        let mut default = Self::default().entries();
        default.extend(gpu_entries(&GpuConfig::default()));
        let mut text = String::new();
        let mut table: Option<&str> = None;
        for entry in self.entries() {
            match &entry {
                Entry::Table { name, .. } if name.starts_with("[[") => {
                    let _ = writeln!(text, "{name}");
                    table = None;
                }
                Entry::Table { name, .. } => table = Some(name),
                Entry::Key { value, .. } => {
                    let Some(value) = value.as_ref().filter(|_| !default.contains(&entry)) else {
                        continue;
                    };
                    if let Some(name) = table.take() {
                        let _ = writeln!(text, "{name}");
                    }
                    let _ = writeln!(text, "{} = {value}", entry.key());
                }
                Entry::Remark(_) => {}
            }
        }
        text
    }

    fn entries(&self) -> Vec<Entry> {
        let name = self.name.as_ref().map(|name| quoted(name));
        let mut entries = vec![key("name", name, "\"x\"", "for logs")];
        entries.push(table(
            "[machine]",
            "the least that a machine must have; a lesser one is refused",
        ));
        let needs = &self.machine;
        entries.extend([
            key(
                "numa_nodes",
                text(needs.numa_nodes),
                "2",
                "NUMA nodes with cores",
            ),
            key(
                "cores_per_node",
                text(needs.cores_per_node),
                "16",
                "physical cores of each",
            ),
            key(
                "memory_per_node",
                needs.memory_per_node.map(|size| quoted(&size.to_string())),
                "\"64GiB\"",
                "memory of each",
            ),
        ]);
        entries.push(table("[memory]", "where weights lie"));
        entries.extend(self.memory_entries());
        entries.push(table("[sparsity]", "which neurons are computed"));
        entries.push(key(
            "predict",
            Some(quoted(&self.sparsity.predict.to_string())),
            "",
            "with --sparsity predicted: auto, or who predicts in which layer, as `plan` prints it",
        ));
        entries.extend(host_entries(&self.host));
        if self.gpus.is_empty() {
            entries.push(Entry::Remark("[[gpu]]: none, the host computes everything"));
        }
        self.gpus
            .iter()
            .for_each(|gpu| entries.extend(gpu_entries(gpu)));
        entries
    }

    fn memory_entries(&self) -> [Entry; 3] {
        let huge_pages = match self.memory.huge_pages {
            HugePages::Try => "try",
            HugePages::Require => "require",
            HugePages::Off => "off",
        };
        [
            key(
                "cold",
                Some(quoted(&self.memory.cold.to_string())),
                "",
                "cold neurons: shard, replicate, interleave or single:N",
            ),
            key(
                "huge_pages",
                Some(quoted(huge_pages)),
                "",
                "try, require or off",
            ),
            key(
                "strict",
                text(Some(self.memory.strict)),
                "",
                "whether memory elsewhere than planned is an error",
            ),
        ]
    }
}

fn host_entries(host: &HostConfig) -> Vec<Entry> {
    match host {
        HostConfig::Divided {
            nodes,
            threads,
            reserved_cores,
            cores,
        } => {
            let nodes = match nodes {
                NodeCount::All => quoted("all"),
                NodeCount::Number(nodes) => nodes.to_string(),
            };
            let threads = match threads {
                ThreadsPerNode::Cores => quoted("cores"),
                ThreadsPerNode::Hyperthreads => quoted("hyperthreads"),
                ThreadsPerNode::Number(threads) => threads.to_string(),
            };
            let cores = match cores {
                CoreChoice::Fastest => "fastest",
                CoreChoice::All => "all",
            };
            vec![
                table(
                    "[host]",
                    "teams of threads; or list them in [[host.node]] with numa and cpus",
                ),
                key(
                    "nodes",
                    Some(nodes),
                    "",
                    "teams: all (one per NUMA node), or 1 to 16",
                ),
                key(
                    "threads",
                    Some(threads),
                    "",
                    "of each team: cores, hyperthreads, or a number",
                ),
                key(
                    "reserved_cores",
                    text(Some(reserved_cores)),
                    "",
                    "cores of each team left to others",
                ),
                key(
                    "cores",
                    Some(quoted(cores)),
                    "",
                    "of hybrid processors: fastest or all",
                ),
            ]
        }
        HostConfig::Listed(teams) => teams
            .iter()
            .flat_map(|team| {
                let cpus: Vec<String> = team.cpus.iter().map(usize::to_string).collect();
                [
                    table("[[host.node]]", "a team"),
                    key(
                        "numa",
                        text(team.numa),
                        "0",
                        "NUMA node of its memory and CPUs",
                    ),
                    key(
                        "cpus",
                        Some(format!("[{}]", cpus.join(", "))),
                        "",
                        "a thread on each, the leader first",
                    ),
                ]
            })
            .collect(),
    }
}

fn gpu_entries(gpu: &GpuConfig) -> [Entry; 7] {
    let budget = gpu.vram_budget.to_string();
    let sync = match gpu.sync {
        GpuSync::Flags => "flags",
        GpuSync::Events => "events",
    };
    let address = gpu.pci_address.as_ref().map(|address| quoted(address));
    [
        table("[[gpu]]", "a GPU"),
        key(
            "pci_address",
            address,
            "\"0000:01:00.0\"",
            "which one; left out: the next that is free",
        ),
        key(
            "vram_budget",
            Some(quoted(&budget)),
            "",
            "memory of it that may be used: a size, or all",
        ),
        key(
            "hot_percent_max",
            text(Some(gpu.hot_percent_max)),
            "",
            "most of a layer's neurons that are hot: 0 to 100",
        ),
        key(
            "sync",
            Some(quoted(sync)),
            "",
            "how host and GPU wait for each other: flags or events",
        ),
        key(
            "replan",
            text(Some(gpu.replan)),
            "",
            "tokens after which neurons change between GPU and host; 0: never",
        ),
        key(
            "required",
            text(Some(gpu.required)),
            "",
            "whether its absence is an error; else the host computes instead",
        ),
    ]
}

/// A line of a file.
#[derive(Debug, PartialEq, Eq)]
enum Entry {
    Table {
        name: &'static str,
        meaning: &'static str,
    },
    Key {
        name: &'static str,
        /// As TOML has it; none where nothing is asked.
        value: Option<String>,
        /// What it could be, where it can be left out.
        example: &'static str,
        meaning: &'static str,
    },
    Remark(&'static str),
}

impl Entry {
    fn key(&self) -> &'static str {
        match self {
            Self::Table { name, .. } | Self::Key { name, .. } => name,
            Self::Remark(text) => text,
        }
    }

    fn explained(&self) -> String {
        match self {
            Self::Table { name, meaning } => format!("\n# {meaning}\n{name}\n"),
            Self::Key {
                name,
                value,
                example,
                meaning,
            } => {
                let line = match value {
                    Some(value) => format!("{name} = {value}"),
                    None => format!("# {name} = {example}"),
                };
                format!("{line:<32}# {meaning}\n")
            }
            Self::Remark(text) => format!("\n# {text}\n"),
        }
    }
}

fn table(name: &'static str, meaning: &'static str) -> Entry {
    Entry::Table { name, meaning }
}

fn key(
    name: &'static str,
    value: Option<String>,
    example: &'static str,
    meaning: &'static str,
) -> Entry {
    Entry::Key {
        name,
        value,
        example,
        meaning,
    }
}

fn text<T: ToString>(value: Option<T>) -> Option<String> {
    value.map(|value| value.to_string())
}

/// A string as TOML has it.
fn quoted(text: &str) -> String {
    let mut quoted = "\"".to_owned();
    for c in text.chars() {
        match c {
            '"' | '\\' => quoted.extend(['\\', c]),
            c if c.is_control() => {
                let _ = write!(quoted, "\\u{:04X}", u32::from(c));
            }
            c => quoted.push(c),
        }
    }
    quoted.push('"');
    quoted
}
