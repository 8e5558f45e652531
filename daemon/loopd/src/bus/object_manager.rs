//! `org.freedesktop.DBus.ObjectManager`, with one signal for all interfaces of an object. The library's
//! implementation emits a signal for each interface.

use std::collections::HashMap;

use loopd_dbus::ErrorReply;
use zbus::interface;
use zbus::message::Header;
use zbus::object_server::SignalEmitter;
use zbus::wire::{ObjectPath, OwnedObjectPath};

use super::authority::Request;
use super::call_error::CallError;
use super::context::{Call, Context, Operation};
use super::interfaces::Interfaces;
use super::large_replies::LargeReply;
use super::objects::Objects;

/// The interface, on the root object.
pub struct ObjectManager {
    context: Context,
}

impl ObjectManager {
    /// The object manager.
    pub fn new(context: Context) -> Self {
        Self { context }
    }
}

type ManagedObjects = HashMap<OwnedObjectPath, Interfaces>;

#[interface(name = "org.freedesktop.DBus.ObjectManager", introspection_docs = false)]
impl ObjectManager {
    #[zbus(out_args("objpath_interfaces_and_properties"))]
    async fn get_managed_objects(
        &self,
        #[zbus(header)] header: Header<'_>,
    ) -> Result<LargeReply<ManagedObjects>, ErrorReply> {
        self.context.call(&header, GetManagedObjects).await
    }

    #[zbus(signal)]
    async fn interfaces_added(
        emitter: &SignalEmitter<'_>,
        object_path: ObjectPath<'_>,
        interfaces_and_properties: &Interfaces,
    ) -> zbus::Result<()>;

    #[zbus(signal)]
    async fn interfaces_removed(
        emitter: &SignalEmitter<'_>,
        object_path: ObjectPath<'_>,
        interfaces: &[&str],
    ) -> zbus::Result<()>;
}

struct GetManagedObjects;

impl Operation for GetManagedObjects {
    type Object = ();
    type Output = LargeReply<ManagedObjects>;
    const CHANGES_ATTACHMENTS: bool = false;

    fn method(&self) -> &'static str {
        "GetManagedObjects"
    }

    async fn look_up(&self, _call: &Call<'_>) -> Result<(), CallError> {
        Ok(())
    }

    fn requests<'a>(&self, (): &'a ()) -> Vec<Request<'a>> {
        Vec::new()
    }

    async fn run(self, call: &Call<'_>, (): ()) -> Result<Self::Output, CallError> {
        Ok(call.large_replies.build(|| call.objects.all()).await)
    }
}

/// Adds an object to the registry and emits `InterfacesAdded`.
///
/// # Errors
/// The connection failed.
pub async fn add(
    objects: &Objects,
    emitter: &SignalEmitter<'_>,
    path: &ObjectPath<'_>,
    interfaces: Interfaces,
) -> zbus::Result<()> {
    objects.add(path, interfaces.clone());
    announce(emitter, path, &interfaces).await
}

/// Emits `InterfacesAdded`.
///
/// # Errors
/// The connection failed.
pub async fn announce(
    emitter: &SignalEmitter<'_>,
    path: &ObjectPath<'_>,
    interfaces: &Interfaces,
) -> zbus::Result<()> {
    ObjectManager::interfaces_added(emitter, path.clone(), interfaces).await
}

/// Emits `InterfacesRemoved`.
///
/// # Errors
/// The connection failed.
pub async fn withdraw(
    emitter: &SignalEmitter<'_>,
    path: &ObjectPath<'_>,
    interfaces: &[&str],
) -> zbus::Result<()> {
    ObjectManager::interfaces_removed(emitter, path.clone(), interfaces).await
}

/// Removes an object from the registry and emits `InterfacesRemoved`.
///
/// # Errors
/// The connection failed.
pub async fn remove(
    objects: &Objects,
    emitter: &SignalEmitter<'_>,
    path: &ObjectPath<'_>,
) -> zbus::Result<()> {
    match objects.remove(path) {
        Some(interfaces) => withdraw(emitter, path, &interfaces.names()).await,
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use loopd_dbus::names::{attachment_path, cleartext_path, partition_path};
    use loopd_dbus::transport::LONGEST_SENT;
    use loopd_dbus::{
        AttachmentProperties, CleartextProperties, EncryptedProperties, PartitionProperties,
        VolumeProperties, Warning, Warnings,
    };

    use super::super::interfaces::Shared;
    use super::*;
    use loopd_common::limits::{MOST_WARNING_TEXT, MOST_WARNINGS};
    use loopd_engine::{Limits, Settings};

    /// A text of this many bytes.
    fn text(bytes: usize) -> String {
        "x".repeat(bytes)
    }

    /// With the longest properties of udev: `blkid_encode_string` truncates labels to 256 bytes.
    fn longest_volume(mount_points: Vec<Vec<u8>>) -> VolumeProperties {
        VolumeProperties {
            device: "/dev/loop1048575p255".to_owned(),
            size: u64::MAX,
            // The longest that libblkid has.
            usage: "filesystem".to_owned(),
            filesystem_type: text(32),
            filesystem_version: text(64),
            filesystem_label: text(256),
            filesystem_uuid: text(64),
            mount_points,
        }
    }

    /// A warning has one detail beside its message.
    fn longest_warning() -> Warning {
        Warning {
            code: "partition-not-made".to_owned(),
            message: text(MOST_WARNING_TEXT / MOST_WARNINGS),
            format: Some("vmdk-descriptor".to_owned()),
            ..Warning::default()
        }
    }

    fn longest_attachment() -> AttachmentProperties {
        AttachmentProperties {
            device: "/dev/loop1048575".to_owned(),
            // sysfs shows at most a page.
            backing_file: vec![b'x'; 4096],
            reference: text(63),
            lifetime: "persistent".to_owned(),
            client: text(255),
            state: "detaching".to_owned(),
            warnings: Warnings(vec![longest_warning(); MOST_WARNINGS]),
            ..AttachmentProperties::default()
        }
    }

    fn longest_partition() -> PartitionProperties {
        PartitionProperties {
            table: text(32),
            kind: text(64),
            uuid: text(36),
            label: text(256),
            attachment: attachment_path(u64::MAX).into(),
            ..PartitionProperties::default()
        }
    }

    /// Of an encrypted volume that udev knows.
    fn longest_crypto() -> VolumeProperties {
        VolumeProperties {
            usage: "crypto".to_owned(),
            filesystem_type: "crypto_LUKS".to_owned(),
            filesystem_version: text(8),
            ..longest_volume(Vec::new())
        }
    }

    fn longest_cleartext() -> CleartextProperties {
        CleartextProperties {
            device: "/dev/dm-1048575".to_owned(),
            crypto: partition_path(u64::MAX, 255).into(),
            kind: "bitlocker".to_owned(),
            ..CleartextProperties::default()
        }
    }

    /// The bytes that an object adds to the reply.
    fn bytes_of(path: OwnedObjectPath, interfaces: Interfaces) -> usize {
        let reply_size = |objects: ManagedObjects| {
            let call = zbus::Message::method_call("/org/loopd1", "GetManagedObjects").build(&()).unwrap();
            zbus::Message::method_return(&call.header()).build(&(objects,)).unwrap().data().len()
        };
        // The next object is aligned to eight bytes.
        (reply_size(HashMap::from([(path, interfaces)])) - reply_size(HashMap::new())).next_multiple_of(8)
    }

    /// The objects that the default limits allow all users together fit into one reply, with the longest names.
    /// Those of root or of higher limits may not: then the call fails with `LimitsExceeded`
    /// (`an_answer_that_the_bus_would_not_take_is_an_error`).
    #[test]
    fn the_objects_within_the_default_limits_fit_into_one_reply() {
        let Settings { attachments, partitions, mounts, cleartexts, .. } = Settings::default();
        // A quarter more is reserved for users who have none.
        let maximum = |limits: Limits| limits.all + limits.all.div_ceil(4);
        let volume = || Shared::new(longest_volume(Vec::new()));
        let (crypto, locked) = (Shared::new(longest_crypto()), Shared::new(EncryptedProperties::default()));
        // One that may be encrypted has one more interface, and a shorter type.
        let larger = |path: OwnedObjectPath, interfaces: &dyn Fn(Shared<VolumeProperties>) -> Interfaces| {
            let encrypted = interfaces(crypto.clone()).with_encrypted(Some(locked.clone()));
            bytes_of(path.clone(), interfaces(volume())).max(bytes_of(path, encrypted))
        };
        let attachment = larger(attachment_path(u64::MAX).into(), &|volume| {
            Interfaces::attachment(Shared::new(longest_attachment()), volume)
        });
        let partition = larger(partition_path(u64::MAX, 255).into(), &|volume| {
            Interfaces::partition(Shared::new(longest_partition()), volume)
        });
        // Its path is also in the property of its volume.
        let path = cleartext_path(u64::MAX, Some(255));
        let cleartext = path.as_str().len()
            + bytes_of(path.into(), Interfaces::cleartext(Shared::new(longest_cleartext()), volume()));
        // Below /run/media/USER: two names of 255 bytes at most, and the length of the array.
        let mount = "/run/media/".len() + 2 * 256 + 8;
        let bytes = maximum(attachments) * attachment
            + maximum(partitions) * partition
            + maximum(cleartexts) * cleartext
            + maximum(mounts) * mount;
        println!(
            "{attachment} bytes an attachment, {partition} a partition, {cleartext} a cleartext, {mount} a mount: {bytes}"
        );
        assert!(bytes < LONGEST_SENT, "{bytes} bytes; {LONGEST_SENT} can be sent");
    }
}
