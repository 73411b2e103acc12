//! One node's memory: zero pages, bound to the node, in huge pages where there are any.

use std::ops::Range;
#[cfg(target_os = "linux")]
use std::path::Path;
use std::sync::Once;

use bytes::Bytes;
use memmap2::{MmapMut, MmapOptions};
use tracing::{debug, warn};

use crate::arena_writer::ArenaWriter;
use crate::config::HugePages;
use crate::error::TopologyError;
use crate::memory::available_memory_bytes;
use crate::reserved_pages::{HUGE_PAGE_BYTES, have_room};

/// Where Linux says whether transparent huge pages may be asked for.
#[cfg(target_os = "linux")]
const HUGE_PAGE_SETTING: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

/// Memory on one NUMA node.
///
/// It reads as zeros; its pages are taken when they are first written to, or at once where they are
/// huge pages that were set aside. The address is a multiple of 2 MiB where the arena is at least as
/// large, else of the page size.
#[derive(Debug)]
pub struct Arena {
    map: MmapMut,
    /// Bytes of `map` that are the arena.
    range: Range<usize>,
}

impl Arena {
    /// Reserves `bytes` of memory on NUMA node `numa`, as the system numbers it.
    ///
    /// On a machine with one node, and where the system does not let this process bind memory
    /// (logged), pages come from the node of the thread that first writes to them.
    ///
    /// # Errors
    /// There is not so much memory, no such node, or no huge pages where they are required.
    pub fn new(
        bytes: usize,
        numa: Option<usize>,
        huge_pages: HugePages,
    ) -> Result<Self, TopologyError> {
        Self::on(bytes, numa.as_slice(), huge_pages, false)
    }

    /// Reserves `bytes` of memory on NUMA nodes `numas`, whose pages go round them; anywhere without any.
    ///
    /// # Errors
    /// As [`Arena::new`]; with `strict` also where the system does not bind memory.
    pub(crate) fn on(
        bytes: usize,
        numas: &[usize],
        huge_pages: HugePages,
        strict: bool,
    ) -> Result<Self, TopologyError> {
        if huge_pages != HugePages::Off
            && let Some(arena) = Self::of_reserved_pages(bytes, numas, strict)?
        {
            return Ok(arena);
        }
        if huge_pages == HugePages::Require {
            require_huge_pages()?;
        }
        if let Some(available_bytes) = available_memory_bytes().filter(|&a| bytes as u64 > a) {
            return Err(TopologyError::NotEnoughMemory {
                purpose: "an arena",
                bytes: bytes as u64,
                available_bytes,
            });
        }
        let arena = Self::map(bytes)?;
        if bytes > 0 && !numas.is_empty() {
            bind(arena.as_slice(), numas, strict)?;
        }
        arena.advise(huge_pages)?;
        Ok(arena)
    }

    /// An arena of huge pages that were set aside; none where there are too few for all of it.
    #[cfg(target_os = "linux")]
    fn of_reserved_pages(
        bytes: usize,
        numas: &[usize],
        strict: bool,
    ) -> Result<Option<Self>, TopologyError> {
        const HUGE_PAGE_BITS: u8 = 21;
        if bytes < HUGE_PAGE_BYTES || !have_room(Path::new("/"), numas, bytes) {
            return Ok(None);
        }
        let mut options = MmapOptions::new();
        options
            .len(bytes.next_multiple_of(HUGE_PAGE_BYTES))
            .huge(Some(HUGE_PAGE_BITS));
        let Ok(map) = options.map_anon() else {
            return Ok(None);
        };
        if !numas.is_empty() {
            bind(&map, numas, strict)?;
        }
        // A page that somebody else took meanwhile would end the program when it is written to; here it is an error.
        match map.advise(memmap2::Advice::PopulateWrite) {
            Ok(()) => {
                debug!(bytes, "memory in huge pages that were set aside");
                let range = 0..bytes;
                Ok(Some(Self { map, range }))
            }
            Err(error) => {
                debug!(%error, bytes, "huge pages that were set aside cannot be had");
                Ok(None)
            }
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn of_reserved_pages(
        _bytes: usize,
        _numas: &[usize],
        _strict: bool,
    ) -> Result<Option<Self>, TopologyError> {
        Ok(None)
    }

    fn map(bytes: usize) -> Result<Self, TopologyError> {
        let slack_bytes = match bytes >= HUGE_PAGE_BYTES {
            true => HUGE_PAGE_BYTES,
            false => 0,
        };
        // Too large a number ends as an address space that is refused.
        let map = MmapOptions::new()
            .len(bytes.saturating_add(slack_bytes))
            .map_anon()
            .map_err(|source| TopologyError::Map { bytes, source })?;
        let start = match slack_bytes {
            0 => 0,
            _ => map.as_ptr().align_offset(HUGE_PAGE_BYTES),
        };
        let range = start..start + bytes;
        Ok(Self { map, range })
    }

    #[cfg(target_os = "linux")]
    fn advise(&self, huge_pages: HugePages) -> Result<(), TopologyError> {
        let advice = match huge_pages {
            HugePages::Try | HugePages::Require => memmap2::Advice::HugePage,
            HugePages::Off => memmap2::Advice::NoHugePage,
        };
        let advised = self
            .map
            .advise_range(advice, self.range.start, self.range.len());
        match (advised, huge_pages) {
            (Err(error), HugePages::Require) => Err(TopologyError::HugePages {
                problem: format!("the system refuses them ({error})"),
            }),
            (Err(error), HugePages::Try | HugePages::Off) => {
                debug!(%error, ?huge_pages, "the system takes no advice on huge pages");
                Ok(())
            }
            (Ok(()), _) => Ok(()),
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn advise(&self, _huge_pages: HugePages) -> Result<(), TopologyError> {
        Ok(())
    }

    /// Bytes of the arena.
    pub fn len(&self) -> usize {
        self.range.len()
    }

    /// Whether it has no bytes.
    pub fn is_empty(&self) -> bool {
        self.range.is_empty()
    }

    /// All of it, to read.
    pub fn as_slice(&self) -> &[u8] {
        &self.map[self.range.clone()]
    }

    /// All of it, to write; divide it among threads with [`slice::split_at_mut`].
    pub fn as_mut_slice(&mut self) -> &mut [u8] {
        &mut self.map[self.range.clone()]
    }

    /// Nothing more is written: the memory as shared bytes, where it lies, freed with the last of
    /// them.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(FrozenArena(self))
    }

    /// The same, and what writes to it again while nobody reads it.
    pub fn freeze_with_writer(self) -> (Bytes, ArenaWriter) {
        ArenaWriter::new(self.map.into(), self.range)
    }
}

/// Keeps the memory for as long as bytes of it are in use.
struct FrozenArena(Arena);

impl AsRef<[u8]> for FrozenArena {
    fn as_ref(&self) -> &[u8] {
        self.0.as_slice()
    }
}

#[cfg(feature = "hwloc")]
fn bind(area: &[u8], numas: &[usize], strict: bool) -> Result<(), TopologyError> {
    use crate::hwloc::{AreaBinding, bind_area, has_several_nodes};

    if !has_several_nodes()? {
        return Ok(());
    }
    match bind_area(area, numas)? {
        AreaBinding::Bound => {
            debug!(?numas, bytes = area.len(), "bound memory");
            Ok(())
        }
        AreaBinding::Unsupported(problem) => unbound_memory(numas[0], &problem, strict),
    }
}

#[cfg(not(feature = "hwloc"))]
fn bind(_area: &[u8], numas: &[usize], strict: bool) -> Result<(), TopologyError> {
    unbound_memory(numas[0], "built without the feature hwloc", strict)
}

/// An error where binding is `strict`, else a warning, once.
fn unbound_memory(numa: usize, problem: &str, strict: bool) -> Result<(), TopologyError> {
    if strict {
        return Err(TopologyError::NotBound {
            numa,
            problem: problem.to_owned(),
        });
    }
    static WARNED: Once = Once::new();
    WARNED.call_once(|| {
        warn!(
            numa,
            problem, "memory is not bound: pages go to the node of the thread that first writes"
        );
    });
    Ok(())
}

#[cfg(target_os = "linux")]
fn require_huge_pages() -> Result<(), TopologyError> {
    check_setting(std::fs::read_to_string(HUGE_PAGE_SETTING).ok().as_deref())
}

#[cfg(not(target_os = "linux"))]
fn require_huge_pages() -> Result<(), TopologyError> {
    check_setting(None)
}

/// Whether the system's setting, such as `always [madvise] never`, allows huge pages.
fn check_setting(setting: Option<&str>) -> Result<(), TopologyError> {
    let problem = match setting {
        Some(setting) if !setting.contains("[never]") => return Ok(()),
        Some(_) => "this system's setting is \"never\"",
        None => "this system has no transparent huge pages",
    };
    Err(TopologyError::HugePages {
        problem: problem.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_zero_and_aligned() {
        for (bytes, align_bytes) in [
            (1, 4096),
            (4097, 4096),
            (HUGE_PAGE_BYTES - 1, 4096),
            (HUGE_PAGE_BYTES, HUGE_PAGE_BYTES),
            (5 * HUGE_PAGE_BYTES + 3, HUGE_PAGE_BYTES),
        ] {
            for huge_pages in [HugePages::Try, HugePages::Off] {
                let mut arena = Arena::new(bytes, Some(0), huge_pages).unwrap();
                assert_eq!(arena.len(), bytes);
                assert_eq!(arena.as_slice().as_ptr().addr() % align_bytes, 0);
                assert!(arena.as_slice().iter().all(|&byte| byte == 0));
                arena.as_mut_slice().fill(7);
                assert!(arena.as_slice().iter().all(|&byte| byte == 7));
            }
        }
    }

    #[test]
    fn memory_that_is_not_bound_is_an_error_where_that_is_asked_for() {
        unbound_memory(1, "not permitted", false).unwrap();
        let error = unbound_memory(1, "not permitted", true).unwrap_err();
        assert!(error.is_environment());
        assert_eq!(
            error.to_string(),
            "memory.strict = true, but memory is not bound to NUMA node 1: not permitted; allow it (docker run --cap-add SYS_NICE), or set strict = false"
        );
    }

    #[test]
    fn an_arena_may_be_empty() {
        let arena = Arena::new(0, Some(0), HugePages::Try).unwrap();
        assert!(arena.is_empty());
        assert_eq!(arena.freeze(), Bytes::new());
    }

    #[test]
    fn threads_write_parts_and_freezing_copies_nothing() {
        let mut arena = Arena::new(3 << 20, None, HugePages::Try).unwrap();
        let address = arena.as_slice().as_ptr();
        let (low, high) = arena.as_mut_slice().split_at_mut(1 << 20);
        std::thread::scope(|scope| {
            scope.spawn(|| low.fill(1));
            scope.spawn(|| high.fill(2));
        });
        let bytes = arena.freeze();
        assert_eq!(bytes.as_ptr(), address);
        let part = bytes.slice((1 << 20) - 2..(1 << 20) + 2);
        drop(bytes);
        assert_eq!(part[..], [1, 1, 2, 2]);
    }

    #[test]
    fn pages_are_taken_when_written() {
        let bytes = 1 << 30;
        let before = crate::memory::current_rss_bytes();
        let arena = Arena::new(bytes, None, HugePages::Try).unwrap();
        let after = crate::memory::current_rss_bytes();
        if let Some((before, after)) = before.zip(after) {
            // Other tests of the process take memory of their own meanwhile.
            assert!(after < before + (bytes / 2) as u64, "{before} → {after}");
        }
        assert_eq!(arena.len(), bytes);
    }

    #[test]
    fn more_memory_than_there_is_is_an_error() {
        for bytes in [1 << 50, isize::MAX as usize, usize::MAX] {
            let error = Arena::new(bytes, None, HugePages::Try).unwrap_err();
            assert!(error.is_environment());
            let text = error.to_string();
            assert!(text.contains(&format!("{bytes} bytes of memory")), "{text}");
            let error = Arena::map(bytes).unwrap_err();
            assert!(error.is_environment());
            let text = error.to_string();
            assert!(
                text.starts_with(&format!("the system refuses {bytes} bytes of memory: ")),
                "{text}"
            );
        }
    }

    #[test]
    fn huge_pages_can_be_required() {
        check_setting(Some("always [madvise] never\n")).unwrap();
        check_setting(Some("[always] madvise never\n")).unwrap();
        let error = check_setting(Some("always madvise [never]\n")).unwrap_err();
        assert!(!error.is_environment(), "a file asks for what there is not");
        assert_eq!(
            error.to_string(),
            "huge_pages = \"require\", but this system's setting is \"never\": as root, echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, or set pages aside (vm.nr_hugepages), or set huge_pages = \"try\""
        );
        assert_eq!(
            check_setting(None).unwrap_err().to_string(),
            "huge_pages = \"require\", but this system has no transparent huge pages: as root, echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, or set pages aside (vm.nr_hugepages), or set huge_pages = \"try\""
        );
    }

    /// The kernel's own count of huge pages in a mapping.
    #[cfg(target_os = "linux")]
    #[test]
    fn huge_pages_are_had_where_the_system_has_them() {
        if require_huge_pages().is_err() {
            eprintln!("skipped: no transparent huge pages here");
            return;
        }
        if have_room(Path::new("/"), &[], 16 * HUGE_PAGE_BYTES) {
            eprintln!("skipped: they are taken from those that were set aside");
            return;
        }
        let mut arena = Arena::new(16 * HUGE_PAGE_BYTES, None, HugePages::Require).unwrap();
        arena.as_mut_slice().fill(1);
        let address = arena.as_slice().as_ptr().addr();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut is_ours = false;
        let mut flags = String::new();
        for line in smaps.lines() {
            let first = line.split(' ').next().unwrap_or("");
            if let Some((start, end)) = first.split_once('-') {
                let bounds = usize::from_str_radix(start, 16)
                    .ok()
                    .zip(usize::from_str_radix(end, 16).ok());
                is_ours = bounds.is_some_and(|(start, end)| (start..end).contains(&address));
            } else if is_ours && line.starts_with("VmFlags:") {
                flags = line.to_owned();
            }
        }
        assert!(flags.split(' ').any(|flag| flag == "hg"), "{flags}");
    }
}
