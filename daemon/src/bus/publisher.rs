//! Keeps the objects on the bus as the engine tells. Alone in doing so: what it does follows the
//! order of the engine's events.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use loopd_dbus::names::{ATTACHMENT, VOLUME, attachment_path};
use loopd_dbus::{AttachmentProperties, VolumeProperties};
use tokio::sync::mpsc::UnboundedReceiver;
use tracing::error;
use zbus::fdo::Properties;
use zbus::names::InterfaceName;
use zbus::object_server::SignalEmitter;
use zbus::{Connection, Variant};

use super::attachment::Attachment;
use super::volume::Volume;
use super::{Room, wire};
use crate::engine::{Event, Snapshot};
use crate::kernel::DiskSequence;

/// The objects below the root.
pub struct Publisher {
    connection: Connection,
    room: Room,
    objects: HashMap<DiskSequence, Published>,
}

/// What the objects of one attachment show.
struct Published {
    attachment: Arc<RwLock<AttachmentProperties>>,
    volume: Arc<RwLock<VolumeProperties>>,
}

impl Publisher {
    /// Publishes on this connection.
    #[must_use]
    pub fn new(connection: Connection, room: Room) -> Self {
        Self { connection, room, objects: HashMap::new() }
    }

    /// Follows the engine until it stops.
    pub async fn run(mut self, mut events: UnboundedReceiver<Event>) {
        while let Some(event) = events.recv().await {
            let told = match event {
                Event::Added(snapshot) => self.add(&snapshot).await,
                Event::Changed(snapshot) => self.change(&snapshot).await,
                Event::Removed(id) => self.remove(id).await,
                Event::Checkpoint(done) => {
                    let _nobody_waits = done.send(());
                    Ok(())
                }
            };
            if let Err(error) = told {
                error!("the bus was not told: {error}");
            }
        }
    }

    async fn add(&mut self, snapshot: &Snapshot) -> zbus::Result<()> {
        if self.objects.contains_key(&snapshot.id) {
            return self.change(snapshot).await;
        }
        let attachment = Arc::new(RwLock::new(wire::attachment(snapshot)));
        let volume = Arc::new(RwLock::new(wire::volume(snapshot)));
        let published = Published { attachment: Arc::clone(&attachment), volume: Arc::clone(&volume) };
        self.objects.insert(snapshot.id, published);
        let path = attachment_path(snapshot.id.0);
        let server = self.connection.object_server();
        server.at(&path, Volume::new(volume)).await?;
        server.at(&path, Attachment::new(self.room.clone(), snapshot.id, attachment)).await?;
        Ok(())
    }

    async fn change(&mut self, snapshot: &Snapshot) -> zbus::Result<()> {
        let Some(object) = self.objects.get(&snapshot.id) else { return Ok(()) };
        let (attachment, volume) = (wire::attachment(snapshot), wire::volume(snapshot));
        let of_attachment = attachment.changes_since(&replace(&object.attachment, attachment.clone()));
        let of_volume = volume.changes_since(&replace(&object.volume, volume.clone()));
        self.emit(snapshot.id, ATTACHMENT, of_attachment).await?;
        self.emit(snapshot.id, VOLUME, of_volume).await
    }

    async fn emit(
        &self,
        id: DiskSequence,
        interface: &'static str,
        changes: HashMap<&'static str, Variant<'static>>,
    ) -> zbus::Result<()> {
        if changes.is_empty() {
            return Ok(());
        }
        let emitter = SignalEmitter::new(&self.connection, attachment_path(id.0))?;
        let interface = InterfaceName::from_static_str_unchecked(interface);
        Properties::properties_changed(&emitter, interface, changes, Cow::Borrowed(&[])).await
    }

    async fn remove(&mut self, id: DiskSequence) -> zbus::Result<()> {
        if self.objects.remove(&id).is_none() {
            return Ok(());
        }
        let path = attachment_path(id.0);
        let server = self.connection.object_server();
        server.remove::<Attachment, _>(&path).await?;
        server.remove::<Volume, _>(&path).await?;
        Ok(())
    }
}

fn replace<T>(shared: &RwLock<T>, new: T) -> T {
    std::mem::replace(&mut *shared.write().unwrap_or_else(PoisonError::into_inner), new)
}
