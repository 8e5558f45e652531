//! Reloads the configuration on SIGHUP.

use std::path::PathBuf;
use std::time::Duration;

use tokio::signal::unix::Signal;
use tokio::sync::watch;
use tracing::{info, warn};

use crate::bus::Quotas;
use crate::config;
use crate::platform::SharedEngine;

/// The files that a reload reads, and the receivers of the new settings.
pub struct Reload {
    /// The files to read.
    pub configuration: config::Source,
    /// The runtime directory, in which the last valid configuration is saved.
    pub directory: PathBuf,
    /// Gets the new settings.
    pub engine: SharedEngine,
    /// Get the new limits.
    pub quotas: Quotas,
    /// Gets the new timeout.
    pub idle_timeout: watch::Sender<Duration>,
}

impl Reload {
    /// Reloads the configuration on each signal. An invalid configuration changes nothing.
    pub async fn run(self, mut hangup: Signal) {
        while hangup.recv().await.is_some() {
            match self.reload() {
                Ok(()) => info!("reloaded the configuration"),
                Err(message) => warn!("the configuration is invalid and was not reloaded: {message}"),
            }
        }
    }

    fn reload(&self) -> Result<(), String> {
        let settings = self.configuration.read_and_save(&self.directory)?.settings();
        self.quotas.set_limits(&settings);
        self.idle_timeout.send_replace(settings.idle_exit);
        self.engine.configure(settings);
        Ok(())
    }
}
