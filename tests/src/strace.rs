//! The system calls of a process, as strace sees them.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::process::{Process, eventually, needs, output, tied};

/// strace interrupts the system calls in progress when it attaches: what follows within this time is its own effect.
const EFFECT: Duration = Duration::from_millis(500);

/// A running strace; killed when dropped.
#[derive(Debug)]
pub struct Strace {
    process: Process,
    log: PathBuf,
}

impl Strace {
    /// Attaches to all threads of a process. The log is written to the directory.
    ///
    /// # Errors
    /// strace is not installed (the test is skipped), or cannot attach.
    pub async fn attach(target: Pid, directory: &Path) -> Result<Self> {
        needs("strace")?;
        let log = directory.join("strace.log");
        let mut command = tied("strace");
        command.args(["-f", "-ttt", "-q", "-p", &target.to_string(), "-o"]).arg(&log);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = Process::spawn("strace", &mut command)?;
        eventually("strace attaches", async || {
            ensure!(process.exited()?.is_none(), "strace cannot attach");
            is_traced(target)
        })
        .await?;
        Ok(Self { process, log })
    }

    /// Counts the system calls while `work` runs, by name.
    ///
    /// # Errors
    /// strace has ended, or those of `work`.
    pub async fn count(mut self, work: impl AsyncFnOnce() -> Result<()>) -> Result<BTreeMap<String, usize>> {
        tokio::time::sleep(EFFECT).await;
        let start = SystemTime::now();
        work().await?;
        let end = SystemTime::now();
        self.process.signal(Signal::SIGINT)?;
        self.process.end().await?;
        let [start, end] = [start, end].map(|moment| {
            moment.duration_since(SystemTime::UNIX_EPOCH).map_or(0.0, |since| since.as_secs_f64())
        });
        Ok(calls(&std::fs::read_to_string(&self.log)?, start, end))
    }
}

/// Runs a command, and counts its system calls by name, from exec to exit; returns its standard output with them. The log is
/// written to the directory.
///
/// # Errors
/// strace is not installed (the test is skipped), or the command fails.
pub async fn count_of(command: &Command, directory: &Path) -> Result<(String, BTreeMap<String, usize>)> {
    needs("strace")?;
    let log = directory.join("strace.log");
    let mut traced = Command::new("strace");
    traced.args(["-f", "-ttt", "-q", "-o"]).arg(&log).arg(command.get_program()).args(command.get_args());
    traced.envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let output = output(traced).await?;
    ensure!(output.status.success(), "{output:?}");
    let calls = calls(&std::fs::read_to_string(&log)?, 0.0, f64::INFINITY);
    Ok((String::from_utf8(output.stdout)?, calls))
}

fn is_traced(process: Pid) -> Result<bool> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    let tracer = status.lines().find_map(|line| line.strip_prefix("TracerPid:")).context("no TracerPid")?;
    Ok(tracer.trim() != "0")
}

/// The calls that began between two moments, in seconds since the epoch.
fn calls(log: &str, start: f64, end: f64) -> BTreeMap<String, usize> {
    let mut calls = BTreeMap::new();
    for (_, name) in log.lines().filter_map(begun).filter(|(moment, _)| (start..end).contains(moment)) {
        *calls.entry(name.to_owned()).or_default() += 1;
    }
    calls
}

/// `1234  1700000000.123456 epoll_wait(3, …`; not the rest of a call, a signal or an exit.
fn begun(line: &str) -> Option<(f64, &str)> {
    let (_, rest) = line.split_once(' ')?;
    let (moment, call) = rest.trim_start().split_once(' ')?;
    let (name, _) = call.split_once('(')?;
    let is_name = !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'_');
    Some((moment.parse().ok()?, name)).filter(|_| is_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_are_counted_between_two_moments() {
        let log = "10  99.900000 restart_syscall(<... resuming interrupted epoll_wait ...>) = 0\n\
                   10  100.500000 epoll_wait(3, <unfinished ...>\n\
                   11  100.600000 futex(0x7f, FUTEX_WAIT\n\
                   10  100.700000 <... epoll_wait resumed>[], 1024, 5) = 0\n\
                   10  100.800000 epoll_wait(3, [], 1024, 5) = 0\n\
                   10  100.900000 --- SIGUSR1 {si_signo=SIGUSR1} ---\n\
                   10  101.000000 +++ exited with 0 +++\n\
                   10  102.500000 read(5, \"\", 10) = 0\n";
        let found = calls(log, 100.0, 102.0);
        assert_eq!(found, BTreeMap::from([("epoll_wait".to_owned(), 2), ("futex".to_owned(), 1)]));
        assert!(calls(log, 103.0, 104.0).is_empty());
    }
}
