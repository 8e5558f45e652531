//! Holds that are to be closed, for the threads that close them.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, Once, PoisonError};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::time::Instant;

use crate::device::DiskSequence;

/// How long closed holds are collected before the engine is woken.
const COLLECTED_FOR: Duration = Duration::from_millis(5);

/// A hold that is to be closed.
pub struct QueuedHold<H> {
    /// The attachment.
    pub id: DiskSequence,
    /// Its device.
    pub number: u32,
    /// The disk sequence that the device has now.
    pub disk_sequence: DiskSequence,
    /// The hold.
    pub hold: H,
}

/// Holds that are to be closed, each of them by one of several threads, since one may hang.
pub struct ReleaseQueue<H> {
    state: Mutex<State<H>>,
    prepared: Once,
    reported: Notify,
}

struct State<H> {
    waiting: VecDeque<QueuedHold<H>>,
    /// The attachments whose holds were closed, and whether the kernel has detached them.
    closed: Vec<(DiskSequence, bool)>,
    woken: Instant,
}

impl<H> ReleaseQueue<H> {
    pub(super) fn new(holds: impl IntoIterator<Item = QueuedHold<H>>) -> Self {
        let waiting = holds.into_iter().collect();
        let state = State { waiting, closed: Vec::new(), woken: Instant::now() };
        Self { state: Mutex::new(state), prepared: Once::new(), reported: Notify::new() }
    }

    fn state(&self) -> MutexGuard<'_, State<H>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Calls `prepare` with something of each hold, once for the queue; the other threads wait for that.
    pub fn prepare<T>(&self, of: impl Fn(&H) -> T, prepare: impl FnOnce(Vec<T>)) {
        self.prepared.call_once(|| {
            let all = self.state().waiting.iter().map(|queued| of(&queued.hold)).collect();
            prepare(all);
        });
    }

    /// Takes the next hold; `None` at the end.
    pub fn next(&self) -> Option<QueuedHold<H>> {
        self.state().waiting.pop_front()
    }

    /// Reports that the hold of an attachment was closed, and whether the kernel has detached the device.
    pub fn report(&self, id: DiskSequence, detached: bool) {
        let mut state = self.state();
        state.closed.push((id, detached));
        // Not for each of them: a wake-up takes as long as a close. As long as holds wait, the engine has a timer.
        if state.waiting.is_empty() || state.woken.elapsed() >= COLLECTED_FOR {
            state.woken = Instant::now();
            self.reported.notify_one();
        }
    }

    /// Waits for a report.
    pub(super) async fn reported(&self) {
        self.reported.notified().await;
    }

    /// The reports since the last call.
    pub(super) fn take_closed(&self) -> Vec<(DiskSequence, bool)> {
        std::mem::take(&mut self.state().closed)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.state().waiting.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(numbers: std::ops::Range<u32>) -> ReleaseQueue<u32> {
        let id = |number| DiskSequence(u64::from(number));
        ReleaseQueue::new(numbers.map(|number| QueuedHold {
            id: id(number),
            number,
            disk_sequence: id(number),
            hold: number,
        }))
    }

    #[test]
    fn each_hold_is_taken_once_and_prepared_once() {
        let queue = queue(0..100);
        let prepared = Mutex::new(Vec::new());
        let taken = Mutex::new(Vec::new());
        let close = || {
            queue.prepare(|hold| *hold, |all| prepared.lock().unwrap().extend(all));
            while let Some(QueuedHold { hold, .. }) = queue.next() {
                taken.lock().unwrap().push(hold);
            }
        };
        std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(close))));
        let mut taken = taken.into_inner().unwrap();
        taken.sort_unstable();
        let all: Vec<u32> = (0..100).collect();
        assert_eq!((taken, prepared.into_inner().unwrap()), (all.clone(), all));
        assert!(queue.is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn the_last_reports_wake_the_engine_at_once() {
        let queue = queue(0..3);
        let first = queue.next().unwrap();
        queue.report(first.id, true);
        let woken = tokio::time::timeout(Duration::from_millis(1), queue.reported()).await;
        assert!(woken.is_err(), "it is collected with the next ones");
        while let Some(next) = queue.next() {
            queue.report(next.id, false);
        }
        queue.reported().await;
        let id = DiskSequence;
        assert_eq!(queue.take_closed(), [(id(0), true), (id(1), false), (id(2), false)]);
        assert_eq!(queue.take_closed(), []);
    }
}
