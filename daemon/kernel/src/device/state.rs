//! The state of a loop device.

use std::os::fd::OwnedFd;

use linux_raw_sys::loop_device::_bindgen_ty_1 as LoFlags;
use loopd_engine::Error;
use loopd_engine::kernel::{Device, DiskSequence, node};
use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::sys::stat::{fstat, major, minor};

use super::node::open;
use super::reference::decode_file_name;
use crate::error::{described, failed, is_gone};
use crate::ioctl;
use crate::sysfs::{DeviceNumber, loop_device};

/// The error for a state that cannot be read.
pub fn unreadable(number: u32, errno: Errno) -> Error {
    Error::BackingFileUnreadable { number, source: described(errno) }
}

/// The state of a device; `None` if nothing is attached.
pub fn status(number: u32) -> Result<Option<Device>, Error> {
    if !loop_device::is_bound(number) {
        return Ok(None);
    }
    let device = match open(number, OFlag::O_RDONLY) {
        Ok(device) => device,
        Err(errno) if is_gone(errno) => return Ok(None),
        Err(errno) => return Err(failed(format!("open {}", node(number)), "open", errno)),
    };
    match read_state(number, &device) {
        Ok(state) => Ok(Some(state)),
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(unreadable(number, errno)),
    }
}

/// The state of an open device. `ENXIO` if nothing is attached.
pub fn read_state(number: u32, device: &OwnedFd) -> nix::Result<Device> {
    let info = ioctl::status(device)?;
    let (reference, mark) = decode_file_name(&info.lo_file_name);
    let has = |flag: LoFlags| info.lo_flags & flag as u32 != 0;
    Ok(Device {
        number,
        device_number: device_number(fstat(device)?.st_rdev),
        disk_sequence: DiskSequence(ioctl::disk_sequence(device)?),
        backing_file: loop_device::backing_file(number).unwrap_or_default(),
        backing_device: info.lo_device,
        backing_inode: info.lo_inode,
        // 0 for a regular file (`loop_get_status`).
        backing_block_device: (info.lo_rdevice != 0).then(|| device_number(info.lo_rdevice)),
        offset: info.lo_offset,
        size_limit: info.lo_sizelimit,
        size: ioctl::size(device)?,
        reference,
        mark,
        read_only: ioctl::read_only(device)?,
        direct_io: has(LoFlags::LO_FLAGS_DIRECT_IO),
        block_size: ioctl::block_size(device)?,
        partition_scan: has(LoFlags::LO_FLAGS_PARTSCAN),
        autoclear: has(LoFlags::LO_FLAGS_AUTOCLEAR),
    })
}

/// Whether the device was attached with `LO_FLAGS_PARTSCAN`.
pub fn is_scanned(device: &OwnedFd) -> bool {
    ioctl::status(device).is_ok_and(|info| info.lo_flags & LoFlags::LO_FLAGS_PARTSCAN as u32 != 0)
}

/// Whether the device is read-only while nothing is attached: `BLKROSET` outlives a detach.
pub fn is_set_read_only(number: u32) -> bool {
    open(number, OFlag::O_RDONLY).is_ok_and(|device| ioctl::read_only(&device) == Ok(true))
}

fn device_number(device: u64) -> DeviceNumber {
    let number = |number| u32::try_from(number).unwrap_or_default();
    (number(major(device)), number(minor(device)))
}
