//! Which uids are in the user database.
//!
//! Limits apply to each uid, and each user has 65,536 subordinate uids (`subuid(5)`), whose processes polkit
//! authorizes by the user's session. So uids that are not in the database are refused.

use std::sync::Arc;
use std::time::Duration;

use loopd_dbus::{Error, ErrorKind};
use nix::unistd::{Uid, User};
use tokio::sync::Semaphore;

use loopd_engine::{KeyedMutex, is_root};

/// The limit of concurrent lookups: each takes a thread, and the database may hang.
const MAX_LOOKUPS: usize = 16;
/// How long a lookup may take.
const TIMEOUT: Duration = Duration::from_secs(5);

type Lookup = fn(u32) -> Result<bool, String>;

/// The user database.
#[derive(Debug)]
pub struct Accounts {
    lookup: Lookup,
    /// Held during a lookup: one at a time for each uid.
    lookups: KeyedMutex<u32>,
    threads: Arc<Semaphore>,
    timeout: Duration,
}

impl Default for Accounts {
    fn default() -> Self {
        let lookup = |uid| {
            User::from_uid(Uid::from_raw(uid)).map(|user| user.is_some()).map_err(|errno| errno.to_string())
        };
        Self::with(lookup, TIMEOUT)
    }
}

impl Accounts {
    fn with(lookup: Lookup, timeout: Duration) -> Self {
        Self {
            lookup,
            lookups: KeyedMutex::default(),
            threads: Arc::new(Semaphore::new(MAX_LOOKUPS)),
            timeout,
        }
    }

    /// Checks that a uid is in the user database. Root always is.
    ///
    /// # Errors
    /// `AccessDenied`; `Timeout` if the database does not answer.
    pub async fn require(&self, uid: u32) -> Result<(), Error> {
        if is_root(uid) {
            return Ok(());
        }
        match tokio::time::timeout(self.timeout, self.look_up(uid)).await {
            Ok(Ok(true)) => Ok(()),
            Ok(Ok(false)) => Err(Error::new(
                ErrorKind::AccessDenied,
                format!(
                    "uid {uid} is not in the user database (getent passwd {uid}); call as a user who is in it"
                ),
            )),
            Ok(Err(reason)) => Err(Error::new(
                ErrorKind::AccessDenied,
                format!("cannot look up uid {uid} in the user database: {reason}"),
            )),
            Err(_) => Err(Error::new(
                ErrorKind::Timeout,
                format!(
                    "cannot look up uid {uid}: the user database does not answer; try again when it does"
                ),
            )),
        }
    }

    async fn look_up(&self, uid: u32) -> Result<bool, String> {
        let lookup_lock = self.lookups.lock(uid).await;
        let permit = Arc::clone(&self.threads).acquire_owned().await;
        let lookup = self.lookup;
        let found = tokio::task::spawn_blocking(move || {
            // Held until the database answers, even if the call has ended.
            let _held = (lookup_lock, permit);
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
    async fn uids_outside_the_user_database_are_refused() {
        let accounts = Accounts::default();
        accounts.require(0).await.unwrap();
        accounts.require(nix::unistd::geteuid().as_raw()).await.unwrap();
        let error = accounts.require(3_999_999_999).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::AccessDenied);
        assert!(error.message.contains("getent passwd 3999999999"), "{error}");
    }

    #[tokio::test]
    async fn a_failed_lookup_refuses_the_uid() {
        let accounts = Accounts::with(|_| Err("EIO".to_owned()), TIMEOUT);
        let error = accounts.require(7).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::AccessDenied);
        accounts.require(0).await.unwrap();
    }

    #[tokio::test]
    async fn a_hanging_database_refuses_uids_and_takes_few_threads() {
        static STARTED: AtomicUsize = AtomicUsize::new(0);
        let lookup = |_| {
            STARTED.fetch_add(1, Ordering::Relaxed);
            std::thread::sleep(Duration::from_secs(2));
            Ok(true)
        };
        let accounts = Arc::new(Accounts::with(lookup, Duration::from_millis(100)));
        let mut calls = tokio::task::JoinSet::new();
        for call in 0..200 {
            let accounts = Arc::clone(&accounts);
            calls.spawn(async move { accounts.require(1 + call % 50).await });
        }
        for result in calls.join_all().await {
            assert_eq!(result.unwrap_err().kind, ErrorKind::Timeout);
        }
        let started = STARTED.load(Ordering::Relaxed);
        assert!((1..=MAX_LOOKUPS).contains(&started), "{started} lookups");
    }
}
