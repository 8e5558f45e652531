//! The way to loopd: connecting to the system bus, and explaining why that failed.

use std::os::unix::net::UnixStream;

use anyhow::Context;
use loopd_dbus::proxy::{Attachment, Interaction, Manager, Volume};
use loopd_dbus::transport::{self, ConnectError, Policy, Transport};
use zbus::address::Transport as Way;
use zbus::connection::Builder;
use zbus::wire::OwnedObjectPath;
use zbus::{Address, Connection, DBusError, fdo};

use crate::output::reason;

/// A connection to the system bus, and the manager on it.
pub struct Bus {
    /// The connection.
    pub connection: Connection,
    /// `org.loopd1.Manager`.
    pub manager: Manager,
    /// Whether polkit may ask the user.
    pub interaction: Interaction,
}

impl Bus {
    async fn new(connection: Connection, interaction: Interaction) -> anyhow::Result<Self> {
        let manager = Manager::new(&connection, interaction).await.map_err(explain)?;
        Ok(Self { connection, manager, interaction })
    }

    /// The attachment with this path. It is not asked anything yet.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn attachment(&self, path: &OwnedObjectPath) -> anyhow::Result<Attachment> {
        let path = path.clone().into_inner();
        Attachment::new(&self.connection, path, self.interaction).await.map_err(explain)
    }

    /// The volume with this path. It is not asked anything yet.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn volume(&self, path: &OwnedObjectPath) -> anyhow::Result<Volume> {
        let path = path.clone().into_inner();
        Volume::new(&self.connection, path, self.interaction).await.map_err(explain)
    }
}

/// Connects to the system bus; loopd is not asked anything yet.
///
/// # Errors
/// The bus cannot be reached.
pub async fn open(interaction: Interaction) -> anyhow::Result<Bus> {
    let address = Address::system().map_err(explain)?;
    let builder = match address.transport() {
        Way::Unix(_) => over(connect_socket(&address)?)?,
        // Somebody forwards the bus, and trusts what is forwarded.
        _ => Builder::address(address),
    };
    Bus::new(builder.build().await.map_err(explain)?, interaction).await
}

/// Connects to the system bus over a socket that a child process can inherit: whoever holds it
/// keeps the connection alive.
///
/// # Errors
/// The bus cannot be reached, or not through a Unix socket.
pub async fn open_shared(interaction: Interaction) -> anyhow::Result<(Bus, UnixStream)> {
    let socket = connect_socket(&Address::system().map_err(explain)?)?;
    let ours = socket.try_clone().context("cannot duplicate the bus connection's socket")?;
    let connection = over(ours)?.build().await.map_err(explain)?;
    Ok((Bus::new(connection, interaction).await?, socket))
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
            ConnectError::Unreachable(address, error) => bus_is_not_there(address, error),
        })
    })
}

fn not_a_socket(address: &Address) -> String {
    format!(
        "the system bus address {address} is none that a command can share: `loopctl run` needs \
         unix:path= or unix:abstract= in DBUS_SYSTEM_BUS_ADDRESS"
    )
}

fn bus_is_not_there(address: &Address, error: &std::io::Error) -> String {
    format!(
        "cannot connect to the system message bus at {address}: {}; see whether it runs with \
         `systemctl status dbus`, and start it with `sudo systemctl start dbus`",
        reason(error)
    )
}

/// What a failed call means to a person; an error of the contract stays what it is.
#[must_use]
pub fn explain(error: zbus::Error) -> anyhow::Error {
    if let Some(error) = loopd_dbus::error::from_call(&error) {
        return error.into();
    }
    anyhow::anyhow!(match &error {
        zbus::Error::Connection(error, address) => bus_is_not_there(address, error),
        zbus::Error::InputOutput(error) => {
            format!("the connection to the system message bus broke: {}", reason(error))
        }
        zbus::Error::Address(detail) =>
            format!("the system bus address is wrong: {detail}; correct or unset DBUS_SYSTEM_BUS_ADDRESS"),
        zbus::Error::Handshake(detail) => format!("the system message bus refused us: {detail}"),
        zbus::Error::FDO(error) => explain_standard(error),
        zbus::Error::MethodError(name, detail, _) => {
            explain_named(name.as_str(), detail.as_deref().unwrap_or_default())
        }
        other => format!("the call to loopd failed: {other}"),
    })
}

fn explain_standard(error: &fdo::Error) -> String {
    use fdo::Error as E;
    let detail = error.description().unwrap_or_default();
    match error {
        E::ServiceUnknown(_)
        | E::NameHasNoOwner(_)
        | E::TimedOut(_)
        | E::SpawnExecFailed(_)
        | E::SpawnForkFailed(_)
        | E::SpawnChildExited(_)
        | E::SpawnChildSignaled(_)
        | E::SpawnFailed(_)
        | E::SpawnFailedToSetup(_)
        | E::SpawnConfigInvalid(_)
        | E::SpawnServiceNotValid(_)
        | E::SpawnServiceNotFound(_)
        | E::SpawnPermissionsInvalid(_)
        | E::SpawnFileInvalid(_)
        | E::SpawnNoMemory(_) => daemon_is_not_there(detail),
        E::NoReply(_) | E::Disconnected(_) => format!(
            "loopd went away before it answered ({detail}); `journalctl -u loopd` may tell why, and \
             `loopctl list --all` shows what is attached now"
        ),
        _ => explain_named(error.name().as_str(), detail),
    }
}

fn explain_named(name: &str, detail: &str) -> String {
    // With systemd the bus passes on systemd's own errors about the unit: masked, not found, failed.
    if name.starts_with("org.freedesktop.systemd1.") {
        return daemon_is_not_there(detail);
    }
    format!("the call to loopd failed: {detail} ({name})")
}

fn daemon_is_not_there(detail: &str) -> String {
    format!(
        "loopd does not run and the system bus could not start it ({detail}); start it with \
         `sudo systemctl start loopd`, and see `systemctl status loopd` if that fails"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_daemon_is_named_with_its_remedy() {
        let missing = fdo::Error::ServiceUnknown("The name org.loopd1 was not provided".to_owned());
        let text = explain(zbus::Error::FDO(Box::new(missing))).to_string();
        assert!(text.contains("was not provided") && text.contains("systemctl start loopd"), "{text}");
        assert!(explain_named("org.freedesktop.systemd1.UnitMasked", "masked").contains("start loopd"));
    }

    #[test]
    fn errors_of_the_contract_stay_as_they_are() {
        let refused = fdo::Error::AccessDenied("you may not".to_owned());
        let error = explain(zbus::Error::FDO(Box::new(refused)));
        assert_eq!(error.to_string(), "you may not");
        assert!(error.is::<loopd_dbus::Error>());
    }

    #[test]
    fn a_missing_bus_is_told_from_a_missing_daemon() {
        let text = connect_socket(&Address::try_from("unix:path=/nonexistent/bus").unwrap());
        let text = text.unwrap_err().to_string();
        assert!(text.contains("unix:path=/nonexistent/bus: No such file or directory;"), "{text}");
        let tcp = connect_socket(&Address::try_from("tcp:host=localhost,port=1").unwrap());
        assert!(tcp.unwrap_err().to_string().contains("unix:abstract="));
    }
}
