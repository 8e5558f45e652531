//! Programs with a terminal of their own, for tests.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use nix::pty::openpty;
use nix::sys::termios::{LocalFlags, tcgetattr};
use nix::unistd::Pid;

/// The environment variable that a test finds when it is such a program.
const CHILD: &str = "LOOPCTL_TEST_CHILD";

/// Whether this test runs as the program of another test.
pub fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// A program with a terminal of its own, on which it asks.
pub struct Asking {
    child: Child,
    master: File,
    slave: OwnedFd,
}

impl Asking {
    /// Starts this test program, to run the test with this name as a child.
    pub fn start(test: &str) -> Self {
        let pty = openpty(None, None).unwrap();
        let stdio = || Stdio::from(pty.slave.try_clone().unwrap());
        let child = Command::new("setsid")
            .args(["--ctty", "--wait"])
            .arg(std::env::current_exe().unwrap())
            .args(["--exact", test, "--nocapture"])
            .env(CHILD, "1")
            .stdin(stdio())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self { child, master: pty.master.into(), slave: pty.slave }
    }

    /// Waits until the terminal has shown the text.
    pub fn expect(&self, text: &str) {
        let mut shown = Vec::new();
        while !String::from_utf8_lossy(&shown).contains(text) {
            let mut buffer = [0; 256];
            let count = (&self.master).read(&mut buffer).unwrap();
            shown.extend_from_slice(&buffer[..count]);
        }
        assert!(!String::from_utf8_lossy(&shown).contains("secret"), "{shown:?}");
    }

    /// Whether the terminal shows what is typed.
    pub fn is_shown(&self) -> bool {
        tcgetattr(&self.slave).unwrap().local_flags.contains(LocalFlags::ECHO)
    }

    /// Types on the terminal.
    pub fn type_text(&self, text: &str) {
        (&self.master).write_all(text.as_bytes()).unwrap();
    }

    /// The pid of the program itself, a child of setsid if that has forked.
    pub fn pid(&self) -> Pid {
        let setsid = self.child.id();
        let children = format!("/proc/{setsid}/task/{setsid}/children");
        let child = std::fs::read_to_string(children).unwrap_or_default();
        let pid = child.split_whitespace().next().map_or(setsid, |pid| pid.parse().unwrap());
        Pid::from_raw(i32::try_from(pid).unwrap())
    }

    /// Whether the program has this state in `/proc/PID/stat`.
    pub fn has_state(&self, state: char) -> bool {
        let text = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        text.rsplit(") ").next().is_some_and(|rest| rest.starts_with(state))
    }

    /// What it has printed when it has ended.
    pub fn output(self) -> String {
        let output = self.child.wait_with_output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    }
}

/// Waits until the condition holds, at most 20 seconds.
pub fn until(what: &str, condition: impl Fn() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(20), "{what}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
