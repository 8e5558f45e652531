//! Checks of a descriptor before any ioctl uses it.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt as _;

use loopd_common::text::printable;
use loopd_engine::kernel::{FileFacts, FileIdentity, FileKind};
use loopd_engine::{AttachRequest, Error, is_root};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, SealFlag, fcntl};
use nix::sys::stat::SFlag;
use nix::sys::statfs::{
    BPF_FS_MAGIC, CGROUP_SUPER_MAGIC, CGROUP2_SUPER_MAGIC, DEBUGFS_MAGIC, FsType, PROC_SUPER_MAGIC,
    SECURITYFS_MAGIC, SELINUX_MAGIC, SMACK_MAGIC, SYSFS_MAGIC, TRACEFS_MAGIC, fstatfs,
};

/// The smallest device, in bytes.
const SECTOR: u64 = 512;
/// Permission bits; an access control list grants no more than these.
const WRITABLE_BY_OTHERS: u32 = 0o022;
/// File systems whose files are not storage: the kernel generates their contents when they are read, with the
/// rights of the reader, which for a loop device is the kernel itself.
const GENERATED: [FsType; 10] = [
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

fn invalid(name: &str, why: &str) -> Error {
    Error::InvalidBackingFile { operation: format!("attach {name}"), reason: why.to_owned() }
}

fn not_examined(name: &str, errno: Errno) -> Error {
    invalid(name, &format!("examining the descriptor failed: {errno}"))
}

fn not_stated(name: &str, errno: Errno) -> Error {
    match errno {
        // `fuse_allow_current_process` (fs/fuse/dir.c) excludes even root.
        Errno::EACCES => invalid(
            name,
            "its file system does not give root access to it; on a FUSE file system mount with allow_other, or \
             copy the file",
        ),
        errno => not_examined(name, errno),
    }
}

fn path_only(name: &str) -> Error {
    invalid(name, "the descriptor was opened with O_PATH; open it for reading")
}

fn write_only(name: &str) -> Error {
    invalid(name, "the descriptor was opened for writing only; open it for reading, or for both")
}

fn no_storage(name: &str, kind: SFlag) -> Error {
    let kind = match kind {
        SFlag::S_IFDIR => "a directory",
        SFlag::S_IFCHR => "a character device",
        SFlag::S_IFIFO => "a pipe",
        SFlag::S_IFSOCK => "a socket",
        _ => "something else",
    };
    invalid(name, &format!("it is {kind}, not a regular file or a block device"))
}

fn generated(name: &str) -> Error {
    invalid(name, "it is on a file system whose files the kernel generates when they are read; copy it first")
}

fn appending(name: &str) -> Error {
    invalid(
        name,
        "the descriptor was opened with O_APPEND, and a loop device writes in place; open it without O_APPEND, or \
         for reading only",
    )
}

fn too_small(name: &str, size: u64) -> Error {
    let why = format!(
        "it has {size} bytes, and a loop device needs at least one sector of {SECTOR}; make the file larger first \
         (truncate -s SIZE FILE)"
    );
    invalid(name, &why)
}

fn past_end(name: &str, offset: u64, size: u64) -> Error {
    Error::InvalidArgument {
        operation: format!("attach {name} at offset {offset}"),
        reason: format!("the file has {size} bytes, and at least {SECTOR} must follow the offset"),
    }
}

fn unaligned(name: &str, offset: u64) -> Error {
    Error::InvalidArgument {
        operation: format!("attach {name} at offset {offset}"),
        reason: format!(
            "the descriptor was opened for direct I/O (O_DIRECT), which needs a multiple of {SECTOR}; open the file without it"
        ),
    }
}

/// The result of an examination of a descriptor.
#[derive(Debug)]
pub struct Examined {
    /// The facts that the engine uses.
    pub facts: FileFacts,
    /// Bytes of a regular file; `None` for a block device.
    pub size: Option<u64>,
    /// Whether the descriptor was opened for direct I/O.
    pub direct: bool,
}

impl Examined {
    /// The path for messages.
    pub fn name(&self) -> String {
        printable(&self.facts.path)
    }
}

/// Examines a descriptor: kind, access mode, size, path. May block as long as the file system of the file
/// does.
///
/// # Errors
/// `InvalidBackingFile` if it can never be attached.
pub fn examine(file: impl AsFd) -> Result<Examined, Error> {
    let file = file.as_fd();
    let path = std::fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd()))
        .map(|path| path.into_os_string().into_vec())
        .unwrap_or_default();
    let name = printable(&path);
    let flags = readable_flags(file, &name)?;
    // Not nix's `fstat`: on 32-bit machines it cannot return a large inode number or size.
    let status =
        rustix::fs::fstat(file).map_err(|errno| not_stated(&name, Errno::from_raw(errno.raw_os_error())))?;
    let kind = match SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT {
        SFlag::S_IFREG => FileKind::Regular,
        SFlag::S_IFBLK => FileKind::BlockDevice,
        other => return Err(no_storage(&name, other)),
    };
    if fstatfs(file).is_ok_and(|found| GENERATED.contains(&found.filesystem_type())) {
        return Err(generated(&name));
    }
    let is_writer = flags & OFlag::O_ACCMODE == OFlag::O_RDWR;
    let facts = FileFacts {
        kind,
        path,
        identity: FileIdentity { device: status.st_dev, inode: status.st_ino },
        writable: is_writer && !is_sealed(file),
        appends: is_writer && flags.contains(OFlag::O_APPEND),
        only_root_writes: is_root(status.st_uid) && status.st_mode & WRITABLE_BY_OTHERS == 0,
    };
    let size = (kind == FileKind::Regular).then(|| u64::try_from(status.st_size).unwrap_or(0));
    Ok(Examined { facts, size, direct: flags.contains(OFlag::O_DIRECT) })
}

/// The flags of a descriptor that allows reading.
fn readable_flags(file: BorrowedFd<'_>, name: &str) -> Result<OFlag, Error> {
    let flags = flags(file).map_err(|errno| not_examined(name, errno))?;
    if flags.contains(OFlag::O_PATH) {
        return Err(path_only(name));
    }
    if flags & OFlag::O_ACCMODE == OFlag::O_WRONLY {
        return Err(write_only(name));
    }
    Ok(flags)
}

fn flags(file: BorrowedFd<'_>) -> nix::Result<OFlag> {
    fcntl(file, FcntlArg::F_GETFL).map(OFlag::from_bits_retain)
}

/// Whether it is a memfd that is sealed against writing.
fn is_sealed(file: BorrowedFd<'_>) -> bool {
    let seals = fcntl(file, FcntlArg::F_GET_SEALS).map(SealFlag::from_bits_retain);
    seals.is_ok_and(|seals| seals.intersects(SealFlag::F_SEAL_WRITE | SealFlag::F_SEAL_FUTURE_WRITE))
}

/// Refuses a writable descriptor with `O_APPEND`: a loop device writes in place. Linux overwrites even a file
/// with the append-only attribute then; older releases append every block.
///
/// # Errors
/// `InvalidBackingFile`.
pub fn refuse_appending(examined: &Examined) -> Result<(), Error> {
    if examined.facts.appends { Err(appending(&examined.name())) } else { Ok(()) }
}

/// Checks that the device would have at least one sector, and that the descriptor does not append.
///
/// # Errors
/// `InvalidBackingFile` if the file is too small, or the descriptor appends; `InvalidArgs` if the offset is
/// past its end, or is not possible with the descriptor's direct I/O.
pub fn check_fit(examined: &Examined, request: &AttachRequest) -> Result<(), Error> {
    if !request.read_only {
        refuse_appending(examined)?;
    }
    if examined.direct && !request.offset.is_multiple_of(SECTOR) {
        return Err(unaligned(&examined.name(), request.offset));
    }
    match examined.size {
        Some(size) if size < SECTOR => Err(too_small(&examined.name(), size)),
        Some(size) if size.saturating_sub(request.offset) < SECTOR => {
            Err(past_end(&examined.name(), request.offset, size))
        }
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use std::fs::{File, OpenOptions};
    use std::os::unix::fs::OpenOptionsExt as _;
    use std::path::Path;

    use loopd_common::ErrorKind;

    use super::*;

    fn image(bytes: u64) -> tempfile::NamedTempFile {
        let image = tempfile::NamedTempFile::new().unwrap();
        image.as_file().set_len(bytes).unwrap();
        image
    }

    fn open(path: &Path, flags: OFlag) -> File {
        OpenOptions::new().read(true).write(true).custom_flags(flags.bits()).open(path).unwrap()
    }

    fn refusal(result: Result<impl std::fmt::Debug, Error>) -> String {
        result.unwrap_err().to_string()
    }

    #[test]
    fn a_regular_file_is_described() {
        let image = image(4096);
        let examined = examine(open(image.path(), OFlag::empty())).unwrap();
        assert_eq!((examined.facts.kind, examined.size), (FileKind::Regular, Some(4096)));
        assert_eq!(examined.name(), image.path().to_str().unwrap());
        assert!(examined.facts.writable && !examined.facts.appends);
        assert!(!examine(File::open(image.path()).unwrap()).unwrap().facts.writable);
    }

    #[test]
    fn descriptors_without_storage_are_rejected() {
        assert!(refusal(examine(File::open("/").unwrap())).contains("it is a directory"));
        assert!(refusal(examine(File::open("/dev/null").unwrap())).contains("it is a character device"));
        assert!(refusal(examine(std::io::pipe().unwrap().0)).contains("it is a pipe"));
        assert!(refusal(examine(File::open("/proc/self/status").unwrap())).contains("the kernel generates"));
    }

    #[test]
    fn descriptors_that_cannot_be_read_are_rejected() {
        let image = image(4096);
        let write_only = File::options().write(true).open(image.path()).unwrap();
        assert!(refusal(examine(write_only)).contains("for writing only"));
        assert!(refusal(examine(open(image.path(), OFlag::O_PATH))).contains("with O_PATH"));
    }

    #[test]
    fn a_descriptor_that_appends_is_rejected_for_a_writable_device_only() {
        let image = image(4096);
        let examined = examine(open(image.path(), OFlag::O_APPEND)).unwrap();
        let request = |read_only| AttachRequest { read_only, ..AttachRequest::default() };
        assert!(refusal(check_fit(&examined, &request(false))).contains("with O_APPEND"));
        assert!(check_fit(&examined, &request(true)).is_ok());
        assert!(refuse_appending(&examined).is_err());
    }

    #[test]
    fn at_least_one_sector_must_follow_the_offset() {
        let fits = |bytes, offset| {
            let request = AttachRequest { offset, ..AttachRequest::default() };
            check_fit(&examine(image(bytes)).unwrap(), &request)
        };
        assert!(fits(512, 0).is_ok() && fits(1024, 512).is_ok());
        assert!(refusal(fits(511, 0)).contains("at least one sector of 512"));
        for (bytes, offset) in [(1024, 1024), (1023, 512), (512, u64::MAX)] {
            assert_eq!(fits(bytes, offset).unwrap_err().kind(), ErrorKind::InvalidArgs, "{bytes} {offset}");
        }
    }
}
