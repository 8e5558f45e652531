//! Changes of an attached device.

use std::os::fd::OwnedFd;

use linux_raw_sys::loop_device::_bindgen_ty_1 as LoFlags;
use loopd_common::text::printable;
use loopd_engine::Error;
use loopd_engine::kernel::{Change, Device, DiskSequence};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use crate::error::failed;
use crate::{device, ioctl};

/// How many times a call that fails with `EAGAIN` is made.
const ATTEMPTS: u32 = 64;

/// The error for a failed change.
fn refusal(device: &Device, change: Change, errno: Errno) -> Error {
    let (operation, call) = describe(device, change);
    match (change, errno) {
        (_, Errno::EBUSY | Errno::EAGAIN) => {
            Error::Busy { operation, reason: "it is in use; end that first, then try again".to_owned() }
        }
        (Change::DirectIo(_), Errno::EINVAL | Errno::EOPNOTSUPP) => Error::NotSupported {
            operation,
            reason: format!(
                "its file system, its offset {} or its block size {} does not allow it",
                device.offset, device.block_size
            ),
        },
        (Change::BlockSize(_), Errno::EINVAL) => {
            Error::NotSupported { operation, reason: "this kernel does not accept that size".to_owned() }
        }
        _ => failed(operation, call, errno),
    }
}

/// The change in words that complete "cannot", and its ioctl.
fn describe(device: &Device, change: Change) -> (String, &'static str) {
    let (name, file) = (device.node(), printable(&device.backing_file));
    match change {
        Change::Capacity => (format!("update the size of {name} from {file}"), "LOOP_SET_CAPACITY"),
        Change::DirectIo(true) => (format!("switch {name} ({file}) to direct I/O"), "LOOP_SET_DIRECT_IO"),
        Change::DirectIo(false) => (format!("switch {name} ({file}) from direct I/O"), "LOOP_SET_DIRECT_IO"),
        Change::BlockSize(bytes) => {
            (format!("set the block size of {name} ({file}) to {bytes}"), "LOOP_SET_BLOCK_SIZE")
        }
        Change::Autoclear(_) => (format!("change the lifetime of {name} ({file})"), "LOOP_SET_STATUS64"),
    }
}

/// Changes the device and returns its new state; `None` if this attach has ended.
pub fn apply(number: u32, disk_sequence: DiskSequence, change: Change) -> Result<Option<Device>, Error> {
    let device = match change {
        // Blocks of another size destroy a file system. The claim finds a mount in any namespace, swap, and
        // devices built on this one.
        Change::BlockSize(_) => device::exclusive::open_attached(number, disk_sequence, OFlag::O_RDWR)?,
        _ => device::open_attached_for(number, disk_sequence, OFlag::O_RDWR)?,
    };
    let Some(device) = device else { return Ok(None) };
    let state = || device::read_state(number, &device).map_err(|errno| device::unreadable(number, errno));
    let before = state()?;
    match call_until_ready(&device, change) {
        Ok(()) => {}
        Err(Errno::ENXIO) => return Ok(None),
        Err(errno) => return Err(refusal(&before, change, errno)),
    }
    let after = state()?;
    if let Change::DirectIo(wanted) = change
        && after.direct_io != wanted
    {
        // Some kernels report success without the change (`loop_set_dio` with an unaligned offset).
        return Err(refusal(&before, change, Errno::EINVAL));
    }
    Ok(Some(after))
}

/// Repeats a call that fails with `EAGAIN`: the page cache was filled while the queue was frozen, or another
/// process has the device open for a moment.
fn call_until_ready(device: &OwnedFd, change: Change) -> nix::Result<()> {
    let mut results = (0..ATTEMPTS).map(|_| call(device, change));
    results.find(|result| *result != Err(Errno::EAGAIN)).unwrap_or(Err(Errno::EAGAIN))
}

fn call(device: &OwnedFd, change: Change) -> nix::Result<()> {
    match change {
        Change::Capacity => ioctl::set_capacity(device),
        Change::DirectIo(on) => ioctl::set_direct_io(device, on),
        Change::BlockSize(bytes) => ioctl::set_block_size(device, bytes),
        Change::Autoclear(on) => set_autoclear(device, on),
    }
}

fn set_autoclear(device: &OwnedFd, on: bool) -> nix::Result<()> {
    let mut info = ioctl::status(device)?;
    let flag = LoFlags::LO_FLAGS_AUTOCLEAR as u32;
    let wanted = if on { info.lo_flags | flag } else { info.lo_flags & !flag };
    if wanted == info.lo_flags {
        return Ok(());
    }
    info.lo_flags = wanted;
    ioctl::set_status(device, &info)
}
