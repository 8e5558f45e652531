//! Which messages and descriptors a connection accepts.

use std::fmt;
use std::sync::Arc;

use loopd_common::Pace;
use zbus::export::async_trait::async_trait;

use super::descriptors::Descriptors;
use super::header;
use super::queue::Backlog;

/// What a connection lets in.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The longest reply, in bytes.
    pub longest_reply: usize,
    /// The longest signal.
    pub longest_signal: usize,
    /// The calls. Without it they are ignored.
    pub calls: Option<CallPolicy>,
}

impl Policy {
    /// For a client: no calls, and whatever length the bus allows. What that costs is bounded by the number of
    /// values.
    pub const CLIENT: Self =
        Self { longest_reply: header::LONGEST_MESSAGE, longest_signal: header::LONGEST_MESSAGE, calls: None };

    /// For a daemon that serves no objects on this connection.
    pub const QUESTIONS: Self = Self { longest_reply: 1 << 20, longest_signal: 64 << 10, calls: None };
}

/// What calls a connection lets in.
#[derive(Clone)]
pub struct CallPolicy {
    /// The longest call, in bytes.
    pub longest: usize,
    /// How many descriptors a member of an interface takes.
    pub takes_descriptors: fn(interface: &str, member: &str) -> u32,
    /// Who the callers are.
    pub users: Arc<dyn Users>,
    /// Where the descriptors go.
    pub descriptors: Descriptors,
    /// How fast the calls of one user other than root follow each other. What comes faster waits.
    pub pace: Arc<Pace>,
    /// What waits.
    pub backlog: Backlog,
}

impl fmt::Debug for CallPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallPolicy").field("longest", &self.longest).finish_non_exhaustive()
    }
}

/// Knows the user behind a connection to the bus.
#[async_trait]
pub trait Users: Send + Sync {
    /// The uid of the connection with this unique name. Must not ask over the connection that it is asked
    /// for: that waits for the answer.
    async fn uid(&self, sender: &str) -> Option<u32>;

    /// The uid with whose calls those of this one are spaced out.
    fn payer(&self, uid: u32) -> u32 {
        uid
    }
}
