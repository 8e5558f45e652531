//! The simulated `CLOCK_REALTIME`: saved times must not depend on how fast a test runs.

use std::cell::Cell;
use std::time::Duration;

use tokio::time::Instant;

thread_local! {
    static STARTED: Cell<Option<(Instant, u64)>> = const { Cell::new(None) };
}

/// Starts the simulated clock of this thread at this time in microseconds. It runs with tokio's clock.
pub fn start(microseconds: u64) {
    STARTED.set(Some((Instant::now(), microseconds)));
}

/// Ends the simulation: this thread uses the machine's clock again.
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
