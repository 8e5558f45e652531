//! Messages on standard error.

use std::io::{self, Write};

use loopd_common::limits::MOST_WARNINGS;
pub use loopd_common::text::{escaped, printable};
use loopd_dbus::{Warning, Warnings};
use nix::errno::Errno;

/// Prints a message to standard error; a failed write is ignored.
pub fn message(text: &str) {
    let _ = writeln!(io::stderr(), "loopctl: {}", escaped(text.as_bytes()));
}

/// Prints the warnings of loopd to standard error; a failed write is ignored.
pub fn warn(warnings: &Warnings) {
    for warning in shown(warnings) {
        message(&format!("warning: {}", warning.message));
    }
}

/// The warnings to show, bounded in case loopd's name belongs to another program.
pub fn shown(warnings: &Warnings) -> impl Iterator<Item = &Warning> {
    warnings.0.iter().take(MOST_WARNINGS)
}

/// The description of an I/O error without Rust's "(os error N)".
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
    fn reasons_have_no_error_number() {
        assert_eq!(reason(&io::Error::from_raw_os_error(2)), "No such file or directory");
        assert_eq!(reason(&io::Error::other("odd")), "odd");
    }
}
