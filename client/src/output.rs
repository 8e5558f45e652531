//! What is shown: results on standard output, messages on standard error.

pub mod json;
pub mod table;

use std::io::{self, ErrorKind, IsTerminal, Write};

use loopd_common::text::is_deceptive;
pub use loopd_common::text::{escaped, printable};
use nix::errno::Errno;

use crate::agent::Interrupted;

/// Whoever read standard output has gone; that is no failure of ours.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("standard output was closed")]
pub struct Closed;

/// Writes a result to standard output, at once.
///
/// # Errors
/// [`Closed`], or it cannot be written.
pub fn print(text: &str) -> anyhow::Result<()> {
    print_bytes(text.as_bytes())
}

/// As [`print()`], for what need not be UTF-8.
///
/// # Errors
/// As [`print()`].
pub fn print_bytes(bytes: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout().lock();
    match stdout.write_all(bytes).and_then(|()| stdout.flush()) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Err(Closed.into()),
        Err(error) => anyhow::bail!("cannot write to standard output: {}", reason(&error)),
    }
}

/// Writes a value as JSON for people and programs, with a newline.
///
/// # Errors
/// As [`print()`].
pub fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(&(plain_json(&serde_json::to_string_pretty(value)?) + "\n"))
}

/// JSON that a terminal shows as it is: in strings, whatever [`is_deceptive`] is escaped, which JSON allows for
/// each character and serde does for some.
#[must_use]
pub fn plain_json(json: &str) -> String {
    let mut plain = String::with_capacity(json.len());
    for character in json.chars() {
        if character == '\n' || !is_deceptive(character) {
            plain.push(character);
        } else {
            for unit in character.encode_utf16(&mut [0; 2]) {
                plain.push_str(&format!("\\u{unit:04x}"));
            }
        }
    }
    plain
}

/// Writes a message to standard error. That it cannot be written stops nobody.
pub fn message(text: &str) {
    let _ = writeln!(io::stderr(), "loopctl: {}", escaped(text.as_bytes()));
}

/// Says what went wrong and gives the exit status for it.
pub fn report(error: &anyhow::Error) -> u8 {
    if error.is::<Closed>() {
        return 0;
    }
    if let Some(Interrupted(signal)) = error.downcast_ref() {
        return 128 + signal;
    }
    message(&format!("{error:#}"));
    match error.downcast_ref::<loopd_dbus::Error>().map(|error| error.kind) {
        Some(loopd_dbus::ErrorKind::InvalidArgs) => 2,
        Some(loopd_dbus::ErrorKind::InteractiveAuthorizationRequired) => {
            message("run it on a terminal and without --no-ask-password, in an active session, or with sudo");
            1
        }
        _ => 1,
    }
}

/// Shows clap's answer, which is a help text, the version or what is wrong with the arguments, and
/// gives the exit status for it.
pub fn report_usage(error: &clap::Error) -> u8 {
    use clap::error::ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand;
    if !error.use_stderr() || error.kind() == DisplayHelpOnMissingArgumentOrSubcommand {
        // The reader may have gone, as in `loopctl --help | head -1`.
        let _ = error.print();
    } else {
        let text = error.to_string();
        let text = text.strip_prefix("error: ").unwrap_or(&text);
        let lines: Vec<String> = text.split('\n').map(|line| escaped(line.as_bytes())).collect();
        let _ = write!(io::stderr(), "loopctl: {}", lines.join("\n"));
    }
    u8::try_from(error.exit_code()).unwrap_or(2)
}

/// Whether standard output takes bold letters.
#[must_use]
pub fn is_styled(no_color: bool) -> bool {
    let forbidden = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    !no_color && !forbidden && !dumb && io::stdout().is_terminal()
}

/// An I/O error's reason in words, without Rust's "(os error N)".
#[must_use]
pub fn reason(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(number) => Errno::from_raw(number).desc().to_owned(),
        None => error.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_have_their_exit_status() {
        use loopd_dbus::{Error, ErrorKind};
        assert_eq!(report(&anyhow::anyhow!("it failed")), 1);
        assert_eq!(report(&Error::new(ErrorKind::Busy, "busy").into()), 1);
        assert_eq!(report(&Error::new(ErrorKind::InvalidArgs, "wrong").into()), 2);
        assert_eq!(report(&Closed.into()), 0);
        assert_eq!(report(&Interrupted(15).into()), 143);
    }

    #[test]
    fn json_is_plain_and_says_the_same() {
        let value = serde_json::json!({ "a": "\u{9b}31m\u{202e}\u{1b}\u{7f}\u{e0001}é\n", "b": ["\u{61c}"] });
        for json in [value.to_string(), serde_json::to_string_pretty(&value).unwrap()] {
            let plain = plain_json(&json);
            assert!(plain.chars().all(|c| c == '\n' || !is_deceptive(c)), "{plain:?}");
            assert!(plain.contains("\\u009b31m\\u202e") && plain.contains("\\udb40\\udc01é"), "{plain}");
            assert_eq!(serde_json::from_str::<serde_json::Value>(&plain).unwrap(), value);
        }
    }

    #[test]
    fn reasons_are_words() {
        assert_eq!(reason(&io::Error::from_raw_os_error(2)), "No such file or directory");
        assert_eq!(reason(&io::Error::other("odd")), "odd");
    }
}
