//! What the daemon is for: attachments, their owners, their lifetimes, their ends.
//!
//! Knows no D-Bus, no ioctl, no polkit: the traits [`Kernel`](kernel::Kernel), [`Mounter`] and [`Store`] stand
//! for the world. The state is behind one lock that is never held across an await; operations on one device
//! are serialized by that device's own lock.

#![forbid(unsafe_code)]

// The model.
mod client;
mod event;
pub mod kernel;
pub mod mount_table;
mod mounter;
mod ownership;
mod request;
mod saved;
mod settings;
mod snapshot;

// What the engine keeps.
mod clock;
mod engine;
mod keyed_mutex;
mod lifecycle;
mod limiter;
mod mount_directories;
mod operation;
mod pacing;
mod quota;
mod record;
mod scan_queue;
mod state_writer;

// Operations.
mod attach;
mod change;
mod detach;
mod lifetime;
mod mount;
mod mount_directory;
mod observe;
mod other_devices;
mod overlap;
mod partition;
mod replace;
mod restore;
mod scan;

// What may be mounted, and how.
mod ext_journal;
mod mount_name;
mod mount_plan;
mod superblock;
mod volume;
mod volume_check;

#[cfg(any(test, feature = "sim"))]
pub mod simulated;
#[cfg(test)]
mod tests;

pub use client::{Caller, ClientId};
pub use engine::Engine;
pub use event::{Event, Uevent};
pub use keyed_mutex::KeyedMutex;
pub use mount_name::{LONGEST_ESCAPED_NAME, safe_name};
pub use mount_plan::Policy;
pub use mounter::{Account, BoxFuture, MountCommand, Mounter};
pub use ownership::{Ownership, is_root};
pub use quota::{Limits, Permit, Quota};
pub use request::{AttachRequest, MountRequest, is_block_size};
pub use saved::{MountDirectory, Phase, SavedAttachment, Store};
pub use settings::Settings;
pub use snapshot::{Changes, PartitionSnapshot, Snapshot};
pub use volume::VolumeId;
