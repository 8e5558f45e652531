//! The service that mounts, in the mount namespace that everybody sees.

use std::path::PathBuf;
use std::pin::Pin;
use std::time::Duration;

use loopd_common::Error;

/// What is done meanwhile, and what comes of it.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// Whom something is mounted for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// The uid.
    pub uid: u32,
    /// The primary group; `None` where the uid has no entry in the user database.
    pub gid: Option<u32>,
    /// The name, fit to be a folder's.
    pub name: String,
}

/// A mount to be made.
#[derive(Clone, Debug)]
pub struct MountCommand {
    /// The device node.
    pub device: String,
    /// The same with the file that is attached, for people.
    pub shown: String,
    /// The folder to mount it on.
    pub directory: PathBuf,
    /// The kernel's name of the file system.
    pub kind: String,
    /// The checked options.
    pub options: String,
    /// Whether the device cannot be written to.
    pub read_only: bool,
    /// Whom it is for.
    pub account: Account,
    /// How long it may take.
    pub timeout: Duration,
}

/// Who mounts, in the name space that everyone sees.
///
/// Dropping a future does not undo what it began: [`Mounter::undo`] does.
pub trait Mounter: Send + Sync + 'static {
    /// What the user database has of a uid.
    fn account(&self, uid: u32) -> BoxFuture<'_, Account>;

    /// The folder for this name of this user.
    fn path(&self, account: &Account, name: &str) -> PathBuf;

    /// Whether there is something by that name.
    fn is_there(&self, path: PathBuf) -> BoxFuture<'_, bool>;

    /// Makes that folder, which only this user may get to; false where something by that name is there.
    fn make(&self, path: PathBuf, uid: u32) -> BoxFuture<'_, Result<bool, Error>>;

    /// Mounts; fails with `NotSupported` where nobody is there to do it, or with `Timeout`.
    fn mount(&self, order: MountCommand) -> BoxFuture<'_, Result<(), Error>>;

    /// Unmounts, whoever has mounted; fails with `Busy` where it is in use and that was not to be lazily.
    fn unmount(&self, path: PathBuf, lazy: bool, timeout: Duration) -> BoxFuture<'_, Result<(), Error>>;

    /// Has nothing be mounted there, and nothing be about to.
    fn undo(&self, path: PathBuf, timeout: Duration) -> BoxFuture<'_, ()>;

    /// Removes an empty folder that was made for a mount. One that is gone is no error.
    fn remove(&self, path: PathBuf) -> BoxFuture<'_, Result<(), Error>>;
}
