//! Linux and the system bus.

use std::io::Result as IoResult;
use std::path::Path;
use std::sync::Arc;

use loopd_common::CallerFile;
use loopd_engine::{Engine, Error, Mounter, Store, Unlocker};
use loopd_kernel::{Linux, Untrusted, mounts, udev};
use tracing::warn;
use zbus::{Address, Connection};

use crate::exit::Failure;
use crate::mount::HostMounts;
use crate::store::StateFiles;
use crate::systemd::FdStore;
use crate::unlock::UnlockUnits;

pub use crate::store::runtime_directory;
pub use loopd_kernel::mounts::read as mount_table;
pub use loopd_kernel::return_free_pages;

/// The kernel.
pub type Platform = Linux;

/// Whether this is a simulation.
pub const IS_SIMULATED: bool = false;

/// The address of the bus.
///
/// # Errors
/// The environment has an invalid address.
pub fn bus_address() -> zbus::Result<Address> {
    Address::system()
}

/// Opens the loop driver and the descriptor store.
///
/// # Errors
/// The kernel does not support loopd, or the marks for udev cannot be made.
pub fn open(runtime_directory: &Path) -> Result<Linux, Failure> {
    let untrusted = Untrusted::open(runtime_directory)
        .map_err(|error| format!("cannot mark untrusted devices for udev: {error}"))?;
    Linux::open(Box::new(FdStore::open()), untrusted).map_err(|error| Failure::Permanent(error.to_string()))
}

/// The state files. `bus` identifies the bus of the clients' names.
///
/// # Errors
/// A directory cannot be made.
pub fn store(_: &Linux, runtime_directory: &Path, bus: String) -> IoResult<Box<dyn Store>> {
    Ok(Box::new(StateFiles::open(runtime_directory, bus)?))
}

/// The mounter.
///
/// # Errors
/// The connection failed.
pub async fn mounter(_: &Linux, connection: &Connection) -> zbus::Result<Box<dyn Mounter>> {
    Ok(Box::new(HostMounts::new(connection).await?))
}

/// The unlocker.
///
/// # Errors
/// The connection failed.
pub async fn unlocker(_: &Linux, connection: &Connection) -> zbus::Result<Box<dyn Unlocker<CallerFile>>> {
    Ok(Box::new(UnlockUnits::new(connection).await?))
}

/// The file of a caller.
///
/// # Errors
/// None.
#[expect(clippy::unnecessary_wraps, reason = "the simulation examines it here")]
pub fn file(file: CallerFile) -> Result<CallerFile, Error> {
    Ok(file)
}

/// A file of a caller that is not to be attached.
#[must_use]
pub fn unseen_file(file: CallerFile) -> CallerFile {
    file
}

/// The sources of events.
pub struct Events {
    udev: udev::Monitor,
    mounts: mounts::Watch,
}

impl Events {
    /// Receives events from now on.
    ///
    /// # Errors
    /// A source cannot be opened.
    pub fn listen(_: &Linux) -> Result<Self, String> {
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
        udev::Notice::Mapping(event) => engine.observe_mapping(&event),
        udev::Notice::Lost => {
            warn!("udev events were lost; looking at all devices again");
            engine.events_lost();
        }
    }
}
