//! Reading and writing of state files: each is replaced as a whole, read only if nobody but loopd can have
//! written it, and renamed to `NAME.damaged` if it is invalid.

use std::ffi::OsString;
use std::fs::{File, Metadata, OpenOptions};
use std::io::{Error as IoError, Read as _, Result as IoResult, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use loopd_engine::Error;
use nix::fcntl::OFlag;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tracing::{debug, warn};

/// The version of the format. It changes only if an older daemon would misread the files: keys can be added
/// without it.
pub const VERSION: u32 = 1;
/// The suffix of the name of a state file.
pub const SUFFIX: &str = ".toml";
/// The size limit of a state file in bytes, far above that of any file loopd writes.
const MAX_SIZE: u64 = 4096;
/// The suffix of the name of an invalid file that was moved aside.
const DAMAGED: &str = ".damaged";
/// The runtime directory if the service manager sets no other.
const RUNTIME_DIRECTORY: &str = "/run/loopd";

/// The first runtime directory that the service manager made, or the default, which is made if missing.
///
/// # Errors
/// The directory cannot be made.
pub fn runtime_directory() -> IoResult<PathBuf> {
    let given = std::env::var_os("RUNTIME_DIRECTORY").unwrap_or_default();
    // The second one contains the mount directories.
    let first = std::env::split_paths(&given).next().filter(|first| !first.as_os_str().is_empty());
    let directory = first.unwrap_or_else(|| PathBuf::from(RUNTIME_DIRECTORY));
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(&directory)?;
    Ok(directory)
}

/// Makes a directory that only loopd can write to. Anything else at this path is moved aside.
///
/// # Errors
/// The directory cannot be made.
pub fn make_private_directory(path: PathBuf) -> IoResult<PathBuf> {
    if path.symlink_metadata().is_ok_and(|found| !found.is_dir() || !is_private(&found)) {
        move_aside(&path, "it is not a directory that only loopd can write to");
    }
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path)?;
    Ok(path)
}

/// The paths in a directory. A failure is logged.
pub fn paths_in(directory: &Path) -> Vec<PathBuf> {
    let paths = || directory.read_dir()?.map(|entry| Ok(entry?.path())).collect::<IoResult<_>>();
    paths().unwrap_or_else(|error| {
        warn!("cannot read {}: {error}", directory.display());
        Vec::new()
    })
}

/// Whether this is a temporary file of a daemon that died before it could rename it.
fn is_unfinished(path: &Path) -> bool {
    path.file_name().unwrap_or_default().as_encoded_bytes().starts_with(b".")
}

/// Whether this is an invalid file that was moved aside.
fn is_damaged(path: &Path) -> bool {
    path.file_name().unwrap_or_default().as_encoded_bytes().ends_with(DAMAGED.as_bytes())
}

/// Loads the state files at these paths. Invalid ones are moved aside, temporary ones removed.
pub fn load_all<T>(
    paths: impl IntoIterator<Item = PathBuf>,
    load: impl Fn(&Path) -> Result<T, String>,
) -> Vec<T> {
    let mut all = Vec::new();
    for path in paths {
        if is_unfinished(&path) {
            drop(std::fs::remove_file(&path));
        } else if is_damaged(&path) {
            debug!("ignoring {}", path.display());
        } else {
            match load(&path) {
                Ok(contents) => all.push(contents),
                Err(reason) => move_aside(&path, &reason),
            }
        }
    }
    all
}

/// Writes a state file, or replaces it as a whole.
///
/// # Errors
/// The file cannot be written; an existing one is unchanged.
pub fn write(path: &Path, contents: &impl Serialize) -> Result<(), Error> {
    let text = toml::to_string(contents).map_err(IoError::other);
    text.and_then(|text| replace(path, &text)).map_err(|error| cannot_write(path, error))
}

fn replace(path: &Path, text: &str) -> IoResult<()> {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    let new = path.with_file_name(name);
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).bits();
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).custom_flags(flags);
    options.open(&new)?.write_all(text.as_bytes())?;
    std::fs::rename(new, path)
}

/// The error for a state file that cannot be written.
pub fn cannot_write(path: &Path, source: IoError) -> Error {
    Error::Io { operation: format!("write the state file {}", path.display()), source }
}

/// Reads a state file.
///
/// # Errors
/// A text for the log: the file cannot be read, others can have written it, or it is invalid.
pub fn read<T: DeserializeOwned>(path: &Path) -> Result<T, String> {
    toml::from_str(&read_private(path)?).map_err(|error| error.message().to_owned())
}

/// Checks the version of a state file.
///
/// # Errors
/// A text for the log: this loopd does not support the version.
pub fn check_version(version: u32) -> Result<(), String> {
    if version == VERSION {
        Ok(())
    } else {
        Err(format!("it has version {version}, and this loopd supports {VERSION}"))
    }
}

/// Whether only loopd can have written it.
fn is_private(metadata: &Metadata) -> bool {
    metadata.uid() == nix::unistd::geteuid().as_raw() && metadata.mode() & 0o022 == 0
}

fn read_private(path: &Path) -> Result<String, String> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path);
    let file: File = file.map_err(|error| format!("it cannot be opened: {error}"))?;
    let metadata = file.metadata().map_err(|error| error.to_string())?;
    if !metadata.is_file() || !is_private(&metadata) {
        return Err("it is not a file that only loopd can have written".to_owned());
    }
    let mut text = String::new();
    file.take(MAX_SIZE).read_to_string(&mut text).map_err(|error| format!("it cannot be read: {error}"))?;
    Ok(text)
}

/// Removes a state file. A failure is logged.
pub fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        warn!("cannot remove {}: {error}", path.display());
    }
}

/// Renames an invalid file, so that an administrator can inspect it.
fn move_aside(path: &Path, reason: &str) {
    let mut damaged = path.to_owned().into_os_string();
    damaged.push(DAMAGED);
    warn!("renaming {} to {}: {reason}", path.display(), damaged.display());
    if let Err(error) = std::fs::rename(path, &damaged) {
        warn!("cannot rename {}: {error}", path.display());
    }
}
