//! The service manager's mounts on a simulated machine.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::machine::Simulated;
use super::mappings::parse_loop;
use crate::error::Error;
use crate::future::BoxFuture;
use crate::mounter::{Account, MountCommand, Mounter};

/// The service manager of a simulated machine: its mounts and directories outlive the daemon.
#[derive(Clone)]
pub struct SimulatedMounts {
    machine: Simulated,
    host: Arc<Mutex<Host>>,
}

#[derive(Default)]
struct Host {
    directories: BTreeSet<PathBuf>,
    /// Directories that a process uses.
    used: BTreeSet<PathBuf>,
    /// Whether mounts never end.
    hangs: bool,
}

impl SimulatedMounts {
    /// Mounts on this machine.
    pub fn on(machine: &Simulated) -> Self {
        Self { machine: machine.clone(), host: Arc::default() }
    }

    fn host(&self) -> MutexGuard<'_, Host> {
        self.host.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The directories that exist.
    pub fn directories(&self) -> Vec<PathBuf> {
        self.host().directories.iter().cloned().collect()
    }

    /// From now on mounts do not end.
    pub fn set_hangs(&self, hangs: bool) {
        self.host().hangs = hangs;
    }

    /// Sets whether a process uses a mount point.
    pub fn set_used(&self, path: &Path, is_used: bool) {
        if is_used {
            self.host().used.insert(path.to_owned());
        } else {
            self.host().used.remove(path);
        }
    }

    /// Mounts a node; false if the device is gone or claimed.
    fn mount_node(&self, node: &str, directory: PathBuf) -> bool {
        if let Some(number) = node.strip_prefix("/dev/dm-").and_then(|number| number.parse().ok()) {
            return self.machine.mount_mapping(number, directory);
        }
        let device = parse_loop(node);
        device.is_some_and(|(number, partition)| self.machine.mount_on(number, partition, directory))
    }

    async fn start(&self, order: MountCommand) -> Result<(), Error> {
        self.machine.step().await?;
        let hangs = self.host().hangs;
        if hangs {
            tokio::time::sleep(order.timeout).await;
            return Err(Error::Timeout { operation: "mount".to_owned(), reason: "it hangs".to_owned() });
        }
        assert!(self.host().directories.contains(&order.directory), "{:?} was not made", order.directory);
        if !self.mount_node(&order.device, order.directory) {
            return Err(Error::Failed {
                operation: "mount".to_owned(),
                reason: "the device is gone".to_owned(),
            });
        }
        // It is mounted, and the call has not returned yet.
        self.machine.step().await
    }
}

impl Mounter for SimulatedMounts {
    fn account(&self, uid: u32) -> BoxFuture<'_, Account> {
        Box::pin(async move { Account { uid, gid: Some(uid), name: format!("user{uid}") } })
    }

    fn path(&self, account: &Account, name: &str) -> PathBuf {
        Path::new("/run/media").join(&account.name).join(name)
    }

    fn is_there(&self, path: PathBuf) -> BoxFuture<'_, bool> {
        Box::pin(async move { self.host().directories.contains(&path) })
    }

    fn make(&self, path: PathBuf, _: u32) -> BoxFuture<'_, Result<bool, Error>> {
        Box::pin(async move {
            self.machine.step().await?;
            Ok(self.host().directories.insert(path))
        })
    }

    fn mount(&self, order: MountCommand) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.start(order))
    }

    fn unmount(&self, path: PathBuf, lazy: bool, _: Duration) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            self.machine.step().await?;
            if self.host().used.contains(&path) && !lazy {
                return Err(Error::Busy { operation: "unmount".to_owned(), reason: "in use".to_owned() });
            }
            self.machine.unmount_from(&path);
            self.machine.step().await
        })
    }

    fn undo(&self, path: PathBuf, _: Duration) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            let _nothing_stops_it = self.machine.step().await;
            while self.machine.unmount_from(&path) {}
        })
    }

    fn remove(&self, path: PathBuf) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let _nothing_stops_it = self.machine.step().await;
            assert!(!self.machine.mount_table().has(&path), "something is mounted on {path:?}");
            self.host().directories.remove(&path);
            Ok(())
        })
    }
}
