//! Resources that all tests of a program share: a directory, the built programs, udev.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use crate::udev::Udev;

static HOST: Mutex<Option<Host>> = Mutex::new(None);
/// The daemon's state directory if no service manager passes one.
const RUN_LOOPD: &str = "/run/loopd";

/// The machine, as the tests use it.
#[derive(Debug)]
pub struct Host {
    /// udev.
    pub udev: Udev,
    directory: TempDir,
    made_run_loopd: bool,
}

/// The reason why no test can run on this machine.
#[must_use]
pub fn unfit() -> Option<String> {
    if !nix::unistd::Uid::effective().is_root() {
        return Some("loop devices need root; run `make test`".to_owned());
    }
    if !Path::new("/dev/loop-control").exists() {
        return Some("there is no /dev/loop-control".to_owned());
    }
    let tools = ["dbus-daemon", "losetup", "mkfs.ext4", "mount", "setpriv", "udevadm", "unshare"];
    let missing = tools.into_iter().find(|tool| !crate::process::installed(tool))?;
    Some(format!("{missing} is not installed; run `make deps`"))
}

/// The path of a built program of the workspace.
#[must_use]
pub fn built(name: &str) -> PathBuf {
    let exe = std::env::current_exe().unwrap_or_default();
    // target/PROFILE/deps/TEST
    exe.ancestors().nth(2).unwrap_or(Path::new("/")).join(name)
}

/// The host, prepared at the first call.
///
/// # Errors
/// The preparation failed.
pub fn get() -> Result<HostGuard> {
    let mut host = HOST.lock().unwrap_or_else(PoisonError::into_inner);
    if host.is_none() {
        *host = Some(Host::start()?);
    }
    Ok(HostGuard(host))
}

/// Releases the shared resources.
pub fn stop() {
    HOST.lock().unwrap_or_else(PoisonError::into_inner).take();
}

/// Exclusive access to the host.
#[derive(Debug)]
pub struct HostGuard(MutexGuard<'static, Option<Host>>);

impl std::ops::Deref for HostGuard {
    type Target = Host;

    fn deref(&self) -> &Host {
        self.0.as_ref().expect("get() fills it")
    }
}

impl std::ops::DerefMut for HostGuard {
    fn deref_mut(&mut self) -> &mut Host {
        self.0.as_mut().expect("get() fills it")
    }
}

impl Host {
    fn start() -> Result<Self> {
        // /tmp may be a tmpfs, on which direct I/O differs.
        let directory = tempfile::Builder::new().prefix("loopd-tests-").tempdir_in("/var/tmp")?;
        open_to_all(directory.path())?;
        let tools = directory.path().join("bin");
        std::fs::create_dir(&tools)?;
        // Other users cannot enter a target directory below a home directory.
        for name in ["loopd-probe", "loopctl"] {
            if built(name).exists() {
                std::fs::copy(built(name), tools.join(name)).with_context(|| name.to_owned())?;
            }
        }
        let made_run_loopd = !Path::new(RUN_LOOPD).exists();
        Ok(Self { udev: Udev::find_or_start()?, directory, made_run_loopd })
    }

    /// A program of the workspace that every user can run.
    #[must_use]
    pub fn tool(&self, name: &str) -> PathBuf {
        self.directory.path().join("bin").join(name)
    }

    /// A new directory that every user can enter and only root can write to.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new_directory(&self) -> Result<TempDir> {
        let directory = tempfile::Builder::new().prefix("fixture-").tempdir_in(self.directory.path())?;
        open_to_all(directory.path())?;
        Ok(directory)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.made_run_loopd {
            let _ = std::fs::remove_dir_all(RUN_LOOPD);
        }
    }
}

fn open_to_all(directory: &Path) -> Result<()> {
    Ok(std::fs::set_permissions(directory, std::fs::Permissions::from_mode(0o755))?)
}
