//! The ioctls of the loop driver (`linux/loop.h`) and of block devices (`linux/fs.h`), each as a safe function
//! of an open descriptor.
#![allow(unsafe_code)]

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use linux_raw_sys::ctypes::c_int;
use linux_raw_sys::loop_device::{
    LOOP_CHANGE_FD, LOOP_CLR_FD, LOOP_CONFIGURE, LOOP_CTL_ADD, LOOP_CTL_GET_FREE, LOOP_CTL_REMOVE,
    LOOP_GET_STATUS64, LOOP_SET_BLOCK_SIZE, LOOP_SET_CAPACITY, LOOP_SET_DIRECT_IO, LOOP_SET_STATUS64,
    loop_config, loop_info64,
};
use nix::Result;

mod raw {
    use super::{
        LOOP_CHANGE_FD, LOOP_CLR_FD, LOOP_CONFIGURE, LOOP_CTL_ADD, LOOP_CTL_GET_FREE, LOOP_CTL_REMOVE,
        LOOP_GET_STATUS64, LOOP_SET_BLOCK_SIZE, LOOP_SET_CAPACITY, LOOP_SET_DIRECT_IO, LOOP_SET_STATUS64,
    };
    use super::{loop_config, loop_info64};

    nix::ioctl_write_int_bad!(
        /// Adds the device with this number.
        ctl_add, LOOP_CTL_ADD);
    nix::ioctl_write_int_bad!(
        /// Removes the device with this number.
        ctl_remove, LOOP_CTL_REMOVE);
    nix::ioctl_none_bad!(
        /// Finds or adds a free device.
        ctl_get_free, LOOP_CTL_GET_FREE);
    nix::ioctl_write_ptr_bad!(
        /// Attaches a file with all parameters.
        configure, LOOP_CONFIGURE, loop_config);
    nix::ioctl_none_bad!(
        /// Detaches, now or at the last close.
        clr_fd, LOOP_CLR_FD);
    nix::ioctl_read_bad!(
        /// Reads the state.
        get_status64, LOOP_GET_STATUS64, loop_info64);
    nix::ioctl_write_ptr_bad!(
        /// Writes the state.
        set_status64, LOOP_SET_STATUS64, loop_info64);
    nix::ioctl_write_int_bad!(
        /// Replaces the file by another one of the same size.
        change_fd, LOOP_CHANGE_FD);
    nix::ioctl_none_bad!(
        /// Updates the size from the file.
        set_capacity, LOOP_SET_CAPACITY);
    nix::ioctl_write_int_bad!(
        /// Switches direct I/O on or off.
        set_direct_io, LOOP_SET_DIRECT_IO);
    nix::ioctl_write_int_bad!(
        /// Changes the logical block size.
        set_block_size, LOOP_SET_BLOCK_SIZE);
    nix::ioctl_read!(
        /// `BLKGETDISKSEQ`, Linux 5.15.
        blkgetdiskseq, 0x12, 128, u64);
    nix::ioctl_read_bad!(
        /// Size in bytes, in 64 bits, although the request code has the size of a `size_t`.
        blkgetsize64, nix::request_code_read!(0x12, 114, size_of::<usize>()), u64);
    nix::ioctl_read_bad!(
        /// Whether writing is refused.
        blkroget, nix::request_code_none!(0x12, 94), super::c_int);
    nix::ioctl_read_bad!(
        /// Logical block size.
        blksszget, nix::request_code_none!(0x12, 104), super::c_int);
    nix::ioctl_none!(
        /// Reads the partition table again.
        blkrrpart, 0x12, 95);
    nix::ioctl_write_ptr_bad!(
        /// Adds or deletes a partition.
        blkpg, nix::request_code_none!(0x12, 105), super::BlkpgArgument);
}

/// `struct blkpg_ioctl_arg` of `linux/blkpg.h`.
#[repr(C)]
pub struct BlkpgArgument {
    op: c_int,
    flags: c_int,
    datalen: c_int,
    data: *mut BlkpgPartition,
}

/// `struct blkpg_partition` of `linux/blkpg.h`: start and length in bytes.
#[repr(C)]
struct BlkpgPartition {
    start: i64,
    length: i64,
    pno: c_int,
    devname: [u8; 64],
    volname: [u8; 64],
}

const BLKPG_ADD_PARTITION: c_int = 1;
const BLKPG_DEL_PARTITION: c_int = 2;

fn number_argument(number: u32) -> Result<c_int> {
    c_int::try_from(number).map_err(|_| nix::Error::EINVAL)
}

fn number_result(result: c_int) -> Result<u32> {
    u32::try_from(result).map_err(|_| nix::Error::EINVAL)
}

/// The state of a loop device, all zero.
pub fn empty_info() -> loop_info64 {
    loop_info64 {
        lo_device: 0,
        lo_inode: 0,
        lo_rdevice: 0,
        lo_offset: 0,
        lo_sizelimit: 0,
        lo_number: 0,
        lo_encrypt_type: 0,
        lo_encrypt_key_size: 0,
        lo_flags: 0,
        lo_file_name: [0; 64],
        lo_crypt_name: [0; 64],
        lo_encrypt_key: [0; 32],
        lo_init: [0; 2],
    }
}

/// `LOOP_CTL_ADD` on `/dev/loop-control`: adds `/dev/loopN`. `EEXIST` if it exists.
pub fn add(control: impl AsFd, number: u32) -> Result<u32> {
    let number = number_argument(number)?;
    // SAFETY: the argument is a number, no memory is passed, and the descriptor is borrowed open.
    number_result(unsafe { raw::ctl_add(control.as_fd().as_raw_fd(), number) }?)
}

/// `LOOP_CTL_REMOVE` on `/dev/loop-control`. `EBUSY` if it is bound or open.
pub fn remove(control: impl AsFd, number: u32) -> Result<()> {
    let number = number_argument(number)?;
    // SAFETY: the argument is a number, no memory is passed, and the descriptor is borrowed open.
    unsafe { raw::ctl_remove(control.as_fd().as_raw_fd(), number) }.map(drop)
}

/// `LOOP_CTL_GET_FREE` on `/dev/loop-control`: a hint, since another process may take that number first.
pub fn free_number(control: impl AsFd) -> Result<u32> {
    // SAFETY: there is no argument, and the descriptor is borrowed open.
    number_result(unsafe { raw::ctl_get_free(control.as_fd().as_raw_fd()) }?)
}

/// `LOOP_CONFIGURE` (Linux 5.8): attaches `file` with all parameters in one call.
pub fn configure(device: impl AsFd, file: BorrowedFd<'_>, block_size: u32, info: loop_info64) -> Result<()> {
    let file = u32::try_from(file.as_raw_fd()).map_err(|_| nix::Error::EBADF)?;
    let config = loop_config { fd: file, block_size, info, __reserved: [0; 8] };
    // SAFETY: the kernel reads one `loop_config`, which outlives the call.
    unsafe { raw::configure(device.as_fd().as_raw_fd(), &raw const config) }.map(drop)
}

/// `LOOP_CLR_FD`. Success does not mean that the device is free.
pub fn clear(device: impl AsFd) -> Result<()> {
    // SAFETY: there is no argument, and the descriptor is borrowed open.
    unsafe { raw::clr_fd(device.as_fd().as_raw_fd()) }.map(drop)
}

/// `LOOP_GET_STATUS64`. `ENXIO` if nothing is attached.
pub fn status(device: impl AsFd) -> Result<loop_info64> {
    let mut info = empty_info();
    // SAFETY: the kernel writes one `loop_info64`, a struct of integers, for which all bit patterns are valid.
    unsafe { raw::get_status64(device.as_fd().as_raw_fd(), &raw mut info) }?;
    Ok(info)
}

/// `LOOP_SET_STATUS64`: needs a descriptor open for writing, and freezes the queue for some 16 ms.
pub fn set_status(device: impl AsFd, info: &loop_info64) -> Result<()> {
    // SAFETY: the kernel reads one `loop_info64`, which outlives the call.
    unsafe { raw::set_status64(device.as_fd().as_raw_fd(), info) }.map(drop)
}

/// `LOOP_CHANGE_FD`: replaces the file by another one of the same size. `EINVAL` if the device is writable or
/// the sizes differ.
pub fn change_file(device: impl AsFd, file: BorrowedFd<'_>) -> Result<()> {
    // SAFETY: the argument is the number of a descriptor; both descriptors are borrowed open.
    unsafe { raw::change_fd(device.as_fd().as_raw_fd(), file.as_raw_fd()) }.map(drop)
}

/// `LOOP_SET_CAPACITY`: updates the size from the file. Like the next two, needs a descriptor open for writing,
/// or CAP_SYS_ADMIN.
pub fn set_capacity(device: impl AsFd) -> Result<()> {
    // SAFETY: there is no argument, and the descriptor is borrowed open.
    unsafe { raw::set_capacity(device.as_fd().as_raw_fd()) }.map(drop)
}

/// `LOOP_SET_DIRECT_IO`: `EINVAL` if the file does not support it.
pub fn set_direct_io(device: impl AsFd, on: bool) -> Result<()> {
    // SAFETY: the argument is a number, no memory is passed, and the descriptor is borrowed open.
    unsafe { raw::set_direct_io(device.as_fd().as_raw_fd(), c_int::from(on)) }.map(drop)
}

/// `LOOP_SET_BLOCK_SIZE`, in bytes. `EAGAIN` or `EBUSY` while the device is in use.
pub fn set_block_size(device: impl AsFd, bytes: u32) -> Result<()> {
    let bytes = number_argument(bytes)?;
    // SAFETY: the argument is a number, no memory is passed, and the descriptor is borrowed open.
    unsafe { raw::set_block_size(device.as_fd().as_raw_fd(), bytes) }.map(drop)
}

/// `BLKGETDISKSEQ` (Linux 5.15; `ENOTTY` before).
pub fn disk_sequence(device: impl AsFd) -> Result<u64> {
    let mut sequence = 0;
    // SAFETY: the kernel writes one `u64`.
    unsafe { raw::blkgetdiskseq(device.as_fd().as_raw_fd(), &raw mut sequence) }?;
    Ok(sequence)
}

/// `BLKGETSIZE64`: the size in bytes.
pub fn size(device: impl AsFd) -> Result<u64> {
    let mut size = 0;
    // SAFETY: the kernel writes one `u64`.
    unsafe { raw::blkgetsize64(device.as_fd().as_raw_fd(), &raw mut size) }?;
    Ok(size)
}

/// `BLKROGET`: whether the device refuses writing.
pub fn read_only(device: impl AsFd) -> Result<bool> {
    let mut read_only = 0;
    // SAFETY: the kernel writes one `int`.
    unsafe { raw::blkroget(device.as_fd().as_raw_fd(), &raw mut read_only) }?;
    Ok(read_only != 0)
}

/// `BLKSSZGET`: the logical block size in bytes.
pub fn block_size(device: impl AsFd) -> Result<u32> {
    let mut size = 0;
    // SAFETY: the kernel writes one `int`.
    unsafe { raw::blksszget(device.as_fd().as_raw_fd(), &raw mut size) }?;
    number_result(size)
}

fn blkpg(device: impl AsFd, op: c_int, number: u32, start: u64, length: u64) -> Result<()> {
    let bytes = |bytes: u64| i64::try_from(bytes).map_err(|_| nix::Error::EINVAL);
    let mut partition = BlkpgPartition {
        start: bytes(start)?,
        length: bytes(length)?,
        pno: number_argument(number)?,
        devname: [0; 64],
        volname: [0; 64],
    };
    let datalen = c_int::try_from(size_of::<BlkpgPartition>()).map_err(|_| nix::Error::EINVAL)?;
    let argument = BlkpgArgument { op, flags: 0, datalen, data: &raw mut partition };
    // SAFETY: the kernel reads one `blkpg_ioctl_arg` and the `blkpg_partition` that it points to;
    // both outlive the call.
    unsafe { raw::blkpg(device.as_fd().as_raw_fd(), &raw const argument) }.map(drop)
}

/// `BLKPG_ADD_PARTITION`: start and length in bytes. Needs CAP_SYS_ADMIN. `EBUSY` if it
/// overlaps another one or the number is taken.
pub fn add_partition(disk: impl AsFd, number: u32, start: u64, length: u64) -> Result<()> {
    blkpg(disk, BLKPG_ADD_PARTITION, number, start, length)
}

/// `BLKPG_DEL_PARTITION`. Needs CAP_SYS_ADMIN. `EBUSY` if it is in use.
pub fn delete_partition(disk: impl AsFd, number: u32) -> Result<()> {
    blkpg(disk, BLKPG_DEL_PARTITION, number, 0, 0)
}

/// `BLKRRPART`: drops the partitions and reads the table again. Needs CAP_SYS_ADMIN; `EINVAL` on a device
/// without PARTSCAN, `EBUSY` if a partition is in use.
pub fn reread_partitions(disk: impl AsFd) -> Result<()> {
    // SAFETY: there is no argument, and the descriptor is borrowed open.
    unsafe { raw::blkrrpart(disk.as_fd().as_raw_fd()) }.map(drop)
}
