//! Results on standard output.

use std::io::{self, ErrorKind, IsTerminal, Write};

use loopd_common::text::is_deceptive;

use crate::message::reason;

/// The reader closed standard output. This is not reported as a failure.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("standard output was closed")]
pub struct Closed;

/// Writes text to standard output and flushes it.
///
/// # Errors
/// [`Closed`], or the write failed.
pub fn print(text: &str) -> anyhow::Result<()> {
    print_bytes(text.as_bytes())
}

/// Like [`print()`], for output that may not be UTF-8.
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

/// Writes a value as indented JSON and a newline.
///
/// # Errors
/// As [`print()`].
pub fn print_json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    print(&(plain_json(&serde_json::to_string_pretty(value)?) + "\n"))
}

/// Whether to print bold text: standard output is a terminal that supports it, and it is not disabled.
#[must_use]
pub fn is_styled(no_color: bool) -> bool {
    let forbidden = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    let dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    !no_color && !forbidden && !dumb && io::stdout().is_terminal()
}

/// The width in columns of the terminal on standard output; `None` if it is not a terminal or its width
/// is unknown.
#[must_use]
pub fn terminal_width() -> Option<u16> {
    terminal_size::terminal_size_of(io::stdout()).map(|(width, _)| width.0)
}

/// Escapes the characters of JSON for which [`is_deceptive`] is true, so that a terminal shows strings exactly. JSON
/// allows this for every character; serde escapes only some.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_is_escaped_and_has_the_same_value() {
        let value = serde_json::json!({ "a": "\u{9b}31m\u{202e}\u{1b}\u{7f}\u{e0001}é\n", "b": ["\u{61c}"] });
        for json in [value.to_string(), serde_json::to_string_pretty(&value).unwrap()] {
            let plain = plain_json(&json);
            assert!(plain.chars().all(|c| c == '\n' || !is_deceptive(c)), "{plain:?}");
            assert!(plain.contains("\\u009b31m\\u202e") && plain.contains("\\udb40\\udc01é"), "{plain}");
            assert_eq!(serde_json::from_str::<serde_json::Value>(&plain).unwrap(), value);
        }
    }
}
