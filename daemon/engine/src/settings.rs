//! The engine's settings: times and limits.

use std::time::Duration;

use loopd_common::EncryptionType;

use crate::mount_plan::Policy;
use crate::quota::Limits;

/// Times and limits.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// How long `SetupLoop` waits for udev.
    pub wait_for_udev: Duration,
    /// How long `Detach` waits for a passing user of the device, such as a probe of udev.
    pub wait_for_users: Duration,
    /// How long the daemon stays with nothing attached and no call; zero is without limit.
    pub idle_exit: Duration,
    /// How long the service manager may take to mount or unmount.
    pub wait_for_mount: Duration,
    /// How long an attachment with the lifetime `mount` waits for its first mount after its client has disconnected.
    pub mount_grace: Duration,
    /// What may be mounted.
    pub mounting: Policy,
    /// Attachments.
    pub attachments: Limits,
    /// Partitions of attachments.
    pub partitions: Limits,
    /// File systems mounted through loopd.
    pub mounts: Limits,
    /// Volumes unlocked through loopd.
    pub cleartexts: Limits,
    /// How volumes that may be unlocked are encrypted.
    pub unlock_types: Vec<EncryptionType>,
    /// How long the secret and the derivation of its key may take.
    pub wait_for_unlock: Duration,
    /// Calls in progress at the same time.
    pub calls: Limits,
    /// Prompts open at the same time.
    pub prompts: Limits,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            // Below the timeout of a call in libdbus and sd-bus, 25 s.
            wait_for_udev: Duration::from_secs(20),
            wait_for_users: Duration::from_secs(1),
            idle_exit: Duration::from_secs(60),
            wait_for_mount: Duration::from_secs(20),
            mount_grace: Duration::from_secs(60),
            mounting: Policy::default(),
            attachments: Limits { each: 128, all: 1600 },
            partitions: Limits { each: 1024, all: 8192 },
            mounts: Limits { each: 64, all: 800 },
            cleartexts: Limits { each: 32, all: 400 },
            unlock_types: EncryptionType::ALL.to_vec(),
            // The secret may take 30 s, and the derivation of the key is slow on purpose.
            wait_for_unlock: Duration::from_secs(90),
            calls: Limits { each: 32, all: 256 },
            prompts: Limits { each: 4, all: 32 },
        }
    }
}
