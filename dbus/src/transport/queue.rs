//! The calls and the replies to refused calls that wait because of a rate limit.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::Instant;

use super::header::Parts;

/// How many replies to refused calls may wait for their time. A reply has a few hundred bytes.
const MOST_QUEUED_REFUSALS: usize = 8192;

/// A call that was received and is not parsed yet.
#[derive(Debug)]
pub struct QueuedCall {
    /// Its bytes.
    pub message: Vec<u8>,
    /// The placeholders of its descriptors.
    pub placeholders: Vec<OwnedFd>,
    /// The fields of its header.
    pub parts: Parts,
}

/// What waits until its time has come.
#[derive(Debug)]
pub enum Waiting {
    /// A call.
    Call(QueuedCall),
    /// The reply to a refused call.
    Refusal(Vec<u8>),
}

/// What waits, ordered by the time at which it may begin. Calls of one user keep their order.
#[derive(Debug)]
pub struct Queue {
    waiting: BTreeMap<(Instant, u64), Waiting>,
    arrived: u64,
    refusals: usize,
    backlog: Backlog,
}

impl Queue {
    pub fn new(backlog: Backlog) -> Self {
        Self { waiting: BTreeMap::new(), arrived: 0, refusals: 0, backlog }
    }

    /// Queues a call until `begin`.
    pub fn push(&mut self, begin: Instant, call: QueuedCall) {
        self.insert(begin, Waiting::Call(call));
    }

    /// Queues the reply to a refused call; false if there are too many.
    pub fn push_refusal(&mut self, begin: Instant, reply: Vec<u8>) -> bool {
        let has_space = self.refusals < MOST_QUEUED_REFUSALS;
        if has_space {
            self.refusals += 1;
            self.insert(begin, Waiting::Refusal(reply));
        }
        has_space
    }

    fn insert(&mut self, begin: Instant, waiting: Waiting) {
        self.arrived += 1;
        self.waiting.insert((begin, self.arrived), waiting);
        self.backlog.0.send_replace(self.waiting.len());
    }

    /// When the next of them may begin.
    pub fn next(&self) -> Option<Instant> {
        self.waiting.first_key_value().map(|((begin, _), _)| *begin)
    }

    /// Takes one that may begin now.
    pub fn pop(&mut self) -> Option<Waiting> {
        if self.next()? > Instant::now() {
            return None;
        }
        let (_, waiting) = self.waiting.pop_first()?;
        self.refusals -= usize::from(matches!(waiting, Waiting::Refusal(_)));
        self.backlog.0.send_replace(self.waiting.len());
        Some(waiting)
    }
}

/// The length of the queue. Clones share the counter.
#[derive(Clone, Debug)]
pub struct Backlog(Arc<watch::Sender<usize>>);

impl Default for Backlog {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }
}

impl Backlog {
    /// Waits until the queue is empty.
    pub async fn cleared(&self) {
        let mut count = self.0.subscribe();
        let _never_closed = count.wait_for(|waiting| *waiting == 0).await;
    }
}
