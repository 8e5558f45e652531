//! The calls that are received and not answered yet. Their number and size are limited.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// How many calls of one connection may wait for a reply. The daemon limits the calls that a user has in
/// progress; this limits those that wait for it.
const MOST_OF_A_SENDER: usize = 512;
/// How many of all connections. The same number is reserved for connections without a call.
const MOST: usize = 4096;
/// How many bytes these calls may have. The same number is reserved as above.
const MOST_BYTES: usize = 16 << 20;

/// How many calls of all connections of one uid other than root may wait for a reply.
const MOST_OF_A_UID: usize = 1024;
/// How many bytes these calls may have.
const MOST_BYTES_OF_A_UID: usize = 4 << 20;

/// The calls in progress.
#[derive(Debug, Default)]
pub struct Calls(Mutex<State>);

#[derive(Debug, Default)]
struct State {
    senders: HashMap<String, HashMap<u32, Call>>,
    users: HashMap<u32, Total>,
    total: Total,
}

#[derive(Clone, Copy, Debug, Default)]
struct Total {
    count: usize,
    bytes: usize,
}

/// One call.
#[derive(Debug)]
pub struct Call {
    /// The uid of the caller.
    pub uid: u32,
    /// The length of its message.
    pub bytes: usize,
    /// Whether its sender expects a reply.
    pub wants_reply: bool,
    /// The keys of its descriptors.
    pub descriptors: Vec<u64>,
}

impl Calls {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The reason why a further call exceeds a limit.
    pub fn refusal(&self, sender: &str, serial: u32, bytes: usize) -> Option<&'static str> {
        let state = self.state();
        let of_sender = state.senders.get(sender);
        let own = of_sender.map_or(0, HashMap::len);
        if of_sender.is_some_and(|calls| calls.contains_key(&serial)) {
            return Some("a call with this serial is in progress; each call of a connection needs its own");
        }
        if own >= MOST_OF_A_SENDER {
            return Some("this connection has too many calls in progress; wait for answers");
        }
        let share = if own == 0 { 2 } else { 1 };
        let is_full = state.total.count >= share * MOST || state.total.bytes + bytes > share * MOST_BYTES;
        is_full.then_some("loopd has too many calls in progress; try again later")
    }

    /// The reason why a further call exceeds a limit of its user, which all connections of the user share.
    pub fn refusal_of_uid(&self, uid: u32, bytes: usize) -> Option<&'static str> {
        let state = self.state();
        let own = state.users.get(&uid).copied().unwrap_or_default();
        let is_full = own.count >= MOST_OF_A_UID || own.bytes + bytes > MOST_BYTES_OF_A_UID;
        (uid != 0 && is_full).then_some("this user has too many calls in progress; wait for answers")
    }

    /// Records a call.
    pub fn begin(&self, sender: &str, serial: u32, call: Call) {
        let mut state = self.state();
        let own = state.users.entry(call.uid).or_default();
        own.count += 1;
        own.bytes += call.bytes;
        state.total.count += 1;
        state.total.bytes += call.bytes;
        state.senders.entry(sender.to_owned()).or_default().insert(serial, call);
    }

    #[cfg(test)]
    pub fn of_sender(&self, sender: &str) -> usize {
        self.state().senders.get(sender).map_or(0, HashMap::len)
    }

    /// Removes a call that was answered.
    pub fn end(&self, sender: &str, serial: u32) -> Option<Call> {
        let mut state = self.state();
        let calls = state.senders.get_mut(sender)?;
        let call = calls.remove(&serial)?;
        if calls.is_empty() {
            state.senders.remove(sender);
        }
        if let Some(own) = state.users.get_mut(&call.uid) {
            own.count -= 1;
            own.bytes -= call.bytes;
            if own.count == 0 {
                state.users.remove(&call.uid);
            }
        }
        state.total.count -= 1;
        state.total.bytes -= call.bytes;
        Some(call)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> Call {
        Call { uid: 7, bytes: 100, wants_reply: true, descriptors: Vec::new() }
    }

    #[test]
    fn calls_are_limited_and_other_connections_are_still_served() {
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

    #[test]
    fn connections_of_a_uid_share_its_limit() {
        let calls = Calls::default();
        for serial in 0..MOST_OF_A_UID {
            assert_eq!(calls.refusal_of_uid(7, 100), None);
            calls.begin(&format!(":1.{}", serial % 8), u32::try_from(serial).unwrap(), call());
        }
        assert!(calls.refusal_of_uid(7, 100).unwrap().contains("this user"));
        assert_eq!(calls.refusal_of_uid(8, 100), None);
        assert_eq!(calls.refusal_of_uid(0, 100), None);
        assert!(calls.refusal_of_uid(8, MOST_BYTES_OF_A_UID + 1).is_some());
        assert!(calls.end(":1.0", 0).is_some());
        assert_eq!(calls.refusal_of_uid(7, 100), None);
    }
}
