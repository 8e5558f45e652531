//! The alignment that direct I/O to a file needs.

use std::os::fd::AsFd;

use loopd_common::limits::is_block_size;
use rustix::fs::{AtFlags, StatxFlags, statx};

/// The alignment in bytes that direct I/O to the file needs: the sector size of the disk below (`STATX_DIOALIGN`, Linux
/// 6.1). A loop device needs blocks at least as large. `None` if the kernel or the file system does not report it.
pub fn alignment(file: impl AsFd) -> Option<u32> {
    let found = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let is_reported = StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::DIOALIGN);
    Some(found.stx_dio_offset_align).filter(|bytes| is_reported && is_block_size(*bytes))
}
