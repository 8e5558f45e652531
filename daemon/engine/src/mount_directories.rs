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
    pub(super) mount_directories: Mutex<BTreeMap<PathBuf, HeldDirectory>>,
    /// Locked by the task that removes unused directories, so that others can wait until it has done so.
    pub(super) clearing: tokio::sync::Mutex<()>,
}

pub(super) struct HeldDirectory {
    pub(super) directory: MountDirectory,
    /// Counts against the user's limit.
    pub(super) permit: Option<Permit>,
}

impl MountDirectories {
    pub(super) fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, HeldDirectory>> {
        self.mount_directories.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a directory; false if the path is held already.
    pub(super) fn hold(&self, directory: MountDirectory, permit: Option<Permit>) -> bool {
        match self.lock().entry(directory.path.clone()) {
            Entry::Occupied(_) => false,
            Entry::Vacant(free) => {
                free.insert(HeldDirectory { directory, permit });
                true
            }
        }
    }
}
