//! A GGUF file taken apart, so that any of its fields can be made wrong, and put together again.

use std::ops::Range;

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    pub fn edge(&mut self) -> u64 {
        EDGES[self.below(EDGES.len())]
    }
}

/// Numbers that sit on the edges of what a reader may compute with.
pub const EDGES: [u64; 24] = [
    0,
    1,
    2,
    3,
    7,
    8,
    12,
    13,
    31,
    33,
    255,
    65_537,
    0x7f80_0000,
    0x7fc0_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 32,
    1 << 61,
    (1 << 61) + 1,
    1 << 63,
    u64::MAX - 31,
    u64::MAX - 7,
    u64::MAX,
];

/// The head's entries as bytes, each whole, and what follows the head.
#[derive(Clone)]
pub struct Parts {
    pub magic: [u8; 4],
    pub version: u32,
    pub n_tensors: u64,
    pub n_keys: u64,
    pub keys: Vec<Vec<u8>>,
    pub tensors: Vec<Vec<u8>>,
    pub data: Vec<u8>,
}

const ALIGNMENT: usize = 32;

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// Length of a string with its count.
fn string_bytes(bytes: &[u8], at: usize) -> usize {
    8 + u64_at(bytes, at) as usize
}

/// Where an entry's name ends, unless its length is wrong: `behind` bytes follow it at least.
fn name_end(entry: &[u8], behind: usize) -> Option<usize> {
    let end = u64_at(entry, 0).checked_add(8)?;
    (end <= entry.len().saturating_sub(behind) as u64).then_some(end as usize)
}

/// Length of a value of a type, by the format's ids.
fn value_bytes(bytes: &[u8], at: usize, value_type: u32) -> usize {
    match value_type {
        0 | 1 | 7 => 1,
        2 | 3 => 2,
        4..=6 => 4,
        10..=12 => 8,
        8 => string_bytes(bytes, at),
        9 => {
            let (element, count) = (u32_at(bytes, at), u64_at(bytes, at + 4));
            (0..count).fold(12, |length, _| {
                length + value_bytes(bytes, at + length, element)
            })
        }
        other => panic!("value type {other}"),
    }
}

impl Parts {
    /// Takes a whole file apart.
    pub fn of(file: &[u8]) -> Self {
        let (n_tensors, n_keys) = (u64_at(file, 8), u64_at(file, 16));
        let mut at = 24;
        let mut take = |length: usize| {
            at += length;
            file[at - length..at].to_vec()
        };
        let mut next = 24;
        let keys = (0..n_keys).map(|_| {
            let value = next + string_bytes(file, next) + 4;
            let end = value + value_bytes(file, value, u32_at(file, value - 4));
            let length = end - std::mem::replace(&mut next, end);
            take(length)
        });
        let keys: Vec<_> = keys.collect();
        let tensors = (0..n_tensors).map(|_| {
            let dims = next + string_bytes(file, next);
            let end = dims + 4 + 8 * u32_at(file, dims) as usize + 4 + 8;
            let length = end - std::mem::replace(&mut next, end);
            take(length)
        });
        let tensors: Vec<_> = tensors.collect();
        Self {
            magic: file[..4].try_into().unwrap(),
            version: u32_at(file, 4),
            n_tensors,
            n_keys,
            keys,
            tensors,
            data: file[next.next_multiple_of(ALIGNMENT)..].to_vec(),
        }
    }

    /// Puts the file together, whatever its entries say.
    pub fn build(&self) -> Vec<u8> {
        let mut file = self.magic.to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend(self.n_tensors.to_le_bytes());
        file.extend(self.n_keys.to_le_bytes());
        file.extend(self.keys.iter().chain(&self.tensors).flatten());
        file.resize(file.len().next_multiple_of(ALIGNMENT), 0);
        file.extend(&self.data);
        file
    }

    /// Makes one thing wrong that a reader must look for.
    pub fn mutate(&mut self, random: &mut Random) {
        match random.below(18) {
            0..=3 => self.mutate_key(random),
            4..=6 => self.mutate_tensor(random),
            7 => self.mutate_counts(random),
            8 => {
                let entries = [&mut self.keys, &mut self.tensors];
                let n = random.below(2);
                invalid_text(random, entries.into_iter().nth(n).unwrap());
            }
            9..=11 => self.mutate_item(random),
            _ => self.mutate_data(random),
        }
    }

    fn mutate_key(&mut self, random: &mut Random) {
        if self.keys.is_empty() {
            return;
        }
        let n = random.below(self.keys.len());
        let key = &mut self.keys[n];
        let Some(name) = name_end(key, 5) else { return };
        match random.below(7) {
            0 => {
                self.keys.remove(n);
                self.n_keys = self.keys.len() as u64;
            }
            1 => {
                let twice = key.clone();
                self.keys.push(twice);
                self.n_keys = self.keys.len() as u64;
            }
            2 => key[name] = random.below(15) as u8,
            3 => {
                // the same name with another type and a number in place of the value
                key.truncate(name);
                let types = [(4u32, 4), (5, 4), (6, 4), (7, 1), (10, 8), (12, 8)];
                let (value_type, width) = types[random.below(types.len())];
                key.extend(value_type.to_le_bytes());
                key.extend(&random.edge().to_le_bytes()[..width]);
            }
            4 => overwrite(key, 0, 8, random.edge()),
            5 => overwrite(key, name + 4, 8, random.edge()),
            _ => {
                let width = key.len() - (name + 4);
                overwrite(key, name + 4, width.min(8), random.edge());
            }
        }
    }

    fn mutate_tensor(&mut self, random: &mut Random) {
        if self.tensors.is_empty() {
            return;
        }
        let n = random.below(self.tensors.len());
        let other = self.tensors[random.below(self.tensors.len())].clone();
        let tensor = &mut self.tensors[n];
        let Some(dims) = name_end(tensor, 4 + 8 + 4 + 8) else {
            return;
        };
        let offset = tensor.len() - 8;
        match random.below(9) {
            0 => {
                self.tensors.remove(n);
                self.n_tensors = self.tensors.len() as u64;
            }
            1 => {
                self.tensors.push(other);
                self.n_tensors = self.tensors.len() as u64;
            }
            2 => {
                let mut renamed = other;
                renamed[8] = b'~';
                self.tensors.push(renamed);
                self.n_tensors = self.tensors.len() as u64;
            }
            3 => overwrite(tensor, dims, 4, random.edge()),
            4 => {
                let dimension = random.below(2.min((offset - 8 - dims) / 8).max(1));
                overwrite(tensor, dims + 4 + 8 * dimension, 8, random.edge());
            }
            5 => overwrite(tensor, offset - 4, 4, random.below(45) as u64),
            6 => overwrite(tensor, offset, 8, random.edge()),
            7 => overwrite(tensor, offset, 8, u64_at(&other, other.len() - 8)),
            _ => overwrite(tensor, 0, 8, random.edge()),
        }
    }

    fn mutate_counts(&mut self, random: &mut Random) {
        match random.below(6) {
            0 => self.n_keys = random.edge(),
            1 => self.n_tensors = random.edge(),
            2 => self.n_keys = self.n_keys.wrapping_add_signed([-1, 1][random.below(2)]),
            3 => self.n_tensors = self.n_tensors.wrapping_add_signed([-1, 1][random.below(2)]),
            4 => self.version = random.edge() as u32,
            _ => self.magic = *[b"PWRI", b"GGUF", b"GGML", b"\0\0\0\0"][random.below(4)],
        }
    }

    /// Changes something inside an array: a token, a score, a kind.
    fn mutate_item(&mut self, random: &mut Random) {
        let arrays = |key: &&mut Vec<u8>| {
            name_end(key, 4 + 12 + 1).is_some_and(|name| u32_at(key, name) == 9)
        };
        let mut arrays: Vec<&mut Vec<u8>> = self.keys.iter_mut().filter(arrays).collect();
        if arrays.is_empty() {
            return;
        }
        let n = random.below(arrays.len());
        let array = &mut arrays[n];
        let items = string_bytes(array, 0) + 4 + 12;
        for _ in 0..=random.below(2) {
            let at = items + random.below((array.len() - items).max(1));
            let width = [1, 4, 8][random.below(3)];
            overwrite(array, at, width, random.edge());
        }
    }

    fn mutate_data(&mut self, random: &mut Random) {
        if self.data.is_empty() {
            return;
        }
        if random.below(8) == 0 {
            let length = random.below(self.data.len());
            return self.data.truncate(length);
        }
        for _ in 0..=random.below(4) {
            let at = random.below(self.data.len());
            let width = [1, 2, 4][random.below(3)];
            overwrite(&mut self.data, at, width, random.edge());
        }
    }
}

/// Makes a byte of a name or value one that no UTF-8 text has.
fn invalid_text(random: &mut Random, entries: &mut [Vec<u8>]) {
    if entries.is_empty() {
        return;
    }
    let n = random.below(entries.len());
    let entry = &mut entries[n];
    let at = 8 + random.below(entry.len() - 8);
    entry[at] = [0xff, 0xc0, 0x80, 0xed][random.below(4)];
}

/// Writes the low bytes of `value` over `width` bytes, as far as there are any.
pub fn overwrite(bytes: &mut [u8], at: usize, width: usize, value: u64) {
    let range: Range<usize> = at.min(bytes.len())..(at + width).min(bytes.len());
    let length = range.len();
    bytes[range].copy_from_slice(&value.to_le_bytes()[..length]);
}

/// Changes bytes of a file without a look at what they are.
pub fn mutate_bytes(random: &mut Random, file: &mut Vec<u8>) {
    let head = file.len().min(20_000);
    match random.below(6) {
        0 | 1 => {
            for _ in 0..=random.below(4) {
                let at = random.below(head);
                file[at] ^= 1 << random.below(8);
            }
        }
        2 => {
            let width = [1, 4, 8][random.below(3)];
            overwrite(file, random.below(head), width, random.edge());
        }
        3 => {
            let at = random.below(head);
            let end = (at + 1 + random.below(16)).min(file.len());
            file.drain(at..end);
        }
        4 => {
            let (at, from) = (random.below(head), random.below(head));
            let part: Vec<u8> = file[from..(from + 32).min(file.len())].to_vec();
            file.splice(at..at, part);
        }
        _ => {
            let length = [
                random.below(64),
                random.below(head),
                random.below(file.len()),
            ];
            file.truncate(length[random.below(3)]);
        }
    }
}
