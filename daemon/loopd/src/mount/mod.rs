//! Who mounts for the engine: the service manager, on folders that we make.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use loopd_dbus::{Error, ErrorKind};
use nix::unistd::{Uid, User};
use tracing::warn;
use zbus::{Connection, Variant};

use loopd_engine::{Account, BoxFuture, MountCommand, Mounter, safe_name};

mod folders;
pub mod unit_name;
mod units;

use folders::Folders;
use units::{Failure, Settings, Units};

/// A name of a user that takes more in a unit's name is not put there.
const LONGEST_USER: usize = 64;
/// Without a shell, and without the helper that would ask us.
const UMOUNT: [&str; 4] = ["/usr/bin/umount", "--lazy", "--internal-only", "--"];

/// The host's mounts.
pub struct HostMounts {
    units: Units,
    folders: Folders,
    services: AtomicU64,
}

impl HostMounts {
    /// Asks the service manager on this bus.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn new(connection: &Connection) -> zbus::Result<Self> {
        let units = Units::new(connection).await?;
        Ok(Self { units, folders: Folders::given(), services: AtomicU64::new(0) })
    }

    async fn start(&self, order: &MountCommand) -> Result<(), Error> {
        let place = text(&order.directory)?;
        let settings: Settings<'_> = vec![
            ("Description", format!("{} for {}", order.shown, order.account.name).into()),
            ("What", order.device.as_str().into()),
            ("Where", place.into()),
            ("Type", order.kind.as_str().into()),
            ("Options", order.options.as_str().into()),
            ("TimeoutUSec", microseconds(order.timeout).into()),
            // Nobody is to have to clean up after a failure.
            ("CollectMode", "inactive-or-failed".into()),
        ];
        let unit = unit_name::of_mount(&order.directory);
        self.units.start(&unit, &settings, order.timeout).await.map_err(|failure| {
            let journal = match order.read_only {
                true => "Its journal may have to be replayed, which a read-only device does not allow. ",
                false => "",
            };
            let advice = format!("is it damaged, or does this kernel not know {}? {journal}", order.kind);
            failure.explained(&format!("mount {}", order.shown), &unit, &advice)
        })
    }

    async fn stop(&self, path: &Path, patience: Duration) -> Result<(), Error> {
        let unit = unit_name::of_mount(path);
        let stopped = self.units.stop(&unit, patience).await;
        stopped.map_err(|failure| match failure {
            Failure::Ended(_) => Error::new(ErrorKind::Busy, "something uses it"),
            failure => failure.explained(&format!("unmount {}", path.display()), &unit, ""),
        })
    }

    /// By a service of a moment: a mount's own unit unmounts lazily only where it was made so.
    async fn take_from_the_tree(&self, path: &Path, patience: Duration) -> Result<(), Error> {
        let number = self.services.fetch_add(1, Ordering::Relaxed);
        let unit = format!("loopd-unmount-{}-{number}.service", std::process::id());
        let mut words = UMOUNT.to_vec();
        words.push(text(path)?);
        // A dollar is one, in the name of what others have mounted.
        let command = vec![(UMOUNT[0], words, vec!["no-env-expand"])];
        let settings: Settings<'_> = vec![
            ("Description", format!("Unmount {} lazily", path.display()).into()),
            ("Type", "oneshot".into()),
            ("ExecStartEx", Variant::new(command)),
            ("CollectMode", "inactive-or-failed".into()),
        ];
        let started = self.units.start(&unit, &settings, patience).await;
        started.map_err(|failure| failure.explained(&format!("unmount {} lazily", path.display()), &unit, ""))
    }

    async fn undo(&self, path: &Path, patience: Duration) {
        // Whatever this comes to, the mount table tells what is left to do.
        let _stopped = self.stop(path, patience).await;
        if is_mounted(path)
            && let Err(error) = self.take_from_the_tree(path, patience).await
        {
            warn!("{error}");
        }
        self.units.forget_failure(&unit_name::of_mount(path)).await;
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Folders) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let folders = self.folders.clone();
        tokio::task::spawn_blocking(move || work(&folders))
            .await
            .unwrap_or_else(|_| Err(Error::new(ErrorKind::Kernel, "a worker thread of loopd failed")))
    }
}

impl Mounter for HostMounts {
    fn account(&self, uid: u32) -> BoxFuture<'_, Account> {
        Box::pin(async move {
            // The user database may lie on the network.
            tokio::task::spawn_blocking(move || account(uid)).await.unwrap_or_else(|_| nameless(uid))
        })
    }

    fn path(&self, account: &Account, name: &str) -> PathBuf {
        self.folders.path(&account.name, name)
    }

    fn is_there(&self, path: PathBuf) -> BoxFuture<'_, bool> {
        // What cannot be looked at is somebody's.
        let look =
            move |_: &Folders| Ok(!matches!(path.symlink_metadata(), Err(error) if is_missing(&error)));
        Box::pin(async move { self.blocking(look).await.unwrap_or(true) })
    }

    fn make(&self, path: PathBuf, uid: u32) -> BoxFuture<'_, Result<bool, Error>> {
        Box::pin(self.blocking(move |folders| folders.make(&path, uid)))
    }

    fn mount(&self, order: MountCommand) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move { self.start(&order).await })
    }

    fn unmount(&self, path: PathBuf, lazy: bool, patience: Duration) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            if lazy {
                self.take_from_the_tree(&path, patience).await
            } else {
                self.stop(&path, patience).await
            }
        })
    }

    fn undo(&self, path: PathBuf, patience: Duration) -> BoxFuture<'_, ()> {
        Box::pin(async move { self.undo(&path, patience).await })
    }

    fn remove(&self, path: PathBuf) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.blocking(move |folders| folders.remove(&path)))
    }
}

fn is_mounted(path: &Path) -> bool {
    loopd_kernel::mounts::read().is_ok_and(|table| table.has(path))
}

fn is_missing(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound
}

fn account(uid: u32) -> Account {
    let Ok(Some(user)) = User::from_uid(Uid::from_raw(uid)) else { return nameless(uid) };
    Account { uid, gid: Some(user.gid.as_raw()), name: directory(&user.name, uid) }
}

/// The name of a user's directory, which no other user has: the user's name as it is, or else the uid. A
/// name that has to be changed could become that of another user, and one of digits be another's uid.
fn directory(user: &str, uid: u32) -> String {
    let is_safe = safe_name(user.as_bytes()).as_deref() == Some(user)
        && unit_name::escaped(user).len() <= LONGEST_USER
        && !user.bytes().all(|byte| byte.is_ascii_digit());
    if is_safe { user.to_owned() } else { uid.to_string() }
}

fn nameless(uid: u32) -> Account {
    Account { uid, gid: None, name: uid.to_string() }
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// D-Bus has no other strings.
fn text(path: &Path) -> Result<&str, Error> {
    path.to_str().ok_or_else(|| {
        let message = format!(
            "the service manager cannot be told {}, which is not UTF-8; let root do it",
            path.display()
        );
        Error::new(ErrorKind::NotSupported, message)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_users_have_the_same_directory() {
        for (user, uid, expected) in [
            ("alice", 1000, "alice"),
            ("a.b-c_d", 1000, "a.b-c_d"),
            ("DOMAIN\\alice", 1001, "1001"),
            ("DOMAIN/alice", 1002, "1002"),
            (".alice", 1003, "1003"),
            ("alice ", 1004, "1004"),
            ("al\u{200b}ice", 1005, "1005"),
            ("1000", 1006, "1006"),
            ("", 1007, "1007"),
            (&"x".repeat(65), 1008, "1008"),
        ] {
            assert_eq!(directory(user, uid), expected);
        }
    }
}
