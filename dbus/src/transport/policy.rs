//! Which messages and descriptors a connection accepts.

use std::fmt;
use std::sync::Arc;

use loopd_common::Pace;
use zbus::export::async_trait::async_trait;

use super::descriptors::Descriptors;
use super::header;
use super::queue::Backlog;

/// What a connection accepts.
#[derive(Clone, Debug)]
pub struct Policy {
    /// The longest reply, in bytes.
    pub longest_reply: usize,
    /// The longest signal.
    pub longest_signal: usize,
    /// The policy for calls; `None`: calls are ignored.
    pub calls: Option<CallPolicy>,
}

impl Policy {
    /// For a client: no calls, and replies of any length that the bus allows. The limit on the number of values
    /// bounds their memory. A signal of loopd is about one object, so it is short, but many can wait at once.
    pub const CLIENT: Self =
        Self { longest_reply: header::LONGEST_MESSAGE, longest_signal: 256 << 10, calls: None };

    /// For a daemon that serves no objects on this connection.
    pub const QUESTIONS: Self = Self { longest_reply: 1 << 20, longest_signal: 64 << 10, calls: None };
}

/// Which calls a connection accepts.
#[derive(Clone)]
pub struct CallPolicy {
    /// The longest call, in bytes.
    pub longest: usize,
    /// How many descriptors a member of an interface takes.
    pub takes_descriptors: fn(interface: &str, member: &str) -> u32,
    /// Looks up the uid of a caller.
    pub users: Arc<dyn Users>,
    /// Stores the descriptors of calls.
    pub descriptors: Descriptors,
    /// The rate of calls of one user other than root. Calls above it wait.
    pub pace: Arc<Pace>,
    /// The number of calls that wait.
    pub backlog: Backlog,
}

impl fmt::Debug for CallPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallPolicy").field("longest", &self.longest).finish_non_exhaustive()
    }
}

/// Looks up the user of a connection to the bus.
#[async_trait]
pub trait Users: Send + Sync {
    /// The uid of the connection with this unique name. It must not use the connection that this policy
    /// belongs to: that one waits for the result.
    async fn uid(&self, sender: &str) -> Option<u32>;

    /// The uid whose rate limit the calls of this uid count against.
    fn payer(&self, uid: u32) -> u32 {
        uid
    }
}
