//! Options for encrypted volumes.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::Args;
use clap::builder::{PossibleValuesParser, TypedValueParser};
use loopd_common::EncryptionType;

use crate::show::size;

/// Help heading of the options for encrypted volumes.
pub const HEADING: &str = "Encrypted volumes";
/// The longest key in bytes.
const MAXIMUM: u64 = 8 << 20;

/// Where the passphrase comes from, if not from the user.
#[derive(Args, Clone, Debug, Default)]
pub struct PassphraseArgs {
    /// Read the passphrase from this file; - is standard input. One newline at its end is dropped.
    ///
    /// Without this option and --key-file loopctl asks: on the terminal, or through pinentry if there is only a display.
    #[arg(long, value_name = "FILE", help_heading = HEADING)]
    pub passphrase_file: Option<PathBuf>,
    /// Use the bytes of this file as the key; - is standard input.
    ///
    /// For VeraCrypt and TrueCrypt it is a key file in addition to the passphrase, and may be given more than once.
    #[arg(long = "key-file", value_name = "FILE", help_heading = HEADING)]
    pub key_files: Vec<PathBuf>,
    /// Skip this many bytes of the key file.
    #[arg(long, value_name = "N", value_parser = size::parse, requires = "key_files", help_heading = HEADING)]
    pub key_offset: Option<u64>,
    /// Use this many bytes of the key file, at most 8M, instead of all.
    #[arg(long, value_name = "N", value_parser = key_size, requires = "key_files", help_heading = HEADING)]
    pub key_size: Option<u64>,
}

impl PassphraseArgs {
    /// The first option that is given.
    #[must_use]
    pub fn given(&self) -> Option<&'static str> {
        let file = self.passphrase_file.as_ref().map(|_| "--passphrase-file");
        file.or((!self.key_files.is_empty()).then_some("--key-file"))
    }
}

/// How to unlock a volume.
#[derive(Args, Clone, Debug, Default)]
pub struct EncryptionArgs {
    /// Where the passphrase comes from.
    #[command(flatten)]
    pub passphrase: PassphraseArgs,
    /// The LUKS header, if it is in a file of its own.
    #[arg(long, value_name = "FILE", help_heading = HEADING)]
    pub header: Option<PathBuf>,
    /// The personal iterations multiplier of a VeraCrypt volume.
    #[arg(long, value_name = "N", help_heading = HEADING)]
    pub pim: Option<u32>,
    /// Unlock the hidden volume within a VeraCrypt or TrueCrypt volume.
    #[arg(long, help_heading = HEADING)]
    pub hidden: bool,
    /// Unlock a system that VeraCrypt or TrueCrypt has encrypted.
    #[arg(long, help_heading = HEADING)]
    pub system: bool,
    /// Pass discarded blocks on to the image, which frees space and shows which blocks are unused.
    #[arg(long, help_heading = HEADING)]
    pub discard: bool,
}

impl EncryptionArgs {
    /// The first option that is given.
    #[must_use]
    pub fn given(&self) -> Option<&'static str> {
        let Self { passphrase, header, pim, hidden, system, discard } = self;
        let options = [
            (header.is_some(), "--header"),
            (pim.is_some(), "--pim"),
            (*hidden, "--hidden"),
            (*system, "--system"),
            (*discard, "--discard"),
        ];
        let option = options.iter().find(|(is_given, _)| *is_given).map(|(_, name)| *name);
        passphrase.given().or(option)
    }
}

/// The arguments of `unlock`.
#[derive(Args, Clone, Debug)]
pub struct Unlock {
    /// A device node (/dev/loop3, loop3), a partition node (/dev/loop3p1, loop3p1) or a backing file. Write ./loop3 for a
    /// file of the name loop3.
    #[arg(value_name = "TARGET")]
    pub target: OsString,
    /// Unlock this partition. By default the whole image is unlocked, or its only encrypted partition.
    #[arg(short, long, value_name = "N")]
    pub partition: Option<u32>,
    /// The type, if it is not recognized: VeraCrypt, or a header in another file.
    #[arg(long = "type", value_name = "TYPE", value_parser = encryption_type())]
    pub kind: Option<EncryptionType>,
    /// Make the cleartext read-only.
    #[arg(short, long)]
    pub read_only: bool,
    /// How to unlock it.
    #[command(flatten)]
    pub encryption: EncryptionArgs,
    /// Print the device's properties as a JSON object instead of the device with the cleartext.
    #[arg(long)]
    pub json: bool,
}

/// The arguments of `lock`.
#[derive(Args, Clone, Debug)]
pub struct Lock {
    /// A device node (/dev/loop3, loop3), a partition node (/dev/loop3p1, loop3p1) or a backing file. Write ./loop3 for a
    /// file of the name loop3.
    #[arg(value_name = "TARGET")]
    pub target: OsString,
    /// Lock this partition.
    #[arg(short, long, value_name = "N")]
    pub partition: Option<u32>,
    /// If the cleartext is in use, remove it when its last user is done, and do not wait for that.
    #[arg(long)]
    pub lazy: bool,
}

/// The values of --type and --encryption-type.
pub fn encryption_type() -> impl TypedValueParser<Value = EncryptionType> {
    PossibleValuesParser::new(["luks", "bitlocker", "veracrypt", "truecrypt"])
        .try_map(|name| name.parse::<EncryptionType>())
}

/// Parses the size of a key: at least a byte, at most 8 MiB.
///
/// # Errors
/// It is not such a size.
fn key_size(text: &str) -> Result<u64, String> {
    match size::parse(text) {
        Ok(size @ 1..=MAXIMUM) => Ok(size),
        Ok(_) => Err("a key has 1 byte to 8M".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_has_a_byte_to_8_mebibytes() {
        assert_eq!((key_size("1"), key_size("8M")), (Ok(1), Ok(8 << 20)));
        assert!(key_size("0").is_err() && key_size("8388609").is_err() && key_size("x").is_err());
    }

    #[test]
    fn each_option_is_noticed() {
        assert_eq!(EncryptionArgs::default().given(), None);
        assert_eq!(EncryptionArgs { discard: true, ..EncryptionArgs::default() }.given(), Some("--discard"));
        let passphrase = PassphraseArgs { key_files: vec!["-".into()], ..PassphraseArgs::default() };
        assert_eq!(EncryptionArgs { passphrase, ..EncryptionArgs::default() }.given(), Some("--key-file"));
    }
}
