//! `org.loopd1.Attachment`.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use loopd_common::UnknownWord;
use loopd_dbus::options::ReceivedOptions;
use loopd_dbus::{AttachmentProperties, DetachOptions, Error, ErrorKind, ErrorReply};
use zbus::interface;
use zbus::message::Header;

use super::{Room, invalid};
use crate::authority::Deed;
use loopd_engine::kernel::{Change, DiskSequence};
use loopd_engine::{Caller as _, is_block_size};

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

    async fn change(&self, header: &Header<'_>, change: Change) -> Result<(), Error> {
        let caller = self.room.may_change(header, self.id).await?;
        self.room.changed(&caller, self.room.engine.change(self.id, change).await).await
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
    ) -> Result<(), ErrorReply> {
        let options = DetachOptions::decode(options).map_err(invalid)?;
        let caller = self.room.identify(&header).await?;
        let attachment = self.room.find(self.id)?;
        Ok(self.room.detach(&caller, &attachment, options.lazy).await?)
    }

    async fn rescan_partitions(&self, #[zbus(header)] header: Header<'_>) -> Result<(), ErrorReply> {
        let caller = self.room.may_change(&header, self.id).await?;
        Ok(self.room.changed(&caller, self.room.engine.rescan(self.id).await).await?)
    }

    async fn set_capacity(&self, #[zbus(header)] header: Header<'_>) -> Result<(), ErrorReply> {
        Ok(self.change(&header, Change::Capacity).await?)
    }

    async fn set_direct_io(&self, #[zbus(header)] header: Header<'_>, on: bool) -> Result<(), ErrorReply> {
        Ok(self.change(&header, Change::DirectIo(on)).await?)
    }

    async fn set_block_size(&self, #[zbus(header)] header: Header<'_>, bytes: u32) -> Result<(), ErrorReply> {
        if !is_block_size(bytes) {
            let text = format!("the block size {bytes} is not a power of two from 512 to 65536");
            return Err(Error::new(ErrorKind::InvalidArgs, text).into());
        }
        Ok(self.change(&header, Change::BlockSize(bytes)).await?)
    }

    async fn set_lifetime(
        &self,
        #[zbus(header)] header: Header<'_>,
        lifetime: String,
    ) -> Result<(), ErrorReply> {
        let lifetime = lifetime.parse().map_err(|error: UnknownWord| invalid(error.into()))?;
        let caller = self.room.may_change(&header, self.id).await?;
        let result = self.room.engine.set_lifetime(self.id, lifetime, &caller).await;
        Ok(self.room.changed(&caller, result).await?)
    }

    async fn replace_backing_file(
        &self,
        #[zbus(header)] header: Header<'_>,
        file: zbus::OwnedFd,
    ) -> Result<(), ErrorReply> {
        let file = self.room.claim(&file)?;
        let caller = self.room.may_change(&header, self.id).await?;
        if self.room.authority.asks(&caller) {
            let facts = self.room.engine.examine(&file).await?;
            let number = self.room.find(self.id)?.device.number;
            self.room.authority.allow(&caller, Deed::Attach(&facts, Some(number))).await?;
        }
        let result = self.room.engine.replace_backing_file(self.id, file, caller.uid()).await;
        Ok(self.room.changed(&caller, result).await?)
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
