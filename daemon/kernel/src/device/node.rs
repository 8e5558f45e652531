//! Opens the node of a loop device, and checks that it still is the same attach.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileExt as _, FileTypeExt as _, OpenOptionsExt as _};

use loopd_engine::Error;
use loopd_engine::kernel::{DiskSequence, node};
use nix::errno::Errno;
use nix::fcntl::{OFlag, PosixFadviseAdvice, posix_fadvise};

use crate::error::{errno_of, failed, is_gone};
use crate::ioctl;
use crate::sysfs::loop_device;

fn not_opened(number: u32, errno: Errno) -> Error {
    match errno {
        // A kernel without CONFIG_BLK_DEV_WRITE_MOUNTED.
        Errno::EBUSY => Error::Busy {
            operation: format!("open {} for writing", node(number)),
            reason: "this kernel refuses that while it is mounted".to_owned(),
        },
        errno => failed(format!("open {}", node(number)), "open", errno),
    }
}

fn not_read(number: u32, source: std::io::Error) -> Error {
    Error::Io { operation: format!("read from {}", node(number)), source }
}

/// Opens the node of a loop device: `O_RDONLY` or `O_RDWR`, and `O_EXCL` to claim it.
pub fn open(number: u32, access: OFlag) -> nix::Result<OwnedFd> {
    open_node(&node(number), access)
}

/// Opens the node of a block device.
pub fn open_node(node: &str, access: OFlag) -> nix::Result<OwnedFd> {
    let claim = access & OFlag::O_EXCL;
    let file = OpenOptions::new()
        .read(true)
        .write(access & OFlag::O_ACCMODE == OFlag::O_RDWR)
        .custom_flags((claim | OFlag::O_CLOEXEC | OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK).bits())
        .open(node)
        .map_err(|error| errno_of(&error))?;
    let is_block_device = file.metadata().is_ok_and(|metadata| metadata.file_type().is_block_device());
    if is_block_device { Ok(file.into()) } else { Err(Errno::ENOTBLK) }
}

/// Opens the device for reading; `None` if this attach has ended.
pub fn open_attached(number: u32, disk_sequence: DiskSequence) -> Result<Option<OwnedFd>, Error> {
    open_attached_for(number, disk_sequence, OFlag::O_RDONLY)
}

/// Opens the device; `None` if this attach has ended.
pub fn open_attached_for(
    number: u32,
    disk_sequence: DiskSequence,
    access: OFlag,
) -> Result<Option<OwnedFd>, Error> {
    match open(number, access) {
        Ok(device) => Ok(is_same_attach(&device, number, disk_sequence).then_some(device)),
        Err(errno) if is_gone(errno) => Ok(None),
        Err(errno) => Err(not_opened(number, errno)),
    }
}

/// Whether an open device is bound with this disk sequence.
pub fn is_same_attach(device: &OwnedFd, number: u32, disk_sequence: DiskSequence) -> bool {
    // Not LOOP_GET_STATUS64: it accesses the file system of the backing file (`loop_get_status`), which may hang.
    ioctl::disk_sequence(device) == Ok(disk_sequence.0) && loop_device::is_bound(number)
}

/// Reads bytes of the device; fewer at its end, none if this attach has ended.
pub fn read_bytes(
    number: u32,
    disk_sequence: DiskSequence,
    offset: u64,
    length: usize,
) -> Result<Vec<u8>, Error> {
    let Some(device) = open_attached(number, disk_sequence)? else { return Ok(Vec::new()) };
    // Drops the device's page cache, which does not notice that a program has written to the backing file.
    let _best_effort = posix_fadvise(&device, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
    let mut bytes = vec![0; length];
    let read = File::from(device).read_at(&mut bytes, offset).map_err(|error| not_read(number, error))?;
    bytes.truncate(read);
    Ok(bytes)
}
