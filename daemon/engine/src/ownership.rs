//! The owner of an attachment.

use loopd_common::Lifetime;

use crate::client::ClientId;
use crate::clock::microseconds_now;

/// Whether the uid is root's, who needs no authorization and has no limits.
#[must_use]
pub fn is_root(uid: u32) -> bool {
    uid == 0
}

/// The owner and the lifetime of an attachment.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// The uid that attached it.
    pub uid: u32,
    /// The client that it is bound to.
    pub client: Option<ClientId>,
    /// When it ends.
    pub lifetime: Lifetime,
    /// When it was attached: microseconds of `CLOCK_REALTIME`.
    pub since: u64,
    /// Whether an attachment with the lifetime `mount` has been mounted.
    pub mounted: bool,
    /// When its grace time ends, if it has one: as `since`.
    pub grace_ends: Option<u64>,
}

impl Ownership {
    /// The ownership of an attachment that this uid is making.
    #[must_use]
    pub fn new(uid: u32, client: Option<ClientId>, lifetime: Lifetime) -> Self {
        Self { uid, client, lifetime, since: microseconds_now(), mounted: false, grace_ends: None }
    }
}
