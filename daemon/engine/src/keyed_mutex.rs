//! A lock for each key.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::OwnedMutexGuard;

type Lock = tokio::sync::Mutex<()>;

/// A lock for each key. A key that is not locked needs no memory.
#[derive(Debug)]
pub struct KeyedMutex<Key> {
    locks: Mutex<HashMap<Key, Weak<Lock>>>,
}

impl<Key> Default for KeyedMutex<Key> {
    fn default() -> Self {
        Self { locks: Mutex::default() }
    }
}

impl<Key: Eq + Hash> KeyedMutex<Key> {
    /// Locks a key. Dropping the guard unlocks it.
    pub async fn lock(&self, key: Key) -> OwnedMutexGuard<()> {
        self.of(key).lock_owned().await
    }

    /// The same if the key is not locked.
    pub fn try_lock(&self, key: Key) -> Option<OwnedMutexGuard<()>> {
        self.of(key).try_lock_owned().ok()
    }

    fn of(&self, key: Key) -> Arc<Lock> {
        let mut locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        locks.retain(|_, lock| lock.strong_count() > 0);
        let lock = locks.get(&key).and_then(Weak::upgrade).unwrap_or_default();
        locks.insert(key, Arc::downgrade(&lock));
        lock
    }

    /// Whether no key is locked or waited for.
    #[cfg(test)]
    pub fn are_free(&self) -> bool {
        let locks = self.locks.lock().unwrap_or_else(PoisonError::into_inner);
        locks.values().all(|lock| lock.strong_count() == 0)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn unused_locks_are_removed() {
        let locks = KeyedMutex::default();
        let first = locks.lock(1).await;
        let _other = locks.lock(2).await;
        assert!(tokio::time::timeout(Duration::from_millis(1), locks.lock(1)).await.is_err());
        assert!(locks.try_lock(1).is_none());
        drop(first);
        let _again = locks.try_lock(1).unwrap();
        assert_eq!(locks.locks.lock().unwrap().len(), 2);
    }
}
