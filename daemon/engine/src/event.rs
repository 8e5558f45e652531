//! Events for clients, and events from udev.

use tokio::sync::oneshot;

use crate::kernel::{DiskSequence, ProbeResult};
use crate::snapshot::{Changes, Snapshot};

/// What the world is told.
#[derive(Debug)]
pub enum Event {
    /// An attachment is there.
    Added(Box<Snapshot>),
    /// Something about it is different.
    Changed(Box<Changes>),
    /// It is gone.
    Removed(DiskSequence),
    /// Everything before this was said: see [`Engine::told`].
    Checkpoint(oneshot::Sender<()>),
}

/// Something happened to a loop device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uevent {
    /// N of `/dev/loopN`.
    pub number: u32,
    /// N of `/dev/loop0pN`, where it is about a partition.
    pub partition: Option<u32>,
    /// Whether the device or partition is gone.
    pub removed: bool,
    /// The disk sequence that the event names.
    pub disk_sequence: Option<DiskSequence>,
    /// What udev found, where the event comes from udev; `None` where the kernel itself tells.
    pub processed: Option<ProbeResult>,
    /// Whether the size changed.
    pub resized: bool,
}
