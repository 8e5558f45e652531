//! Quotas: limits for each uid, so that one user's many requests or hung files cost the others nothing, and for all
//! users together, so that many uids do not use up the daemon's resources. Root has no limits.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::{Notify, oneshot};

use crate::error::Error;
use crate::ownership::is_root;

/// How many of a uid may wait for their turn.
const WAITING: usize = 128;
/// How many of all users may wait for their turn.
const WAITING_OF_ALL: usize = 512;

/// The limits of a quota.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// For each uid.
    pub each: usize,
    /// For all users other than root together. A quarter more is reserved for users who have none yet.
    pub all: usize,
}

impl Limits {
    fn for_all(self, has_one: bool) -> usize {
        if has_one { self.all } else { self.all.saturating_add(self.all.div_ceil(4)) }
    }
}

/// Counts something for each uid, up to a limit.
#[derive(Clone, Debug)]
pub struct Quota {
    what: &'static str,
    advice: &'static str,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    counts: Mutex<Counts>,
    emptied: Notify,
}

#[derive(Debug)]
struct Counts {
    limits: Limits,
    counts: HashMap<u32, usize>,
    /// The sum of all users other than root.
    of_users: usize,
    waiting: HashMap<u32, VecDeque<oneshot::Sender<Permit>>>,
    waiting_of_all: usize,
}

/// Which limit is reached, and the count.
enum Exceeded {
    OfUid(usize),
    OfAll(usize),
}

impl Counts {
    fn count(&self, uid: u32) -> usize {
        self.counts.get(&uid).copied().unwrap_or_default()
    }

    /// How many more this uid may have.
    fn available(&self, uid: u32) -> usize {
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

    fn exceeded(&self, uid: u32, more: usize) -> Option<Exceeded> {
        if self.available(uid) >= more {
            None
        } else if self.count(uid) + more > self.limits.each {
            Some(Exceeded::OfUid(self.count(uid)))
        } else {
            Some(Exceeded::OfAll(self.of_users))
        }
    }

    /// A uid that has requests waiting and may have one more now; `first` if that is one.
    fn servable(&self, first: u32) -> Option<u32> {
        let mut candidates = [first].into_iter().chain(self.waiting.keys().copied());
        candidates.find(|uid| self.waiting.contains_key(uid) && self.exceeded(*uid, 1).is_none())
    }

    /// Removes the request of this uid that has waited longest.
    fn next(&mut self, uid: u32) -> Option<oneshot::Sender<Permit>> {
        let queue = self.waiting.get_mut(&uid)?;
        let next = queue.pop_front();
        if queue.is_empty() {
            self.waiting.remove(&uid);
        }
        self.waiting_of_all -= usize::from(next.is_some());
        next
    }
}

impl Shared {
    fn counts(&self) -> MutexGuard<'_, Counts> {
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Units of a [`Quota`]; dropping it gives them back.
#[derive(Debug)]
pub struct Permit {
    uid: u32,
    count: usize,
    shared: Arc<Shared>,
}

impl Quota {
    /// An unused quota. The texts are used in the error of a refusal.
    #[must_use]
    pub fn new(what: &'static str, advice: &'static str, limits: Limits) -> Self {
        let counts = Counts {
            limits,
            counts: HashMap::new(),
            of_users: 0,
            waiting: HashMap::new(),
            waiting_of_all: 0,
        };
        Self { what, advice, shared: Arc::new(Shared { counts: Mutex::new(counts), emptied: Notify::new() }) }
    }

    /// Replaces the limits; applies to subsequent requests only.
    pub fn set_limits(&self, limits: Limits) {
        self.shared.counts().limits = limits;
    }

    fn permit(&self, uid: u32, count: usize) -> Permit {
        Permit { uid, count, shared: Arc::clone(&self.shared) }
    }

    /// Takes one unit for this uid.
    ///
    /// # Errors
    /// `LimitExceeded`.
    pub fn acquire(&self, uid: u32) -> Result<Permit, Error> {
        let mut counts = self.shared.counts();
        match counts.exceeded(uid, 1) {
            None => counts.add(uid, 1),
            Some(exceeded) => return Err(self.refused(uid, &exceeded, counts.limits)),
        }
        drop(counts);
        Ok(self.permit(uid, 1))
    }

    /// The same, but waits while the uid's own limit is reached. Requests of a uid are served in order, and only so
    /// many may wait.
    ///
    /// # Errors
    /// `LimitExceeded`.
    pub async fn acquire_in_turn(&self, uid: u32) -> Result<Permit, Error> {
        let (refusal, turn) = {
            let mut counts = self.shared.counts();
            let exceeded = counts.exceeded(uid, 1);
            let refusal = match &exceeded {
                None if !counts.waiting.contains_key(&uid) => {
                    counts.add(uid, 1);
                    drop(counts);
                    return Ok(self.permit(uid, 1));
                }
                Some(exceeded @ Exceeded::OfAll(_)) => {
                    return Err(self.refused(uid, exceeded, counts.limits));
                }
                Some(exceeded) => self.refused(uid, exceeded, counts.limits),
                None => self.refused(uid, &Exceeded::OfUid(counts.count(uid)), counts.limits),
            };
            let waiting = counts.waiting.get(&uid).map_or(0, VecDeque::len);
            if waiting >= WAITING || counts.waiting_of_all >= WAITING_OF_ALL || counts.limits.each == 0 {
                return Err(refusal);
            }
            let (sender, turn) = oneshot::channel();
            counts.waiting.entry(uid).or_default().push_back(sender);
            counts.waiting_of_all += 1;
            (refusal, turn)
        };
        turn.await.map_err(|_| refusal)
    }

    /// Error for a uid that may not have one more now.
    #[must_use]
    pub fn refusal(&self, uid: u32) -> Error {
        let counts = self.shared.counts();
        let exceeded = counts.exceeded(uid, 1).unwrap_or(Exceeded::OfUid(counts.count(uid)));
        self.refused(uid, &exceeded, counts.limits)
    }

    fn refused(&self, uid: u32, exceeded: &Exceeded, limits: Limits) -> Error {
        let (uid, count, limit) = match exceeded {
            Exceeded::OfUid(count) => (Some(uid), *count, limits.each),
            Exceeded::OfAll(count) => (None, *count, limits.all),
        };
        Error::LimitExceeded { uid, what: self.what, count, limit, advice: self.advice }
    }

    /// Counts one unit that this uid has already, even above the limit.
    #[must_use]
    pub fn adopt(&self, uid: u32) -> Permit {
        self.adopt_many(uid, 1)
    }

    /// Counts units that this uid has already, even above the limit.
    #[must_use]
    pub fn adopt_many(&self, uid: u32, count: usize) -> Permit {
        self.shared.counts().add(uid, count);
        self.permit(uid, count)
    }

    /// Whether no uid has a unit.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.shared.counts().counts.is_empty()
    }

    /// The count of each uid.
    #[cfg(test)]
    pub fn counted(&self) -> std::collections::BTreeMap<u32, usize> {
        self.shared.counts().counts.iter().map(|(uid, count)| (*uid, *count)).collect()
    }

    /// Waits until no uid has a unit.
    pub async fn empty(&self) {
        loop {
            let emptied = self.shared.emptied.notified();
            tokio::pin!(emptied);
            emptied.as_mut().enable();
            if self.is_empty() {
                return;
            }
            emptied.await;
        }
    }
}

impl Permit {
    /// Changes the count to this many, or to as many as the limits allow; returns whether that is enough.
    pub fn resize(&mut self, wanted: usize) -> bool {
        let mut counts = self.shared.counts();
        if wanted <= self.count {
            counts.take(self.uid, self.count - wanted);
            self.count = wanted;
            return true;
        }
        let more = (wanted - self.count).min(counts.available(self.uid));
        counts.add(self.uid, more);
        self.count += more;
        self.count == wanted
    }

    /// How many it counts.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let mut counts = self.shared.counts();
        counts.take(self.uid, self.count);
        if counts.counts.is_empty() {
            self.shared.emptied.notify_waiters();
        }
        // Usually of the same uid. The limits may have prevented it from being served when its own last permit was
        // dropped.
        let Some(uid) = counts.servable(self.uid) else { return };
        let Some(next) = counts.next(uid) else { return };
        counts.add(uid, 1);
        drop(counts);
        // If the request does not wait any more, dropping the permit passes it to the next one.
        let _no_longer_waits = next.send(Self { uid, count: 1, shared: Arc::clone(&self.shared) });
    }
}

#[cfg(test)]
mod tests {
    use loopd_common::ErrorKind;

    use super::*;

    fn quota(each: usize, all: usize) -> Quota {
        Quota::new("things", "drop one first", Limits { each, all })
    }

    #[test]
    fn each_uid_has_its_own_limit_and_root_has_none() {
        let quota = quota(2, 100);
        let first = quota.acquire(7).unwrap();
        let _second = quota.acquire(7).unwrap();
        let refused = quota.acquire(7).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::LimitExceeded);
        assert_eq!(refused.to_string(), "uid 7 has 2 things already, and may have 2; drop one first");
        let _other = quota.acquire(8).unwrap();
        let _root: Vec<_> = (0..9).map(|_| quota.acquire(0).unwrap()).collect();
        drop(first);
        let _third = quota.acquire(7).unwrap();
        assert_eq!(quota.shared.counts().counts.values().sum::<usize>(), 12);
        quota.set_limits(Limits { each: 0, all: 100 });
        assert!(quota.acquire(9).is_err());
        assert!(!quota.shared.counts().counts.contains_key(&9), "a refusal is not counted");
    }

    #[test]
    fn all_users_have_a_limit_with_a_reserve_for_those_who_have_none() {
        let quota = quota(4, 8);
        let mut taken: Vec<_> = [1, 1, 1, 2, 2, 2, 3, 3].map(|uid| quota.acquire(uid).unwrap()).into();
        let refused = quota.acquire(3).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::LimitExceeded);
        assert!(
            refused.to_string().starts_with("all users together have 8 things already, and may have 8;"),
            "{refused}"
        );
        taken.extend([4, 5].map(|uid| quota.acquire(uid).unwrap()));
        assert!(quota.acquire(4).is_err() && quota.acquire(6).is_err(), "the reserve is used up too");
        taken.extend((0..9).map(|_| quota.acquire(0).unwrap()));
        taken.clear();
        assert!(quota.is_empty());
        assert_eq!(quota.shared.counts().of_users, 0);
    }

    #[test]
    fn a_permit_grows_up_to_the_limit() {
        let quota = quota(10, 100);
        let mut first = quota.adopt_many(7, 0);
        assert!(quota.is_empty());
        assert!(first.resize(6));
        let mut second = quota.adopt_many(7, 0);
        assert!(!second.resize(6));
        assert_eq!(second.count(), 4);
        assert!(first.resize(1) && second.resize(6));
        let mut roots = quota.adopt_many(0, 0);
        assert!(roots.resize(1000));
        drop((first, second, roots));
        assert!(quota.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn requests_above_the_limit_wait_in_order() {
        let quota = quota(1, 100);
        let first = quota.acquire_in_turn(7).await.unwrap();
        let mut turns: Vec<_> = (0..WAITING)
            .map(|_| {
                let quota = quota.clone();
                tokio::spawn(async move { quota.acquire_in_turn(7).await })
            })
            .collect();
        while quota.shared.counts().waiting_of_all < WAITING {
            tokio::task::yield_now().await;
        }
        let refused = quota.acquire_in_turn(7).await.unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::LimitExceeded, "no more requests may wait");
        let _others = quota.acquire_in_turn(8).await.unwrap();
        turns.remove(0).abort();
        tokio::task::yield_now().await;
        drop(first);
        for turn in turns {
            drop(turn.await.unwrap().unwrap());
        }
        assert_eq!(quota.shared.counts().counts.get(&7), None);
        assert_eq!(quota.shared.counts().waiting_of_all, 0);
    }

    #[test]
    fn the_refusal_names_the_limit_that_was_reached() {
        let quota = quota(2, 2);
        let _held: Vec<_> = [7, 8, 9].map(|uid| quota.acquire(uid).unwrap()).into();
        let refused = quota.acquire(7).unwrap_err();
        assert!(refused.to_string().starts_with("all users together have 3"), "{refused}");
    }

    #[tokio::test(start_paused = true)]
    async fn waiting_requests_are_not_overtaken() {
        let quota = quota(1, 100);
        let first = quota.acquire(7).unwrap();
        let order = Arc::new(Mutex::new(Vec::new()));
        let wait = |name: &'static str| {
            let (quota, order) = (quota.clone(), Arc::clone(&order));
            tokio::spawn(async move {
                let permit = quota.acquire_in_turn(7).await;
                order.lock().unwrap().push(name);
                permit
            })
        };
        let earlier = wait("earlier");
        tokio::task::yield_now().await;
        // There could be two now, but one waits already.
        quota.set_limits(Limits { each: 2, all: 100 });
        let later = wait("later");
        tokio::task::yield_now().await;
        assert!(order.lock().unwrap().is_empty());
        drop(first);
        drop(earlier.await.unwrap().unwrap());
        drop(later.await.unwrap().unwrap());
        assert_eq!(*order.lock().unwrap(), ["earlier", "later"]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_request_that_lower_limits_have_stopped_is_served_later() {
        let quota = quota(1, 100);
        let (own, other) = (quota.acquire(7).unwrap(), quota.acquire(8).unwrap());
        let waiting = tokio::spawn({
            let quota = quota.clone();
            async move { quota.acquire_in_turn(7).await }
        });
        tokio::task::yield_now().await;
        quota.set_limits(Limits { each: 1, all: 0 });
        drop(own);
        quota.set_limits(Limits { each: 1, all: 100 });
        drop(other);
        let soon = std::time::Duration::from_secs(1);
        let served =
            tokio::time::timeout(soon, waiting).await.expect("no permit of its uid is left to wake it");
        served.unwrap().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_bounded_number_waits_and_none_if_the_limit_is_zero() {
        let none = quota(0, 100);
        assert!(none.acquire_in_turn(7).await.is_err());

        let quota = quota(1, 1000);
        let uids = u32::try_from(WAITING_OF_ALL / WAITING).unwrap() + 1;
        let _held: Vec<_> = (1..=uids).map(|uid| quota.acquire(uid).unwrap()).collect();
        let mut waiting = tokio::task::JoinSet::new();
        for uid in 1..uids {
            for _ in 0..WAITING {
                let quota = quota.clone();
                waiting.spawn(async move { quota.acquire_in_turn(uid).await });
            }
        }
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        assert_eq!(waiting.len(), WAITING_OF_ALL);
        let soon = std::time::Duration::from_secs(1);
        let refused = tokio::time::timeout(soon, quota.acquire_in_turn(uids)).await;
        assert!(refused.expect("it must not wait").is_err());
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_permit_wakes_a_task_that_waits_for_none() {
        let quota = quota(2, 100);
        let (first, last) = (quota.acquire(7).unwrap(), quota.acquire(8).unwrap());
        assert!(!quota.is_empty());
        let ended = tokio::spawn({
            let quota = quota.clone();
            async move { quota.empty().await }
        });
        drop(first);
        tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        assert!(!ended.is_finished());
        drop(last);
        ended.await.unwrap();
    }
}
