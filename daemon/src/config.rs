//! What the daemon is told at its start.

use std::ffi::OsString;
use std::time::Duration;

use crate::engine::Settings;

/// What the command line asks for.
#[derive(Debug, PartialEq, Eq)]
pub enum Arguments {
    /// Be the daemon.
    Run,
    /// Print this and end.
    Print(String),
    /// Complain and end.
    Wrong(String),
}

const HELP: &str = "\
loopd attaches files to loop devices for those who may not do so themselves.

Usage: loopd [--help | --version]

The service manager starts it as the system service loopd, or the message bus on
the first call. People use loopctl. LOOPD_LOG sets the level of the log: error,
warn, info, debug or trace.
";

/// Reads the command line.
pub fn arguments(mut arguments: impl Iterator<Item = OsString>) -> Arguments {
    let Some(first) = arguments.next() else { return Arguments::Run };
    match (first.to_str(), arguments.next()) {
        (Some("-h" | "--help"), None) => Arguments::Print(HELP.to_owned()),
        (Some("-V" | "--version"), None) => {
            Arguments::Print(format!("loopd {}\n", env!("CARGO_PKG_VERSION")))
        }
        _ => Arguments::Wrong(format!("unknown argument {}; loopd --help", first.display())),
    }
}

/// Times and bounds: the defaults, and `LOOPD_WAIT_TIMEOUT_MS` (milliseconds to wait for udev).
pub fn settings() -> Settings {
    let mut settings = Settings::default();
    let wait = std::env::var("LOOPD_WAIT_TIMEOUT_MS").ok().and_then(|text| text.parse().ok());
    if let Some(milliseconds) = wait {
        settings.wait_for_udev = Duration::from_millis(milliseconds);
    }
    settings
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_help_and_version_are_options() {
        let read = |words: &[&str]| arguments(words.iter().map(OsString::from));
        assert_eq!(read(&[]), Arguments::Run);
        assert!(matches!(read(&["--version"]), Arguments::Print(text) if text.starts_with("loopd ")));
        assert!(matches!(read(&["--help"]), Arguments::Print(_)));
        assert!(matches!(read(&["--nonsense"]), Arguments::Wrong(_)));
        assert!(matches!(read(&["--help", "me"]), Arguments::Wrong(_)));
    }
}
