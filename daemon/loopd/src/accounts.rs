//! Which uids are users of this machine, by the user database.
//!
//! The limits are for each uid. A user owns 65,536 subordinate uids (`subuid(5)`), and polkit judges
//! processes of theirs by the session of that user.

use std::sync::Arc;
use std::time::Duration;

use loopd_dbus::{Error, ErrorKind};
use nix::unistd::{Uid, User};
use tokio::sync::Semaphore;

use loopd_engine::KeyedMutex;

/// How many uids are looked up at the same time: each takes a thread, and the database may hang.
const AT_ONCE: usize = 16;
/// How long a lookup may take.
const PATIENCE: Duration = Duration::from_secs(5);

type Lookup = fn(u32) -> Result<bool, String>;

/// The user database.
#[derive(Debug)]
pub struct Accounts {
    lookup: Lookup,
    /// One lookup of a uid at a time, for as long as it takes.
    alone: KeyedMutex<u32>,
    threads: Arc<Semaphore>,
    patience: Duration,
}

impl Default for Accounts {
    fn default() -> Self {
        let lookup = |uid| {
            User::from_uid(Uid::from_raw(uid)).map(|user| user.is_some()).map_err(|errno| errno.to_string())
        };
        Self::with(lookup, PATIENCE)
    }
}

impl Accounts {
    fn with(lookup: Lookup, patience: Duration) -> Self {
        Self { lookup, alone: KeyedMutex::default(), threads: Arc::new(Semaphore::new(AT_ONCE)), patience }
    }

    /// Refuses a uid that is no user's. Root is one without a look.
    ///
    /// # Errors
    /// `AccessDenied`; `Timeout` where the database does not answer.
    pub async fn require(&self, uid: u32) -> Result<(), Error> {
        if uid == 0 {
            return Ok(());
        }
        match tokio::time::timeout(self.patience, self.look_up(uid)).await {
            Ok(Ok(true)) => Ok(()),
            Ok(Ok(false)) => Err(Error::new(
                ErrorKind::AccessDenied,
                format!(
                    "uid {uid} is no user of this machine: the user database (getent passwd {uid}) does not know it; \
                     call as a user who is in it"
                ),
            )),
            Ok(Err(why)) => Err(Error::new(
                ErrorKind::AccessDenied,
                format!("cannot tell whether uid {uid} is a user of this machine: {why}"),
            )),
            Err(_) => Err(Error::new(
                ErrorKind::Timeout,
                format!(
                    "cannot tell whether uid {uid} is a user of this machine: the user database does not answer; \
                     try again when it does"
                ),
            )),
        }
    }

    async fn look_up(&self, uid: u32) -> Result<bool, String> {
        let alone = self.alone.lock(uid).await;
        let thread = Arc::clone(&self.threads).acquire_owned().await;
        let lookup = self.lookup;
        let found = tokio::task::spawn_blocking(move || {
            // SavedAttachment until the database has answered, whoever waits for that.
            let _kept = (alone, thread);
            lookup(uid)
        });
        found.await.unwrap_or_else(|_| Err("a worker thread of loopd failed".to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[tokio::test]
    async fn uids_that_are_no_users_are_refused() {
        let accounts = Accounts::default();
        accounts.require(0).await.unwrap();
        accounts.require(nix::unistd::geteuid().as_raw()).await.unwrap();
        let refused = accounts.require(3_999_999_999).await.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::AccessDenied);
        assert!(refused.message.contains("getent passwd 3999999999"), "{refused}");
    }

    #[tokio::test]
    async fn a_lookup_that_fails_is_a_refusal() {
        let accounts = Accounts::with(|_| Err("EIO".to_owned()), PATIENCE);
        let refused = accounts.require(7).await.unwrap_err();
        assert_eq!(refused.kind, ErrorKind::AccessDenied);
        accounts.require(0).await.unwrap();
    }

    #[tokio::test]
    async fn a_database_that_hangs_is_a_refusal_and_takes_few_threads() {
        static BEGUN: AtomicUsize = AtomicUsize::new(0);
        let lookup = |_| {
            BEGUN.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_secs(2));
            Ok(true)
        };
        let accounts = Arc::new(Accounts::with(lookup, Duration::from_millis(100)));
        let mut calls = tokio::task::JoinSet::new();
        for call in 0..200 {
            let accounts = Arc::clone(&accounts);
            calls.spawn(async move { accounts.require(1 + call % 50).await });
        }
        for refused in calls.join_all().await {
            assert_eq!(refused.unwrap_err().kind, ErrorKind::Timeout);
        }
        let begun = BEGUN.load(Ordering::Relaxed);
        assert!((1..=AT_ONCE).contains(&begun), "{begun} lookups");
    }
}
