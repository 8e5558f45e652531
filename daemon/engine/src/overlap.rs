//! Requests for a file that is attached already.
//!
//! Overlap checks are opt-in, since every loop device is examined: the event of a device that another program has
//! just attached may still be on its way.

use std::ops::Range;
use std::sync::Arc;

use loopd_common::text::printable;
use loopd_common::{Lifetime, Overlap, State};
use tokio::sync::OwnedMutexGuard;

use crate::client::Caller;
use crate::engine::Engine;
use crate::error::Error;
use crate::kernel::{Device, FileFacts, Kernel};
use crate::operation::audit;
use crate::ownership::is_root;
use crate::request::AttachRequest;
use crate::snapshot::Snapshot;

impl<K: Kernel> Engine<K> {
    /// Locks the file against other requests that check overlaps, and returns an existing attachment that satisfies
    /// the request.
    ///
    /// # Errors
    /// `Overlap` if there is an attachment that does not; `InvalidBackingFile`; `Timeout` if another backing file
    /// hangs; `Kernel` if a device cannot be examined.
    pub(super) async fn resolve_overlap(
        self: &Arc<Self>,
        file: &K::File,
        request: &AttachRequest,
        caller: &impl Caller,
    ) -> Result<(OwnedMutexGuard<()>, Option<Snapshot>), Error> {
        let facts = self.kernel.examine(file).await?;
        let alone = self.file_locks.lock(facts.identity).await;
        self.discover(&facts).await?;
        loop {
            let existing: Vec<Snapshot> = self
                .list()
                .into_iter()
                .filter(|shown| shown.device.shows(facts.identity) && overlaps(&shown.device, request))
                .filter(|shown| !self.reap_if_gone(shown.id))
                .collect();
            let Some(first) = existing.first() else { return Ok((alone, None)) };
            if request.overlap == Overlap::Refuse {
                return Err(refused(first, "detach it first, or attach with overlap=allow or reuse"));
            }
            let reused = self.choose_reusable(&existing, first, &facts, request, caller)?;
            match self.extend_lifetime(&reused, request, caller).await {
                // It has ended in the meantime: another one may serve the request, or none.
                Err(Error::Gone { .. }) => continue,
                extended => extended?,
            }
            if let Some(reused) = self.find(reused.id) {
                audit("reused", &reused);
                return Ok((alone, Some(reused)));
            }
        }
    }

    fn choose_reusable(
        &self,
        existing: &[Snapshot],
        first: &Snapshot,
        facts: &FileFacts,
        request: &AttachRequest,
        caller: &impl Caller,
    ) -> Result<Snapshot, Error> {
        let same = |shown: &&Snapshot| {
            (shown.device.offset, shown.device.size_limit) == (request.offset, request.size_limit)
        };
        let writable = facts.writable && !request.read_only;
        let mut why = "it has another offset or size limit; request the same".to_owned();
        for shown in existing.iter().filter(same) {
            let device = &shown.device;
            if request.number.is_some_and(|number| number != device.number) {
                why = "it is not the requested device".to_owned();
            } else if device.read_only && writable {
                why = "it is read-only; request a read-only one".to_owned();
            } else if request.block_size != 0 && request.block_size != device.block_size {
                why = format!("its block size is {}; request that one", device.block_size);
            } else if let Some(others) = self.who_may_change(shown, facts, caller.uid()) {
                why = others;
            } else if shown.state == State::Detaching && !shown.may_be_changed_by(caller.uid()) {
                why = "its owner is detaching it; wait until it is gone".to_owned();
            } else {
                return Ok(shown.clone());
            }
        }
        why.push_str(", or attach with overlap=allow");
        Err(refused(existing.iter().find(same).unwrap_or(first), &why))
    }

    /// Which user other than root and the caller can show another file on the device, or detach it and attach
    /// another file to its number; `None` if nobody can. That user controls what is read from the device.
    fn who_may_change(&self, shown: &Snapshot, file: &FileFacts, caller: u32) -> Option<String> {
        match self.kernel.set_up_for(shown.device.number) {
            Ok(Some(uid)) if !is_root(uid) => {
                return Some(format!("UDisks2 has set it up for user {uid}, who can change it"));
            }
            Ok(_) => {}
            Err(error) => return Some(format!("the user that it was set up for is unknown: {error}")),
        }
        match &shown.ownership {
            Some(owner) if is_root(owner.uid) || owner.uid == caller => None,
            Some(owner) => Some(format!("it belongs to user {}, who can change it", owner.uid)),
            // A program with root's rights has attached it, for an unknown user. If only root can write to the file,
            // that user is likely root.
            None if file.only_root_writes => None,
            None => Some(
                "another program has attached it, and users other than root can write to its file, so that it is unknown \
                 whom it is for"
                    .to_owned(),
            ),
        }
    }

    /// Takes back a detach at the last close, and changes a lifetime that would end the attachment before the
    /// requested one.
    async fn extend_lifetime(
        self: &Arc<Self>,
        reused: &Snapshot,
        request: &AttachRequest,
        caller: &impl Caller,
    ) -> Result<(), Error> {
        let is_over = |shown: &Snapshot| {
            let outlived = request.lifetime == Lifetime::Persistent && shown.device.autoclear;
            // The caller has as much time for its mount as the client that attached it had.
            let awaits_mount = request.lifetime == Lifetime::Mount
                && shown
                    .ownership
                    .as_ref()
                    .is_some_and(|owner| owner.lifetime == Lifetime::Mount && !owner.mounted);
            (shown.state == State::Detaching || outlived || awaits_mount)
                && shown.may_be_changed_by(caller.uid())
        };
        if is_over(reused) {
            self.set_lifetime_if(reused.id, request.lifetime, caller, is_over).await?;
        }
        Ok(())
    }

    /// Records devices whose events have not arrived yet.
    async fn discover(self: &Arc<Self>, file: &FileFacts) -> Result<(), Error> {
        let known = |number: &u32| {
            let id = self.state().by_number.get(number).copied();
            id.is_some_and(|id| self.is_current(id, *number).unwrap_or(false))
        };
        let unknown: Vec<u32> =
            self.kernel.bound_numbers()?.into_iter().filter(|number| !known(number)).collect();
        for number in unknown {
            match self.refresh_in_time(number).await {
                // This file could be examined, so a backing file that cannot is another one.
                Ok(()) | Err(Error::BackingFileUnreadable { .. }) => {}
                Err(error) => {
                    let (file, source) = (printable(&file.path), Box::new(error));
                    return Err(Error::OverlapUnknown { file, source });
                }
            }
        }
        Ok(())
    }
}

fn overlaps(device: &Device, request: &AttachRequest) -> bool {
    let (one, other) = (extent(device.offset, device.size_limit), extent(request.offset, request.size_limit));
    one.start < other.end && other.start < one.end
}

/// The bytes of the file; without a limit up to any end that it may get.
fn extent(offset: u64, size_limit: u64) -> Range<u64> {
    offset..if size_limit == 0 { u64::MAX } else { offset.saturating_add(size_limit) }
}

fn refused(shown: &Snapshot, reason: &str) -> Error {
    let device = &shown.device;
    Error::Overlap {
        file: printable(&device.backing_file),
        device: device.node(),
        offset: device.offset,
        size_limit: device.size_limit,
        reason: reason.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn extents_with_a_common_byte_overlap() {
        let overlap = |one: (u64, u64), other: (u64, u64)| {
            let device = Device { offset: one.0, size_limit: one.1, ..Device::default() };
            let mut request = AttachRequest::default();
            (request.offset, request.size_limit) = other;
            overlaps(&device, &request)
        };
        for (one, other, expected) in [
            ((0, 0), (0, 0), true),
            ((0, 0), (1 << 40, 512), true),
            ((0, 512), (512, 512), false),
            ((0, 1024), (512, 512), true),
            ((512, 512), (0, 512), false),
            ((512, 0), (0, 512), false),
            ((512, 0), (0, 0), true),
        ] {
            assert_eq!(overlap(one, other), expected, "{one:?} {other:?}");
            assert_eq!(overlap(other, one), expected, "{other:?} {one:?}");
        }
    }
}
