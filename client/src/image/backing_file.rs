//! Opening backing files with the user's own rights, and recognizing the file of an attachment.

use std::fs::{self, File, FileType, Metadata, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use loopd_dbus::AttachmentProperties;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use crate::message::{message, printable, reason};

/// Opens a file to attach; read-only if requested, or if the user may not write to it.
///
/// # Errors
/// The file cannot be opened, or is neither a regular file nor a block device.
pub fn open_backing_file(path: &Path, read_only: bool) -> anyhow::Result<File> {
    let shown = printable(path.as_os_str().as_bytes());
    let cannot =
        |error: io::Error| anyhow::anyhow!("cannot open {shown}: {}{}", reason(&error), remedy(&error));
    // Checked before the open, which has side effects on some devices.
    if let Some(kind) = unsuitable(fs::metadata(path).map_err(cannot)?.file_type()) {
        anyhow::bail!("cannot attach {shown}: it is {kind}; name a regular file or a block device");
    }
    let file = match open(path, !read_only) {
        Err(error) if !read_only && is_write_protected(&error) => {
            let file = open(path, false).map_err(cannot)?;
            message(&format!("{shown} is write-protected; the device will be read-only"));
            file
        }
        result => result.map_err(cannot)?,
    };
    Ok(file)
}

/// Opens a backing file without blocking.
///
/// # Errors
/// It cannot be opened.
pub fn open(path: &Path, write: bool) -> io::Result<File> {
    // If the path has been replaced by a FIFO since the check, a plain open would block indefinitely.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = OpenOptions::new().read(true).write(write).custom_flags(flags.bits()).open(path)?;
    let status = OFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GETFL)?);
    fcntl(&file, FcntlArg::F_SETFL(status - OFlag::O_NONBLOCK))?;
    Ok(file)
}

/// Whether an open for writing failed in a way that an open for reading may not.
#[must_use]
pub fn is_write_protected(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EACCES | Errno::EROFS | Errno::EPERM))
}

/// Whether the descriptor is open for writing.
///
/// # Errors
/// fcntl(2) failed.
pub fn is_open_for_writing(file: &File) -> io::Result<bool> {
    let flags = OFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GETFL)?);
    Ok(flags & OFlag::O_ACCMODE == OFlag::O_RDWR)
}

/// Opens a file to pass to loopd as an identification.
///
/// # Errors
/// It cannot be read, or cannot be attached to a loop device.
pub fn open_to_identify(path: &Path, metadata: &Metadata) -> io::Result<File> {
    // Nothing else can be attached, and the open may have side effects: a FIFO waits for a writer.
    if !metadata.is_file() && !metadata.file_type().is_block_device() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    OpenOptions::new().read(true).custom_flags(OFlag::O_NONBLOCK.bits()).open(path)
}

/// Whether this file is the backing file of the attachment.
#[must_use]
pub fn is_same_file(attachment: &AttachmentProperties, metadata: &Metadata) -> bool {
    (attachment.backing_device, attachment.backing_inode) == (metadata.dev(), metadata.ino())
}

fn unsuitable(kind: FileType) -> Option<&'static str> {
    if kind.is_file() || kind.is_block_device() {
        None
    } else if kind.is_dir() {
        Some("a directory")
    } else if kind.is_fifo() {
        Some("a FIFO")
    } else if kind.is_socket() {
        Some("a socket")
    } else {
        Some("a character device")
    }
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => {
            "; check the path, or create the file first, for example with `truncate -s 64M FILE`"
        }
        io::ErrorKind::PermissionDenied => {
            "; loopctl opens it with your own rights, so you must be able to read it"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn files_are_opened_in_the_requested_mode_and_block_again() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (read_only, mode) in [(false, OFlag::O_RDWR), (true, OFlag::O_RDONLY)] {
            let opened = open_backing_file(file.path(), read_only).unwrap();
            let flags = OFlag::from_bits_truncate(fcntl(&opened, FcntlArg::F_GETFL).unwrap());
            assert_eq!(flags & OFlag::O_ACCMODE, mode);
            assert!(!flags.contains(OFlag::O_NONBLOCK));
            assert_eq!(is_open_for_writing(&opened).unwrap(), !read_only);
        }
    }

    #[test]
    fn a_write_protected_file_is_opened_for_reading() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::set_permissions(file.path(), fs::Permissions::from_mode(0o444)).unwrap();
        let mut text = String::new();
        open_backing_file(file.path(), false).unwrap().read_to_string(&mut text).unwrap();
        assert!(is_write_protected(&io::Error::from(Errno::EROFS)));
        assert!(!is_write_protected(&io::Error::from(Errno::ENOENT)));
    }

    #[test]
    fn unsuitable_files_are_rejected_with_their_kind() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let text = |path: &Path| open_backing_file(path, false).unwrap_err().to_string();
        assert!(text(&fifo).contains("it is a FIFO"));
        assert!(text(directory.path()).contains("it is a directory"));
        assert!(text(Path::new("/dev/null")).contains("a character device"));
        let missing = text(Path::new("/nonexistent/x.img"));
        assert!(
            missing.starts_with("cannot open /nonexistent/x.img: No such file or directory;"),
            "{missing}"
        );
    }

    #[test]
    fn a_fifo_is_not_opened_to_identify_it() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(open_to_identify(&fifo, &fs::metadata(&fifo).unwrap()).is_err());
    }
}
