//! Who has how much: bounds for each uid, so that one user's flood or hung file costs the others
//! nothing, and for all users together, so that many uids have not more than the daemon. Root is not
//! bound.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use loopd_common::{Error, ErrorKind};
use tokio::sync::{Notify, oneshot};

use super::is_root;

/// How many of a uid may wait for their turn.
const WAITING: usize = 128;
/// How many of all users may wait for their turn.
const WAITING_OF_ALL: usize = 512;

/// How much there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Of one uid.
    pub each: usize,
    /// Of all users other than root together. A quarter more is kept for those who have none.
    pub all: usize,
}

impl Limits {
    fn for_all(self, has_one: bool) -> usize {
        if has_one { self.all } else { self.all.saturating_add(self.all.div_ceil(4)) }
    }
}

/// Counts something for each uid, up to a limit.
#[derive(Clone, Debug)]
pub struct Ledger {
    what: &'static str,
    advice: &'static str,
    book: Arc<Book>,
}

#[derive(Debug)]
struct Book {
    pages: Mutex<Pages>,
    emptied: Notify,
}

#[derive(Debug)]
struct Pages {
    limits: Limits,
    counts: HashMap<u32, usize>,
    /// Of all users other than root.
    of_users: usize,
    waiting: HashMap<u32, VecDeque<oneshot::Sender<Slot>>>,
    waiting_of_all: usize,
}

/// Why there cannot be more.
enum Full {
    OfUid(usize),
    OfAll(usize),
}

impl Pages {
    fn count(&self, uid: u32) -> usize {
        self.counts.get(&uid).copied().unwrap_or_default()
    }

    /// How many more this uid may have.
    fn room(&self, uid: u32) -> usize {
        if is_root(uid) {
            return usize::MAX;
        }
        let count = self.count(uid);
        let of_all = self.limits.for_all(count > 0).saturating_sub(self.of_users);
        self.limits.each.saturating_sub(count).min(of_all)
    }

    fn add(&mut self, uid: u32, more: usize) {
        if more > 0 {
            *self.counts.entry(uid).or_default() += more;
            self.of_users += if is_root(uid) { 0 } else { more };
        }
    }

    fn take(&mut self, uid: u32, less: usize) {
        let Some(count) = self.counts.get_mut(&uid) else { return };
        *count -= less;
        if *count == 0 {
            self.counts.remove(&uid);
        }
        self.of_users -= if is_root(uid) { 0 } else { less };
    }

    fn full(&self, uid: u32, more: usize) -> Option<Full> {
        if self.room(uid) >= more {
            None
        } else if self.count(uid) + more > self.limits.each {
            Some(Full::OfUid(self.count(uid)))
        } else {
            Some(Full::OfAll(self.of_users))
        }
    }

    /// The next one of this uid that waits for its turn.
    fn next(&mut self, uid: u32) -> Option<oneshot::Sender<Slot>> {
        let queue = self.waiting.get_mut(&uid)?;
        let next = queue.pop_front();
        if queue.is_empty() {
            self.waiting.remove(&uid);
        }
        self.waiting_of_all -= usize::from(next.is_some());
        next
    }
}

impl Book {
    fn pages(&self) -> MutexGuard<'_, Pages> {
        self.pages.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Some of what a [`Ledger`] counts; dropping it gives it back.
#[derive(Debug)]
pub struct Slot {
    uid: u32,
    count: usize,
    book: Arc<Book>,
}

impl Ledger {
    /// A ledger with nothing in it. The words go into the message of a refusal.
    #[must_use]
    pub fn new(what: &'static str, advice: &'static str, limits: Limits) -> Self {
        let pages =
            Pages { limits, counts: HashMap::new(), of_users: 0, waiting: HashMap::new(), waiting_of_all: 0 };
        Self { what, advice, book: Arc::new(Book { pages: Mutex::new(pages), emptied: Notify::new() }) }
    }

    /// From now on there may be this many; nobody loses what it has.
    pub fn set_limits(&self, limits: Limits) {
        self.book.pages().limits = limits;
    }

    fn slot(&self, uid: u32, count: usize) -> Slot {
        Slot { uid, count, book: Arc::clone(&self.book) }
    }

    /// Takes one more for this uid.
    ///
    /// # Errors
    /// `LimitExceeded`.
    pub fn enter(&self, uid: u32) -> Result<Slot, Error> {
        let mut pages = self.book.pages();
        match pages.full(uid, 1) {
            None => pages.add(uid, 1),
            Some(full) => return Err(self.refused(uid, &full, pages.limits)),
        }
        drop(pages);
        Ok(self.slot(uid, 1))
    }

    /// The same, but waits for the uid's own earlier ones where these are too many: in turn, and not
    /// too many at once.
    ///
    /// # Errors
    /// `LimitExceeded`.
    pub async fn enter_in_turn(&self, uid: u32) -> Result<Slot, Error> {
        let (refusal, turn) = {
            let mut pages = self.book.pages();
            let full = pages.full(uid, 1);
            let refusal = match &full {
                None if !pages.waiting.contains_key(&uid) => {
                    pages.add(uid, 1);
                    drop(pages);
                    return Ok(self.slot(uid, 1));
                }
                Some(full @ Full::OfAll(_)) => return Err(self.refused(uid, full, pages.limits)),
                Some(full) => self.refused(uid, full, pages.limits),
                None => self.refused(uid, &Full::OfUid(pages.count(uid)), pages.limits),
            };
            let waiting = pages.waiting.get(&uid).map_or(0, VecDeque::len);
            if waiting >= WAITING || pages.waiting_of_all >= WAITING_OF_ALL || pages.limits.each == 0 {
                return Err(refusal);
            }
            let (sender, turn) = oneshot::channel();
            pages.waiting.entry(uid).or_default().push_back(sender);
            pages.waiting_of_all += 1;
            (refusal, turn)
        };
        turn.await.map_err(|_| refusal)
    }

    /// Why this uid may not have one more now.
    #[must_use]
    pub fn refusal(&self, uid: u32) -> Error {
        let pages = self.book.pages();
        let full = pages.full(uid, 1).unwrap_or(Full::OfUid(pages.count(uid)));
        self.refused(uid, &full, pages.limits)
    }

    fn refused(&self, uid: u32, full: &Full, limits: Limits) -> Error {
        let Self { what, advice, .. } = self;
        let message = match full {
            Full::OfUid(count) => {
                format!("uid {uid} has {count} {what} already, and may have {}; {advice}", limits.each)
            }
            Full::OfAll(count) => format!(
                "all users together have {count} {what} already, and may have {}; try again later, or have the \
                 administrator raise that (all-users in loopd.toml)",
                limits.all
            ),
        };
        Error::new(ErrorKind::LimitExceeded, message)
    }

    /// Counts one that this uid has already, whatever the limit.
    #[must_use]
    pub fn take_over(&self, uid: u32) -> Slot {
        self.take_over_many(uid, 1)
    }

    /// Counts this many that the uid has already, whatever the limit.
    #[must_use]
    pub fn take_over_many(&self, uid: u32, count: usize) -> Slot {
        self.book.pages().add(uid, count);
        self.slot(uid, count)
    }

    /// Whether there is none, of any uid.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.book.pages().counts.is_empty()
    }

    /// What each uid has.
    #[cfg(test)]
    pub fn counted(&self) -> std::collections::BTreeMap<u32, usize> {
        self.book.pages().counts.iter().map(|(uid, count)| (*uid, *count)).collect()
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

impl Slot {
    /// Counts this many from now on, or as many as there may be; says whether that is enough.
    pub fn resize(&mut self, wanted: usize) -> bool {
        let mut pages = self.book.pages();
        if wanted <= self.count {
            pages.take(self.uid, self.count - wanted);
            self.count = wanted;
            return true;
        }
        let more = (wanted - self.count).min(pages.room(self.uid));
        pages.add(self.uid, more);
        self.count += more;
        self.count == wanted
    }

    /// How many it counts.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        let mut pages = self.book.pages();
        pages.take(self.uid, self.count);
        if pages.counts.is_empty() {
            self.book.emptied.notify_waiters();
        }
        // What waits has been refused nothing but this.
        if pages.full(self.uid, 1).is_some() {
            return;
        }
        let Some(next) = pages.next(self.uid) else { return };
        pages.add(self.uid, 1);
        drop(pages);
        // One that does not wait any more gives it back, to the next one.
        let _no_longer_waits = next.send(Self { uid: self.uid, count: 1, book: Arc::clone(&self.book) });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ledger(each: usize, all: usize) -> Ledger {
        Ledger::new("things", "drop one first", Limits { each, all })
    }

    #[test]
    fn each_uid_has_its_own_bound_and_root_none() {
        let ledger = ledger(2, 100);
        let first = ledger.enter(7).unwrap();
        let _second = ledger.enter(7).unwrap();
        let refused = ledger.enter(7).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::LimitExceeded);
        assert_eq!(refused.message, "uid 7 has 2 things already, and may have 2; drop one first");
        let _other = ledger.enter(8).unwrap();
        let _root: Vec<_> = (0..9).map(|_| ledger.enter(0).unwrap()).collect();
        drop(first);
        let _third = ledger.enter(7).unwrap();
        assert_eq!(ledger.book.pages().counts.values().sum::<usize>(), 12);
        ledger.set_limits(Limits { each: 0, all: 100 });
        assert!(ledger.enter(9).is_err());
        assert!(!ledger.book.pages().counts.contains_key(&9), "a refusal is not counted");
    }

    #[test]
    fn all_users_have_a_bound_with_some_left_for_those_who_have_none() {
        let ledger = ledger(4, 8);
        let mut taken: Vec<_> = [1, 1, 1, 2, 2, 2, 3, 3].map(|uid| ledger.enter(uid).unwrap()).into();
        let refused = ledger.enter(3).unwrap_err();
        assert_eq!(refused.kind, ErrorKind::LimitExceeded);
        assert!(
            refused.message.starts_with("all users together have 8 things already, and may have 8;"),
            "{refused}"
        );
        taken.extend([4, 5].map(|uid| ledger.enter(uid).unwrap()));
        assert!(ledger.enter(4).is_err() && ledger.enter(6).is_err(), "what is left is over too");
        taken.extend((0..9).map(|_| ledger.enter(0).unwrap()));
        taken.clear();
        assert!(ledger.is_empty());
        assert_eq!(ledger.book.pages().of_users, 0);
    }

    #[test]
    fn a_slot_grows_up_to_the_limit() {
        let ledger = ledger(10, 100);
        let mut first = ledger.take_over_many(7, 0);
        assert!(ledger.is_empty());
        assert!(first.resize(6));
        let mut second = ledger.take_over_many(7, 0);
        assert!(!second.resize(6));
        assert_eq!(second.count(), 4);
        assert!(first.resize(1) && second.resize(6));
        let mut roots = ledger.take_over_many(0, 0);
        assert!(roots.resize(1000));
        drop((first, second, roots));
        assert!(ledger.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_over_the_limit_waits_for_its_turn() {
        let ledger = ledger(1, 100);
        let first = ledger.enter_in_turn(7).await.unwrap();
        let mut turns: Vec<_> = (0..WAITING)
            .map(|_| {
                let ledger = ledger.clone();
                tokio::spawn(async move { ledger.enter_in_turn(7).await })
            })
            .collect();
        while ledger.book.pages().waiting_of_all < WAITING {
            tokio::task::yield_now().await;
        }
        let refused = ledger.enter_in_turn(7).await.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::LimitExceeded, "no more than that may wait");
        let _others = ledger.enter_in_turn(8).await.unwrap();
        turns.remove(0).abort();
        tokio::task::yield_now().await;
        drop(first);
        for turn in turns {
            drop(turn.await.unwrap().unwrap());
        }
        assert_eq!(ledger.book.pages().counts.get(&7), None);
        assert_eq!(ledger.book.pages().waiting_of_all, 0);
    }
}
