//! `loopd --simulate` on a session bus, as an ordinary user: loopctl works as with the real daemon.
#![allow(clippy::unwrap_used)]

use std::io::{BufRead as _, BufReader};
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use loopd_tests::GAMES;
use loopd_tests::host::built;
use loopd_tests::process::{PATIENCE, Process, tied};
use nix::sys::signal::Signal;
use nix::unistd::geteuid;
use tempfile::TempDir;

/// A session of an ordinary user, with a bus and the simulation.
struct Session {
    directory: TempDir,
    address: String,
    _bus: Process,
    daemon: Process,
}

impl Session {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o777)).unwrap();
        for program in ["loopd-simulated", "loopctl"] {
            // Other users cannot enter a target directory below a home directory.
            std::fs::copy(built(program), directory.path().join(program))
                .unwrap_or_else(|error| panic!("{program}: {error}; run make simulated"));
        }
        let address = format!("unix:path={}/bus", directory.path().display());
        let mut bus = as_user("dbus-daemon");
        bus.args(["--session", "--nofork", "--nopidfile", "--print-address", "--address", &address])
            .stdout(Stdio::piped());
        let mut bus = Process::spawn("dbus-daemon", &mut bus).unwrap();
        let mut line = String::new();
        // It prints the address once it listens.
        BufReader::new(bus.child().stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert!(line.starts_with("unix:"), "{line}");
        let mut daemon = as_user(directory.path().join("loopd-simulated"));
        daemon
            .arg("--simulate")
            .env("DBUS_SESSION_BUS_ADDRESS", &address)
            .env("XDG_RUNTIME_DIR", directory.path())
            .stderr(Stdio::piped());
        let mut daemon = Process::spawn("loopd-simulated", &mut daemon).unwrap();
        let log = BufReader::new(daemon.child().stderr.take().unwrap());
        let mut lines = log.lines().map_while(Result::ok);
        assert!(lines.any(|line| line.contains("ready")), "loopd has ended");
        // It must not end for a log that nobody reads.
        std::thread::spawn(move || lines.for_each(drop));
        Self { directory, address, _bus: bus, daemon }
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn loopctl(&self, arguments: &[&str]) -> Output {
        as_user(self.path().join("loopctl"))
            .args(arguments)
            .current_dir(self.path())
            .env("DBUS_SYSTEM_BUS_ADDRESS", &self.address)
            .output()
            .unwrap()
    }

    /// The standard output of a call that succeeds, without the newline.
    fn done(&self, arguments: &[&str]) -> String {
        let output = self.loopctl(arguments);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap().trim_end().to_owned()
    }

    fn list(&self) -> Vec<serde_json::Value> {
        serde_json::from_str(&self.done(&["list", "--json"])).unwrap()
    }
}

/// A command of an ordinary user, also if root runs the tests.
fn as_user(program: impl AsRef<std::ffi::OsStr>) -> Command {
    let mut command = tied(program);
    if geteuid().is_root() {
        command.uid(GAMES.uid).gid(GAMES.gid);
    }
    command
}

/// Waits for a value, at most ten seconds.
fn soon<T>(what: &str, mut value: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(value) = value() {
            return value;
        }
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn loopctl_works_without_root_and_devices() {
    let session = Session::start();
    let image = session.path().join("disk.img");
    std::fs::File::create(&image).unwrap().set_len(6 << 20).unwrap();
    let device = session.done(&["attach", "disk.img"]);
    assert_eq!(device, "/dev/loop0");
    let found = &session.list()[0];
    assert_eq!((&found["device"], &found["size"]), (&device.as_str().into(), &(6 << 20).into()));
    assert_eq!(found["backing_file"], image.to_str().unwrap());
    assert_eq!(found["partitions"].as_array().unwrap().len(), 2);
    let directory = session.done(&["mount", &device]);
    assert_eq!(session.list()[0]["mount_points"], serde_json::json!([directory]));
    let busy = session.loopctl(&["detach", &device]);
    assert!(!busy.status.success() && String::from_utf8_lossy(&busy.stderr).contains(&directory), "{busy:?}");
    session.done(&["unmount", &device]);
    session.done(&["set", &device, "--lifetime", "persistent"]);
    session.done(&["detach", &device]);
    assert_eq!(session.list(), Vec::<serde_json::Value>::new());
    let invalid = session.loopctl(&["attach", "/"]);
    assert!(String::from_utf8_lossy(&invalid.stderr).contains("it is a directory"), "{invalid:?}");
}

#[test]
fn attachments_end_with_their_client() {
    let mut session = Session::start();
    std::fs::File::create(session.path().join("disk.img")).unwrap().set_len(1 << 20).unwrap();
    assert_eq!(session.done(&["run", "disk.img", "--", "printenv", "LOOPCTL_DEVICE"]), "/dev/loop0");
    soon("its client has ended", || session.list().is_empty().then_some(()));
    session.daemon.signal(Signal::SIGTERM).unwrap();
    let status = soon("SIGTERM ends loopd", || session.daemon.exited().unwrap());
    assert!(status.success(), "{status}");
}

#[test]
fn a_build_that_simulates_is_never_the_daemon_and_the_daemon_never_simulates() {
    for (program, arguments, expected) in [
        ("loopd-simulated", &[][..], "loopd --simulate"),
        ("loopd-simulated", &["--config", "/dev/null"], "loopd --simulate"),
        ("loopd", &["--simulate"], "--features simulate"),
    ] {
        let output = Command::new(built(program)).args(arguments).output().unwrap();
        assert_eq!(output.status.code(), Some(2), "{program} {arguments:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(expected), "{output:?}");
    }
}
