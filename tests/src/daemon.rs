//! The built daemon.

use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};

use anyhow::{Context as _, Result, bail, ensure};
use loopd_dbus::names::BUS_NAME;
use nix::sys::signal::Signal;

use crate::bus::Bus;
use crate::host::built;
use crate::process::{Process, eventually, tied};

/// The configuration of a daemon whose files are in this directory; created empty if missing.
///
/// # Errors
/// It cannot be made.
pub fn configuration(directory: &Path) -> Result<PathBuf> {
    let file = directory.join("loopd.toml");
    std::fs::File::options().create(true).append(true).open(&file)?;
    Ok(file)
}

/// A wrapper for uid 0 without a capability and no way to get one, as the shipped unit starts the daemon.
pub const WITHOUT_CAPABILITIES: &[&str] =
    &["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--"];

/// A running loopd; killed when dropped.
#[derive(Debug)]
pub struct Daemon {
    process: Process,
    log: PathBuf,
}

impl Daemon {
    /// Starts it and does not wait. If `wrapper` is not empty, that command is run with the daemon as its
    /// last argument, which it must exec. Standard error goes to a file in the directory.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn(
        bus: &Bus,
        directory: &Path,
        wrapper: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        let log = directory.join("loopd.log");
        let log_file = std::fs::File::options().create(true).append(true).open(&log)?;
        let program = std::env::var_os("LOOPD_BIN").map_or_else(|| built("loopd"), PathBuf::from);
        ensure!(program.exists(), "{} is not built", program.display());
        let mut command = match wrapper {
            [] => tied(program),
            [first, words @ ..] => {
                let mut command = tied(first);
                command.args(words).arg(program);
                command
            }
        };
        if std::env::var_os("LOOPD_LOG").is_none() {
            command.env("LOOPD_LOG", "debug");
        }
        command
            .arg("--config")
            .arg(configuration(directory)?)
            .env("DBUS_SYSTEM_BUS_ADDRESS", bus.address())
            .env("RUNTIME_DIRECTORY", std::env::join_paths([directory.join("run"), directory.join("media")])?)
            .envs(environment.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log_file);
        std::fs::create_dir_all(directory.join("run"))?;
        Ok(Self { process: Process::spawn("loopd", &mut command)?, log })
    }

    /// Starts it and waits until it owns its name.
    ///
    /// # Errors
    /// It does not.
    pub async fn start(
        bus: &Bus,
        directory: &Path,
        wrapper: &[&str],
        environment: &[(&str, &str)],
    ) -> Result<Self> {
        let mut daemon = Self::spawn(bus, directory, wrapper, environment)?;
        let connection = bus.connect().await?;
        let names = zbus::fdo::DBusProxy::new(&connection).await?;
        let process = &mut daemon.process;
        let owned = eventually("loopd is on the bus", async || {
            if let Some(status) = process.exited()? {
                bail!("loopd ended: {status}");
            }
            Ok(names.name_has_owner(BUS_NAME.try_into()?).await?)
        });
        if let Err(error) = owned.await {
            bail!("{error}\n{}", daemon.log());
        }
        Ok(daemon)
    }

    /// Its process id.
    #[must_use]
    pub fn pid(&self) -> nix::unistd::Pid {
        self.process.pid()
    }

    /// Its standard error.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// The targets of its open descriptors.
    ///
    /// # Errors
    /// It has ended.
    pub fn descriptors(&self) -> Result<Vec<String>> {
        let directory = format!("/proc/{}/fd", self.pid());
        let mut targets: Vec<_> = std::fs::read_dir(&directory)
            .context("loopd has ended")?
            .filter_map(|entry| std::fs::read_link(entry.ok()?.path()).ok())
            .map(|target| target.to_string_lossy().into_owned())
            .collect();
        targets.sort_unstable();
        Ok(targets)
    }

    /// Its resident memory in KiB and its number of threads.
    ///
    /// # Errors
    /// It has ended.
    pub fn memory_and_threads(&self) -> Result<(u64, u64)> {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.pid()))?;
        let number = |key: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(key))?;
            line.split_whitespace().next()?.parse().ok()
        };
        number("VmRSS:").zip(number("Threads:")).context("no VmRSS or Threads in its status")
    }

    /// Sends SIGTERM, and does not wait.
    ///
    /// # Errors
    /// It has ended.
    pub fn ask_to_end(&self) -> Result<()> {
        self.process.signal(Signal::SIGTERM)
    }

    /// Its exit status, if it has ended.
    ///
    /// # Errors
    /// It cannot be waited for.
    pub fn exited(&mut self) -> Result<Option<ExitStatus>> {
        self.process.exited()
    }

    /// Sends SIGTERM, and waits for its end.
    ///
    /// # Errors
    /// It does not end in time.
    pub async fn terminate(&mut self) -> Result<ExitStatus> {
        self.process.terminate().await
    }

    /// Waits for it to end by itself.
    ///
    /// # Errors
    /// It does not.
    pub async fn end(&mut self) -> Result<ExitStatus> {
        self.process.end().await
    }

    /// Stops or continues the process.
    ///
    /// # Errors
    /// It has ended.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        self.process.signal(if frozen { Signal::SIGSTOP } else { Signal::SIGCONT })
    }

    /// Sends SIGHUP: it reads its configuration again.
    ///
    /// # Errors
    /// It has ended.
    pub fn reload(&self) -> Result<()> {
        self.process.signal(Signal::SIGHUP)
    }

    /// Kills it.
    ///
    /// # Errors
    /// It cannot be killed.
    pub async fn kill(&mut self) -> Result<()> {
        self.process.signal(Signal::SIGKILL)?;
        self.process.end().await.map(drop)
    }
}
