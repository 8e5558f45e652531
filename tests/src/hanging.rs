//! A file system with one file, which answers nobody while it is told to hang.

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

/// The mounted file system. It answers when dropped, and is unmounted, or left to the runner where a
/// device shows its file still.
pub struct Hanging {
    folder: PathBuf,
    gate: Arc<Gate>,
    _session: BackgroundSession,
}

impl Hanging {
    /// Mounts it at a new folder; its file is as long as this, and empty.
    ///
    /// # Errors
    /// The kernel has no FUSE.
    pub fn mount(parent: &Path, bytes: usize) -> Result<Self> {
        Self::mount_for(crate::ROOT, parent, bytes)
    }

    /// The same, for this user alone.
    ///
    /// # Errors
    /// The kernel has no FUSE.
    pub fn mount_for(user: User, parent: &Path, bytes: usize) -> Result<Self> {
        let folder = parent.join("hanging");
        std::fs::create_dir(&folder)?;
        Self::mount_on(folder, user, bytes, "hanging", "fuse", "")
    }

    /// The same, this user's, and open to all.
    ///
    /// # Errors
    /// The kernel has no FUSE.
    pub fn mount_for_all(user: User, parent: &Path, bytes: usize) -> Result<Self> {
        let folder = parent.join("hanging for all");
        std::fs::create_dir(&folder)?;
        Self::mount_on(folder, user, bytes, "hanging", "fuse", ",allow_other")
    }

    /// Mounts it over a directory under a source and a type that a user could give fusermount.
    ///
    /// # Errors
    /// The kernel has no FUSE.
    pub fn pretend(folder: &Path, source: &str, kind: &str) -> Result<Self> {
        Self::mount_on(folder.to_owned(), crate::ROOT, 0, source, kind, "")
    }

    fn mount_on(
        folder: PathBuf,
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
        mount(Some(source), &folder, Some(kind), flags, Some(options.as_str()))
            .context("mounting with FUSE")?;
        let session = Session::from_fd(files, channel, SessionACL::All, Config::default())
            .and_then(Session::spawn)
            .inspect_err(|_| {
                let _in_use = umount(&folder);
            })?;
        Ok(Self { folder, gate, _session: session })
    }

    /// The file's path.
    #[must_use]
    pub fn path(&self) -> PathBuf {
        self.folder.join(NAME)
    }

    /// Opens the file for reading and writing.
    ///
    /// # Errors
    /// open's.
    pub fn open(&self) -> Result<File> {
        Ok(File::options().read(true).write(true).open(self.path())?)
    }

    /// From now on nobody gets an answer.
    pub fn hang(&self) {
        self.gate.state().closed = true;
    }

    /// From now on a process waits when it closes the file.
    pub fn withhold_flush(&self, from: nix::unistd::Pid) {
        self.gate.state().withheld = Some(from);
    }

    /// How many closes wait.
    #[must_use]
    pub fn closing(&self) -> usize {
        self.gate.state().closing.len()
    }

    /// Whether who looks at a file gets an error from now on.
    pub fn break_down(&self, broken: bool) {
        self.gate.state().broken = broken;
    }

    /// Waits until somebody waits for an answer.
    ///
    /// # Errors
    /// Nobody does.
    pub async fn asked(&self) -> Result<()> {
        eventually("the file system is asked", async || Ok(!self.gate.state().waiting.is_empty())).await
    }

    /// How many wait for an answer.
    #[must_use]
    pub fn waiting(&self) -> usize {
        self.gate.state().waiting.len()
    }

    /// Answers, also those who wait.
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
        let _in_use = umount(&self.folder);
    }
}

/// Whether there is no such device, or no driver behind it.
fn is_missing(error: &std::io::Error) -> bool {
    use nix::errno::Errno;
    [Errno::ENOENT, Errno::ENODEV, Errno::ENXIO]
        .map(|errno| Some(errno as i32))
        .contains(&error.raw_os_error())
}

type Answer = Box<dyn FnOnce(&mut Vec<u8>) + Send>;

/// The contents, and the answers that are held back.
#[derive(Default)]
struct Gate {
    state: Mutex<GateState>,
}

#[derive(Default)]
struct GateState {
    contents: Vec<u8>,
    closed: bool,
    broken: bool,
    waiting: Vec<Answer>,
    withheld: Option<nix::unistd::Pid>,
    closing: Vec<ReplyEmpty>,
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, GateState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Answers, now or when the gate is opened.
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
        if parent != INodeNo::ROOT || name != NAME {
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
        // The kernel names the thread.
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
