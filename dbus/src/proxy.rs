//! Proxies for clients.
//!
//! Written by hand, because the generated proxies of zbus fix for each method whether polkit may
//! prompt. Here the caller of a method decides.

use std::collections::HashMap;
use std::os::fd::BorrowedFd;

use zbus::proxy::MethodFlags;
use zbus::wire::{DynamicDeserialize, DynamicType, ObjectPath, OwnedObjectPath};
use zbus::{Connection, Fd, OwnedVariant, Proxy};

use loopd_common::Lifetime;
use loopd_common::text::{is_deceptive, printable};

use crate::names::{
    ATTACHMENT, BUS_NAME, ENCRYPTED, MANAGER, ROOT_PATH, VOLUME, is_loop_node, is_mapping_node,
};
use crate::options::{AttachOptions, DetachOptions, ListOptions, LockOptions, MountOptions, UnmountOptions};
use crate::properties::AttachmentProperties;
use crate::unlock_options::UnlockOptions;

/// An attachment's path and its properties: those of `Attachment` and of `Volume`.
pub type Listed = (OwnedObjectPath, HashMap<String, OwnedVariant>);

const PROPERTIES: &str = "org.freedesktop.DBus.Properties";

/// Whether polkit may ask the user.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interaction {
    /// A prompt may appear; the call then waits for the user.
    Allowed,
    /// No prompt appears; a call that needs one fails.
    Forbidden,
}

impl Interaction {
    fn flags(self) -> MethodFlags {
        match self {
            Self::Allowed => MethodFlags::ALLOW_INTERACTIVE_AUTH,
            Self::Forbidden => MethodFlags::empty(),
        }
    }
}

async fn call<B, R>(proxy: &Proxy<'_>, method: &str, interaction: Interaction, body: &B) -> zbus::Result<R>
where
    B: serde::Serialize + DynamicType,
    R: for<'d> DynamicDeserialize<'d>,
{
    let reply = proxy.call_with_flags(method, interaction.flags(), body).await?;
    reply.ok_or(zbus::Error::InvalidReply)
}

/// The reply is printed and opened: it must be the node of a loop device, even if another process owns loopd's name.
fn loop_node(answer: String) -> zbus::Result<String> {
    if is_loop_node(&answer) {
        return Ok(answer);
    }
    Err(zbus::Error::Failure(format!("the reply is not a loop device: {}", printable(answer.as_bytes()))))
}

/// As [`loop_node`], for a cleartext.
fn mapping_node(answer: String) -> zbus::Result<String> {
    if is_mapping_node(&answer) {
        return Ok(answer);
    }
    let shown = printable(answer.as_bytes());
    Err(zbus::Error::Failure(format!("the reply is not a device of the device mapper: {shown}")))
}

/// The reply is printed: it must have no deceptive characters. loopd's directories never have any.
fn mount_point(answer: String) -> zbus::Result<String> {
    if answer.starts_with('/') && !answer.chars().any(is_deceptive) {
        return Ok(answer);
    }
    Err(zbus::Error::Failure(format!("the reply is not a mount point: {}", printable(answer.as_bytes()))))
}

/// `org.loopd1.Manager`.
#[derive(Clone, Debug)]
pub struct Manager {
    proxy: Proxy<'static>,
    interaction: Interaction,
}

impl Manager {
    /// The manager on this connection. No call is made yet.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn new(connection: &Connection, interaction: Interaction) -> zbus::Result<Self> {
        Ok(Self {
            proxy: object(connection, ObjectPath::from_static_str_unchecked(ROOT_PATH), MANAGER).await?,
            interaction,
        })
    }

    /// Attaches the file; returns the object and the device node.
    ///
    /// # Errors
    /// Those of the contract ([`crate::error::from_call`]), or the bus failed.
    pub async fn setup_loop(
        &self,
        file: BorrowedFd<'_>,
        options: &AttachOptions,
    ) -> zbus::Result<(OwnedObjectPath, String)> {
        let body = (Fd::from(file), options.encode());
        let (object, device): (OwnedObjectPath, String) =
            call(&self.proxy, "SetupLoop", self.interaction, &body).await?;
        Ok((object, loop_node(device)?))
    }

    /// Detaches the device node.
    ///
    /// # Errors
    /// Those of the contract, or the bus failed.
    pub async fn detach(&self, device: &str, options: DetachOptions) -> zbus::Result<()> {
        call(&self.proxy, "Detach", self.interaction, &(device, options.encode())).await
    }

    /// The attachments.
    ///
    /// # Errors
    /// Those of the contract, or the bus failed.
    pub async fn list(&self, options: &ListOptions) -> zbus::Result<Vec<Listed>> {
        call(&self.proxy, "List", Interaction::Forbidden, &(options.encode(),)).await
    }

    /// The node of a loop device that is free at this moment; another process may take it first.
    ///
    /// # Errors
    /// `NoFreeDevice`, or the bus failed.
    pub async fn find_free(&self) -> zbus::Result<String> {
        loop_node(call(&self.proxy, "FindFree", Interaction::Forbidden, &()).await?)
    }

    /// Removes a free loop device.
    ///
    /// # Errors
    /// Those of the contract, or the bus failed.
    pub async fn remove_device(&self, device: &str) -> zbus::Result<()> {
        call(&self.proxy, "RemoveDevice", self.interaction, &(device,)).await
    }

    /// The daemon's version.
    ///
    /// # Errors
    /// The bus failed.
    pub async fn version(&self) -> zbus::Result<String> {
        self.proxy.get_property("Version").await
    }
}

async fn object(
    connection: &Connection,
    path: ObjectPath<'static>,
    interface: &'static str,
) -> zbus::Result<Proxy<'static>> {
    zbus::proxy::Builder::new(connection)
        .destination(BUS_NAME)
        .path(path)
        .interface(interface)
        .cache_properties(zbus::proxy::CacheProperties::No)
        .build()
        .await
}

/// `org.loopd1.Attachment`.
#[derive(Clone, Debug)]
pub struct Attachment {
    proxy: Proxy<'static>,
    interaction: Interaction,
}

impl Attachment {
    /// The attachment with this path. No call is made yet.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn new(
        connection: &Connection,
        path: ObjectPath<'static>,
        interaction: Interaction,
    ) -> zbus::Result<Self> {
        Ok(Self { proxy: object(connection, path, ATTACHMENT).await?, interaction })
    }

    /// Detaches it.
    ///
    /// # Errors
    /// Those of the contract, or the bus failed.
    pub async fn detach(&self, options: DetachOptions) -> zbus::Result<()> {
        call(&self.proxy, "Detach", self.interaction, &(options.encode(),)).await
    }

    /// Its properties. `partition_scan` is false after an attach that requested it if the table has
    /// partitions, but they could not be created.
    ///
    /// # Errors
    /// The object is gone, or the bus failed.
    pub async fn properties(&self) -> zbus::Result<AttachmentProperties> {
        let (connection, path) = (self.proxy.connection(), self.proxy.path());
        let reply =
            connection.call_method(Some(BUS_NAME), path, Some(PROPERTIES), "GetAll", &(ATTACHMENT,)).await?;
        AttachmentProperties::from_dict(&reply.body().deserialize()?)
    }

    /// Reads the partition table again.
    ///
    /// # Errors
    /// Those of the contract, or the bus failed.
    pub async fn rescan_partitions(&self) -> zbus::Result<()> {
        call(&self.proxy, "RescanPartitions", self.interaction, &()).await
    }

    /// Adopts the current size of the backing file.
    ///
    /// # Errors
    /// Those of the contract, or the bus failed.
    pub async fn set_capacity(&self) -> zbus::Result<()> {
        call(&self.proxy, "SetCapacity", self.interaction, &()).await
    }

    /// Sets whether the page cache of the backing file is bypassed.
    ///
    /// # Errors
    /// Those of the contract, or the bus failed.
    pub async fn set_direct_io(&self, direct_io: bool) -> zbus::Result<()> {
        call(&self.proxy, "SetDirectIo", self.interaction, &(direct_io,)).await
    }

    /// Sets the logical block size, in bytes.
    ///
    /// # Errors
    /// Those of the contract, or the bus failed.
    pub async fn set_block_size(&self, block_size: u32) -> zbus::Result<()> {
        call(&self.proxy, "SetBlockSize", self.interaction, &(block_size,)).await
    }

    /// Sets the lifetime; `Client` binds it to this connection.
    ///
    /// # Errors
    /// Those of the contract, or the bus failed.
    pub async fn set_lifetime(&self, lifetime: Lifetime) -> zbus::Result<()> {
        call(&self.proxy, "SetLifetime", self.interaction, &(lifetime.as_str(),)).await
    }

    /// Replaces the backing file of a read-only attachment by one of the same size.
    ///
    /// # Errors
    /// Those of the contract, or the bus failed.
    pub async fn replace_backing_file(&self, file: BorrowedFd<'_>) -> zbus::Result<()> {
        call(&self.proxy, "ReplaceBackingFile", self.interaction, &(Fd::from(file),)).await
    }
}

/// `org.loopd1.Volume`.
#[derive(Clone, Debug)]
pub struct Volume {
    proxy: Proxy<'static>,
    interaction: Interaction,
}

impl Volume {
    /// The volume with this path: an attachment's or a partition's. No call is made yet.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn new(
        connection: &Connection,
        path: ObjectPath<'static>,
        interaction: Interaction,
    ) -> zbus::Result<Self> {
        Ok(Self { proxy: object(connection, path, VOLUME).await?, interaction })
    }

    /// Mounts it; returns the mount point.
    ///
    /// # Errors
    /// Those of the contract, or the bus failed.
    pub async fn mount(&self, options: &MountOptions) -> zbus::Result<String> {
        mount_point(call(&self.proxy, "Mount", self.interaction, &(options.encode(),)).await?)
    }

    /// Unmounts it.
    ///
    /// # Errors
    /// Those of the contract, or the bus failed.
    pub async fn unmount(&self, options: UnmountOptions) -> zbus::Result<()> {
        call(&self.proxy, "Unmount", self.interaction, &(options.encode(),)).await
    }
}

/// `org.loopd1.Encrypted`.
#[derive(Clone, Debug)]
pub struct Encrypted {
    proxy: Proxy<'static>,
    interaction: Interaction,
}

impl Encrypted {
    /// The encrypted volume with this path: an attachment's or a partition's. No call is made yet.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn new(
        connection: &Connection,
        path: ObjectPath<'static>,
        interaction: Interaction,
    ) -> zbus::Result<Self> {
        Ok(Self { proxy: object(connection, path, ENCRYPTED).await?, interaction })
    }

    /// Unlocks it with the secret that can be read from this descriptor; returns the object and the device node of the
    /// cleartext.
    ///
    /// # Errors
    /// Those of the contract, or the bus failed.
    pub async fn unlock(
        &self,
        secret: BorrowedFd<'_>,
        options: &UnlockOptions,
    ) -> zbus::Result<(OwnedObjectPath, String)> {
        let body = (Fd::from(secret), options.encode());
        let (object, device): (OwnedObjectPath, String) =
            call(&self.proxy, "Unlock", self.interaction, &body).await?;
        Ok((object, mapping_node(device)?))
    }

    /// Locks it.
    ///
    /// # Errors
    /// Those of the contract, or the bus failed.
    pub async fn lock(&self, options: LockOptions) -> zbus::Result<()> {
        call(&self.proxy, "Lock", self.interaction, &(options.encode(),)).await
    }
}
