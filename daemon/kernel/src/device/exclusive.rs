//! Claims a loop device: `O_EXCL` on a block device is the claim that a mount, a mapped device and swap make,
//! in every mount namespace. A claim of the whole device excludes claims of its partitions.

use std::os::fd::OwnedFd;
use std::path::Path;

use loopd_engine::Error;
use loopd_engine::kernel::{Claim, DiskSequence, node};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::node::{is_same_attach, open};
use crate::error::{failed, is_gone};
use crate::wait;

fn not_claimed(number: u32, errno: Errno) -> Error {
    let operation = format!("claim {}", node(number));
    match errno {
        Errno::EBUSY => {
            Error::Busy { operation, reason: format!("it is {}; end that first", Claim::default()) }
        }
        errno => failed(operation, "open", errno),
    }
}

/// Opens and claims the device; `None` if this attach has ended.
///
/// # Errors
/// `Busy` if it is claimed; `Kernel`.
pub fn open_attached(
    number: u32,
    disk_sequence: DiskSequence,
    access: OFlag,
) -> Result<Option<OwnedFd>, Error> {
    let claim = || open(number, access | OFlag::O_EXCL);
    // Reading the partition table claims the disk for a moment (`disk_scan_partitions`, block/genhd.c).
    match wait::while_busy(Path::new(&node(number)), claim, || true) {
        Ok(device) => Ok(is_same_attach(&device, number, disk_sequence).then_some(device)),
        Err(errno) if is_gone(errno) => Ok(None),
        Err(errno) => Err(not_claimed(number, errno)),
    }
}
