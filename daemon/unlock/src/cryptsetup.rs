//! Runs cryptsetup. No secret is in its arguments or its environment.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Result, Write as _};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::process::ExitStatusExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use loopd_common::EncryptionType;
use loopd_common::text::printable;
use rustix::fs::{MemfdFlags, memfd_create};

use crate::input::Bytes;
use crate::reply::{Outcome, Reply};
use crate::request::{Keep, OpenRequest};
use crate::wait::{self, Woken};

/// Where distributions have it.
const PATHS: [&str; 3] = ["/usr/sbin/cryptsetup", "/sbin/cryptsetup", "/usr/bin/cryptsetup"];
/// How much of its output is used, in bytes.
const MOST_OUTPUT: usize = 4096;
/// How long a command that derives no key may take. It waits for udev, and tries to close a device for five seconds.
const SHORT: Duration = Duration::from_secs(20);
const SIGKILL: i32 = 9;

/// The path of cryptsetup, if it is installed.
#[must_use]
pub fn find() -> Option<PathBuf> {
    PATHS.iter().map(PathBuf::from).find(|path| path.exists())
}

/// What cryptsetup gets besides its arguments.
pub struct Inputs {
    /// The secret, or the passphrase.
    pub secret: Bytes,
    /// Key files of VeraCrypt.
    pub key_files: Vec<Bytes>,
    /// A detached header.
    pub header: Option<Bytes>,
}

/// How a command ended.
struct Ended {
    status: ExitStatus,
    output: String,
    errors: String,
}

/// Why a command has no result.
#[derive(Debug)]
pub enum Stopped {
    /// loopd has closed its end.
    Abandoned,
    /// It failed.
    Failed(Reply),
}

impl From<std::io::Error> for Stopped {
    fn from(error: std::io::Error) -> Self {
        Self::Failed(Reply::new(Outcome::Failed, error.to_string()))
    }
}

/// The program, and the socket whose hang-up ends it.
pub struct Cryptsetup<'a> {
    /// Its path.
    pub program: &'a Path,
    /// loopd's end being closed ends a command.
    pub loopd: BorrowedFd<'a>,
}

impl Cryptsetup<'_> {
    /// Opens a volume.
    ///
    /// # Errors
    /// It was not opened.
    pub fn open(
        &self,
        request: &OpenRequest,
        inputs: Inputs,
        end: Instant,
    ) -> std::result::Result<(), Stopped> {
        let mut command = self.command("open");
        command.args(open_options(request));
        // Open until the command has ended: it has the same numbers.
        let mut memory = Vec::new();
        for key_file in &inputs.key_files {
            memory.push(in_memory(key_file)?);
            command.arg(option_with_file("--key-file", memory.last()));
        }
        if let Some(header) = &inputs.header {
            memory.push(in_memory(header)?);
            command.arg(option_with_file("--header", memory.last()));
        }
        command.args(["--", &request.device, &request.name]);
        match self.run(command, Some(inputs.secret), end) {
            Ok(ended) if ended.status.success() => Ok(()),
            Ok(ended) => Err(Stopped::Failed(why_not_opened(&ended))),
            Err(stopped) => {
                // It may have got as far as making the mapping.
                let _result = self.undo(&request.name);
                Err(stopped)
            }
        }
    }

    /// The cipher of a mapping; `None` if it has none.
    ///
    /// # Errors
    /// It cannot be determined.
    pub fn cipher(&self, name: &str) -> std::result::Result<Option<String>, Stopped> {
        let mut command = self.command("status");
        command.args(["--", name]);
        let ended = self.run(command, None, Instant::now() + SHORT)?;
        if !ended.status.success() {
            return Err(Stopped::Failed(failed(&ended)));
        }
        let cipher = ended.output.lines().find_map(|line| line.trim_start().strip_prefix("cipher:"));
        Ok(cipher.map(|cipher| cipher.trim().to_owned()).filter(|cipher| !cipher.contains("null")))
    }

    /// Closes a mapping. One that is gone counts as closed.
    ///
    /// # Errors
    /// It is in use, or cannot be closed.
    pub fn close(&self, name: &str) -> std::result::Result<(), Stopped> {
        self.close_with(&[], name)
    }

    /// Sets when a mapping is closed. One that is gone counts as done.
    ///
    /// # Errors
    /// It cannot be set.
    pub fn keep(&self, name: &str, keep: Keep) -> std::result::Result<(), Stopped> {
        match keep {
            Keep::UntilLastClose => self.close_with(&["--deferred"], name),
            Keep::UntilClosed => self.close_with(&["--cancel-deferred"], name),
        }
    }

    /// Closes a mapping, with its last user if it is in use already.
    ///
    /// # Errors
    /// It cannot be closed.
    pub fn undo(&self, name: &str) -> std::result::Result<(), Stopped> {
        match self.close(name) {
            Err(Stopped::Failed(Reply { outcome: Outcome::InUse, .. })) => {
                self.keep(name, Keep::UntilLastClose)
            }
            closed => closed,
        }
    }

    fn close_with(&self, options: &[&str], name: &str) -> std::result::Result<(), Stopped> {
        let mut command = self.command("close");
        command.args(options).args(["--", name]);
        // Not ended with loopd: the mapping would stay.
        let ended = run(command, None, None, Instant::now() + SHORT)?;
        match ended.status.code() {
            Some(0 | 4) => Ok(()),
            Some(5) => Err(Stopped::Failed(Reply::new(Outcome::InUse, ended.errors))),
            _ => Err(Stopped::Failed(failed(&ended))),
        }
    }

    fn command(&self, action: &str) -> Command {
        let mut command = Command::new(self.program);
        command.env_clear().current_dir("/").arg(action);
        command
    }

    fn run(
        &self,
        command: Command,
        secret: Option<Bytes>,
        end: Instant,
    ) -> std::result::Result<Ended, Stopped> {
        run(command, secret, Some(self.loopd), end)
    }
}

fn open_options(request: &OpenRequest) -> Vec<String> {
    // No plugin that a header names is loaded.
    let mut options: Vec<String> =
        ["--batch-mode", "--tries=1", "--disable-external-tokens"].map(str::to_owned).into();
    let mut add = |is_wanted: bool, option: &str| {
        if is_wanted {
            options.push(option.to_owned());
        }
    };
    let kind = request.kind;
    add(kind == EncryptionType::Luks, "--type=luks");
    add(kind == EncryptionType::BitLocker, "--type=bitlk");
    add(is_tcrypt(kind), "--type=tcrypt");
    add(kind == EncryptionType::TrueCrypt, "--disable-veracrypt");
    // cryptsetup reads the passphrase of tcrypt as a line, if no key file is "-".
    add(!is_tcrypt(kind), "--key-file=-");
    add(request.read_only, "--readonly");
    add(request.discard, "--allow-discards");
    add(request.hidden, "--tcrypt-hidden");
    add(request.system, "--tcrypt-system");
    add(request.pim != 0, &format!("--veracrypt-pim={}", request.pim));
    options
}

/// Whether it is one of the types that cryptsetup calls tcrypt.
pub fn is_tcrypt(kind: EncryptionType) -> bool {
    matches!(kind, EncryptionType::VeraCrypt | EncryptionType::TrueCrypt)
}

/// A file in memory that a command inherits.
fn in_memory(bytes: &[u8]) -> Result<File> {
    let mut file = File::from(memfd_create("input", MemfdFlags::empty())?);
    file.write_all(bytes)?;
    Ok(file)
}

fn option_with_file(option: &str, file: Option<&File>) -> String {
    format!("{option}=/proc/self/fd/{}", file.map_or(-1, |file| file.as_raw_fd()))
}

/// Runs a command to its end. The end of the time, or of loopd, kills it.
fn run(
    mut command: Command,
    secret: Option<Bytes>,
    loopd: Option<BorrowedFd<'_>>,
    end: Instant,
) -> std::result::Result<Ended, Stopped> {
    let stdin = if secret.is_some() { Stdio::piped() } else { Stdio::null() };
    let mut child = command.stdin(stdin).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    if let (Some(secret), Some(mut stdin)) = (secret, child.stdin.take()) {
        // It may be longer than the pipe. A command that does not read it ends the writing when it ends.
        thread::Builder::new().name("secret".to_owned()).spawn(move || {
            let _closed = stdin.write_all(&secret);
        })?;
    }
    let texts = match read_output(&mut child, loopd, end) {
        Ok(texts) => texts,
        Err(stopped) => {
            let _already_ended = child.kill();
            child.wait()?;
            return Err(stopped);
        }
    };
    let [output, errors] = texts;
    Ok(Ended {
        status: child.wait()?,
        output: String::from_utf8_lossy(&output).into_owned(),
        errors: one_line(&errors),
    })
}

/// Reads standard output and standard error to their ends, and keeps the beginnings.
fn read_output(
    child: &mut Child,
    loopd: Option<BorrowedFd<'_>>,
    end: Instant,
) -> std::result::Result<[Vec<u8>; 2], Stopped> {
    let (Some(stdout), Some(stderr)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(std::io::Error::other("a command without output").into());
    };
    let mut files = [OwnedFd::from(stdout), OwnedFd::from(stderr)].map(|file| Some(File::from(file)));
    for file in files.iter().flatten() {
        rustix::io::ioctl_fionbio(file, true).map_err(std::io::Error::from)?;
    }
    let mut texts = [Vec::new(), Vec::new()];
    while files.iter().any(Option::is_some) {
        let open: Vec<BorrowedFd<'_>> = files.iter().flatten().map(AsFd::as_fd).collect();
        match wait::until_readable(&open, loopd, end)? {
            Woken::Ready => {}
            Woken::Abandoned => return Err(Stopped::Abandoned),
            Woken::TimedOut => {
                let reason = "cryptsetup has not ended in time";
                return Err(Stopped::Failed(Reply::new(Outcome::TimedOut, reason)));
            }
        }
        for (file, text) in files.iter_mut().zip(&mut texts) {
            read_some(file, text)?;
        }
    }
    Ok(texts)
}

/// Reads what there is, if there is something; a file that has ended becomes `None`.
fn read_some(file: &mut Option<File>, text: &mut Vec<u8>) -> Result<()> {
    let Some(open) = file else { return Ok(()) };
    let mut buffer = [0; 1024];
    let length = match open.read(&mut buffer) {
        Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
        read => read?,
    };
    if length == 0 {
        *file = None;
    }
    let kept = length.min(MOST_OUTPUT - text.len());
    text.extend_from_slice(&buffer[..kept]);
    Ok(())
}

/// What cryptsetup has printed, on one line and printable.
fn one_line(bytes: &[u8]) -> String {
    let lines: Vec<&[u8]> = bytes.split(|byte| *byte == b'\n').filter(|line| !line.is_empty()).collect();
    if lines.is_empty() { String::new() } else { printable(&lines.join(&b' ')) }
}

fn failed(ended: &Ended) -> Reply {
    let Ended { status, errors, .. } = ended;
    if errors.contains("nitialize device-mapper") || errors.contains("device-mapper driver") {
        return Reply::new(Outcome::NoDeviceMapper, errors);
    }
    Reply::new(
        Outcome::Failed,
        if errors.is_empty() { format!("cryptsetup: {status}") } else { errors.clone() },
    )
}

/// See "RETURN CODES" in cryptsetup(8), and `translate_errno` in its source.
fn why_not_opened(ended: &Ended) -> Reply {
    let errors = &ended.errors;
    let has = |words: &[&str]| words.iter().any(|word| errors.contains(word));
    // Only the kernel sends it here, if there is no memory left.
    if ended.status.signal() == Some(SIGKILL) {
        return Reply::new(Outcome::OutOfMemory, "the kernel has ended cryptsetup");
    }
    let outcome = match ended.status.code() {
        Some(2) if !has(&["device-mapper"]) => Outcome::WrongSecret,
        Some(3) => Outcome::OutOfMemory,
        Some(5) => Outcome::Taken,
        Some(1) if has(&["is not a valid"]) => Outcome::OtherType,
        Some(1) if has(&["upported", "equirement", "nvalid", "orrupt", "No usable keyslot"]) => {
            Outcome::UnusableHeader
        }
        _ => return failed(ended),
    };
    Reply::new(outcome, errors)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(status: i32, errors: &str) -> Ended {
        Ended { status: ExitStatus::from_raw(status), output: String::new(), errors: errors.to_owned() }
    }

    #[test]
    fn each_exit_status_has_its_outcome() {
        let not_luks = "Device /dev/loop0 is not a valid LUKS device.";
        let feature = "Device requires unsupported feature: Unmet LUKS2 requirements detected.";
        let no_driver = "Cannot initialize device-mapper. Is dm_mod kernel module loaded?";
        let no_access = "device-mapper: reload ioctl on loopd-1 (253:0) failed: Operation not permitted";
        for (status, errors, expected) in [
            (2 << 8, "No key available with this passphrase.", Outcome::WrongSecret),
            (2 << 8, no_access, Outcome::Failed),
            (3 << 8, "Not enough available memory to open a keyslot.", Outcome::OutOfMemory),
            (9, "", Outcome::OutOfMemory),
            (11, "", Outcome::Failed),
            (4 << 8, "Device /dev/loop0 does not exist or access denied.", Outcome::Failed),
            (5 << 8, "Device loopd-1 already exists.", Outcome::Taken),
            (1 << 8, not_luks, Outcome::OtherType),
            (1 << 8, feature, Outcome::UnusableHeader),
            (1 << 8, no_driver, Outcome::NoDeviceMapper),
            (1 << 8, "", Outcome::Failed),
        ] {
            let reply = why_not_opened(&ended(status, errors));
            assert_eq!(reply.outcome, expected, "{status} {errors}");
            assert!(!reply.detail.is_empty(), "{status} {errors}");
        }
    }

    #[test]
    fn what_is_printed_is_shown_on_one_line() {
        assert_eq!(one_line(b""), "");
        assert_eq!(one_line(b"one\ntwo\x1b[31m\n"), "one two\\u{1b}[31m");
        assert!(one_line(&[b'x'; MOST_OUTPUT]).chars().count() <= 201);
    }

    #[test]
    fn the_options_are_those_of_the_type() {
        let options = |kind, hidden| {
            open_options(&OpenRequest {
                kind,
                hidden,
                pim: if hidden { 485 } else { 0 },
                ..crate::tests::request()
            })
            .join(" ")
        };
        let common = "--batch-mode --tries=1 --disable-external-tokens";
        assert_eq!(options(EncryptionType::Luks, false), format!("{common} --type=luks --key-file=-"));
        assert_eq!(options(EncryptionType::BitLocker, false), format!("{common} --type=bitlk --key-file=-"));
        assert_eq!(
            options(EncryptionType::TrueCrypt, false),
            format!("{common} --type=tcrypt --disable-veracrypt")
        );
        assert_eq!(
            options(EncryptionType::VeraCrypt, true),
            format!("{common} --type=tcrypt --tcrypt-hidden --veracrypt-pim=485")
        );
    }

    #[test]
    fn a_command_that_prints_without_end_is_read() {
        let mut command = Command::new("/bin/sh");
        command.args(["-c", "head -c 1000000 /dev/zero >&2; echo done"]);
        let ended = run(command, None, None, Instant::now() + SHORT);
        let Ok(ended) = ended else { panic!("it has ended") };
        assert_eq!(ended.output, "done\n");
        assert!(ended.errors.len() <= 1300, "{}", ended.errors.len());
    }
}
