//! Limits how fast the devices of one uid follow each other. udev processes the devices and partitions of all
//! users one after the other, so those of one user cost the others time.

use std::time::Duration;

use loopd_common::Pace;
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

use crate::error::Error;
use crate::keyed_mutex::KeyedMutex;
use crate::ownership::is_root;

/// How many devices and partitions of a uid may be made in a second, and how many at once after a rest: an image
/// with the most partitions that a device can have.
const PER_SECOND: u32 = 100;
const AT_ONCE: u32 = 256;
/// How long to wait for earlier ones; below the 25 s of a D-Bus call.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// How long to wait for an attach whose partitions are not known yet. An attach that takes longer hangs.
const HUNG_AFTER: Duration = Duration::from_millis(200);

/// Spaces out the devices and partitions of each uid other than root.
#[derive(Debug)]
pub(super) struct Pacing {
    pace: Pace,
    /// One attach of each uid at a time, from its wait until the number of its partitions is known. Otherwise several
    /// images with many partitions would be attached at once.
    queues: KeyedMutex<u32>,
}

impl Default for Pacing {
    fn default() -> Self {
        Self { pace: Pace::new(PER_SECOND, AT_ONCE), queues: KeyedMutex::default() }
    }
}

impl Pacing {
    /// Makes devices for this uid, one attach at a time, and counts them; `count` gets `None` if they were not made.
    ///
    /// # Errors
    /// `LimitExceeded` if too many were made shortly before; those of `make`.
    pub async fn make<T>(
        &self,
        uid: u32,
        make: impl Future<Output = Result<T, Error>>,
        count: impl FnOnce(Option<&T>) -> usize,
    ) -> Result<T, Error> {
        if is_root(uid) {
            return make.await;
        }
        let alone = tokio::time::timeout(LONGEST_WAIT, self.wait(uid))
            .await
            .map_err(|_| Error::TooFast { uid, per_second: PER_SECOND })?;
        let mut alone = Some(alone);
        tokio::pin!(make);
        let made = loop {
            tokio::select! {
                biased;
                made = &mut make => break made,
                () = tokio::time::sleep(HUNG_AFTER), if alone.is_some() => alone = None,
            }
        };
        let count = u32::try_from(count(made.as_ref().ok())).unwrap_or(u32::MAX);
        let _later_ones_wait = self.pace.book(Instant::now().into_std(), uid, count);
        made
    }

    async fn wait(&self, uid: u32) -> OwnedMutexGuard<()> {
        let alone = self.queues.lock(uid).await;
        let now = Instant::now().into_std();
        let begin = self.pace.book(now, uid, 0);
        if begin > now {
            tokio::time::sleep_until(begin.into()).await;
        }
        alone
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    async fn make(pacing: &Pacing, uid: u32, partitions: usize) -> Result<(), Error> {
        pacing.make(uid, async { Ok(()) }, |_| 1 + partitions).await
    }

    #[tokio::test(start_paused = true)]
    async fn many_partitions_are_spaced_out_and_delay_no_other_user() {
        let (pacing, start) = (Arc::new(Pacing::default()), Instant::now());
        let mut others = tokio::task::JoinSet::new();
        for _ in 0..4 {
            let pacing = Arc::clone(&pacing);
            others.spawn(async move { make(&pacing, 1000, 255).await });
        }
        for _ in 0..20 {
            make(&pacing, 1001, 2).await.unwrap();
            make(&pacing, 0, 255).await.unwrap();
        }
        assert_eq!(start.elapsed(), Duration::ZERO);
        assert!(others.join_all().await.into_iter().all(|made| made.is_ok()));
        assert!(start.elapsed() > Duration::from_secs(5), "{:?}", start.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_user_with_far_too_many_devices_is_refused() {
        let pacing = Arc::new(Pacing::default());
        let mut attaches = tokio::task::JoinSet::new();
        for _ in 0..20 {
            let pacing = Arc::clone(&pacing);
            attaches.spawn(async move { make(&pacing, 1000, 255).await });
        }
        let refused: Vec<Error> = attaches.join_all().await.into_iter().filter_map(Result::err).collect();
        assert!((10..19).contains(&refused.len()), "{}", refused.len());
        assert!(refused.iter().all(|error| matches!(error, Error::TooFast { uid: 1000, .. })));
    }

    #[tokio::test(start_paused = true)]
    async fn an_attach_that_hangs_delays_others_of_its_user_for_a_moment_only() {
        let (pacing, start) = (Arc::new(Pacing::default()), Instant::now());
        for _ in 0..5 {
            let pacing = Arc::clone(&pacing);
            tokio::spawn(
                async move { pacing.make(1000, std::future::pending::<Result<(), _>>(), |_| 1).await },
            );
        }
        tokio::task::yield_now().await;
        make(&pacing, 1001, 2).await.unwrap();
        assert_eq!(start.elapsed(), Duration::ZERO);
        make(&pacing, 1000, 2).await.unwrap();
        assert!(start.elapsed() <= 6 * HUNG_AFTER, "{:?}", start.elapsed());
    }
}
