//! The directories of a run, and the removal of what an interrupted one leaves.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context as _, Result};
use loopd_tests::runner::detach_all;
use loopd_tests::sysfs::{self, LoopDevice};
use loopd_tests::{host, loop_ioctl, udev};
use tempfile::TempDir;

/// Threads that remove devices: the kernel lets other processors pass for each removal, which takes long.
const REMOVERS: usize = 64;

/// A directory on disk and one in memory. When dropped, it detaches all devices of files in them, unmounts what is
/// mounted in them, and removes the loop devices that did not exist before.
pub struct Workspace {
    disk: TempDir,
    memory: TempDir,
    before: BTreeSet<LoopDevice>,
}

impl Workspace {
    /// Makes the directories.
    pub fn new() -> Result<Self> {
        let disk = host::get()?.new_directory()?;
        // In memory, like /run.
        let memory = tempfile::Builder::new().prefix("loopd-tests-").tempdir_in("/dev/shm")?;
        Ok(Self { disk, memory, before: sysfs::all().into_iter().collect() })
    }

    /// The directory on disk, which all users can enter.
    pub fn disk(&self) -> &Path {
        self.disk.path()
    }

    /// The directory in memory.
    pub fn memory(&self) -> &Path {
        self.memory.path()
    }

    /// A new directory on disk.
    pub fn directory(&self, name: &str) -> Result<PathBuf> {
        let directory = self.disk().join(name);
        std::fs::create_dir(&directory).with_context(|| directory.display().to_string())?;
        Ok(directory)
    }

    /// Removes the loop devices that did not exist before the run: programs that look at all devices would take longer.
    pub fn remove_new_devices(&self) {
        remove(sysfs::all().into_iter().filter(|device| !self.before.contains(device)).collect());
    }
}

impl Drop for Workspace {
    fn drop(&mut self) {
        for directory in [self.disk(), self.memory()] {
            let left = detach_all(directory);
            if !left.is_empty() {
                eprintln!("detached {}", left.join(" "));
            }
        }
        self.remove_new_devices();
    }
}

fn remove(devices: Vec<LoopDevice>) {
    if devices.is_empty() {
        return;
    }
    let Ok(control) = loop_ioctl::control() else { return };
    let control = &control;
    std::thread::scope(|scope| {
        for share in devices.chunks(devices.len().div_ceil(REMOVERS)) {
            scope.spawn(move || share.iter().for_each(|&device| remove_one(control, device)));
        }
    });
}

/// udev may have the device open for a moment; a device that another program has attached stays.
fn remove_one(control: &std::fs::File, device: LoopDevice) {
    for _ in 0..50 {
        if device.bound() || loop_ioctl::remove(control, device).is_ok() {
            return;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until udev is idle. A thousand devices take it some seconds.
pub async fn quiet() -> Result<()> {
    udev::settle_within(Duration::from_secs(55)).await.context("udev is still busy")
}
