//! The service that unlocks encrypted volumes: a sandboxed program outside of the daemon.

use std::time::Duration;

use loopd_common::EncryptionType;

use crate::error::Error;
use crate::future::BoxFuture;

/// A request to unlock a volume. `F` is a descriptor of the caller ([`Kernel::File`](crate::kernel::Kernel::File)).
#[derive(Debug)]
pub struct UnlockRequest<F> {
    /// The secret, read to its end by the program that unlocks.
    pub secret: F,
    /// Key files of a VeraCrypt or TrueCrypt volume.
    pub key_files: Vec<F>,
    /// A detached LUKS header.
    pub header: Option<F>,
    /// How the volume is encrypted; `None` for what udev has found.
    pub kind: Option<EncryptionType>,
    /// Make the cleartext read-only; that of a read-only device always is.
    pub read_only: bool,
    /// Pass discards on to the backing file.
    pub discard: bool,
    /// Bytes of the secret to be used; 0 for all.
    pub key_size: u64,
    /// Bytes of the secret to be skipped.
    pub key_offset: u64,
    /// VeraCrypt's personal iterations multiplier; 0 for its default.
    pub pim: u32,
    /// Unlock the hidden volume.
    pub hidden: bool,
    /// Unlock a system partition.
    pub system: bool,
}

/// A volume to be unlocked.
#[derive(Debug)]
pub struct UnlockCommand<F> {
    /// The device node.
    pub device: String,
    /// The node and the backing file, for messages.
    pub shown: String,
    /// The name of the mapping to be made.
    pub name: String,
    /// How it is encrypted.
    pub kind: EncryptionType,
    /// What the caller wants.
    pub request: UnlockRequest<F>,
    /// How long the secret and the derivation of the key may take together.
    pub timeout: Duration,
}

/// Whether a mapping is closed with its last user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Closing {
    /// At its last close.
    AtLastClose,
    /// Only when it is locked.
    OnRequest,
}

/// A program that has read the secret to its end. It ends if this is dropped, and has made nothing.
pub trait Prepared: Send + 'static {
    /// Makes the mapping. Fails with `WrongSecret`, `InvalidArgs`, and `Busy` if the volume or the name is taken: nothing
    /// was made then. Fails with `NotSupported`, `Timeout`, `Kernel`: a mapping may be left. Dropping the future has the
    /// effect of dropping its result.
    fn open(self: Box<Self>) -> BoxFuture<'static, Result<Box<dyn Unlocked>, Error>>;
}

/// A mapping that was just made. It is closed again if this is dropped, also by the daemon's death; at its last close
/// if it is in use.
pub trait Unlocked: Send + 'static {
    /// Keeps the mapping.
    ///
    /// # Errors
    /// The program has ended, and the mapping may be left.
    fn keep(self: Box<Self>, closing: Closing) -> BoxFuture<'static, Result<(), Error>>;
}

/// Unlocks volumes.
pub trait Unlocker<F>: Send + Sync + 'static {
    /// Starts a program, and returns when it has read the secret, the key files and the header to their ends. Nothing
    /// was made if this fails: with `InvalidArgs` for a secret that cannot be read, `NotSupported` if a program or the
    /// service manager is missing, `Timeout`, `Busy`. Dropping the future has the effect of dropping its result.
    fn prepare(&self, command: UnlockCommand<F>) -> BoxFuture<'_, Result<Box<dyn Prepared>, Error>>;

    /// Ends a program that is still making the mapping with this name. The mapping may be left.
    fn end(&self, name: String, timeout: Duration) -> BoxFuture<'_, Result<(), Error>>;

    /// Closes a mapping, also one that is being made. Does nothing if it is gone. Fails with `Busy` if it is in use.
    fn close(&self, name: String, timeout: Duration) -> BoxFuture<'_, Result<(), Error>>;

    /// Sets when a mapping is closed. With `AtLastClose` one that is not in use is closed now. Does nothing if it is
    /// gone.
    fn set_closing(
        &self,
        name: String,
        closing: Closing,
        timeout: Duration,
    ) -> BoxFuture<'_, Result<(), Error>>;
}
