//! The simulated `CLOCK_REALTIME`: what the daemon writes down must not depend on how fast a test runs.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

thread_local! {
    static STARTED: Cell<Option<(Instant, u64)>> = const { Cell::new(None) };
}

/// Lets the simulated clock of this thread go from these microseconds on, with tokio's time.
pub fn start(microseconds: u64) {
    STARTED.set(Some((Instant::now(), microseconds)));
}

/// From now on this thread has the machine's clock again.
pub fn stop() {
    STARTED.set(None);
}

/// The time of the simulated clock; `None` if it is not running.
pub fn microseconds() -> Option<u64> {
    let (start, shown) = STARTED.get()?;
    Some(shown + to_microseconds(start.elapsed()))
}

fn to_microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}
