//! The mount directories that exist now.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::quota::Permit;
use crate::saved::MountDirectory;

/// The mount directories that exist now.
#[derive(Default)]
pub(super) struct MountDirectories {
    by_path: Mutex<BTreeMap<PathBuf, KnownDirectory>>,
    /// Locked by the task that removes unused directories, so that others can wait until it has done so.
    pub(super) clearing: tokio::sync::Mutex<()>,
}

pub(super) struct KnownDirectory {
    pub(super) directory: MountDirectory,
    /// Counts against the user's limit.
    pub(super) permit: Option<Permit>,
}

impl MountDirectories {
    pub(super) fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, KnownDirectory>> {
        self.by_path.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a directory; false if there is one with this path.
    pub(super) fn add(&self, directory: MountDirectory, permit: Option<Permit>) -> bool {
        match self.lock().entry(directory.path.clone()) {
            Entry::Occupied(_) => false,
            Entry::Vacant(free) => {
                free.insert(KnownDirectory { directory, permit });
                true
            }
        }
    }
}
