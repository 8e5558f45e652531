//! How the daemon ends, and its exit status.

use std::process::ExitCode;

/// `EX_TEMPFAIL` of sysexits(3): the unit is restarted at once.
const EX_TEMPFAIL: u8 = 75;
/// `EX_CONFIG` of sysexits(3): the unit is not restarted.
const EX_CONFIG: u8 = 78;

/// A regular end of the daemon.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// Nothing is left to do.
    Done,
    /// A call that arrived while the daemon was stopping made an attachment: the next daemon adopts it.
    Restart,
}

/// An error that ends the daemon.
#[derive(Debug)]
pub enum Failure {
    /// A restart may succeed.
    Temporary(String),
    /// A restart fails in the same way until an administrator acts.
    Permanent(String),
}

impl From<String> for Failure {
    fn from(message: String) -> Self {
        Self::Temporary(message)
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        match exit {
            Exit::Done => Self::SUCCESS,
            Exit::Restart => Self::from(EX_TEMPFAIL),
        }
    }
}

impl Failure {
    /// What failed.
    #[must_use]
    pub fn message(&self) -> &str {
        match self {
            Self::Temporary(message) | Self::Permanent(message) => message,
        }
    }

    /// The exit status.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        match self {
            Self::Temporary(_) => ExitCode::FAILURE,
            Self::Permanent(_) => ExitCode::from(EX_CONFIG),
        }
    }
}
