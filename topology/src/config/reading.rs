//! How the values of a configuration are read, where they are more than a number or one of some words.

use std::fmt;

use serde::Deserialize;
use serde::de::{self, Deserializer, SeqAccess, Visitor};

use super::{
    ByteSize, ColdPolicy, CoreChoice, GpuSync, HugePages, NodeCount, Predict, ThreadsPerNode,
    VramBudget,
};
use crate::machine::numbers;
use crate::plan::N_NODES_MAX;

impl<'de> Deserialize<'de> for NodeCount {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let visitor = WordOrNumber {
            expected: "\"all\" or a number of nodes",
            words: &[("all", Self::All)],
            number_max: N_NODES_MAX,
            number: Self::Number,
        };
        deserializer.deserialize_any(visitor)
    }
}

impl<'de> Deserialize<'de> for ThreadsPerNode {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let visitor = WordOrNumber {
            expected: "\"cores\", \"hyperthreads\" or a number of threads",
            words: &[("cores", Self::Cores), ("hyperthreads", Self::Hyperthreads)],
            number_max: usize::MAX,
            number: Self::Number,
        };
        deserializer.deserialize_any(visitor)
    }
}

impl<'de> Deserialize<'de> for HugePages {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Word(&[
            ("try", Self::Try),
            ("require", Self::Require),
            ("off", Self::Off),
        ]))
    }
}

impl<'de> Deserialize<'de> for CoreChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Word(&[("fastest", Self::Fastest), ("all", Self::All)]))
    }
}

impl<'de> Deserialize<'de> for GpuSync {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(Word(&[("flags", Self::Flags), ("events", Self::Events)]))
    }
}

/// Reads one of some words.
struct Word<T: 'static>(&'static [(&'static str, T)]);

impl<T: Copy> Visitor<'_> for Word<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (word, _)) in self.0.iter().enumerate() {
            let before = match index {
                0 => "",
                _ if index + 1 == self.0.len() => " or ",
                _ => ", ",
            };
            write!(f, "{before}\"{word}\"")?;
        }
        Ok(())
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        let found = self.0.iter().find(|(word, _)| *word == text);
        found
            .map(|(_, value)| *value)
            .ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
    }
}

/// Reads a whole number from 0 to so many.
struct UpTo(usize);

impl Visitor<'_> for UpTo {
    type Value = usize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a whole number from 0")?;
        match self.0 {
            usize::MAX => Ok(()),
            number_max => write!(f, " to {number_max}"),
        }
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<usize, E> {
        let found = usize::try_from(number).ok();
        found
            .filter(|number| *number <= self.0)
            .ok_or_else(|| E::invalid_value(de::Unexpected::Signed(number), &self))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<usize, E> {
        let found = usize::try_from(number).ok();
        found
            .filter(|number| *number <= self.0)
            .ok_or_else(|| E::invalid_value(de::Unexpected::Unsigned(number), &self))
    }
}

/// Reads a whole number from 0.
pub(super) fn count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<usize>, D::Error> {
    deserializer.deserialize_any(UpTo(usize::MAX)).map(Some)
}

/// Reads a number of tokens.
pub(super) fn tokens<'de, D: Deserializer<'de>>(deserializer: D) -> Result<usize, D::Error> {
    deserializer.deserialize_any(UpTo(usize::MAX))
}

/// A logical CPU.
struct CpuNumber(usize);

impl<'de> Deserialize<'de> for CpuNumber {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(UpTo(usize::MAX)).map(Self)
    }
}

/// Reads a GPU's place on the PCI bus, as the system writes it.
pub(super) fn pci_address<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<String>, D::Error> {
    deserializer.deserialize_any(PciAddress).map(Some)
}

struct PciAddress;

impl Visitor<'_> for PciAddress {
    type Value = String;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(
            "domain, bus, device and function on the PCI bus, such as \"0000:01:00.0\" (`pi-runtime topology` lists them)",
        )
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<String, E> {
        let is_hex = |text: &str, n_digits: &[usize]| {
            n_digits.contains(&text.len()) && text.bytes().all(|byte| byte.is_ascii_hexdigit())
        };
        let parts: Vec<&str> = text.split([':', '.']).collect();
        let is_address = match parts[..] {
            // domains behind Intel's volume management have five digits
            [domain, bus, device, function] => {
                is_hex(domain, &[4, 5])
                    && is_hex(bus, &[2])
                    && is_hex(device, &[2])
                    && is_hex(function, &[1])
                    && text.ends_with(&format!("{bus}:{device}.{function}"))
            }
            _ => false,
        };
        match is_address {
            true => Ok(text.to_owned()),
            false => Err(E::invalid_value(de::Unexpected::Str(text), &self)),
        }
    }
}

/// Reads one of some words, or a number from 1 to `number_max`.
struct WordOrNumber<T: 'static> {
    expected: &'static str,
    words: &'static [(&'static str, T)],
    number_max: usize,
    number: fn(usize) -> T,
}

impl<T: Copy> Visitor<'_> for WordOrNumber<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.expected)?;
        match self.number_max {
            usize::MAX => f.write_str(" from 1"),
            number_max => write!(f, " from 1 to {number_max}"),
        }
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        let found = self.words.iter().find(|(word, _)| *word == text);
        found
            .map(|(_, value)| *value)
            .ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
    }

    fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
        usize::try_from(number)
            .ok()
            .filter(|number| (1..=self.number_max).contains(number))
            .map(self.number)
            .ok_or_else(|| E::invalid_value(de::Unexpected::Signed(number), &self))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        usize::try_from(number)
            .ok()
            .filter(|number| (1..=self.number_max).contains(number))
            .map(self.number)
            .ok_or_else(|| E::invalid_value(de::Unexpected::Unsigned(number), &self))
    }
}

impl<'de> Deserialize<'de> for ColdPolicy {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(PolicyText)
    }
}

struct PolicyText;

impl Visitor<'_> for PolicyText {
    type Value = ColdPolicy;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "\"shard\", \"replicate\", \"interleave\" or \"single:N\" with N a node from 0 to {}",
            N_NODES_MAX - 1
        )
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<ColdPolicy, E> {
        let single = || {
            let digits = text.strip_prefix("single:")?;
            // Rust reads "+1" as a number too
            let node: usize = digits
                .starts_with(|c: char| c.is_ascii_digit())
                .then(|| digits.parse().ok())??;
            (node < N_NODES_MAX).then_some(ColdPolicy::Single(node))
        };
        match text {
            "shard" => Ok(ColdPolicy::Shard),
            "replicate" => Ok(ColdPolicy::Replicate),
            "interleave" => Ok(ColdPolicy::Interleave),
            _ => single().ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self)),
        }
    }
}

impl<'de> Deserialize<'de> for Predict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(PredictText)
    }
}

struct PredictText;

impl Visitor<'_> for PredictText {
    type Value = Predict;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("who predicts, such as \"in-layer\" or \"0-3: exact, 4-29: in-layer\"")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Predict, E> {
        text.parse().map_err(E::custom)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SizeText { all: None })
    }
}

impl<'de> Deserialize<'de> for VramBudget {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let all = Some(ByteSize(u64::MAX));
        let size = deserializer.deserialize_any(SizeText { all })?;
        Ok(match Some(size) == all {
            true => Self::All,
            false => Self::Bytes(size),
        })
    }
}

/// Reads a size, or the word "all" as `all`, which no text can mean otherwise.
struct SizeText {
    all: Option<ByteSize>,
}

impl Visitor<'_> for SizeText {
    type Value = ByteSize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a size with its unit, such as \"22GiB\" or \"512 MB\"")?;
        match self.all {
            Some(_) => f.write_str(", or \"all\""),
            None => Ok(()),
        }
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<ByteSize, E> {
        let refused = || E::invalid_value(de::Unexpected::Str(text), &self);
        match self.all {
            Some(all) if text == "all" => Ok(all),
            _ => ByteSize::parse(text).ok_or_else(refused),
        }
    }
}

/// Reads CPUs as a list of numbers, or as text such as `0-15,32-47`.
pub(super) fn cpus<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<usize>, D::Error> {
    deserializer.deserialize_any(CpuList)
}

/// Reads a whole number from 0 to 100.
pub(super) fn percent<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u8, D::Error> {
    let percent = deserializer.deserialize_any(UpTo(100))?;
    Ok(percent as u8)
}

struct CpuList;

impl<'de> Visitor<'de> for CpuList {
    type Value = Vec<usize>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a list of logical CPUs, such as [0, 1, 2] or \"0-15,32-47\"")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Vec<usize>, E> {
        numbers(text).ok_or_else(|| E::invalid_value(de::Unexpected::Str(text), &self))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<usize>, A::Error> {
        let mut cpus = Vec::new();
        while let Some(CpuNumber(cpu)) = list.next_element()? {
            cpus.push(cpu);
        }
        Ok(cpus)
    }
}
