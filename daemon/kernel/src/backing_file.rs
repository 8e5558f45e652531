//! What may be attached: checks of the descriptor before any ioctl sees it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;

use loopd_common::{Error, ErrorKind};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::stat::SFlag;
use nix::sys::statfs::{
    BPF_FS_MAGIC, CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, DEBUGFS_MAGIC, PROC_SUPER_MAGIC, SECURITYFS_MAGIC,
    SELINUX_MAGIC, SMACK_MAGIC, SYSFS_MAGIC, TRACEFS_MAGIC, fstatfs,
};

/// Permission bits, which an access control list does not go beyond.
const WRITABLE_BY_OTHERS: u32 = 0o022;

use loopd_common::text::printable;
use loopd_engine::kernel::{FileFacts, FileIdentity, FileKind};
use loopd_engine::{AttachRequest, is_root};

/// A descriptor that was looked at.
#[derive(Debug)]
pub struct Examined {
    /// What the caller is shown.
    pub facts: FileFacts,
    /// Bytes of a regular file; `None` for a block device, whose size the kernel knows.
    pub size: Option<u64>,
}

fn invalid(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidBackingFile, message)
}

/// Looks at a descriptor: kind, access mode, size, path. May block as long as the file's file
/// system does.
///
/// # Errors
/// `InvalidBackingFile` where it can never be attached.
pub fn examine(file: impl AsFd) -> Result<Examined, Error> {
    let file = file.as_fd();
    let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .map(|path| path.into_os_string().into_vec())
        .unwrap_or_default();
    let name = printable(&path);
    let unreadable =
        |errno| invalid(format!("cannot attach {name}: looking at the descriptor failed: {errno}"));

    let flags = OFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GETFL).map_err(unreadable)?);
    if flags.contains(OFlag::O_PATH) {
        return Err(invalid(format!(
            "cannot attach {name}: the descriptor was opened with O_PATH; open it for reading"
        )));
    }
    let access = flags & OFlag::O_ACCMODE;
    if access == OFlag::O_WRONLY {
        return Err(invalid(format!(
            "cannot attach {name}: the descriptor was opened for writing only; open it for reading, or for both"
        )));
    }

    // Not nix's: with 32-bit words that has no room for an inode's number, nor for the size of a large file.
    let status = rustix::fs::fstat(file).map_err(|errno| match Errno::from_raw(errno.raw_os_error()) {
        // `fuse_allow_current_process` (fs/fuse/dir.c): not even root is let in.
        Errno::EACCES => invalid(format!(
            "cannot attach {name}: its file system does not let root look at it; on a FUSE file system mount \
             with allow_other, or copy the file"
        )),
        errno => unreadable(errno),
    })?;
    let kind = match SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT {
        SFlag::S_IFREG => FileKind::Regular,
        SFlag::S_IFBLK => FileKind::BlockDevice,
        other => {
            let what = kind_name(other);
            return Err(invalid(format!(
                "cannot attach {name}: it is {what}, not a regular file or a block device"
            )));
        }
    };
    refuse_made_on_reading(file, &name)?;
    Ok(Examined {
        facts: FileFacts {
            kind,
            path,
            identity: FileIdentity { device: status.st_dev, inode: status.st_ino },
            writable: access == OFlag::O_RDWR && !is_sealed(file),
            appends: flags.contains(OFlag::O_APPEND) && access == OFlag::O_RDWR,
            only_root_writes: is_root(status.st_uid) && status.st_mode & WRITABLE_BY_OTHERS == 0,
        },
        size: (kind == FileKind::Regular).then(|| u64::try_from(status.st_size).unwrap_or(0)),
    })
}

/// A memfd whose contents nobody may change any more.
fn is_sealed(file: BorrowedFd<'_>) -> bool {
    let seals = fcntl(file, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
    seals.is_ok_and(|seals| seals.intersects(SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_FUTURE_WRITE))
}

/// Files of procfs, sysfs and their like are no storage: the kernel makes their contents when they are read,
/// by the rights of whoever reads, which for a loop device is the kernel itself.
fn refuse_made_on_reading(file: BorrowedFd<'_>, name: &str) -> Result<(), Error> {
    let Ok(found) = fstatfs(file) else { return Ok(()) };
    let made = [
        PROC_SUPER_MAGIC,
        SYSFS_MAGIC,
        DEBUGFS_MAGIC,
        TRACEFS_MAGIC,
        SECURITYFS_MAGIC,
        SELINUX_MAGIC,
        SMACK_MAGIC,
        CGROUP_SUPER_MAGIC,
        CGROUP2_SUPER_MAGIC,
        BPF_FS_MAGIC,
    ];
    if !made.contains(&found.filesystem_type()) {
        return Ok(());
    }
    Err(invalid(format!(
        "cannot attach {name}: it is on a file system whose files the kernel makes when they are read; copy it first"
    )))
}

/// A writer that appends is none for a loop device, which writes in place: Linux overwrites what is there,
/// even of a file that only may be appended to, or, in older versions, appends every block.
///
/// # Errors
/// `InvalidBackingFile`.
pub fn refuse_appending(examined: &Examined) -> Result<(), Error> {
    if !examined.facts.appends {
        return Ok(());
    }
    let name = printable(&examined.facts.path);
    Err(invalid(format!(
        "cannot attach {name}: the descriptor was opened with O_APPEND, and a loop device writes in place; open it \
         without O_APPEND, or for reading only"
    )))
}

fn kind_name(kind: SFlag) -> &'static str {
    match kind {
        SFlag::S_IFDIR => "a directory",
        SFlag::S_IFCHR => "a character device",
        SFlag::S_IFIFO => "a pipe",
        SFlag::S_IFSOCK => "a socket",
        _ => "something else",
    }
}

/// Checks that the device would have at least one sector, and would not append what it writes.
///
/// # Errors
/// `InvalidBackingFile` where the file is too small, or the descriptor appends, `InvalidArgs` where the offset is past its end.
pub fn check_fit(examined: &Examined, request: &AttachRequest) -> Result<(), Error> {
    if !request.read_only {
        refuse_appending(examined)?;
    }
    let Some(size) = examined.size else { return Ok(()) };
    let name = printable(&examined.facts.path);
    if size < 512 {
        return Err(invalid(format!(
            "cannot attach {name}: it has {size} bytes, and a loop device needs at least one sector of 512; \
             make the file larger first (truncate -s SIZE FILE)"
        )));
    }
    if request.offset >= size || size - request.offset < 512 {
        return Err(Error::new(
            ErrorKind::InvalidArgs,
            format!(
                "cannot attach {name} at offset {}: the file has {size} bytes, and at least 512 must follow the offset",
                request.offset
            ),
        ));
    }
    Ok(())
}
