//! Messages on standard error.

use std::io::{self, Write};

pub use loopd_common::text::{escaped, printable};
use nix::errno::Errno;

/// Prints a message to standard error; a failed write is ignored.
pub fn message(text: &str) {
    let _ = writeln!(io::stderr(), "loopctl: {}", escaped(text.as_bytes()));
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
