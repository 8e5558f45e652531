//! The time of day.

use std::time::{SystemTime, UNIX_EPOCH};

pub(super) fn microseconds_now() -> u64 {
    #[cfg(test)]
    if let Some(simulated) = crate::tests::clock::microseconds() {
        return simulated;
    }
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}
