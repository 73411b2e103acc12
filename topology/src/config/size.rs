//! Sizes with units.

use std::fmt;

/// Bytes, written with their unit: `22GiB`, `512 MB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(
    /// Bytes.
    pub u64,
);

/// Units, and the bytes that they are, largest first.
const UNITS: [(&str, u64); 8] = [
    ("TiB", 1 << 40),
    ("TB", 1_000_000_000_000),
    ("GiB", 1 << 30),
    ("GB", 1_000_000_000),
    ("MiB", 1 << 20),
    ("MB", 1_000_000),
    ("KiB", 1 << 10),
    ("KB", 1_000),
];

impl ByteSize {
    /// Reads a number with a unit, in whatever case; none for anything else, or for 0.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let text = text.trim();
        let at = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let (number, unit) = text.split_at(at);
        let number: f64 = number.parse().ok()?;
        let unit = unit.trim_start();
        let (_, unit_bytes) = UNITS
            .iter()
            .find(|(name, _)| unit.eq_ignore_ascii_case(name))?;
        let bytes = number * *unit_bytes as f64;
        (bytes >= 1.0 && bytes < u64::MAX as f64 / 2.0).then_some(Self(bytes as u64))
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let whole = UNITS
            .iter()
            .find(|(_, bytes)| self.0 > 0 && self.0.is_multiple_of(*bytes));
        match whole {
            Some((unit, bytes)) => write!(f, "{}{unit}", self.0 / bytes),
            // a size always has a unit
            None => write!(f, "{}KiB", self.0 as f64 / 1024.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_with_their_unit() {
        for (text, bytes) in [
            ("22GiB", 22 << 30),
            ("22 gib", 22 << 30),
            ("1.5GiB", 3 << 29),
            ("512MB", 512_000_000),
            (" 1TiB ", 1 << 40),
            ("4KB", 4000),
        ] {
            assert_eq!(ByteSize::parse(text), Some(ByteSize(bytes)), "{text}");
        }
        for text in [
            "",
            "22",
            "GiB",
            "22G",
            "-1GiB",
            "1e3GiB",
            "0GiB",
            "22GiBs",
            "1.2.3GiB",
            "inf GiB",
            "99999999999999TiB",
        ] {
            assert_eq!(ByteSize::parse(text), None, "{text}");
        }
    }

    #[test]
    fn sizes_are_read_back_as_they_were_printed() {
        for bytes in [
            1,
            1000,
            1024,
            1500,
            3 << 29,
            22 << 30,
            512_000_000,
            12_345_678_901,
        ] {
            let size = ByteSize(bytes);
            assert_eq!(ByteSize::parse(&size.to_string()), Some(size), "{size}");
        }
        assert_eq!(ByteSize(22 << 30).to_string(), "22GiB");
        assert_eq!(ByteSize(512_000_000).to_string(), "512MB");
    }
}
