//! Publishes the engine's events: adds, changes and removes objects on the bus. It is the only one that does,
//! so that signals have the order of the events.

use std::borrow::Cow;
use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use loopd_dbus::names::{ATTACHMENT, PARTITION, ROOT_PATH, VOLUME, attachment_path, partition_path};
use loopd_dbus::{AttachmentProperties, PartitionProperties, VolumeProperties};
use tokio::time::{Instant, timeout_at};
use tracing::error;
use zbus::fdo::Properties;
use zbus::names::InterfaceName;
use zbus::object_server::SignalEmitter;
use zbus::wire::ObjectPath;
use zbus::{Connection, Variant};

use super::attachment::Attachment;
use super::context::Context;
use super::interfaces::{Interfaces, Shared};
use super::partition::Partition;
use super::volume::Volume;
use super::{convert, introspection, object_manager};
use crate::platform::return_free_pages;
use loopd_engine::kernel::DiskSequence;
use loopd_engine::{Changes, Event, EventStream, PartitionSnapshot, Snapshot, VolumeId};

/// Publishes the objects below the root object.
pub struct Publisher {
    connection: Connection,
    context: Context,
    objects: BTreeMap<DiskSequence, Published>,
    /// How many objects were removed since free memory was last returned.
    removed: usize,
    /// When free memory is returned next.
    returns_memory: Option<Instant>,
}

/// How many objects are removed before free memory is returned: each has taken a few kilobytes.
const MANY: usize = 64;
/// How long after that it is returned: more objects may be removed, and the threads that removed them have ended.
const SETTLED: Duration = Duration::from_secs(2);

/// The properties of the objects of one attachment.
struct Published {
    attachment: Shared<AttachmentProperties>,
    volume: Shared<VolumeProperties>,
    partitions: BTreeMap<u32, PublishedPartition>,
}

/// The properties of the object of one partition.
struct PublishedPartition {
    partition: Shared<PartitionProperties>,
    volume: Shared<VolumeProperties>,
}

impl Publisher {
    /// Publishes on this connection.
    #[must_use]
    pub fn new(connection: Connection, context: Context) -> Self {
        Self { connection, context, objects: BTreeMap::new(), removed: 0, returns_memory: None }
    }

    /// Publishes the engine's events until the engine stops.
    pub async fn run(mut self, mut events: EventStream) {
        while let Some(event) = self.next(&mut events).await {
            let published = match event {
                Event::Added(snapshot) => self.add(&snapshot).await,
                Event::Changed(changes) => self.change(&changes).await,
                Event::Removed(id) => self.remove(id).await,
                Event::Checkpoint(done) => {
                    let _the_call_has_ended = done.send(());
                    Ok(())
                }
            };
            if let Err(error) = published {
                error!("cannot publish an event on the bus: {error}");
            }
        }
    }

    /// The next event. Returns free memory in the meantime.
    async fn next(&mut self, events: &mut EventStream) -> Option<Event> {
        while let Some(moment) = self.returns_memory {
            match timeout_at(moment, events.next()).await {
                Ok(event) => return event,
                Err(_elapsed) => self.return_memory(),
            }
        }
        events.next().await
    }

    /// Adds the objects of a new attachment.
    async fn add(&mut self, snapshot: &Snapshot) -> zbus::Result<()> {
        let mut object = self.add_attachment(snapshot).await?;
        let partitions = &snapshot.partitions;
        let published =
            self.publish_partitions(snapshot.id, snapshot.device.number, partitions, &mut object).await;
        self.objects.insert(snapshot.id, object);
        published
    }

    /// Updates the objects of an attachment.
    async fn change(&mut self, changes: &Changes) -> zbus::Result<()> {
        let Some(mut object) = self.objects.remove(&changes.id) else { return Ok(()) };
        let changed = self.change_object(changes, &mut object).await;
        self.objects.insert(changes.id, object);
        changed
    }

    async fn change_object(&self, changes: &Changes, object: &mut Published) -> zbus::Result<()> {
        if let Some(snapshot) = &changes.attachment {
            self.change_attachment(snapshot, object).await?;
        }
        for number in &changes.gone {
            if object.partitions.remove(number).is_some() {
                self.remove_partition(changes.id, *number).await?;
            }
        }
        self.publish_partitions(changes.id, changes.number, &changes.partitions, object).await
    }

    async fn add_attachment(&self, snapshot: &Snapshot) -> zbus::Result<Published> {
        let attachment = Shared::new(convert::attachment(snapshot));
        let volume = Shared::new(convert::volume(snapshot));
        let path = attachment_path(snapshot.id.0);
        let server = self.connection.object_server();
        server.at(&path, self.volume(snapshot.id, None, &volume)).await?;
        let object = Attachment::new(self.context.clone(), snapshot.id, attachment.clone());
        server.at(&path, object).await?;
        introspection::serve(server, &path, &self.context).await?;
        introspection::serve_above(server, &self.context).await?;
        self.add_object(&path, Interfaces::Attachment(attachment.clone(), volume.clone())).await?;
        Ok(Published { attachment, volume, partitions: BTreeMap::new() })
    }

    async fn change_attachment(&self, snapshot: &Snapshot, object: &Published) -> zbus::Result<()> {
        let path = attachment_path(snapshot.id.0);
        let (attachment, volume) = (convert::attachment(snapshot), convert::volume(snapshot));
        let of_attachment = attachment.changes_since(&object.attachment.replace(attachment.clone()));
        let of_volume = volume.changes_since(&object.volume.replace(volume.clone()));
        self.emit(&path, ATTACHMENT, of_attachment).await?;
        self.emit(&path, VOLUME, of_volume).await
    }

    /// Adds or updates partitions of the attachment, whose loop device has this number.
    async fn publish_partitions(
        &self,
        attachment: DiskSequence,
        number: u32,
        partitions: &[PartitionSnapshot],
        object: &mut Published,
    ) -> zbus::Result<()> {
        for snapshot in partitions {
            let partition = snapshot.partition.node.number;
            let new = convert::partition(attachment, snapshot);
            let volume = convert::partition_volume(number, snapshot);
            match object.partitions.entry(partition) {
                Entry::Occupied(known) => {
                    let path = partition_path(attachment.0, partition);
                    let changes = new.changes_since(&known.get().partition.replace(new.clone()));
                    self.emit(&path, PARTITION, changes).await?;
                    let changes = volume.changes_since(&known.get().volume.replace(volume.clone()));
                    self.emit(&path, VOLUME, changes).await?;
                }
                Entry::Vacant(free) => drop(free.insert(self.add_partition(attachment, new, volume).await?)),
            }
            // There may be hundreds of partitions: let calls run in between.
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    fn volume(
        &self,
        attachment: DiskSequence,
        partition: Option<u32>,
        properties: &Shared<VolumeProperties>,
    ) -> Volume {
        Volume::new(self.context.clone(), VolumeId { attachment, partition }, properties.clone())
    }

    async fn add_partition(
        &self,
        attachment: DiskSequence,
        partition: PartitionProperties,
        volume: VolumeProperties,
    ) -> zbus::Result<PublishedPartition> {
        let number = partition.number;
        let path = &partition_path(attachment.0, number);
        let (partition, volume) = (Shared::new(partition), Shared::new(volume));
        let server = self.connection.object_server();
        server.at(path, self.volume(attachment, Some(number), &volume)).await?;
        server.at(path, Partition::new(partition.clone())).await?;
        introspection::serve(server, path, &self.context).await?;
        self.add_object(path, Interfaces::Partition(partition.clone(), volume.clone())).await?;
        Ok(PublishedPartition { partition, volume })
    }

    async fn emit(
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

    async fn add_object(&self, path: &ObjectPath<'_>, interfaces: Interfaces) -> zbus::Result<()> {
        object_manager::add(self.context.objects(), &self.root()?, path, interfaces).await
    }

    /// Emits the signals of the object manager.
    fn root(&self) -> zbus::Result<SignalEmitter<'static>> {
        SignalEmitter::new(&self.connection, ROOT_PATH)
    }

    async fn remove(&mut self, id: DiskSequence) -> zbus::Result<()> {
        let Some(object) = self.objects.remove(&id) else { return Ok(()) };
        self.count_removed(1 + object.partitions.len());
        for number in object.partitions.into_keys() {
            self.remove_partition(id, number).await?;
            tokio::task::yield_now().await;
        }
        let path = attachment_path(id.0);
        let server = self.connection.object_server();
        server.remove::<Attachment, _>(&path).await?;
        server.remove::<Volume, _>(&path).await?;
        object_manager::remove(self.context.objects(), &self.root()?, &path).await
    }

    fn count_removed(&mut self, objects: usize) {
        self.removed += objects;
        if self.removed >= MANY && self.returns_memory.is_none() {
            self.returns_memory = Some(Instant::now() + SETTLED);
        }
    }

    fn return_memory(&mut self) {
        (self.removed, self.returns_memory) = (0, None);
        return_free_pages();
    }

    async fn remove_partition(&self, id: DiskSequence, number: u32) -> zbus::Result<()> {
        let path = partition_path(id.0, number);
        let server = self.connection.object_server();
        server.remove::<Partition, _>(&path).await?;
        server.remove::<Volume, _>(&path).await?;
        object_manager::remove(self.context.objects(), &self.root()?, &path).await
    }
}
