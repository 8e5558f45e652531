//! The owner of an attachment, and who may change it: one rule for the authority, for devices that are given
//! to a second caller, and for limits.

use loopd_common::Lifetime;

use crate::client::ClientId;
use crate::clock::microseconds_now;

/// Root may do everything, with no limits and no questions.
#[must_use]
pub fn is_root(uid: u32) -> bool {
    uid == 0
}

/// What makes an attachment ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ownership {
    /// The uid that attached it.
    pub uid: u32,
    /// The connection that it is bound to.
    pub client: Option<ClientId>,
    /// When it ends.
    pub lifetime: Lifetime,
    /// When it was attached: microseconds of `CLOCK_REALTIME`.
    pub since: u64,
    /// Whether one that ends with its last mount has been mounted.
    pub mounted: bool,
    /// When it ends although it has not been mounted, its client being gone: as `since`.
    pub grace_ends: Option<u64>,
}

impl Ownership {
    /// Of one that has just been attached by this uid.
    #[must_use]
    pub fn new(uid: u32, client: Option<ClientId>, lifetime: Lifetime) -> Self {
        Self { uid, client, lifetime, since: microseconds_now(), mounted: false, grace_ends: None }
    }
}
