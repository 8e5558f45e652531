//! The properties of the objects, as sent in `List`, `GetAll` and `PropertiesChanged`.

use std::collections::HashMap;

use zbus::wire::OwnedObjectPath;
use zbus::{OwnedVariant, Variant};

use crate::dictionary::Dictionary;
use crate::encoder::Encoder;
use crate::warnings::Warnings;

macro_rules! properties {
    ($(#[$doc:meta])* $type:ident { $($(#[$field_doc:meta])* $field:ident: $field_type:ty = $name:literal $(or $missing:expr)?,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Debug, Default, PartialEq, Eq)]
        pub struct $type { $($(#[$field_doc])* pub $field: $field_type,)* }

        impl $type {
            /// All properties, by their names on the bus.
            #[must_use]
            pub fn to_dict(&self) -> HashMap<&'static str, Variant<'static>> {
                HashMap::from([$(($name, self.$field.clone().into()),)*])
            }

            /// The properties that differ from those of `before`.
            #[must_use]
            pub fn changes_since(&self, before: &Self) -> HashMap<&'static str, Variant<'static>> {
                let mut changes = HashMap::new();
                $(if self.$field != before.$field {
                    changes.insert($name, self.$field.clone().into());
                })*
                changes
            }

            /// Reads a dictionary. Unknown names are ignored, so that a newer daemon can send more
            /// properties.
            ///
            /// # Errors
            /// A property has the wrong type, or is missing that the first edition had.
            pub fn from_dict(dict: &HashMap<String, OwnedVariant>) -> zbus::Result<Self> {
                Ok(Self { $($field: {
                    let missing: Option<$field_type> = [$($missing)?].into_iter().next();
                    property(dict, $name, missing)?
                },)* })
            }
        }

        impl Dictionary for $type {
            const NAMES: &'static [&'static str] = &[$($name),*];

            fn write(&self, omitted: &[&str], encoder: &mut Encoder) {
                $(if !omitted.contains(&$name) {
                    encoder.entry($name, &self.$field);
                })*
            }
        }
    };
}

fn property<T>(dict: &HashMap<String, OwnedVariant>, name: &str, missing: Option<T>) -> zbus::Result<T>
where
    T: TryFrom<OwnedVariant>,
{
    let wrong = || zbus::Error::Failure(format!("the daemon's reply has no usable property {name:?}"));
    let Some(value) = dict.get(name) else { return missing.ok_or_else(wrong) };
    let value = value.try_clone().map_err(|_| wrong())?;
    T::try_from(value).map_err(|_| wrong())
}

properties! {
    /// `org.loopd1.Attachment`.
    AttachmentProperties {
        /// The device node.
        device: String = "Device",
        /// N of `/dev/loopN`.
        number: u32 = "Number",
        /// The kernel's disk sequence number.
        disk_sequence: u64 = "DiskSequence",
        /// The file's path, for display: bytes with a NUL at the end.
        backing_file: Vec<u8> = "BackingFile",
        /// `st_dev` of the file.
        backing_device: u64 = "BackingDevice",
        /// `st_ino` of the file.
        backing_inode: u64 = "BackingInode",
        /// Bytes into the file.
        offset: u64 = "Offset",
        /// Maximum size in bytes; 0: up to the end of the file.
        size_limit: u64 = "SizeLimit",
        /// The text that losetup shows as REF.
        reference: String = "Reference",
        /// Whether the device is read-only.
        read_only: bool = "ReadOnly",
        /// Whether the page cache of the backing file is bypassed.
        direct_io: bool = "DirectIo",
        /// Logical block size in bytes.
        block_size: u32 = "BlockSize",
        /// Whether the kernel looks for partitions.
        partition_scan: bool = "PartitionScan",
        /// Whether the kernel detaches the device at its last close.
        autoclear: bool = "Autoclear",
        /// When it ends; empty if loopd did not attach it.
        lifetime: String = "Lifetime",
        /// Whether loopd attached it.
        managed: bool = "Managed",
        /// The uid that attached it; `u32::MAX` if unknown.
        owner: u32 = "Owner",
        /// The unique bus name that it is bound to; empty if none.
        client: String = "Client",
        /// When it was attached: microseconds of `CLOCK_REALTIME`; 0 if unknown.
        since: u64 = "Since",
        /// `attached` or `detaching`.
        state: String = "State",
        /// What is unusual about it.
        warnings: Warnings = "Warnings" or Warnings::default(),
    }
}

properties! {
    /// `org.loopd1.Volume`.
    VolumeProperties {
        /// The device node.
        device: String = "Device",
        /// Bytes.
        size: u64 = "Size",
        /// udev's `ID_FS_USAGE`.
        usage: String = "Usage",
        /// udev's `ID_FS_TYPE`.
        filesystem_type: String = "FilesystemType",
        /// udev's `ID_FS_VERSION`.
        filesystem_version: String = "FilesystemVersion",
        /// udev's `ID_FS_LABEL`, decoded.
        filesystem_label: String = "FilesystemLabel",
        /// udev's `ID_FS_UUID`.
        filesystem_uuid: String = "FilesystemUuid",
        /// The mount points: paths as bytes, each with a NUL at the end.
        mount_points: Vec<Vec<u8>> = "MountPoints",
    }
}

properties! {
    /// `org.loopd1.Partition`.
    PartitionProperties {
        /// N of `/dev/loop0pN`.
        number: u32 = "Number",
        /// Bytes into the device.
        offset: u64 = "Offset",
        /// Bytes.
        size: u64 = "Size",
        /// `gpt`, `dos`, or libblkid's name of the table.
        table: String = "Table",
        /// The type: a GUID, or `0x83`.
        kind: String = "Type",
        /// The partition's UUID.
        uuid: String = "Uuid",
        /// The partition's name.
        label: String = "Label",
        /// The attachment that it belongs to.
        attachment: OwnedObjectPath = "Attachment",
    }
}

properties! {
    /// `org.loopd1.Encrypted`.
    EncryptedProperties {
        /// The object of the cleartext; `/` while the volume is locked.
        cleartext: OwnedObjectPath = "Cleartext",
    }
}

properties! {
    /// `org.loopd1.Cleartext`.
    CleartextProperties {
        /// The device node.
        device: String = "Device",
        /// The object of the encrypted volume.
        crypto: OwnedObjectPath = "Crypto",
        /// How the volume is encrypted: a value of the option `type` of `Unlock`.
        kind: String = "Type",
        /// When it was unlocked: microseconds of `CLOCK_REALTIME`.
        since: u64 = "Since",
    }
}

/// The owner of a foreign device: none.
pub const NO_OWNER: u32 = u32::MAX;

/// Encodes a path for the bus: its bytes and a NUL.
#[must_use]
pub fn to_bus_path(path: &[u8]) -> Vec<u8> {
    let mut bytes = path.to_vec();
    bytes.push(0);
    bytes
}

/// Decodes a path from the bus: its bytes without the NUL.
#[must_use]
pub fn from_bus_path(bytes: &[u8]) -> &[u8] {
    bytes.strip_suffix(&[0]).unwrap_or(bytes)
}

#[cfg(test)]
mod tests {
    use zbus::wire::serialized::Context;
    use zbus::wire::{BE, LE, to_bytes};

    use super::*;
    use crate::dictionary::Sent;
    use crate::encoder::{Encoded, STRUCT};
    use crate::warnings::Warning;

    type Received = HashMap<String, OwnedVariant>;
    type Entries = Vec<(String, OwnedVariant)>;

    fn owned(dict: HashMap<&'static str, Variant<'static>>) -> Received {
        dict.into_iter().map(|(name, value)| (name.to_owned(), value.try_into_owned().unwrap())).collect()
    }

    /// What clients of both byte orders receive of a dictionary.
    fn received(write: impl Fn(&mut Encoder)) -> Received {
        let [little, big] = [LE, BE].map(|endian| {
            let encoded = Encoded::<Vec<(Sent,)>>::new(endian, |encoder| {
                encoder.align(STRUCT);
                write(encoder);
            });
            let bytes = to_bytes(Context::new(endian, 0), &encoded).unwrap();
            let (mut all, _): (Vec<(Received,)>, _) = bytes.deserialize().unwrap();
            // The entries of a dictionary look like structs: is a name sent twice?
            let (entries, _): (Vec<(Entries,)>, _) = bytes.deserialize_for_signature("a(a(sv))").unwrap();
            let (received,) = all.pop().unwrap();
            assert_eq!((all.len(), entries[0].0.len()), (0, received.len()));
            received
        });
        assert_eq!(little, big);
        little
    }

    fn sent(dictionary: &impl Dictionary) -> Received {
        received(|encoder| encoder.dictionary(dictionary))
    }

    fn volume() -> VolumeProperties {
        VolumeProperties {
            device: "/dev/loop1".to_owned(),
            size: 4096,
            mount_points: vec![to_bus_path(b"/mnt/\xff"), to_bus_path(b"/srv")],
            ..VolumeProperties::default()
        }
    }

    #[test]
    fn dictionaries_are_parsed_back() {
        let volume = volume();
        let dict = owned(volume.to_dict());
        assert_eq!(VolumeProperties::from_dict(&dict).unwrap(), volume);
        assert_eq!(from_bus_path(&volume.mount_points[0]), b"/mnt/\xff");
        assert!(VolumeProperties::from_dict(&HashMap::new()).is_err());
    }

    #[test]
    fn what_is_sent_is_the_dictionary() {
        let warning = Warning {
            code: "truncated".to_owned(),
            message: "7 bytes are missing".to_owned(),
            bytes: Some(7),
            number: Some(5),
            format: Some("xz".to_owned()),
        };
        let attachment = AttachmentProperties {
            backing_file: to_bus_path(b"/a/x.img"),
            autoclear: true,
            number: 7,
            since: u64::MAX,
            reference: "r".to_owned(),
            warnings: Warnings(vec![warning, Warning::default()]),
            ..AttachmentProperties::default()
        };
        let partition = PartitionProperties {
            attachment: "/org/loopd1/attachment/7".try_into().unwrap(),
            ..PartitionProperties::default()
        };
        assert_eq!(sent(&attachment), owned(attachment.to_dict()));
        assert_eq!(sent(&partition), owned(partition.to_dict()));
        assert_eq!(sent(&volume()), owned(volume().to_dict()));
        let encrypted = EncryptedProperties::default();
        assert_eq!(sent(&encrypted), owned(encrypted.to_dict()));
        assert_eq!(encrypted.cleartext.as_str(), "/");
        let cleartext = CleartextProperties { since: 7, ..CleartextProperties::default() };
        assert_eq!(sent(&cleartext), owned(cleartext.to_dict()));

        // `Size` is in both.
        let expected = owned(partition.to_dict().into_iter().chain(volume().to_dict()).collect());
        assert_eq!(received(|encoder| encoder.joined(&volume(), &partition)), expected);
    }

    /// A daemon that was not updated yet has no warnings.
    #[test]
    fn properties_of_the_first_edition_are_enough() {
        let attachment = AttachmentProperties { number: 7, ..AttachmentProperties::default() };
        let dict = attachment.to_dict().into_iter().filter(|(name, _)| *name != "Warnings");
        let dict: HashMap<_, _> =
            dict.map(|(name, value)| (name.to_owned(), value.try_into_owned().unwrap())).collect();
        assert_eq!(AttachmentProperties::from_dict(&dict).unwrap(), attachment);
        let other = dict.into_iter().filter(|(name, _)| name != "State").collect();
        assert!(AttachmentProperties::from_dict(&other).is_err());
    }

    #[test]
    fn changes_contain_only_what_differs() {
        let before = AttachmentProperties::default();
        let after = AttachmentProperties { autoclear: true, ..before.clone() };
        assert_eq!(after.changes_since(&before).into_keys().collect::<Vec<_>>(), ["Autoclear"]);
    }
}
