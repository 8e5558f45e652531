//! Times and limits.

use std::time::Duration;

use crate::mount_plan::Policy;
use crate::quota::Limits;

/// Times and bounds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How long `SetupLoop` waits for udev.
    pub wait_for_udev: Duration,
    /// How long `Detach` waits for a passing user of the device, such as a probe of udev.
    pub wait_for_users: Duration,
    /// How long the daemon stays with nothing attached and no call; zero is for ever.
    pub idle_exit: Duration,
    /// How long the service manager may take to mount or unmount.
    pub wait_for_mount: Duration,
    /// How long what ends with its last mount waits for the first one, once its client is gone.
    pub mount_grace: Duration,
    /// What may be mounted.
    pub mounting: Policy,
    /// Attachments.
    pub attachments: Limits,
    /// Partitions of attachments.
    pub partitions: Limits,
    /// File systems that somebody has had mounted.
    pub mounts: Limits,
    /// Calls that are under way at once.
    pub calls: Limits,
    /// Prompts that are open at once.
    pub prompts: Limits,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            // Below the 25 s after which libdbus and sd-bus give a call up.
            wait_for_udev: Duration::from_secs(20),
            wait_for_users: Duration::from_secs(1),
            idle_exit: Duration::from_secs(60),
            wait_for_mount: Duration::from_secs(20),
            mount_grace: Duration::from_secs(60),
            mounting: Policy::default(),
            attachments: Limits { each: 128, all: 1600 },
            partitions: Limits { each: 1024, all: 8192 },
            mounts: Limits { each: 64, all: 800 },
            calls: Limits { each: 32, all: 256 },
            prompts: Limits { each: 4, all: 32 },
        }
    }
}
