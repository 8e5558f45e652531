//! The errors of the engine, and of the traits through which it reaches the world.
//!
//! A variant has what a caller has to know as fields, and its text is here. `operation` completes the word
//! "cannot": `mount /dev/loop0 (/home/a/x.img)`. A `reason` says what is wrong and what to do about it.

use std::io;

use loopd_common::ErrorKind;
use loopd_common::busy::OPENED;
use loopd_common::text::printable;

use crate::device::{DiskSequence, Users, node};

/// How many users of a device a text names.
const MOST_USERS: usize = 10;

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A value in the request is wrong.
    #[error("cannot {operation}: {reason}")]
    InvalidArgument {
        /// What was requested.
        operation: String,
        /// Which value is wrong.
        reason: String,
    },

    /// The caller disconnected, or the daemon is stopping, before an attach was complete.
    #[error(
        "the client disconnected, or loopd was stopped, before the device was ready, so it was detached again"
    )]
    AttachAbandoned,
    /// The caller disconnected, or the daemon is stopping, before a mount was complete.
    #[error(
        "the client disconnected, or loopd was stopped, before {volume} was mounted, so it was unmounted again"
    )]
    MountAbandoned {
        /// The node and the backing file.
        volume: String,
    },
    /// The caller disconnected, or the daemon is stopping, before a volume was unlocked.
    #[error(
        "the client disconnected, or loopd was stopped, before {volume} was unlocked, so it was locked again"
    )]
    UnlockAbandoned {
        /// The node and the backing file.
        volume: String,
    },
    /// The caller may unmount its own mounts only, and there is another one now.
    #[error("it was mounted elsewhere in the meantime, by or for somebody else; try again")]
    MountedByOthers,

    /// The attachment has ended.
    #[error("the attachment with disk sequence {id} is gone")]
    Gone {
        /// Its identity.
        id: DiskSequence,
    },
    /// Another program detached the device during its attach.
    #[error(
        "the device with disk sequence {id} was detached by another program before it was ready; try again"
    )]
    DetachedByOthers {
        /// The identity of the attachment.
        id: DiskSequence,
    },
    /// Another program unmounted the volume during its mount.
    #[error("{volume} was unmounted again by another program before it was ready")]
    UnmountedByOthers {
        /// The node and the backing file.
        volume: String,
    },
    /// Another program closed the mapping of a volume while it was unlocked.
    #[error("{volume} was locked again by another program before it was ready")]
    LockedByOthers {
        /// The node and the backing file.
        volume: String,
    },
    /// Nothing is attached to the number.
    #[error("nothing is attached to {}", node(*number))]
    NothingAttached {
        /// N of `/dev/loopN`.
        number: u32,
    },
    /// The attachment does not have the partition any more.
    #[error("the partition {node} is gone")]
    NoPartition {
        /// Its node.
        node: String,
    },
    /// The volume is not mounted.
    #[error("cannot unmount {volume}: it is not mounted")]
    NotMounted {
        /// The node and the backing file.
        volume: String,
    },
    /// The volume is not unlocked.
    #[error("{volume} is not unlocked")]
    NotUnlocked {
        /// The node and the backing file.
        volume: String,
    },
    /// The device does not exist.
    #[error("cannot remove {}: there is no such device", node(*number))]
    NoDevice {
        /// N of `/dev/loopN`.
        number: u32,
    },

    /// The device of an attachment is in use.
    #[error("cannot {operation} {device} ({file}): it is {}; {remedy}", in_words(users))]
    InUse {
        /// What was requested, without the device.
        operation: &'static str,
        /// The node.
        device: String,
        /// The backing file, printable.
        file: String,
        /// Those that are known. If there are none, a process has the device open.
        users: Box<Users>,
        /// What the caller can do.
        remedy: &'static str,
    },
    /// Something else is in use, or has another operation in progress.
    #[error("cannot {operation}: {reason}")]
    Busy {
        /// What was requested.
        operation: String,
        /// Who uses it, and what to do.
        reason: String,
    },

    /// The secret does not unlock the volume.
    #[error("the secret does not unlock {volume}")]
    WrongSecret {
        /// The node and the backing file.
        volume: String,
    },

    /// The file is attached already, and the request does not allow that.
    #[error("{file} is attached to {device} already, from offset {offset}{} on: {reason}", length(*size_limit))]
    Overlap {
        /// The backing file, printable.
        file: String,
        /// The node of the device that it is attached to.
        device: String,
        /// Where that device starts in the file, in bytes.
        offset: u64,
        /// The size limit of that device in bytes; 0 is none.
        size_limit: u64,
        /// Why that device does not satisfy the request, and what to do.
        reason: String,
    },

    /// The file cannot be attached.
    #[error("cannot {operation}: {reason}")]
    InvalidBackingFile {
        /// What was requested.
        operation: String,
        /// What is wrong with the file.
        reason: String,
    },

    /// This kernel, file or configuration cannot do it.
    #[error("cannot {operation}: {reason}")]
    NotSupported {
        /// What was requested.
        operation: String,
        /// What is missing.
        reason: String,
    },

    /// A limit is reached.
    #[error("{}", limit_reached(*uid, what, *count, *limit, advice))]
    LimitExceeded {
        /// Whose limit it is; `None` for that of all users together.
        uid: Option<u32>,
        /// What is counted.
        what: &'static str,
        /// How many there are.
        count: usize,
        /// How many there may be.
        limit: usize,
        /// What the user can do.
        advice: &'static str,
    },
    /// The image has more partitions than its owner may have.
    #[error("{file} has {count} partitions, which are too many: {source}")]
    TooManyPartitions {
        /// The backing file, printable.
        file: String,
        /// How many partitions it has.
        count: usize,
        /// The limit.
        source: Box<Error>,
    },
    /// The devices of a uid follow each other too fast.
    #[error(
        "uid {uid} has had many devices and partitions made in a short time, of which there may be {per_second} a \
         second; try again in some seconds, or attach without partitions (partition-scan=false)"
    )]
    TooFast {
        /// The uid.
        uid: u32,
        /// How many may be made in a second.
        per_second: u32,
    },
    /// Every mount directory for a name is in use.
    #[error("{user} has all directories for {name:?} in use; unmount one")]
    NoMountDirectory {
        /// The name of the user.
        user: String,
        /// The name of the directories, without their numbers.
        name: String,
    },

    /// No loop device is free.
    #[error("cannot {operation}: {reason}")]
    NoFreeDevice {
        /// What was requested.
        operation: String,
        /// What the kernel could not do.
        reason: String,
    },

    /// udev did not process a device in time.
    #[error("udev did not process {device} within {seconds} s; {}", udev_remedy(*detached))]
    UdevTimeout {
        /// The node.
        device: String,
        /// How long it was waited for.
        seconds: f32,
        /// Whether the device was detached again.
        detached: bool,
    },
    /// The file system of a backing file hangs.
    #[error("the backing file of {} does not answer; try again when it does", node(*number))]
    BackingFileHangs {
        /// N of `/dev/loopN`.
        number: u32,
    },
    /// A device could not be examined, so it is unknown whether the file is attached already.
    #[error("cannot tell whether {file} is attached already: {source}, or attach with overlap=allow")]
    OverlapUnknown {
        /// The file, printable.
        file: String,
        /// Why the device could not be examined.
        source: Box<Error>,
    },
    /// Something else did not happen in time.
    #[error("cannot {operation}: {reason}")]
    Timeout {
        /// What was requested.
        operation: String,
        /// What did not happen.
        reason: String,
    },

    /// A system call failed, and its error number needs no other explanation.
    #[error("cannot {operation}: {call} failed with {source}")]
    SystemCall {
        /// What was requested.
        operation: String,
        /// The name of the call.
        call: &'static str,
        /// Its error number.
        source: Errno,
    },
    /// A file could not be read or written.
    #[error("cannot {operation}: {source}")]
    Io {
        /// What was requested.
        operation: String,
        /// Why it failed.
        source: io::Error,
    },
    /// Something failed in a way that no other variant describes.
    #[error("cannot {operation}: {reason}")]
    Failed {
        /// What was requested.
        operation: String,
        /// What went wrong.
        reason: String,
    },
    /// A task of this process panicked.
    #[error("a worker thread of loopd failed")]
    Panicked,
}

/// The error number of a system call. Only the kernel crate knows names and descriptions.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{name} ({description})")]
pub struct Errno {
    /// The name, such as `EIO`.
    pub name: String,
    /// The description, such as `I/O error`.
    pub description: &'static str,
}

impl Error {
    /// The kind of the contract.
    #[must_use]
    pub fn kind(&self) -> ErrorKind {
        match self {
            Self::InvalidArgument { .. } => ErrorKind::InvalidArgs,
            Self::AttachAbandoned
            | Self::MountAbandoned { .. }
            | Self::UnlockAbandoned { .. }
            | Self::MountedByOthers => ErrorKind::AccessDenied,
            Self::Gone { .. }
            | Self::DetachedByOthers { .. }
            | Self::UnmountedByOthers { .. }
            | Self::NothingAttached { .. }
            | Self::NoPartition { .. }
            | Self::NotMounted { .. }
            | Self::LockedByOthers { .. }
            | Self::NotUnlocked { .. }
            | Self::NoDevice { .. } => ErrorKind::NotFound,
            Self::InUse { .. } | Self::Busy { .. } => ErrorKind::Busy,
            Self::WrongSecret { .. } => ErrorKind::WrongSecret,
            Self::Overlap { .. } => ErrorKind::Overlap,
            Self::InvalidBackingFile { .. } => ErrorKind::InvalidBackingFile,
            Self::NotSupported { .. } => ErrorKind::NotSupported,
            Self::LimitExceeded { .. }
            | Self::TooManyPartitions { .. }
            | Self::TooFast { .. }
            | Self::NoMountDirectory { .. } => ErrorKind::LimitExceeded,
            Self::NoFreeDevice { .. } => ErrorKind::NoFreeDevice,
            Self::UdevTimeout { .. }
            | Self::BackingFileHangs { .. }
            | Self::OverlapUnknown { .. }
            | Self::Timeout { .. } => ErrorKind::Timeout,
            Self::SystemCall { .. } | Self::Io { .. } | Self::Failed { .. } | Self::Panicked => {
                ErrorKind::Kernel
            }
        }
    }
}

impl From<Error> for loopd_common::Error {
    /// The error that a client gets.
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error.to_string())
    }
}

fn in_words(users: &Users) -> String {
    let mounts = users.mount_points.iter().map(|path| printable(path.as_os_str().as_encoded_bytes()));
    let mut all: Vec<String> = mounts.map(|path| format!("mounted on {path}")).collect();
    all.extend(users.cleartexts.iter().cloned());
    all.extend(users.holders.iter().map(|holder| format!("held by {holder}")));
    all.extend(users.claim.as_ref().map(ToString::to_string));
    match all.len().checked_sub(MOST_USERS) {
        Some(more @ 1..) => {
            all.truncate(MOST_USERS);
            format!("{}, and {more} more", all.join(", "))
        }
        _ if all.is_empty() => OPENED.to_owned(),
        _ => all.join(", "),
    }
}

fn length(size_limit: u64) -> String {
    if size_limit == 0 { String::new() } else { format!(", {size_limit} bytes") }
}

fn limit_reached(uid: Option<u32>, what: &str, count: usize, limit: usize, advice: &str) -> String {
    match uid {
        Some(uid) => format!("uid {uid} has {count} {what} already, and may have {limit}; {advice}"),
        None => format!(
            "all users together have {count} {what} already, and may have {limit}; try again later, or have the \
             administrator raise that (all-users in loopd.toml)"
        ),
    }
}

fn udev_remedy(detached: bool) -> &'static str {
    if detached {
        "so it was detached again; look at systemd-udevd, or attach with wait=false"
    } else {
        "look at systemd-udevd"
    }
}

#[cfg(test)]
mod tests {
    use std::error::Error as _;

    use super::*;
    use crate::device::Claim;

    #[test]
    fn users_are_named_in_the_text() {
        let error = |users| Error::InUse {
            operation: "detach",
            device: node(0),
            file: "/x.img".to_owned(),
            users: Box::new(users),
            remedy: "end that first",
        };
        let unknown = error(Users::default()).to_string();
        assert_eq!(unknown, "cannot detach /dev/loop0 (/x.img): it is opened by a process; end that first");
        let mut users = Users {
            mount_points: vec!["/mnt".into()],
            holders: vec!["/dev/dm-0".to_owned()],
            ..Users::default()
        };
        assert!(error(users.clone()).to_string().contains("it is mounted on /mnt, held by /dev/dm-0;"));
        users.holders = vec!["/dev/dm-0".to_owned(); MOST_USERS];
        let many = error(users).to_string();
        assert_eq!(many.matches("held by").count(), MOST_USERS - 1);
        assert!(many.ends_with("held by /dev/dm-0, and 1 more; end that first"), "{many}");
    }

    #[test]
    fn unknown_claimants_are_described() {
        let text = |areas: &[&str]| {
            Claim { swap_areas: areas.iter().map(|node| (*node).to_owned()).collect() }.to_string()
        };
        assert!(
            text(&[]).starts_with("claimed by swap, by a file system that is unmounted lazily or mounted in")
        );
        assert!(
            text(&["/dev/loop0p1", "/dev/loop0p2"])
                .starts_with("claimed by swap on /dev/loop0p1, /dev/loop0p2, by")
        );
    }

    #[test]
    fn the_cause_is_kept() {
        let cause = io::Error::other("no space is left");
        let error = Error::Io { operation: "write the state file x".to_owned(), source: cause };
        assert_eq!(error.to_string(), "cannot write the state file x: no space is left");
        assert_eq!(error.source().unwrap().to_string(), "no space is left");
        let reply = loopd_common::Error::from(error);
        assert_eq!(reply.kind, ErrorKind::Kernel);
    }
}
