//! Unlocks encrypted volumes, and locks them again.

use std::sync::Arc;

use crate::cleartext::{CleartextSnapshot, MappingEvent};
use crate::client::Caller;
use crate::engine::Engine;
use crate::error::Error;
use crate::kernel::Kernel;
use crate::unlocker::UnlockRequest;
use crate::volume::VolumeId;

impl<K: Kernel> Engine<K> {
    /// Unlocks a volume for the caller.
    ///
    /// # Errors
    /// Those of the contract. The volume is locked then.
    pub async fn unlock(
        self: &Arc<Self>,
        volume: VolumeId,
        request: UnlockRequest<K::File>,
        caller: &impl Caller,
    ) -> Result<CleartextSnapshot, Error> {
        let _ = (volume, request, caller);
        todo!("unlock")
    }

    /// Locks a volume. Not lazy: returns when the cleartext is gone, or fails with `Busy` and has changed nothing.
    /// Lazy: returns at once, and the cleartext goes with its last user.
    ///
    /// # Errors
    /// `NotFound` if it is not unlocked; `Busy`, `Timeout`, `Kernel`.
    pub async fn lock(self: &Arc<Self>, volume: VolumeId, lazy: bool) -> Result<(), Error> {
        let _ = (volume, lazy);
        todo!("lock")
    }

    /// Handles an event of a mapping.
    pub fn observe_mapping(self: &Arc<Self>, event: &MappingEvent) {
        let _ = event;
        todo!("observe_mapping")
    }
}
