//! The calls that wait because of the rate limit.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::Instant;

use super::header::Parts;

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

/// The calls, ordered by the time at which they may begin. Calls of one user keep their order.
#[derive(Debug)]
pub struct Queue {
    waiting: BTreeMap<(Instant, u64), QueuedCall>,
    arrived: u64,
    backlog: Backlog,
}

impl Queue {
    pub fn new(backlog: Backlog) -> Self {
        Self { waiting: BTreeMap::new(), arrived: 0, backlog }
    }

    /// Queues a call until `begin`.
    pub fn push(&mut self, begin: Instant, call: QueuedCall) {
        self.arrived += 1;
        self.waiting.insert((begin, self.arrived), call);
        self.backlog.0.send_replace(self.waiting.len());
    }

    /// When the next call may begin.
    pub fn next(&self) -> Option<Instant> {
        self.waiting.first_key_value().map(|((begin, _), _)| *begin)
    }

    /// Takes a call that may begin now.
    pub fn pop(&mut self) -> Option<QueuedCall> {
        if self.next()? > Instant::now() {
            return None;
        }
        let (_, call) = self.waiting.pop_first()?;
        self.backlog.0.send_replace(self.waiting.len());
        Some(call)
    }
}

/// The number of calls in the queue. Clones share the counter.
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
