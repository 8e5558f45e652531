//! The errors of an attach that the kernel refuses.

use std::os::fd::{AsFd as _, OwnedFd};

use loopd_engine::Error;
use loopd_engine::kernel::node;
use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::wanted::Wanted;
use crate::error::failed;
use crate::shared::Shared;
use crate::sysfs::loop_device;
use crate::{device, direct_io, ioctl, numbers};

/// Every kernel accepts block sizes up to the smallest page size.
const SMALLEST_PAGE: u32 = 4096;

fn block_size_refused(name: &str, block_size: u32, largest: u32) -> Error {
    Error::NotSupported {
        operation: format!("attach {name} with a block size of {block_size}"),
        reason: format!("this kernel takes at most {largest}"),
    }
}

fn no_access(name: &str, number: u32) -> Error {
    let reason = format!("{}, or choose another number", closed_to_us(number));
    Error::Failed { operation: format!("attach {name}"), reason }
}

fn made_read_only(name: &str, number: u32) -> Error {
    let reason = format!("{}, or choose another number", set_read_only(number));
    Error::Failed { operation: format!("attach {name}"), reason }
}

/// The error for a device whose node is missing.
pub fn node_missing(name: &str, number: u32) -> Error {
    let node = node(number);
    let reason = format!(
        "the kernel has {node}, and /dev does not: in a container add the node, else make it again (mknod {node} b 7 {number})"
    );
    Error::Failed { operation: format!("attach {name}"), reason }
}

/// Whether an error comes from a missing node: the device exists.
pub fn is_node_missing(errno: Errno, number: u32) -> bool {
    errno == Errno::ENOENT && loop_device::exists(number)
}

fn no_direct_io(wanted: Wanted<'_>) -> Error {
    let (offset, block_size) = (wanted.request.offset, wanted.request.block_size);
    let reason = match direct_io::alignment(wanted.file) {
        Some(needed) if needed > block_size => format!(
            "its disk has sectors of {needed} bytes, and blocks of {block_size} are smaller; use a block size of {needed}, or \
             leave direct-io out"
        ),
        Some(needed) if !offset.is_multiple_of(u64::from(needed)) => format!(
            "its disk has sectors of {needed} bytes, and the offset {offset} is no multiple of that; leave direct-io out"
        ),
        _ => format!("its file system, offset {offset} or block size does not allow it; leave direct-io out"),
    };
    Error::NotSupported { operation: format!("attach {} with direct I/O", wanted.name()), reason }
}

fn built_on_itself(name: &str, number: u32) -> Error {
    let reason = format!("it is itself built on {}", node(number));
    Error::InvalidBackingFile { operation: format!("attach {name}"), reason }
}

fn file_refused(name: &str, errno: Errno) -> Error {
    let reason = format!("the kernel refuses this file ({errno:?}, {}); is it a swap file?", errno.desc());
    Error::InvalidBackingFile { operation: format!("attach {name}"), reason }
}

/// The error for a failed attach.
pub fn refusal(shared: &Shared, number: u32, wanted: Wanted<'_>, errno: Errno) -> Error {
    let name = wanted.name();
    let block_size = wanted.request.block_size;
    match errno {
        Errno::EBUSY => numbers::taken(number, &name),
        Errno::EACCES if is_closed_to_us(number) => no_access(&name, number),
        Errno::EROFS if device::is_set_read_only(number) => made_read_only(&name, number),
        errno if is_node_missing(errno, number) => node_missing(&name, number),
        Errno::EINVAL if block_size > SMALLEST_PAGE => {
            reset(number, wanted.file);
            block_size_refused(&name, block_size, shared.refuse_block(block_size))
        }
        Errno::EOPNOTSUPP => no_direct_io(wanted),
        Errno::EBADF | Errno::ELOOP => built_on_itself(&name, number),
        Errno::EPERM | Errno::ETXTBSY | Errno::EROFS | Errno::EACCES => file_refused(&name, errno),
        errno => failed(format!("attach {name}"), "LOOP_CONFIGURE", errno),
    }
}

/// Refuses a block size that the kernel has refused before.
pub fn refuse_block_size(shared: &Shared, wanted: Wanted<'_>) -> Result<(), Error> {
    let (block_size, largest) = (wanted.request.block_size, shared.largest_block());
    if block_size <= largest {
        return Ok(());
    }
    Err(block_size_refused(&wanted.name(), block_size, largest))
}

/// Whether the node belongs to another user: root without capabilities has no access to it then.
pub fn is_closed_to_us(number: u32) -> bool {
    matches!(device::open(number, OFlag::O_RDWR), Err(Errno::EACCES))
}

/// The message for a device that another program has set read-only. The kernel keeps that over detaches.
pub fn set_read_only(number: u32) -> String {
    let node = node(number);
    format!("{node} was set read-only by another program; set it writable (blockdev --setrw {node})")
}

/// The message for a node that belongs to another user.
pub fn closed_to_us(number: u32) -> String {
    let node = node(number);
    format!("{node} may not be opened by root (EACCES); give it back (chown root:disk {node})")
}

/// Makes a device usable again whose block size the kernel has refused. The kernel leaves uevents suppressed and the
/// device read-only until the next successful `LOOP_CONFIGURE` (Linux 5.15 to 6.x, `loop_configure`): this makes
/// one and detaches the file again.
fn reset(number: u32, file: &OwnedFd) {
    let Ok(device) = device::open(number, OFlag::O_RDONLY) else { return };
    if ioctl::configure(&device, file.as_fd(), 512, ioctl::empty_info()).is_ok() {
        let _ends_at_close = ioctl::clear(&device);
    }
}
