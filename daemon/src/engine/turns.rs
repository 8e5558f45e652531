//! Who may do something now, and who waits: one at a time for the same thing, and not too many at once.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use tokio::sync::{OwnedMutexGuard, Semaphore};

/// How many devices are looked at at the same time.
const AT_ONCE: usize = 32;
/// What takes longer hangs, and keeps nobody else waiting.
const TURN: Duration = Duration::from_secs(1);

type Lock = tokio::sync::Mutex<()>;

/// One at a time for each key; a key that nobody has costs nothing.
#[derive(Debug)]
pub(super) struct Locks<Key> {
    locks: Mutex<HashMap<Key, Weak<Lock>>>,
}

impl<Key> Default for Locks<Key> {
    fn default() -> Self {
        Self { locks: Mutex::default() }
    }
}

impl<Key: Eq + Hash> Locks<Key> {
    /// Waits until nobody else has this key; dropping the guard gives it back.
    pub async fn lock(&self, key: Key) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
            locks.retain(|_, lock| lock.strong_count() > 0);
            let lock = locks.get(&key).and_then(Weak::upgrade).unwrap_or_default();
            locks.insert(key, Arc::downgrade(&lock));
            lock
        };
        lock.lock_owned().await
    }

    /// Whether nobody has or waits for any key.
    #[cfg(test)]
    pub fn are_free(&self) -> bool {
        let locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        locks.values().all(|lock| lock.strong_count() == 0)
    }
}

/// Bounds how much is done at once, so that a look at all devices is no storm.
#[derive(Debug)]
pub(super) struct Turns(Semaphore);

impl Turns {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn locks_go_with_their_users() {
        let locks = Locks::default();
        let first = locks.lock(1).await;
        let _other = locks.lock(2).await;
        assert!(tokio::time::timeout(Duration::from_millis(1), locks.lock(1)).await.is_err());
        drop(first);
        let _again = locks.lock(1).await;
        assert_eq!(locks.locks.lock().unwrap().len(), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn what_hangs_gives_its_turn_to_others() {
        let turns = Turns::new();
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
