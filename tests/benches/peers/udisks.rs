//! UDisks2 over one connection.

use std::collections::HashMap;
use std::os::fd::AsFd as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use anyhow::Result;
use loopd_tests::bus::Bus;
use loopd_tests::image::Image;
use loopd_tests::process::{Process, eventually, tied};
use loopd_tests::skip;
use loopd_tests::sysfs::LoopDevice;
use zbus::wire::OwnedObjectPath;
use zbus::{Connection, Variant};

const NAME: &str = "org.freedesktop.UDisks2";
const MANAGER: &str = "/org/freedesktop/UDisks2/Manager";
const PROGRAMS: [&str; 2] = ["/usr/libexec/udisks2/udisksd", "/usr/lib/udisks2/udisksd"];

/// What udisksd makes when it starts.
const DIRECTORIES: [&str; 2] = ["/run/udisks2", "/var/lib/udisks2"];

/// A connection to a running udisksd.
pub struct Udisks {
    connection: Connection,
    _process: Process,
    /// After the process.
    _made: Made,
}

/// The directories that did not exist before; removed when dropped.
struct Made(Vec<&'static str>);

impl Made {
    fn missing() -> Self {
        Self(DIRECTORIES.into_iter().filter(|directory| !Path::new(directory).exists()).collect())
    }
}

impl Drop for Made {
    fn drop(&mut self) {
        for directory in &self.0 {
            let _best_effort = std::fs::remove_dir_all(directory);
        }
    }
}

impl Udisks {
    /// Starts it on a bus that has polkit.
    pub async fn start(bus: &Bus) -> Result<Self> {
        let Some(program) = PROGRAMS.map(PathBuf::from).into_iter().find(|path| path.exists()) else {
            return skip("udisksd is not installed");
        };
        let mut command = tied(program);
        command
            .env("DBUS_SYSTEM_BUS_ADDRESS", bus.address())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let made = Made::missing();
        let process = Process::spawn("udisksd", &mut command)?;
        let connection = bus.connect().await?;
        let names = zbus::fdo::DBusProxy::new(&connection).await?;
        eventually("udisksd is on the bus", async || Ok(names.name_has_owner(NAME.try_into()?).await?))
            .await?;
        Ok(Self { connection, _process: process, _made: made })
    }

    /// `LoopSetup`.
    pub async fn attach(&self, image: &Image) -> Result<(LoopDevice, OwnedObjectPath)> {
        let file = image.open()?;
        let body = (zbus::Fd::from(file.as_fd()), no_options());
        let interface = "org.freedesktop.UDisks2.Manager";
        let reply =
            self.connection.call_method(Some(NAME), MANAGER, Some(interface), "LoopSetup", &body).await?;
        let object: OwnedObjectPath = reply.body().deserialize()?;
        let name = object.as_str().rsplit('/').next().unwrap_or_default();
        Ok((LoopDevice::from_node(&format!("/dev/{name}"))?, object))
    }

    /// `Loop.Delete`.
    pub async fn detach(&self, object: &OwnedObjectPath) -> Result<()> {
        let interface = "org.freedesktop.UDisks2.Loop";
        self.connection
            .call_method(Some(NAME), object.as_ref(), Some(interface), "Delete", &(no_options(),))
            .await?;
        Ok(())
    }
}

fn no_options() -> HashMap<&'static str, Variant<'static>> {
    HashMap::new()
}
