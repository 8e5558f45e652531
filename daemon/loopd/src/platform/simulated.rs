//! A simulated machine and the session bus, for those who write a client: no loop device is attached and nothing is
//! mounted, every request is granted, and everything ends with the daemon.

use std::io::{Error as IoError, Result as IoResult};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use loopd_common::CallerFile;
use loopd_engine::kernel::{FileFacts, FileIdentity, FileKind, FileSystem, Findings};
use loopd_engine::mount_table::MountTable;
use loopd_engine::simulated::{Files, Simulated, SimulatedFile, SimulatedMounts};
use loopd_engine::{Engine, Error, Mounter, Store, Unlocker};
use loopd_kernel::examine_file;
use zbus::{Address, Connection};

use crate::exit::Failure;

/// The kernel.
pub type Platform = Simulated;

/// Whether this is a simulation.
pub const IS_SIMULATED: bool = true;

/// Each image has this many partitions.
const PARTITIONS: u32 = 2;
/// How long udev takes for an event.
const PROCESSING: Duration = Duration::from_millis(1);

/// The address of the bus.
///
/// # Errors
/// There is no session bus.
pub fn bus_address() -> zbus::Result<Address> {
    Address::session()
}

/// The directory of the lock, which is made if missing.
///
/// # Errors
/// It cannot be made, or this is no session of a user.
pub fn runtime_directory() -> IoResult<PathBuf> {
    let parent = std::env::var_os("XDG_RUNTIME_DIR").ok_or_else(|| IoError::other("set XDG_RUNTIME_DIR"))?;
    let directory = Path::new(&parent).join("loopd-simulation");
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&directory)?;
    Ok(directory)
}

/// A machine with udev.
///
/// # Errors
/// None.
#[expect(clippy::unnecessary_wraps, reason = "Linux can fail here")]
pub fn open(_: &Path) -> Result<Simulated, Failure> {
    let machine = Simulated::new();
    machine.set_partitions(PARTITIONS);
    machine.set_file_system(FileSystem {
        usage: "filesystem".to_owned(),
        kind: "ext4".to_owned(),
        version: "1.0".to_owned(),
        label: "simulated".to_owned(),
        uuid: "00000000-0000-4000-8000-000000000001".to_owned(),
    });
    Ok(machine)
}

/// State files in memory.
///
/// # Errors
/// None.
#[expect(clippy::unnecessary_wraps, reason = "Linux can fail here")]
pub fn store(machine: &Simulated, _: &Path, _: String) -> IoResult<Box<dyn Store>> {
    Ok(Box::new(Files::on(machine)))
}

/// The mounter, which only records mounts.
///
/// # Errors
/// None.
#[expect(clippy::unused_async, reason = "Linux waits here")]
pub async fn mounter(machine: &Simulated, _: &Connection) -> zbus::Result<Box<dyn Mounter>> {
    Ok(Box::new(SimulatedMounts::on(machine)))
}

/// The unlocker.
///
/// # Errors
/// None.
#[expect(clippy::unused_async, reason = "Linux waits here")]
pub async fn unlocker(machine: &Simulated, _: &Connection) -> zbus::Result<Box<dyn Unlocker<SimulatedFile>>> {
    Ok(Box::new(machine.clone()))
}

/// The mount table.
///
/// # Errors
/// None.
#[expect(clippy::unnecessary_wraps, reason = "Linux can fail here")]
pub fn mount_table() -> IoResult<MountTable> {
    Ok(MountTable::default())
}

/// The file of a caller, which is examined as Linux does it.
///
/// # Errors
/// `InvalidBackingFile`.
pub fn file(file: CallerFile) -> Result<SimulatedFile, Error> {
    let examined = examine_file(&file)?;
    // The file is not read: only its size is real.
    Ok(SimulatedFile {
        facts: examined.facts,
        size: examined.size.unwrap_or(0),
        findings: Findings::default(),
    })
}

/// A file of a caller that is not to be attached. The simulation does not read it.
#[must_use]
pub fn unseen_file(_: CallerFile) -> SimulatedFile {
    let facts = FileFacts {
        kind: FileKind::Regular,
        path: Vec::new(),
        identity: FileIdentity { device: 0, inode: 0 },
        writable: false,
        appends: false,
        only_root_writes: false,
    };
    SimulatedFile { facts, size: 0, findings: Findings::default() }
}

/// The sources of events.
pub struct Events(Simulated);

impl Events {
    /// Receives events from now on.
    ///
    /// # Errors
    /// None.
    #[expect(clippy::unnecessary_wraps, reason = "Linux can fail here")]
    pub fn listen(machine: &Simulated) -> Result<Self, String> {
        Ok(Self(machine.clone()))
    }

    /// Passes events to the engine. Never returns.
    pub async fn run(self, engine: &Arc<Engine<Simulated>>) -> String {
        let Self(machine) = self;
        let mut mount_changes = 0;
        loop {
            if mount_changes != machine.mount_changes() {
                mount_changes = machine.mount_changes();
                engine.mounts_changed(machine.mount_table());
            }
            while let Some(event) = machine.take_mapping_event() {
                engine.observe_mapping(&event);
            }
            match machine.take_uevent() {
                Some(event) => {
                    tokio::time::sleep(PROCESSING).await;
                    engine.observe(event);
                }
                None => machine.news().await,
            }
        }
    }
}

/// A simulation keeps its memory.
pub fn return_free_pages() {}
