//! Reports a failure and chooses the exit status for it.

use std::io::{self, Write};

use loopd_common::ErrorKind;

use crate::advice::{self, Operation};
use crate::bus::agent::Interrupted;
use crate::bus::error::kind;
use crate::in_use::explanation;
use crate::message::{escaped, message};
use crate::show::stdout::Closed;

/// Prints what went wrong and returns the exit status.
pub fn report(error: &anyhow::Error, operation: Operation) -> u8 {
    if error.is::<Closed>() {
        return 0;
    }
    if let Some(Interrupted(signal)) = error.downcast_ref() {
        return 128 + signal;
    }
    explanation(error).iter().for_each(|line| message(line));
    if let Some(hint) = hint(error, operation) {
        message(hint);
    }
    if kind(error) == Some(ErrorKind::InvalidArgs) { 2 } else { 1 }
}

/// What loopctl adds to the message of an error of loopd's.
#[must_use]
pub fn hint(error: &anyhow::Error, operation: Operation) -> Option<&'static str> {
    kind(error).and_then(|kind| advice::hint(kind, operation))
}

/// Prints clap's answer, which is a help text, the version or a usage error, and returns the exit status.
pub fn report_usage(error: &clap::Error) -> u8 {
    use clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if !error.use_stderr() || error.kind() == DisplayHelpOnMissingArgumentOrSubcommand {
        // The reader may have exited, as in `loopctl --help | head -1`.
        let _ = error.print();
    } else {
        let text = error.to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text);
        let lines: Vec<String> = text.split('\n').map(|line| escaped(line.as_bytes())).collect();
        let _ = write!(io::stderr(), "loopctl: {}", lines.join("\n"));
    }
    u8::try_from(error.exit_code()).unwrap_or(2)
}

#[cfg(test)]
mod tests {
    use loopd_common::Error;

    use super::*;

    #[test]
    fn exit_status_depends_on_the_error() {
        let status = |error: anyhow::Error| report(&error, Operation::Other);
        assert_eq!(status(anyhow::anyhow!("it failed")), 1);
        assert_eq!(status(Error::new(ErrorKind::Busy, "busy").into()), 1);
        assert_eq!(status(Error::new(ErrorKind::InvalidArgs, "wrong").into()), 2);
        assert_eq!(status(Closed.into()), 0);
        assert_eq!(status(Interrupted(15).into()), 143);
    }

    #[test]
    fn only_errors_of_loopd_have_hints() {
        let missing = Error::new(ErrorKind::NotFound, "nothing is attached to /dev/loop9");
        assert!(hint(&missing.into(), Operation::Other).is_some());
        assert_eq!(hint(&anyhow::anyhow!("it failed"), Operation::Other), None);
    }
}
