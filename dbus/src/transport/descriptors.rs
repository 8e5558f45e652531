//! Descriptors of callers.
//!
//! A close can block without a limit: the kernel flushes the file, and a FUSE file system of a user need
//! not answer. So the thread that serves the bus never closes one. The library receives the end of a pipe
//! in place of each descriptor. A method claims the descriptor with that placeholder.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use loopd_common::{CallerFile, Closer};
use rustix::pipe::{PipeFlags, pipe_with};

/// The descriptors of calls in progress that no method has claimed yet. Clones share the state.
#[derive(Clone, Debug, Default)]
pub struct Descriptors {
    closer: Closer,
    unclaimed: Arc<Mutex<HashMap<u64, CallerFile>>>,
}

impl Descriptors {
    fn unclaimed(&self) -> MutexGuard<'_, HashMap<u64, CallerFile>> {
        self.unclaimed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the descriptor for this placeholder. Each can be claimed once.
    #[must_use]
    pub fn claim(&self, placeholder: impl AsFd) -> Option<CallerFile> {
        let key = key(placeholder.as_fd()).ok()?;
        self.unclaimed().remove(&key)
    }

    pub(super) fn closer(&self) -> &Closer {
        &self.closer
    }

    /// Stores descriptors; returns their placeholders and the keys of these.
    pub(super) fn keep(&self, files: Vec<CallerFile>) -> std::io::Result<(Vec<OwnedFd>, Vec<u64>)> {
        let mut placeholders = Vec::with_capacity(files.len());
        let mut keys = Vec::with_capacity(files.len());
        for _ in &files {
            let (placeholder, _) = pipe_with(PipeFlags::CLOEXEC)?;
            keys.push(key(placeholder.as_fd())?);
            placeholders.push(placeholder);
        }
        self.unclaimed().extend(keys.iter().copied().zip(files));
        Ok((placeholders, keys))
    }

    /// Drops those that were not claimed.
    pub(super) fn release(&self, keys: &[u64]) {
        let mut unclaimed = self.unclaimed();
        let released: Vec<_> = keys.iter().filter_map(|key| unclaimed.remove(key)).collect();
        drop(unclaimed);
        drop(released);
    }
}

/// A pipe is identified by its inode.
fn key(pipe: BorrowedFd<'_>) -> std::io::Result<u64> {
    Ok(rustix::fs::fstat(pipe)?.st_ino)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    #[test]
    fn a_placeholder_claims_its_descriptor_once() {
        let descriptors = Descriptors::default();
        let files: Vec<_> = (0..3).map(|_| descriptors.closer().adopt(7, file())).collect();
        let (placeholders, keys) = descriptors.keep(files).unwrap();
        let again = placeholders[1].try_clone().unwrap();
        assert!(descriptors.claim(&again).is_some());
        assert!(descriptors.claim(&placeholders[1]).is_none());
        assert!(descriptors.claim(file()).is_none());
        descriptors.release(&keys);
        assert!(descriptors.claim(&placeholders[0]).is_none());
    }
}
