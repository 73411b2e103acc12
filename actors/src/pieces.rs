//! Work of a stage, cut so that whoever is free takes what others have not begun.
//!
//! Each thread of a team has a part, cut into pieces of which each is half of what is left. A thread takes its own pieces
//! from the front, the large ones first; one that has none left takes the last ones of others. So nothing is lost where
//! all are equally fast, and a thread that is late (its neurons are more often active, or another program has its
//! processor) keeps the others waiting for one piece, not for its part.

use std::iter::FusedIterator;
use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::mailbox::Padded;
use crate::team::{Member, part_of};

/// Pieces of a part at most: the last two are a sixteenth each.
pub(crate) const PIECES_MAX: usize = 5;

/// Bytes that a piece reads at least. Taking one costs little, but asking for rows ahead begins anew with each: smaller ones were no
/// faster, and pieces of small layers slower than none.
const PIECE_BYTES: usize = 64 << 10;

/// Which pieces of each thread's part are taken: those from the front in the low half, those from the back in the high one.
#[derive(Debug)]
pub(crate) struct Claims(Vec<Padded<AtomicU32>>);

/// One of them from the back.
const BACK: u32 = 1 << 16;

impl Claims {
    /// Nothing is taken.
    pub fn new(n_threads: usize) -> Self {
        Self((0..n_threads).map(|_| Padded::default()).collect())
    }

    /// Gives all pieces back; between jobs, or a barrier after the last piece was taken.
    pub fn reset(&self) {
        self.0
            .iter()
            .for_each(|part| part.0.store(0, Ordering::Relaxed));
    }

    /// Takes a piece of the part of `thread`, from the front or the back.
    fn take(&self, thread: usize, n_pieces: usize, from_back: bool) -> Option<usize> {
        let taken = |claims: u32| ((claims % BACK) as usize, (claims / BACK) as usize);
        let add = if from_back { BACK } else { 1 };
        // what a piece reads was written before the job, and what it writes is read behind a barrier
        let before =
            self.0[thread]
                .0
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |claims| {
                    let (front, back) = taken(claims);
                    (front + back < n_pieces).then_some(claims + add)
                });
        let (front, back) = taken(before.ok()?);
        Some(if from_back {
            n_pieces - 1 - back
        } else {
            front
        })
    }
}

/// How a stage of `count` units is cut; the same for all threads.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    count: usize,
    multiple: usize,
    n_threads: usize,
    /// Pieces of each part.
    pub n_pieces: usize,
}

impl Cut {
    /// Parts are whole multiples of `multiple`, and consecutive; a unit reads `unit_bytes`.
    pub fn new(count: usize, multiple: usize, unit_bytes: usize, member: &Member<'_>) -> Self {
        let n_threads = member.n_threads;
        let part_bytes = count / n_threads * unit_bytes;
        let fits = |n_pieces: &usize| part_bytes >> (n_pieces - 1) >= PIECE_BYTES;
        let n_pieces = match n_threads {
            1 => 1,
            _ => (2..=PIECES_MAX).take_while(fits).last().unwrap_or(1),
        };
        Self {
            count,
            multiple,
            n_threads,
            n_pieces,
        }
    }

    /// The units of a piece.
    fn units(&self, part: usize, piece: usize) -> Range<usize> {
        let part = part_of(self.count, self.multiple, part, self.n_threads);
        let groups = part.len().div_ceil(self.multiple);
        let bound = |piece: usize| {
            let left = if piece == self.n_pieces {
                0
            } else {
                groups >> piece
            };
            part.start + ((groups - left) * self.multiple).min(part.len())
        };
        bound(piece)..bound(piece + 1)
    }

    /// Takes pieces until all of all threads are taken, as `member`.
    pub fn pieces<'a>(self, claims: &'a Claims, member: &Member<'_>) -> Pieces<'a> {
        Pieces {
            cut: self,
            claims,
            thread: member.thread,
            nth: 0,
        }
    }
}

/// A piece that its taker alone works on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Piece {
    /// Its place in order of units, counted over all parts.
    pub index: usize,
    /// Units; may be empty.
    pub units: Range<usize>,
}

/// What a thread takes.
#[derive(Debug)]
pub(crate) struct Pieces<'a> {
    cut: Cut,
    claims: &'a Claims,
    thread: usize,
    /// Parts that are used up: the own one, then those of the threads that follow.
    nth: usize,
}

impl Iterator for Pieces<'_> {
    type Item = Piece;

    fn next(&mut self) -> Option<Piece> {
        let Cut {
            n_threads,
            n_pieces,
            ..
        } = self.cut;
        while self.nth < n_threads {
            let own = self.nth == 0;
            let part = (self.thread + self.nth) % n_threads;
            if let Some(piece) = self.claims.take(part, n_pieces, !own) {
                return Some(Piece {
                    index: part * n_pieces + piece,
                    units: self.cut.units(part, piece),
                });
            }
            self.nth += 1;
        }
        None
    }
}

impl FusedIterator for Pieces<'_> {}

/// Where what was found in each piece lies.
#[derive(Debug)]
pub(crate) struct Found(Vec<Finding>);

/// In whose list, and which part of that.
#[derive(Debug, Default)]
struct Finding {
    thread: AtomicU32,
    start: AtomicU32,
    end: AtomicU32,
}

impl Found {
    /// For all pieces of so many threads.
    pub fn new(n_threads: usize) -> Self {
        let pieces = 0..n_threads * PIECES_MAX;
        Self(pieces.map(|_| Finding::default()).collect())
    }

    /// What was found in `piece` is `range` of the list of `thread`.
    pub fn note(&self, piece: usize, thread: usize, range: Range<usize>) {
        let finding = &self.0[piece];
        finding.thread.store(thread as u32, Ordering::Relaxed);
        finding.start.store(range.start as u32, Ordering::Relaxed);
        finding.end.store(range.end as u32, Ordering::Relaxed);
    }

    /// Threads and parts of their lists, in order of units; behind the barrier that all have reached with their last piece.
    pub fn in_order(&self, n_pieces: usize) -> impl Iterator<Item = (usize, Range<usize>)> + '_ {
        let get = |value: &AtomicU32| value.load(Ordering::Relaxed) as usize;
        let findings = self.0[..n_pieces].iter();
        findings.map(move |finding| {
            let range = get(&finding.start)..get(&finding.end);
            (get(&finding.thread), range)
        })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::atomic::AtomicUsize;

    use super::*;
    use crate::team::Team;
    use crate::wait::{Patience, SPIN};

    fn team(n_threads: usize) -> Team {
        let patience = Patience {
            spin: SPIN,
            limit: None,
        };
        Team::start("test", n_threads, patience, |_| Ok::<(), ()>(()), |_| ()).unwrap()
    }

    #[test]
    fn every_unit_is_taken_once_and_findings_come_in_order() {
        for n_threads in [1, 2, 3, 5] {
            let mut team = team(n_threads);
            let claims = Claims::new(n_threads);
            let found = Found::new(n_threads);
            for (count, multiple) in [(0, 16), (5, 16), (577, 16), (8192, 16), (1000, 1)] {
                for unit_bytes in [1, 200, 1 << 16] {
                    claims.reset();
                    let taken = Mutex::new(Vec::new());
                    let lists: Vec<Mutex<Vec<usize>>> =
                        (0..n_threads).map(|_| Mutex::default()).collect();
                    let n_pieces = AtomicUsize::new(0);
                    team.run(&|member| {
                        let cut = Cut::new(count, multiple, unit_bytes, &member);
                        n_pieces.store(cut.n_pieces * n_threads, Ordering::Relaxed);
                        for piece in cut.pieces(&claims, &member) {
                            taken.lock().unwrap().push(piece.units.clone());
                            let mut list = lists[member.thread].lock().unwrap();
                            let start = list.len();
                            list.extend(piece.units);
                            found.note(piece.index, member.thread, start..list.len());
                        }
                    });
                    let taken = taken.into_inner().unwrap();
                    let whole = |units: &Range<usize>| {
                        units.start.is_multiple_of(multiple)
                            && (units.end.is_multiple_of(multiple) || units.end == count)
                    };
                    assert!(taken.iter().filter(|units| !units.is_empty()).all(whole));
                    let in_order = found.in_order(n_pieces.into_inner());
                    let all = in_order
                        .flat_map(|(thread, range)| lists[thread].lock().unwrap()[range].to_vec());
                    assert!(all.eq(0..count), "{n_threads} threads, {count} units");
                }
            }
        }
    }

    #[test]
    fn pieces_halve_what_is_left_while_they_are_worth_taking() {
        let mut team = team(2);
        for (unit_bytes, n_pieces) in [(1 << 20, 5), (128, 3), (64, 2), (63, 1)] {
            team.run(&|member| {
                let cut = Cut::new(4096, 16, unit_bytes, &member);
                assert_eq!(cut.n_pieces, n_pieces, "{unit_bytes} bytes");
                let sizes: Vec<usize> = (0..n_pieces).map(|n| cut.units(1, n).len()).collect();
                let expected = [1024, 512, 256, 128, 128];
                let (last, halves) = sizes.split_last().unwrap();
                assert!(halves.iter().eq(&expected[..n_pieces - 1]), "{sizes:?}");
                assert_eq!(halves.last().unwrap_or(&2048), last);
            });
        }
    }

    #[test]
    fn a_late_thread_keeps_one_piece_and_the_others_take_the_rest() {
        let mut team = team(2);
        let claims = Claims::new(2);
        let units = [AtomicUsize::new(0), AtomicUsize::new(0)];
        let others_done = AtomicUsize::new(0);
        team.run(&|member| {
            let cut = Cut::new(4096, 16, 1 << 20, &member);
            for piece in cut.pieces(&claims, &member) {
                units[member.thread].fetch_add(piece.units.len(), Ordering::Relaxed);
                // thread 1 stays in its first piece until thread 0 finds nothing more
                while member.thread == 1 && others_done.load(Ordering::Acquire) == 0 {
                    std::thread::yield_now();
                }
            }
            if member.thread == 0 {
                // thread 1 has begun, or everything is done
                others_done.store(1, Ordering::Release);
            }
        });
        let [quick, late] = units.map(AtomicUsize::into_inner);
        assert_eq!(quick + late, 4096);
        assert!(late <= 1024, "{late} units of the late thread");
    }
}
