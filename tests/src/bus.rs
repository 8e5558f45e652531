//! A private system bus with the shipped policy.

use std::io::{BufRead as _, BufReader};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;

use crate::User;
use crate::process::{Process, tied};
use crate::raw_bus::become_user;

/// The root of the repository.
#[must_use]
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("/"))
}

/// The directory of the activation files, below the directory of the test.
pub const SERVICES: &str = "services";

/// The bus; killed when dropped.
#[derive(Debug)]
pub struct Bus {
    address: String,
    process: Process,
}

impl Bus {
    /// Starts a bus with its socket in the directory, which must be open to all users.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(directory: &Path) -> Result<Self> {
        let configuration = directory.join("bus.conf");
        std::fs::create_dir_all(directory.join(SERVICES))?;
        std::fs::write(&configuration, bus_configuration(directory))?;
        let mut command = tied("dbus-daemon");
        command
            .args(["--nofork", "--nopidfile", "--nosyslog", "--print-address", "--config-file"])
            .arg(&configuration)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(directory.join("bus.log"))?);
        let mut process = Process::spawn("dbus-daemon", &mut command)?;
        let output = process.child().stdout.take().context("no pipe")?;
        // It prints the address once it listens.
        let mut address = String::new();
        BufReader::new(output).read_line(&mut address)?;
        let log = || std::fs::read_to_string(directory.join("bus.log")).unwrap_or_default();
        ensure!(address.starts_with("unix:"), "dbus-daemon did not start: {}", log());
        Ok(Self { address: address.trim_end().to_owned(), process })
    }

    /// For `DBUS_SYSTEM_BUS_ADDRESS`.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Stops or continues the process.
    ///
    /// # Errors
    /// It has ended.
    pub fn freeze(&self, frozen: bool) -> Result<()> {
        self.process.signal(if frozen { Signal::SIGSTOP } else { Signal::SIGCONT })
    }

    /// Kills it.
    ///
    /// # Errors
    /// It cannot be killed.
    pub async fn kill(&mut self) -> Result<()> {
        self.process.signal(Signal::SIGKILL)?;
        self.process.end().await.map(drop)
    }

    /// A new connection as the user who runs the tests.
    ///
    /// # Errors
    /// The bus refuses the connection.
    pub async fn connect(&self) -> Result<zbus::Connection> {
        Ok(zbus::connection::Builder::address(self.address.as_str()).build().await?)
    }

    /// A new connection of another user. Its messages still come from this process.
    ///
    /// # Errors
    /// The bus refuses the connection.
    pub async fn connect_as(&self, user: User) -> Result<zbus::Connection> {
        let path = self.address.strip_prefix("unix:path=").context("the bus has no path")?;
        let path = path.split(',').next().unwrap_or(path).to_owned();
        // The kernel notes the user of the thread that connects.
        let connect = std::thread::spawn(move || -> Result<UnixStream> {
            become_user(user)?;
            Ok(UnixStream::connect(path)?)
        });
        let stream = connect.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
        Ok(zbus::connection::Builder::unix_stream(stream).user_id(user.uid).build().await?)
    }
}

/// The rules of a system bus as dbus ships them, the policies of loopd, polkit and UDisks2, and a rule that
/// root may own the names of polkit and the service manager.
fn bus_configuration(directory: &Path) -> String {
    let directory = directory.display();
    let shipped = repository().join("dbus/org.loopd1.conf");
    let shipped = shipped.display();
    format!(
        r#"<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path={directory}/bus</listen>
  <servicedir>{directory}/{SERVICES}</servicedir>
  <auth>EXTERNAL</auth>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Introspectable"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Properties"/>
  </policy>
  <include>{shipped}</include>
  <include ignore_missing="yes">/usr/share/dbus-1/system.d/org.freedesktop.PolicyKit1.conf</include>
  <include ignore_missing="yes">/usr/share/dbus-1/system.d/org.freedesktop.UDisks2.conf</include>
  <policy user="root">
    <allow own="org.freedesktop.PolicyKit1"/>
    <allow send_destination="org.freedesktop.PolicyKit1"/>
    <allow own="org.freedesktop.systemd1"/>
    <allow send_destination="org.freedesktop.systemd1"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus.Monitoring"/>
  </policy>
</busconfig>
"#
    )
}
