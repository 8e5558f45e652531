//! The option dictionaries (`a{sv}`) of the methods, as types.
//!
//! Decoding is strict: an unknown key and a value of the wrong type are errors, so a misspelt option
//! is never ignored silently.

use std::collections::HashMap;
use std::os::fd::{AsFd, OwnedFd};

use loopd_common::text::shortened;
use loopd_common::{Lifetime, Overlap, UnknownValue};
use zbus::wire::Signature;
use zbus::{OwnedVariant, Variant};

/// An option dictionary as received.
pub type ReceivedOptions = HashMap<String, OwnedVariant>;
/// An option dictionary to be sent.
pub type SentOptions<'a> = HashMap<&'static str, Variant<'a>>;

/// Why an option dictionary was refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidOption {
    /// The method has no option with this name.
    #[error("unknown option {name:?}; {method} knows {known}")]
    Unknown {
        /// The key that was sent.
        name: String,
        /// The method that was called.
        method: &'static str,
        /// The keys that it accepts.
        known: &'static str,
    },
    /// The value has the wrong type.
    #[error("option {name:?} takes a value of D-Bus type {expected:?}, not {found:?}")]
    Type {
        /// The key.
        name: String,
        /// The signature in the contract.
        expected: &'static str,
        /// The signature that was sent.
        found: String,
    },
    /// The descriptor cannot be used.
    #[error("the descriptor of option {name:?} cannot be taken over: {reason}")]
    Descriptor {
        /// The key.
        name: String,
        /// What failed.
        reason: String,
    },
    /// There are more descriptors than the method takes.
    #[error("option {name:?} takes at most {most} descriptors, not {found}")]
    Many {
        /// The key.
        name: String,
        /// The limit.
        most: u32,
        /// How many were sent.
        found: usize,
    },
    /// The option does not apply to the type of encryption.
    #[error("option {name:?} is only for the type {kinds}; see option \"type\"")]
    OtherType {
        /// The key.
        name: &'static str,
        /// The types that it applies to.
        kinds: &'static str,
    },
    /// The value is none of those that the option accepts.
    #[error(transparent)]
    Value(#[from] UnknownValue),
}

/// The options of `SetupLoop`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachOptions {
    /// Bytes into the file.
    pub offset: u64,
    /// Maximum size in bytes; 0: up to the end of the file.
    pub size_limit: u64,
    /// Make the device read-only even if the descriptor is writable.
    pub read_only: bool,
    /// Create the partitions' nodes.
    pub partition_scan: bool,
    /// Whether to bypass the page cache of the backing file; `None` lets loopd choose.
    pub direct_io: Option<bool>,
    /// Logical block size in bytes; 0 lets loopd choose.
    pub block_size: u32,
    /// When the attachment ends.
    pub lifetime: Lifetime,
    /// A name that losetup shows as REF; at most 63 bytes.
    pub reference: String,
    /// N of the requested `/dev/loopN`; `None`: any free device.
    pub number: Option<u32>,
    /// What to do if the file is already attached.
    pub overlap: Overlap,
    /// Reply only when udev has processed the device.
    pub wait: bool,
}

impl Default for AttachOptions {
    fn default() -> Self {
        Self {
            offset: 0,
            size_limit: 0,
            read_only: false,
            partition_scan: true,
            direct_io: None,
            block_size: 0,
            lifetime: Lifetime::default(),
            reference: String::new(),
            number: None,
            overlap: Overlap::default(),
            wait: true,
        }
    }
}

impl AttachOptions {
    const KNOWN: &str = "\"offset\", \"size-limit\", \"read-only\", \"partition-scan\", \"direct-io\", \
        \"block-size\", \"lifetime\", \"reference\", \"number\", \"overlap\" and \"wait\"";

    /// Decodes a received dictionary.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong type.
    pub fn decode(received: ReceivedOptions) -> Result<Self, InvalidOption> {
        let mut options = Self::default();
        for (name, value) in received {
            match name.as_str() {
                "offset" => options.offset = take(&name, "t", &value)?,
                "size-limit" => options.size_limit = take(&name, "t", &value)?,
                "read-only" => options.read_only = take(&name, "b", &value)?,
                "partition-scan" => options.partition_scan = take(&name, "b", &value)?,
                "direct-io" => options.direct_io = Some(take(&name, "b", &value)?),
                "block-size" => options.block_size = take(&name, "u", &value)?,
                "lifetime" => options.lifetime = take::<&str>(&name, "s", &value)?.parse()?,
                "reference" => options.reference = take::<&str>(&name, "s", &value)?.to_owned(),
                "number" => options.number = Some(take(&name, "u", &value)?),
                "overlap" => options.overlap = take::<&str>(&name, "s", &value)?.parse()?,
                "wait" => options.wait = take(&name, "b", &value)?,
                _ => return Err(unknown(name, "SetupLoop", Self::KNOWN)),
            }
        }
        Ok(options)
    }

    /// Encodes the options that differ from the defaults.
    #[must_use]
    pub fn encode(&self) -> SentOptions<'_> {
        let default = Self::default();
        let mut sent = SentOptions::new();
        let mut put = |name, differs: bool, value: Variant<'static>| {
            if differs {
                sent.insert(name, value);
            }
        };
        put("offset", self.offset != default.offset, self.offset.into());
        put("size-limit", self.size_limit != default.size_limit, self.size_limit.into());
        put("read-only", self.read_only != default.read_only, self.read_only.into());
        put("partition-scan", self.partition_scan != default.partition_scan, self.partition_scan.into());
        put("direct-io", self.direct_io.is_some(), self.direct_io.unwrap_or_default().into());
        put("block-size", self.block_size != default.block_size, self.block_size.into());
        put("lifetime", self.lifetime != default.lifetime, self.lifetime.as_str().into());
        put("reference", self.reference != default.reference, self.reference.clone().into());
        put("overlap", self.overlap != default.overlap, self.overlap.as_str().into());
        put("wait", self.wait != default.wait, self.wait.into());
        put("number", self.number.is_some(), self.number.unwrap_or_default().into());
        sent
    }
}

/// The options of `Detach`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct DetachOptions {
    /// If the device is in use, detach it at its last close.
    pub lazy: bool,
}

impl DetachOptions {
    /// Decodes a received dictionary.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong type.
    pub fn decode(received: ReceivedOptions) -> Result<Self, InvalidOption> {
        Ok(Self { lazy: lazy(received, "Detach")? })
    }

    /// Encodes the options that differ from the defaults.
    #[must_use]
    pub fn encode(self) -> SentOptions<'static> {
        send_lazy(self.lazy)
    }
}

/// The options of `List`.
#[derive(Debug, Default)]
pub struct ListOptions {
    /// Only attachments of this file, by device and inode.
    pub file: Option<OwnedFd>,
    /// Only attachments at this offset, in bytes.
    pub offset: Option<u64>,
    /// Include loop devices that loopd did not attach.
    pub all: bool,
}

impl ListOptions {
    /// Decodes a received dictionary.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong type.
    pub fn decode(received: ReceivedOptions) -> Result<Self, InvalidOption> {
        let mut options = Self::default();
        for (name, value) in received {
            match name.as_str() {
                "file" => {
                    options.file = Some(take_file(name, value)?);
                }
                "offset" => options.offset = Some(take(&name, "t", &value)?),
                "all" => options.all = take(&name, "b", &value)?,
                _ => return Err(unknown(name, "List", "\"file\", \"offset\" and \"all\"")),
            }
        }
        Ok(options)
    }

    /// Encodes the options that differ from the defaults.
    #[must_use]
    pub fn encode(&self) -> SentOptions<'_> {
        let mut sent = SentOptions::new();
        if let Some(file) = &self.file {
            sent.insert("file", Variant::Fd(file.as_fd().into()));
        }
        if let Some(offset) = self.offset {
            sent.insert("offset", offset.into());
        }
        if self.all {
            sent.insert("all", true.into());
        }
        sent
    }
}

/// The options of `Mount`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// Mount read-only; a read-only device always is.
    pub read_only: bool,
    /// The file system type; empty: the type that udev has found.
    pub filesystem: String,
    /// Further options for the file system, separated by commas.
    pub options: String,
}

impl MountOptions {
    /// Decodes a received dictionary.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong type.
    pub fn decode(received: ReceivedOptions) -> Result<Self, InvalidOption> {
        let mut options = Self::default();
        for (name, value) in received {
            match name.as_str() {
                "read-only" => options.read_only = take(&name, "b", &value)?,
                "filesystem" => options.filesystem = take::<&str>(&name, "s", &value)?.to_owned(),
                "options" => options.options = take::<&str>(&name, "s", &value)?.to_owned(),
                _ => return Err(unknown(name, "Mount", "\"read-only\", \"filesystem\" and \"options\"")),
            }
        }
        Ok(options)
    }

    /// Encodes the options that differ from the defaults.
    #[must_use]
    pub fn encode(&self) -> SentOptions<'_> {
        let mut sent = SentOptions::new();
        if self.read_only {
            sent.insert("read-only", true.into());
        }
        if !self.filesystem.is_empty() {
            sent.insert("filesystem", self.filesystem.as_str().into());
        }
        if !self.options.is_empty() {
            sent.insert("options", self.options.as_str().into());
        }
        sent
    }
}

/// The options of `Unmount`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct UnmountOptions {
    /// Detach it from the directory tree at once, and unmount it with its last user.
    pub lazy: bool,
}

impl UnmountOptions {
    /// Decodes a received dictionary.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong type.
    pub fn decode(received: ReceivedOptions) -> Result<Self, InvalidOption> {
        Ok(Self { lazy: lazy(received, "Unmount")? })
    }

    /// Encodes the options that differ from the defaults.
    #[must_use]
    pub fn encode(self) -> SentOptions<'static> {
        send_lazy(self.lazy)
    }
}

/// The options of `Lock`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct LockOptions {
    /// If the cleartext is in use, close it at its last close.
    pub lazy: bool,
}

impl LockOptions {
    /// Decodes a received dictionary.
    ///
    /// # Errors
    /// An unknown key, or a value of the wrong type.
    pub fn decode(received: ReceivedOptions) -> Result<Self, InvalidOption> {
        Ok(Self { lazy: lazy(received, "Lock")? })
    }

    /// Encodes the options that differ from the defaults.
    #[must_use]
    pub fn encode(self) -> SentOptions<'static> {
        send_lazy(self.lazy)
    }
}

/// Decodes the option `lazy`, the only one of `Detach`, `Unmount` and `Lock`.
fn lazy(received: ReceivedOptions, method: &'static str) -> Result<bool, InvalidOption> {
    let mut lazy = false;
    for (name, value) in received {
        match name.as_str() {
            "lazy" => lazy = take(&name, "b", &value)?,
            _ => return Err(unknown(name, method, "\"lazy\"")),
        }
    }
    Ok(lazy)
}

fn send_lazy(lazy: bool) -> SentOptions<'static> {
    if lazy { SentOptions::from([("lazy", true.into())]) } else { SentOptions::new() }
}

pub(crate) fn take<'a, T: TryFrom<&'a OwnedVariant>>(
    name: &str,
    expected: &'static str,
    value: &'a OwnedVariant,
) -> Result<T, InvalidOption> {
    T::try_from(value).map_err(|_| InvalidOption::Type {
        name: shortened(name),
        expected,
        found: value.value_signature().to_string(),
    })
}

/// Takes the descriptor out of the value. A failure is an error: the option must not be ignored.
pub(crate) fn take_file(name: String, value: OwnedVariant) -> Result<OwnedFd, InvalidOption> {
    let found = value.value_signature().to_string();
    match Variant::from(value) {
        Variant::Fd(file) => own(&name, file),
        _ => Err(InvalidOption::Type { name, expected: "h", found }),
    }
}

/// Takes the descriptors out of the value, an array.
pub(crate) fn take_files(
    name: String,
    value: OwnedVariant,
    most: u32,
) -> Result<Vec<OwnedFd>, InvalidOption> {
    let found = value.value_signature().to_string();
    let wrong = |name| InvalidOption::Type { name, expected: "ah", found };
    let array = match Variant::from(value) {
        Variant::Array(array) if *array.element_signature() == Signature::Fd => array,
        _ => return Err(wrong(name)),
    };
    if array.len() > most as usize {
        return Err(InvalidOption::Many { name, most, found: array.len() });
    }
    let files = Vec::<zbus::Fd<'static>>::try_from(array).map_err(|_| wrong(name.clone()))?;
    files.into_iter().map(|file| own(&name, file)).collect()
}

fn own(name: &str, file: zbus::Fd<'_>) -> Result<OwnedFd, InvalidOption> {
    file.try_into().map_err(|error: zbus::Error| InvalidOption::Descriptor {
        name: name.to_owned(),
        reason: error.to_string(),
    })
}

pub(crate) fn unknown(name: String, method: &'static str, known: &'static str) -> InvalidOption {
    InvalidOption::Unknown { name: shortened(&name), method, known }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(sent: SentOptions<'_>) -> ReceivedOptions {
        sent.into_iter().map(|(name, value)| (name.to_owned(), value.try_into_owned().unwrap())).collect()
    }

    #[test]
    fn encoded_options_are_decoded_again() {
        let options = AttachOptions {
            offset: 512,
            size_limit: 1024,
            read_only: true,
            partition_scan: false,
            direct_io: Some(false),
            block_size: 4096,
            lifetime: Lifetime::Persistent,
            reference: "a reference".to_owned(),
            number: Some(0),
            overlap: Overlap::Reuse,
            wait: false,
        };
        assert_eq!(AttachOptions::decode(received(options.encode())), Ok(options.clone()));
        assert_eq!(options.encode().len(), 11, "a field is missing from the test or from encode()");
        assert_eq!(
            AttachOptions::decode(received(AttachOptions::default().encode())),
            Ok(AttachOptions::default())
        );
        let lazy = DetachOptions { lazy: true };
        assert_eq!(DetachOptions::decode(received(lazy.encode())), Ok(lazy));
        let lazy = UnmountOptions { lazy: true };
        assert_eq!(UnmountOptions::decode(received(lazy.encode())), Ok(lazy));
        let lazy = LockOptions { lazy: true };
        assert_eq!(LockOptions::decode(received(lazy.encode())), Ok(lazy));
        let options =
            MountOptions { read_only: true, filesystem: "vfat".to_owned(), options: "flush".to_owned() };
        assert_eq!(MountOptions::decode(received(options.encode())), Ok(options));
        assert_eq!(MountOptions::default().encode().len(), 0);
    }

    #[test]
    fn the_descriptor_of_list_is_taken_over_or_refused() {
        use std::os::fd::AsRawFd;
        let file = OwnedFd::from(std::fs::File::open("/dev/null").unwrap());
        let sent = OwnedVariant::try_from(Variant::Fd(file.into())).unwrap();
        let number = <&zbus::Fd<'_>>::try_from(&sent).unwrap().as_raw_fd();
        let options = ListOptions::decode(ReceivedOptions::from([("file".to_owned(), sent)])).unwrap();
        assert_eq!(
            options.file.map(|file| file.as_raw_fd()),
            Some(number),
            "the descriptor is not duplicated, which could fail"
        );
        let other = Variant::from("/dev/null").try_into_owned().unwrap();
        let error = ListOptions::decode(ReceivedOptions::from([("file".to_owned(), other)])).unwrap_err();
        assert_eq!(error.to_string(), "option \"file\" takes a value of D-Bus type \"h\", not \"s\"");
    }

    #[test]
    fn errors_name_unknown_keys_wrong_types_and_invalid_values() {
        let one = |name: &str, value: Variant<'_>| {
            let value = value.try_into_owned().unwrap();
            AttachOptions::decode(ReceivedOptions::from([(name.to_owned(), value)])).unwrap_err().to_string()
        };
        assert!(
            one("ofset", 1u64.into()).starts_with("unknown option \"ofset\"; SetupLoop knows \"offset\"")
        );
        let long = one(&"\u{1b}".repeat(7 << 20), 1u64.into());
        assert!(long.len() < 1024 && !long.contains('\u{1b}'), "{long}");
        assert_eq!(
            one("offset", 1u32.into()),
            "option \"offset\" takes a value of D-Bus type \"t\", not \"u\""
        );
        assert_eq!(
            one("lifetime", "ever".into()),
            "option \"lifetime\" is \"ever\"; it takes \"client\", \"mount\" or \"persistent\""
        );
    }
}
