//! The error for a failed system call.

use loopd_common::{Error, ErrorKind};
use nix::errno::Errno;

/// The error for an error number that needs no explanation of its own. `action` completes "cannot".
pub fn failed(action: &str, call: &str, errno: Errno) -> Error {
    let message = format!("cannot {action}: {call} failed with {errno:?} ({})", errno.desc());
    Error::new(ErrorKind::Kernel, message)
}

/// Whether the device does not exist, or nothing is attached to it.
pub fn is_gone(errno: Errno) -> bool {
    matches!(errno, Errno::ENXIO | Errno::ENOENT | Errno::ENODEV)
}
