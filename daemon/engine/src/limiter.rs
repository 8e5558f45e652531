//! Limits on how much runs at the same time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::ownership::is_root;

/// How many devices are looked at at the same time.
const AT_ONCE: usize = 32;

/// Things done at once in the background for one uid.
const OF_A_UID: usize = 8;

/// Those for all users other than root.
const OF_ALL_USERS: usize = 128;

/// Those for root, and for devices that nobody is known to own.
const OF_NO_USER: usize = 64;

/// What takes longer hangs, and keeps nobody else waiting.
const TURN: Duration = Duration::from_secs(1);

/// Bounds how much is done at once, so that a look at all devices is no storm.
#[derive(Debug)]
pub(super) struct Limiter(Semaphore);

impl Limiter {
    pub fn new() -> Arc<Self> {
        Arc::new(Self(Semaphore::new(AT_ONCE)))
    }

    /// Does this in its turn.
    pub async fn take(&self, work: impl Future<Output = ()>) {
        let turn = self.0.acquire().await;
        tokio::pin!(work);
        if tokio::time::timeout(TURN, &mut work).await.is_err() {
            drop(turn);
            work.await;
        }
    }
}

/// What is done for a uid that nobody waits for in a call: ends of attachments, looks at devices. It takes a
/// thread for as long as a backing file hangs, so each uid has some, and all users together have some
/// more. What is over waits, since it has to be done.
#[derive(Debug)]
pub(super) struct Background {
    /// `None` is for devices that nobody is known to own.
    of_each: Mutex<HashMap<Option<u32>, Weak<Semaphore>>>,
    of_users: Arc<Semaphore>,
}

/// BackgroundPermit to do one thing in the background. To be asked for before any lock that others in the background
/// wait for.
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
    /// Waits until this uid may do one more thing.
    pub async fn take(&self, uid: Option<u32>) -> BackgroundPermit {
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
    async fn what_hangs_in_the_background_leaves_some_to_others() {
        let background = Background::default();
        let mut hung = Vec::new();
        let soon = Duration::from_millis(1);
        for uid in 1..=u32::try_from(OF_ALL_USERS / OF_A_UID).unwrap() - 1 {
            for _ in 0..OF_A_UID {
                hung.push(tokio::time::timeout(soon, background.take(Some(uid))).await.unwrap());
            }
            assert!(tokio::time::timeout(soon, background.take(Some(uid))).await.is_err());
        }
        for other in [Some(0), Some(1000), None] {
            hung.push(tokio::time::timeout(soon, background.take(other)).await.unwrap());
        }
        hung.clear();
        let _again = tokio::time::timeout(soon, background.take(Some(1))).await.unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn what_hangs_gives_its_turn_to_others() {
        let turns = Limiter::new();
        let done = Arc::new(Semaphore::new(0));
        for _ in 0..3 * AT_ONCE {
            let turns = Arc::clone(&turns);
            tokio::spawn(async move { turns.take(std::future::pending()).await });
        }
        for _ in 0..10 {
            let (turns, done) = (Arc::clone(&turns), Arc::clone(&done));
            tokio::spawn(async move { turns.take(async { done.add_permits(1) }).await });
        }
        let all = tokio::time::timeout(4 * TURN, done.acquire_many(10)).await;
        assert!(all.is_ok());
    }
}
