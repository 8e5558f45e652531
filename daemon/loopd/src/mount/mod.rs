//! Mounts for the engine: the service manager mounts, on directories that loopd makes.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use nix::unistd::{Uid, User};
use tracing::warn;
use zbus::{Connection, Variant};

use loopd_engine::{Account, BoxFuture, Error, MountCommand, Mounter, safe_name};

mod directories;

use crate::systemd::{JobError, UnitProperties, Units, unit_name};
use directories::Directories;

/// The longest user name, as escaped for a unit name, that is used for a directory.
const MAX_USER_NAME: usize = 64;
/// Unmounts without the helper `umount.loopd`, which would call loopd.
const UMOUNT: [&str; 4] = ["/usr/bin/umount", "--lazy", "--internal-only", "--"];

/// Mounts in the host's mount namespace.
pub struct HostMounts {
    units: Units,
    directories: Directories,
    services: AtomicU64,
}

impl HostMounts {
    /// Uses the service manager on this bus.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn new(connection: &Connection) -> zbus::Result<Self> {
        let units = Units::new(connection).await?;
        Ok(Self { units, directories: Directories::from_environment(), services: AtomicU64::new(0) })
    }

    async fn stop(&self, path: &Path, timeout: Duration) -> Result<(), Error> {
        let (unit, operation) = (unit_name::of_mount(path), format!("unmount {}", path.display()));
        let stopped = self.units.stop(&unit, timeout).await;
        stopped.map_err(|error| match error {
            JobError::Ended(_) => Error::Busy { operation, reason: "the file system is in use".to_owned() },
            error => error.to_error(&operation, &unit, ""),
        })
    }

    /// Unmounts lazily by a transient service: a mount unit does so only if it was made with `LazyUnmount=`.
    async fn unmount_lazily(&self, path: &Path, timeout: Duration) -> Result<(), Error> {
        let number = self.services.fetch_add(1, Ordering::Relaxed);
        let unit = format!("loopd-unmount-{}-{number}.service", std::process::id());
        let mut arguments = UMOUNT.to_vec();
        arguments.push(utf8(path)?);
        // The path may contain a dollar sign.
        let command = vec![(UMOUNT[0], arguments, vec!["no-env-expand"])];
        let properties: UnitProperties<'_> = vec![
            ("Description", format!("Unmount {} lazily", path.display()).into()),
            ("Type", "oneshot".into()),
            ("ExecStartEx", Variant::new(command)),
            ("CollectMode", "inactive-or-failed".into()),
        ];
        let started = self.units.start(&unit, &properties, timeout).await;
        started.map_err(|error| error.to_error(&format!("unmount {} lazily", path.display()), &unit, ""))
    }

    async fn blocking<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Directories) -> Result<T, Error> + Send + 'static,
    ) -> Result<T, Error> {
        let directories = self.directories.clone();
        tokio::task::spawn_blocking(move || work(&directories)).await.unwrap_or(Err(Error::Panicked))
    }
}

impl Mounter for HostMounts {
    fn account(&self, uid: u32) -> BoxFuture<'_, Account> {
        Box::pin(async move {
            // The user database may be on the network.
            tokio::task::spawn_blocking(move || account(uid)).await.unwrap_or_else(|_| nameless(uid))
        })
    }

    fn path(&self, account: &Account, name: &str) -> PathBuf {
        self.directories.path(&account.name, name)
    }

    fn is_there(&self, path: PathBuf) -> BoxFuture<'_, bool> {
        // A path that cannot be examined counts as used.
        let exists =
            move |_: &Directories| Ok(!matches!(path.symlink_metadata(), Err(error) if is_missing(&error)));
        Box::pin(async move { self.blocking(exists).await.unwrap_or(true) })
    }

    fn make(&self, path: PathBuf, uid: u32) -> BoxFuture<'_, Result<bool, Error>> {
        Box::pin(self.blocking(move |directories| directories.make(&path, uid)))
    }

    fn mount(&self, order: MountCommand) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let unit = unit_name::of_mount(&order.directory);
            let properties = unit_properties(&order)?;
            let mut started = self.units.start(&unit, &properties, order.timeout).await;
            // The service manager has not noticed that nothing is mounted there any more: a lazy unmount has no event.
            if matches!(started, Err(JobError::Exists(_))) && !is_mounted(&order.directory) {
                let _stopped = self.units.stop(&unit, order.timeout).await;
                started = self.units.start(&unit, &properties, order.timeout).await;
            }
            started.map_err(|error| error.to_error(&format!("mount {}", order.shown), &unit, &order.advice))
        })
    }

    fn unmount(&self, path: PathBuf, lazy: bool, timeout: Duration) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            if lazy { self.unmount_lazily(&path, timeout).await } else { self.stop(&path, timeout).await }
        })
    }

    fn undo(&self, path: PathBuf, timeout: Duration) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            // The mount table shows whether this succeeded.
            let _stopped = self.stop(&path, timeout).await;
            if is_mounted(&path)
                && let Err(error) = self.unmount_lazily(&path, timeout).await
            {
                warn!("{error}");
            }
            self.units.reset_failed(&unit_name::of_mount(&path)).await;
        })
    }

    fn remove(&self, path: PathBuf) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(self.blocking(move |directories| directories.remove(&path)))
    }
}

/// The properties of the mount unit.
fn unit_properties(order: &MountCommand) -> Result<UnitProperties<'_>, Error> {
    Ok(vec![
        ("Description", format!("{} for {}", order.shown, order.account.name).into()),
        ("What", order.device.as_str().into()),
        ("Where", utf8(&order.directory)?.into()),
        ("Type", order.kind.as_str().into()),
        ("Options", order.options.as_str().into()),
        ("TimeoutUSec", microseconds(order.timeout).into()),
        // A failed unit is removed without `systemctl reset-failed`.
        ("CollectMode", "inactive-or-failed".into()),
    ])
}

/// Whether something is mounted on the directory, or may be: the mount table cannot be read.
fn is_mounted(path: &Path) -> bool {
    loopd_kernel::mounts::read().map_or(true, |table| table.has(path))
}

fn is_missing(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::NotFound
}

fn account(uid: u32) -> Account {
    let Ok(Some(user)) = User::from_uid(Uid::from_raw(uid)) else { return nameless(uid) };
    Account { uid, gid: Some(user.gid.as_raw()), name: directory(&user.name, uid) }
}

/// The name of a user's directory, unique to that user: the unchanged user name, or else the uid. A changed
/// name could be that of another user, and a name of digits another user's uid.
fn directory(user: &str, uid: u32) -> String {
    let is_safe = safe_name(user.as_bytes()).as_deref() == Some(user)
        && unit_name::escaped(user).len() <= MAX_USER_NAME
        && !user.bytes().all(|byte| byte.is_ascii_digit());
    if is_safe { user.to_owned() } else { uid.to_string() }
}

fn nameless(uid: u32) -> Account {
    Account { uid, gid: None, name: uid.to_string() }
}

fn microseconds(time: Duration) -> u64 {
    u64::try_from(time.as_micros()).unwrap_or(u64::MAX)
}

/// The path as a string for D-Bus.
fn utf8(path: &Path) -> Result<&str, Error> {
    path.to_str().ok_or_else(|| {
        let operation = format!("pass {} to the service manager", path.display());
        Error::NotSupported { operation, reason: "it is not UTF-8; do it as root".to_owned() }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_user_has_its_own_directory() {
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
