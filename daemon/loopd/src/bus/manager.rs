//! `org.loopd1.Manager`.

use loopd_dbus::dictionary::Sent;
use loopd_dbus::encoder::{Encoded, Encoder, STRUCT};
use loopd_dbus::names::attachment_path;
use loopd_dbus::options::ReceivedOptions;
use loopd_dbus::{AttachOptions, DetachOptions, Error, ErrorKind, ErrorReply, ListOptions};
use zbus::interface;
use zbus::message::Header;
use zbus::wire::{Endian, ObjectPath, OwnedObjectPath};

use super::authority::Request;
use super::call_error::CallError;
use super::context::{Call, Context, Operation, invalid_option};
use super::convert;
use super::detach::{Detach, Target};
use super::large_replies::LargeReply;
use crate::platform::File;
use loopd_common::text::printable;
use loopd_engine::kernel::{FileFacts, node};
use loopd_engine::{AttachRequest, Snapshot};

/// The interface, on the root object.
pub struct Manager {
    context: Context,
}

/// The reply of `List`: the properties of both interfaces of each attachment.
type Listed = Encoded<Vec<(OwnedObjectPath, Sent)>>;

impl Manager {
    /// The manager.
    pub fn new(context: Context) -> Self {
        Self { context }
    }
}

#[interface(name = "org.loopd1.Manager", introspection_docs = false)]
impl Manager {
    #[zbus(out_args("attachment", "device"))]
    async fn setup_loop(
        &self,
        #[zbus(header)] header: Header<'_>,
        file: zbus::OwnedFd,
        options: ReceivedOptions,
    ) -> Result<(ObjectPath<'static>, String), ErrorReply> {
        let file = self.context.claim(&file)?;
        // Before any wait: decoded options take much less memory than received ones.
        let request = convert::attach_request(AttachOptions::decode(options).map_err(invalid_option)?);
        request.check().map_err(CallError::from)?;
        let attached = self.context.call(&header, SetupLoop { file, request }).await?;
        Ok((attachment_path(attached.id.0), attached.device.node()))
    }

    async fn detach(
        &self,
        #[zbus(header)] header: Header<'_>,
        device: String,
        options: ReceivedOptions,
    ) -> Result<(), ErrorReply> {
        let DetachOptions { lazy } = DetachOptions::decode(options).map_err(invalid_option)?;
        let target = Target::Device(loop_number(&device)?);
        self.context.call(&header, Detach { target, lazy }).await
    }

    #[zbus(out_args("attachments"))]
    async fn list(
        &self,
        #[zbus(header)] header: Header<'_>,
        options: ReceivedOptions,
    ) -> Result<LargeReply<Listed>, ErrorReply> {
        let ListOptions { file, offset, all } = ListOptions::decode(options).map_err(invalid_option)?;
        let file = file.map(|file| self.context.claim(&file)).transpose()?;
        let endian = header.primary().endian_sig().into();
        self.context.call(&header, List { file, offset, all, endian }).await
    }

    #[zbus(out_args("device"))]
    async fn find_free(&self, #[zbus(header)] header: Header<'_>) -> Result<String, ErrorReply> {
        self.context.call(&header, FindFree).await
    }

    async fn remove_device(
        &self,
        #[zbus(header)] header: Header<'_>,
        device: String,
    ) -> Result<(), ErrorReply> {
        self.context.call(&header, RemoveDevice { number: loop_number(&device)? }).await
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> &'static str {
        env!("CARGO_PKG_VERSION")
    }
}

struct SetupLoop {
    file: File,
    request: AttachRequest,
}

impl Operation for SetupLoop {
    type Object = Option<FileFacts>;
    type Output = Snapshot;

    fn method(&self) -> &'static str {
        "SetupLoop"
    }

    async fn look_up(&self, call: &Call<'_>) -> Result<Option<FileFacts>, CallError> {
        call.examine_for_authorization(&self.file).await
    }

    fn requests<'a>(&self, file: &'a Option<FileFacts>) -> Vec<Request<'a>> {
        file.iter().map(|file| Request::Attach(file, self.request.number)).collect()
    }

    async fn run(self, call: &Call<'_>, _file: Option<FileFacts>) -> Result<Snapshot, CallError> {
        let Self { file, request } = self;
        Ok(call.engine.attach(file, request, &call.caller).await?)
    }
}

struct List {
    file: Option<File>,
    offset: Option<u64>,
    all: bool,
    endian: Endian,
}

impl List {
    fn includes(&self, attachment: &Snapshot, file: Option<&FileFacts>) -> bool {
        (self.all || attachment.ownership.is_some())
            && self.offset.is_none_or(|offset| offset == attachment.device.offset)
            && file.is_none_or(|file| attachment.device.shows(file.identity))
    }
}

impl Operation for List {
    type Object = Option<FileFacts>;
    type Output = LargeReply<Listed>;
    const CHANGES_ATTACHMENTS: bool = false;

    fn method(&self) -> &'static str {
        "List"
    }

    async fn look_up(&self, call: &Call<'_>) -> Result<Option<FileFacts>, CallError> {
        match &self.file {
            Some(file) => Ok(Some(call.engine.examine(file).await?)),
            None => Ok(None),
        }
    }

    fn requests<'a>(&self, _file: &'a Option<FileFacts>) -> Vec<Request<'a>> {
        Vec::new()
    }

    async fn run(self, call: &Call<'_>, file: Option<FileFacts>) -> Result<Self::Output, CallError> {
        if self.all {
            call.engine.catch_up().await?;
        }
        let list = || {
            let attachments = call.engine.outlines();
            let included = attachments.iter().filter(|attachment| self.includes(attachment, file.as_ref()));
            Listed::new(self.endian, |encoder| included.for_each(|attachment| encode(attachment, encoder)))
        };
        Ok(call.large_replies.build(list).await)
    }
}

fn encode(attachment: &Snapshot, encoder: &mut Encoder) {
    encoder.align(STRUCT);
    encoder.str(attachment_path(attachment.id.0).as_str());
    encoder.joined(&convert::attachment(attachment), &convert::volume(attachment));
}

/// May add a device. The call quota of each uid limits how many.
struct FindFree;

impl Operation for FindFree {
    type Object = ();
    type Output = String;
    const CHANGES_ATTACHMENTS: bool = false;

    fn method(&self) -> &'static str {
        "FindFree"
    }

    async fn look_up(&self, _call: &Call<'_>) -> Result<(), CallError> {
        Ok(())
    }

    fn requests<'a>(&self, (): &'a ()) -> Vec<Request<'a>> {
        Vec::new()
    }

    async fn run(self, call: &Call<'_>, (): ()) -> Result<String, CallError> {
        Ok(node(call.engine.free_number().await?))
    }
}

struct RemoveDevice {
    number: u32,
}

impl Operation for RemoveDevice {
    type Object = ();
    type Output = ();

    fn method(&self) -> &'static str {
        "RemoveDevice"
    }

    async fn look_up(&self, _call: &Call<'_>) -> Result<(), CallError> {
        Ok(())
    }

    fn requests<'a>(&self, (): &'a ()) -> Vec<Request<'a>> {
        vec![Request::Remove(self.number)]
    }

    async fn run(self, call: &Call<'_>, (): ()) -> Result<(), CallError> {
        Ok(call.engine.remove_device(self.number).await?)
    }
}

/// The number of a loop device that is named as `/dev/loopN`.
fn loop_number(device: &str) -> Result<u32, Error> {
    let number = device.strip_prefix("/dev/loop").and_then(|digits| digits.parse::<u32>().ok());
    number.filter(|number| node(*number) == device).ok_or_else(|| {
        let shown = printable(device.as_bytes());
        Error::new(
            ErrorKind::InvalidArgs,
            format!("{shown} is not the name of a loop device such as /dev/loop0"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::loop_number;

    #[test]
    fn only_names_of_loop_devices_are_accepted() {
        assert_eq!(loop_number("/dev/loop0").unwrap(), 0);
        assert_eq!(loop_number("/dev/loop1048575").unwrap(), 1_048_575);
        for other in [
            "",
            "loop0",
            "/dev/loop",
            "/dev/loop-control",
            "/dev/loop00",
            "/dev/loop+1",
            "/dev/loop4294967296",
            "/dev/loop0p1",
            "/dev/sda",
            "../dev/loop0",
            "/dev/loop0 ",
            "/dev/loop0/",
        ] {
            assert!(loop_number(other).is_err(), "{other}");
        }
    }
}
