//! Open files of callers.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::ops::Deref;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// How many descriptors of one uid loopd keeps at once, open or being closed.
const MOST_OF_A_UID: usize = 512;
/// How many threads may close descriptors of one uid. A close that hangs occupies one.
const MOST_THREADS_OF_A_UID: usize = 8;
/// How many threads may close descriptors of all users except root.
const MOST_THREADS: usize = 256;
/// How long a thread waits for more work.
const KEEP_ALIVE: Duration = Duration::from_secs(1);
const STACK: usize = 64 * 1024;

/// An open file of a caller. Dropping the last clone closes it in another thread, since a close can hang.
#[derive(Clone)]
pub struct CallerFile(Arc<Owned>);

struct Owned {
    /// `Some` until it is dropped.
    descriptor: Option<OwnedFd>,
    uid: u32,
    closer: Closer,
}

impl Drop for Owned {
    fn drop(&mut self) {
        if let Some(descriptor) = self.descriptor.take() {
            self.closer.close(self.uid, descriptor);
        }
    }
}

impl Deref for CallerFile {
    type Target = OwnedFd;

    fn deref(&self) -> &OwnedFd {
        self.0.descriptor.as_ref().expect("present until it is dropped")
    }
}

impl AsFd for CallerFile {
    fn as_fd(&self) -> BorrowedFd<'_> {
        (**self).as_fd()
    }
}

impl fmt::Debug for CallerFile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CallerFile")
            .field("descriptor", &self.0.descriptor)
            .field("uid", &self.0.uid)
            .finish()
    }
}

/// Closes descriptors in its own threads.
#[derive(Clone, Default)]
pub struct Closer(Arc<Closing>);

#[derive(Default)]
struct Closing {
    state: Mutex<State>,
    work: Condvar,
}

#[derive(Default)]
struct State {
    queue: VecDeque<(u32, OwnedFd)>,
    users: HashMap<u32, Count>,
    threads: usize,
    idle: usize,
}

#[derive(Clone, Copy, Default)]
struct Count {
    /// Open, waiting to be closed, or being closed.
    held: usize,
    /// Being closed.
    closing: usize,
}

impl State {
    /// The first descriptor that a thread may close.
    fn take(&mut self) -> Option<(u32, OwnedFd)> {
        let may_close = |(uid, _): &(u32, OwnedFd)| {
            self.users.get(uid).is_none_or(|count| count.closing < MOST_THREADS_OF_A_UID)
        };
        let taken = self.queue.iter().position(may_close)?;
        let (uid, descriptor) = self.queue.remove(taken)?;
        self.users.entry(uid).or_default().closing += 1;
        Some((uid, descriptor))
    }

    fn closed(&mut self, uid: u32) {
        if let Some(count) = self.users.get_mut(&uid) {
            count.closing -= 1;
            count.held -= 1;
            if count.held == 0 {
                self.users.remove(&uid);
            }
        }
    }
}

impl Closer {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The reason why this uid may not pass descriptors now.
    pub fn refusal(&self, uid: u32, wanted: usize) -> Option<String> {
        let count = self.state().users.get(&uid).copied().unwrap_or_default();
        let is_hanging = count.closing >= MOST_THREADS_OF_A_UID;
        let advice = if is_hanging {
            "the file system of some does not answer when they are closed"
        } else {
            "wait for calls in progress"
        };
        (count.held + wanted > MOST_OF_A_UID).then(|| {
            format!("limit of {MOST_OF_A_UID} open files that uid {uid} handed over reached: {advice}")
        })
    }

    /// Takes ownership of a descriptor of this uid.
    pub fn adopt(&self, uid: u32, descriptor: OwnedFd) -> CallerFile {
        self.state().users.entry(uid).or_default().held += 1;
        CallerFile(Arc::new(Owned { descriptor: Some(descriptor), uid, closer: self.clone() }))
    }

    fn close(&self, uid: u32, descriptor: OwnedFd) {
        let mut state = self.state();
        state.queue.push_back((uid, descriptor));
        if state.idle >= state.queue.len() {
            self.0.work.notify_one();
        } else if state.threads < MOST_THREADS || uid == 0 {
            let closer = self.clone();
            let thread = std::thread::Builder::new().name("close".to_owned()).stack_size(STACK);
            // If no thread can be started, the next free one closes it.
            if thread.spawn(move || closer.work()).is_ok() {
                state.threads += 1;
            }
        }
    }

    fn work(&self) {
        let mut state = self.state();
        let mut has_waited = false;
        loop {
            if let Some((uid, descriptor)) = state.take() {
                drop(state);
                drop(descriptor);
                state = self.state();
                state.closed(uid);
                has_waited = false;
                continue;
            }
            // Only now: a descriptor may have arrived between the end of the wait and the lock.
            if has_waited {
                state.threads -= 1;
                return;
            }
            state.idle += 1;
            let (again, waited) =
                self.0.work.wait_timeout(state, KEEP_ALIVE).unwrap_or_else(PoisonError::into_inner);
            state = again;
            state.idle -= 1;
            has_waited = waited.timed_out();
        }
    }
}

impl fmt::Debug for Closer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Closer").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    fn settled(closer: &Closer) {
        for _ in 0..200 {
            if closer.state().users.is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("still open after two seconds");
    }

    #[test]
    fn descriptors_of_a_uid_are_limited() {
        let closer = Closer::default();
        let files: Vec<_> = (0..MOST_OF_A_UID).map(|_| closer.adopt(7, file())).collect();
        assert!(closer.refusal(7, 1).unwrap().contains("uid 7"));
        assert!(closer.refusal(8, 1).is_none());
        drop(files);
        settled(&closer);
        assert!(closer.refusal(7, 1).is_none());
    }

    #[test]
    fn a_descriptor_that_arrives_at_the_end_of_a_wait_is_closed() {
        let closer = Closer::default();
        drop(closer.adopt(7, file()));
        settled(&closer);
        // The thread waits. Its wait ends while the lock is held.
        let mut state = closer.state();
        std::thread::sleep(KEEP_ALIVE + Duration::from_millis(100));
        assert_eq!(state.idle, 1);
        state.users.entry(7).or_default().held += 1;
        state.queue.push_back((7, file()));
        drop(state);
        settled(&closer);
    }

    #[test]
    fn a_uid_whose_files_hang_leaves_threads_to_others() {
        let mut state = State::default();
        for uid in [7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8] {
            state.queue.push_back((uid, file()));
        }
        let taken: Vec<_> = std::iter::from_fn(|| state.take()).map(|(uid, _)| uid).collect();
        assert_eq!(taken, [7, 7, 7, 7, 7, 7, 7, 7, 8]);
        state.users.entry(7).or_default().held += 1;
        state.closed(7);
        assert_eq!(state.take().map(|(uid, _)| uid), Some(7));
    }
}
