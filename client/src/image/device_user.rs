//! A user of a loop device that the kernel does not list.

use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::process::Process;
use crate::message::printable;

/// A user of a loop device or of a partition of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DeviceUser {
    /// A process.
    Process {
        /// The node of the device or partition.
        node: String,
        /// How the process uses it.
        how: How,
        /// The process.
        process: Process,
        /// Its program's name.
        name: String,
    },
    /// A mount that this process's mount namespace does not have.
    Mount {
        /// The node of the device or partition.
        node: String,
        /// Where it is mounted.
        point: PathBuf,
        /// A process in that namespace.
        process: Process,
        /// Its program's name.
        name: String,
    },
    /// A swap area in use.
    Swap {
        /// The node of the device or partition.
        node: String,
    },
}

/// How a process uses a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// The node is open.
    Open,
    /// The node is mapped.
    Mapped,
    /// A file or directory on its file system is in use, and the file system is not mounted here.
    FileSystem,
}

impl fmt::Display for DeviceUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let shown = |name: &str, process: &Process| {
            format!("{} (process {})", printable(name.as_bytes()), process.pid)
        };
        match self {
            Self::Process { node, how, process, name } => {
                let how = match how {
                    How::Open => "is open in",
                    How::Mapped => "is mapped in",
                    How::FileSystem => "has a file or directory that is in use in",
                };
                write!(f, "{node} {how} {}", shown(name, process))
            }
            Self::Mount { node, point, process, name } => write!(
                f,
                "{node} is mounted on {} in the mount namespace of {}",
                printable(point.as_os_str().as_bytes()),
                shown(name, process)
            ),
            Self::Swap { node } => write!(f, "{node} is in use as swap; `sudo swapoff {node}` ends that"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_described() {
        let node = || "/dev/loop3p1".to_owned();
        let process = Process { pid: 7 };
        let with = |how, name: &str| {
            DeviceUser::Process { node: node(), how, process, name: name.to_owned() }.to_string()
        };
        assert_eq!(with(How::Open, "vim"), "/dev/loop3p1 is open in vim (process 7)");
        assert_eq!(with(How::Mapped, "a\n\u{1b}[m"), "/dev/loop3p1 is mapped in a\\n\\u{1b}[m (process 7)");
        assert!(
            with(How::FileSystem, "x")
                .starts_with("/dev/loop3p1 has a file or directory that is in use in x")
        );
        let mount = DeviceUser::Mount { node: node(), point: "/m\n".into(), process, name: "sh".to_owned() };
        let expected = "/dev/loop3p1 is mounted on /m\\n in the mount namespace of sh (process 7)";
        assert_eq!(mount.to_string(), expected);
        assert_eq!(
            DeviceUser::Swap { node: node() }.to_string(),
            "/dev/loop3p1 is in use as swap; `sudo swapoff /dev/loop3p1` ends that"
        );
    }
}
