//! What a bounded log keeps, as plain data: the newest entries, and of each subject the newest one although all around it
//! are gone.
//!
//! No lock, clock or waker lives here; [`Log`](super::Log) owns those. What an entry says is not known here, only what it
//! is about, whether that is an end, and what it weighs.
//!
//! ```text
//!  sequence   3 · · 17 · · · · 60 · · · 88 89 90 91
//!             └── kept ──────────┘      └─ recent ─┘   · was left out: a reader is told of a gap there
//! ```
//!
//! Invariants, each held by the walk below:
//! 1. All that is there is within the bound; only the newest entry is there whatever it weighs.
//! 2. An entry that left `recent` is kept if it is the newest of its subject, until a newer one comes.
//! 3. Ends and the rest have a third of the room each, where the oldest goes first: no flood of the one costs the other.

use std::collections::{BTreeMap, HashMap, VecDeque};

/// How much a log keeps. The newest entry is kept whatever its size.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Bound {
    pub(crate) entries: usize,
    pub(crate) bytes: usize,
}

impl Bound {
    fn holds(self, entries: usize, bytes: usize) -> bool {
        entries <= self.entries && bytes <= self.bytes
    }

    fn third(self) -> Self {
        Self {
            entries: self.entries / 3,
            bytes: self.bytes / 3,
        }
    }
}

/// What an entry is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Mark {
    /// Equal for those of which the newest is enough. An end's is never that of another.
    pub(crate) subject: u64,
    /// Whether it tells of an end.
    pub(crate) ends: bool,
}

#[derive(Debug)]
struct Entry<T> {
    item: T,
    mark: Mark,
    weight: usize,
}

/// The entries of a log, each with the number it had when it was written.
#[derive(Debug)]
pub(crate) struct Ring<T> {
    bound: Bound,
    /// How many were ever written.
    written: u64,
    /// The last ones, without a gap.
    recent: VecDeque<Entry<T>>,
    /// Those before that told of an end.
    ends: Kept<T>,
    /// The others before.
    rest: Kept<T>,
    /// The number of the newest of each subject of which any is there.
    newest: HashMap<u64, u64>,
    /// What all weigh together.
    bytes: usize,
}

/// The newest of their subjects, by number.
#[derive(Debug)]
struct Kept<T> {
    entries: BTreeMap<u64, Entry<T>>,
    bytes: usize,
}

impl<T> Ring<T> {
    pub(crate) fn new(bound: Bound) -> Self {
        Self {
            bound,
            written: 0,
            recent: VecDeque::new(),
            ends: Kept::new(),
            rest: Kept::new(),
            newest: HashMap::new(),
            bytes: 0,
        }
    }

    pub(crate) fn written(&self) -> u64 {
        self.written
    }

    /// Takes an entry in. Yields those that have no place any more, to be dropped where nobody waits for it.
    pub(crate) fn push(&mut self, item: T, mark: Mark, weight: usize) -> Vec<T> {
        let mut gone = Vec::new();
        let older = self.newest.insert(mark.subject, self.written);
        if let Some(older) = older
            && let Some(entry) = self.kept(mark).remove(older)
        {
            self.bytes -= entry.weight;
            gone.push(entry.item);
        }
        self.recent.push_back(Entry { item, mark, weight });
        self.written += 1;
        self.bytes += weight;
        while !self.is_within() && self.recent.len() > 1 {
            self.retire(&mut gone);
        }
        // One that weighs as much as all may.
        while !self.is_within()
            && let Some((_, entry)) = self.rest.pop().or_else(|| self.ends.pop())
        {
            self.forget(entry, &mut gone);
        }
        gone
    }

    /// The first entry that is there at that number or after it.
    pub(crate) fn at_or_after(&self, cursor: u64) -> Option<(u64, &T)> {
        let oldest = self.oldest_recent();
        if cursor < oldest {
            let kept = [&self.ends, &self.rest].map(|kept| kept.at_or_after(cursor));
            if let Some(first) = kept.into_iter().flatten().min_by_key(|(number, _)| *number) {
                return Some(first);
            }
        }
        let number = cursor.max(oldest);
        let place = usize::try_from(number - oldest).ok()?;
        Some((number, &self.recent.get(place)?.item))
    }

    fn oldest_recent(&self) -> u64 {
        self.written - self.recent.len() as u64
    }

    fn is_within(&self) -> bool {
        let entries = self.recent.len() + self.ends.entries.len() + self.rest.entries.len();
        self.bound.holds(entries, self.bytes)
    }

    fn kept(&mut self, mark: Mark) -> &mut Kept<T> {
        match mark.ends {
            true => &mut self.ends,
            false => &mut self.rest,
        }
    }

    /// Takes the oldest out of the recent ones, and keeps it if no newer one of its subject came.
    fn retire(&mut self, gone: &mut Vec<T>) {
        let number = self.oldest_recent();
        let Some(entry) = self.recent.pop_front() else {
            return;
        };
        if self.newest.get(&entry.mark.subject) != Some(&number) {
            self.bytes -= entry.weight;
            gone.push(entry.item);
            return;
        }
        let third = self.bound.third();
        let kept = self.kept(entry.mark);
        kept.put(number, entry);
        let mut out = Vec::new();
        while !third.holds(kept.entries.len(), kept.bytes)
            && let Some((_, entry)) = kept.pop()
        {
            out.push(entry);
        }
        for entry in out {
            self.forget(entry, gone);
        }
    }

    /// Nothing is left of a subject whose newest entry goes.
    fn forget(&mut self, entry: Entry<T>, gone: &mut Vec<T>) {
        self.newest.remove(&entry.mark.subject);
        self.bytes -= entry.weight;
        gone.push(entry.item);
    }
}

impl<T> Kept<T> {
    fn new() -> Self {
        Self {
            entries: BTreeMap::new(),
            bytes: 0,
        }
    }

    fn put(&mut self, number: u64, entry: Entry<T>) {
        self.bytes += entry.weight;
        self.entries.insert(number, entry);
    }

    fn remove(&mut self, number: u64) -> Option<Entry<T>> {
        let entry = self.entries.remove(&number)?;
        self.bytes -= entry.weight;
        Some(entry)
    }

    fn pop(&mut self) -> Option<(u64, Entry<T>)> {
        let (number, entry) = self.entries.pop_first()?;
        self.bytes -= entry.weight;
        Some((number, entry))
    }

    fn at_or_after(&self, cursor: u64) -> Option<(u64, &T)> {
        let (number, entry) = self.entries.range(cursor..).next()?;
        Some((*number, &entry.item))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    /// Two subjects of either sort, of different weight; an item is its own number and its subject.
    const ALPHABET: [(Mark, usize); 5] = [
        (mark(1, false), 1),
        (mark(2, false), 3),
        (mark(3, false), 1),
        (mark(4, true), 1),
        (mark(5, true), 2),
    ];

    const fn mark(subject: u64, ends: bool) -> Mark {
        Mark { subject, ends }
    }

    /// All that is there, in the order a reader finds it.
    fn there(ring: &Ring<u64>) -> Vec<u64> {
        let mut found = Vec::new();
        let mut cursor = 0;
        while let Some((number, item)) = ring.at_or_after(cursor) {
            assert!(number >= cursor, "a reader never goes back");
            assert_eq!(number, *item, "an entry keeps its number");
            found.push(number);
            cursor = number + 1;
        }
        found
    }

    /// The same by the rules alone, without any care for what it costs.
    struct Model {
        bound: Bound,
        there: Vec<(u64, Mark, usize)>,
        /// The number of the oldest of the recent ones.
        recent: u64,
        written: u64,
    }

    impl Model {
        fn push(&mut self, mark: Mark, weight: usize) {
            let recent = self.recent;
            self.there
                .retain(|(number, other, _)| *number >= recent || *other != mark);
            self.there.push((self.written, mark, weight));
            self.written += 1;
            while !self.is_within(self.bound, |_| true) && self.recent + 1 < self.written {
                self.retire();
            }
            while !self.is_within(self.bound, |_| true) && self.there.len() > 1 {
                let rest = self.there.iter().position(|(_, mark, _)| !mark.ends);
                let rest = rest.filter(|place| *place + 1 < self.there.len());
                self.there.remove(rest.unwrap_or(0));
            }
        }

        fn retire(&mut self) {
            let mut all = self.there.iter();
            let place = all.position(|(number, ..)| *number == self.recent);
            let place = place.expect("those that are recent are all there");
            let (_, mark, _) = self.there[place];
            self.recent += 1;
            if self.there[place + 1..]
                .iter()
                .any(|(_, other, _)| *other == mark)
            {
                self.there.remove(place);
            }
            let recent = self.recent;
            let is_kept = |(number, other, _): &(u64, Mark, usize)| {
                *number < recent && other.ends == mark.ends
            };
            while !self.is_within(self.bound.third(), is_kept) {
                let first = self.there.iter().position(is_kept);
                self.there
                    .remove(first.expect("nothing is within any bound"));
            }
        }

        fn is_within(&self, bound: Bound, which: impl Fn(&(u64, Mark, usize)) -> bool) -> bool {
            let all = || self.there.iter().filter(|entry| which(entry));
            bound.holds(all().count(), all().map(|(_, _, weight)| weight).sum())
        }
    }

    fn check(ring: &Ring<u64>, model: &Model, history: &[(Mark, usize)]) {
        let there = there(ring);
        let context = || format!("{history:?} leaves {there:?}");
        let expected: Vec<u64> = model.there.iter().map(|(number, ..)| *number).collect();
        assert_eq!(there, expected, "{}", context());
        let of = |number: u64| history[number as usize];
        let weight = there.iter().map(|number| of(*number).1).sum();
        let is_one = there.len() == 1;
        assert!(
            ring.bound.holds(there.len(), weight) || is_one,
            "{}",
            context()
        );
        assert_eq!(ring.bytes, weight, "{}", context());
        assert_eq!(there.last().copied(), Some(history.len() as u64 - 1));
        let subjects: HashSet<u64> = there.iter().map(|number| of(*number).0.subject).collect();
        assert_eq!(ring.newest.len(), subjects.len(), "{}", context());
        for number in there
            .iter()
            .take_while(|number| **number < ring.oldest_recent())
        {
            let later = &history[*number as usize + 1..];
            let is_newest = later.iter().all(|(mark, _)| *mark != of(*number).0);
            assert!(is_newest, "{number} is superseded: {}", context());
        }
        for cursor in 0..=history.len() as u64 {
            let found = ring.at_or_after(cursor).map(|(number, _)| number);
            let first = there.iter().copied().find(|number| *number >= cursor);
            assert_eq!(found, first, "from {cursor}: {}", context());
        }
    }

    #[test]
    fn every_history_leaves_the_newest_of_each_subject_within_the_bound() {
        const LENGTH: u32 = 7;
        let bounds = [(6, usize::MAX), (3, usize::MAX), (100, 9), (100, 2)];
        for (entries, bytes) in bounds {
            for code in 0..(ALPHABET.len() as u64).pow(LENGTH) {
                let bound = Bound { entries, bytes };
                let mut ring = Ring::new(bound);
                let mut model = Model {
                    bound,
                    there: Vec::new(),
                    recent: 0,
                    written: 0,
                };
                let mut history = Vec::new();
                let mut rest = code;
                for number in 0..u64::from(LENGTH) {
                    let (mark, weight) = ALPHABET[(rest % ALPHABET.len() as u64) as usize];
                    rest /= ALPHABET.len() as u64;
                    history.push((mark, weight));
                    model.push(mark, weight);
                    let gone = ring.push(number, mark, weight);
                    assert!(gone.iter().all(|gone| *gone < number), "the newest stays");
                }
                check(&ring, &model, &history);
            }
        }
    }

    #[test]
    fn a_flood_leaves_what_each_device_and_each_job_said_last() {
        let mut ring = Ring::new(Bound {
            entries: 30,
            bytes: usize::MAX,
        });
        let mut number = 0;
        let mut push = |mark| {
            ring.push(number, mark, 1);
            number += 1;
        };
        for device in 0..10 {
            push(mark(device, false));
            push(mark(100 + device, true));
        }
        for _ in 0..100_000 {
            push(mark(1000, false));
        }
        let last: Vec<u64> = (0..20).collect();
        assert_eq!(there(&ring)[..20], last);
        // Ends of ever new jobs cost the devices nothing.
        for job in 0..100_000 {
            ring.push(100_020 + job, mark(2000 + job, true), 1);
        }
        let devices: Vec<u64> = (0..10).map(|device| 2 * device).collect();
        assert_eq!(
            there(&ring)[..9],
            devices[1..],
            "the flood itself is one of ten"
        );
        assert!(ring.newest.len() <= 30);
    }
}
