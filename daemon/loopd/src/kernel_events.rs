//! Events of udev and of the mount table, for the engine.

use std::sync::Arc;

use loopd_engine::Engine;
use loopd_kernel::{Linux, mounts, udev};
use tracing::warn;

/// The sources of events.
pub struct KernelEvents {
    udev: udev::Monitor,
    mounts: mounts::Watch,
}

impl KernelEvents {
    /// Receives events from now on.
    ///
    /// # Errors
    /// A source cannot be opened.
    pub fn listen() -> Result<Self, String> {
        let udev = udev::Monitor::listen().map_err(|error| format!("cannot listen to udev: {error}"))?;
        let mounts = mounts::Watch::open().map_err(|error| format!("cannot watch mounts: {error}"))?;
        Ok(Self { udev, mounts })
    }

    /// Passes events to the engine until a source fails. Returns the failure.
    pub async fn run(self, engine: &Arc<Engine<Linux>>) -> String {
        tokio::select! {
            () = self.udev.run(|notice| handle(engine, notice)) => "the socket of udev failed".to_owned(),
            () = self.mounts.run(|table| engine.mounts_changed(table)) => "reading the mount table failed".to_owned(),
        }
    }
}

fn handle(engine: &Arc<Engine<Linux>>, notice: udev::Notice) {
    match notice {
        udev::Notice::Uevent(uevent) => engine.observe(*uevent),
        udev::Notice::Lost => {
            warn!("udev events were lost; looking at all devices again");
            engine.events_lost();
        }
    }
}
