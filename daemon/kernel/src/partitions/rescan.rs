//! Makes the kernel read a partition table again.

use std::os::fd::OwnedFd;

use loopd_engine::Error;
use loopd_engine::kernel::node;
use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::error::failed;
use crate::{device, ioctl, udev};

/// The operation in words that complete "cannot".
pub fn reading(number: u32) -> String {
    format!("read the partition table of {} again", node(number))
}

/// The error for a device without partition scan.
pub fn not_scanned(number: u32) -> Error {
    let reason = "it was attached without partition-scan".to_owned();
    Error::NotSupported { operation: reading(number), reason }
}

fn refusal(number: u32, errno: Errno) -> Error {
    match errno {
        Errno::EBUSY => {
            let reason = "a partition is in use; unmount or close it first".to_owned();
            Error::Busy { operation: reading(number), reason }
        }
        Errno::EINVAL => not_scanned(number),
        errno => failed(reading(number), "BLKRRPART", errno),
    }
}

/// Makes the kernel read the table again. Without the privilege for that it makes udev do so: udev does when
/// a writable descriptor is closed. Returns whether an event of udev follows.
pub fn rescan(number: u32, disk: &OwnedFd) -> Result<bool, Error> {
    match ioctl::reread_partitions(disk) {
        Ok(()) => Ok(false),
        Err(Errno::EPERM | Errno::EACCES) if udev::runs() => match device::open(number, OFlag::O_RDWR) {
            Ok(_closed) => Ok(true),
            Err(errno) => Err(failed(reading(number), "open", errno)),
        },
        Err(errno) => Err(refusal(number, errno)),
    }
}
