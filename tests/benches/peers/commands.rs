//! Whole processes: losetup, loopctl and udisksctl.

use std::ffi::OsStr;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use loopd_tests::host::built;
use loopd_tests::image::Image;
use loopd_tests::sysfs::LoopDevice;

/// A command line tool.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tool {
    /// `losetup -f --show` and `losetup -d`.
    Losetup,
    /// The same, and `udevadm settle` after the attach.
    LosetupAndSettle,
    /// `loopctl attach` and `loopctl detach`.
    Loopctl,
    /// The same, and the attach does not wait for udev.
    LoopctlNoWait,
    /// `udisksctl loop-setup` and `udisksctl loop-delete`.
    Udisksctl,
}

/// A tool, and the bus that it uses.
#[derive(Clone, Debug)]
pub struct Commands {
    pub tool: Tool,
    pub bus: String,
}

impl Commands {
    /// Attaches the image.
    pub fn attach(&self, image: &Image) -> Result<LoopDevice> {
        let name = image.name();
        let output = match self.tool {
            Tool::Losetup => self.run("losetup", &["-f", "--show", name])?,
            Tool::LosetupAndSettle => {
                let output = self.run("losetup", &["-f", "--show", name])?;
                self.run("udevadm", &["settle"])?;
                output
            }
            Tool::Loopctl => self.run(built("loopctl"), &["attach", name])?,
            Tool::LoopctlNoWait => self.run(built("loopctl"), &["attach", "--no-wait", name])?,
            Tool::Udisksctl => {
                self.run("udisksctl", &["loop-setup", "--no-user-interaction", "--file", name])?
            }
        };
        device_in(&output).with_context(|| format!("no device in {output:?}"))
    }

    /// Detaches the device.
    pub fn detach(&self, device: LoopDevice) -> Result<()> {
        let node = device.node();
        match self.tool {
            Tool::Losetup | Tool::LosetupAndSettle => self.run("losetup", &["-d", &node]),
            Tool::Loopctl | Tool::LoopctlNoWait => self.run(built("loopctl"), &["detach", &node]),
            Tool::Udisksctl => {
                self.run("udisksctl", &["loop-delete", "--no-user-interaction", "--block-device", &node])
            }
        }
        .map(drop)
    }

    fn run(&self, program: impl AsRef<OsStr>, arguments: &[&str]) -> Result<String> {
        let mut command = Command::new(program);
        command.args(arguments).env("DBUS_SYSTEM_BUS_ADDRESS", &self.bus).stdin(Stdio::null());
        let output = command.output().with_context(|| format!("{command:?}"))?;
        if !output.status.success() {
            bail!("{command:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// The time of a process that connects to the bus and exits.
pub fn connect(bus: &str) -> Result<Duration> {
    let mut command = Command::new(built("loopd-floor"));
    command.arg("connect").env("DBUS_SYSTEM_BUS_ADDRESS", bus).stdin(Stdio::null());
    let start = Instant::now();
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let time = start.elapsed();
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(time)
}

/// The device that a tool has printed, such as `Mapped file /tmp/image as /dev/loop0.`
fn device_in(output: &str) -> Option<LoopDevice> {
    let words = output.split_whitespace().map(|word| word.trim_end_matches(['.', ':']));
    words.rev().find_map(|word| LoopDevice::from_node(word).ok())
}
