//! A profile as text.

use std::fmt::{self, Write};

use super::{GpuLink, MachineProfile, Nanoseconds};

/// Width of the first column.
const NAME: usize = 34;

impl MachineProfile {
    /// Tables for the terminal.
    pub fn text(&self) -> String {
        let mut text = String::new();
        // a string takes everything
        let _ = self.write(&mut text);
        text
    }

    fn write(&self, text: &mut String) -> fmt::Result {
        writeln!(text, "{}\n{}", self.machine, self.cpu)?;
        self.write_threads(text)?;
        self.write_rows(text)?;
        self.write_across(text)?;
        self.write_latencies(text)?;
        writeln!(
            text,
            "\nteams at rest use {:.2} % of a CPU, from 50 ms after their last job on",
            self.idle_cpu_percent
        )?;
        self.write_gpus(text)
    }

    fn write_gpus(&self, text: &mut String) -> fmt::Result {
        for GpuLink {
            ordinal,
            name,
            to_device_bytes_per_s,
            to_host_bytes_per_s,
            flag_round_trip,
            memory_bytes_per_s,
            launch_s,
        } in &self.gpus
        {
            let [to_device, to_host] =
                [to_device_bytes_per_s, to_host_bytes_per_s].map(|b| b / 1e9);
            writeln!(
                text,
                "GPU {ordinal}, {name}: {to_device:.1} GB/s from pinned memory, {to_host:.1} GB/s to it"
            )?;
            match flag_round_trip {
                Some(time) => writeln!(
                    text,
                    "  a flag there and back, by two kernels, {:.2} µs (median), {:.2} (p99)",
                    time.median_ns as f64 / 1e3,
                    time.p99_ns as f64 / 1e3
                )?,
                None => writeln!(
                    text,
                    "  flags not measured: one did not come within a second"
                )?,
            }
            if let (Some(memory), Some(launch)) = (memory_bytes_per_s, launch_s) {
                writeln!(
                    text,
                    "  its own memory {:.0} GB/s, a kernel of a layer {:.2} µs beside its bytes",
                    memory / 1e9,
                    launch * 1e6
                )?;
            }
        }
        for problem in &self.gpu_problems {
            writeln!(text, "not measured between host and GPU: {problem}")?;
        }
        Ok(())
    }

    fn team(&self, team: usize) -> String {
        match self.memory.teams[team].numa {
            Some(numa) => format!("team {team}, NUMA node {numa}"),
            None => format!("team {team}"),
        }
    }

    fn write_threads(&self, text: &mut String) -> fmt::Result {
        let teams = &self.memory.teams;
        for (team, speeds) in teams.iter().enumerate() {
            if team == 0 || speeds.by_threads.len() != teams[0].by_threads.len() {
                write!(text, "\n{:<NAME$}", "GB/s read, by threads")?;
                for speed in &speeds.by_threads {
                    write!(text, "{:>9}", speed.n_threads)?;
                }
                writeln!(text)?;
            }
            write!(text, "  {:<width$}", self.team(team), width = NAME - 2)?;
            for speed in &speeds.by_threads {
                write!(text, "{:>9.1}", speed.bytes_per_s / 1e9)?;
            }
            writeln!(text)?;
        }
        if teams.len() > 1 {
            let together = self.memory.together_bytes_per_s / 1e9;
            writeln!(
                text,
                "  {:<width$}{together:>9.1}",
                "all teams together",
                width = NAME - 2
            )?;
        }
        Ok(())
    }

    fn write_rows(&self, text: &mut String) -> fmt::Result {
        write!(text, "\n{:<NAME$}", "GB/s of rows in random order, bytes")?;
        let first = self.memory.teams.first();
        for speed in first.into_iter().flat_map(|team| &team.by_row_bytes) {
            write!(text, "{:>9}", speed.row_bytes)?;
        }
        writeln!(text)?;
        for (team, speeds) in self.memory.teams.iter().enumerate() {
            write!(text, "  {:<width$}", self.team(team), width = NAME - 2)?;
            for speed in &speeds.by_row_bytes {
                write!(text, "{:>9.1}", speed.bytes_per_s / 1e9)?;
            }
            writeln!(text)?;
        }
        Ok(())
    }

    fn write_across(&self, text: &mut String) -> fmt::Result {
        let mut numas: Vec<usize> = self.memory.across.iter().map(|speed| speed.numa).collect();
        numas.sort_unstable();
        numas.dedup();
        if numas.len() < 2 {
            return writeln!(
                text,
                "\none NUMA node: there is no memory across an interconnect to measure"
            );
        }
        write!(text, "\n{:<NAME$}", "GB/s read of NUMA node")?;
        for numa in &numas {
            write!(text, "{numa:>9}")?;
        }
        writeln!(text)?;
        for team in 0..self.threads.len() {
            write!(text, "  {:<width$}", self.team(team), width = NAME - 2)?;
            for &numa in &numas {
                match self.memory.across_bytes_per_s(team, numa) {
                    Some(bytes_per_s) => write!(text, "{:>9.1}", bytes_per_s / 1e9)?,
                    None => write!(text, "{:>9}", "-")?,
                }
            }
            writeln!(text)?;
        }
        Ok(())
    }

    fn write_latencies(&self, text: &mut String) -> fmt::Result {
        writeln!(text, "\n{:<NAME$}{:>9}{:>9}", "µs", "median", "p99")?;
        let mut row = |name: String, time: Nanoseconds| {
            let [median, p99] = [time.median_ns, time.p99_ns].map(|ns| ns as f64 / 1e3);
            writeln!(
                text,
                "  {name:<width$}{median:>9.2}{p99:>9.2}",
                width = NAME - 2
            )
        };
        for (team, (time, threads)) in self.fork_join.iter().zip(&self.threads).enumerate() {
            row(format!("fork and join, team {team} of {threads}"), *time)?;
        }
        for hop in &self.hops {
            let [from, to] = hop.cpus;
            let name = match hop.teams {
                [a, b] if a == b => format!("message in team {a}, CPU {from} to {to}"),
                [a, b] => format!("message from team {a} to {b}"),
            };
            row(name, hop.time)?;
        }
        for join in &self.joins {
            let plural = if join.n_sums == 1 { "" } else { "s" };
            let name = format!("join {} sum{plural} of {} values", join.n_sums, join.width);
            row(name, join.time)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::machine_profile::tests::profile;

    /// Its words, without the columns' widths.
    fn words(text: &str) -> Vec<String> {
        let words = |line: &str| line.split_whitespace().collect::<Vec<&str>>().join(" ");
        text.lines().map(words).collect()
    }

    #[test]
    fn one_team_and_two_are_shown() {
        let text = profile(2e10).text();
        let one = words(&text);
        for line in [
            "GB/s read, by threads 1 2",
            "team 0, NUMA node 0 10.0 20.0",
            "one NUMA node: there is no memory across an interconnect to measure",
            "fork and join, team 0 of 2 1.00 2.00",
            "join 1 sum of 1000 values 0.50 3.00",
            "join 2 sums of 1000 values 1.00 3.00",
            "teams at rest use 0.00 % of a CPU, from 50 ms after their last job on",
            "not measured between host and GPU: no driver",
        ] {
            assert!(one.iter().any(|found| found == line), "{line}\n{text}");
        }

        let mut two = profile(2e10);
        two.gpu_problems.clear();
        let link = |ordinal, flag_round_trip| GpuLink {
            ordinal,
            name: "Some GPU".to_owned(),
            to_device_bytes_per_s: 2.5e10,
            to_host_bytes_per_s: 2.6e10,
            flag_round_trip,
            memory_bytes_per_s: flag_round_trip.map(|_| 3e12),
            launch_s: flag_round_trip.map(|_| 3.25e-6),
        };
        two.gpus = vec![link(0, Some(two.fork_join[0])), link(1, None)];
        let memory = &mut two.memory;
        memory.teams.push(memory.teams[0].clone());
        memory.teams[1].numa = Some(3);
        let local = memory.across[0];
        let across = |team, numa, bytes_per_s| pi_topology::AcrossSpeed {
            team,
            numa,
            bytes_per_s,
        };
        memory.across = vec![
            local,
            across(0, 3, 1e10),
            across(1, 0, 9e9),
            across(1, 3, 2e10),
        ];
        two.fork_join.push(two.fork_join[0]);
        two.threads.push(2);
        let mut hop = two.hops[0];
        hop.teams = [0, 1];
        two.hops.push(hop);
        let text = two.text();
        let two = words(&text);
        for line in [
            "GB/s read of NUMA node 0 3",
            "team 0, NUMA node 0 20.0 10.0",
            "team 1, NUMA node 3 9.0 20.0",
            "message from team 0 to 1 1.00 2.00",
            "all teams together 20.0",
            "GPU 1, Some GPU: 25.0 GB/s from pinned memory, 26.0 GB/s to it",
            "a flag there and back, by two kernels, 1.00 µs (median), 2.00 (p99)",
            "flags not measured: one did not come within a second",
            "its own memory 3000 GB/s, a kernel of a layer 3.25 µs beside its bytes",
        ] {
            assert!(two.iter().any(|found| found == line), "{line}\n{text}");
        }
    }
}
