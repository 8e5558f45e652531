//! Adds, changes and removes objects on the bus, for the publisher.

use std::borrow::Cow;
use std::collections::HashMap;

use loopd_dbus::names::ROOT_PATH;
use zbus::fdo::Properties;
use zbus::names::InterfaceName;
use zbus::object_server::{ObjectServer, SignalEmitter};
use zbus::wire::ObjectPath;
use zbus::{Connection, Variant};

use super::context::Context;
use super::interfaces::Interfaces;
use super::object_manager;

/// The objects of a connection, and their signals.
pub struct Board {
    connection: Connection,
    context: Context,
}

impl Board {
    /// The objects of this connection.
    #[must_use]
    pub fn new(connection: Connection, context: Context) -> Self {
        Self { connection, context }
    }

    /// The state that the objects share.
    #[must_use]
    pub fn context(&self) -> &Context {
        &self.context
    }

    /// Serves the objects.
    #[must_use]
    pub fn server(&self) -> &ObjectServer {
        self.connection.object_server()
    }

    /// Announces changed properties, if there are any.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn emit(
        &self,
        path: &ObjectPath<'_>,
        interface: &'static str,
        changes: HashMap<&'static str, Variant<'static>>,
    ) -> zbus::Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        let emitter = SignalEmitter::new(&self.connection, path)?;
        let interface = InterfaceName::from_static_str_unchecked(interface);
        Properties::properties_changed(&emitter, interface, changes, Cow::Borrowed(&[])).await
    }

    /// Announces an object that is served.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn announce(&self, path: &ObjectPath<'_>, interfaces: Interfaces) -> zbus::Result<()> {
        object_manager::add(self.context.objects(), &self.root()?, path, interfaces).await
    }

    /// Announces that an object is gone.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn withdraw(&self, path: &ObjectPath<'_>) -> zbus::Result<()> {
        object_manager::remove(self.context.objects(), &self.root()?, path).await
    }

    /// Announces one more interface of an object, or that this interface is gone. `all` are the interfaces that the
    /// object has now.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn announce_change(
        &self,
        path: &ObjectPath<'_>,
        all: Interfaces,
        change: InterfaceChange,
    ) -> zbus::Result<()> {
        self.context.objects().add(path, all);
        match change {
            InterfaceChange::Added(interface) => {
                object_manager::announce(&self.root()?, path, &interface).await
            }
            InterfaceChange::Removed(name) => object_manager::withdraw(&self.root()?, path, &[name]).await,
        }
    }

    /// Emits the signals of the object manager.
    fn root(&self) -> zbus::Result<SignalEmitter<'static>> {
        SignalEmitter::new(&self.connection, ROOT_PATH)
    }
}

/// How the interfaces of an object change.
pub enum InterfaceChange {
    /// This one comes.
    Added(Interfaces),
    /// The one with this name goes.
    Removed(&'static str),
}
