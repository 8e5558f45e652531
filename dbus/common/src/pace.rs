//! A rate limit for each user.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Limits the rate of each user's work: so much a second, and so much at once after a rest.
///
/// The generic cell rate algorithm: for each user it keeps the instant at which all booked work is paid for.
#[derive(Debug)]
pub struct Pace {
    /// The cost of one piece of work.
    each: Duration,
    /// How long before its payment work may begin.
    ahead: Duration,
    paid: Mutex<Paid>,
}

#[derive(Debug, Default)]
struct Paid {
    /// When the booked work of each uid is paid for.
    at: HashMap<u32, Instant>,
    /// The number of uids above which those without debt are removed.
    most: usize,
}

impl Pace {
    /// Allows so many pieces of work a second, and so many at once.
    #[must_use]
    pub fn new(per_second: u32, at_once: u32) -> Self {
        let each = Duration::from_secs(1) / per_second.max(1);
        Self { each, ahead: each * at_once.saturating_sub(1), paid: Mutex::default() }
    }

    /// Books work of this user. Returns when it may begin; work booked later begins no earlier.
    #[must_use]
    pub fn book(&self, now: Instant, uid: u32, work: u32) -> Instant {
        let mut paid = self.paid.lock().unwrap_or_else(PoisonError::into_inner);
        if paid.at.len() >= paid.most {
            paid.at.retain(|_, at| *at > now);
            paid.most = 2 * paid.at.len() + 64;
        }
        let at = paid.at.entry(uid).or_insert(now);
        *at = (*at).max(now);
        let begin = at.checked_sub(self.ahead).map_or(now, |begin| begin.max(now));
        *at += self.each * work;
        begin
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn milliseconds(count: u64) -> Duration {
        Duration::from_millis(count)
    }

    #[test]
    fn the_rate_of_each_user_is_limited() {
        let pace = Pace::new(100, 10);
        let start = Instant::now();
        let wait =
            |now, uid, work| pace.book(start + milliseconds(now), uid, work) - (start + milliseconds(now));
        for _ in 0..10 {
            assert_eq!(wait(0, 1, 1), Duration::ZERO);
        }
        assert_eq!(wait(0, 1, 1), milliseconds(10));
        assert_eq!(wait(0, 1, 1), milliseconds(20));
        assert_eq!(wait(0, 2, 1), Duration::ZERO, "another user has no debt");
        assert_eq!(wait(30, 1, 1), Duration::ZERO);
        // A debt is paid off before anything else begins.
        assert_eq!(wait(30, 2, 255), Duration::ZERO);
        assert_eq!(wait(30, 2, 0), milliseconds(2460));
        for _ in 0..10 {
            assert_eq!(wait(60_000, 2, 1), Duration::ZERO);
        }
        assert_eq!(wait(60_000, 2, 1), milliseconds(10), "a long rest is worth no more than a short one");
    }

    #[test]
    fn users_without_debt_are_removed() {
        let (pace, start) = (Pace::new(1000, 10), Instant::now());
        for uid in 0..100_000 {
            let now = start + milliseconds(uid.into());
            assert_eq!(pace.book(now, uid, 1), now);
        }
        assert!(pace.paid.lock().unwrap().at.len() < 200);
    }
}
