//! The connection against a naive model, and its rules one by one.

use std::{collections::BTreeMap, fs::File};

use proptest::{prelude::*, sample::Index};

use super::*;

/// Whoever waits is named by the number of the order.
type Subject = Protocol<u32>;

fn order(waiter: u32, lane: Lane, fds: usize) -> Order<u32> {
    let line = message::begin("x", lane, None::<&()>).unwrap();
    let fds = (0..fds)
        .map(|_| File::open("/dev/null").unwrap().into())
        .collect();
    Order {
        name: Cow::Borrowed("x"),
        line,
        fds,
        lane,
        waiter,
    }
}

fn negotiated(oob: bool) -> Subject {
    let mut protocol = Subject::new(1 << 40);
    protocol.negotiated(oob);
    protocol
}

/// Sends whatever may be sent; gives how many messages and descriptors that were.
fn send_all(protocol: &mut Subject) -> (usize, usize) {
    let (mut messages, mut fds) = (0, 0);
    while let Some(sent) = protocol.next_message(&mut Vec::new(), true) {
        messages += 1;
        fds += sent.len();
    }
    (messages, fds)
}

#[test]
fn the_window_is_eight_and_keeps_one_place_beside_a_rescue_lane() {
    for (oob, in_band) in [(false, 8), (true, 7)] {
        let mut protocol = negotiated(oob);
        for n in 0..20 {
            protocol.submit(order(n, Lane::InBand, 0)).unwrap();
        }
        assert_eq!(send_all(&mut protocol).0, in_band);
        protocol.submit(order(99, Lane::OutOfBand, 0)).unwrap();
        assert_eq!(send_all(&mut protocol).0, 1);
    }
}

#[test]
fn a_probe_is_asked_once_and_ended_by_any_word() {
    let mut protocol = negotiated(true);
    let id = protocol.submit(order(0, Lane::InBand, 0)).unwrap();
    send_all(&mut protocol);
    assert_eq!(
        (protocol.health(), protocol.running_probe()),
        (Health::Ok, None)
    );
    assert_eq!(protocol.depart(id, true), Departure::Orphaned(0));
    assert_eq!(
        (protocol.health(), protocol.running_probe()),
        (Health::Busy, Some(1))
    );
    let second = protocol.submit(order(1, Lane::InBand, 0)).unwrap();
    assert_eq!(protocol.depart(second, true), Departure::Withdrawn(1));
    assert_eq!(send_all(&mut protocol).0, 1, "one query-yank");
    protocol.probe_ended(1);
    assert_eq!(protocol.health(), Health::Unresponsive);
    protocol.heard();
    assert_eq!(protocol.health(), Health::Busy);
    assert_eq!(protocol.reply(Id::Missing, false), Addressee::Nobody);
    assert_eq!(protocol.health(), Health::Ok);
    protocol.probe_ended(1);
    assert_eq!(
        protocol.health(),
        Health::Ok,
        "the end of an old probe says nothing"
    );
}

#[test]
fn an_impatient_caller_alone_starts_no_probe() {
    let mut protocol = negotiated(true);
    let id = protocol.submit(order(0, Lane::InBand, 0)).unwrap();
    send_all(&mut protocol);
    assert_eq!(protocol.depart(id, false), Departure::Orphaned(0));
    assert_eq!((protocol.health(), protocol.orphans()), (Health::Ok, 1));
}

#[test]
fn a_message_with_descriptors_is_given_alone() {
    let mut protocol = negotiated(true);
    protocol.submit(order(0, Lane::InBand, 2)).unwrap();
    let mut out = Vec::new();
    assert!(protocol.next_message(&mut out, false).is_none());
    assert_eq!(protocol.next_message(&mut out, true).unwrap().len(), 2);
    assert_eq!(out, br#"{"execute":"x"}"#);
}

#[test]
fn only_what_is_sent_alone_goes_without_an_id() {
    let mut protocol = negotiated(true);
    let send = |protocol: &mut Subject, waiter, lane| {
        protocol.submit(order(waiter, lane, 0)).unwrap();
        let mut out = Vec::new();
        protocol.next_message(&mut out, true).unwrap();
        let sent: serde_json::Value = serde_json::from_slice(&out).unwrap();
        sent.get("id").and_then(serde_json::Value::as_u64)
    };
    assert_eq!(send(&mut protocol, 0, Lane::InBand), None);
    // Its caller leaves, but QEMU has it: the next one must be told from it.
    protocol.depart(1, false);
    assert_eq!(send(&mut protocol, 1, Lane::InBand), Some(2));
    assert_eq!(protocol.reply(Id::Missing, false), Addressee::Nobody);
    assert_eq!(protocol.counters.late, 1);
    assert_eq!(protocol.reply(Id::Missing, false), Addressee::Nobody);
    assert_eq!(protocol.counters.unknown, 1, "it was answered before");
    assert_eq!(protocol.reply(Id::Number(2), false), Addressee::One(1));
    // Out of band there is no order to go by.
    assert_eq!(send(&mut protocol, 2, Lane::OutOfBand), Some(3));
    assert_eq!(send(&mut protocol, 3, Lane::InBand), Some(4));
    assert_eq!(protocol.reply(Id::Number(4), false), Addressee::One(3));
    assert_eq!(protocol.reply(Id::Number(3), false), Addressee::One(2));
    assert_eq!(send(&mut protocol, 4, Lane::InBand), None);
    assert_eq!(
        protocol.reply(Id::Number(5), false),
        Addressee::Nobody,
        "it was not sent by that name"
    );
    // Its own error, whatever else is in flight.
    assert_eq!(send(&mut protocol, 5, Lane::InBand), Some(6));
    assert_eq!(protocol.reply(Id::Missing, true), Addressee::One(4));
    assert_eq!(protocol.reply(Id::Number(6), false), Addressee::One(5));
}

#[test]
fn nothing_without_an_id_answers_the_negotiation() {
    let mut protocol = Subject::new(1 << 40);
    protocol.submit(order(0, Lane::InBand, 0)).unwrap();
    let mut out = Vec::new();
    protocol.next_message(&mut out, true).unwrap();
    assert_eq!(out, br#"{"execute":"x","id":1099511627776}"#);
    // What a daemon that died has asked is answered into the next connection.
    for refused in [false, true] {
        assert_eq!(protocol.reply(Id::Missing, refused), Addressee::Nobody);
    }
    assert_eq!(
        protocol.reply(Id::Number(1 << 40), false),
        Addressee::One(0)
    );
}

#[test]
fn the_first_reason_of_the_end_stays() {
    let mut protocol = negotiated(true);
    assert!(protocol.close(Closed::EndOfStream).is_empty());
    protocol.close(Closed::Local);
    assert!(matches!(
        protocol.submit(order(0, Lane::InBand, 0)),
        Err(Closed::EndOfStream)
    ));
}

#[derive(Clone, Debug)]
enum Step {
    Submit { oob: bool, fds: bool },
    Send,
    Depart { who: Index, overdue: bool },
    Reply { to: Index, refused: bool },
    ReplyToUnknown(u64),
    ErrorWithoutId,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => (any::<bool>(), any::<bool>()).prop_map(|(oob, fds)| Step::Submit { oob, fds }),
        4 => Just(Step::Send),
        2 => (any::<Index>(), any::<bool>()).prop_map(|(who, overdue)| Step::Depart { who, overdue }),
        6 => (any::<Index>(), any::<bool>()).prop_map(|(to, refused)| Step::Reply { to, refused }),
        1 => any::<u64>().prop_map(Step::ReplyToUnknown),
        1 => Just(Step::ErrorWithoutId),
    ]
}

/// What a command of ours is up to, as a table that anyone can check.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Is {
    Queued,
    Sent,
    Over,
}

/// What QEMU has and did not answer.
struct Asked {
    id: u64,
    named: bool,
    in_band: bool,
    has_fds: bool,
}

impl Asked {
    /// What its reply goes by.
    fn goes_by(&self) -> Id {
        if self.named {
            Id::Number(self.id)
        } else {
            Id::Missing
        }
    }

    /// Sends what may be sent next.
    fn next(protocol: &mut Subject) -> Option<Self> {
        let mut out = Vec::new();
        let fds = protocol.next_message(&mut out, true)?;
        let sent: serde_json::Value = serde_json::from_slice(&out).unwrap();
        let known = protocol.in_flight.last().unwrap().id;
        let named = sent.get("id").map(|sent| assert_eq!(sent, known)).is_some();
        Some(Self {
            id: known,
            named,
            in_band: sent.get("execute").is_some(),
            has_fds: !fds.is_empty(),
        })
    }
}

proptest! {
    #[test]
    fn every_caller_gets_its_own_answer_or_none(
        oob in any::<bool>(),
        steps in prop::collection::vec(step(), 0..200),
    ) {
        let mut protocol = negotiated(oob);
        let mut model: BTreeMap<u64, (u32, Is)> = BTreeMap::new();
        // In the order of sending.
        let mut qemu: Vec<Asked> = Vec::new();
        let mut number = 0;
        for step in steps {
            match step {
                Step::Submit { oob: wanted, fds } => {
                    let lane = if oob && wanted { Lane::OutOfBand } else { Lane::InBand };
                    let id = protocol.submit(order(number, lane, fds.into())).unwrap();
                    prop_assert!(model.insert(id, (number, Is::Queued)).is_none(), "id used twice");
                    number += 1;
                }
                Step::Send => {
                    if let Some(asked) = Asked::next(&mut protocol) {
                        // What has no id is told by being the first.
                        prop_assert!(asked.named || (asked.in_band && qemu.is_empty()));
                        if let Some((_, is)) = model.get_mut(&asked.id) {
                            prop_assert_eq!(*is, Is::Queued);
                            *is = Is::Sent;
                        }
                        qemu.push(asked);
                    }
                    let in_band = qemu.iter().filter(|asked| asked.in_band).count();
                    prop_assert!(in_band <= WINDOW - usize::from(oob));
                    prop_assert!(qemu.iter().filter(|asked| asked.has_fds).count() <= 1);
                }
                Step::Depart { who, overdue } => {
                    let ids: Vec<u64> = model.keys().copied().collect();
                    if ids.is_empty() { continue }
                    let id = *who.get(&ids);
                    let (waiter, is) = model.get_mut(&id).unwrap();
                    let expected = match *is {
                        Is::Queued => Departure::Withdrawn(*waiter),
                        Is::Sent => Departure::Orphaned(*waiter),
                        Is::Over => Departure::Ended,
                    };
                    prop_assert_eq!(protocol.depart(id, overdue), expected);
                    *is = Is::Over;
                }
                Step::Reply { to, refused } => {
                    // In band in order and after what came before out of band; so does QEMU.
                    let ready: Vec<usize> =
                        (0..qemu.len()).filter(|at| *at == 0 || !qemu[*at].in_band).collect();
                    if ready.is_empty() { continue }
                    let asked = qemu.remove(*to.get(&ready));
                    protocol.heard();
                    let reached = protocol.reply(asked.goes_by(), refused);
                    match model.get_mut(&asked.id) {
                        Some((waiter, is @ Is::Sent)) => {
                            prop_assert_eq!(reached, Addressee::One(*waiter));
                            *is = Is::Over;
                        }
                        _ => prop_assert_eq!(reached, Addressee::Nobody),
                    }
                }
                Step::ReplyToUnknown(id) => {
                    if !model.contains_key(&id) && qemu.iter().all(|asked| asked.id != id) {
                        prop_assert_eq!(protocol.reply(Id::Number(id), false), Addressee::Nobody);
                    }
                }
                Step::ErrorWithoutId => {
                    // QEMU says it in place of the answer to what it read first.
                    if qemu.is_empty() { continue }
                    let first = qemu.remove(0);
                    let concerned = |id: &u64, is: &Is| *is == Is::Sent && (first.named || *id == first.id);
                    let waiting: Vec<u32> = model
                        .iter()
                        .filter(|(id, (_, is))| concerned(id, is))
                        .map(|(_, (waiter, _))| *waiter)
                        .collect();
                    let mut reached = match protocol.reply(Id::Missing, true) {
                        Addressee::One(one) => vec![one],
                        Addressee::All(all) => all,
                        Addressee::Nobody => Vec::new(),
                    };
                    reached.sort_unstable();
                    prop_assert_eq!(reached, waiting);
                    for (id, (_, is)) in &mut model {
                        if concerned(id, is) { *is = Is::Over }
                    }
                }
            }
        }

        // Once everybody left and QEMU answered all that it has, nothing is owed any more.
        let mut left = protocol.close(Closed::EndOfStream);
        left.sort_unstable();
        let expected: Vec<(u32, bool)> = model
            .values()
            .filter(|(_, is)| *is != Is::Over)
            .map(|(waiter, is)| (*waiter, *is == Is::Sent))
            .collect();
        prop_assert_eq!(left, expected);
        prop_assert_eq!(protocol.orphans(), 0);
    }

    #[test]
    fn whatever_happened_a_qemu_that_answers_settles_everything(
        steps in prop::collection::vec(step(), 0..100),
    ) {
        let mut protocol = negotiated(true);
        let mut qemu: VecDeque<Asked> = VecDeque::new();
        let mut ids = Vec::new();
        let deliver = |protocol: &mut Subject, qemu: &mut VecDeque<Asked>| {
            while let Some(asked) = Asked::next(protocol) {
                qemu.push_back(asked);
            }
        };
        for step in steps {
            match step {
                Step::Submit { oob, fds } => {
                    let lane = if oob { Lane::OutOfBand } else { Lane::InBand };
                    ids.push(protocol.submit(order(0, lane, fds.into())).unwrap());
                }
                Step::Send => deliver(&mut protocol, &mut qemu),
                Step::Reply { refused, .. } => {
                    if let Some(asked) = qemu.pop_front() {
                        protocol.heard();
                        protocol.reply(asked.goes_by(), refused);
                    }
                }
                Step::ErrorWithoutId => {
                    if qemu.pop_front().is_some() {
                        protocol.heard();
                        protocol.reply(Id::Missing, true);
                    }
                }
                Step::Depart { who, overdue } if !ids.is_empty() => {
                    protocol.depart(*who.get(&ids), overdue);
                }
                Step::Depart { .. } | Step::ReplyToUnknown(_) => {}
            }
        }
        for id in ids {
            protocol.depart(id, true);
        }
        loop {
            deliver(&mut protocol, &mut qemu);
            let Some(asked) = qemu.pop_front() else { break };
            protocol.heard();
            protocol.reply(asked.goes_by(), false);
        }
        prop_assert_eq!(protocol.orphans(), 0);
        prop_assert_eq!(protocol.health(), Health::Ok);
        prop_assert!(protocol.in_flight.is_empty());
    }
}
