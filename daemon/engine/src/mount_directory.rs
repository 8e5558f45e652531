//! Mount directories: made for a mount, and removed when nothing is mounted on them any more.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tracing::{info, warn};

use crate::engine::Engine;
use crate::error::Error;
use crate::kernel::Kernel;
use crate::mounter::Account;
use crate::saved::MountDirectory;

/// How many directories of one name are tried: more than a user can have mounted.
const MOST_OF_A_NAME: u32 = 1000;

/// How long each step of undoing a mount may take: the caller waits for it.
const UNDO: Duration = Duration::from_secs(5);

impl<K: Kernel> Engine<K> {
    /// Makes a directory with this name, or with the first number after it that is free.
    pub(super) async fn create_mount_directory(
        &self,
        account: &Account,
        name: &str,
    ) -> Result<PathBuf, Error> {
        let permit = self.mount_quota.acquire(account.uid)?;
        for number in 0..MOST_OF_A_NAME {
            let name = if number == 0 { name.to_owned() } else { format!("{name}{number}") };
            let path = self.mounter.path(account, &name);
            if self
                .try_create(MountDirectory { path: path.clone(), uid: account.uid, announced: false })
                .await?
            {
                if let Some(known) = self.mount_directories.lock().get_mut(&path) {
                    known.permit = Some(permit);
                }
                return Ok(path);
            }
        }
        Err(Error::NoMountDirectory { user: account.name.clone(), name: name.to_owned() })
    }

    async fn try_create(&self, directory: MountDirectory) -> Result<bool, Error> {
        if !self.mount_directories.add(directory.clone(), None) {
            return Ok(false);
        }
        // The next daemon undoes each directory that is saved as not announced, so one of another program is not saved.
        if self.mounter.is_there(directory.path.clone()).await {
            self.mount_directories.lock().remove(&directory.path);
            return Ok(false);
        }
        // Saved before it is made: the daemon may die in between.
        let made = match self.state_writer.write_mount_directory(&directory) {
            Ok(()) => self.mounter.make(directory.path.clone(), directory.uid).await,
            Err(error) => Err(error),
        };
        if !matches!(made, Ok(true)) {
            self.forget_mount_directory(&directory.path);
        }
        made
    }

    fn forget_mount_directory(&self, path: &Path) {
        self.state_writer.erase_mount_directory(path);
        self.mount_directories.lock().remove(path);
    }

    /// Saves that the directory is about to be returned to a caller.
    pub(super) fn announce_mount_directory(&self, path: &Path) -> Result<(), Error> {
        let directory = self.mount_directories.lock().get_mut(path).map(|known| {
            known.directory.announced = true;
            known.directory.clone()
        });
        directory.map_or(Ok(()), |directory| self.state_writer.write_mount_directory(&directory))
    }

    /// Undoes a mount, and removes its directory.
    pub(super) async fn undo_mount(&self, path: &Path) {
        self.mounter.undo(path.to_owned(), UNDO.min(self.settings().wait_for_mount)).await;
        if self.kernel.mounts().map_or(true, |table| table.has(path)) {
            return self.keep_mounted_directory(path);
        }
        self.remove_mount_directory(path).await;
    }

    /// Keeps the directory of a mount that could not be undone: its user may unmount it, and then the directory goes.
    fn keep_mounted_directory(&self, path: &Path) {
        warn!("a mount could not be undone: {}", path.display());
        if let Err(error) = self.announce_mount_directory(path) {
            warn!("{error}");
        }
    }

    async fn remove_mount_directory(&self, path: &Path) {
        if let Err(error) = self.mounter.remove(path.to_owned()).await {
            warn!("a mount directory was not removed: {error}");
        }
        self.forget_mount_directory(path);
    }

    /// Whether this directory was made for this user.
    pub(super) fn was_mounted_for(&self, path: &Path, uid: u32) -> bool {
        self.mount_directories.lock().get(path).is_some_and(|known| known.directory.uid == uid)
    }

    /// Removes the directories that nothing is mounted on any more.
    pub(super) async fn remove_unused_directories(&self) {
        let _alone = self.mount_directories.clearing.lock().await;
        for path in self.unused_directories() {
            self.remove_mount_directory(&path).await;
        }
    }

    /// Removes them in a task, if there are any.
    pub(super) fn spawn_directory_removal(self: &Arc<Self>) {
        if !self.unused_directories().is_empty() {
            let engine = Arc::clone(self);
            tokio::spawn(async move { engine.remove_unused_directories().await });
        }
    }

    fn unused_directories(&self) -> Vec<PathBuf> {
        let state = self.state();
        let is_over = |directory: &MountDirectory| directory.announced && !state.mounts.has(&directory.path);
        let mount_directories = self.mount_directories.lock();
        mount_directories
            .values()
            .filter(|known| is_over(&known.directory))
            .map(|known| known.directory.path.clone())
            .collect()
    }

    /// Adopts the directories of earlier daemons; returns those that were not announced.
    pub(super) fn adopt_mount_directories(&self) -> Vec<PathBuf> {
        let mut unfinished = Vec::new();
        for directory in self.state_writer.read_mount_directories() {
            let permit = self.mount_quota.adopt(directory.uid);
            if !directory.announced {
                unfinished.push(directory.path.clone());
            }
            self.mount_directories.add(directory, Some(permit));
        }
        unfinished
    }

    /// Undoes mounts whose directories were not announced.
    pub(super) async fn undo_unfinished_mounts(&self, unfinished: Vec<PathBuf>) {
        for path in unfinished {
            info!(mount_point = %path.display(), "the mount was not finished: undone");
            self.undo_mount(&path).await;
        }
        self.remove_unused_directories().await;
    }
}
