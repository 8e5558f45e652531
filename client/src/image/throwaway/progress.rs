//! Shows how far a copy is: a line on standard error, only if that is a terminal.

use std::io::{self, IsTerminal, Write};
use std::time::{Duration, Instant};

use crate::show::size::human;

/// Smaller copies are done before the line could be read.
const SHOWN_ABOVE: u64 = 64 << 20;
/// The time between two changes of the line.
const INTERVAL: Duration = Duration::from_millis(200);
/// Returns to the start of the line and erases it.
const ERASE: &str = "\r\u{1b}[K";

/// The progress of a copy. The line is erased when this is dropped.
#[derive(Debug)]
pub struct Progress {
    total: u64,
    done: u64,
    start: Instant,
    /// When the line is changed next; `None` if there is none.
    next: Option<Instant>,
}

impl Progress {
    /// The start of a copy of so many bytes.
    #[must_use]
    pub fn new(total: u64) -> Self {
        let start = Instant::now();
        let is_shown = total > SHOWN_ABOVE && io::stderr().is_terminal();
        Self { total, done: 0, start, next: is_shown.then(|| start + INTERVAL) }
    }

    /// Adds bytes that were copied.
    pub fn advance(&mut self, bytes: u64) {
        self.done += bytes;
        let now = Instant::now();
        if let Some(next) = self.next.as_mut().filter(|next| **next <= now) {
            *next = now + INTERVAL;
            write(&format!("{ERASE}{}", text(self.done, self.total, now - self.start)));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.next.is_some() {
            write(ERASE);
        }
    }
}

/// A failure does not matter: the line is only information.
fn write(text: &str) {
    let mut stderr = io::stderr().lock();
    let _ = stderr.write_all(text.as_bytes()).and_then(|()| stderr.flush());
}

/// What is copied so far, and how long the rest takes at the same speed.
fn text(done: u64, total: u64, elapsed: Duration) -> String {
    let left = u128::from(total.saturating_sub(done)) * elapsed.as_millis() / u128::from(done.max(1));
    format!("copying: {} of {}, {} s left", human(done), human(total), left.div_ceil(1000))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rest_takes_as_long_as_the_same_part_so_far() {
        let text = |done, seconds| text(done, 4 << 30, Duration::from_secs(seconds));
        assert_eq!(text(1 << 30, 10), "copying: 1G of 4G, 30 s left");
        assert_eq!(text(4 << 30, 40), "copying: 4G of 4G, 0 s left");
        assert_eq!(text(0, 0), "copying: 0B of 4G, 0 s left");
    }

    #[test]
    fn there_is_no_line_without_a_terminal() {
        // Standard error of a test is captured or a file.
        if !io::stderr().is_terminal() {
            assert_eq!(Progress::new(u64::MAX).next, None);
        }
        assert_eq!(Progress::new(SHOWN_ABOVE).next, None);
    }
}
