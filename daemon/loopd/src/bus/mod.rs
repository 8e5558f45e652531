//! The bus room: decodes, asks the authority, calls the engine, encodes. One file an interface.

use std::os::fd::AsFd;
use std::sync::Arc;

use loopd_common::CallerFile;
use loopd_dbus::names::{BUS_NAME, ROOT_PATH};
use loopd_dbus::transport::Descriptors;
use loopd_dbus::{Error, ErrorKind, InvalidOption};
use tracing::info;
use zbus::Connection;
use zbus::fdo::{DBusProxy, RequestNameFlags};
use zbus::message::Header;
use zbus::proxy::CacheProperties;

use crate::authority::{Authority, Deed};
use crate::caller::{Caller, Callers};
use loopd_engine::kernel::DiskSequence;
use loopd_engine::{Caller as _, Engine, Snapshot};
use loopd_kernel::Linux;

mod answers;
mod attachment;
mod connection;
mod introspection;
mod manager;
mod objects;
mod partition;
mod publisher;
mod volume;
mod wire;

pub use answers::Answers;
pub use connection::{Link, connect};
pub use objects::Objects;
pub use publisher::Publisher;

/// What every object on the bus needs.
#[derive(Clone)]
pub struct Room {
    /// The attachments.
    pub engine: Arc<Engine<Linux>>,
    /// Says yes or no.
    pub authority: Arc<Authority>,
    /// Says who calls.
    pub callers: Arc<Callers>,
    /// What is on the bus.
    pub objects: Objects,
    /// Answers that may be long.
    pub answers: Answers,
    /// The descriptors of the calls under way.
    pub descriptors: Descriptors,
}

impl Room {
    async fn identify(&self, header: &Header<'_>) -> Result<Caller, Error> {
        self.callers.identify(header).await
    }

    /// The file that a descriptor in a message stands for.
    fn claim(&self, placeholder: impl AsFd) -> Result<CallerFile, Error> {
        self.descriptors.claim(placeholder).ok_or_else(|| {
            let text = "a file descriptor of this call is named twice; each can be given once";
            Error::new(ErrorKind::InvalidArgs, text)
        })
    }

    /// Detaches for a caller, once the authority has agreed; returns when the bus was told.
    async fn detach(&self, caller: &Caller, attachment: &Snapshot, lazy: bool) -> Result<(), Error> {
        self.authority.allow(caller, Deed::Change(attachment)).await?;
        self.engine.detach(attachment.id, lazy).await?;
        self.engine.flush_events().await;
        Ok(())
    }

    /// Who calls, and what the attachment is, once the authority has agreed to a change of it.
    async fn may_change(&self, header: &Header<'_>, id: DiskSequence) -> Result<Caller, Error> {
        let caller = self.identify(header).await?;
        let attachment = self.find(id)?;
        self.authority.allow(&caller, Deed::Change(&attachment)).await?;
        Ok(caller)
    }

    /// What a change came to, once the bus was told of it.
    async fn changed(&self, caller: &Caller, result: Result<(), Error>) -> Result<(), Error> {
        self.engine.flush_events().await;
        result.inspect_err(|error| {
            info!(uid = caller.uid(), client = %caller.client(), "not changed: {error}");
        })
    }

    /// An attachment, without its partitions.
    fn find(&self, id: DiskSequence) -> Result<Snapshot, Error> {
        self.engine
            .outline(id)
            .ok_or_else(|| Error::new(ErrorKind::UnknownObject, format!("the attachment {id} is gone")))
    }
}

fn invalid(option: InvalidOption) -> Error {
    Error::new(ErrorKind::InvalidArgs, option.to_string())
}

/// Puts the root object on the bus.
///
/// # Errors
/// The connection failed.
pub async fn serve(connection: &Connection, room: &Room) -> zbus::Result<()> {
    let server = connection.object_server();
    server.at(ROOT_PATH, objects::ObjectManager::new(room.clone())).await?;
    server.at(ROOT_PATH, manager::Manager::new(room.clone())).await?;
    introspection::serve_root(server, room).await
}

/// The bus itself.
///
/// # Errors
/// The connection failed.
pub async fn proxy(connection: &Connection) -> zbus::Result<DBusProxy<'static>> {
    DBusProxy::builder(connection).cache_properties(CacheProperties::No).build().await
}

/// Gives the well-known name up. When it is given up, every call to it has arrived.
///
/// # Errors
/// The connection failed.
pub async fn release_name(connection: &Connection) -> zbus::Result<()> {
    connection.release_name(BUS_NAME).await.map(drop)
}

/// Takes the well-known name. Calls come from then on, so everything must be served before.
///
/// # Errors
/// Someone else has the name, or the bus policy forbids it.
pub async fn take_name(connection: &Connection) -> zbus::Result<()> {
    connection.request_name_with_flags(BUS_NAME, RequestNameFlags::DO_NOT_QUEUE).await.map(drop)
}
