//! A bounded queue of events for those who want a stream instead of a sink.
//!
//! Knows nothing of the connection. Past its limit it keeps the newest event of each device or
//! job and says how many it left out and where, so that a slow reader knows when to look anew.
//! What ends something is left out last.

use std::{
    collections::{HashMap, VecDeque},
    fmt,
    hash::{BuildHasher as _, RandomState},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
};

use futures::Stream;

use crate::{
    error::Closed,
    event::{Event, EventSink},
};

/// Makes a sink and the stream that it feeds.
///
/// Holds about `capacity` events. At the limit an event replaces the older one of the same
/// name and device, job or id; where there is none, the oldest that ends nothing is left out.
/// Events that end something (a shutdown, a deleted device, a finished job or migration) are
/// left out only when `capacity` of those alone wait as well.
#[must_use]
pub fn events(capacity: usize) -> (EventQueue, Events) {
    let shared = Arc::new(Mutex::new(Queue {
        capacity: capacity.max(1),
        hasher: RandomState::new(),
        slots: VecDeque::new(),
        held: 0,
        known: 0,
        newest: HashMap::new(),
        lasting: 0,
        next: 0,
        missed: 0,
        closed: None,
        abandoned: false,
        waker: None,
    }));
    (EventQueue(Arc::clone(&shared)), Events(shared))
}

/// The sink that feeds [`Events`]. Dropping it without [`EventSink::closed`] ends the stream.
pub struct EventQueue(Arc<Mutex<Queue>>);

/// The stream of a connection's events; its last item is [`Notice::Closed`].
pub struct Events(Arc<Mutex<Queue>>);

/// What [`Events`] yields.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Notice {
    /// An event.
    Event(Event),
    /// So many events were left out before the next one: look at the state anew.
    Gap(u64),
    /// The connection ended.
    Closed(Closed),
}

struct Queue {
    capacity: usize,
    hasher: RandomState,
    /// In the order of their places.
    slots: VecDeque<Slot>,
    /// Slots that are not empty.
    held: usize,
    /// From this place on the entries have no subject yet.
    known: u64,
    /// The newest entry of each subject that is known.
    newest: HashMap<u64, u64>,
    /// Entries that are known to end something.
    lasting: usize,
    next: u64,
    /// Left out since the reader was last told.
    missed: u64,
    closed: Option<Closed>,
    abandoned: bool,
    waker: Option<Waker>,
}

/// Where an event is, or was until it was left out from between others.
struct Slot {
    place: u64,
    entry: Option<Entry>,
}

struct Entry {
    event: Event,
    /// Looked for only once there is no room: a reader that keeps up never pays for it.
    subject: Option<Subject>,
}

/// What an event is about.
#[derive(Clone, Copy)]
struct Subject {
    hash: u64,
    /// Whether it tells of an end.
    lasting: bool,
}

impl Subject {
    fn of(event: &Event, hasher: &RandomState) -> Self {
        let subject = event.subject();
        Self {
            hash: hasher.hash_one(&subject),
            lasting: subject.ends(),
        }
    }
}

/// A queue that is read empty keeps room for so many events, and no more.
const IDLE_SLOTS: usize = 64;

impl Queue {
    fn push(&mut self, event: Event) {
        let entry = Some(Entry {
            event,
            subject: None,
        });
        let place = self.next;
        self.slots.push_back(Slot { place, entry });
        self.next += 1;
        self.held += 1;
        if self.held > self.capacity {
            self.make_room();
        }
        // As many empty slots as events: each of them has paid for being looked at once.
        if self.slots.len() > 2 * self.held.max(IDLE_SLOTS) {
            self.slots.retain(|slot| slot.entry.is_some());
        }
    }

    /// Gives every entry its subject, then leaves one out, or none if only ends are left and
    /// there is room for them.
    fn make_room(&mut self) {
        let newcomer = self.next - 1;
        let fresh = self.slots.partition_point(|slot| slot.place < self.known);
        for slot in self.slots.range_mut(fresh..) {
            let Some(entry) = &mut slot.entry else {
                continue;
            };
            let subject = *entry
                .subject
                .insert(Subject::of(&entry.event, &self.hasher));
            if slot.place != newcomer {
                self.newest.insert(subject.hash, slot.place);
                self.lasting += usize::from(subject.lasting);
            }
        }
        self.known = self.next;

        let last = self.slots.back().and_then(|slot| slot.entry.as_ref());
        let Some(subject) = last.and_then(|entry| entry.subject) else {
            return;
        };
        let others = self.held - 1;
        if let Some(&older) = self.newest.get(&subject.hash) {
            self.remove(older);
            self.missed += 1;
        } else if !subject.lasting || self.lasting >= self.capacity {
            self.leave_one_out(newcomer, subject.lasting);
        } else if others > self.lasting {
            self.leave_one_out(newcomer, false);
        }
        self.newest.insert(subject.hash, newcomer);
        self.lasting += usize::from(subject.lasting);
    }

    /// Leaves out the oldest event that has a newer one of its subject behind it, else the
    /// oldest; of those that end something only if `lasting`.
    fn leave_one_out(&mut self, newcomer: u64, lasting: bool) {
        let allowed = || {
            let earlier = self.slots.iter().filter(|slot| slot.place != newcomer);
            earlier
                .filter_map(|slot| Some((slot.place, slot.entry.as_ref()?.subject?)))
                .filter(|(_, subject)| lasting || !subject.lasting)
        };
        let superseded = allowed().find(|(place, subject)| self.newest[&subject.hash] != *place);
        if let Some((place, _)) = superseded.or_else(|| allowed().next()) {
            self.remove(place);
            self.missed += 1;
        }
    }

    fn pop(&mut self) -> Option<Event> {
        while let Some(Slot { place, entry }) = self.slots.pop_front() {
            if let Some(entry) = entry {
                return Some(self.forget(place, entry));
            }
        }
        if self.slots.capacity() > 16 * IDLE_SLOTS {
            self.slots.shrink_to(IDLE_SLOTS);
        }
        None
    }

    fn remove(&mut self, place: u64) {
        let found = self.slots.binary_search_by_key(&place, |slot| slot.place);
        let slot = found.ok().and_then(|at| self.slots.get_mut(at));
        if let Some(entry) = slot.and_then(|slot| slot.entry.take()) {
            self.forget(place, entry);
        }
    }

    fn forget(&mut self, place: u64, entry: Entry) -> Event {
        self.held -= 1;
        if let Some(subject) = entry.subject {
            self.lasting -= usize::from(subject.lasting);
            if self.newest.get(&subject.hash) == Some(&place) {
                self.newest.remove(&subject.hash);
            }
        }
        entry.event
    }
}

fn lock(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

impl EventQueue {
    fn change(&self, change: impl FnOnce(&mut Queue)) {
        let mut queue = lock(&self.0);
        change(&mut queue);
        let waker = queue.waker.take();
        drop(queue);
        if let Some(waker) = waker {
            waker.wake();
        }
    }
}

impl EventSink for EventQueue {
    fn event(&mut self, event: Event) {
        self.change(|queue| queue.push(event));
    }

    fn closed(&mut self, why: &Closed) {
        self.change(|queue| queue.closed = Some(why.clone()));
    }
}

impl Drop for EventQueue {
    fn drop(&mut self) {
        self.change(|queue| queue.abandoned = true);
    }
}

impl Stream for Events {
    type Item = Notice;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Notice>> {
        let mut queue = lock(&self.0);
        if queue.missed > 0 {
            return Poll::Ready(Some(Notice::Gap(std::mem::take(&mut queue.missed))));
        }
        if let Some(event) = queue.pop() {
            return Poll::Ready(Some(Notice::Event(event)));
        }
        if let Some(why) = queue.closed.take() {
            return Poll::Ready(Some(Notice::Closed(why)));
        }
        if queue.abandoned {
            return Poll::Ready(None);
        }
        queue.waker = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl fmt::Debug for EventQueue {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventQueue").finish_non_exhaustive()
    }
}

impl fmt::Debug for Events {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Events").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use futures::{FutureExt as _, StreamExt as _};
    use serde_json::{Value, json, value::to_raw_value};

    use super::*;
    use crate::event::Timestamp;

    fn feed(queue: &mut EventQueue, name: &str, data: Value) {
        queue.event(Event {
            name: name.to_owned(),
            data: Some(to_raw_value(&data).unwrap()),
            timestamp: Timestamp::default(),
            sequence: 0,
        });
    }

    /// All that is there, as text; gaps as `-n`.
    fn drain(stream: &mut Events) -> Vec<String> {
        let mut seen = Vec::new();
        while let Some(Some(notice)) = stream.next().now_or_never() {
            seen.push(match notice {
                Notice::Event(event) => format!("{} {}", event.name, event.data.unwrap().get()),
                Notice::Gap(missed) => format!("-{missed}"),
                Notice::Closed(why) => why.to_string(),
            });
        }
        seen
    }

    #[test]
    fn a_slow_reader_gets_the_newest_of_each_subject_and_the_gap() {
        let (mut queue, mut stream) = events(3);
        for offset in 0..1000 {
            feed(&mut queue, "RTC_CHANGE", json!({"offset": offset}));
        }
        feed(
            &mut queue,
            "VSERPORT_CHANGE",
            json!({"id": "a", "open": true}),
        );
        feed(
            &mut queue,
            "VSERPORT_CHANGE",
            json!({"id": "b", "open": true}),
        );
        feed(
            &mut queue,
            "VSERPORT_CHANGE",
            json!({"id": "a", "open": false}),
        );
        assert_eq!(
            drain(&mut stream),
            [
                "-1000",
                r#"RTC_CHANGE {"offset":999}"#,
                r#"VSERPORT_CHANGE {"id":"b","open":true}"#,
                r#"VSERPORT_CHANGE {"id":"a","open":false}"#,
            ]
        );
    }

    #[test]
    fn what_ends_something_outlives_any_flood() {
        let (mut queue, mut stream) = events(4);
        feed(
            &mut queue,
            "JOB_STATUS_CHANGE",
            json!({"id": "j", "status": "concluded"}),
        );
        feed(&mut queue, "MIGRATION", json!({"status": "completed"}));
        feed(
            &mut queue,
            "DEVICE_DELETED",
            json!({"device": "d", "path": "/d"}),
        );
        for n in 0..1000 {
            feed(&mut queue, "MIGRATION", json!({"status": "active"}));
            feed(
                &mut queue,
                "JOB_STATUS_CHANGE",
                json!({"id": n, "status": "running"}),
            );
            feed(
                &mut queue,
                "BLOCK_IO_ERROR",
                json!({"device": format!("d{n}")}),
            );
        }
        feed(&mut queue, "SHUTDOWN", json!({"guest": true}));
        let seen = drain(&mut stream);
        for kept in [
            "\"concluded\"",
            "\"completed\"",
            "DEVICE_DELETED",
            "SHUTDOWN",
        ] {
            assert!(
                seen.iter().any(|entry| entry.contains(kept)),
                "{kept} is not in {seen:?}"
            );
        }
        assert!(seen.len() <= 6, "{seen:?}");
    }

    #[test]
    fn memory_is_bounded_even_by_endings() {
        let (mut queue, mut stream) = events(10);
        for n in 0..1000 {
            feed(
                &mut queue,
                "DEVICE_DELETED",
                json!({"path": format!("/{n}")}),
            );
            feed(&mut queue, "RTC_CHANGE", json!({"offset": n}));
        }
        let seen = drain(&mut stream);
        assert!(seen.len() <= 2 * 10 + 1, "{} entries", seen.len());
        assert!(seen.iter().any(|entry| entry.contains("/999")), "{seen:?}");
    }

    #[test]
    fn a_reader_that_keeps_up_misses_nothing() {
        let (mut queue, mut stream) = events(2);
        for offset in 0..100 {
            feed(&mut queue, "RTC_CHANGE", json!({"offset": offset}));
            assert_eq!(
                drain(&mut stream),
                [format!("RTC_CHANGE {{\"offset\":{offset}}}")]
            );
        }
        queue.closed(&Closed::EndOfStream);
        drop(queue);
        assert_eq!(drain(&mut stream), ["QEMU closed the connection"]);
        assert!(stream.next().now_or_never().unwrap().is_none());
    }
}
