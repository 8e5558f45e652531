//! What losetup says when something fails.

use std::ffi::OsStr;
use std::io;
use std::os::unix::ffi::OsStrExt;

use loopd_dbus::{Error, ErrorKind};
use nix::errno::Errno;

use crate::output::escaped;

/// An error in losetup's words. Names are shown byte by byte, as losetup does.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", String::from_utf8_lossy(.text))]
pub struct Failure {
    /// What stands behind the program's name; losetup has failures that it says nothing about.
    pub text: Vec<u8>,
    /// Whether the way to the help follows.
    pub is_usage: bool,
}

impl Failure {
    /// A failure with this text.
    pub fn new(text: impl Into<Vec<u8>>) -> Self {
        Self { text: text.into(), is_usage: false }
    }

    /// Words that getopt(3) does not understand.
    pub fn usage(text: impl Into<Vec<u8>>) -> Self {
        Self { text: text.into(), is_usage: true }
    }

    /// One that losetup keeps to itself.
    #[must_use]
    pub const fn silent() -> Self {
        Self { text: Vec::new(), is_usage: false }
    }

    /// `NAME: what failed: reason`.
    pub fn of(name: &OsStr, what: &str, reason: &Reason) -> Self {
        Self::new([name.as_bytes(), b": ", what.as_bytes(), b": ", reason.text().as_bytes()].concat())
    }
}

/// Why something failed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// The system's words for it are losetup's.
    Errno(Errno),
    /// Only loopd knows it; losetup has no word for it.
    Told(String),
}

impl Reason {
    /// What the errno of a failed call would have been, where losetup had made it.
    #[must_use]
    pub fn of(error: &anyhow::Error) -> Self {
        let Some(told) = error.downcast_ref::<Error>() else { return Self::told(&format!("{error:#}")) };
        match told.kind {
            ErrorKind::AccessDenied | ErrorKind::InteractiveAuthorizationRequired => {
                Self::Errno(Errno::EACCES)
            }
            ErrorKind::NotFound | ErrorKind::UnknownObject => Self::Errno(Errno::ENXIO),
            ErrorKind::Busy => Self::Errno(Errno::EBUSY),
            ErrorKind::NoFreeDevice => Self::Errno(Errno::ENODEV),
            // What the kernel refuses as invalid is not sent; the rest are rules of loopd's own.
            ErrorKind::InvalidArgs
            | ErrorKind::InvalidBackingFile
            | ErrorKind::Overlap
            | ErrorKind::NotSupported
            | ErrorKind::LimitExceeded
            | ErrorKind::Timeout
            | ErrorKind::Kernel => Self::told(&told.message),
        }
    }

    /// A text from the bus, fit for a terminal, which losetup's own words are.
    fn told(text: &str) -> Self {
        Self::Told(escaped(text.as_bytes()))
    }

    /// As losetup prints it.
    #[must_use]
    pub fn text(&self) -> String {
        match self {
            Self::Errno(errno) => strerror(*errno),
            Self::Told(text) => text.clone(),
        }
    }
}

impl From<Errno> for Reason {
    fn from(errno: Errno) -> Self {
        Self::Errno(errno)
    }
}

impl From<&io::Error> for Reason {
    fn from(error: &io::Error) -> Self {
        match error.raw_os_error() {
            Some(number) => Self::Errno(Errno::from_raw(number)),
            None => Self::Told(error.to_string()),
        }
    }
}

/// The C library's words: nix has its own for some.
fn strerror(errno: Errno) -> String {
    let text = io::Error::from(errno).to_string();
    text.split(" (os error ").next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_the_c_librarys_words() {
        assert_eq!(strerror(Errno::ENOTTY), "Inappropriate ioctl for device");
        assert_eq!(strerror(Errno::ERANGE), "Numerical result out of range");
    }

    #[test]
    fn errors_of_the_bus_become_those_of_ioctls() {
        let reason = |kind| Reason::of(&Error::new(kind, "a test's message").into()).text();
        assert_eq!(reason(ErrorKind::Busy), "Device or resource busy");
        assert_eq!(reason(ErrorKind::AccessDenied), "Permission denied");
        assert_eq!(reason(ErrorKind::NotFound), "No such device or address");
        assert_eq!(reason(ErrorKind::LimitExceeded), "a test's message");
        let forged = Reason::of(&Error::new(ErrorKind::Kernel, "\u{1b}[31mred").into());
        assert_eq!(forged.text(), "\\u{1b}[31mred");
        let failure =
            Failure::of(OsStr::from_bytes(b"/dev/loop\xff"), "detach failed", &Errno::ENOENT.into());
        assert_eq!(failure.text, b"/dev/loop\xff: detach failed: No such file or directory");
    }
}
