//! A FUSE file system with one file, which can stop answering.

use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context as _, Result};
use fuser::{
    BackgroundSession, Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation,
    INodeNo, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite,
    Request, Session, SessionACL, WriteFlags,
};
use nix::mount::{MsFlags, mount, umount};

use crate::User;
use crate::process::eventually;

const NAME: &str = "image";
const FILE: INodeNo = INodeNo(2);
/// The kernel asks each time.
const AT_ONCE: Duration = Duration::ZERO;

/// The mounted file system. When dropped, it answers again and is unmounted, or left to the runner if its file is
/// still attached.
pub struct Hanging {
    directory: PathBuf,
    gate: Arc<Gate>,
    _session: BackgroundSession,
}

impl Hanging {
    /// Mounts it at a new directory; its file is as long as this, and empty.
    ///
    /// # Errors
    /// The kernel has no FUSE.
    pub fn mount(parent: &Path, bytes: usize) -> Result<Self> {
        Self::mount_for(crate::ROOT, parent, bytes)
    }

    /// The same, accessible to this user only.
    ///
    /// # Errors
    /// The kernel has no FUSE.
    pub fn mount_for(user: User, parent: &Path, bytes: usize) -> Result<Self> {
        let directory = parent.join("hanging");
        std::fs::create_dir(&directory)?;
        Self::mount_on(directory, user, bytes, "hanging", "fuse", "")
    }

    /// The same, of this user, and accessible to all.
    ///
    /// # Errors
    /// The kernel has no FUSE.
    pub fn mount_for_all(user: User, parent: &Path, bytes: usize) -> Result<Self> {
        let directory = parent.join("hanging for all");
        std::fs::create_dir(&directory)?;
        Self::mount_on(directory, user, bytes, "hanging", "fuse", ",allow_other")
    }

    /// Mounts it over a directory under a source and a type that a user could give fusermount.
    ///
    /// # Errors
    /// The kernel has no FUSE.
    pub fn pretend(directory: &Path, source: &str, kind: &str) -> Result<Self> {
        Self::mount_on(directory.to_owned(), crate::ROOT, 0, source, kind, "")
    }

    fn mount_on(
        directory: PathBuf,
        user: User,
        bytes: usize,
        source: &str,
        kind: &str,
        more: &str,
    ) -> Result<Self> {
        let gate = Arc::<Gate>::default();
        gate.state().contents = vec![0; bytes];
        let files = Files { gate: Arc::clone(&gate) };
        let channel = match File::options().read(true).write(true).open("/dev/fuse") {
            Err(error) if is_missing(&error) => {
                return crate::skip("this kernel has no FUSE");
            }
            opened => OwnedFd::from(opened.context("/dev/fuse")?),
        };
        let options = format!(
            "fd={},rootmode=40000,user_id={},group_id={}{more}",
            channel.as_raw_fd(),
            user.uid,
            user.gid
        );
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        mount(Some(source), &directory, Some(kind), flags, Some(options.as_str()))
            .context("mounting with FUSE")?;
        let session = Session::from_fd(files, channel, SessionACL::All, Config::default())
            .and_then(Session::spawn)
            .inspect_err(|_| {
                let _in_use = umount(&directory);
            })?;
        Ok(Self { directory, gate, _session: session })
    }

    /// The file's path.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.directory.join(NAME)
    }

    /// Opens the file for reading and writing.
    ///
    /// # Errors
    /// open's.
    pub fn open(&self) -> Result<File> {
        Ok(File::options().read(true).write(true).open(self.path())?)
    }

    /// Stops answering.
    pub fn hang(&self) {
        self.gate.state().closed = true;
    }

    /// Stops answering the FLUSH of this process, so its closes hang.
    pub fn withhold_flush(&self, from: nix::unistd::Pid) {
        self.gate.state().withheld = Some(from);
    }

    /// The number of closes that wait.
    #[must_use]
    pub fn closing(&self) -> usize {
        self.gate.state().closing.len()
    }

    /// Sets whether stat(2) fails.
    pub fn break_down(&self, broken: bool) {
        self.gate.state().broken = broken;
    }

    /// Deletes the file as another client of a network file system does: the kernel finds out at the next lookup.
    pub fn delete(&self) {
        self.gate.state().deleted = true;
    }

    /// Waits until a request is waiting for an answer.
    ///
    /// # Errors
    /// None arrives.
    pub async fn asked(&self) -> Result<()> {
        eventually("the file system is asked", async || Ok(!self.gate.state().waiting.is_empty())).await
    }

    /// The number of requests that wait.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.gate.state().waiting.len()
    }

    /// Answers again, also the requests that wait.
    pub fn go_on(&self) {
        let mut state = self.gate.state();
        state.closed = false;
        state.withheld = None;
        for reply in std::mem::take(&mut state.closing) {
            reply.ok();
        }
        for answer in std::mem::take(&mut state.waiting) {
            answer(&mut state.contents);
        }
    }
}

impl Drop for Hanging {
    fn drop(&mut self) {
        self.go_on();
        let _in_use = umount(&self.directory);
    }
}

/// Whether the error means that the device or its driver is missing.
fn is_missing(error: &std::io::Error) -> bool {
    use nix::errno::Errno;
    [Errno::ENOENT, Errno::ENODEV, Errno::ENXIO]
        .map(|errno| Some(errno as i32))
        .contains(&error.raw_os_error())
}

type Answer = Box<dyn FnOnce(&mut Vec<u8>) + Send>;

/// The contents, and the delayed answers.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
}

#[derive(Default)]
struct GateState {
    contents: Vec<u8>,
    closed: bool,
    broken: bool,
    deleted: bool,
    waiting: Vec<Answer>,
    withheld: Option<nix::unistd::Pid>,
    closing: Vec<ReplyEmpty>,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers now, or when the gate is opened.
    fn answer(&self, answer: impl FnOnce(&mut Vec<u8>) + Send + 'static) {
        let mut state = self.state();
        if state.closed {
            state.waiting.push(Box::new(answer));
        } else {
            answer(&mut state.contents);
        }
    }
}

struct Files {
    gate: Arc<Gate>,
}

fn attributes(inode: INodeNo, size: usize) -> FileAttr {
    let size = size as u64;
    let (kind, perm) =
        if inode == FILE { (FileType::RegularFile, 0o644) } else { (FileType::Directory, 0o755) };
    FileAttr {
        ino: inode,
        size,
        blocks: size.div_ceil(512),
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 4096,
        flags: 0,
    }
}

/// The part of it that lies in a buffer of this length.
fn extent(length: usize, offset: u64, bytes: usize) -> std::ops::Range<usize> {
    let start = usize::try_from(offset).unwrap_or(length).min(length);
    start..start.saturating_add(bytes).min(length)
}

impl Filesystem for Files {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent != INodeNo::ROOT || name != NAME || self.gate.state().deleted {
            return reply.error(Errno::ENOENT);
        }
        self.gate.answer(move |file| reply.entry(&AT_ONCE, &attributes(FILE, file.len()), Generation(0)));
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        if self.gate.state().broken {
            return reply.error(Errno::EIO);
        }
        self.gate.answer(move |file| reply.attr(&AT_ONCE, &attributes(inode, file.len())));
    }

    fn open(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        reply.opened(FileHandle(0), FopenFlags::empty());
    }

    fn flush(&self, request: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        let mut state = self.gate.state();
        // The request has the id of the thread.
        let is_of = |process| Path::new(&format!("/proc/{process}/task/{}", request.pid())).exists();
        if state.withheld.is_some_and(is_of) {
            state.closing.push(reply);
        } else {
            reply.ok();
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        self.gate.answer(move |file| reply.data(&file[extent(file.len(), offset, size as usize)]));
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        offset: u64,
        data: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let data = data.to_vec();
        self.gate.answer(move |file| {
            let extent = extent(file.len(), offset, data.len());
            let written = extent.len();
            file[extent].copy_from_slice(&data[..written]);
            reply.written(u32::try_from(written).unwrap_or(u32::MAX));
        });
    }
}
