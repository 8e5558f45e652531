//! Makes the kernel read a partition table again.

use std::os::fd::OwnedFd;

use loopd_common::{Error, ErrorKind};
use loopd_engine::kernel::node;
use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::{device, ioctl, udev};

/// The error for a table that cannot be read again.
pub fn not_read_again(number: u32, kind: ErrorKind, why: &str) -> Error {
    Error::new(kind, format!("cannot read the partition table of {} again: {why}", node(number)))
}

/// The error for a device without partition scan.
pub fn not_scanned(number: u32) -> Error {
    not_read_again(number, ErrorKind::NotSupported, "it was attached without partition-scan")
}

fn refusal(number: u32, errno: Errno) -> Error {
    match errno {
        Errno::EBUSY => {
            not_read_again(number, ErrorKind::Busy, "a partition is in use; unmount or close it first")
        }
        Errno::EINVAL => not_scanned(number),
        errno => not_read_again(number, ErrorKind::Kernel, errno.desc()),
    }
}

/// Makes the kernel read the table again. Without the privilege for that it makes udev do so: udev does when
/// a writable descriptor is closed. Returns whether an event of udev follows.
pub fn rescan(number: u32, disk: &OwnedFd) -> Result<bool, Error> {
    match ioctl::reread_partitions(disk) {
        Ok(()) => Ok(false),
        Err(Errno::EPERM | Errno::EACCES) if udev::runs() => match device::open(number, OFlag::O_RDWR) {
            Ok(_closed) => Ok(true),
            Err(errno) => Err(not_read_again(number, ErrorKind::Kernel, errno.desc())),
        },
        Err(errno) => Err(refusal(number, errno)),
    }
}
