//! Descriptors of callers.
//!
//! To close one can take as long as its file system likes: the kernel flushes the file, and the user
//! that made a FUSE file system need not answer. So none is ever closed by the thread that serves the
//! bus. The library gets the end of a pipe in the place of each, and a handler claims the descriptor
//! itself with that.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use loopd_common::{CallerFile, Closer};
use rustix::pipe::{PipeFlags, pipe_with};

/// The descriptors of the calls under way that no handler has claimed yet; clones are the same ones.
#[derive(Clone, Debug, Default)]
pub struct Descriptors {
    closer: Closer,
    unclaimed: Arc<Mutex<HashMap<u64, CallerFile>>>,
}

impl Descriptors {
    fn unclaimed(&self) -> MutexGuard<'_, HashMap<u64, CallerFile>> {
        self.unclaimed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The descriptor that this one stands for. Each can be claimed once.
    #[must_use]
    pub fn claim(&self, placeholder: impl AsFd) -> Option<CallerFile> {
        let key = key(placeholder.as_fd()).ok()?;
        self.unclaimed().remove(&key)
    }

    pub(super) fn closer(&self) -> &Closer {
        &self.closer
    }

    /// Keeps descriptors to be claimed; gives their placeholders and the keys of those.
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

    /// Forgets those that were not claimed.
    pub(super) fn release(&self, keys: &[u64]) {
        let mut unclaimed = self.unclaimed();
        let released: Vec<_> = keys.iter().filter_map(|key| unclaimed.remove(key)).collect();
        drop(unclaimed);
        drop(released);
    }
}

/// What tells pipes apart: their inode.
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
