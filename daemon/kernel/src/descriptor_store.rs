//! Where copies of the descriptors that keep devices alive outlive the daemon.

use std::collections::HashSet;
use std::os::fd::BorrowedFd;

use loopd_engine::BoxFuture;
use loopd_engine::kernel::DiskSequence;

/// A store of descriptors.
pub trait DescriptorStore: Send + Sync {
    /// Whether the last daemon left a copy for this device that was not taken up yet.
    fn has_stored_hold(&self, device: DiskSequence) -> bool;

    /// Keeps a copy, unless one that the last daemon left is there already.
    fn deposit(&self, device: DiskSequence, descriptor: BorrowedFd<'_>);

    /// Returns when the copy is closed, or at least given up.
    fn withdraw(&self, device: DiskSequence) -> BoxFuture<'_, ()>;

    /// Closes the copies that nobody has taken up, except those of these devices. Blocks for as long as a
    /// backing file's file system does: this may be the last close.
    fn clear_out(&self, except: &HashSet<DiskSequence>);
}
