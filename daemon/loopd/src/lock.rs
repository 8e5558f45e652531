//! One daemon at a time: two would undo what the other does.

use std::fs::{File, Metadata, TryLockError};
use std::io::{Error, ErrorKind, Result};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::time::Duration;

use nix::fcntl::OFlag;
use nix::unistd::geteuid;

const MODE: u32 = 0o600;

/// An earlier daemon that is ending takes no longer.
const PATIENCE: Duration = Duration::from_secs(10);

/// Held for as long as the daemon lives.
#[derive(Debug)]
pub struct Lock {
    _file: File,
}

impl Lock {
    /// Takes the lock in the runtime folder; waits for an earlier daemon that is about to end.
    ///
    /// # Errors
    /// Another daemon keeps it.
    pub async fn take(runtime_folder: &Path) -> Result<Self> {
        Self::take_within(runtime_folder, PATIENCE).await
    }

    async fn take_within(runtime_folder: &Path, patience: Duration) -> Result<Self> {
        let path = runtime_folder.join("lock");
        loop {
            let file = open(&path)?;
            let found = file.metadata()?;
            match (wait(file, patience).await?, is_ours(&found)) {
                (None, true) => {
                    let message = format!("another loopd has locked {}", path.display());
                    return Err(Error::new(ErrorKind::WouldBlock, message));
                }
                // Whoever holds it is no daemon, or one of a time when others could.
                (_, false) => return Ok(Self { _file: replace(&path)? }),
                (Some(file), true) if is_at(&path, &found) => return Ok(Self { _file: file }),
                // Another daemon has replaced it.
                (Some(_), true) => {}
            }
        }
    }
}

/// Whoever can open the file can lock it, and so keep every later daemon from starting. Only root can,
/// whatever the umask.
fn open(path: &Path) -> Result<File> {
    let is_strange = |found: Metadata| !found.is_file() || found.uid() != geteuid().as_raw();
    if path.symlink_metadata().is_ok_and(is_strange) {
        std::fs::remove_file(path)?;
    }
    let flags = OFlag::O_NOFOLLOW.bits();
    File::options().create(true).append(true).mode(MODE).custom_flags(flags).open(path)
}

/// The locked file; `None` if somebody else keeps it for longer.
async fn wait(file: File, patience: Duration) -> Result<Option<File>> {
    match file.try_lock() {
        Ok(()) => return Ok(Some(file)),
        Err(TryLockError::WouldBlock) => {}
        Err(TryLockError::Error(error)) => return Err(error),
    }
    let waiting = tokio::task::spawn_blocking(move || file.lock().map(|()| file));
    match tokio::time::timeout(patience, waiting).await {
        Ok(Ok(locked)) => locked.map(Some),
        _ => Ok(None),
    }
}

/// Puts a locked file that only root can open in the place of one that others can, or could, have open.
fn replace(path: &Path) -> Result<File> {
    let new = path.with_extension("new");
    let _none = std::fs::remove_file(&new);
    let file = File::options().create_new(true).append(true).mode(MODE).open(&new)?;
    file.lock()?;
    std::fs::rename(&new, path)?;
    Ok(file)
}

fn is_at(path: &Path, found: &Metadata) -> bool {
    path.symlink_metadata().is_ok_and(|there| (there.dev(), there.ino()) == (found.dev(), found.ino()))
}

fn is_ours(found: &Metadata) -> bool {
    found.is_file() && found.uid() == geteuid().as_raw() && found.mode() & 0o7777 & !MODE == 0
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    #[tokio::test]
    async fn the_second_waits_for_the_end_of_the_first() {
        let folder = tempfile::tempdir().unwrap();
        let first = Lock::take(folder.path()).await.unwrap();
        let waiting = tokio::spawn({
            let folder = folder.path().to_owned();
            async move { Lock::take(&folder).await }
        });
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(!waiting.is_finished());
        drop(first);
        let _second = waiting.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_lock_that_others_can_open_is_replaced() {
        for umask_left_it in [0o644, 0o666, 0o660] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("lock");
            std::fs::write(&path, "").unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(umask_left_it)).unwrap();
            let theirs = File::open(&path).unwrap();
            if umask_left_it != 0o660 {
                theirs.lock().unwrap();
            }
            let short = Duration::from_millis(20);
            let _lock = Lock::take_within(folder.path(), short).await.unwrap();
            assert_eq!(path.metadata().unwrap().mode() & 0o7777, MODE);
            assert!(Lock::take_within(folder.path(), short).await.is_err(), "the new one counts");
        }
    }

    #[tokio::test]
    async fn a_link_is_no_lock() {
        let folder = tempfile::tempdir().unwrap();
        let victim = folder.path().join("victim");
        std::fs::write(&victim, "").unwrap();
        symlink(&victim, folder.path().join("lock")).unwrap();
        let _lock = Lock::take(folder.path()).await.unwrap();
        assert!(folder.path().join("lock").symlink_metadata().unwrap().is_file() && victim.exists());
    }
}
