//! How fast one user's work may follow.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Spaces out the work of each user: so much a second, and so much at once after a rest.
///
/// The generic cell rate algorithm: one instant for each user says when all that is booked is paid for.
#[derive(Debug)]
pub struct Pace {
    /// What one piece of work costs.
    each: Duration,
    /// How far ahead of its payment work may begin.
    ahead: Duration,
    paid: Mutex<Paid>,
}

#[derive(Debug, Default)]
struct Paid {
    /// When the work of each uid is paid for.
    at: HashMap<u32, Instant>,
    /// How many uids there may be before those that owe nothing are forgotten.
    most: usize,
}

impl Pace {
    /// So many pieces of work a second, and so many at once.
    #[must_use]
    pub fn new(per_second: u32, at_once: u32) -> Self {
        let each = Duration::from_secs(1) / per_second.max(1);
        Self { each, ahead: each * at_once.saturating_sub(1), paid: Mutex::default() }
    }

    /// Books work of this user's. Returns when it may begin; work booked later begins no earlier.
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
    fn the_work_of_each_user_is_spaced_out() {
        let pace = Pace::new(100, 10);
        let start = Instant::now();
        let wait =
            |now, uid, work| pace.book(start + milliseconds(now), uid, work) - (start + milliseconds(now));
        for _ in 0..10 {
            assert_eq!(wait(0, 1, 1), Duration::ZERO);
        }
        assert_eq!(wait(0, 1, 1), milliseconds(10));
        assert_eq!(wait(0, 1, 1), milliseconds(20));
        assert_eq!(wait(0, 2, 1), Duration::ZERO, "another user owes nothing");
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
    fn a_user_who_owes_nothing_is_forgotten() {
        let (pace, start) = (Pace::new(1000, 10), Instant::now());
        for uid in 0..100_000 {
            let now = start + milliseconds(uid.into());
            assert_eq!(pace.book(now, uid, 1), now);
        }
        assert!(pace.paid.lock().unwrap().at.len() < 200);
    }
}
