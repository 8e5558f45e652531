//! A bus with polkit and loopd.

use std::path::PathBuf;

use anyhow::{Context as _, Result};
use loopd_dbus::proxy::{Interaction, Manager};
use loopd_tests::bus::Bus;
use loopd_tests::daemon::{Daemon, configuration};
use loopd_tests::polkit::{Polkit, Setup};
use zbus::Connection;

use crate::workspace::Workspace;

/// loopd does not exit during a part that does not call it. Root, who holds a thousand devices, has no limits.
const STAYS: &str = "[times]\nidle-exit = 0\n";

/// A running loopd.
pub struct Scene {
    pub daemon: Daemon,
    polkit: Polkit,
    pub bus: Bus,
    pub directory: PathBuf,
    state: String,
}

impl Scene {
    /// Starts it without a polkit, with files in a directory of this name.
    pub async fn start(workspace: &Workspace, name: &str) -> Result<Self> {
        let directory = workspace.directory(name)?;
        std::fs::write(configuration(&directory)?, STAYS)?;
        Self::in_directory(workspace, directory).await
    }

    /// The same with the default configuration.
    pub async fn start_unconfigured(workspace: &Workspace, name: &str) -> Result<Self> {
        Self::in_directory(workspace, workspace.directory(name)?).await
    }

    async fn in_directory(workspace: &Workspace, directory: PathBuf) -> Result<Self> {
        let name = directory.file_name().context("no name")?;
        let memory = workspace.memory().join(name);
        let parts = ["run", "media"].map(|part| memory.join(part));
        parts.iter().try_for_each(std::fs::create_dir_all)?;
        let state = std::env::join_paths(parts)?.into_string().ok().context("UTF-8")?;
        let bus = Bus::start(&directory)?;
        let daemon = Daemon::start(&bus, &directory, &[], &environment(&state)).await?;
        Ok(Self { daemon, polkit: Polkit::None, bus, directory, state })
    }

    /// Adds the real polkit.
    pub async fn add_polkit(&mut self) -> Result<()> {
        self.polkit = Polkit::start(Setup::Real, &self.bus, &self.directory).await?;
        Ok(())
    }

    /// Whether polkit runs.
    pub fn has_polkit(&self) -> bool {
        !matches!(self.polkit, Polkit::None)
    }

    /// Starts a further daemon with the command `wrapper` and without waiting; the first one must have ended.
    pub fn spawn(&self, wrapper: &[&str]) -> Result<Daemon> {
        Daemon::spawn(&self.bus, &self.directory, wrapper, &environment(&self.state))
    }

    /// Root's connection, and loopd on it.
    pub async fn connect(&self) -> Result<(Connection, Manager)> {
        let connection = self.bus.connect().await?;
        let manager = Manager::new(&connection, Interaction::Forbidden).await?;
        Ok((connection, manager))
    }
}

fn environment(state: &str) -> [(&str, &str); 3] {
    // The last one as in the unit.
    [("LOOPD_LOG", "info"), ("RUNTIME_DIRECTORY", state), ("GLIBC_TUNABLES", "glibc.malloc.tcache_count=1")]
}
