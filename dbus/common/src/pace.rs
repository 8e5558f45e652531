//! How fast one user's work may follow.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

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

    /// Books work of this user's. Gives when it may begin; work booked later begins no earlier.
    #[must_use]
    pub fn book(&self, uid: u32, work: u32) -> Instant {
        let now = Instant::now();
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

    #[tokio::test(start_paused = true)]
    async fn work_is_spaced_out_for_each_user() {
        let pace = Pace::new(100, 10);
        let start = Instant::now();
        let wait = |uid, work| pace.book(uid, work) - Instant::now();
        for _ in 0..10 {
            assert_eq!(wait(1, 1), Duration::ZERO);
        }
        assert_eq!(wait(1, 1), Duration::from_millis(10));
        assert_eq!(wait(1, 1), Duration::from_millis(20));
        assert_eq!(wait(2, 1), Duration::ZERO, "another user owes nothing");
        tokio::time::advance(Duration::from_millis(30)).await;
        assert_eq!(wait(1, 1), Duration::ZERO);
        // A debt is paid off before anything else begins.
        assert_eq!(wait(2, 255), Duration::ZERO);
        assert_eq!(wait(2, 0), Duration::from_millis(2460));
        tokio::time::advance(Duration::from_secs(60)).await;
        for _ in 0..10 {
            assert_eq!(wait(2, 1), Duration::ZERO);
        }
        assert_eq!(wait(2, 1), Duration::from_millis(10), "a long rest is worth no more than a short one");
        assert!(start.elapsed() > Duration::from_secs(60));
    }

    #[tokio::test(start_paused = true)]
    async fn who_owes_nothing_is_forgotten() {
        let pace = Pace::new(1000, 10);
        for uid in 0..100_000 {
            assert_eq!(pace.book(uid, 1), Instant::now());
            tokio::time::advance(Duration::from_millis(1)).await;
        }
        assert!(pace.paid.lock().unwrap().at.len() < 200);
    }
}
