//! The program against a fake cryptsetup, and against the real one where it is installed.

use std::fs::{self, File, Permissions};
use std::io::Write as _;
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use loopd_common::EncryptionType;
use loopd_test_support::skipped;
use rustix::fs::{MemfdFlags, memfd_create};
use tempfile::TempDir;

use crate::channel;
use crate::reply::{Outcome, Reply};
use crate::request::{BEGIN, Keep, OpenRequest, Request};
use crate::serve::serve;

/// A request for a LUKS volume.
pub fn request() -> OpenRequest {
    OpenRequest {
        device: "/dev/loop0".to_owned(),
        name: "loopd-11".to_owned(),
        kind: EncryptionType::Luks,
        read_only: false,
        discard: false,
        has_header: false,
        key_size: 0,
        key_offset: 0,
        pim: 0,
        hidden: false,
        system: false,
        timeout: Duration::from_secs(20),
    }
}

/// A script in the place of cryptsetup, which writes down how it is called.
struct Fake {
    directory: TempDir,
}

impl Fake {
    /// `open` runs the lines; everything else succeeds, and a mapping has a cipher.
    fn new(open: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let script = format!(
            "#!/bin/sh\nPATH=/usr/bin:/bin\ncd '{}'\necho \"$*\" >>calls\n\
             case $1 in\nopen)\n{open}\n;;\nstatus) echo '  cipher:  '\"$(cat cipher)\" ;;\nesac\n",
            directory.path().display()
        );
        let fake = Self { directory };
        fs::write(fake.file("cipher"), "aes-xts-plain64").unwrap();
        fs::write(fake.program(), script).unwrap();
        fs::set_permissions(fake.program(), Permissions::from_mode(0o755)).unwrap();
        fake
    }

    fn file(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn program(&self) -> PathBuf {
        self.file("cryptsetup")
    }

    fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.file("calls")).unwrap_or_default();
        calls.lines().map(str::to_owned).collect()
    }

    fn start(&self) -> Running {
        Running::start(Some(self.program()))
    }

    fn reply(&self, request: &OpenRequest, files: Vec<OwnedFd>) -> Reply {
        self.start().open(request, files)
    }
}

/// The program with loopd's end of its channel.
struct Running {
    loopd: OwnedFd,
    served: JoinHandle<std::io::Result<()>>,
}

impl Running {
    fn start(program: Option<PathBuf>) -> Self {
        let (loopd, ours) = channel::pair().unwrap();
        Self { loopd, served: thread::spawn(move || serve(&ours, program.as_deref())) }
    }

    fn send(&self, request: &Request, files: Vec<OwnedFd>) {
        let borrowed: Vec<_> = files.iter().map(OwnedFd::as_fd).collect();
        channel::send(&self.loopd, &request.encode(), &borrowed).unwrap();
    }

    fn receive(&self) -> Reply {
        let (text, files) = channel::receive(&self.loopd).unwrap().unwrap();
        assert!(files.is_empty());
        Reply::decode(&text).unwrap()
    }

    /// The reply after the inputs.
    fn prepare(&self, request: &OpenRequest, files: Vec<OwnedFd>) -> Reply {
        self.send(&Request::Open(Box::new(request.clone())), files);
        self.receive()
    }

    /// The last reply.
    fn open(&self, request: &OpenRequest, files: Vec<OwnedFd>) -> Reply {
        let prepared = self.prepare(request, files);
        if prepared.outcome == Outcome::Done { self.begin(BEGIN) } else { prepared }
    }

    fn begin(&self, text: &str) -> Reply {
        channel::send(&self.loopd, text, &[]).unwrap();
        self.receive()
    }

    fn keep(&self, keep: Keep) -> Reply {
        channel::send(&self.loopd, keep.encode(), &[]).unwrap();
        self.receive()
    }

    /// loopd ends, and then the program.
    fn end(self) {
        drop(self.loopd);
        self.served.join().unwrap().unwrap();
    }
}

fn memory(bytes: &[u8]) -> OwnedFd {
    let mut file = File::from(memfd_create("test", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(bytes).unwrap();
    rustix::fs::seek(&file, rustix::fs::SeekFrom::Start(0)).unwrap();
    file.into()
}

/// Fakes a success that writes down the secret.
const SAVE: &str = "cat >secret";

#[test]
fn the_exact_bytes_of_the_secret_are_passed_on() {
    for secret in [&b"one\n\nline\n"[..], b"\0\xff\n\0", &[0; 200_000], &vec![b'x'; 8 << 20]] {
        let fake = Fake::new(SAVE);
        let program = fake.start();
        assert_eq!(program.open(&request(), vec![memory(secret)]), Reply::done());
        assert_eq!(program.keep(Keep::UntilClosed), Reply::done());
        program.end();
        assert!(fs::read(fake.file("secret")).unwrap() == secret, "{} bytes", secret.len());
        let calls = fake.calls();
        assert_eq!(calls.len(), 2, "{calls:?}");
        assert!(calls[0].ends_with("--type=luks --key-file=- -- /dev/loop0 loopd-11"), "{calls:?}");
        assert_eq!(calls[1], "status -- loopd-11");
    }
}

#[test]
fn a_secret_may_come_in_parts() {
    let fake = Fake::new(SAVE);
    let program = fake.start();
    let (reader, writer) = std::io::pipe().unwrap();
    let slow = thread::spawn(move || {
        for part in ["pass", "word"] {
            thread::sleep(Duration::from_millis(50));
            (&writer).write_all(part.as_bytes()).unwrap();
        }
    });
    assert_eq!(program.open(&request(), vec![reader.into()]), Reply::done());
    program.end();
    slow.join().unwrap();
    assert_eq!(fs::read(fake.file("secret")).unwrap(), b"password");
}

#[test]
fn secrets_that_cannot_be_used_never_reach_cryptsetup() {
    let fake = Fake::new(SAVE);
    let (closed, _) = std::io::pipe().unwrap();
    let sparse = tempfile::tempfile().unwrap();
    sparse.set_len(1 << 30).unwrap();
    let open = |path: &str| OwnedFd::from(File::open(path).unwrap());
    let for_writing = File::options().write(true).open("/dev/null").unwrap();
    let path_only =
        rustix::fs::open("/dev/null", rustix::fs::OFlags::PATH, rustix::fs::Mode::empty()).unwrap();
    for (secret, reason) in [
        (closed.into(), "the secret is empty"),
        (memory(b""), "the secret is empty"),
        (open("/dev/null"), "the secret is empty"),
        (open("/"), "the secret cannot be read: Is a directory"),
        (for_writing.into(), "the secret cannot be read: Bad file descriptor"),
        (path_only, "the secret cannot be read: Bad file descriptor"),
        (memory(&vec![b'x'; (8 << 20) + 1]), "the secret has more than 8388608 bytes"),
        (sparse.into(), "the secret has more than 8388608 bytes"),
        (open("/dev/zero"), "the secret has more than 8388608 bytes"),
    ] {
        let reply = fake.reply(&request(), vec![secret]);
        assert_eq!(reply.outcome, Outcome::InvalidInput, "{reply:?}");
        assert!(reply.detail.starts_with(reason), "{reply:?}");
    }
    assert_eq!(fake.reply(&request(), Vec::new()).detail, "there is no secret");
    assert!(fake.calls().is_empty());
}

#[test]
fn a_secret_that_does_not_end_is_given_up() {
    let fake = Fake::new(SAVE);
    let (reader, writer) = std::io::pipe().unwrap();
    (&writer).write_all(b"begin").unwrap();
    let begin = Instant::now();
    let reply =
        fake.reply(&OpenRequest { timeout: Duration::from_millis(300), ..request() }, vec![reader.into()]);
    assert_eq!(reply.outcome, Outcome::TimedOut);
    assert!(begin.elapsed() >= Duration::from_millis(300) && begin.elapsed() < Duration::from_secs(5));
    assert!(fake.calls().is_empty());
}

#[test]
fn the_program_ends_with_loopd_while_it_reads() {
    let fake = Fake::new(SAVE);
    let program = fake.start();
    let (reader, _writer) = std::io::pipe().unwrap();
    program.send(&Request::Open(Box::new(request())), vec![reader.into()]);
    program.end();
    assert!(fake.calls().is_empty());
}

#[test]
fn cryptsetup_runs_only_after_loopd_has_checked_the_volume() {
    let fake = Fake::new(SAVE);
    let program = fake.start();
    assert_eq!(program.prepare(&request(), vec![memory(b"pass")]), Reply::done());
    program.end();
    assert!(fake.calls().is_empty(), "loopd has not begun");

    let program = fake.start();
    assert_eq!(program.prepare(&request(), vec![memory(b"pass")]), Reply::done());
    assert_eq!(program.begin("keep").outcome, Outcome::Failed);
    program.end();
    assert!(fake.calls().is_empty(), "another message");

    // The time until then does not count.
    let request = OpenRequest { timeout: Duration::from_millis(1500), ..request() };
    let program = fake.start();
    assert_eq!(program.prepare(&request, vec![memory(b"pass")]), Reply::done());
    thread::sleep(Duration::from_millis(1600));
    assert_eq!(program.begin(BEGIN), Reply::done());
    program.end();
}

#[test]
fn a_part_of_the_secret_may_be_used() {
    let part = |key_offset, key_size| OpenRequest { key_offset, key_size, ..request() };
    for (key_offset, key_size, expected) in [(2, 0, "cdef"), (0, 2, "ab"), (3, 3, "def")] {
        let fake = Fake::new(SAVE);
        assert_eq!(fake.reply(&part(key_offset, key_size), vec![memory(b"abcdef")]), Reply::done());
        assert_eq!(fs::read_to_string(fake.file("secret")).unwrap(), expected);
    }
    let fake = Fake::new(SAVE);
    for (key_offset, key_size) in [(6, 0), (7, 0), (0, 7), (5, 2), (u64::MAX, 1), (1, u64::MAX)] {
        let reply = fake.reply(&part(key_offset, key_size), vec![memory(b"abcdef")]);
        assert_eq!(reply.outcome, Outcome::InvalidInput, "{key_offset} {key_size}");
    }
    assert!(fake.calls().is_empty());
}

#[test]
fn header_and_key_files_are_copies_in_memory() {
    let fake = Fake::new(
        "cat >secret\nfor argument; do case $argument in\n\
         --header=*) cat \"${argument#*=}\" >header ;;\n--key-file=*) cat \"${argument#*=}\" >>keys ;;\nesac; done",
    );
    let request = OpenRequest { kind: EncryptionType::VeraCrypt, has_header: true, ..request() };
    let files = [&b"pass"[..], b"HEADER", b"one,", b"two"].map(memory).into();
    assert_eq!(fake.reply(&request, files), Reply::done());
    let read = |name: &str| fs::read_to_string(fake.file(name)).unwrap();
    assert_eq!(
        (read("secret").as_str(), read("header").as_str(), read("keys").as_str()),
        ("pass\n", "HEADER", "one,two")
    );
}

#[test]
fn a_passphrase_of_veracrypt_is_a_line() {
    let veracrypt = OpenRequest { kind: EncryptionType::VeraCrypt, ..request() };
    let fake = Fake::new(SAVE);
    assert_eq!(fake.reply(&veracrypt, vec![memory(b""), memory(b"key")]), Reply::done());
    assert_eq!(fs::read(fake.file("secret")).unwrap(), b"\n");
    for secret in [&b""[..], b"a\nb"] {
        assert_eq!(fake.reply(&veracrypt, vec![memory(secret)]).outcome, Outcome::InvalidInput);
    }
}

#[test]
fn a_mapping_without_a_cipher_is_closed_again() {
    for cipher in ["cipher_null-ecb", "\n"] {
        let fake = Fake::new(SAVE);
        fs::write(fake.file("cipher"), cipher).unwrap();
        if cipher == "\n" {
            let script = fs::read_to_string(fake.program()).unwrap().replace("  cipher:  ", "");
            fs::write(fake.program(), script).unwrap();
        }
        let reply = fake.reply(&request(), vec![memory(b"pass")]);
        assert_eq!(reply.outcome, Outcome::UnusableHeader, "{reply:?}");
        assert_eq!(fake.calls().last().unwrap(), "close -- loopd-11");
    }
}

#[test]
fn what_loopd_does_not_keep_is_closed() {
    let fake = Fake::new(SAVE);
    let program = fake.start();
    assert_eq!(program.open(&request(), vec![memory(b"pass")]), Reply::done());
    program.end();
    assert_eq!(fake.calls()[2..], ["close -- loopd-11"]);
}

#[test]
fn what_loopd_keeps_stays() {
    for (keep, expected) in
        [(Keep::UntilLastClose, &["close --deferred -- loopd-11"][..]), (Keep::UntilClosed, &[])]
    {
        let fake = Fake::new(SAVE);
        let program = fake.start();
        assert_eq!(program.open(&request(), vec![memory(b"pass")]), Reply::done());
        assert_eq!(program.keep(keep), Reply::done());
        program.end();
        assert_eq!(fake.calls()[2..], *expected);
    }
}

#[test]
fn cryptsetup_ends_with_its_time_and_with_loopd() {
    let hangs = "cat >secret\nexec sleep 60";
    let fake = Fake::new(hangs);
    let begin = Instant::now();
    let reply =
        fake.reply(&OpenRequest { timeout: Duration::from_millis(500), ..request() }, vec![memory(b"pass")]);
    assert_eq!(
        (reply.outcome, reply.detail.as_str()),
        (Outcome::TimedOut, "cryptsetup has not ended in time")
    );

    let abandoned = Fake::new(hangs);
    let program = abandoned.start();
    assert_eq!(program.prepare(&request(), vec![memory(b"pass")]), Reply::done());
    channel::send(&program.loopd, BEGIN, &[]).unwrap();
    while abandoned.calls().is_empty() {
        thread::sleep(Duration::from_millis(10));
    }
    program.end();
    assert!(begin.elapsed() < Duration::from_secs(20));
    for fake in [fake, abandoned] {
        assert_eq!(fake.calls().last().unwrap(), "close -- loopd-11");
    }
}

#[test]
fn a_failure_is_reported_with_what_cryptsetup_says() {
    for (script, outcome, detail) in [
        (
            "echo 'No key available with this passphrase.' >&2; exit 2",
            Outcome::WrongSecret,
            "No key available",
        ),
        ("kill -KILL $$", Outcome::OutOfMemory, "the kernel has ended cryptsetup"),
        ("exit 3", Outcome::OutOfMemory, ""),
        (
            "echo 'Device loopd-11 already exists.' >&2; exit 5",
            Outcome::Taken,
            "Device loopd-11 already exists.",
        ),
        ("printf 'a\\033[31m\\nb' >&2; exit 9", Outcome::Failed, "a\\u{1b}[31m b"),
    ] {
        let reply = Fake::new(script).reply(&request(), vec![memory(b"pass")]);
        assert_eq!(reply.outcome, outcome, "{script}");
        assert!(reply.detail.starts_with(detail), "{script}: {reply:?}");
    }
    let nothing = Running::start(None).open(&request(), vec![memory(b"pass")]);
    assert_eq!(nothing.outcome, Outcome::NoProgram);
    let missing = Running::start(Some("/nonexistent".into())).open(&request(), vec![memory(b"pass")]);
    assert_eq!(missing.outcome, Outcome::Failed);
}

#[test]
fn mappings_are_closed_and_changed_on_request() {
    let name = || "loopd-11p1".to_owned();
    for (request, call) in [
        (Request::Close(name()), "close -- loopd-11p1"),
        (Request::Keep(name(), Keep::UntilLastClose), "close --deferred -- loopd-11p1"),
        (Request::Keep(name(), Keep::UntilClosed), "close --cancel-deferred -- loopd-11p1"),
    ] {
        for (status, outcome) in
            [(0, Outcome::Done), (4, Outcome::Done), (5, Outcome::InUse), (1, Outcome::Failed)]
        {
            let fake = Fake::new("");
            let script = fs::read_to_string(fake.program()).unwrap();
            fs::write(fake.program(), script.replace("\nesac", &format!("\nclose) exit {status} ;;\nesac")))
                .unwrap();
            let program = fake.start();
            program.send(&request, Vec::new());
            assert_eq!(program.receive().outcome, outcome, "{status}");
            program.end();
            assert_eq!(fake.calls(), [call]);
        }
    }
}

#[test]
fn an_unknown_request_has_a_reply() {
    let program = Fake::new("").start();
    channel::send(&program.loopd, "resize\nname=x", &[]).unwrap();
    assert_eq!(program.receive().outcome, Outcome::Failed);
    program.end();
}

/// A LUKS file, and a program that tests passphrases with the real cryptsetup. No device mapper is needed.
fn real(format: &[&str]) -> Option<(TempDir, PathBuf, PathBuf)> {
    let Some(cryptsetup) = crate::cryptsetup::find() else {
        skipped("unlock", "cryptsetup is not installed");
        return None;
    };
    let directory = tempfile::tempdir().unwrap();
    let (file, program) = (directory.path().join("file"), directory.path().join("cryptsetup"));
    File::create(&file).unwrap().set_len(32 << 20).unwrap();
    let mut make = Command::new(&cryptsetup);
    make.args(["luksFormat", "--batch-mode", "--pbkdf=pbkdf2", "--pbkdf-force-iterations=1000"]);
    make.args(format).arg("--key-file=-").arg(&file).stdin(Stdio::piped());
    let mut made = make.spawn().unwrap();
    made.stdin.take().unwrap().write_all(b"right\n").unwrap();
    assert!(made.wait().unwrap().success());
    let script = format!(
        "#!/bin/sh\naction=$1\nshift\ncase $action in\n\
         open) exec {} open --test-passphrase \"$@\" ;;\nstatus) echo cipher: aes ;;\nesac\n",
        cryptsetup.display()
    );
    fs::write(&program, script).unwrap();
    fs::set_permissions(&program, Permissions::from_mode(0o755)).unwrap();
    Some((directory, file, program))
}

fn try_secret(program: &Path, request: &OpenRequest, files: Vec<OwnedFd>) -> Reply {
    Running::start(Some(program.to_owned())).open(request, files)
}

#[test]
fn the_real_cryptsetup_tells_secrets_apart() {
    for version in ["--type=luks1", "--type=luks2"] {
        let Some((_directory, file, program)) = real(&[version]) else { return };
        let request = OpenRequest { device: file.to_str().unwrap().to_owned(), ..request() };
        assert_eq!(try_secret(&program, &request, vec![memory(b"right\n")]), Reply::done());
        for wrong in [&b"right"[..], b"right\n\n", b"\0"] {
            let reply = try_secret(&program, &request, vec![memory(wrong)]);
            assert_eq!(reply.outcome, Outcome::WrongSecret, "{reply:?}");
        }
        let other = OpenRequest { kind: EncryptionType::BitLocker, ..request.clone() };
        let reply = try_secret(&program, &other, vec![memory(b"right\n")]);
        assert_eq!(reply.outcome, Outcome::OtherType, "{reply:?}");
        let part = OpenRequest { key_offset: 1, key_size: 6, ..request };
        assert_eq!(try_secret(&program, &part, vec![memory(b"-right\n-")]), Reply::done());
    }
}

#[test]
fn the_real_cryptsetup_reads_a_detached_header() {
    let Some((directory, file, program)) = real(&["--type=luks2"]) else { return };
    let data = directory.path().join("data");
    File::create(&data).unwrap().set_len(1 << 20).unwrap();
    let request = OpenRequest { device: data.to_str().unwrap().to_owned(), ..request() };
    assert_eq!(try_secret(&program, &request, vec![memory(b"right\n")]).outcome, Outcome::OtherType);
    let request = OpenRequest { has_header: true, ..request };
    let header = || OwnedFd::from(File::open(&file).unwrap());
    assert_eq!(try_secret(&program, &request, vec![memory(b"right\n"), header()]), Reply::done());
    assert_eq!(
        try_secret(&program, &request, vec![memory(b"wrong"), header()]).outcome,
        Outcome::WrongSecret
    );
    let damaged = memory(&vec![7; 16 << 20]);
    assert_eq!(try_secret(&program, &request, vec![memory(b"right\n"), damaged]).outcome, Outcome::OtherType);
}
