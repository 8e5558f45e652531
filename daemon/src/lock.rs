//! One daemon at a time: two would undo what the other does.

use std::fs::{File, TryLockError};
use std::io::{Error, ErrorKind, Result};
use std::path::Path;
use std::time::Duration;

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
        let path = runtime_folder.join("lock");
        let file = File::options().create(true).append(true).open(&path)?;
        match file.try_lock() {
            Ok(()) => return Ok(Self { _file: file }),
            Err(TryLockError::WouldBlock) => {}
            Err(TryLockError::Error(error)) => return Err(error),
        }
        let waiting = tokio::task::spawn_blocking(move || file.lock().map(|()| file));
        match tokio::time::timeout(PATIENCE, waiting).await {
            Ok(Ok(locked)) => locked.map(|file| Self { _file: file }),
            _ => {
                Err(Error::new(ErrorKind::WouldBlock, format!("another loopd has locked {}", path.display())))
            }
        }
    }
}

#[cfg(test)]
mod tests {
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
}
