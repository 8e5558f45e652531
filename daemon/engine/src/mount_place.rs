//! The folders that we make to mount on, and remove when nothing is mounted on them any more, by whomever
//! it was unmounted.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use loopd_common::{Error, ErrorKind};
use tracing::{info, warn};

use super::quota::Permit;
use super::{Account, Engine};
use crate::kernel::Kernel;

/// More than a user may have mounted of one name.
const MOST_OF_A_NAME: u32 = 1000;
/// How long each step of undoing a mount may take: whoever asked for it waits.
const UNDO: Duration = Duration::from_secs(5);

/// A folder of ours.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct MountDirectory {
    /// Where it is.
    pub path: PathBuf,
    /// The user that it was made for.
    pub uid: u32,
    /// Whether somebody was told of it. Until then, all that was done is to be undone.
    pub told: bool,
}

/// The folders that there are now.
#[derive(Default)]
pub(super) struct MountDirectories {
    places: Mutex<BTreeMap<PathBuf, Held>>,
    /// One task at a time removes what is abandoned: whoever waits for another sees its work done.
    clearing: tokio::sync::Mutex<()>,
}

struct Held {
    place: MountDirectory,
    /// Counts against the user's limit.
    permit: Option<Permit>,
}

impl MountDirectories {
    fn lock(&self) -> MutexGuard<'_, BTreeMap<PathBuf, Held>> {
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Holds the path; false where it is held already.
    fn hold(&self, place: MountDirectory, permit: Option<Permit>) -> bool {
        match self.lock().entry(place.path.clone()) {
            Entry::Occupied(_) => false,
            Entry::Vacant(free) => {
                free.insert(Held { place, permit });
                true
            }
        }
    }
}

impl<K: Kernel> Engine<K> {
    /// Makes a folder of this name, or of the first with a number behind it that is free.
    pub(super) async fn make_place(&self, account: &Account, name: &str) -> Result<PathBuf, Error> {
        let permit = self.mounts_of_a_uid.acquire(account.uid)?;
        for number in 0..MOST_OF_A_NAME {
            let name = if number == 0 { name.to_owned() } else { format!("{name}{number}") };
            let path = self.mounter.path(account, &name);
            if self.try_place(MountDirectory { path: path.clone(), uid: account.uid, told: false }).await? {
                if let Some(held) = self.places.lock().get_mut(&path) {
                    held.permit = Some(permit);
                }
                return Ok(path);
            }
        }
        let message = format!("{} has all folders for {name:?} in use; unmount one", account.name);
        Err(Error::new(ErrorKind::LimitExceeded, message))
    }

    async fn try_place(&self, place: MountDirectory) -> Result<bool, Error> {
        if !self.places.hold(place.clone(), None) {
            return Ok(false);
        }
        // Whatever is written down as unfinished the next daemon undoes: nothing that others have made.
        if self.mounter.is_there(place.path.clone()).await {
            self.places.lock().remove(&place.path);
            return Ok(false);
        }
        // Written before it is made: the daemon may die over it.
        let made = match self.keeper.write_mount_directory(&place) {
            Ok(()) => self.mounter.make(place.path.clone(), place.uid).await,
            Err(error) => Err(error),
        };
        if !matches!(made, Ok(true)) {
            self.forget_place(&place.path);
        }
        made
    }

    fn forget_place(&self, path: &Path) {
        self.keeper.erase_mount_directory(path);
        self.places.lock().remove(path);
    }

    /// Notes that the folder is what somebody is told of.
    pub(super) fn settle_place(&self, path: &Path) -> Result<(), Error> {
        let place = self.places.lock().get_mut(path).map(|held| {
            held.place.told = true;
            held.place.clone()
        });
        place.map_or(Ok(()), |place| self.keeper.write_mount_directory(&place))
    }

    /// Undoes what was done on and for a folder.
    pub(super) async fn unmake_place(&self, path: &Path) {
        self.mounter.undo(path.to_owned(), UNDO.min(self.settings().wait_for_mount)).await;
        self.remove_place(path).await;
    }

    async fn remove_place(&self, path: &Path) {
        if let Err(error) = self.mounter.remove(path.to_owned()).await {
            warn!("a mount point stays behind: {error}");
        }
        self.forget_place(path);
    }

    /// Whether this folder was made for this user.
    pub(super) fn has_made(&self, path: &Path, uid: u32) -> bool {
        self.places.lock().get(path).is_some_and(|held| held.place.uid == uid)
    }

    /// Removes the folders that nothing is mounted on any more.
    pub(super) async fn clear_places(&self) {
        let _alone = self.places.clearing.lock().await;
        for path in self.abandoned_places() {
            self.remove_place(&path).await;
        }
    }

    pub(super) fn spawn_clearing(self: &Arc<Self>) {
        if !self.abandoned_places().is_empty() {
            let engine = Arc::clone(self);
            tokio::spawn(async move { engine.clear_places().await });
        }
    }

    fn abandoned_places(&self) -> Vec<PathBuf> {
        let state = self.state();
        let is_over = |place: &MountDirectory| place.told && !state.mounts.has(&place.path);
        let places = self.places.lock();
        places.values().filter(|held| is_over(&held.place)).map(|held| held.place.path.clone()).collect()
    }

    /// Takes up the folders that an earlier daemon has made; gives those that nobody was told of.
    pub(super) fn take_up_places(&self) -> Vec<PathBuf> {
        let mut unfinished = Vec::new();
        for place in self.keeper.read_mount_directories() {
            let permit = self.mounts_of_a_uid.adopt(place.uid);
            if !place.told {
                unfinished.push(place.path.clone());
            }
            self.places.hold(place, Some(permit));
        }
        unfinished
    }

    /// Undoes mounts that nobody was told of.
    pub(super) async fn undo_places(&self, unfinished: Vec<PathBuf>) {
        for path in unfinished {
            info!(mount_point = %path.display(), "its mount was not finished: undone");
            self.unmake_place(&path).await;
        }
        self.clear_places().await;
    }
}
