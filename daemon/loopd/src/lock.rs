//! The lock that allows only one daemon to run: two would detach each other's attachments.

use std::fs::{File, Metadata, TryLockError};
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::unistd::geteuid;

const MODE: u32 = 0o600;

/// How long to wait for an earlier daemon that is stopping.
const TIMEOUT: Duration = Duration::from_secs(10);

/// The lock of the running daemon.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock in the runtime directory; waits for an earlier daemon that is stopping.
    ///
    /// # Errors
    /// Another daemon holds it, or the file cannot be opened.
    pub async fn take(runtime_directory: &Path) -> Result<Self> {
        Self::take_within(runtime_directory, TIMEOUT).await
    }

    async fn take_within(runtime_directory: &Path, timeout: Duration) -> Result<Self> {
        let path = runtime_directory.join("lock");
        loop {
            let file = open(&path)?;
            let found = file.metadata()?;
            match (lock(file, timeout).await?, is_ours(&found)) {
                (None, true) => {
                    let message = format!("another loopd has locked {}", path.display());
                    return Err(Error::new(ErrorKind::WouldBlock, message));
                }
                // Others can open the file, so that its holder may be no daemon.
                (_, false) => return Ok(Self { _file: replace(&path)? }),
                (Some(file), true) if is_at(&path, &found) => return Ok(Self { _file: file }),
                // Another daemon has replaced it.
                (Some(_), true) => {}
            }
        }
    }
}

/// Opens the file with a mode that only root can open, whatever the umask: a user who can open it can lock it, and so
/// keep every later daemon from starting.
fn open(path: &Path) -> Result<File> {
    let is_foreign = |found: Metadata| !found.is_file() || found.uid() != geteuid().as_raw();
    if path.symlink_metadata().is_ok_and(is_foreign) {
        std::fs::remove_file(path)?;
    }
    let flags = OFlag::O_NOFOLLOW.bits();
    File::options().create(true).append(true).mode(MODE).custom_flags(flags).open(path)
}

/// Locks the file; `None` if another process holds the lock until the timeout.
async fn lock(file: File, timeout: Duration) -> Result<Option<File>> {
    match file.try_lock() {
        Ok(()) => return Ok(Some(file)),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(error)) => return Err(error),
    }
    let waiting = tokio::task::spawn_blocking(move || file.lock().map(|()| file));
    match tokio::time::timeout(timeout, waiting).await {
        Ok(Ok(locked)) => locked.map(Some),
        _ => Ok(None),
    }
}

/// Replaces a file that others could have opened by a locked one that only root can open.
fn replace(path: &Path) -> Result<File> {
    let new = path.with_extension("new");
    let _did_not_exist = std::fs::remove_file(&new);
    let file = File::options().create_new(true).append(true).mode(MODE).open(&new)?;
    file.lock()?;
    std::fs::rename(&new, path)?;
    Ok(file)
}

fn is_at(path: &Path, found: &Metadata) -> bool {
    path.symlink_metadata().is_ok_and(|current| (current.dev(), current.ino()) == (found.dev(), found.ino()))
}

fn is_ours(found: &Metadata) -> bool {
    found.is_file() && found.uid() == geteuid().as_raw() && found.mode() & 0o7777 & !MODE == 0
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[tokio::test]
    async fn a_second_daemon_waits_until_the_first_ends() {
        let directory = tempfile::tempdir().unwrap();
        let first = Lock::take(directory.path()).await.unwrap();
        let waiting = tokio::spawn({
            let directory = directory.path().to_owned();
            async move { Lock::take(&directory).await }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waiting.is_finished());
        drop(first);
        let _second = waiting.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_lock_that_others_can_open_is_replaced() {
        for old_mode in [0o644, 0o666, 0o660] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("lock");
            std::fs::write(&path, "").unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(old_mode)).unwrap();
            let other = File::open(&path).unwrap();
            if old_mode != 0o660 {
                other.lock().unwrap();
            }
            let short = Duration::from_millis(20);
            let _lock = Lock::take_within(directory.path(), short).await.unwrap();
            assert_eq!(path.metadata().unwrap().mode() & 0o7777, MODE);
            assert!(Lock::take_within(directory.path(), short).await.is_err(), "the new file is locked");
        }
    }

    #[tokio::test]
    async fn a_symbolic_link_is_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let victim = directory.path().join("victim");
        std::fs::write(&victim, "").unwrap();
        symlink(&victim, directory.path().join("lock")).unwrap();
        let _lock = Lock::take(directory.path()).await.unwrap();
        assert!(directory.path().join("lock").symlink_metadata().unwrap().is_file() && victim.exists());
    }
}
