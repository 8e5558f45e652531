//! Sends a secret to another program.

use std::future::pending;
use std::io;
use std::os::fd::OwnedFd;

use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe;

use super::secret::Secret;

/// Runs `receive` with the read end of a pipe, to which the secret is written in the meantime. The pipe ends after the
/// secret, so that the receiver reads it to the end.
///
/// # Errors
/// The pipe cannot be made.
pub async fn send<T>(secret: &Secret, receive: impl AsyncFnOnce(OwnedFd) -> T) -> io::Result<T> {
    let (mut sender, receiver) = pipe::pipe()?;
    let read_end = receiver.into_blocking_fd()?;
    let write = async {
        // The receiver reports why it does not read on.
        let _ = sender.write_all(secret.bytes()).await;
        drop(sender);
        pending().await
    };
    tokio::select! {
        result = receive(read_end) => Ok(result),
        never = write => never,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::Read;

    use super::*;
    use crate::passphrase::secret::LONGEST;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    fn secret(bytes: &[u8]) -> Secret {
        let mut secret = Secret::new();
        secret.append(bytes).unwrap();
        secret
    }

    #[test]
    fn the_receiver_reads_the_secret_and_the_end() {
        for length in [1, LONGEST] {
            let sent = secret(&vec![b'x'; length]);
            let read = send(&sent, async |pipe| {
                tokio::task::spawn_blocking(move || {
                    let mut read = Vec::new();
                    File::from(pipe).read_to_end(&mut read).map(|_| read)
                })
                .await
            });
            assert_eq!(block_on(read).unwrap().unwrap().unwrap(), sent.bytes());
        }
    }

    #[test]
    fn a_receiver_that_does_not_read_ends_it() {
        let sent = secret(&vec![b'x'; LONGEST]);
        assert_eq!(block_on(send(&sent, async |pipe| drop(pipe))).unwrap(), ());
        assert_eq!(block_on(send(&sent, async |_pipe| 7)).unwrap(), 7);
    }
}
