//! `org.loopd1.Volume`.

use std::sync::{Arc, PoisonError, RwLock, RwLockReadGuard};

use loopd_dbus::options::ReceivedOptions;
use loopd_dbus::{Error, ErrorKind, ErrorReply, MountOptions, UnmountOptions, VolumeProperties};
use tracing::info;
use zbus::interface;
use zbus::message::Header;

use super::{Room, invalid, wire};
use crate::authority::Deed;
use loopd_engine::{Caller as _, VolumeId};

/// What may hold a file system.
pub struct Volume {
    room: Room,
    id: VolumeId,
    properties: Arc<RwLock<VolumeProperties>>,
}

impl Volume {
    /// A volume. The publisher keeps the properties up to date.
    pub fn new(room: Room, id: VolumeId, properties: Arc<RwLock<VolumeProperties>>) -> Self {
        Self { room, id, properties }
    }

    fn properties(&self) -> RwLockReadGuard<'_, VolumeProperties> {
        self.properties.read().unwrap_or_else(PoisonError::into_inner)
    }
}

#[interface(name = "org.loopd1.Volume", introspection_docs = false)]
impl Volume {
    #[zbus(out_args("mount_point"))]
    async fn mount(
        &self,
        #[zbus(header)] header: Header<'_>,
        options: ReceivedOptions,
    ) -> Result<String, ErrorReply> {
        let wanted = wire::mount_request(MountOptions::decode(options).map_err(invalid)?);
        let caller = self.room.identify(&header).await?;
        let attachment = self.room.find(self.id.attachment)?;
        self.room.authority.allow(&caller, Deed::Mount(&attachment, self.id.partition)).await?;
        let mounted = self.room.engine.mount(self.id, &wanted, &caller).await;
        self.room.engine.flush_events().await;
        let place = mounted.inspect_err(|error| {
            info!(uid = caller.uid(), client = %caller.client(), "not mounted: {error}");
        })?;
        Ok(place
            .into_os_string()
            .into_string()
            .map_err(|place| Error::new(ErrorKind::Kernel, format!("{} is not UTF-8", place.display())))?)
    }

    async fn unmount(
        &self,
        #[zbus(header)] header: Header<'_>,
        options: ReceivedOptions,
    ) -> Result<(), ErrorReply> {
        let UnmountOptions { lazy } = UnmountOptions::decode(options).map_err(invalid)?;
        let caller = self.room.identify(&header).await?;
        let attachment = self.room.find(self.id.attachment)?;
        let own_only = self.room.engine.is_mounted_for(self.id, caller.uid());
        if !own_only {
            let deed = Deed::UnmountOthers(&attachment, self.id.partition);
            self.room.authority.allow(&caller, deed).await?;
        }
        let result = self.room.engine.unmount(self.id, lazy, caller.uid(), own_only).await;
        Ok(self.room.changed(&caller, result).await?)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn device(&self) -> String {
        self.properties().device.clone()
    }

    #[zbus(property)]
    fn size(&self) -> u64 {
        self.properties().size
    }

    #[zbus(property)]
    fn usage(&self) -> String {
        self.properties().usage.clone()
    }

    #[zbus(property)]
    fn filesystem_type(&self) -> String {
        self.properties().filesystem_type.clone()
    }

    #[zbus(property)]
    fn filesystem_version(&self) -> String {
        self.properties().filesystem_version.clone()
    }

    #[zbus(property)]
    fn filesystem_label(&self) -> String {
        self.properties().filesystem_label.clone()
    }

    #[zbus(property)]
    fn filesystem_uuid(&self) -> String {
        self.properties().filesystem_uuid.clone()
    }

    #[zbus(property)]
    fn mount_points(&self) -> Vec<Vec<u8>> {
        self.properties().mount_points.clone()
    }
}
