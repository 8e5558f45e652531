//! Waiting for a descriptor in the event loop.
#![allow(unsafe_code)]

use std::io::{Error, Result};
use std::os::fd::{AsFd, OwnedFd};

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// The readiness of an open file, through a duplicate of its descriptor.
pub struct Readiness {
    duplicate: AsyncFd<OwnedFd>,
    interest: Interest,
}

impl Readiness {
    /// Watches the open file for `interest`.
    ///
    /// # Errors
    /// No descriptor is free, or the file cannot be polled.
    pub fn watch(file: &impl AsFd, interest: Interest) -> Result<Self> {
        let duplicate = file.as_fd().try_clone_to_owned()?;
        // SAFETY: an `OwnedFd` has the same open descriptor until it is dropped, and the `AsyncFd` that owns
        // it unregisters it before.
        let duplicate =
            unsafe { AsyncFd::register_with_interest(duplicate, interest) }.map_err(Error::from)?;
        Ok(Self { duplicate, interest })
    }

    /// Waits until the file has become ready since the last call.
    ///
    /// # Errors
    /// The event loop has stopped.
    pub async fn wait(&self) -> Result<()> {
        self.duplicate.ready(self.interest).await?.clear_ready();
        Ok(())
    }
}
