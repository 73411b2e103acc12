//! How much of some memory the kernel really has in huge pages: asking for them gives none where memory is in pieces.

use std::fmt;
use std::fs;
use std::ops::Range;

use serde::Serialize;

use crate::memory::kib_entry_bytes;
use crate::reserved_pages::HUGE_PAGE_BYTES;

/// Share of the weights that has to be in huge pages where they are required.
pub(crate) const HUGE_PERCENT_MIN: usize = 90;

/// What of some memory lies in huge pages, transparent or set aside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct HugeShare {
    /// Bytes that do.
    pub huge_bytes: usize,
    /// Bytes that could: all but the ends of areas that are no whole page.
    pub of_bytes: usize,
}

impl HugeShare {
    /// The share in per cent, rounded down.
    pub fn percent(&self) -> usize {
        (100.0 * self.huge_bytes as f64 / self.of_bytes.max(1) as f64) as usize
    }
}

impl fmt::Display for HugeShare {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let megabytes = |bytes: usize| bytes as f64 / 1e6;
        let (huge, all) = (megabytes(self.huge_bytes), megabytes(self.of_bytes));
        write!(f, "{huge:.1} of {all:.1} MB ({} %)", self.percent())
    }
}

/// What of `areas` of this process lies in huge pages; none where no page fits into them, or the system does not tell.
pub(crate) fn huge_share(areas: &[Range<usize>]) -> Option<HugeShare> {
    share_in(&fs::read_to_string("/proc/self/smaps").ok()?, areas)
}

/// The same by the text of `smaps`. An area may be in several mappings, and a mapping may hold several areas.
fn share_in(smaps: &str, areas: &[Range<usize>]) -> Option<HugeShare> {
    let whole = |area: &Range<usize>| area.len() / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
    let of_bytes: usize = areas.iter().map(whole).sum();
    let mut huge_bytes = 0;
    let (mut is_ours, mut is_known) = (false, false);
    for line in smaps.lines() {
        if let Some(mapping) = mapping(line) {
            let meets = |area: &Range<usize>| {
                whole(area) > 0 && area.start < mapping.end && mapping.start < area.end
            };
            is_ours = areas.iter().any(meets);
        } else if is_ours {
            for key in ["AnonHugePages:", "Private_Hugetlb:", "Shared_Hugetlb:"] {
                if let Some(bytes) = kib_entry_bytes(line, key) {
                    huge_bytes += bytes as usize;
                    is_known = true;
                }
            }
        }
    }
    // a page at the end of an area may reach beyond it
    let huge_bytes = huge_bytes.min(of_bytes);
    (of_bytes > 0 && is_known).then_some(HugeShare {
        huge_bytes,
        of_bytes,
    })
}

/// The addresses in a mapping's first line, `7f00-7f20 rw-p …`.
fn mapping(line: &str) -> Option<Range<usize>> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    Some(address(start)?..address(end)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::arena::Arena;
    use crate::config::HugePages;

    const SMAPS: &str = "\
200000-a00000 rw-p 00000000 00:00 0
Rss:                8192 kB
AnonHugePages:      4096 kB
Private_Hugetlb:       0 kB
VmFlags: rd wr mr mw me ac sd hg
a00000-e00000 rw-p 00000000 00:00 0
AnonHugePages:         0 kB
Private_Hugetlb:    4096 kB
f00000-1300000 rw-p 00000000 00:00 0                          [heap]
AnonHugePages:      4096 kB
";

    const MIB: usize = 1 << 20;

    #[test]
    fn huge_pages_are_counted_in_the_areas_mappings() {
        let share = |areas: &[Range<usize>]| {
            share_in(SMAPS, areas).map(|share| (share.huge_bytes / MIB, share.of_bytes / MIB))
        };
        let first = 0x20_0000..0xa0_0000;
        let second = 0xa0_0000..0xe0_0000;
        assert_eq!(share(std::slice::from_ref(&first)), Some((4, 8)));
        assert_eq!(share(std::slice::from_ref(&second)), Some((4, 4)));
        assert_eq!(share(&[first, second]), Some((8, 12)));
        // several areas of one mapping, which is counted once
        assert_eq!(
            share(&[0x20_0000..0x60_0000, 0x60_0000..0xa0_0000]),
            Some((4, 8))
        );
        // an area that ends in the middle of a page
        let odd = 0xa0_0000..0xd0_1000;
        assert_eq!(share(std::slice::from_ref(&odd)), Some((2, 2)));
        for nothing in [0x20_0000..0x30_0000, 0x4000_0000..0x5000_0000] {
            assert_eq!(share(std::slice::from_ref(&nothing)), None);
        }
        let any = 0..8 * MIB;
        assert_eq!(share_in("no such text", std::slice::from_ref(&any)), None);
    }

    #[test]
    fn the_share_is_said_in_words() {
        let share = HugeShare {
            huge_bytes: 9_990_000,
            of_bytes: 100_000_000,
        };
        assert_eq!(share.percent(), 9);
        assert_eq!(share.to_string(), "10.0 of 100.0 MB (9 %)");
    }

    /// The kernel's own count: none where they are forbidden.
    #[cfg(target_os = "linux")]
    #[test]
    fn small_pages_are_no_huge_ones() {
        let mut arena = Arena::new(8 * HUGE_PAGE_BYTES, None, HugePages::Off).unwrap();
        arena.as_mut_slice().fill(1);
        let start = arena.as_slice().as_ptr().addr();
        let area = start..start + arena.len();
        let Some(share) = huge_share(std::slice::from_ref(&area)) else {
            eprintln!("skipped: this system does not tell");
            return;
        };
        assert_eq!((share.huge_bytes, share.percent()), (0, 0));
    }
}
