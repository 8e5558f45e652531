//! Detaches a device.

use loopd_engine::Error;
use loopd_engine::kernel::{DetachAttempt, DiskSequence, QueuedHold, ReleaseQueue, node};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::error::failed;
use crate::hold::Hold;
use crate::shared::Shared;
use crate::sysfs::loop_device;
use crate::{device, ioctl, users};

fn not_detached(number: u32, errno: Errno) -> Error {
    failed(format!("detach {}", node(number)), "LOOP_CLR_FD", errno)
}

/// Closes a hold. The last close detaches the device, which writes to the backing file.
pub fn release(shared: &Shared, hold: Hold) {
    // First, so that the service manager does not make the last close.
    shared.fd_store.withdraw(&[hold.disk_sequence()]);
    drop(hold);
}

/// Closes the holds of a queue one after the other.
pub fn release_queued(shared: &Shared, queue: &ReleaseQueue<Hold>) {
    queue.prepare(Hold::disk_sequence, |all| shared.fd_store.withdraw(&all));
    while let Some(QueuedHold { id, number, disk_sequence, hold }) = queue.next() {
        drop(hold);
        queue.report(id, has_ended(number, disk_sequence));
    }
}

/// Detaches a device that has no users, and waits for its rundown.
pub fn detach_unused(
    shared: &Shared,
    number: u32,
    disk_sequence: DiskSequence,
    hold: Option<Hold>,
) -> DetachAttempt<Hold> {
    match users::of_loop(number) {
        Ok(users) if users.is_empty() => {}
        users => return DetachAttempt::Kept(hold, users),
    }
    match hold {
        Some(hold) => release(shared, hold),
        None => {
            if let Err(error) = clear_stored(shared, number, disk_sequence) {
                return DetachAttempt::Failed(error);
            }
        }
    }
    let detached = has_ended(number, disk_sequence);
    if detached {
        await_rundown(number);
    }
    DetachAttempt::Released { detached }
}

/// Waits until the last close of any process has taken the device down.
pub fn await_rundown(number: u32) {
    drop(device::open(number, OFlag::O_RDONLY));
}

/// Whether this attach has ended; false if that cannot be read.
fn has_ended(number: u32, disk_sequence: DiskSequence) -> bool {
    loop_device::bound(number).is_ok_and(|bound| bound != Some(disk_sequence))
}

/// Detaches the device now, or at its last close. Does nothing if this attach has ended.
pub fn clear(number: u32, disk_sequence: DiskSequence) -> Result<(), Error> {
    let Some(device) = device::open_attached(number, disk_sequence)? else { return Ok(()) };
    match ioctl::clear(&device) {
        Ok(()) | Err(Errno::ENXIO) => Ok(()),
        Err(errno) => Err(not_detached(number, errno)),
    }
}

/// The same, for a device of which an earlier daemon may have left a copy of its hold: that would keep it attached.
pub fn clear_stored(shared: &Shared, number: u32, disk_sequence: DiskSequence) -> Result<(), Error> {
    shared.fd_store.withdraw(&[disk_sequence]);
    clear(number, disk_sequence)
}
