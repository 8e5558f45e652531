//! How fast the devices of one uid follow each other. udev processes each device and each partition, those
//! of all users one after the other, so that what one user has made costs the others time.

use std::time::Duration;

use loopd_common::{Error, ErrorKind, Pace};
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;

use crate::keyed_mutex::KeyedMutex;
use crate::ownership::is_root;

/// How many devices and partitions of a uid are made a second, and how many at once after a rest: an image
/// with as many partitions as there can be.
const A_SECOND: u32 = 100;
const AT_ONCE: u32 = 256;
/// How long to wait for earlier ones; below the 25 s of a D-Bus call.
const LONGEST_WAIT: Duration = Duration::from_secs(10);
/// How long to wait for an attach whose partitions are not known yet. One that takes longer hangs.
const HUNG_AFTER: Duration = Duration::from_millis(200);

/// Spaces out the devices and partitions of each uid other than root.
#[derive(Debug)]
pub(super) struct Pacing {
    pace: Pace,
    /// One at a time for each uid, from the wait until it is known how many partitions there are: else
    /// several images with many partitions would begin at once.
    turns: KeyedMutex<u32>,
}

impl Default for Pacing {
    fn default() -> Self {
        Self { pace: Pace::new(A_SECOND, AT_ONCE), turns: KeyedMutex::default() }
    }
}

impl Pacing {
    /// Makes devices for this uid in its turn, and counts them; `count` gets nothing where they were not made.
    ///
    /// # Errors
    /// `LimitExceeded` where too many were made shortly before; those of `make`.
    pub async fn make<T>(
        &self,
        uid: u32,
        make: impl Future<Output = Result<T, Error>>,
        count: impl FnOnce(Option<&T>) -> usize,
    ) -> Result<T, Error> {
        if is_root(uid) {
            return make.await;
        }
        let turn = tokio::time::timeout(LONGEST_WAIT, self.wait(uid)).await.map_err(|_| too_fast(uid))?;
        let mut turn = Some(turn);
        tokio::pin!(make);
        let made = loop {
            tokio::select! {
                biased;
                made = &mut make => break made,
                () = tokio::time::sleep(HUNG_AFTER), if turn.is_some() => turn = None,
            }
        };
        let count = u32::try_from(count(made.as_ref().ok())).unwrap_or(u32::MAX);
        let _later_ones_wait = self.pace.book(Instant::now().into_std(), uid, count);
        made
    }

    async fn wait(&self, uid: u32) -> OwnedMutexGuard<()> {
        let turn = self.turns.lock(uid).await;
        let now = Instant::now().into_std();
        let begin = self.pace.book(now, uid, 0);
        if begin > now {
            tokio::time::sleep_until(begin.into()).await;
        }
        turn
    }
}

fn too_fast(uid: u32) -> Error {
    let message = format!(
        "uid {uid} has had many devices and partitions made in a short time, of which there may be {A_SECOND} a \
         second; try again in some seconds, or attach without partitions (loopctl attach --no-partitions)"
    );
    Error::new(ErrorKind::LimitExceeded, message)
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;

    async fn make(pacing: &Pacing, uid: u32, partitions: usize) -> Result<(), Error> {
        pacing.make(uid, async { Ok(()) }, |_| 1 + partitions).await
    }

    #[tokio::test(start_paused = true)]
    async fn many_partitions_are_spaced_out_and_hold_up_nobody_else() {
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
    async fn who_makes_far_too_many_is_refused() {
        let pacing = Arc::new(Pacing::default());
        let mut attaches = tokio::task::JoinSet::new();
        for _ in 0..20 {
            let pacing = Arc::clone(&pacing);
            attaches.spawn(async move { make(&pacing, 1000, 255).await });
        }
        let refused: Vec<Error> = attaches.join_all().await.into_iter().filter_map(Result::err).collect();
        assert!((10..19).contains(&refused.len()), "{}", refused.len());
        assert!(refused.iter().all(|error| error.kind == ErrorKind::LimitExceeded));
    }

    #[tokio::test(start_paused = true)]
    async fn an_attach_that_hangs_holds_up_others_of_its_user_for_a_moment_alone() {
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
