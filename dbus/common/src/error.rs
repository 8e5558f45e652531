//! The errors of the contract, with their names on the bus.

macro_rules! error_kinds {
    ($($(#[$doc:meta])* $kind:ident = $name:literal,)*) => {
        /// What went wrong, for programs.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
        pub enum ErrorKind { $($(#[$doc])* $kind,)* }

        impl ErrorKind {
            /// All kinds of the contract.
            pub const ALL: &[Self] = &[$(Self::$kind,)*];

            /// The error's name on the bus.
            #[must_use]
            pub const fn name(self) -> &'static str {
                match self { $(Self::$kind => $name,)* }
            }
        }
    };
}

error_kinds! {
    /// The call's arguments are wrong.
    InvalidArgs = "org.freedesktop.DBus.Error.InvalidArgs",
    /// Not authorized.
    AccessDenied = "org.freedesktop.DBus.Error.AccessDenied",
    /// Authorization needs a prompt, which the call did not allow.
    InteractiveAuthorizationRequired = "org.freedesktop.DBus.Error.InteractiveAuthorizationRequired",
    /// The object is gone.
    UnknownObject = "org.freedesktop.DBus.Error.UnknownObject",
    /// There is no such device, or nothing is attached to it.
    NotFound = "org.loopd1.Error.NotFound",
    /// The device is in use.
    Busy = "org.loopd1.Error.Busy",
    /// The file is already attached, and the caller requested overlap checking.
    Overlap = "org.loopd1.Error.Overlap",
    /// The file cannot be attached.
    InvalidBackingFile = "org.loopd1.Error.InvalidBackingFile",
    /// The kernel, the file or the configuration does not support it.
    NotSupported = "org.loopd1.Error.NotSupported",
    /// A limit of the caller or of all users is reached.
    LimitExceeded = "org.loopd1.Error.LimitExceeded",
    /// The kernel has no free loop device.
    NoFreeDevice = "org.loopd1.Error.NoFreeDevice",
    /// Another component did not answer in time.
    Timeout = "org.loopd1.Error.Timeout",
    /// The secret does not unlock the volume.
    WrongSecret = "org.loopd1.Error.WrongSecret",
    /// A system call failed with an errno that no other kind covers.
    Kernel = "org.loopd1.Error.Kernel",
}

impl ErrorKind {
    /// The kind with this name on the bus.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|kind| kind.name() == name)
    }
}

/// An error of the contract: its kind, and a message for people.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What went wrong.
    pub kind: ErrorKind,
    /// The request, what went wrong and, if possible, a remedy.
    pub message: String,
}

/// The longest message, in bytes. It can contain text of the caller, and is sent, logged and shown.
const LONGEST: usize = 4096;

impl Error {
    /// An error of this kind. A message longer than 4 KiB is cut.
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        let mut message = message.into();
        if message.len() > LONGEST {
            let end = (0..=LONGEST).rev().find(|end| message.is_char_boundary(*end));
            message.truncate(end.unwrap_or_default());
            message.push('…');
        }
        Self { kind, message }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_message_is_cut() {
        let error = Error::new(ErrorKind::InvalidArgs, "é".repeat(5000));
        assert_eq!((error.message.chars().count(), error.message.len()), (2049, 4099));
    }

    #[test]
    fn names_are_parsed_back() {
        for kind in ErrorKind::ALL {
            assert_eq!(ErrorKind::from_name(kind.name()), Some(*kind));
        }
        assert_eq!(ErrorKind::from_name("org.example.Other"), None);
    }
}
