//! Errors in the format of losetup.

use std::ffi::OsStr;
use std::io::{self, Write};
use std::os::unix::ffi::OsStrExt;

use loopd_dbus::{Error, ErrorKind};
use nix::errno::Errno;

use crate::message::escaped;

/// The name of the program in its messages.
pub const NAME: &str = "losetup";

/// An error message of losetup. Names are printed unescaped, as losetup does.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{}", String::from_utf8_lossy(.text))]
pub struct Failure {
    /// The text after the program's name; empty for an error that losetup does not report.
    pub text: Vec<u8>,
    /// Whether a reference to the help follows.
    pub is_usage: bool,
}

impl Failure {
    /// An error with this text.
    pub fn new(text: impl Into<Vec<u8>>) -> Self {
        Self { text: text.into(), is_usage: false }
    }

    /// An error of getopt(3).
    pub fn usage(text: impl Into<Vec<u8>>) -> Self {
        Self { text: text.into(), is_usage: true }
    }

    /// An error that losetup does not report.
    #[must_use]
    pub const fn silent() -> Self {
        Self { text: Vec::new(), is_usage: false }
    }

    /// `NAME: what failed: reason`.
    pub fn of(name: &OsStr, what: &str, reason: &Reason) -> Self {
        Self::new([name.as_bytes(), b": ", what.as_bytes(), b": ", reason.text().as_bytes()].concat())
    }

    /// Prints the error to standard error; a failed write is ignored.
    pub fn print(&self) {
        if self.text.is_empty() {
            return;
        }
        let mut text = [NAME.as_bytes(), b": ", &self.text, b"\n"].concat();
        if self.is_usage {
            text.extend(format!("Try '{NAME} --help' for more information.\n").bytes());
        }
        let _ = io::stderr().write_all(&text);
    }
}

/// The reason of an error.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reason {
    /// An error that losetup reports with strerror(3).
    Errno(Errno),
    /// An error of loopd's without an equivalent errno.
    Message(String),
}

impl Reason {
    /// The errno that losetup would have received for the error of a call to loopd.
    #[must_use]
    pub fn of(error: &anyhow::Error) -> Self {
        let Some(error) = error.downcast_ref::<Error>() else { return Self::message(&format!("{error:#}")) };
        match error.kind {
            ErrorKind::AccessDenied | ErrorKind::InteractiveAuthorizationRequired => {
                Self::Errno(Errno::EACCES)
            }
            ErrorKind::NotFound | ErrorKind::UnknownObject => Self::Errno(Errno::ENXIO),
            ErrorKind::Busy => Self::Errno(Errno::EBUSY),
            ErrorKind::NoFreeDevice => Self::Errno(Errno::ENODEV),
            // Values that the kernel rejects are not sent; the rest are rules of loopd.
            ErrorKind::InvalidArgs
            | ErrorKind::InvalidBackingFile
            | ErrorKind::Overlap
            | ErrorKind::NotSupported
            | ErrorKind::LimitExceeded
            | ErrorKind::Timeout
            | ErrorKind::WrongSecret
            | ErrorKind::Kernel => Self::message(&error.message),
        }
    }

    /// A text from the bus, which may hold control characters.
    fn message(text: &str) -> Self {
        Self::Message(escaped(text.as_bytes()))
    }

    /// The text that losetup prints.
    #[must_use]
    pub fn text(&self) -> String {
        match self {
            Self::Errno(errno) => strerror(*errno),
            Self::Message(text) => text.clone(),
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
            None => Self::Message(error.to_string()),
        }
    }
}

/// strerror(3): the descriptions of nix differ for some errors.
fn strerror(errno: Errno) -> String {
    let text = io::Error::from(errno).to_string();
    text.split(" (os error ").next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_are_those_of_the_c_library() {
        assert_eq!(strerror(Errno::ENOTTY), "Inappropriate ioctl for device");
        assert_eq!(strerror(Errno::ERANGE), "Numerical result out of range");
    }

    #[test]
    fn errors_of_loopd_become_errnos() {
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
