//! The service that mounts in the host's mount namespace.

use std::path::PathBuf;
use std::time::Duration;

use crate::error::Error;
use crate::future::BoxFuture;

/// The user that a volume is mounted for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Account {
    /// The uid.
    pub uid: u32,
    /// The primary group; `None` if the uid has no entry in the user database.
    pub gid: Option<u32>,
    /// A name that is safe as the name of a directory.
    pub name: String,
}

/// A mount to be made.
#[derive(Clone, Debug)]
pub struct MountCommand {
    /// The device node.
    pub device: String,
    /// The node and the backing file, for messages.
    pub shown: String,
    /// The directory to mount on.
    pub directory: PathBuf,
    /// The kernel's name of the file system.
    pub kind: String,
    /// The options, which were checked.
    pub options: String,
    /// What may be wrong if the kernel refuses it, for a message.
    pub advice: String,
    /// The user that it is mounted for.
    pub account: Account,
    /// How long the mount may take.
    pub timeout: Duration,
}

/// Mounts in the host's mount namespace.
///
/// Dropping a future does not undo what it began: [`Mounter::undo`] does.
pub trait Mounter: Send + Sync + 'static {
    /// The entry of a uid in the user database.
    fn account(&self, uid: u32) -> BoxFuture<'_, Account>;

    /// The user's directory with this name.
    fn path(&self, account: &Account, name: &str) -> PathBuf;

    /// Whether the path exists.
    fn is_there(&self, path: PathBuf) -> BoxFuture<'_, bool>;

    /// Makes the directory, to which only this user has access; false if the path exists.
    fn make(&self, path: PathBuf, uid: u32) -> BoxFuture<'_, Result<bool, Error>>;

    /// Mounts. Fails with `NotSupported` if no service manager runs, or with `Timeout`.
    fn mount(&self, command: MountCommand) -> BoxFuture<'_, Result<(), Error>>;

    /// Unmounts, even if another program has mounted. Fails with `Busy` if the file system is in use and the
    /// unmount is not lazy.
    fn unmount(&self, path: PathBuf, lazy: bool, timeout: Duration) -> BoxFuture<'_, Result<(), Error>>;

    /// Unmounts the path, and cancels a mount on it that is in progress.
    fn undo(&self, path: PathBuf, timeout: Duration) -> BoxFuture<'_, ()>;

    /// Removes an empty directory that was made for a mount. Does nothing if it is gone.
    fn remove(&self, path: PathBuf) -> BoxFuture<'_, Result<(), Error>>;
}
