//! What all tests of one program share: a folder, the built programs, udev.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use anyhow::{Context as _, Result};
use tempfile::TempDir;

use crate::udev::Udev;

static HOST: Mutex<Option<Host>> = Mutex::new(None);
/// Where the daemon may keep state when no service manager gives it a folder.
const RUN_LOOPD: &str = "/run/loopd";

/// The machine, as the tests use it.
#[derive(Debug)]
pub struct Host {
    /// udev.
    pub udev: Udev,
    folder: TempDir,
    made_run_loopd: bool,
}

/// Why the tests cannot run here at all.
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

/// A program of the workspace, beside the running test's own folder.
#[must_use]
pub fn built(name: &str) -> PathBuf {
    let exe = std::env::current_exe().unwrap_or_default();
    // target/PROFILE/deps/TEST
    exe.ancestors().nth(2).unwrap_or(Path::new("/")).join(name)
}

/// The host, made ready at the first call.
///
/// # Errors
/// It cannot be made ready.
pub fn get() -> Result<HostGuard> {
    let mut host = HOST.lock().unwrap_or_else(PoisonError::into_inner);
    if host.is_none() {
        *host = Some(Host::start()?);
    }
    Ok(HostGuard(host))
}

/// Takes down what the tests had in common.
pub fn stop() {
    HOST.lock().unwrap_or_else(PoisonError::into_inner).take();
}

/// The host, for one user at a time.
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
        // /tmp may be a tmpfs, where direct I/O differs.
        let folder = tempfile::Builder::new().prefix("loopd-tests-").tempdir_in("/var/tmp")?;
        open_to_all(folder.path())?;
        let tools = folder.path().join("bin");
        std::fs::create_dir(&tools)?;
        // Other users cannot reach a target folder in someone's home.
        for name in ["loopd-probe", "loopctl"] {
            if built(name).exists() {
                std::fs::copy(built(name), tools.join(name)).with_context(|| name.to_owned())?;
            }
        }
        let made_run_loopd = !Path::new(RUN_LOOPD).exists();
        Ok(Self { udev: Udev::find_or_start()?, folder, made_run_loopd })
    }

    /// A program of the workspace that every user can run.
    #[must_use]
    pub fn tool(&self, name: &str) -> PathBuf {
        self.folder.path().join("bin").join(name)
    }

    /// A new folder that every user can enter and only root can write to.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn new_folder(&self) -> Result<TempDir> {
        let folder = tempfile::Builder::new().prefix("world-").tempdir_in(self.folder.path())?;
        open_to_all(folder.path())?;
        Ok(folder)
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        if self.made_run_loopd {
            let _ = std::fs::remove_dir_all(RUN_LOOPD);
        }
    }
}

fn open_to_all(folder: &Path) -> Result<()> {
    Ok(std::fs::set_permissions(folder, std::fs::Permissions::from_mode(0o755))?)
}
