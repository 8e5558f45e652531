//! Events for clients, and events from udev.

use tokio::sync::oneshot;

use crate::kernel::{DiskSequence, ProbeResult};
use crate::snapshot::{Changes, Snapshot};

/// An event to be published.
#[derive(Debug)]
pub enum Event {
    /// An attachment was published.
    Added(Box<Snapshot>),
    /// An attachment has changed.
    Changed(Box<Changes>),
    /// An attachment has ended.
    Removed(DiskSequence),
    /// All events before this one have been published: see [`Engine::flush_events`](crate::Engine::flush_events).
    Checkpoint(oneshot::Sender<()>),
}

/// An event of a loop device.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Uevent {
    /// N of `/dev/loopN`.
    pub number: u32,
    /// N of `/dev/loop0pN`, if it is about a partition.
    pub partition: Option<u32>,
    /// Whether the device or partition is gone.
    pub removed: bool,
    /// The disk sequence that the event names.
    pub disk_sequence: Option<DiskSequence>,
    /// udev's result; `None` for an event of the kernel.
    pub processed: Option<ProbeResult>,
    /// Whether the size changed.
    pub resized: bool,
}
