//! Unlocks volumes for the engine: a transient unit of the service manager runs the program `loopd-unlock`, which runs
//! cryptsetup. The daemon never reads a secret.

use std::os::fd::{AsFd as _, BorrowedFd};
use std::time::Duration;

use loopd_common::{CallerFile, EncryptionType};
use loopd_engine::{BoxFuture, Closing, Error, Prepared, UnlockCommand, UnlockRequest, Unlocked, Unlocker};
use loopd_unlock::{BEGIN, Keep, OpenRequest, Outcome, Reply, Request};
use zbus::Connection;

mod program;
mod sandbox;

use crate::systemd::Units;
use program::Program;

/// How much longer than it may take the program is waited for.
const SLACK: Duration = Duration::from_secs(15);
/// How long the program may take to keep a mapping that was just made.
const KEEP_TIMEOUT: Duration = Duration::from_secs(30);
/// The package that has the program which is missing.
const MISSING: &str =
    "cryptsetup is not installed; install it (Debian: cryptsetup-bin, Fedora and Arch: cryptsetup)";

/// Unlocks volumes in units of the service manager.
pub struct UnlockUnits {
    units: Units,
}

impl UnlockUnits {
    /// Uses the service manager on this bus.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn new(connection: &Connection) -> zbus::Result<Self> {
        Ok(Self { units: Units::new(connection).await? })
    }
}

/// A program that has read the secret.
struct PreparedProgram {
    program: Program,
    shown: String,
    timeout: Duration,
}

impl Prepared for PreparedProgram {
    fn open(self: Box<Self>) -> BoxFuture<'static, Result<Box<dyn Unlocked>, Error>> {
        Box::pin(async move {
            let Self { program, shown, timeout } = *self;
            done(&program, BEGIN, &[], timeout + SLACK, &shown).await?;
            Ok(Box::new(Pending { program, shown }) as Box<dyn Unlocked>)
        })
    }
}

/// Sends a message about an unlock. Any other reply than that it was done is an error.
async fn done(
    program: &Program,
    text: &str,
    files: &[BorrowedFd<'_>],
    timeout: Duration,
    shown: &str,
) -> Result<(), Error> {
    let operation = format!("unlock {shown}");
    match program.call(text, files, timeout, &operation).await? {
        Some(reply) if reply.outcome == Outcome::Done => Ok(()),
        Some(reply) => Err(failed(&reply, operation, shown)),
        None => Err(ended(operation)),
    }
}

/// A mapping that was just made, and the program that closes it if its channel is closed.
struct Pending {
    program: Program,
    shown: String,
}

impl Unlocked for Pending {
    fn keep(self: Box<Self>, closing: Closing) -> BoxFuture<'static, Result<(), Error>> {
        Box::pin(async move {
            done(&self.program, keep_of(closing).encode(), &[], KEEP_TIMEOUT, &self.shown).await
        })
    }
}

impl Unlocker<CallerFile> for UnlockUnits {
    fn prepare(&self, command: UnlockCommand<CallerFile>) -> BoxFuture<'_, Result<Box<dyn Prepared>, Error>> {
        Box::pin(async move {
            let UnlockCommand { device, shown, name, kind, request, timeout } = command;
            let operation = format!("unlock {shown}");
            let message = Request::Open(Box::new(open_request(&device, &name, kind, &request, timeout)));
            let program =
                Program::start(&self.units, &unlock_unit(&name), Some(device.as_str()), &operation).await?;
            let files = [Some(&request.secret), request.header.as_ref()].into_iter().flatten();
            let files: Vec<_> = files.chain(&request.key_files).map(|file| file.as_fd()).collect();
            done(&program, &message.encode(), &files, timeout + SLACK, &shown).await?;
            Ok(Box::new(PreparedProgram { program, shown, timeout }) as Box<dyn Prepared>)
        })
    }

    fn end(&self, name: String, timeout: Duration) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let unit = unlock_unit(&name);
            let ended = self.units.stop(&unit, timeout).await;
            ended.map_err(|error| error.to_error(&format!("end the unlock of {name}"), &unit, ""))
        })
    }

    fn close(&self, name: String, timeout: Duration) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let request = Request::Close(name.clone());
            short(&self.units, &request, &name, format!("close {name}"), timeout).await
        })
    }

    fn set_closing(
        &self,
        name: String,
        closing: Closing,
        timeout: Duration,
    ) -> BoxFuture<'_, Result<(), Error>> {
        Box::pin(async move {
            let request = Request::Keep(name.clone(), keep_of(closing));
            let operation = format!("change when {name} is closed");
            short(&self.units, &request, &name, operation, timeout).await
        })
    }
}

/// A request that needs no volume.
async fn short(
    units: &Units,
    request: &Request,
    name: &str,
    operation: String,
    timeout: Duration,
) -> Result<(), Error> {
    // A program that is still making the mapping ends first. One that does not end in time cannot go on either.
    let _result = units.stop(&unlock_unit(name), timeout).await;
    let unit = format!("loopd-lock-{}.service", suffix(name));
    let program = Program::start(units, &unit, None, &operation).await?;
    match program.call(&request.encode(), &[], timeout, &operation).await? {
        Some(reply) if reply.outcome == Outcome::Done => Ok(()),
        Some(reply) => Err(failed(&reply, operation, name)),
        None => Err(ended(operation)),
    }
}

/// The unit that makes a mapping.
fn unlock_unit(name: &str) -> String {
    format!("loopd-unlock-{}.service", suffix(name))
}

/// The part of a mapping's name that is in the names of its units.
fn suffix(name: &str) -> &str {
    name.strip_prefix("loopd-").unwrap_or(name)
}

fn keep_of(closing: Closing) -> Keep {
    match closing {
        Closing::AtLastClose => Keep::UntilLastClose,
        Closing::OnRequest => Keep::UntilClosed,
    }
}

fn open_request(
    device: &str,
    name: &str,
    kind: EncryptionType,
    request: &UnlockRequest<CallerFile>,
    timeout: Duration,
) -> OpenRequest {
    OpenRequest {
        device: device.to_owned(),
        name: name.to_owned(),
        kind,
        read_only: request.read_only,
        discard: request.discard,
        has_header: request.header.is_some(),
        key_size: request.key_size,
        key_offset: request.key_offset,
        pim: request.pim,
        hidden: request.hidden,
        system: request.system,
        timeout,
    }
}

/// The error if the program ends without a reply. Its unit's journal has the reason.
fn ended(operation: String) -> Error {
    let reason = "loopd-unlock has ended early; see \"journalctl -u 'loopd-unlock-*'\"".to_owned();
    Error::Failed { operation, reason }
}

/// The error for a reply other than that of a success.
fn failed(reply: &Reply, operation: String, volume: &str) -> Error {
    let detail = &reply.detail;
    let said = if detail.is_empty() { String::new() } else { format!(": {detail}") };
    match reply.outcome {
        Outcome::WrongSecret => Error::WrongSecret { volume: volume.to_owned() },
        Outcome::InvalidInput => Error::InvalidArgument { operation, reason: detail.clone() },
        Outcome::OtherType => {
            let reason = format!("it is not encrypted in the way that was asked for{said}");
            Error::InvalidArgument { operation, reason }
        }
        Outcome::TimedOut => Error::Timeout { operation, reason: detail.clone() },
        Outcome::OutOfMemory => {
            let reason = format!(
                "the derivation of its key needs more memory than it may use{said}; convert the key with \"cryptsetup \
                 luksConvertKey\", or have the administrator raise MemoryMax= (a drop-in for {})",
                unlock_unit("")
            );
            Error::NotSupported { operation, reason }
        }
        Outcome::UnusableHeader => {
            Error::NotSupported { operation, reason: format!("its header cannot be used{said}") }
        }
        Outcome::Taken => Error::Busy { operation, reason: format!("another program uses it{said}") },
        Outcome::InUse => Error::Busy { operation, reason: format!("it is in use{said}") },
        Outcome::NoProgram => Error::NotSupported { operation, reason: MISSING.to_owned() },
        Outcome::NoDeviceMapper => {
            Error::NotSupported { operation, reason: format!("the kernel has no device mapper{said}") }
        }
        Outcome::Done | Outcome::Failed => {
            Error::Failed { operation, reason: format!("cryptsetup failed{said}") }
        }
    }
}

#[cfg(test)]
mod tests {
    use loopd_common::ErrorKind;

    use super::*;

    #[test]
    fn each_outcome_has_its_error() {
        for (outcome, kind, part) in [
            (Outcome::WrongSecret, ErrorKind::WrongSecret, "does not unlock /dev/loop0 (/x.img)"),
            (Outcome::InvalidInput, ErrorKind::InvalidArgs, "cannot unlock /dev/loop0 (/x.img): detail"),
            (Outcome::OtherType, ErrorKind::InvalidArgs, "asked for: detail"),
            (Outcome::TimedOut, ErrorKind::Timeout, "detail"),
            (Outcome::OutOfMemory, ErrorKind::NotSupported, "a drop-in for loopd-unlock-.service"),
            (Outcome::UnusableHeader, ErrorKind::NotSupported, "header cannot be used: detail"),
            (Outcome::Taken, ErrorKind::Busy, "another program uses it: detail"),
            (Outcome::InUse, ErrorKind::Busy, "it is in use: detail"),
            (Outcome::NoProgram, ErrorKind::NotSupported, "cryptsetup-bin"),
            (Outcome::NoDeviceMapper, ErrorKind::NotSupported, "device mapper: detail"),
            (Outcome::Failed, ErrorKind::Kernel, "cryptsetup failed: detail"),
        ] {
            let volume = "/dev/loop0 (/x.img)";
            let error = failed(&Reply::new(outcome, "detail"), format!("unlock {volume}"), volume);
            assert_eq!(error.kind(), kind, "{error}");
            assert!(error.to_string().contains(part), "{error}");
        }
    }

    #[test]
    fn units_are_named_after_the_mapping() {
        assert_eq!(suffix("loopd-11p3"), "11p3");
        assert_eq!(suffix("other"), "other");
    }
}
