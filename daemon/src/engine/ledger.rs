//! Who has how much: bounds for each uid, so that one user's flood or hung file costs the others
//! nothing. Root is not bound.

use super::is_root;
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use loopd_dbus::{Error, ErrorKind};
use tokio::sync::Notify;

/// Counts something for each uid, up to a limit.
#[derive(Clone, Debug)]
pub struct Ledger {
    what: &'static str,
    advice: &'static str,
    book: Arc<Book>,
}

#[derive(Debug)]
struct Book {
    limit: AtomicUsize,
    counts: Mutex<HashMap<u32, usize>>,
    emptied: Notify,
}

impl Book {
    fn counts(&self) -> MutexGuard<'_, HashMap<u32, usize>> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of what a [`Ledger`] counts; dropping it gives it back.
#[derive(Debug)]
pub struct Slot {
    uid: u32,
    book: Arc<Book>,
}

impl Ledger {
    /// A ledger with nothing in it. The words go into the message of a refusal.
    #[must_use]
    pub fn new(what: &'static str, advice: &'static str, limit: usize) -> Self {
        let book = Book { limit: AtomicUsize::new(limit), counts: Mutex::default(), emptied: Notify::new() };
        Self { what, advice, book: Arc::new(book) }
    }

    /// From now on each uid may have this many; nobody loses what it has.
    pub fn set_limit(&self, limit: usize) {
        self.book.limit.store(limit, Ordering::Relaxed);
    }

    /// Takes one more for this uid.
    ///
    /// # Errors
    /// `LimitExceeded`.
    pub fn enter(&self, uid: u32) -> Result<Slot, Error> {
        let limit = self.book.limit.load(Ordering::Relaxed);
        let mut counts = self.book.counts();
        let count = counts.get(&uid).copied().unwrap_or_default();
        if count >= limit && !is_root(uid) {
            return Err(Error::new(
                ErrorKind::LimitExceeded,
                format!(
                    "uid {uid} has {count} {} already, and may have {}; {}",
                    self.what, limit, self.advice
                ),
            ));
        }
        counts.insert(uid, count + 1);
        drop(counts);
        Ok(Slot { uid, book: Arc::clone(&self.book) })
    }

    /// Counts one that this uid has already, whatever the limit.
    #[must_use]
    pub fn take_over(&self, uid: u32) -> Slot {
        *self.book.counts().entry(uid).or_default() += 1;
        Slot { uid, book: Arc::clone(&self.book) }
    }

    /// Whether there is none, of any uid.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.book.counts().is_empty()
    }

    /// What each uid has.
    #[cfg(test)]
    pub fn counted(&self) -> std::collections::BTreeMap<u32, usize> {
        self.book.counts().iter().map(|(uid, count)| (*uid, *count)).collect()
    }

    /// Resolves when there is none, of any uid.
    pub async fn empty(&self) {
        loop {
            let emptied = self.book.emptied.notified();
            tokio::pin!(emptied);
            emptied.as_mut().enable();
            if self.is_empty() {
                return;
            }
            emptied.await;
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut counts = self.book.counts();
        if let Some(count) = counts.get_mut(&self.uid) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.uid);
            }
            if counts.is_empty() {
                self.book.emptied.notify_waiters();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_uid_has_its_own_bound_and_root_none() {
        let ledger = Ledger::new("things", "drop one first", 2);
        let first = ledger.enter(7).unwrap();
        let _second = ledger.enter(7).unwrap();
        let refused = ledger.enter(7).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::LimitExceeded);
        assert_eq!(refused.message, "uid 7 has 2 things already, and may have 2; drop one first");
        let _other = ledger.enter(8).unwrap();
        let _root: Vec<_> = (0..9).map(|_| ledger.enter(0).unwrap()).collect();
        drop(first);
        let _third = ledger.enter(7).unwrap();
        assert_eq!(ledger.book.counts().values().sum::<usize>(), 12);
        ledger.set_limit(0);
        assert!(ledger.enter(9).is_err());
        assert!(!ledger.book.counts().contains_key(&9), "a refusal is not counted");
    }
}
