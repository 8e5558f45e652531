//! Who holds a mounted file system: the processes and files that this user may see.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::{fmt, fs};

use crate::mount_table::MountTable;
use crate::output::{escaped, printable};

/// What holds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Holder {
    /// A process.
    Process {
        /// Its number.
        pid: u32,
        /// Its program's name.
        name: String,
        /// What it does there.
        how: How,
        /// Where.
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

/// What a process does with a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// It is its working directory.
    Works,
    /// It is its root directory.
    Root,
    /// It is its program.
    Runs,
    /// It has it open.
    Opened,
    /// It has it in its memory.
    Mapped,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |path: &Path| printable(path.as_os_str().as_bytes());
        match self {
            Self::Process { pid, name, how, path } => {
                let how = match how {
                    How::Works => "works in",
                    How::Root => "has as its root",
                    How::Runs => "runs",
                    How::Opened => "has open",
                    How::Mapped => "has mapped",
                };
                write!(f, "process {pid} ({}) {how} {}", escaped(name.as_bytes()), shown(path))
            }
            Self::Mount(path) => write!(f, "something is mounted at {}", shown(path)),
            Self::Device { node, path } => write!(f, "{node} is attached from {}", shown(path)),
        }
    }
}

/// What holds the mount point; each process once, and this one not at all: what it has open it was given
/// by another, or is about to close. The paths are compared as the kernel tells them, and
/// nothing is looked up in any file system but procfs and sysfs, since another one may hang.
#[must_use]
pub fn of(point: &Path) -> Vec<Holder> {
    let others = processes().filter(|pid| *pid != std::process::id());
    let mut holders: Vec<Holder> = others.filter_map(|pid| process(pid, point)).collect();
    let table = MountTable::read().unwrap_or_default();
    holders.extend(table.below(point).map(|path| Holder::Mount(path.to_owned())));
    holders.extend(devices(point));
    holders
}

fn processes() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok())
}

fn process(pid: u32, point: &Path) -> Option<Holder> {
    let folder = PathBuf::from(format!("/proc/{pid}"));
    let (how, path) = hold(&folder, point)?;
    let name = fs::read(folder.join("comm")).unwrap_or_default();
    Some(Holder::Process {
        pid,
        name: String::from_utf8_lossy(name.trim_ascii_end()).into_owned(),
        how,
        path,
    })
}

/// What a process does there first of all.
fn hold(folder: &Path, point: &Path) -> Option<(How, PathBuf)> {
    let linked = |link: PathBuf| fs::read_link(link).ok().filter(|path| path.starts_with(point));
    let named = [("cwd", How::Works), ("root", How::Root), ("exe", How::Runs)];
    let found = named.into_iter().find_map(|(link, how)| Some((how, linked(folder.join(link))?)));
    let opened = || {
        let mut links = fs::read_dir(folder.join("fd")).ok()?.flatten();
        Some((How::Opened, links.find_map(|link| linked(link.path()))?))
    };
    found.or_else(opened).or_else(|| Some((How::Mapped, mapped(folder, point)?)))
}

fn mapped(folder: &Path, point: &Path) -> Option<PathBuf> {
    let maps = BufReader::new(fs::File::open(folder.join("maps")).ok()?);
    maps.split(b'\n').map_while(Result::ok).find_map(|line| {
        // addresses, rights, offset, device, inode, and the path behind blanks
        let start = line.iter().position(|byte| *byte == b'/')?;
        let path = PathBuf::from(OsString::from_vec(line[start..].to_vec()));
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

    fn holders_of(command: &mut Command, folder: &Path) -> Vec<(How, PathBuf)> {
        let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
        let own = child.id();
        let found = of(folder).into_iter().filter_map(|holder| match holder {
            Holder::Process { pid, how, path, .. } if pid == own => Some((how, path)),
            _ => None,
        });
        let found = found.collect();
        drop(child.stdin.take());
        child.wait().unwrap();
        found
    }

    #[test]
    fn a_process_that_works_there_is_found() {
        let folder = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(folder.path()).unwrap();
        let found = holders_of(Command::new("cat").current_dir(&real), &real);
        assert_eq!(found, [(How::Works, real.clone())]);
        assert_eq!(holders_of(&mut Command::new("cat"), &real), []);
    }

    #[test]
    fn open_files_are_found_and_a_similar_name_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let real = fs::canonicalize(folder.path()).unwrap();
        let path = real.join("file");
        let file = fs::File::create(&path).unwrap();
        let found = holders_of(Command::new("cat").stdout(file), &real);
        assert_eq!(found, [(How::Opened, path)]);
        let shorter = real.to_str().unwrap();
        let shorter = Path::new(&shorter[..shorter.len() - 1]);
        assert_eq!(hold(Path::new("/proc/self"), shorter), None);
        let _ours = fs::File::open(&real).unwrap();
        let is_us =
            |holder: &Holder| matches!(holder, Holder::Process { pid, .. } if *pid == std::process::id());
        assert!(!of(&real).iter().any(is_us));
    }

    #[test]
    fn mapped_files_are_found() {
        let program = fs::read_link("/proc/self/exe").unwrap();
        let folder = program.parent().unwrap();
        assert_eq!(mapped(Path::new("/proc/self"), folder).as_ref(), Some(&program));
        assert_eq!(mapped(Path::new("/proc/self"), Path::new("/nonexistent")), None);
        assert_eq!(mapped(Path::new("/nonexistent"), folder), None);
    }

    #[test]
    fn holders_are_told_in_words() {
        let process =
            Holder::Process { pid: 7, name: "sh".to_owned(), how: How::Works, path: "/m/a\nb".into() };
        assert_eq!(process.to_string(), "process 7 (sh) works in /m/a\\nb");
        assert_eq!(Holder::Mount("/m/x".into()).to_string(), "something is mounted at /m/x");
        let device = Holder::Device { node: "/dev/loop1".to_owned(), path: "/m/x.img".into() };
        assert_eq!(device.to_string(), "/dev/loop1 is attached from /m/x.img");
    }
}
