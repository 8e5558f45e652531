//! The calls that wait for their turn.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use tokio::sync::watch;
use tokio::time::Instant;

use super::header::Parts;

/// A call that was received, and that nobody has read yet.
#[derive(Debug)]
pub struct QueuedCall {
    /// Its bytes.
    pub message: Vec<u8>,
    /// What stands for its descriptors.
    pub placeholders: Vec<OwnedFd>,
    /// Of its header.
    pub parts: Parts,
}

/// The calls, by when their turn comes. Those of one user have turns in the order of their arrival.
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

    /// Keeps a call until then.
    pub fn push(&mut self, begin: Instant, call: QueuedCall) {
        self.arrived += 1;
        self.waiting.insert((begin, self.arrived), call);
        self.backlog.0.send_replace(self.waiting.len());
    }

    /// When the next turn comes.
    pub fn next(&self) -> Option<Instant> {
        self.waiting.first_key_value().map(|((begin, _), _)| *begin)
    }

    /// The call whose turn it is.
    pub fn pop(&mut self) -> Option<QueuedCall> {
        if self.next()? > Instant::now() {
            return None;
        }
        let (_, call) = self.waiting.pop_first()?;
        self.backlog.0.send_replace(self.waiting.len());
        Some(call)
    }
}

/// How many calls wait for their turn; clones count the same ones.
#[derive(Clone, Debug)]
pub struct Backlog(Arc<watch::Sender<usize>>);

impl Default for Backlog {
    fn default() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }
}

impl Backlog {
    /// Resolves when none waits.
    pub async fn cleared(&self) {
        let mut count = self.0.subscribe();
        let _never_closed = count.wait_for(|waiting| *waiting == 0).await;
    }
}
