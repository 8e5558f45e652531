//! Copies of the descriptors that keep devices attached, which outlive the daemon.

use std::collections::HashSet;
use std::os::fd::BorrowedFd;

use loopd_engine::kernel::DiskSequence;

/// A store of descriptors.
pub trait DescriptorStore: Send + Sync {
    /// Whether the last daemon has left a copy for this device that was not adopted yet.
    fn has_stored_hold(&self, device: DiskSequence) -> bool;

    /// Stores a copy, unless there is one already that the last daemon has left.
    fn deposit(&self, device: DiskSequence, descriptor: BorrowedFd<'_>);

    /// Waits until the copies are closed, or at least given up: blocks for some seconds if the service manager does not
    /// answer.
    fn withdraw(&self, devices: &[DiskSequence]);

    /// Closes the copies that were not adopted, except those of these devices. Blocks as long as the file
    /// system of a backing file does: this may be the last close.
    fn clear_out(&self, except: &HashSet<DiskSequence>);
}
