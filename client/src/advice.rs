//! Hints that name commands and options of loopctl. loopd's messages name none, since other clients show
//! them, too.

use loopd_common::ErrorKind;

/// What the user asked loopctl to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// `attach` and `run`.
    Attach,
    /// `mount`.
    Mount,
    /// `mount` of a volume on which udev has recognized nothing.
    MountUnrecognized,
    /// `mount` of a file system on a read-only device.
    MountReadOnly,
    /// `unlock`.
    Unlock,
    /// Any other command.
    Other,
}

/// The line that loopctl prints below loopd's message for this kind of error.
#[must_use]
pub const fn hint(kind: ErrorKind, operation: Operation) -> Option<&'static str> {
    match (kind, operation) {
        (ErrorKind::InteractiveAuthorizationRequired, _) => {
            Some("run it on a terminal and without --no-ask-password, in an active session, or with sudo")
        }
        (ErrorKind::NotFound | ErrorKind::NoFreeDevice, _) => {
            Some("`loopctl list --all` shows what is attached")
        }
        (ErrorKind::LimitExceeded, Operation::Attach) => {
            Some("`loopctl list` shows what is attached; --no-partitions attaches without partitions")
        }
        (
            ErrorKind::LimitExceeded,
            Operation::Mount | Operation::MountUnrecognized | Operation::MountReadOnly,
        ) => Some("`loopctl list` shows what is attached, unlocked and mounted"),
        (ErrorKind::LimitExceeded, Operation::Unlock) => Some("`loopctl list` shows what is unlocked"),
        (ErrorKind::Timeout, Operation::Attach) => {
            Some("if udev is slow, --no-wait attaches without waiting for it")
        }
        (ErrorKind::NotSupported, Operation::MountUnrecognized) => {
            Some("-t names the type of a file system that udev has not recognized")
        }
        (ErrorKind::NotSupported, Operation::MountReadOnly) => {
            Some("--throwaway mounts a writable copy of the image")
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;
    use crate::cli::Cli;

    const OPERATIONS: [Operation; 6] = [
        Operation::Attach,
        Operation::Mount,
        Operation::MountUnrecognized,
        Operation::MountReadOnly,
        Operation::Unlock,
        Operation::Other,
    ];

    #[test]
    fn hints_depend_on_the_error_and_the_operation() {
        let limit = hint(ErrorKind::LimitExceeded, Operation::Attach).unwrap();
        assert!(limit.contains("`loopctl list`") && limit.contains("--no-partitions"), "{limit}");
        assert!(!hint(ErrorKind::LimitExceeded, Operation::Mount).unwrap().contains("--no-partitions"));
        assert!(hint(ErrorKind::NotFound, Operation::Other).unwrap().contains("`loopctl list --all`"));
        assert!(hint(ErrorKind::NoFreeDevice, Operation::Mount).unwrap().contains("`loopctl list --all`"));
        assert!(hint(ErrorKind::Timeout, Operation::Attach).unwrap().contains("--no-wait"));
        assert_eq!(hint(ErrorKind::Timeout, Operation::Mount), None);
        assert!(hint(ErrorKind::NotSupported, Operation::MountReadOnly).unwrap().contains("--throwaway"));
        assert!(hint(ErrorKind::NotSupported, Operation::MountUnrecognized).unwrap().contains("-t "));
        assert_eq!(hint(ErrorKind::NotSupported, Operation::Mount), None);
        assert_eq!(hint(ErrorKind::NotSupported, Operation::Attach), None);
        assert!(hint(ErrorKind::LimitExceeded, Operation::Unlock).unwrap().contains("`loopctl list`"));
        assert_eq!(hint(ErrorKind::Busy, Operation::Other), None);
    }

    #[test]
    fn hints_name_options_that_the_command_has() {
        let command = Cli::command();
        let has = |verb: &str, word: &str| {
            let verb = command.find_subcommand(verb).unwrap();
            let matches = |arg: &clap::Arg| {
                arg.get_long().is_some_and(|long| word == format!("--{long}"))
                    || arg.get_short().is_some_and(|short| word == format!("-{short}"))
            };
            verb.get_arguments().chain(command.get_arguments()).any(matches)
        };
        for kind in ErrorKind::ALL {
            for operation in OPERATIONS {
                let Some(text) = hint(*kind, operation) else { continue };
                let verbs: &[&str] = match operation {
                    _ if text.contains("`loopctl list --all`") => &["list"],
                    Operation::Attach => &["attach", "run"],
                    Operation::Mount | Operation::MountUnrecognized | Operation::MountReadOnly => &["mount"],
                    Operation::Unlock => &["unlock"],
                    Operation::Other => &["list"],
                };
                for word in text.split([' ', '`', ',', ';']).filter(|word| word.starts_with('-')) {
                    assert!(verbs.iter().all(|verb| has(verb, word)), "{word} in {text}");
                }
            }
        }
    }
}
