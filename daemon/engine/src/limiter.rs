//! Limits on how much runs at the same time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::ownership::is_root;

/// How many devices are scanned at the same time.
const AT_ONCE: usize = 32;

/// The most background operations at the same time for one uid.
const OF_A_UID: usize = 8;

/// The same for all users other than root together.
const OF_ALL_USERS: usize = 128;

/// The same for root, and for devices without a known owner.
const OF_NO_USER: usize = 64;

/// An operation that takes longer hangs, and no longer counts.
const HANGS_AFTER: Duration = Duration::from_secs(1);

/// Limits how many operations run at the same time, for scans of all devices.
#[derive(Debug)]
pub(super) struct Limiter(Semaphore);

impl Limiter {
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Semaphore::new(AT_ONCE)))
    }

    /// Runs the work once fewer than `AT_ONCE` others run.
    pub async fn run(&self, work: impl Future<Output = ()>) {
        let permit = self.0.acquire().await;
        tokio::pin!(work);
        if tokio::time::timeout(HANGS_AFTER, &mut work).await.is_err() {
            drop(permit);
            work.await;
        }
    }
}

/// Limits the operations for which no call waits: ends of attachments, scans of devices. Each takes a thread as long
/// as a backing file hangs, so there is a limit for each uid and one for all users together. Operations above the limit
/// wait, since they have to be done.
#[derive(Debug)]
pub(super) struct Background {
    /// `None` is for devices without a known owner.
    of_each: Mutex<HashMap<Option<u32>, Weak<Semaphore>>>,
    of_users: Arc<Semaphore>,
}

/// A permit for one background operation. To be acquired before any lock that other background operations wait for.
#[derive(Debug)]
pub(super) struct BackgroundPermit {
    _of_all: Option<OwnedSemaphorePermit>,
    _own: Option<OwnedSemaphorePermit>,
    _of_each: Arc<Semaphore>,
}

impl Default for Background {
    fn default() -> Self {
        Self { of_each: Mutex::default(), of_users: Arc::new(Semaphore::new(OF_ALL_USERS)) }
    }
}

impl Background {
    /// Waits until one more operation for this uid may run.
    pub async fn acquire(&self, uid: Option<u32>) -> BackgroundPermit {
        let is_user = uid.is_some_and(|uid| !is_root(uid));
        let of_each = {
            let mut all = self.of_each.lock().unwrap_or_else(PoisonError::into_inner);
            all.retain(|_, one| one.strong_count() > 0);
            let new = || Arc::new(Semaphore::new(if is_user { OF_A_UID } else { OF_NO_USER }));
            let one = all.get(&uid).and_then(Weak::upgrade).unwrap_or_else(new);
            all.insert(uid, Arc::downgrade(&one));
            one
        };
        let own = Arc::clone(&of_each).acquire_owned().await.ok();
        let of_all = if is_user { Arc::clone(&self.of_users).acquire_owned().await.ok() } else { None };
        BackgroundPermit { _of_all: of_all, _own: own, _of_each: of_each }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn hung_background_operations_leave_permits_to_others() {
        let background = Background::default();
        let mut hung = Vec::new();
        let soon = Duration::from_millis(1);
        for uid in 1..=u32::try_from(OF_ALL_USERS / OF_A_UID).unwrap() - 1 {
            for _ in 0..OF_A_UID {
                hung.push(tokio::time::timeout(soon, background.acquire(Some(uid))).await.unwrap());
            }
            assert!(tokio::time::timeout(soon, background.acquire(Some(uid))).await.is_err());
        }
        for other in [Some(0), Some(1000), None] {
            hung.push(tokio::time::timeout(soon, background.acquire(other)).await.unwrap());
        }
        hung.clear();
        let _again = tokio::time::timeout(soon, background.acquire(Some(1))).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_hung_operation_leaves_its_permit_to_others() {
        let limiter = Limiter::new();
        let done = Arc::new(Semaphore::new(0));
        for _ in 0..3 * AT_ONCE {
            let limiter = Arc::clone(&limiter);
            tokio::spawn(async move { limiter.run(std::future::pending()).await });
        }
        for _ in 0..10 {
            let (limiter, done) = (Arc::clone(&limiter), Arc::clone(&done));
            tokio::spawn(async move { limiter.run(async { done.add_permits(1) }).await });
        }
        let all = tokio::time::timeout(4 * HANGS_AFTER, done.acquire_many(10)).await;
        assert!(all.is_ok());
    }
}
