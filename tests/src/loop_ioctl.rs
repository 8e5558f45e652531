//! Direct calls of the loop driver's ioctls, for comparisons with the daemon.
#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::AsRawFd as _;

use anyhow::{Context as _, Result};
use linux_raw_sys::loop_device::{
    LOOP_CLR_FD, LOOP_CONFIGURE, LOOP_CTL_ADD, LOOP_CTL_GET_FREE, LOOP_CTL_REMOVE, LOOP_GET_STATUS64,
    loop_config, loop_info64,
};

use crate::sysfs::{Extent, LoopDevice};

const BLKPG_ADD_PARTITION: i32 = 1;

mod raw {
    use super::{
        LOOP_CLR_FD, LOOP_CONFIGURE, LOOP_CTL_ADD, LOOP_CTL_GET_FREE, LOOP_CTL_REMOVE, LOOP_GET_STATUS64,
        loop_config, loop_info64,
    };

    nix::ioctl_none_bad!(get_free, LOOP_CTL_GET_FREE);
    nix::ioctl_write_int_bad!(add, LOOP_CTL_ADD);
    nix::ioctl_write_int_bad!(remove, LOOP_CTL_REMOVE);
    nix::ioctl_write_ptr_bad!(configure, LOOP_CONFIGURE, loop_config);
    nix::ioctl_none_bad!(clear, LOOP_CLR_FD);
    nix::ioctl_read_bad!(get_status, LOOP_GET_STATUS64, loop_info64);
    nix::ioctl_write_ptr_bad!(blkpg, nix::request_code_none!(0x12, 105), BlkpgArgument);

    /// `struct blkpg_ioctl_arg`
    #[repr(C)]
    pub struct BlkpgArgument {
        pub op: i32,
        pub flags: i32,
        pub datalen: i32,
        pub data: *mut BlkpgPartition,
    }

    /// `struct blkpg_partition`
    #[repr(C)]
    pub struct BlkpgPartition {
        pub start: i64,
        pub length: i64,
        pub pno: i32,
        pub devname: [u8; 64],
        pub volname: [u8; 64],
    }
}

/// Opens `/dev/loop-control`.
///
/// # Errors
/// It cannot be opened.
pub fn control() -> Result<File> {
    File::options().read(true).write(true).open("/dev/loop-control").context("/dev/loop-control")
}

/// A device that was free at the time of the call.
///
/// # Errors
/// The kernel's.
pub fn get_free(control: &File) -> Result<LoopDevice> {
    // SAFETY: the ioctl takes no argument.
    let number = unsafe { raw::get_free(control.as_raw_fd()) }?;
    Ok(LoopDevice(u32::try_from(number)?))
}

/// Creates a device.
///
/// # Errors
/// It already exists.
pub fn add(control: &File, device: LoopDevice) -> Result<()> {
    // SAFETY: the argument is a plain number.
    unsafe { raw::add(control.as_raw_fd(), device.0.cast_signed()) }?;
    Ok(())
}

/// Removes a free device.
///
/// # Errors
/// The device is in use.
pub fn remove(control: &File, device: LoopDevice) -> Result<()> {
    // SAFETY: the argument is a plain number.
    unsafe { raw::remove(control.as_raw_fd(), device.0.cast_signed()) }?;
    Ok(())
}

/// Attaches the whole file with these `LO_FLAGS_*`.
///
/// # Errors
/// The kernel's.
pub fn configure(device: &File, backing: &File, flags: u32) -> nix::Result<()> {
    // SAFETY: the structure is plain data, for which zeros are a valid value.
    let mut config: loop_config = unsafe { std::mem::zeroed() };
    config.fd = backing.as_raw_fd().cast_unsigned();
    config.info.lo_flags = flags;
    // SAFETY: the kernel reads one loop_config, which outlives the call.
    unsafe { raw::configure(device.as_raw_fd(), &raw const config) }.map(drop)
}

/// Detaches; a device in use is detached at its last close.
///
/// # Errors
/// The kernel's.
pub fn clear(device: &File) -> nix::Result<()> {
    // SAFETY: the ioctl takes no argument.
    unsafe { raw::clear(device.as_raw_fd()) }.map(drop)
}

/// Adds the node of a partition (`BLKPG_ADD_PARTITION`).
///
/// # Errors
/// The kernel's: `EBUSY` if it overlaps another one or the number is taken.
pub fn add_partition(disk: &File, number: u32, place: Extent) -> nix::Result<()> {
    let bytes = |bytes: u64| i64::try_from(bytes).map_err(|_| nix::Error::EINVAL);
    let mut partition = raw::BlkpgPartition {
        start: bytes(place.start)?,
        length: bytes(place.size)?,
        pno: number.cast_signed(),
        devname: [0; 64],
        volname: [0; 64],
    };
    let argument = raw::BlkpgArgument {
        op: BLKPG_ADD_PARTITION,
        flags: 0,
        datalen: i32::try_from(size_of::<raw::BlkpgPartition>()).map_err(|_| nix::Error::EINVAL)?,
        data: &raw mut partition,
    };
    // SAFETY: the kernel reads the argument and the partition that it points to; both outlive the call.
    unsafe { raw::blkpg(disk.as_raw_fd(), &raw const argument) }.map(drop)
}

/// The text that losetup shows as REF.
///
/// # Errors
/// Nothing is attached to the device.
pub fn reference(device: LoopDevice) -> Result<String> {
    let file = File::open(device.node())?;
    // SAFETY: the structure is plain data, for which zeros are a valid value.
    let mut status: loop_info64 = unsafe { std::mem::zeroed() };
    // SAFETY: the kernel writes one loop_info64, which outlives the call.
    unsafe { raw::get_status(file.as_raw_fd(), &raw mut status) }?;
    let end = status.lo_file_name.iter().position(|byte| *byte == 0).unwrap_or(64);
    Ok(String::from_utf8_lossy(&status.lo_file_name[..end]).into_owned())
}
