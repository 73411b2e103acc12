//! A machine, and the plan for it, as a tree in the terminal.

use super::{Cache, Core, Gpu, Machine, MachineNode, cpus_of, gib, ranges};
use crate::config::VramBudget;
use crate::plan::Plan;

/// Columns that lines of cores are wrapped to.
const WIDTH: usize = 100;

/// One line of the tree, what belongs to it below, and what hangs on it.
struct Branch {
    label: String,
    /// Lines below the label, without branches of their own.
    lines: Vec<String>,
    children: Vec<Branch>,
}

impl Branch {
    fn new(label: String) -> Self {
        Self {
            label,
            lines: Vec::new(),
            children: Vec::new(),
        }
    }

    /// Appends the branch to `text`; `first` and `rest` stand before its first and its other lines.
    fn draw(&self, first: &str, rest: &str, text: &mut String) {
        text.push_str(&format!("{first}{}\n", self.label));
        let bar = if self.children.is_empty() {
            "   "
        } else {
            "│  "
        };
        for line in &self.lines {
            text.push_str(&format!("{rest}{bar}{line}\n"));
        }
        for (index, child) in self.children.iter().enumerate() {
            let (branch, bar) = match index + 1 == self.children.len() {
                true => ("└─ ", "   "),
                false => ("├─ ", "│  "),
            };
            child.draw(&format!("{rest}{branch}"), &format!("{rest}{bar}"), text);
        }
    }
}

impl Machine {
    /// The machine as a tree of packages, NUMA nodes, caches and cores, with the GPUs where they hang.
    ///
    /// With a `plan` each team is a letter beside its CPUs, a capital for the leader's, and a line below the tree with
    /// what `notes` say of it, by team.
    pub fn draw(&self, plan: Option<&Plan>, notes: &[String]) -> String {
        let mut text = format!("{self}\n");
        let view = View {
            machine: self,
            plan,
        };
        for branch in view.roots() {
            text.push('\n');
            branch.draw("", "", &mut text);
        }
        let facts = self.facts();
        if !facts.is_empty() {
            text.push_str(&format!("\n{}\n", facts.join("\n")));
        }
        if let Some(plan) = plan {
            text.push_str(&format!("\n{}", teams(plan, notes)));
        }
        text
    }

    /// Lines on what is no branch of the tree.
    fn facts(&self) -> Vec<String> {
        let mut facts = Vec::new();
        if !self.caches.is_empty() {
            facts.push(format!("Caches: {}", self.cache_sizes()));
        }
        if let Some(distances) = self.distances.as_ref().filter(|d| d.numas.len() > 1) {
            let rows = distances
                .numas
                .iter()
                .zip(distances.values.chunks(distances.numas.len()));
            let rows = rows.map(|(numa, row)| {
                let row: Vec<String> = row.iter().map(u64::to_string).collect();
                format!("{numa}: {}", row.join(" "))
            });
            let rows: Vec<String> = rows.collect();
            facts.push(format!("Distances from NUMA node {}", rows.join(", from ")));
        }
        if !self.withheld.cpus.is_empty() {
            let cpus = cpu_words(&self.withheld.cpus);
            facts.push(format!("Not for this process: {cpus}"));
        }
        if !self.withheld.numas.is_empty() {
            let numas = ranges(self.withheld.numas.clone());
            facts.push(format!("Not for this process: memory of NUMA node {numas}"));
        }
        facts
    }

    /// How many caches of which size there are, such as `L3 2 × 32.0 MiB, L2 16 × 512 KiB`.
    fn cache_sizes(&self) -> String {
        let mut counts: Vec<(usize, u64, usize)> = Vec::new();
        for cache in &self.caches {
            let same = |(level, bytes, _): &&mut (usize, u64, usize)| {
                (*level, *bytes) == (cache.level, cache.bytes)
            };
            match counts.iter_mut().find(same) {
                Some((_, _, count)) => *count += 1,
                None => counts.push((cache.level, cache.bytes, 1)),
            }
        }
        let words = counts
            .into_iter()
            .map(|(level, bytes, count)| format!("L{level} {count} × {}", cache_size(bytes)));
        words.collect::<Vec<String>>().join(", ")
    }
}

fn cache_size(bytes: u64) -> String {
    match bytes {
        0 => "unknown size".to_owned(),
        bytes if bytes < 1 << 20 => format!("{} KiB", bytes >> 10),
        bytes => format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20)),
    }
}

/// CPUs as in a sentence.
fn cpu_words(cpus: &[usize]) -> String {
    match cpus {
        [cpu] => format!("CPU {cpu}"),
        cpus => format!("CPUs {}", ranges(cpus.to_vec())),
    }
}

/// The letter of a team.
fn letter(team: usize) -> char {
    // a plan has at most 16
    char::from(b'a' + (team % 26) as u8)
}

fn teams(plan: &Plan, notes: &[String]) -> String {
    let mut text =
        "Teams (letters beside CPUs above; a capital where the leader runs)\n".to_owned();
    for (team, node) in plan.nodes.iter().enumerate() {
        let n_threads = match node.cpus.len() {
            1 => "1 thread".to_owned(),
            n => format!("{n} threads"),
        };
        let memory = match node.numa {
            Some(numa) => format!("memory on NUMA node {numa}"),
            None => "memory where the system puts it".to_owned(),
        };
        let note = notes
            .get(team)
            .map_or(String::new(), |note| format!(": {note}"));
        text.push_str(&format!(
            "  {}  team {team}: {n_threads} on {}, {memory}{note}\n",
            letter(team),
            cpu_words(&node.cpus),
        ));
    }
    text
}

/// A machine with a plan, while it is made into branches.
struct View<'a> {
    machine: &'a Machine,
    plan: Option<&'a Plan>,
}

impl View<'_> {
    fn roots(&self) -> Vec<Branch> {
        let machine = self.machine;
        let mut placed = vec![false; machine.nodes.len()];
        let mut roots = Vec::new();
        for package in &machine.packages {
            let mut branch = Branch::new(self.package_label(package));
            for (node, placed) in machine.nodes.iter().zip(&mut placed) {
                if covers(&package.cpus, &node.cpus()) {
                    branch.children.push(self.node(node));
                    *placed = true;
                }
            }
            if branch.children.is_empty() {
                let nodes = (machine.nodes.iter()).filter(|n| meets(&n.cpus(), &package.cpus));
                let nodes: Vec<String> = nodes.map(|n| numa_name(n.os_index)).collect();
                branch.lines.push(format!(
                    "{}, with the memory of {}",
                    cpu_words(&package.cpus),
                    nodes.join(", ")
                ));
            }
            roots.push(branch);
        }
        let rest = machine
            .nodes
            .iter()
            .zip(placed)
            .filter(|(_, placed)| !placed);
        roots.extend(rest.map(|(node, _)| self.node(node)));
        for node in &machine.memory_nodes {
            let kind = node.kind.as_deref().unwrap_or("memory without CPUs");
            roots.push(Branch::new(format!(
                "{}  {}  {kind}",
                numa_name(node.os_index),
                memory_size(node.memory_bytes)
            )));
        }
        let has_node = |gpu: &&Gpu| {
            let mut nodes = machine.nodes.iter();
            gpu.numa.is_some() && nodes.any(|node| node.os_index == gpu.numa)
        };
        let lone = machine.gpus.iter().filter(|gpu| !has_node(gpu));
        roots.extend(lone.map(|gpu| self.gpu(gpu)));
        roots
    }

    fn package_label(&self, package: &super::Package) -> String {
        let number = package.os_index.map_or("?".to_owned(), |n| n.to_string());
        let name = package.name.as_deref().unwrap_or_default();
        let shared = self.top_caches().filter(|cache| {
            let nodes = self.machine.nodes.iter();
            let n_sharing = nodes
                .filter(|node| meets(&cache.cpus, &node.cpus()))
                .count();
            n_sharing > 1 && covers(&package.cpus, &cache.cpus)
        });
        let shared: Vec<String> = shared
            .map(|cache| format!("L{} {} for all nodes", cache.level, cache_size(cache.bytes)))
            .collect();
        let parts = [
            format!("Package {number}"),
            name.to_owned(),
            shared.join(", "),
        ];
        let parts: Vec<String> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        parts.join("  ")
    }

    fn node(&self, node: &MachineNode) -> Branch {
        let mut branch = Branch::new(format!(
            "{}  {}",
            numa_name(node.os_index),
            memory_size(node.memory_bytes)
        ));
        let cpus = node.cpus();
        let own: Vec<&Cache> = self
            .top_caches()
            .filter(|cache| covers(&cpus, &cache.cpus))
            .collect();
        // cores that no cache of the node's own covers
        let mut others = node.cores.clone();
        for cache in own {
            let (inside, outside): (Vec<Core>, Vec<Core>) = others
                .into_iter()
                .partition(|core| covers(&cache.cpus, &core.cpus));
            others = outside;
            if !inside.is_empty() {
                let label = format!("L{} {}", cache.level, cache_size(cache.bytes));
                let mut cores = Branch::new(label);
                cores.lines = self.cells(&inside);
                branch.children.push(cores);
            }
        }
        if !others.is_empty() {
            branch.lines = self.cells(&others);
        }
        let gpus = self
            .machine
            .gpus
            .iter()
            .filter(|gpu| gpu.numa.is_some() && gpu.numa == node.os_index);
        branch.children.extend(gpus.map(|gpu| self.gpu(gpu)));
        branch
    }

    /// Caches of the third level or above.
    fn top_caches(&self) -> impl Iterator<Item = &Cache> {
        let level = self.machine.caches.iter().map(|cache| cache.level).max();
        let caches = self.machine.caches.iter();
        caches.filter(move |cache| cache.level >= 3 && Some(cache.level) == level)
    }

    /// Cores as `[0a 16]`, the kinds of a hybrid processor apart, in lines of at most about [`WIDTH`].
    fn cells(&self, cores: &[Core]) -> Vec<String> {
        let names = &self.machine.core_kinds;
        let n_digits = self
            .machine
            .cpus()
            .iter()
            .max()
            .map_or(1, |n| n.to_string().len());
        let mut lines = Vec::new();
        for kind in (0..names.len().max(1)).rev() {
            let head = names
                .get(kind)
                .map_or(String::new(), |name| format!("{name}: "));
            let mut line = head.clone();
            for core in cores.iter().filter(|core| core.kind == kind) {
                let cell = self.cell(core, n_digits);
                if line.chars().count() + cell.chars().count() > WIDTH && line != head {
                    lines.push(std::mem::replace(&mut line, " ".repeat(head.len())));
                }
                line.push_str(&cell);
            }
            if line.contains('[') {
                lines.push(line);
            }
        }
        lines
    }

    fn cell(&self, core: &Core, n_digits: usize) -> String {
        let cpus = cpus_of(std::slice::from_ref(core)).into_iter().map(|cpu| {
            let marks = self.marks(cpu);
            format!("{cpu:>n_digits$}{marks}")
        });
        format!("[{}]", cpus.collect::<Vec<String>>().join(" "))
    }

    fn gpu(&self, gpu: &Gpu) -> Branch {
        let name = gpu.name.clone();
        let name = name.unwrap_or_else(|| format!("NVIDIA 10de:{:04x}", gpu.pci_device));
        let memory = match gpu.memory_bytes {
            Some(bytes) => gib(bytes),
            None => "memory unknown without its driver".to_owned(),
        };
        let gpus = &self.machine.gpus;
        let index = gpus.iter().position(|other| std::ptr::eq(other, gpu));
        let entry = (self.plan.zip(index)).and_then(|(plan, index)| plan.gpu_entries(gpus)[index]);
        let budget = match entry.map(|entry| entry.vram_budget) {
            None => String::new(),
            Some(VramBudget::All) => "  used: all that is free".to_owned(),
            Some(VramBudget::Bytes(size)) => format!("  used: at most {size}"),
        };
        Branch::new(format!("GPU {}  {name}  {memory}{budget}", gpu.pci_address))
    }

    /// Letters of the teams that run on a CPU; a blank where a plan leaves it free.
    fn marks(&self, cpu: usize) -> String {
        let Some(plan) = self.plan else {
            return String::new();
        };
        let mut marks = String::new();
        for (team, node) in plan.nodes.iter().enumerate() {
            match node.cpus.iter().position(|&planned| planned == cpu) {
                Some(0) => marks.push(letter(team).to_ascii_uppercase()),
                Some(_) => marks.push(letter(team)),
                None => {}
            }
        }
        match marks.is_empty() {
            true => " ".to_owned(),
            false => marks,
        }
    }
}

fn numa_name(os_index: Option<usize>) -> String {
    match os_index {
        Some(number) => format!("NUMA node {number}"),
        None => "The only node".to_owned(),
    }
}

fn memory_size(bytes: u64) -> String {
    match bytes {
        0 => "memory unknown".to_owned(),
        bytes => gib(bytes),
    }
}

/// Whether all of `inner` is in `outer`, and there is something.
fn covers(outer: &[usize], inner: &[usize]) -> bool {
    !inner.is_empty() && inner.iter().all(|cpu| outer.contains(cpu))
}

fn meets(a: &[usize], b: &[usize]) -> bool {
    a.iter().any(|cpu| b.contains(cpu))
}
