//! Tells when a mount comes or goes: the kernel flags `/proc/self/mountinfo` with `POLLPRI`
//! (`proc_pid_mountinfo(5)`).

use std::fs::File;

use tokio::io::Interest;
use tracing::warn;

use crate::kernel::Readiness;
use crate::kernel::mount_table::{self, MountTable};

/// An open mount table.
pub struct Watch {
    readiness: Readiness,
}

impl Watch {
    /// Starts to watch the mount table of our namespace.
    ///
    /// # Errors
    /// procfs cannot be read.
    pub fn open() -> std::io::Result<Self> {
        Ok(Self {
            readiness: Readiness::watch(&File::open(loopd_common::mountinfo::FILE)?, Interest::PRIORITY)?,
        })
    }

    /// Hands on every new table for ever.
    pub async fn run(self, mut tell: impl FnMut(MountTable)) {
        loop {
            if let Err(error) = self.readiness.wait().await {
                return warn!("watching mounts failed: {error}");
            }
            match mount_table::read() {
                Ok(table) => tell(table),
                Err(error) => warn!("the mount table cannot be read: {error}"),
            }
        }
    }
}
