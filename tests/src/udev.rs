//! The machine's udev: the running one, or one that the tests start.

use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::signal::{Signal, kill};

use crate::process::{PATIENCE, Process, children, tied};
use crate::skip;

const CONTROL: &str = "/run/udev/control";
const DIRECTORY: &str = "/run/udev";
const PROGRAM: &str = "/lib/systemd/systemd-udevd";

/// The udev of the tests.
#[derive(Debug)]
pub enum Udev {
    /// It was already running, and must not be stopped.
    Theirs,
    /// The tests started it.
    Ours {
        /// The running daemon.
        process: Option<Process>,
        /// Whether `/run/udev` is removed with it.
        made_directory: bool,
    },
}

impl Udev {
    /// Starts udevd if it is not running.
    ///
    /// # Errors
    /// It does not start.
    pub fn find_or_start() -> Result<Self> {
        // A udevd that was killed leaves its socket behind.
        if Path::new(CONTROL).exists() && ping() {
            return Ok(Self::Theirs);
        }
        let made_directory = !Path::new(DIRECTORY).exists();
        let mut udev = Self::Ours { process: None, made_directory };
        udev.start()?;
        Ok(udev)
    }

    /// Whether the tests may stop it.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        matches!(self, Self::Ours { .. })
    }

    /// The processes that belong to us.
    #[must_use]
    pub fn pids(&self) -> Vec<nix::unistd::Pid> {
        match self {
            Self::Ours { process: Some(process), .. } => vec![process.pid()],
            _ => Vec::new(),
        }
    }

    /// Starts it again.
    ///
    /// # Errors
    /// It is not ours, or does not start.
    pub fn start(&mut self) -> Result<()> {
        let slot = self.ours()?;
        if slot.is_some() {
            return Ok(());
        }
        let mut command = tied(PROGRAM);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let mut process = Process::spawn("systemd-udevd", &mut command)?;
        let start = Instant::now();
        // The main loop answers the ping: then rules are loaded and events are received.
        while !Path::new(CONTROL).exists() || !ping() {
            if let Some(status) = process.exited()? {
                bail!("systemd-udevd ended: {status}");
            }
            if start.elapsed() > PATIENCE {
                bail!("systemd-udevd is not there after {PATIENCE:?}");
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        *slot = Some(process);
        Ok(())
    }

    /// Stops it; then the machine has no udev.
    ///
    /// # Errors
    /// It is not ours: the test is skipped.
    pub fn stop(&mut self) -> Result<()> {
        if let Some(mut process) = self.ours()?.take() {
            process.signal(Signal::SIGTERM)?;
            // It ends its workers first.
            let start = Instant::now();
            while process.exited()?.is_none() && start.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        match std::fs::remove_file(CONTROL) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }

    /// Ends it and its workers without warning, as the service manager does: its socket stays.
    ///
    /// # Errors
    /// It is not ours: the test is skipped.
    pub fn kill(&mut self) -> Result<()> {
        if let Some(mut process) = self.ours()?.take() {
            // They have the socket open.
            let workers = children(process.pid());
            process.signal(Signal::SIGKILL)?;
            for worker in workers {
                let _ended_already = kill(worker, Signal::SIGKILL);
            }
            let start = Instant::now();
            while process.exited()?.is_none() && start.elapsed() < PATIENCE {
                std::thread::sleep(Duration::from_millis(2));
            }
        }
        Ok(())
    }

    /// Stops or continues the daemon and its workers.
    ///
    /// # Errors
    /// It is not ours: the test is skipped.
    pub fn freeze(&mut self, frozen: bool) -> Result<()> {
        let signal = if frozen { Signal::SIGSTOP } else { Signal::SIGCONT };
        let process = self.ours()?.as_ref().context("udevd does not run")?;
        kill(process.pid(), signal)?;
        for worker in children(process.pid()) {
            // A worker may end in between.
            let _ = kill(worker, signal);
        }
        Ok(())
    }

    fn ours(&mut self) -> Result<&mut Option<Process>> {
        match self {
            Self::Theirs => skip("udevd is the machine's own and must not be stopped"),
            Self::Ours { process, .. } => Ok(process),
        }
    }
}

impl Drop for Udev {
    fn drop(&mut self) {
        let _ = self.stop();
        if let Self::Ours { made_directory: true, .. } = self {
            let _ = std::fs::remove_dir_all(DIRECTORY);
        }
    }
}

/// Waits until udev has nothing more to do.
///
/// # Errors
/// It still has after ten seconds.
pub async fn settle() -> Result<()> {
    settle_within(Duration::from_secs(10)).await
}

/// Waits until udev has nothing more to do.
///
/// # Errors
/// It still has after this time, of which whole seconds count.
pub async fn settle_within(limit: Duration) -> Result<()> {
    crate::process::run("udevadm", ["settle", &format!("--timeout={}", limit.as_secs())]).await.map(drop)
}

fn ping() -> bool {
    let mut command = Command::new("udevadm");
    command.args(["control", "--ping", "--timeout=2"]).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

/// An event of a block device, from udev or the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uevent {
    /// `KERNEL` or `UDEV`.
    pub source: String,
    /// `add`, `change` or `remove`.
    pub action: String,
    /// The device's name, such as `loop0`.
    pub device: String,
}

/// Records all events of block devices.
#[derive(Debug)]
pub struct Listener {
    process: Process,
    output: std::path::PathBuf,
}

impl Listener {
    /// Starts to record into a file in the directory.
    ///
    /// # Errors
    /// udevadm cannot be started.
    pub async fn start(directory: &Path) -> Result<Self> {
        let output = directory.join("uevents");
        let file = std::fs::File::create(&output)?;
        let mut command = tied("stdbuf");
        command.args(["-oL", "udevadm", "monitor", "-u", "-k", "-s", "block"]);
        command.stdin(Stdio::null()).stdout(file);
        let listener = Self { process: Process::spawn("udevadm monitor", &mut command)?, output };
        // The last line of its preamble is printed when both sockets receive.
        crate::process::eventually("udevadm listens", async || {
            Ok(std::fs::read_to_string(&listener.output)?.contains("KERNEL - the kernel uevent"))
        })
        .await?;
        Ok(listener)
    }

    /// The recorded events.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn heard(&self) -> Result<Vec<Uevent>> {
        let text = std::fs::read_to_string(&self.output)?;
        Ok(text.lines().filter_map(parse).collect())
    }

    /// The events of one device.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn about(&self, device: crate::sysfs::LoopDevice) -> Result<Vec<Uevent>> {
        let name = format!("loop{}", device.0);
        Ok(self.heard()?.into_iter().filter(|event| event.device == name).collect())
    }

    /// The events of the partitions of one device.
    ///
    /// # Errors
    /// The record cannot be read.
    pub fn about_partitions(&self, device: crate::sysfs::LoopDevice) -> Result<Vec<Uevent>> {
        let prefix = format!("loop{}p", device.0);
        Ok(self.heard()?.into_iter().filter(|event| event.device.starts_with(&prefix)).collect())
    }

    /// Ends it.
    ///
    /// # Errors
    /// It does not end.
    pub async fn stop(mut self) -> Result<()> {
        self.process.terminate().await.map(drop)
    }
}

/// `UDEV  [123.456789] change   /devices/virtual/block/loop0 (block)`
fn parse(line: &str) -> Option<Uevent> {
    let (source, rest) = line.split_once('[')?;
    let mut words = rest.split_once(']')?.1.split_whitespace();
    let action = words.next()?.to_owned();
    let device = words.next()?.rsplit('/').next()?.to_owned();
    Some(Uevent { source: source.trim().to_owned(), action, device })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_udevadm_are_parsed() {
        let event = parse("UDEV  [42.5] change   /devices/virtual/block/loop0 (block)").unwrap();
        assert_eq!((event.source.as_str(), event.action.as_str()), ("UDEV", "change"));
        assert_eq!(event.device, "loop0");
        assert_eq!(parse("KERNEL - the kernel uevent"), None);
    }
}
