//! Claiming a device: `O_EXCL` on a block device is the claim that a mount, a mapped device and swap make,
//! in every mount namespace. A claim of the whole device excludes claims of its partitions.

use std::os::fd::OwnedFd;
use std::time::Instant;

use loopd_common::{Error, ErrorKind};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::inotify::AddWatchFlags;

use super::inotify;
use super::linux::{self, PASSING, RELEASE, failed};
use loopd_engine::kernel::{DiskSequence, node};

/// Opens and claims the device if it is the one of this attach; `None` if that is over.
///
/// # Errors
/// `Busy` if it is claimed; `Kernel`.
pub fn open_attached(
    number: u32,
    disk_sequence: DiskSequence,
    access: OFlag,
) -> Result<Option<OwnedFd>, Error> {
    match open(number, access) {
        Ok(device) => Ok(linux::is_of(&device, number, disk_sequence).then_some(device)),
        Err(Errno::ENXIO | Errno::ENOENT | Errno::ENODEV) => Ok(None),
        Err(Errno::EBUSY) => Err(Error::new(
            ErrorKind::Busy,
            format!(
                "{} is claimed: by a file system, possibly one that was unmounted lazily or is mounted in another \
                 mount namespace, by swap, by a device built on it or by another program",
                node(number)
            ),
        )),
        Err(errno) => Err(failed(&format!("claim {}", node(number)), "open", errno)),
    }
}

/// Tries again at each close of the node, for a bounded time: reading the partition table claims the disk for
/// a moment (`disk_scan_partitions`, block/genhd.c).
fn open(number: u32, access: OFlag) -> nix::Result<OwnedFd> {
    let claim = || linux::open(number, access | OFlag::O_EXCL);
    match claim() {
        Err(Errno::EBUSY) => {}
        opened => return opened,
    }
    let deadline = Instant::now() + PASSING;
    let closes = inotify::new()?;
    closes.add_watch(node(number).as_str(), AddWatchFlags::IN_CLOSE)?;
    let mut is_early = true;
    while is_early {
        match claim() {
            Err(Errno::EBUSY) => {}
            opened => return opened,
        }
        is_early = inotify::comes(&closes, deadline, |_| true);
        // The kernel tells of a close before it lets go of the device (__fput in fs/file_table.c).
        std::thread::sleep(RELEASE);
    }
    claim()
}
