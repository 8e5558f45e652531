//! Publishes the engine's events: adds, changes and removes objects on the bus. It is the only one that does,
//! so that signals have the order of the events.

use std::collections::HashMap;

use loopd_dbus::names::{ATTACHMENT, PARTITION, VOLUME, attachment_path, partition_path};
use loopd_dbus::{AttachmentProperties, PartitionProperties, VolumeProperties};
use tracing::error;
use zbus::Connection;

use super::attachment::Attachment;
use super::board::Board;
use super::context::Context;
use super::encryption::{Encryption, may_be_encrypted};
use super::interfaces::{Interfaces, Shared};
use super::partition::Partition;
use super::volume::Volume;
use super::{convert, introspection};
use crate::platform::return_free_pages;
use loopd_engine::kernel::DiskSequence;
use loopd_engine::{Changes, Event, EventStream, PartitionSnapshot, Snapshot, VolumeId};

/// Publishes the objects below the root object.
pub struct Publisher {
    board: Board,
    objects: HashMap<DiskSequence, Published>,
    /// How many objects were removed since free memory was last returned.
    removed: usize,
}

/// How many objects are removed before free memory is returned: each has taken a few kilobytes.
const MANY: usize = 64;

/// The properties of the objects of one attachment.
struct Published {
    attachment: Shared<AttachmentProperties>,
    volume: Shared<VolumeProperties>,
    encryption: Encryption,
    partitions: HashMap<u32, PublishedPartition>,
}

impl Published {
    fn interfaces(&self) -> Interfaces {
        Interfaces::attachment(self.attachment.clone(), self.volume.clone())
    }
}

/// The properties of the object of one partition.
struct PublishedPartition {
    partition: Shared<PartitionProperties>,
    volume: Shared<VolumeProperties>,
    encryption: Encryption,
}

impl PublishedPartition {
    fn interfaces(&self) -> Interfaces {
        Interfaces::partition(self.partition.clone(), self.volume.clone())
    }
}

impl Publisher {
    /// Publishes on this connection.
    #[must_use]
    pub fn new(connection: Connection, context: Context) -> Self {
        Self { board: Board::new(connection, context), objects: HashMap::new(), removed: 0 }
    }

    /// Publishes the engine's events until the engine stops.
    pub async fn run(mut self, mut events: EventStream) {
        while let Some(event) = events.next().await {
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
            if let Some(partition) = object.partitions.remove(number) {
                self.remove_partition(changes.id, *number, partition).await?;
            }
        }
        self.publish_partitions(changes.id, changes.number, &changes.partitions, object).await?;
        // A disk that has partitions now is not encrypted as a whole.
        let may_be_encrypted = may_be_encrypted(&object.volume.read().usage, !object.partitions.is_empty());
        let interfaces = object.interfaces();
        object.encryption.set_encrypted(&self.board, may_be_encrypted, interfaces).await
    }

    async fn add_attachment(&self, snapshot: &Snapshot) -> zbus::Result<Published> {
        let attachment = Shared::new(convert::attachment(snapshot));
        let volume = Shared::new(convert::volume(snapshot));
        let path = attachment_path(snapshot.id.0);
        let (server, context) = (self.board.server(), self.board.context());
        server.at(&path, self.volume(snapshot.id, None, &volume)).await?;
        server.at(&path, Attachment::new(context.clone(), snapshot.id, attachment.clone())).await?;
        let mut encryption = Encryption::new(snapshot.id, None);
        let usage = &snapshot.file_system.usage;
        let is_encrypted =
            may_be_encrypted(usage, !snapshot.partitions.is_empty()) || snapshot.cleartext.is_some();
        encryption.serve(&self.board, is_encrypted).await?;
        introspection::serve(server, &path, context).await?;
        introspection::serve_above(server, context).await?;
        let mut object = Published { attachment, volume, encryption, partitions: HashMap::new() };
        let interfaces = object.interfaces().with_encrypted(object.encryption.encrypted());
        self.board.announce(&path, interfaces).await?;
        object.encryption.set_cleartext(&self.board, snapshot.cleartext.as_ref()).await?;
        Ok(object)
    }

    async fn change_attachment(&self, snapshot: &Snapshot, object: &mut Published) -> zbus::Result<()> {
        let path = attachment_path(snapshot.id.0);
        let (attachment, volume) = (convert::attachment(snapshot), convert::volume(snapshot));
        let of_attachment = attachment.changes_since(&object.attachment.replace(attachment.clone()));
        let of_volume = volume.changes_since(&object.volume.replace(volume.clone()));
        self.board.emit(&path, ATTACHMENT, of_attachment).await?;
        self.board.emit(&path, VOLUME, of_volume).await?;
        if snapshot.cleartext.is_some() {
            let interfaces = object.interfaces();
            object.encryption.set_encrypted(&self.board, true, interfaces).await?;
        }
        object.encryption.set_cleartext(&self.board, snapshot.cleartext.as_ref()).await
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
            match object.partitions.get_mut(&partition) {
                Some(known) => self.change_partition(attachment, known, snapshot, new, volume).await?,
                None => {
                    let added = self.add_partition(attachment, snapshot, new, volume).await?;
                    object.partitions.insert(partition, added);
                }
            }
            // There may be hundreds of partitions: let calls run in between.
            tokio::task::yield_now().await;
        }
        Ok(())
    }

    async fn change_partition(
        &self,
        attachment: DiskSequence,
        known: &mut PublishedPartition,
        snapshot: &PartitionSnapshot,
        partition: PartitionProperties,
        volume: VolumeProperties,
    ) -> zbus::Result<()> {
        let path = partition_path(attachment.0, partition.number);
        let changes = partition.changes_since(&known.partition.replace(partition.clone()));
        self.board.emit(&path, PARTITION, changes).await?;
        let changes = volume.changes_since(&known.volume.replace(volume.clone()));
        self.board.emit(&path, VOLUME, changes).await?;
        let (cleartext, interfaces) = (snapshot.cleartext.as_ref(), known.interfaces());
        let may_be_encrypted = may_be_encrypted(&volume.usage, false);
        if may_be_encrypted || cleartext.is_some() {
            known.encryption.set_encrypted(&self.board, true, interfaces).await?;
            return known.encryption.set_cleartext(&self.board, cleartext).await;
        }
        known.encryption.set_cleartext(&self.board, None).await?;
        known.encryption.set_encrypted(&self.board, false, interfaces).await
    }

    fn volume(
        &self,
        attachment: DiskSequence,
        partition: Option<u32>,
        properties: &Shared<VolumeProperties>,
    ) -> Volume {
        Volume::new(
            self.board.context().clone(),
            VolumeId { attachment, partition, is_cleartext: false },
            properties.clone(),
        )
    }

    async fn add_partition(
        &self,
        attachment: DiskSequence,
        snapshot: &PartitionSnapshot,
        partition: PartitionProperties,
        volume: VolumeProperties,
    ) -> zbus::Result<PublishedPartition> {
        let number = partition.number;
        let path = &partition_path(attachment.0, number);
        let may_be_encrypted = may_be_encrypted(&volume.usage, false) || snapshot.cleartext.is_some();
        let (partition, volume) = (Shared::new(partition), Shared::new(volume));
        let server = self.board.server();
        server.at(path, self.volume(attachment, Some(number), &volume)).await?;
        server.at(path, Partition::new(partition.clone())).await?;
        let mut encryption = Encryption::new(attachment, Some(number));
        encryption.serve(&self.board, may_be_encrypted).await?;
        introspection::serve(server, path, self.board.context()).await?;
        let mut object = PublishedPartition { partition, volume, encryption };
        let interfaces = object.interfaces().with_encrypted(object.encryption.encrypted());
        self.board.announce(path, interfaces).await?;
        object.encryption.set_cleartext(&self.board, snapshot.cleartext.as_ref()).await?;
        Ok(object)
    }

    async fn remove(&mut self, id: DiskSequence) -> zbus::Result<()> {
        let Some(object) = self.objects.remove(&id) else { return Ok(()) };
        self.count_removed(1 + object.partitions.len());
        for (number, partition) in object.partitions {
            self.remove_partition(id, number, partition).await?;
            tokio::task::yield_now().await;
        }
        let path = attachment_path(id.0);
        object.encryption.remove(&self.board).await?;
        let server = self.board.server();
        server.remove::<Attachment, _>(&path).await?;
        server.remove::<Volume, _>(&path).await?;
        self.board.withdraw(&path).await
    }

    fn count_removed(&mut self, objects: usize) {
        self.removed += objects;
        if self.removed >= MANY {
            self.removed = 0;
            return_free_pages();
        }
    }

    async fn remove_partition(
        &self,
        id: DiskSequence,
        number: u32,
        partition: PublishedPartition,
    ) -> zbus::Result<()> {
        let path = partition_path(id.0, number);
        partition.encryption.remove(&self.board).await?;
        let server = self.board.server();
        server.remove::<Partition, _>(&path).await?;
        server.remove::<Volume, _>(&path).await?;
        self.board.withdraw(&path).await
    }
}
