//! Processes that the tests start, and waiting for conditions.

use std::ffi::OsStr;
use std::path::Path;
use std::process::{Child, Command, ExitStatus, Output};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

/// The time limit for an expected event.
pub const PATIENCE: Duration = Duration::from_secs(10);
/// The time limit for a command.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// Waits until the condition holds.
///
/// # Errors
/// It does not hold within [`PATIENCE`], or its check failed.
pub async fn eventually(what: &str, mut condition: impl AsyncFnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    while !condition().await? {
        if start.elapsed() > PATIENCE {
            bail!("not within {PATIENCE:?}: {what}");
        }
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    Ok(())
}

/// A command that the kernel kills when the thread that started it exits, so a killed test program leaves
/// nothing behind.
pub fn tied(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "TERM", "--"]).arg(program);
    command
}

/// A child process, killed when dropped.
#[derive(Debug)]
pub struct Process {
    child: Child,
    name: String,
}

impl Process {
    /// Starts it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(name: &str, command: &mut Command) -> Result<Self> {
        let child = command.spawn().with_context(|| format!("cannot start {name}: {command:?}"))?;
        Ok(Self { child, name: name.to_owned() })
    }

    /// The child, for its pipes.
    pub fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> Pid {
        pid(self.child.id())
    }

    /// Its exit status, if it has ended.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        Ok(self.child.try_wait()?)
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// It has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill(self.pid(), signal).with_context(|| format!("cannot send {signal} to {}", self.name))
    }

    /// Waits for its end.
    ///
    /// # Errors
    /// It does not end in time.
    pub async fn end(&mut self) -> Result<ExitStatus> {
        let mut status = None;
        let child = &mut self.child;
        eventually(&format!("{} ends", self.name), async || {
            status = child.try_wait()?;
            Ok(status.is_some())
        })
        .await?;
        status.context("no status")
    }

    /// Sends SIGTERM, and waits for its end.
    ///
    /// # Errors
    /// It does not end in time.
    pub async fn terminate(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.end().await
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // SIGKILL also ends a stopped child.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Runs a command to its end, with an empty standard input.
///
/// # Errors
/// It cannot be started, or does not end.
pub async fn output(command: Command) -> Result<Output> {
    let shown = format!("{command:?}");
    let mut command = tokio::process::Command::from(command);
    command.stdin(std::process::Stdio::null()).kill_on_drop(true);
    tokio::time::timeout(COMMAND_LIMIT, command.output())
        .await
        .with_context(|| format!("{shown} did not end within {COMMAND_LIMIT:?}"))?
        .with_context(|| format!("cannot run {shown}"))
}

/// Runs a program that must succeed; returns its output.
///
/// # Errors
/// It failed.
pub async fn run(program: &str, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments);
    let shown = format!("{command:?}");
    let output = output(command).await?;
    if !output.status.success() {
        bail!("{shown}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Whether a program is installed.
#[must_use]
pub fn installed(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .any(|directory| directory.join(program).is_file())
}

/// Skips the test if this kernel does not have the file system.
///
/// # Errors
/// It is not there.
pub fn needs_file_system(name: &str) -> Result<()> {
    let is_known = || {
        let all = std::fs::read_to_string("/proc/filesystems").unwrap_or_default();
        all.lines().any(|line| line.split_whitespace().last() == Some(name))
    };
    if !is_known() {
        let _is_no_module = Command::new("modprobe").args(["-q", name]).status();
    }
    if is_known() { Ok(()) } else { crate::skip(format!("this kernel has no {name}")) }
}

/// Skips the test if a program is not installed.
///
/// # Errors
/// The program is not installed.
pub fn needs(program: &str) -> Result<()> {
    if installed(program) { Ok(()) } else { crate::skip(format!("{program} is not installed")) }
}

/// Converts a process id.
#[must_use]
pub fn pid(id: u32) -> Pid {
    Pid::from_raw(id.cast_signed())
}

/// The resident memory of a process in KiB.
///
/// # Errors
/// It has ended.
pub fn resident(process: Pid) -> Result<u64> {
    memory(process, "VmRSS:")
}

/// The largest resident memory that a process has had, in KiB.
///
/// # Errors
/// The process has ended.
pub fn peak(process: Pid) -> Result<u64> {
    memory(process, "VmHWM:")
}

fn memory(process: Pid, field: &str) -> Result<u64> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix(field)).context("it has ended")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Whether the process exists and is not a zombie.
#[must_use]
pub fn alive(process: Pid) -> bool {
    stat(process).is_some_and(|(state, _)| state != 'Z')
}

/// The children of a process.
#[must_use]
pub fn children(parent: Pid) -> Vec<Pid> {
    let Ok(entries) = Path::new("/proc").read_dir() else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .map(Pid::from_raw)
        .filter(|&process| stat(process).is_some_and(|(_, its_parent)| its_parent == parent))
        .collect()
}

/// State and parent of a process.
fn stat(process: Pid) -> Option<(char, Pid)> {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The name, in brackets, may contain any character.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, Pid::from_raw(fields.next()?.parse().ok()?)))
}

/// Kills the children of this process that are not in `known`; returns the names of those that were still
/// running. Includes orphans: the runner makes this process their parent.
#[must_use]
pub fn end_strays(known: &[Pid]) -> Vec<String> {
    let mut running = Vec::new();
    for process in children(Pid::this()) {
        if known.contains(&process) {
            continue;
        }
        if alive(process) {
            let name = std::fs::read_to_string(format!("/proc/{process}/comm")).unwrap_or_default();
            running.push(format!("{} ({process})", name.trim_end()));
            let _ = kill(process, Signal::SIGKILL);
        }
        let _ = waitpid(process, Some(WaitPidFlag::empty()));
    }
    running
}
