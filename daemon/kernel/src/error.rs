//! Errors of system calls.

use std::io;

use loopd_engine::Error;
use loopd_engine::kernel::node;
use nix::errno::Errno;

/// The error for an error number that needs no explanation of its own. `operation` completes "cannot".
pub fn failed(operation: impl Into<String>, call: &'static str, errno: Errno) -> Error {
    Error::SystemCall { operation: operation.into(), call, source: described(errno) }
}

/// An error number with its name and description.
pub fn described(errno: Errno) -> loopd_engine::Errno {
    loopd_engine::Errno { name: format!("{errno:?}"), description: errno.desc() }
}

/// The error number of an error of the standard library.
pub fn errno_of(error: &io::Error) -> Errno {
    Errno::from_raw(error.raw_os_error().unwrap_or_default())
}

/// Whether the device does not exist, or nothing is attached to it.
pub fn is_gone(errno: Errno) -> bool {
    matches!(errno, Errno::ENXIO | Errno::ENOENT | Errno::ENODEV)
}

/// The error for a loop device whose state in sysfs cannot be read.
pub fn state_unreadable(number: u32, source: io::Error) -> Error {
    Error::Io { operation: format!("read the state of {}", node(number)), source }
}
