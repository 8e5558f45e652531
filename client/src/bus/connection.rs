//! The connection to the system bus.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use anyhow::Context;
use loopd_dbus::AttachOptions;
use loopd_dbus::proxy::{Attachment, Encrypted, Interaction, Manager, Volume};
use loopd_dbus::transport::{self, ConnectError, Policy, Transport};
use zbus::address::Transport as AddressTransport;
use zbus::connection::Builder;
use zbus::wire::OwnedObjectPath;
use zbus::{Address, Connection};

use super::error::{bus_unreachable, explain};

/// A connection to the system bus, with a proxy for loopd's manager.
pub struct Bus {
    /// The connection.
    pub connection: Connection,
    /// `org.loopd1.Manager`.
    pub manager: Manager,
    /// Whether polkit may prompt the user.
    pub interaction: Interaction,
}

impl Bus {
    /// Connects to the system bus; sends nothing to loopd.
    ///
    /// # Errors
    /// The bus cannot be reached.
    pub async fn open(interaction: Interaction) -> anyhow::Result<Self> {
        let address = Address::system().map_err(explain)?;
        let builder = match address.transport() {
            AddressTransport::Unix(_) => over(connect_socket(&address)?)?,
            // A forwarded bus: its user trusts what is forwarded.
            _ => Builder::address(address),
        };
        Self::new(builder.build().await.map_err(explain)?, interaction).await
    }

    /// Connects to the system bus over a socket that a child process can inherit. The connection lives
    /// until the last process closes the socket.
    ///
    /// # Errors
    /// The bus cannot be reached, or not through a Unix socket.
    pub async fn open_shared(interaction: Interaction) -> anyhow::Result<(Self, UnixStream)> {
        let socket = connect_socket(&Address::system().map_err(explain)?)?;
        let duplicate = socket.try_clone().context("cannot duplicate the bus connection's socket")?;
        let connection = over(duplicate)?.build().await.map_err(explain)?;
        Ok((Self::new(connection, interaction).await?, socket))
    }

    /// A bus over a connection that exists.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn new(connection: Connection, interaction: Interaction) -> anyhow::Result<Self> {
        let manager = Manager::new(&connection, interaction).await.map_err(explain)?;
        Ok(Self { connection, manager, interaction })
    }

    /// A proxy for the attachment with this path; sends nothing to loopd.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn attachment(&self, path: &OwnedObjectPath) -> anyhow::Result<Attachment> {
        let path = path.clone().into_inner();
        Attachment::new(&self.connection, path, self.interaction).await.map_err(explain)
    }

    /// A proxy for the volume with this path; sends nothing to loopd.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn volume(&self, path: &OwnedObjectPath) -> anyhow::Result<Volume> {
        let path = path.clone().into_inner();
        Volume::new(&self.connection, path, self.interaction).await.map_err(explain)
    }

    /// A proxy for the encrypted volume with this path; sends nothing to loopd.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn encrypted(&self, path: &OwnedObjectPath) -> anyhow::Result<Encrypted> {
        let path = path.clone().into_inner();
        Encrypted::new(&self.connection, path, self.interaction).await.map_err(explain)
    }

    /// Attaches the file; returns the object path and the device node.
    ///
    /// # Errors
    /// Those of `SetupLoop`.
    pub async fn attach(
        &self,
        file: &File,
        options: &AttachOptions,
    ) -> anyhow::Result<(OwnedObjectPath, String)> {
        self.manager.setup_loop(file.as_fd(), options).await.map_err(explain)
    }
}

fn over(socket: UnixStream) -> anyhow::Result<Builder<'static>> {
    let transport =
        Transport::new(socket, Policy::CLIENT).context("cannot use the bus connection's socket")?;
    Ok(Builder::socket(transport))
}

fn connect_socket(address: &Address) -> anyhow::Result<UnixStream> {
    transport::connect(address).map_err(|error| {
        anyhow::anyhow!(match &error {
            ConnectError::NotASocket(address) => not_a_socket(address),
            ConnectError::Unreachable(address, error) => bus_unreachable(address, error),
        })
    })
}

fn not_a_socket(address: &Address) -> String {
    format!(
        "a command cannot share a connection to the system bus address {address}: `loopctl run` needs \
         unix:path= or unix:abstract= in DBUS_SYSTEM_BUS_ADDRESS"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_bus_is_reported_with_its_address() {
        let text = connect_socket(&Address::try_from("unix:path=/nonexistent/bus").unwrap());
        let text = text.unwrap_err().to_string();
        assert!(text.contains("unix:path=/nonexistent/bus: No such file or directory;"), "{text}");
        let tcp = connect_socket(&Address::try_from("tcp:host=localhost,port=1").unwrap());
        assert!(tcp.unwrap_err().to_string().contains("unix:abstract="));
    }
}
