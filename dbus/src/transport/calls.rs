//! The calls that have arrived and are not answered yet, which are bounded.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How many calls of one connection may wait for an answer. What a user may have under way is bounded
/// by the daemon; this bounds what waits for that.
const MOST_OF_A_SENDER: usize = 512;
/// How many of all connections. As many again are left for those that have none under way.
const MOST: usize = 4096;
/// How many bytes they may have, and again as many.
const MOST_BYTES: usize = 16 << 20;

/// The calls under way.
#[derive(Debug, Default)]
pub struct Calls(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    senders: HashMap<String, HashMap<u32, Call>>,
    count: usize,
    bytes: usize,
}

/// One call.
#[derive(Debug)]
pub struct Call {
    /// How long its message is.
    pub bytes: usize,
    /// Whether its sender waits for the answer.
    pub wants_reply: bool,
    /// The keys of its descriptors.
    pub descriptors: Vec<u64>,
}

impl Calls {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says why one more call is too many.
    pub fn refusal(&self, sender: &str, serial: u32, bytes: usize) -> Option<&'static str> {
        let state = self.state();
        let of_sender = state.senders.get(sender);
        let own = of_sender.map_or(0, HashMap::len);
        if of_sender.is_some_and(|calls| calls.contains_key(&serial)) {
            return Some("a call with this serial is under way; each call of a connection needs its own");
        }
        if own >= MOST_OF_A_SENDER {
            return Some("this connection has too many calls under way; wait for answers");
        }
        let share = if own == 0 { 2 } else { 1 };
        let is_full = state.count >= share * MOST || state.bytes + bytes > share * MOST_BYTES;
        is_full.then_some("loopd has too many calls under way; try again later")
    }

    /// Notes a call.
    pub fn begin(&self, sender: &str, serial: u32, call: Call) {
        let mut state = self.state();
        state.count += 1;
        state.bytes += call.bytes;
        state.senders.entry(sender.to_owned()).or_default().insert(serial, call);
    }

    /// A call is answered.
    pub fn end(&self, sender: &str, serial: u32) -> Option<Call> {
        let mut state = self.state();
        let calls = state.senders.get_mut(sender)?;
        let call = calls.remove(&serial)?;
        if calls.is_empty() {
            state.senders.remove(sender);
        }
        state.count -= 1;
        state.bytes -= call.bytes;
        Some(call)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> Call {
        Call { bytes: 100, wants_reply: true, descriptors: Vec::new() }
    }

    #[test]
    fn calls_are_bounded_and_others_still_get_one() {
        let calls = Calls::default();
        for sender in 0..MOST / MOST_OF_A_SENDER {
            for serial in 0..MOST_OF_A_SENDER {
                let sender = format!(":1.{sender}");
                let serial = u32::try_from(serial).unwrap();
                assert_eq!(calls.refusal(&sender, serial, 100), None);
                calls.begin(&sender, serial, call());
            }
        }
        assert!(calls.refusal(":1.0", 9999, 100).unwrap().contains("this connection"));
        assert_eq!(calls.refusal(":1.99", 1, 100), None);
        calls.begin(":1.99", 1, call());
        assert!(calls.refusal(":1.99", 1, 100).unwrap().contains("serial"));
        assert!(calls.refusal(":1.99", 2, 100).unwrap().contains("try again"));
        assert!(calls.end(":1.99", 1).is_some());
        assert!(calls.end(":1.99", 1).is_none());
        assert!(calls.refusal(":1.99", 1, MOST_BYTES).is_none());
        assert!(calls.refusal(":1.99", 1, 2 * MOST_BYTES).is_some());
    }
}
