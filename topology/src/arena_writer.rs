//! Writing again to a node's memory that has been frozen, while nobody reads it.

use std::ops::Range;
use std::sync::Arc;

use bytes::Bytes;
use memmap2::MmapRaw;

/// Writes to memory that others have as [`Bytes`].
///
/// The mapping is known to the program by its address alone: [`Bytes`] keep that too, and make a slice each time that they are
/// asked for one. So the memory may change while no such slice lives.
#[derive(Debug, Clone)]
pub struct ArenaWriter {
    memory: Arc<Memory>,
}

/// A mapping, and the part of it that is used.
#[derive(Debug)]
struct Memory {
    map: MmapRaw,
    range: Range<usize>,
}

/// Keeps the memory for as long as bytes of it are in use.
struct Owner(Arc<Memory>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        let Memory { map, range } = &*self.0;
        // SAFETY: the range is in the mapping, all of which is initialised, and which lives as long as `self`. It is asked for
        // once, when the bytes are made: nobody writes yet.
        unsafe { std::slice::from_raw_parts(map.as_ptr().add(range.start), range.len()) }
    }
}

impl ArenaWriter {
    /// The part `range` of `map` as shared bytes, and what writes to it.
    pub(crate) fn new(map: MmapRaw, range: Range<usize>) -> (Bytes, Self) {
        assert!(
            range.start <= range.end && range.end <= map.len(),
            "{range:?} of {}",
            map.len()
        );
        let memory = Arc::new(Memory { map, range });
        let bytes = Bytes::from_owner(Owner(Arc::clone(&memory)));
        (bytes, Self { memory })
    }

    /// Bytes of the memory.
    pub fn len(&self) -> usize {
        self.memory.range.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.memory.range.is_empty()
    }

    /// Overwrites what lies at `at ..`.
    ///
    /// # Safety
    /// While this runs nobody else reads or writes these bytes, and no slice of them lives, on any thread or device. Who reads
    /// them later learns of it by something that orders memory.
    ///
    /// # Panics
    /// When `bytes` do not fit there.
    pub unsafe fn write(&self, at: usize, bytes: &[u8]) {
        let Memory { map, range } = &*self.memory;
        let fits = at
            .checked_add(bytes.len())
            .is_some_and(|end| end <= range.len());
        assert!(fits, "{} bytes at {at} of {}", bytes.len(), range.len());
        // SAFETY: inside the mapping, which can be written; `bytes` are not of it, or a slice of it would live; nobody else
        // touches it (this function's contract).
        unsafe {
            let to = map.as_mut_ptr().add(range.start + at);
            std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len());
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::Arena;
    use crate::config::HugePages;

    #[test]
    fn what_is_written_is_read_and_nothing_else_changes() {
        let mut arena = Arena::new((3 << 20) + 5, None, HugePages::Try).unwrap();
        arena.as_mut_slice().fill(7);
        let address = arena.as_slice().as_ptr();
        let (bytes, writer) = arena.freeze_with_writer();
        assert_eq!((bytes.as_ptr(), writer.len()), (address, bytes.len()));
        let part = bytes.slice(100..110);
        // SAFETY: this thread alone has the memory, and no slice of it lives.
        unsafe {
            writer.write(102, &[1, 2, 3]);
            writer.write(bytes.len() - 1, &[9]);
        }
        assert_eq!(part[..], [7, 7, 1, 2, 3, 7, 7, 7, 7, 7]);
        assert_eq!(bytes.last(), Some(&9));
        let others = bytes.iter().filter(|byte| **byte != 7).count();
        assert_eq!(others, 4);
        drop(bytes);
        // SAFETY: as above.
        unsafe { writer.write(109, &[4]) };
        assert_eq!(part[9], 4, "the memory lives as long as somebody has it");
    }

    #[test]
    #[should_panic(expected = "2 bytes at 15 of 16")]
    fn what_does_not_fit_is_refused() {
        let (_bytes, writer) = Arena::new(16, None, HugePages::Off)
            .unwrap()
            .freeze_with_writer();
        // SAFETY: as above.
        unsafe { writer.write(15, &[0, 0]) };
    }
}
