//! `org.loopd1.Attachment`.

use std::collections::HashMap;

use loopd_common::{Lifetime, UnknownWord};
use loopd_dbus::options::ReceivedOptions;
use loopd_dbus::{AttachmentProperties, DetachOptions, Error, ErrorKind, ErrorReply};
use zbus::message::Header;
use zbus::{Variant, interface};

use super::authority::Request;
use super::call_error::CallError;
use super::context::{Call, Context, Operation, invalid_option};
use super::detach::{Detach, Target};
use super::shared_properties::SharedProperties;
use crate::platform::File;
use loopd_engine::kernel::{Change, DiskSequence, FileFacts};
use loopd_engine::{Caller as _, Snapshot, is_block_size};

/// The interface, on an attachment object.
pub struct Attachment {
    context: Context,
    id: DiskSequence,
    properties: SharedProperties<AttachmentProperties>,
}

impl Attachment {
    /// The interface of this attachment. The publisher updates the properties.
    pub fn new(
        context: Context,
        id: DiskSequence,
        properties: SharedProperties<AttachmentProperties>,
    ) -> Self {
        Self { context, id, properties }
    }

    async fn change(
        &self,
        header: &Header<'_>,
        method: &'static str,
        setting: Setting,
    ) -> Result<(), ErrorReply> {
        self.context.call(header, ChangeSetting { method, id: self.id, setting }).await
    }
}

#[interface(name = "org.loopd1.Attachment", introspection_docs = false)]
impl Attachment {
    async fn detach(
        &self,
        #[zbus(header)] header: Header<'_>,
        options: ReceivedOptions,
    ) -> Result<(), ErrorReply> {
        let DetachOptions { lazy } = DetachOptions::decode(options).map_err(invalid_option)?;
        self.context.call(&header, Detach { target: Target::Attachment(self.id), lazy }).await
    }

    async fn rescan_partitions(&self, #[zbus(header)] header: Header<'_>) -> Result<(), ErrorReply> {
        self.change(&header, "RescanPartitions", Setting::Partitions).await
    }

    async fn set_capacity(&self, #[zbus(header)] header: Header<'_>) -> Result<(), ErrorReply> {
        self.change(&header, "SetCapacity", Setting::Device(Change::Capacity)).await
    }

    async fn set_direct_io(&self, #[zbus(header)] header: Header<'_>, on: bool) -> Result<(), ErrorReply> {
        self.change(&header, "SetDirectIo", Setting::Device(Change::DirectIo(on))).await
    }

    async fn set_block_size(&self, #[zbus(header)] header: Header<'_>, bytes: u32) -> Result<(), ErrorReply> {
        if !is_block_size(bytes) {
            let message = format!("the block size {bytes} is not a power of two from 512 to 65536");
            return Err(Error::new(ErrorKind::InvalidArgs, message).into());
        }
        self.change(&header, "SetBlockSize", Setting::Device(Change::BlockSize(bytes))).await
    }

    async fn set_lifetime(
        &self,
        #[zbus(header)] header: Header<'_>,
        lifetime: String,
    ) -> Result<(), ErrorReply> {
        let lifetime = lifetime.parse().map_err(|error: UnknownWord| invalid_option(error.into()))?;
        self.change(&header, "SetLifetime", Setting::Lifetime(lifetime)).await
    }

    async fn replace_backing_file(
        &self,
        #[zbus(header)] header: Header<'_>,
        file: zbus::OwnedFd,
    ) -> Result<(), ErrorReply> {
        let file = self.context.claim(&file)?;
        self.context.call(&header, ReplaceBackingFile { id: self.id, file }).await
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn device(&self) -> String {
        self.properties.read().device.clone()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn number(&self) -> u32 {
        self.properties.read().number
    }

    #[zbus(property)]
    fn disk_sequence(&self) -> u64 {
        self.properties.read().disk_sequence
    }

    #[zbus(property)]
    fn backing_file(&self) -> Vec<u8> {
        self.properties.read().backing_file.clone()
    }

    #[zbus(property)]
    fn backing_device(&self) -> u64 {
        self.properties.read().backing_device
    }

    #[zbus(property)]
    fn backing_inode(&self) -> u64 {
        self.properties.read().backing_inode
    }

    #[zbus(property)]
    fn offset(&self) -> u64 {
        self.properties.read().offset
    }

    #[zbus(property)]
    fn size_limit(&self) -> u64 {
        self.properties.read().size_limit
    }

    #[zbus(property)]
    fn reference(&self) -> String {
        self.properties.read().reference.clone()
    }

    #[zbus(property)]
    fn read_only(&self) -> bool {
        self.properties.read().read_only
    }

    #[zbus(property)]
    fn direct_io(&self) -> bool {
        self.properties.read().direct_io
    }

    #[zbus(property)]
    fn block_size(&self) -> u32 {
        self.properties.read().block_size
    }

    #[zbus(property)]
    fn partition_scan(&self) -> bool {
        self.properties.read().partition_scan
    }

    #[zbus(property)]
    fn autoclear(&self) -> bool {
        self.properties.read().autoclear
    }

    #[zbus(property)]
    fn lifetime(&self) -> String {
        self.properties.read().lifetime.clone()
    }

    #[zbus(property)]
    fn managed(&self) -> bool {
        self.properties.read().managed
    }

    #[zbus(property)]
    fn owner(&self) -> u32 {
        self.properties.read().owner
    }

    #[zbus(property)]
    fn client(&self) -> String {
        self.properties.read().client.clone()
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn since(&self) -> u64 {
        self.properties.read().since
    }

    #[zbus(property)]
    fn state(&self) -> String {
        self.properties.read().state.clone()
    }

    #[zbus(property)]
    fn warnings(&self) -> Vec<(String, HashMap<String, Variant<'static>>)> {
        self.properties.read().warnings.to_value()
    }
}

/// The setting of an attachment that a method changes.
enum Setting {
    Device(Change),
    Partitions,
    Lifetime(Lifetime),
}

/// Changes an attachment.
struct ChangeSetting {
    method: &'static str,
    id: DiskSequence,
    setting: Setting,
}

impl Operation for ChangeSetting {
    type Object = Snapshot;
    type Output = ();

    fn method(&self) -> &'static str {
        self.method
    }

    async fn look_up(&self, call: &Call<'_>) -> Result<Snapshot, CallError> {
        call.find(self.id)
    }

    fn requests<'a>(&self, attachment: &'a Snapshot) -> Vec<Request<'a>> {
        vec![Request::Change(attachment)]
    }

    async fn run(self, call: &Call<'_>, _attachment: Snapshot) -> Result<(), CallError> {
        match self.setting {
            Setting::Device(change) => call.engine.change(self.id, change).await?,
            Setting::Partitions => call.engine.rescan(self.id).await?,
            Setting::Lifetime(lifetime) => call.engine.set_lifetime(self.id, lifetime, &call.caller).await?,
        }
        Ok(())
    }
}

/// Changes an attachment, and attaches another file to its device.
struct ReplaceBackingFile {
    id: DiskSequence,
    file: File,
}

impl Operation for ReplaceBackingFile {
    type Object = (Snapshot, Option<FileFacts>);
    type Output = ();

    fn method(&self) -> &'static str {
        "ReplaceBackingFile"
    }

    async fn look_up(&self, call: &Call<'_>) -> Result<Self::Object, CallError> {
        Ok((call.find(self.id)?, call.examine_for_authorization(&self.file).await?))
    }

    fn requests<'a>(&self, (attachment, file): &'a Self::Object) -> Vec<Request<'a>> {
        let attach = file.iter().map(|file| Request::Attach(file, Some(attachment.device.number)));
        std::iter::once(Request::Change(attachment)).chain(attach).collect()
    }

    async fn run(self, call: &Call<'_>, _object: Self::Object) -> Result<(), CallError> {
        Ok(call.engine.replace_backing_file(self.id, self.file, call.caller.uid()).await?)
    }
}
