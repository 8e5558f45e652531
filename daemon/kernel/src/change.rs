//! Changes of an attached device.

use std::os::fd::{AsFd, OwnedFd};

use linux_raw_sys::loop_device::_bindgen_ty_1 as LoFlags;
use loopd_common::{Error, ErrorKind};
use nix::errno::Errno;
use nix::fcntl::OFlag;

use super::linux::{self, failed};
use super::{backing_file, exclusive, ioctl};
use loopd_common::text::printable;
use loopd_engine::kernel::{Change, Device, DiskSequence, node};

/// How often a call is made that meets someone in passing, such as a probe of udev.
const ATTEMPTS: u32 = 64;

/// Changes the device and looks what it is then.
pub fn apply(number: u32, disk_sequence: DiskSequence, change: Change) -> Result<Option<Device>, Error> {
    let device = match change {
        // Blocks of another size destroy a file system: the kernel's own claim tells of a mount in any
        // namespace, of swap, and of what is built on the device.
        Change::BlockSize(_) => exclusive::open_attached(number, disk_sequence, OFlag::O_RDWR)?,
        _ => linux::open_attached_for(number, disk_sequence, OFlag::O_RDWR)?,
    };
    let Some(device) = device else { return Ok(None) };
    let before = linux::read_device(number, &device).map_err(|errno| unreadable(number, errno))?;
    let done = (0..ATTEMPTS).map(|_| call(&device, change)).find(|result| !is_passing(*result));
    match done.unwrap_or(Err(Errno::EAGAIN)) {
        Ok(()) => {}
        Err(Errno::ENXIO) => return Ok(None),
        Err(errno) => return Err(refusal(&before, change, errno)),
    }
    let after = linux::read_device(number, &device).map_err(|errno| unreadable(number, errno))?;
    if let Change::DirectIo(wanted) = change
        && after.direct_io != wanted
    {
        // Older kernels say yes and do not (`loop_set_dio` before Linux 5.x where it is unaligned).
        return Err(refusal(&before, change, Errno::EINVAL));
    }
    Ok(Some(after))
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

/// The page cache was filled while the queue stood still, or someone has the device for a moment.
fn is_passing(result: nix::Result<()>) -> bool {
    result == Err(Errno::EAGAIN)
}

/// Has the device show another file.
pub fn replace(number: u32, disk_sequence: DiskSequence, file: &OwnedFd) -> Result<Option<Device>, Error> {
    let examined = backing_file::examine(file)?;
    backing_file::refuse_appending(&examined)?;
    let name = printable(&examined.facts.path);
    let Some(device) = linux::open_attached(number, disk_sequence)? else { return Ok(None) };
    let before = linux::read_device(number, &device).map_err(|errno| unreadable(number, errno))?;
    if !before.read_only {
        return Err(Error::new(
            ErrorKind::NotSupported,
            format!(
                "cannot show {name} on {}: the kernel does that on read-only devices only; attach with read-only",
                node(number)
            ),
        ));
    }
    match ioctl::change_file(&device, file.as_fd()) {
        Ok(()) => {}
        Err(Errno::ENXIO) => return Ok(None),
        Err(Errno::EINVAL) => {
            return Err(Error::new(
                ErrorKind::InvalidBackingFile,
                format!(
                    "cannot show {name} on {}: it must be as large as the file before, {} ({} bytes from offset {} on)",
                    node(number),
                    printable(&before.backing_file),
                    before.size,
                    before.offset
                ),
            ));
        }
        Err(Errno::EBADF) => {
            return Err(Error::new(
                ErrorKind::InvalidBackingFile,
                format!("cannot show {name} on {}: it is itself built on that device", node(number)),
            ));
        }
        Err(errno) => {
            return Err(failed(&format!("show {name} on {}", node(number)), "LOOP_CHANGE_FD", errno));
        }
    }
    linux::read_device(number, &device).map(Some).map_err(|errno| unreadable(number, errno))
}

fn unreadable(number: u32, errno: Errno) -> Error {
    failed(&format!("read the state of {}", node(number)), "LOOP_GET_STATUS64", errno)
}

/// What a failed change is told as.
fn refusal(device: &Device, change: Change, errno: Errno) -> Error {
    let (name, file) = (device.node(), printable(&device.backing_file));
    let (asked, call) = match change {
        Change::Capacity => (format!("take the size of {file} for {name} anew"), "LOOP_SET_CAPACITY"),
        Change::DirectIo(true) => (format!("switch {name} ({file}) to direct I/O"), "LOOP_SET_DIRECT_IO"),
        Change::DirectIo(false) => (format!("switch {name} ({file}) from direct I/O"), "LOOP_SET_DIRECT_IO"),
        Change::BlockSize(bytes) => {
            (format!("set the block size of {name} ({file}) to {bytes}"), "LOOP_SET_BLOCK_SIZE")
        }
        Change::Autoclear(_) => (format!("change the lifetime of {name} ({file})"), "LOOP_SET_STATUS64"),
    };
    let (kind, why) = match (change, errno) {
        (_, Errno::EBUSY | Errno::EAGAIN) => {
            (ErrorKind::Busy, "it is in use; end that first, then try again".to_owned())
        }
        (Change::DirectIo(_), Errno::EINVAL | Errno::EOPNOTSUPP) => (
            ErrorKind::NotSupported,
            format!(
                "its file system, its offset {} or its block size {} does not allow it",
                device.offset, device.block_size
            ),
        ),
        (Change::BlockSize(_), Errno::EINVAL) => {
            (ErrorKind::NotSupported, "this kernel does not take that size".to_owned())
        }
        _ => return failed(&asked, call, errno),
    };
    Error::new(kind, format!("cannot {asked}: {why}"))
}
