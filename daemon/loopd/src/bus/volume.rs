//! `org.loopd1.Volume`.

use loopd_dbus::options::ReceivedOptions;
use loopd_dbus::{Error, ErrorKind, ErrorReply, MountOptions, UnmountOptions, VolumeProperties};
use zbus::interface;
use zbus::message::Header;

use super::authority::Request;
use super::call_error::CallError;
use super::context::{Call, Context, Operation, invalid_option};
use super::convert;
use super::shared_properties::SharedProperties;
use loopd_engine::{Caller as _, MountRequest, Snapshot, VolumeId};

/// The interface, on an attachment object or a partition object.
pub struct Volume {
    context: Context,
    id: VolumeId,
    properties: SharedProperties<VolumeProperties>,
}

impl Volume {
    /// The interface of this volume. The publisher updates the properties.
    pub fn new(context: Context, id: VolumeId, properties: SharedProperties<VolumeProperties>) -> Self {
        Self { context, id, properties }
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
        let request = convert::mount_request(MountOptions::decode(options).map_err(invalid_option)?);
        self.context.call(&header, Mount { id: self.id, request }).await
    }

    async fn unmount(
        &self,
        #[zbus(header)] header: Header<'_>,
        options: ReceivedOptions,
    ) -> Result<(), ErrorReply> {
        let UnmountOptions { lazy } = UnmountOptions::decode(options).map_err(invalid_option)?;
        self.context.call(&header, Unmount { id: self.id, lazy }).await
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn device(&self) -> String {
        self.properties.read().device.clone()
    }

    #[zbus(property)]
    fn size(&self) -> u64 {
        self.properties.read().size
    }

    #[zbus(property)]
    fn usage(&self) -> String {
        self.properties.read().usage.clone()
    }

    #[zbus(property)]
    fn filesystem_type(&self) -> String {
        self.properties.read().filesystem_type.clone()
    }

    #[zbus(property)]
    fn filesystem_version(&self) -> String {
        self.properties.read().filesystem_version.clone()
    }

    #[zbus(property)]
    fn filesystem_label(&self) -> String {
        self.properties.read().filesystem_label.clone()
    }

    #[zbus(property)]
    fn filesystem_uuid(&self) -> String {
        self.properties.read().filesystem_uuid.clone()
    }

    #[zbus(property)]
    fn mount_points(&self) -> Vec<Vec<u8>> {
        self.properties.read().mount_points.clone()
    }
}

struct Mount {
    id: VolumeId,
    request: MountRequest,
}

impl Operation for Mount {
    type Object = Snapshot;
    /// The mount point.
    type Output = String;

    fn method(&self) -> &'static str {
        "Mount"
    }

    async fn look_up(&self, call: &Call<'_>) -> Result<Snapshot, CallError> {
        call.find(self.id.attachment)
    }

    fn requests<'a>(&self, attachment: &'a Snapshot) -> Vec<Request<'a>> {
        vec![Request::Mount(attachment, self.id.partition)]
    }

    async fn run(self, call: &Call<'_>, _attachment: Snapshot) -> Result<String, CallError> {
        let mount_point = call.engine.mount(self.id, &self.request, &call.caller).await?;
        mount_point.into_os_string().into_string().map_err(|mount_point| {
            Error::new(ErrorKind::Kernel, format!("{} is not UTF-8", mount_point.display())).into()
        })
    }
}

struct Unmount {
    id: VolumeId,
    lazy: bool,
}

impl Operation for Unmount {
    /// The attachment, and whether loopd mounted the volume for the caller.
    type Object = (Snapshot, bool);
    type Output = ();

    fn method(&self) -> &'static str {
        "Unmount"
    }

    async fn look_up(&self, call: &Call<'_>) -> Result<(Snapshot, bool), CallError> {
        let attachment = call.find(self.id.attachment)?;
        Ok((attachment, call.engine.is_mounted_for(self.id, call.caller.uid())))
    }

    fn requests<'a>(&self, (attachment, is_own): &'a (Snapshot, bool)) -> Vec<Request<'a>> {
        if *is_own { Vec::new() } else { vec![Request::UnmountOthers(attachment, self.id.partition)] }
    }

    async fn run(self, call: &Call<'_>, (_, is_own): (Snapshot, bool)) -> Result<(), CallError> {
        Ok(call.engine.unmount(self.id, self.lazy, call.caller.uid(), is_own).await?)
    }
}
