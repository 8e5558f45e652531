//! `org.loopd1.Manager`.

use std::collections::HashMap;

use loopd_common::CallerFile;
use loopd_dbus::names::attachment_path;
use loopd_dbus::options::ReceivedOptions;
use loopd_dbus::{AttachOptions, DetachOptions, Error, ErrorKind, ErrorReply, ListOptions};
use tracing::info;
use zbus::message::Header;
use zbus::wire::{ObjectPath, OwnedObjectPath};
use zbus::{Variant, interface};

use super::answers::Answer;
use super::{Room, invalid, wire};
use crate::authority::Deed;
use crate::caller::Caller;
use loopd_common::text::printable;
use loopd_engine::{AttachRequest, Caller as _, Snapshot};

/// The root object.
pub struct Manager {
    room: Room,
}

type Listed = (OwnedObjectPath, HashMap<&'static str, Variant<'static>>);

#[interface(name = "org.loopd1.Manager", introspection_docs = false)]
impl Manager {
    #[zbus(out_args("attachment", "device"))]
    async fn setup_loop(
        &self,
        #[zbus(header)] header: Header<'_>,
        file: zbus::OwnedFd,
        options: ReceivedOptions,
    ) -> Result<(ObjectPath<'static>, String), ErrorReply> {
        let file = self.room.claim(&file)?;
        // Before anything is waited for: an option takes many times the memory of its bytes.
        let request = wire::attach_request(AttachOptions::decode(options).map_err(invalid)?);
        request.check()?;
        let caller = self.room.identify(&header).await?;
        let attached = self.attach(&caller, file, request).await?;
        Ok((attachment_path(attached.id.0), attached.device.node()))
    }

    async fn detach(
        &self,
        #[zbus(header)] header: Header<'_>,
        device: String,
        options: ReceivedOptions,
    ) -> Result<(), ErrorReply> {
        let options = DetachOptions::decode(options).map_err(invalid)?;
        let number = loop_number(&device)?;
        let caller = self.room.identify(&header).await?;
        let attachment = self.room.engine.locate(number).await?;
        Ok(self.room.detach(&caller, &attachment, options.lazy).await?)
    }

    #[zbus(out_args("attachments"))]
    async fn list(
        &self,
        #[zbus(header)] header: Header<'_>,
        options: ReceivedOptions,
    ) -> Result<Answer<Vec<Listed>>, ErrorReply> {
        let options = ListOptions::decode(options).map_err(invalid)?;
        let file = options.file.map(|file| self.room.claim(&file)).transpose()?;
        let _caller = self.room.identify(&header).await?;
        // The file may lie on a file system that hangs.
        let file = match file {
            Some(file) => Some(self.room.engine.examine(&file).await?),
            None => None,
        };
        let wanted = |snapshot: &Snapshot| {
            (options.all || snapshot.ownership.is_some())
                && options.offset.is_none_or(|offset| offset == snapshot.device.offset)
                && file.as_ref().is_none_or(|file| snapshot.device.shows(file.identity))
        };
        let list =
            || self.room.engine.outlines().iter().filter(|snapshot| wanted(snapshot)).map(listed).collect();
        Ok(self.room.answers.make(list).await)
    }

    #[zbus(out_args("device"))]
    async fn find_free(&self, #[zbus(header)] header: Header<'_>) -> Result<String, ErrorReply> {
        // Bounded for each uid: it may make a device.
        let _caller = self.room.identify(&header).await?;
        Ok(loopd_engine::kernel::node(self.room.engine.free_number().await?))
    }

    async fn remove_device(
        &self,
        #[zbus(header)] header: Header<'_>,
        device: String,
    ) -> Result<(), ErrorReply> {
        let number = loop_number(&device)?;
        let caller = self.room.identify(&header).await?;
        self.room.authority.allow(&caller, Deed::Remove(number)).await?;
        let result = self.room.engine.remove_device(number).await;
        Ok(self.room.changed(&caller, result).await?)
    }

    #[zbus(property(emits_changed_signal = "const"))]
    fn version(&self) -> &'static str {
        env!("CARGO_PKG_VERSION")
    }
}

impl Manager {
    /// The manager of this room.
    pub fn new(room: Room) -> Self {
        Self { room }
    }

    /// Attaches for a caller, once the authority has agreed; returns when the bus was told.
    async fn attach(
        &self,
        caller: &Caller,
        file: CallerFile,
        request: AttachRequest,
    ) -> Result<Snapshot, Error> {
        let engine = &self.room.engine;
        if self.room.authority.asks(caller) {
            let facts = engine.examine(&file).await?;
            self.room.authority.allow(caller, Deed::Attach(&facts, request.number)).await?;
        }
        let attached = engine.attach(file, request, caller).await;
        engine.flush_events().await;
        attached.inspect_err(|error| {
            info!(uid = caller.uid(), client = %caller.client(), "not attached: {error}");
        })
    }
}

fn listed(snapshot: &Snapshot) -> Listed {
    let mut properties = wire::attachment(snapshot).to_dict();
    properties.extend(wire::volume(snapshot).to_dict());
    (attachment_path(snapshot.id.0).into(), properties)
}

/// N of a `/dev/loopN`, and of nothing else.
fn loop_number(device: &str) -> Result<u32, Error> {
    let number = device.strip_prefix("/dev/loop").and_then(|digits| digits.parse::<u32>().ok());
    number.filter(|number| loopd_engine::kernel::node(*number) == device).ok_or_else(|| {
        let shown = printable(device.as_bytes());
        Error::new(
            ErrorKind::InvalidArgs,
            format!("{shown} is not a loop device; name one such as /dev/loop0"),
        )
    })
}

#[cfg(test)]
mod tests {
    use super::loop_number;

    #[test]
    fn only_loop_devices_are_named() {
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
