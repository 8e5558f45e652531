//! `org.loopd1.Attachment`.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use loopd_dbus::options::ReceivedOptions;
use loopd_dbus::{AttachmentProperties, DetachOptions, Error, ErrorKind};
use zbus::interface;
use zbus::message::Header;

use super::Room;
use crate::authority::Deed;
use crate::kernel::DiskSequence;

/// One attached loop device.
pub struct Attachment {
    room: Room,
    id: DiskSequence,
    properties: Arc<RwLock<AttachmentProperties>>,
}

impl Attachment {
    /// The object of this attachment. The publisher keeps the properties up to date.
    pub fn new(room: Room, id: DiskSequence, properties: Arc<RwLock<AttachmentProperties>>) -> Self {
        Self { room, id, properties }
    }

    fn properties(&self) -> RwLockReadGuard<'_, AttachmentProperties> {
        self.properties.read().unwrap_or_else(PoisonError::into_inner)
    }
}

#[interface(name = "org.loopd1.Attachment", introspection_docs = false)]
impl Attachment {
    async fn detach(
        &self,
        #[zbus(header)] header: Header<'_>,
        options: ReceivedOptions,
    ) -> Result<(), Error> {
        let options = DetachOptions::decode(options)
            .map_err(|option| Error::new(ErrorKind::InvalidArgs, option.to_string()))?;
        let caller = self.room.identify(&header).await?;
        let attachment = self.room.find(self.id)?;
        self.room.detach(&caller, &attachment, options.lazy).await
    }

    async fn rescan_partitions(&self, #[zbus(header)] header: Header<'_>) -> Result<(), Error> {
        let caller = self.room.identify(&header).await?;
        let attachment = self.room.find(self.id)?;
        self.room.authority.allow(&caller, Deed::Change(&attachment)).await?;
        self.room.engine.rescan(self.id).await?;
        self.room.engine.told().await;
        Ok(())
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn device(&self) -> String {
        self.properties().device.clone()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn number(&self) -> u32 {
        self.properties().number
    }

    #[zbus(property)]
    fn disk_sequence(&self) -> u64 {
        self.properties().disk_sequence
    }

    #[zbus(property)]
    fn backing_file(&self) -> Vec<u8> {
        self.properties().backing_file.clone()
    }

    #[zbus(property)]
    fn backing_device(&self) -> u64 {
        self.properties().backing_device
    }

    #[zbus(property)]
    fn backing_inode(&self) -> u64 {
        self.properties().backing_inode
    }

    #[zbus(property)]
    fn offset(&self) -> u64 {
        self.properties().offset
    }

    #[zbus(property)]
    fn size_limit(&self) -> u64 {
        self.properties().size_limit
    }

    #[zbus(property)]
    fn reference(&self) -> String {
        self.properties().reference.clone()
    }

    #[zbus(property)]
    fn read_only(&self) -> bool {
        self.properties().read_only
    }

    #[zbus(property)]
    fn direct_io(&self) -> bool {
        self.properties().direct_io
    }

    #[zbus(property)]
    fn block_size(&self) -> u32 {
        self.properties().block_size
    }

    #[zbus(property)]
    fn partition_scan(&self) -> bool {
        self.properties().partition_scan
    }

    #[zbus(property)]
    fn autoclear(&self) -> bool {
        self.properties().autoclear
    }

    #[zbus(property)]
    fn lifetime(&self) -> String {
        self.properties().lifetime.clone()
    }

    #[zbus(property)]
    fn managed(&self) -> bool {
        self.properties().managed
    }

    #[zbus(property)]
    fn owner(&self) -> u32 {
        self.properties().owner
    }

    #[zbus(property)]
    fn client(&self) -> String {
        self.properties().client.clone()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn since(&self) -> u64 {
        self.properties().since
    }

    #[zbus(property)]
    fn state(&self) -> String {
        self.properties().state.clone()
    }
}
