//! Helpers for the unit tests of several crates.

#![forbid(unsafe_code)]

use std::io::{Write as _, stderr};

/// Reports a test that cannot run here, past the test harness, which captures what a passing test prints.
pub fn skipped(test: &str, why: &str) {
    let _closed = writeln!(stderr(), "SKIPPED {test}: {why}");
}
