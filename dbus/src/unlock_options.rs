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
    /// An unknown key, a value of the wrong type, too many key files, or an option that does not apply to the type.
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
        options.check()?;
        Ok(options)
    }

    /// Checks that each option applies to the type. udev does not find VeraCrypt and TrueCrypt volumes, so these types
    /// are always named.
    fn check(&self) -> Result<(), InvalidOption> {
        use EncryptionType::{Luks, TrueCrypt, VeraCrypt};
        let is_one_of = |kinds: &[EncryptionType]| self.kind.is_some_and(|kind| kinds.contains(&kind));
        let is_veracrypt = is_one_of(&[VeraCrypt]);
        let is_either = is_veracrypt || is_one_of(&[TrueCrypt]);
        let either = "\"veracrypt\" or \"truecrypt\"";
        for (name, is_set, applies, kinds) in [
            ("pim", self.pim != 0, is_veracrypt, "\"veracrypt\""),
            ("hidden", self.hidden, is_either, either),
            ("system", self.system, is_either, either),
            ("key-files", !self.key_files.is_empty(), is_either, either),
            ("header", self.header.is_some(), self.kind.is_none() || is_one_of(&[Luks]), "\"luks\""),
        ] {
            if is_set && !applies {
                return Err(InvalidOption::OtherType { name, kinds });
            }
        }
        Ok(())
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

    fn received(sent: SentOptions<'_>) -> ReceivedOptions {
        sent.into_iter().map(|(name, value)| (name.to_owned(), value.try_into_owned().unwrap())).collect()
    }

    fn decode(name: &str, value: Variant<'_>) -> Result<UnlockOptions, InvalidOption> {
        let value = value.try_into_owned().unwrap();
        UnlockOptions::decode(ReceivedOptions::from([(name.to_owned(), value)]))
    }

    #[test]
    fn encoded_options_are_decoded_again() {
        let header = UnlockOptions { header: Some(file()), ..UnlockOptions::default() };
        for kind in EncryptionType::ALL {
            let only_type = UnlockOptions { kind: Some(*kind), ..UnlockOptions::default() };
            assert_eq!(UnlockOptions::decode(received(only_type.encode())).unwrap().kind, Some(*kind));
        }
        assert_eq!(header.encode().len(), 1);
        assert!(UnlockOptions::decode(received(header.encode())).unwrap().header.is_some());
        let options = UnlockOptions {
            kind: Some(EncryptionType::VeraCrypt),
            read_only: true,
            discard: true,
            header: None,
            key_files: (0..MOST_KEY_FILES).map(|_| file()).collect(),
            key_size: 32,
            key_offset: 64,
            pim: 485,
            hidden: true,
            system: true,
        };
        let sent = options.encode();
        assert_eq!(sent.len(), 9, "a field is missing from the test or from encode()");
        let decoded = UnlockOptions::decode(received(sent)).unwrap();
        assert_eq!((decoded.kind, decoded.pim), (Some(EncryptionType::VeraCrypt), 485));
        assert_eq!((decoded.key_size, decoded.key_offset, decoded.key_files.len()), (32, 64, 4));
        assert!(decoded.read_only && decoded.discard && decoded.hidden && decoded.system);
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
        let kind = Variant::from("truecrypt").try_into_owned().unwrap();
        let received = ReceivedOptions::from([("key-files".to_owned(), sent), ("type".to_owned(), kind)]);
        let options = UnlockOptions::decode(received).unwrap();
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
    #[test]
    fn options_that_do_not_apply_to_the_type_are_rejected() {
        let refused = |options: UnlockOptions| {
            UnlockOptions::decode(received(options.encode())).err().map(|error| error.to_string())
        };
        let either = "\"veracrypt\" or \"truecrypt\"";
        let options = UnlockOptions::default;
        for kind in std::iter::once(None).chain(EncryptionType::ALL.iter().copied().map(Some)) {
            let is_veracrypt = kind == Some(EncryptionType::VeraCrypt);
            let is_either = is_veracrypt || kind == Some(EncryptionType::TrueCrypt);
            let is_luks = kind.is_none() || kind == Some(EncryptionType::Luks);
            for (options, name, applies, kinds) in [
                (UnlockOptions { pim: 1, ..options() }, "pim", is_veracrypt, "\"veracrypt\""),
                (UnlockOptions { hidden: true, ..options() }, "hidden", is_either, either),
                (UnlockOptions { system: true, ..options() }, "system", is_either, either),
                (UnlockOptions { key_files: vec![file()], ..options() }, "key-files", is_either, either),
                (UnlockOptions { header: Some(file()), ..options() }, "header", is_luks, "\"luks\""),
            ] {
                let expected = (!applies)
                    .then(|| format!("option {name:?} is only for the type {kinds}; see option \"type\""));
                assert_eq!(refused(UnlockOptions { kind, ..options }), expected, "{kind:?}");
            }
        }
    }
}
