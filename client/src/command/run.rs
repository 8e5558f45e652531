//! `loopctl run`.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::process::ExitStatus;

use anyhow::Context;
use loopd_dbus::proxy::Interaction;
use loopd_dbus::{Error, ErrorKind as BusErrorKind, Lifetime, Overlap};
use nix::sys::signal::{Signal as Number, kill};
use nix::unistd::{Pid, dup};
use tokio::process::{Child, Command};
use tokio::signal::unix::{Signal, SignalKind, signal};
use zbus::wire::OwnedObjectPath;

use super::attach;
use super::release::release;
use crate::advice::Operation;
use crate::bus::agent::{Interrupted, interruptible, interruption, with_agent};
use crate::bus::attachment::{self, AttachmentInfo, find_new};
use crate::bus::connection::Bus;
use crate::bus::error::is_busy;
use crate::cli::Run;
use crate::image::unlock::{UnlockRequest, lock, unlock};
use crate::image::volume::choose_encrypted;
use crate::message::{message, printable, reason};
use crate::report::report;

/// A shell's exit status for a command that cannot be executed.
const NOT_EXECUTABLE: u8 = 126;
/// A shell's exit status for a command that is not found.
const NOT_FOUND: u8 = 127;

/// Attaches the file, runs the command, detaches; returns the command's exit status.
pub async fn run(args: &Run, interaction: Interaction) -> anyhow::Result<u8> {
    // First: reading a FIFO may wait, and a signal then ends loopctl at once.
    let unlock_request = unlock_request(args, interaction)?;
    let file = attach::backing_file(&args.attach)?;
    let (bus, socket) = Bus::open_shared(interaction).await?;
    let options = attach::options(&args.attach, Lifetime::Client);
    let (path, device) = with_agent(interaction, bus.attach(&file, &options)).await?;
    let is_own = if args.attach.overlap == Overlap::Reuse {
        let info = find_new(&bus.manager, &file, &path, &device).await?;
        attach::warn_of(&options, &info.attachment);
        is_bound_to(&bus, &info)
    } else {
        attach::check(&bus, &options, &path).await;
        true
    };
    // The command does not inherit the file.
    drop(file);
    let cleartext = match &unlock_request {
        Some(request) => Some(unlock_volume(&bus, args, &path, request).await),
        None => None,
    };
    let status = match &cleartext {
        Some(Ok((volume, cleartext))) => {
            let status = execute(&args.command, cleartext, &socket).await;
            lock_volume(&bus, volume).await;
            status
        }
        None => execute(&args.command, &device, &socket).await,
        Some(Err(_)) => Ok(1),
    };
    if is_own {
        tokio::select! {
            () = release(&bus, &path, &device) => {}
            // The end of the connection detaches it as well, without waiting for that.
            _ = interruption()? => {}
        }
    }
    // Shut down, not just closed: processes that the command left running may still hold the socket.
    let _ = bus.connection.close().await;
    cleartext.transpose()?;
    status
}

/// The request of --unlock.
fn unlock_request(args: &Run, interaction: Interaction) -> anyhow::Result<Option<UnlockRequest<'_>>> {
    let Run { attach, unlock, encryption, encryption_type, .. } = args;
    if let (false, Some(option)) = (unlock, encryption.given()) {
        return Err(Error::new(BusErrorKind::InvalidArgs, format!("{option} needs --unlock")).into());
    }
    let request = || UnlockRequest::new(encryption, *encryption_type, attach.read_only, interaction);
    unlock.then(request).transpose()
}

/// Unlocks the volume; returns its object and the device with its cleartext. If that fails, locks it.
async fn unlock_volume(
    bus: &Bus,
    args: &Run,
    attachment: &OwnedObjectPath,
    request: &UnlockRequest<'_>,
) -> anyhow::Result<(OwnedObjectPath, String)> {
    let info = attachment::find(bus, attachment).await?;
    let info = info.ok_or_else(|| anyhow::anyhow!("it was attached, but has been detached since"))?;
    let volume = choose_encrypted(&info, args.partition)?;
    let result = interruptible(with_agent(bus.interaction, unlock(bus, &info, &volume, request))).await;
    if result.as_ref().is_err_and(|error| error.is::<Interrupted>()) {
        // loopd answers this call after the one that was interrupted.
        let _ = lock(bus, volume.path, true).await;
    }
    Ok((volume.path.clone(), result?.1))
}

/// Locks the volume; lazily if its cleartext is in use. A failure does not fail the command.
async fn lock_volume(bus: &Bus, volume: &OwnedObjectPath) {
    let mut result = lock(bus, volume, false).await;
    if let Err(error) = &result
        && is_busy(error)
    {
        report(error, Operation::Other);
        message("it will be locked when it is no longer in use");
        result = lock(bus, volume, true).await;
    }
    if let Err(error) = result {
        report(&error, Operation::Other);
    }
}

/// Whether the attachment is bound to this connection, that is, was not reused.
fn is_bound_to(bus: &Bus, info: &AttachmentInfo) -> bool {
    let name = bus.connection.unique_name().map(|name| name.as_str());
    name == Some(info.attachment.client.as_str())
}

async fn execute(command: &[OsString], device: &str, socket: &UnixStream) -> anyhow::Result<u8> {
    let signals = Signals::new().context("cannot handle signals")?;
    // dup() leaves CLOEXEC off, so the command inherits the socket of the bus connection. The
    // attachment lives as long as the connection, and the connection as long as a process holds the
    // socket: the command keeps its device even if loopctl is killed (flock(1) passes on its lock
    // descriptor in the same way).
    let inherited = dup(socket).context("cannot duplicate the bus connection's socket")?;
    let command: Vec<OsString> = command.iter().map(|argument| replace_device(argument, device)).collect();
    let Some((program, arguments)) = command.split_first() else { return Ok(NOT_FOUND) };
    let child = Command::new(program).args(arguments).env("LOOPCTL_DEVICE", device).spawn();
    drop(inherited);
    let status = match child {
        Ok(child) => wait(child, signals).await.context("cannot wait for the command")?,
        Err(error) => return Ok(not_started(program, &error)),
    };
    Ok(exit_status(status))
}

fn not_started(program: &OsStr, error: &io::Error) -> u8 {
    let (status, remedy) = match error.kind() {
        ErrorKind::NotFound => (NOT_FOUND, "check its name and PATH"),
        _ => (NOT_EXECUTABLE, "it must be a program, or a script with #!, that you may execute"),
    };
    message(&format!("cannot run {}: {}; {remedy}", printable(program.as_bytes()), reason(error)));
    status
}

/// The command's exit status as a shell returns it.
fn exit_status(status: ExitStatus) -> u8 {
    let number = status.code().or_else(|| status.signal().map(|signal| 128 + signal));
    number.and_then(|number| u8::try_from(number).ok()).unwrap_or(1)
}

/// The argument with each `{}` replaced.
fn replace_device(argument: &OsStr, device: &str) -> OsString {
    let mut replaced = Vec::new();
    let mut rest = argument.as_bytes();
    while let Some(at) = rest.windows(2).position(|pair| pair == b"{}") {
        replaced.extend_from_slice(&rest[..at]);
        replaced.extend_from_slice(device.as_bytes());
        rest = &rest[at + 2..];
    }
    replaced.extend_from_slice(rest);
    OsString::from_vec(replaced)
}

async fn wait(mut child: Child, mut signals: Signals) -> io::Result<ExitStatus> {
    loop {
        tokio::select! {
            status = child.wait() => return status,
            signal = signals.next() => forward(&child, signal),
        }
    }
}

fn forward(child: &Child, signal: Option<Number>) {
    let pid = child.id().and_then(|pid| i32::try_from(pid).ok());
    if let (Some(signal), Some(pid)) = (signal, pid) {
        let _ = kill(Pid::from_raw(pid), signal);
    }
}

/// The signals that must not end loopctl before the command exits.
struct Signals {
    interrupt: Option<Signal>,
    quit: Option<Signal>,
    terminate: Option<Signal>,
    hangup: Option<Signal>,
}

impl Signals {
    fn new() -> io::Result<Self> {
        // A signal that was ignored when loopctl was started (nohup, a background job) must be ignored in the
        // command, too. exec(2) resets handled signals, but not ignored ones.
        let ignored = ignored_signals(&fs::read_to_string("/proc/self/status").unwrap_or_default());
        let take = |kind: SignalKind| match ignored & (1 << (kind.as_raw_value() - 1)) {
            0 => signal(kind).map(Some),
            _ => Ok(None),
        };
        Ok(Self {
            interrupt: take(SignalKind::interrupt())?,
            quit: take(SignalKind::quit())?,
            terminate: take(SignalKind::terminate())?,
            hangup: take(SignalKind::hangup())?,
        })
    }

    /// The next signal if it must be forwarded: the terminal sends SIGINT and SIGQUIT to the command
    /// itself.
    async fn next(&mut self) -> Option<Number> {
        tokio::select! {
            () = receive(&mut self.interrupt) => None,
            () = receive(&mut self.quit) => None,
            () = receive(&mut self.terminate) => Some(Number::SIGTERM),
            () = receive(&mut self.hangup) => Some(Number::SIGHUP),
        }
    }
}

async fn receive(signal: &mut Option<Signal>) {
    if let Some(signal) = signal
        && signal.recv().await.is_some()
    {
        return;
    }
    std::future::pending().await
}

/// Parses the mask of ignored signals in /proc/PID/status.
fn ignored_signals(status: &str) -> u64 {
    let mask = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    mask.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::bus::example;
    use crate::bus::fake::FakeLoopd;
    use crate::cli::{Cli, Verb};

    #[test]
    fn braces_are_replaced_by_the_device() {
        for (argument, replaced) in [
            ("{}", "/dev/loop3"),
            ("if={}", "if=/dev/loop3"),
            ("{}p1,{}p2", "/dev/loop3p1,/dev/loop3p2"),
            ("{ }", "{ }"),
            ("{{}}", "{/dev/loop3}"),
            ("", ""),
        ] {
            assert_eq!(replace_device(OsStr::new(argument), "/dev/loop3"), OsStr::new(replaced));
        }
        let bytes = OsString::from_vec(b"\xff{}".to_vec());
        assert_eq!(replace_device(&bytes, "d").as_bytes(), b"\xffd");
    }

    #[test]
    fn exit_statuses_are_those_of_a_shell() {
        assert_eq!(exit_status(ExitStatus::from_raw(0)), 0);
        assert_eq!(exit_status(ExitStatus::from_raw(3 << 8)), 3);
        assert_eq!(exit_status(ExitStatus::from_raw(255 << 8)), 255);
        assert_eq!(exit_status(ExitStatus::from_raw(9)), 137);
        assert_eq!(not_started(OsStr::new("x"), &ErrorKind::NotFound.into()), 127);
        assert_eq!(not_started(OsStr::new("x"), &ErrorKind::PermissionDenied.into()), 126);
    }

    #[test]
    fn ignored_signals_are_parsed() {
        let status = "Name:\tx\nSigBlk:\t0000000000000000\nSigIgn:\t0000000000001001\nSigCgt:\t02\n";
        assert_eq!(ignored_signals(status), 0x1001);
        assert_eq!(ignored_signals(""), 0);
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    fn run_arguments(line: &str) -> Run {
        match Cli::try_parse_from(line.split(' ')).map(|cli| cli.verb) {
            Ok(Verb::Run(run)) => run,
            other => panic!("{line}: {other:?}"),
        }
    }

    #[test]
    fn the_volume_of_unlock_is_unlocked_and_locked() {
        let key = tempfile::NamedTempFile::new().unwrap();
        fs::write(key.path(), "secret").unwrap();
        let line = format!("loopctl run x.img --unlock --key-file {} -- true", key.path().display());
        let args = run_arguments(&line);
        let request = unlock_request(&args, Interaction::Forbidden).unwrap().unwrap();
        let mut info = example::attachment();
        info.partitions[0].volume.usage = "crypto".to_owned();
        let loopd = FakeLoopd::new(info.clone());
        loopd.state().is_attached = true;
        block_on(async {
            let bus = loopd.connect().await;
            let (volume, device) = unlock_volume(&bus, &args, &info.path, &request).await.unwrap();
            assert_eq!(device, "/dev/dm-3");
            lock_volume(&bus, &volume).await;
        });
        assert_eq!(loopd.state().calls, ["Unlock 12/p1", "Lock 12/p1"]);
    }

    #[test]
    fn options_of_unlock_need_it() {
        let args = run_arguments("loopctl run x.img --key-file k -- true");
        let error = unlock_request(&args, Interaction::Forbidden).err().unwrap();
        assert_eq!(error.to_string(), "--key-file needs --unlock");
        assert!(
            unlock_request(&run_arguments("loopctl run x.img -- true"), Interaction::Forbidden)
                .unwrap()
                .is_none()
        );
    }

    #[test]
    fn descendants_of_the_command_keep_the_socket_open() {
        let directory = tempfile::tempdir().unwrap();
        let gate = directory.path().join("gate");
        nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let (local, remote) = UnixStream::pair().unwrap();
        let mut command = ["sh", "-c", "cat \"$0\" & exit 7"].map(OsString::from).to_vec();
        command.push(gate.clone().into());
        assert_eq!(block_on(execute(&command, "/dev/loop3", &remote)).unwrap(), 7);
        drop(remote);

        local.set_nonblocking(true).unwrap();
        let error = io::Read::read(&mut &local, &mut [0]).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::WouldBlock, "cat does not hold the socket");
        local.set_nonblocking(false).unwrap();
        fs::write(&gate, "").unwrap();
        assert_eq!(io::Read::read(&mut &local, &mut [0]).unwrap(), 0);
    }

    #[test]
    fn the_command_receives_the_device() {
        let (_local, remote) = UnixStream::pair().unwrap();
        let command =
            ["sh", "-c", "test \"$LOOPCTL_DEVICE\" = /dev/loop3 && test \"$1\" = /dev/loop3", "sh", "{}"];
        let status = block_on(execute(&command.map(OsString::from), "/dev/loop3", &remote)).unwrap();
        assert_eq!(status, 0);
        let missing = ["/nonexistent/program"].map(OsString::from);
        assert_eq!(block_on(execute(&missing, "/dev/loop3", &remote)).unwrap(), 127);
    }
}
