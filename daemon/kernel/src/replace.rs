//! Replaces the backing file of a read-only device.

use std::os::fd::{AsFd as _, OwnedFd};

use loopd_common::text::printable;
use loopd_engine::Error;
use loopd_engine::kernel::{Device, DiskSequence, Replaced, node};
use nix::errno::Errno;
use tracing::warn;

use crate::error::failed;
use crate::shared::Shared;
use crate::sysfs::loop_device;
use crate::untrusted::{Expected, unmarked};
use crate::{backing_file, device, findings, ioctl};

fn writable(name: &str, number: u32) -> Error {
    let reason = "the kernel does that on read-only devices only; attach with read-only".to_owned();
    Error::NotSupported { operation: format!("show {name} on {}", node(number)), reason }
}

fn refusal(name: &str, before: &Device, errno: Errno) -> Error {
    let operation = format!("show {name} on {}", before.node());
    let reason = match errno {
        Errno::EINVAL => format!(
            "it must be as large as the file before, {} ({} bytes from offset {} on)",
            printable(&before.backing_file),
            before.size,
            before.offset
        ),
        Errno::EBADF => "it is itself built on that device".to_owned(),
        errno => return failed(operation, "LOOP_CHANGE_FD", errno),
    };
    Error::InvalidBackingFile { operation, reason }
}

/// Replaces the backing file; `None` if this attach has ended. A device that cannot be marked by its disk
/// sequence stays marked by its number.
pub fn replace(
    shared: &Shared,
    number: u32,
    disk_sequence: DiskSequence,
    file: &OwnedFd,
    untrusted: bool,
) -> Result<Option<Replaced>, Error> {
    let expected = shared.untrusted.expect_if(untrusted, number)?;
    let replaced = change_file(number, disk_sequence, file);
    if let Some(expected) = expected
        && !matches!(replaced, Ok(None))
    {
        mark_new(expected, number, disk_sequence);
    }
    replaced
}

/// Marks the new disk sequence of a device that had `old`, if it has one.
fn mark_new(mut expected: Expected<'_>, number: u32, old: DiskSequence) {
    let marked = match loop_device::disk_sequence(number) {
        Ok(Some(new)) if new != old => expected.replace_by(new),
        Ok(_) => return,
        Err(error) => Err(error),
    };
    if let Err(error) = marked {
        warn!(device = node(number), "{}", unmarked(error));
        expected.keep();
    }
}

fn change_file(number: u32, disk_sequence: DiskSequence, file: &OwnedFd) -> Result<Option<Replaced>, Error> {
    let examined = backing_file::examine(file)?;
    backing_file::refuse_appending(&examined)?;
    let name = examined.name();
    let Some(device) = device::open_attached(number, disk_sequence)? else { return Ok(None) };
    let state = || device::read_state(number, &device).map_err(|errno| device::unreadable(number, errno));
    let before = state()?;
    if !before.read_only {
        return Err(writable(&name, number));
    }
    match ioctl::change_file(&device, file.as_fd()) {
        Ok(()) => {
            let device = state()?;
            let file_end = findings::file_end(file, examined.size, device.offset, device.size_limit);
            Ok(Some(Replaced { device, file_end }))
        }
        Err(Errno::ENXIO) => Ok(None),
        Err(errno) => Err(refusal(&name, &before, errno)),
    }
}
