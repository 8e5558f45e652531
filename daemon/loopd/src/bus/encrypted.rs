//! `org.loopd1.Encrypted`.

use loopd_dbus::names::cleartext_path;
use loopd_dbus::options::ReceivedOptions;
use loopd_dbus::{EncryptedProperties, ErrorReply, LockOptions, UnlockOptions};
use zbus::interface;
use zbus::message::Header;
use zbus::wire::{ObjectPath, OwnedObjectPath};

use super::authority::Request;
use super::call_error::CallError;
use super::context::{Call, Context, Operation, invalid_option};
use super::interfaces::Shared;
use crate::platform::File;
use loopd_engine::{CleartextSnapshot, Snapshot, UnlockRequest, VolumeId};

/// The interface, on an attachment object or a partition object.
pub struct Encrypted {
    context: Context,
    id: VolumeId,
    properties: Shared<EncryptedProperties>,
}

impl Encrypted {
    /// The interface of this volume. The publisher updates the properties.
    pub fn new(context: Context, id: VolumeId, properties: Shared<EncryptedProperties>) -> Self {
        Self { context, id, properties }
    }

    fn request(
        &self,
        secret: &zbus::OwnedFd,
        options: UnlockOptions,
    ) -> Result<UnlockRequest<File>, CallError> {
        let UnlockOptions {
            kind,
            read_only,
            discard,
            header,
            key_files,
            key_size,
            key_offset,
            pim,
            hidden,
            system,
        } = options;
        let claim = |file| self.context.claim_unseen(file);
        Ok(UnlockRequest {
            secret: self.context.claim_unseen(secret)?,
            key_files: key_files.into_iter().map(claim).collect::<Result<_, _>>()?,
            header: header.map(claim).transpose()?,
            kind,
            read_only,
            discard,
            key_size,
            key_offset,
            pim,
            hidden,
            system,
        })
    }
}

#[interface(name = "org.loopd1.Encrypted", introspection_docs = false)]
impl Encrypted {
    #[zbus(out_args("cleartext", "device"))]
    async fn unlock(
        &self,
        #[zbus(header)] header: Header<'_>,
        secret: zbus::OwnedFd,
        options: ReceivedOptions,
    ) -> Result<(ObjectPath<'static>, String), ErrorReply> {
        let request = self.request(&secret, UnlockOptions::decode(options).map_err(invalid_option)?)?;
        let cleartext = self.context.call(&header, Unlock { id: self.id, request }).await?;
        Ok((cleartext_path(self.id.attachment.0, self.id.partition), cleartext.mapping.node()))
    }

    async fn lock(
        &self,
        #[zbus(header)] header: Header<'_>,
        options: ReceivedOptions,
    ) -> Result<(), ErrorReply> {
        let LockOptions { lazy } = LockOptions::decode(options).map_err(invalid_option)?;
        self.context.call(&header, Lock { id: self.id, lazy }).await
    }

    #[zbus(property)]
    fn cleartext(&self) -> OwnedObjectPath {
        self.properties.read().cleartext.clone()
    }
}

struct Unlock {
    id: VolumeId,
    request: UnlockRequest<File>,
}

impl Operation for Unlock {
    type Object = Snapshot;
    type Output = CleartextSnapshot;

    fn method(&self) -> &'static str {
        "Unlock"
    }

    async fn look_up(&self, call: &Call<'_>) -> Result<Snapshot, CallError> {
        call.find(self.id.attachment)
    }

    fn requests<'a>(&self, attachment: &'a Snapshot) -> Vec<Request<'a>> {
        vec![Request::Unlock(attachment, self.id.partition)]
    }

    async fn run(self, call: &Call<'_>, _attachment: Snapshot) -> Result<CleartextSnapshot, CallError> {
        Ok(call.engine.unlock(self.id, self.request, &call.caller).await?)
    }
}

struct Lock {
    id: VolumeId,
    lazy: bool,
}

impl Operation for Lock {
    type Object = Snapshot;
    type Output = ();

    fn method(&self) -> &'static str {
        "Lock"
    }

    async fn look_up(&self, call: &Call<'_>) -> Result<Snapshot, CallError> {
        call.find(self.id.attachment)
    }

    fn requests<'a>(&self, attachment: &'a Snapshot) -> Vec<Request<'a>> {
        vec![Request::Lock(attachment, self.id.partition)]
    }

    async fn run(self, call: &Call<'_>, _attachment: Snapshot) -> Result<(), CallError> {
        Ok(call.engine.lock(self.id, self.lazy).await?)
    }
}
