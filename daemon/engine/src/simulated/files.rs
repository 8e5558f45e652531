//! State files on a simulated machine.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::machine::Simulated;
use super::mounts::SimulatedMounts;
use crate::error::Error;
use crate::kernel::DiskSequence;
use crate::{MountDirectory, SavedAttachment, Store};

/// State files on a simulated machine: they outlive the daemon, which may die during a write.
#[derive(Clone)]
pub struct Files {
    machine: Simulated,
    files: Arc<Mutex<BTreeMap<DiskSequence, SavedAttachment>>>,
    announced: Arc<Mutex<Vec<u64>>>,
    mount_directories: Arc<Mutex<BTreeMap<PathBuf, MountDirectory>>>,
    /// The service manager's mounts and their directories.
    pub mounts: SimulatedMounts,
    /// After how many writes the daemon dies in one, and whether that one has its effect.
    death: Arc<Mutex<Option<(usize, bool)>>>,
    /// Whether writes fail.
    full: Arc<AtomicBool>,
}

impl Files {
    /// Files on this machine.
    pub fn on(machine: &Simulated) -> Self {
        Self {
            machine: machine.clone(),
            files: Arc::default(),
            announced: Arc::default(),
            mount_directories: Arc::default(),
            mounts: SimulatedMounts::on(machine),
            death: Arc::default(),
            full: Arc::default(),
        }
    }

    /// Makes the saving of attachments fail from now on.
    pub fn set_full(&self) {
        self.full.store(true, Ordering::Relaxed);
    }

    /// Cancels [`die_at`](Self::die_at).
    pub fn stay_alive(&self) {
        *self.death.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Makes the daemon die in this write, counted from 0 from now on: after the write if it is `done`, else before it.
    pub fn die_at(&self, write: usize, done: bool) {
        *self.death.lock().unwrap_or_else(PoisonError::into_inner) = Some((write, done));
    }

    /// Makes a change, unless the daemon is dead.
    fn change(&self, change: impl FnOnce(&Self)) {
        self.machine.moment();
        self.change_unless_dead(change);
        self.machine.moment();
    }

    fn change_unless_dead(&self, change: impl FnOnce(&Self)) {
        let mut death = self.death.lock().unwrap_or_else(PoisonError::into_inner);
        let dies = match &mut *death {
            Some((0, done)) => Some(*done),
            Some((left, _)) => {
                *left -= 1;
                None
            }
            None => None,
        };
        if !self.machine.is_dead() && dies != Some(false) {
            change(self);
        }
        if dies.is_some() {
            *death = None;
            self.machine.die();
        }
    }
}

impl Store for Files {
    fn write(&self, saved: &SavedAttachment) -> Result<(), Error> {
        if self.full.load(Ordering::Relaxed) {
            let source = std::io::Error::other("no space is left");
            return Err(Error::Io { operation: "write the state file".to_owned(), source });
        }
        self.change(|all| {
            drop(all.files.lock().unwrap_or_else(PoisonError::into_inner).insert(saved.id, saved.clone()))
        });
        Ok(())
    }

    fn erase(&self, id: DiskSequence) {
        self.change(|all| {
            assert!(
                all.files.lock().unwrap_or_else(PoisonError::into_inner).remove(&id).is_some(),
                "{id} was never written"
            )
        });
    }

    fn read(&self) -> Vec<SavedAttachment> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    fn announce(&self, mark: u64) -> Result<(), Error> {
        self.change(|all| all.announced.lock().unwrap_or_else(PoisonError::into_inner).push(mark));
        Ok(())
    }

    fn retract(&self, mark: u64) {
        self.change(|all| {
            all.announced
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .retain(|announced| *announced != mark)
        });
    }

    fn announced(&self) -> Vec<u64> {
        self.announced.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn write_mount_directory(&self, directory: &MountDirectory) -> Result<(), Error> {
        self.change(|all| {
            drop(
                all.mount_directories
                    .lock()
                    .unwrap_or_else(PoisonError::into_inner)
                    .insert(directory.path.clone(), directory.clone()),
            )
        });
        Ok(())
    }

    fn erase_mount_directory(&self, path: &Path) {
        self.change(|all| {
            drop(all.mount_directories.lock().unwrap_or_else(PoisonError::into_inner).remove(path))
        });
    }

    fn read_mount_directories(&self) -> Vec<MountDirectory> {
        self.mount_directories.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }
}
