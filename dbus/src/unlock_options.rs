//! The options of `Unlock`.

use std::os::fd::{AsFd, OwnedFd};

use loopd_common::EncryptionType;
use zbus::{Fd, Variant};

use crate::names::MOST_KEY_FILES;
use crate::options::{InvalidOption, ReceivedOptions, SentOptions, take, take_file, take_files, unknown};

/// The options of `Unlock`.
#[derive(Debug, Default)]
pub struct UnlockOptions {
    /// How the volume is encrypted; `None`: what udev has found.
    pub kind: Option<EncryptionType>,
    /// Make the cleartext read-only; that of a read-only device always is.
    pub read_only: bool,
    /// Pass discards on to the backing file.
    pub discard: bool,
    /// A detached LUKS header.
    pub header: Option<OwnedFd>,
    /// Key files of a VeraCrypt or TrueCrypt volume, at most [`MOST_KEY_FILES`].
    pub key_files: Vec<OwnedFd>,
    /// How many bytes of the secret are used; 0: all.
    pub key_size: u64,
    /// How many bytes of the secret are skipped.
    pub key_offset: u64,
    /// The personal iterations multiplier of a VeraCrypt volume; 0: the default.
    pub pim: u32,
    /// Unlock the hidden volume.
    pub hidden: bool,
    /// Unlock a system partition.
    pub system: bool,
}

impl UnlockOptions {
    const KNOWN: &str = "\"type\", \"read-only\", \"discard\", \"header\", \"key-files\", \"key-size\", \
        \"key-offset\", \"pim\", \"hidden\" and \"system\"";

    /// Decodes a received dictionary.
    ///
    /// # Errors
    /// An unknown key, a value of the wrong type, or too many key files.
    pub fn decode(received: ReceivedOptions) -> Result<Self, InvalidOption> {
        let mut options = Self::default();
        for (name, value) in received {
            match name.as_str() {
                "type" => options.kind = Some(take::<&str>(&name, "s", &value)?.parse()?),
                "read-only" => options.read_only = take(&name, "b", &value)?,
                "discard" => options.discard = take(&name, "b", &value)?,
                "header" => options.header = Some(take_file(name, value)?),
                "key-files" => options.key_files = take_files(name, value, MOST_KEY_FILES)?,
                "key-size" => options.key_size = take(&name, "t", &value)?,
                "key-offset" => options.key_offset = take(&name, "t", &value)?,
                "pim" => options.pim = take(&name, "u", &value)?,
                "hidden" => options.hidden = take(&name, "b", &value)?,
                "system" => options.system = take(&name, "b", &value)?,
                _ => return Err(unknown(name, "Unlock", Self::KNOWN)),
            }
        }
        Ok(options)
    }

    /// Encodes the options that differ from the defaults.
    #[must_use]
    pub fn encode(&self) -> SentOptions<'_> {
        let mut sent = SentOptions::new();
        if let Some(kind) = self.kind {
            sent.insert("type", kind.as_str().into());
        }
        if let Some(header) = &self.header {
            sent.insert("header", Variant::Fd(header.as_fd().into()));
        }
        if !self.key_files.is_empty() {
            let files: Vec<Fd<'_>> = self.key_files.iter().map(|file| file.as_fd().into()).collect();
            sent.insert("key-files", Variant::Array(files.into()));
        }
        for (name, on) in [
            ("read-only", self.read_only),
            ("discard", self.discard),
            ("hidden", self.hidden),
            ("system", self.system),
        ] {
            if on {
                sent.insert(name, true.into());
            }
        }
        for (name, bytes) in [("key-size", self.key_size), ("key-offset", self.key_offset)] {
            if bytes != 0 {
                sent.insert(name, bytes.into());
            }
        }
        if self.pim != 0 {
            sent.insert("pim", self.pim.into());
        }
        sent
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsRawFd as _;

    use super::*;

    fn file() -> OwnedFd {
        std::fs::File::open("/dev/null").unwrap().into()
    }

    fn decode(name: &str, value: Variant<'_>) -> Result<UnlockOptions, InvalidOption> {
        let value = value.try_into_owned().unwrap();
        UnlockOptions::decode(ReceivedOptions::from([(name.to_owned(), value)]))
    }

    #[test]
    fn encoded_options_are_decoded_again() {
        for kind in EncryptionType::ALL {
            let options = UnlockOptions {
                kind: Some(*kind),
                read_only: true,
                discard: true,
                header: Some(file()),
                key_files: (0..MOST_KEY_FILES).map(|_| file()).collect(),
                key_size: 32,
                key_offset: 64,
                pim: 485,
                hidden: true,
                system: true,
            };
            let sent = options.encode();
            assert_eq!(sent.len(), 10, "a field is missing from the test or from encode()");
            let received = sent
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value.try_into_owned().unwrap()))
                .collect();
            let decoded = UnlockOptions::decode(received).unwrap();
            assert_eq!((decoded.kind, decoded.pim), (Some(*kind), 485));
            assert_eq!((decoded.key_size, decoded.key_offset), (32, 64));
            assert_eq!((decoded.header.is_some(), decoded.key_files.len()), (true, 4));
            assert!(decoded.read_only && decoded.discard && decoded.hidden && decoded.system);
        }
        assert!(UnlockOptions::default().encode().is_empty());
        let decoded = UnlockOptions::decode(ReceivedOptions::new()).unwrap();
        assert!(decoded.kind.is_none() && decoded.header.is_none() && decoded.key_files.is_empty());
    }

    #[test]
    fn descriptors_are_taken_over_and_not_duplicated() {
        let sent = Variant::Array(vec![Fd::from(file()), Fd::from(file())].into()).try_into_owned().unwrap();
        let numbers: Vec<_> = match &*sent {
            Variant::Array(array) => array.iter().map(|file| <&Fd<'_>>::try_from(file).unwrap().as_raw_fd()),
            other => panic!("{other:?}"),
        }
        .collect();
        let options = UnlockOptions::decode(ReceivedOptions::from([("key-files".to_owned(), sent)])).unwrap();
        assert_eq!(options.key_files.iter().map(OwnedFd::as_raw_fd).collect::<Vec<_>>(), numbers);
    }

    #[test]
    fn errors_name_unknown_keys_wrong_types_and_the_limit() {
        let text = |name: &str, value| decode(name, value).unwrap_err().to_string();
        assert!(text("typ", "luks".into()).starts_with("unknown option \"typ\"; Unlock knows \"type\""));
        for kind in ["plain", "LUKS", ""] {
            assert_eq!(
                text("type", kind.into()),
                format!(
                    "option \"type\" is {kind:?}; it takes \"luks\", \"bitlocker\", \"veracrypt\" or \"truecrypt\""
                )
            );
        }
        for (name, value, expected, found) in [
            ("type", Variant::from(1u32), "s", "u"),
            ("read-only", 1u32.into(), "b", "u"),
            ("discard", "yes".into(), "b", "s"),
            ("header", "/dev/null".into(), "h", "s"),
            ("header", Variant::Array(vec![Fd::from(file())].into()), "h", "ah"),
            ("key-files", Variant::Fd(file().into()), "ah", "h"),
            ("key-files", Variant::Array(vec!["/dev/null"].into()), "ah", "as"),
            ("key-size", 1u32.into(), "t", "u"),
            ("key-offset", 1u32.into(), "t", "u"),
            ("pim", 1u64.into(), "u", "t"),
            ("hidden", "true".into(), "b", "s"),
            ("system", "true".into(), "b", "s"),
        ] {
            assert_eq!(
                text(name, value),
                format!("option {name:?} takes a value of D-Bus type {expected:?}, not {found:?}")
            );
        }
        let many: Vec<Fd<'_>> = (0..=MOST_KEY_FILES).map(|_| file().into()).collect();
        assert_eq!(
            text("key-files", Variant::Array(many.into())),
            "option \"key-files\" takes at most 4 descriptors, not 5"
        );
        let none = decode("key-files", Variant::Array(Vec::<Fd<'_>>::new().into())).unwrap();
        assert!(none.key_files.is_empty());
    }
}
