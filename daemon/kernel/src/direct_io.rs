//! Direct I/O: what it needs of a file, and when it is better than the page cache.

use std::os::fd::{AsFd, OwnedFd};

use loopd_common::limits::is_block_size;
use loopd_engine::AttachRequest;
use nix::sys::statfs::{EXT4_SUPER_MAGIC, FsType, XFS_SUPER_MAGIC, fstatfs};
use rustix::fs::{AtFlags, StatxFlags, statx};

use crate::backing_file::Examined;

/// In bytes: a smaller image fits into memory twice.
const LARGE: u64 = 1 << 30;
/// File systems that write data in place and without checksums. Others copy it, since it may change while it is written
/// (btrfs), or do not support direct I/O to their disk (tmpfs, FUSE, network file systems).
const IN_PLACE: [FsType; 2] = [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC];

/// The alignment in bytes that direct I/O to the file needs: the sector size of the disk below (`STATX_DIOALIGN`, Linux
/// 6.1). A loop device needs blocks at least as large. `None` if the kernel or the file system does not report it.
pub fn alignment(file: impl AsFd) -> Option<u32> {
    let found = statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
    let is_reported = StatxFlags::from_bits_retain(found.stx_mask).contains(StatxFlags::DIOALIGN);
    Some(found.stx_dio_offset_align).filter(|bytes| is_reported && is_block_size(*bytes))
}

/// Whether direct I/O is the better choice: for a large image that is written to. Its data is then cached once, by the
/// loop device, and not once more by the file (`docs/performance.md`). An image that is only read is often in the page
/// cache already.
pub fn is_better(file: &OwnedFd, examined: &Examined, request: &AttachRequest) -> bool {
    let is_written = examined.facts.writable && !request.read_only;
    let is_large = examined.size.is_some_and(|size| size >= LARGE);
    let is_in_place = || fstatfs(file).is_ok_and(|found| IN_PLACE.contains(&found.filesystem_type()));
    let is_aligned = || {
        let needed = alignment(file);
        needed.is_some_and(|bytes| {
            bytes <= request.block_size && request.offset.is_multiple_of(u64::from(bytes))
        })
    };
    is_written && is_large && is_in_place() && is_aligned()
}
