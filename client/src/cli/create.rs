//! The arguments of `create`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::encryption::PassphraseArgs;
use crate::show::size;

/// The arguments of `create`.
#[derive(Args, Clone, Debug)]
pub struct Create {
    /// The new file. It must not exist.
    pub file: PathBuf,
    /// The size of the image: a multiple of 512.
    #[arg(long, value_name = "N", value_parser = image_size)]
    pub size: u64,
    /// The file system; ext4 by default. Not with --encrypt.
    #[arg(long, value_name = "TYPE")]
    pub filesystem: Option<FilesystemType>,
    /// The label of the file system, after which the mount point is named; with --encrypt, of the LUKS volume.
    #[arg(long, value_name = "S", value_parser = label)]
    pub label: Option<String>,
    /// Make an encrypted image with LUKS2, of at least 32M. loopctl asks for the new passphrase.
    ///
    /// It has no file system yet: that is made on the device that `loopctl unlock` prints.
    #[arg(long)]
    pub encrypt: bool,
    /// Where the passphrase comes from.
    #[command(flatten)]
    pub passphrase: PassphraseArgs,
}

/// The file systems that can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "lower")]
pub enum FilesystemType {
    /// The usual one of Linux
    Ext4,
    /// For large files
    Xfs,
    /// With checksums and snapshots
    Btrfs,
    /// FAT, for every system; files of less than 4 GiB
    Vfat,
    /// For every system that is not old
    Exfat,
    /// For Windows
    Ntfs,
}

/// Parses the size of an image.
///
/// # Errors
/// It is not a size, or not a multiple of 512.
fn image_size(text: &str) -> Result<u64, String> {
    match size::parse(text) {
        Ok(size) if size > 0 && size % 512 == 0 => Ok(size),
        Ok(_) => Err("the size of an image is a multiple of 512, and not 0".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Checks a label.
///
/// # Errors
/// It is empty, or starts like an option.
fn label(text: &str) -> Result<String, String> {
    if text.is_empty() || text.starts_with('-') {
        return Err("a label is not empty and does not start with -".to_owned());
    }
    Ok(text.to_owned())
}
