//! The users of a mounted file system: processes, mounts and loop devices that this user may see.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::{fmt, fs};

use super::mount_table::MountTable;
use super::process::{Process, mapped_path};
use crate::message::{escaped, printable};

/// What keeps a file system busy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// A process.
    Process {
        /// Its pid.
        pid: u32,
        /// Its program's name.
        name: String,
        /// How it uses the path.
        how: How,
        /// The path.
        path: PathBuf,
    },
    /// Another file system is mounted there.
    Mount(PathBuf),
    /// A file of it is attached to a loop device.
    Device {
        /// The device node.
        node: String,
        /// The file.
        path: PathBuf,
    },
}

/// How a process uses a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// As its working directory.
    WorkingDirectory,
    /// As its root directory.
    Root,
    /// As its executable.
    Executable,
    /// As an open file.
    Opened,
    /// As a mapped file.
    Mapped,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |path: &Path| printable(path.as_os_str().as_bytes());
        match self {
            Self::Process { pid, name, how, path } => {
                let how = match how {
                    How::WorkingDirectory => "has its working directory at",
                    How::Root => "has its root directory at",
                    How::Executable => "runs",
                    How::Opened => "has open",
                    How::Mapped => "has mapped",
                };
                write!(f, "process {pid} ({}) {how} {}", escaped(name.as_bytes()), shown(path))
            }
            Self::Mount(path) => write!(f, "another file system is mounted at {}", shown(path)),
            Self::Device { node, path } => write!(f, "{node} is attached to {}", shown(path)),
        }
    }
}

/// The holders of the mount point. Each process is listed once, and this one not at all: its descriptors
/// are inherited or about to be closed. Paths are compared as the kernel reports them; only procfs and
/// sysfs are accessed, since another file system may hang.
#[must_use]
pub fn of(point: &Path) -> Vec<Holder> {
    let others = Process::all().filter(|process| process.pid != std::process::id());
    let mut holders: Vec<Holder> = others.filter_map(|process| used_by(process, point)).collect();
    let table = MountTable::read().unwrap_or_default();
    holders.extend(table.below(point).map(|path| Holder::Mount(path.to_owned())));
    holders.extend(devices(point));
    holders
}

fn used_by(process: Process, point: &Path) -> Option<Holder> {
    let (how, path) = first_use(&process.directory(), point)?;
    Some(Holder::Process { pid: process.pid, name: process.name(), how, path })
}

/// The first use of the mount point that a process has.
fn first_use(directory: &Path, point: &Path) -> Option<(How, PathBuf)> {
    let linked = |link: PathBuf| fs::read_link(link).ok().filter(|path| path.starts_with(point));
    let named = [("cwd", How::WorkingDirectory), ("root", How::Root), ("exe", How::Executable)];
    let found = named.into_iter().find_map(|(link, how)| Some((how, linked(directory.join(link))?)));
    let opened = || {
        let mut links = fs::read_dir(directory.join("fd")).ok()?.flatten();
        Some((How::Opened, links.find_map(|link| linked(link.path()))?))
    };
    found.or_else(opened).or_else(|| Some((How::Mapped, mapped(directory, point)?)))
}

fn mapped(directory: &Path, point: &Path) -> Option<PathBuf> {
    let maps = BufReader::new(fs::File::open(directory.join("maps")).ok()?);
    maps.split(b'\n').map_while(Result::ok).find_map(|line| {
        let path = PathBuf::from(OsString::from_vec(mapped_path(&line)?.to_vec()));
        path.starts_with(point).then_some(path)
    })
}

fn devices(point: &Path) -> Vec<Holder> {
    let entries = fs::read_dir("/sys/block").into_iter().flatten().flatten();
    let attached = entries.filter_map(|entry| {
        let file = fs::read(entry.path().join("loop/backing_file")).ok()?;
        let path = PathBuf::from(OsString::from_vec(file.trim_ascii_end().to_vec()));
        let node = format!("/dev/{}", entry.file_name().to_string_lossy());
        path.starts_with(point).then_some(Holder::Device { node, path })
    });
    attached.collect()
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    fn holders_of(command: &mut Command, directory: &Path) -> Vec<(How, PathBuf)> {
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        let child_pid = child.id();
        let found = of(directory).into_iter().filter_map(|holder| match holder {
            Holder::Process { pid, how, path, .. } if pid == child_pid => Some((how, path)),
            _ => None,
        });
        let found = found.collect();
        drop(child.stdin.take());
        child.wait().unwrap();
        found
    }

    #[test]
    fn a_working_directory_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(directory.path()).unwrap();
        let found = holders_of(Command::new("cat").current_dir(&real), &real);
        assert_eq!(found, [(How::WorkingDirectory, real.clone())]);
        assert_eq!(holders_of(&mut Command::new("cat"), &real), []);
    }

    #[test]
    fn open_files_are_found_and_a_similar_name_is_not() {
        let directory = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(directory.path()).unwrap();
        let path = real.join("file");
        let file = fs::File::create(&path).unwrap();
        let found = holders_of(Command::new("cat").stdout(file), &real);
        assert_eq!(found, [(How::Opened, path)]);
        let shorter = real.to_str().unwrap();
        let shorter = Path::new(&shorter[..shorter.len() - 1]);
        assert_eq!(first_use(Path::new("/proc/self"), shorter), None);
        let _ours = fs::File::open(&real).unwrap();
        let is_this_process =
            |holder: &Holder| matches!(holder, Holder::Process { pid, .. } if *pid == std::process::id());
        assert!(!of(&real).iter().any(is_this_process));
    }

    #[test]
    fn mapped_files_are_found() {
        let program = fs::read_link("/proc/self/exe").unwrap();
        let directory = program.parent().unwrap();
        assert_eq!(mapped(Path::new("/proc/self"), directory).as_ref(), Some(&program));
        assert_eq!(mapped(Path::new("/proc/self"), Path::new("/nonexistent")), None);
        assert_eq!(mapped(Path::new("/nonexistent"), directory), None);
    }

    #[test]
    fn holders_are_described() {
        let process = Holder::Process {
            pid: 7,
            name: "sh".to_owned(),
            how: How::WorkingDirectory,
            path: "/m/a\nb".into(),
        };
        assert_eq!(process.to_string(), "process 7 (sh) has its working directory at /m/a\\nb");
        assert_eq!(Holder::Mount("/m/x".into()).to_string(), "another file system is mounted at /m/x");
        let device = Holder::Device { node: "/dev/loop1".to_owned(), path: "/m/x.img".into() };
        assert_eq!(device.to_string(), "/dev/loop1 is attached to /m/x.img");
    }
}
