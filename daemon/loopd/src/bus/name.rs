//! The well-known name of the daemon.

use loopd_dbus::names::BUS_NAME;
use zbus::Connection;
use zbus::fdo::RequestNameFlags;

/// Takes the well-known name. Calls arrive from then on, so all objects must be served before.
///
/// # Errors
/// Another process owns the name, or the bus policy forbids it.
pub async fn take_name(connection: &Connection) -> zbus::Result<()> {
    connection.request_name_with_flags(BUS_NAME, RequestNameFlags::DO_NOT_QUEUE).await.map(drop)
}

/// Releases the well-known name. When this returns, all calls to the name have arrived.
///
/// # Errors
/// The connection failed.
pub async fn release_name(connection: &Connection) -> zbus::Result<()> {
    connection.release_name(BUS_NAME).await.map(drop)
}
