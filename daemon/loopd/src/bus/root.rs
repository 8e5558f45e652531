//! The root object `/org/loopd1`, and the description of the objects above it.

use loopd_dbus::names::ROOT_PATH;
use zbus::Connection;

use super::context::Context;
use super::introspection;
use super::manager::Manager;
use super::object_manager::ObjectManager;

/// Serves the root object.
///
/// # Errors
/// The connection failed.
pub async fn serve_root(connection: &Connection, context: &Context) -> zbus::Result<()> {
    let server = connection.object_server();
    server.at(ROOT_PATH, ObjectManager::new(context.clone())).await?;
    server.at(ROOT_PATH, Manager::new(context.clone())).await?;
    for path in ["/", "/org", ROOT_PATH] {
        introspection::serve(server, path, context).await?;
    }
    Ok(())
}
