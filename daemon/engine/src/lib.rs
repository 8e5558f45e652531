//! The attachments of a machine: their owners, their lifetimes, and the operations on them.
//!
//! The engine uses no D-Bus, no ioctl and no polkit: it reaches the world through the traits
//! [`Kernel`](kernel::Kernel), [`Mounter`] and [`Store`]. The state is behind one lock that is never held across
//! an await; operations on one device are serialized by the lock of that device.

#![forbid(unsafe_code)]

// The model.
mod cleartext;
mod client;
mod device;
mod error;
mod event;
mod findings;
mod future;
mod image_format;
pub mod kernel;
pub mod mount_table;
mod mounter;
mod ownership;
mod partitioning;
mod release_queue;
mod request;
mod saved;
mod settings;
mod snapshot;
mod udev;
mod unlocker;
mod warning;

// What the engine keeps.
mod cleartexts;
mod clock;
mod engine;
mod event_stream;
mod hearing;
mod keyed_mutex;
mod lifecycle;
mod limiter;
mod mount_directories;
mod operation;
mod pacing;
mod quota;
mod record;
mod records;
mod scan_queue;
mod state_writer;

// Operations.
mod attach;
mod catch_up;
mod change;
mod closing;
mod detach;
mod end_of_client;
mod lifetime;
mod lock;
mod mount;
mod mount_directory;
mod observe;
mod other_devices;
mod overlap;
mod partition;
mod replace;
mod restore;
mod scan;
mod udev_wait;
mod unlock;
mod users;

// What may be mounted, and how.
mod journal;
mod mount_name;
mod mount_plan;
mod signature;
mod superblock;
mod volume;
mod volume_check;

#[cfg(any(test, feature = "sim"))]
pub mod simulated;
#[cfg(test)]
mod tests;

pub use cleartext::{CleartextSnapshot, Mapping, MappingEvent, SavedCleartext};
pub use client::{Caller, ClientId};
pub use engine::Engine;
pub use error::{Errno, Error};
pub use event::{Event, Uevent};
pub use event_stream::EventStream;
pub use future::BoxFuture;
pub use keyed_mutex::KeyedMutex;
pub use loopd_common::limits::is_block_size;
pub use mount_name::{LONGEST_ESCAPED_NAME, safe_name};
pub use mount_plan::Policy;
pub use mounter::{Account, MountCommand, Mounter};
pub use ownership::{Ownership, is_root};
pub use quota::{Limits, Permit, Quota};
pub use request::{AttachRequest, MountRequest};
pub use saved::{MountDirectory, Phase, SavedAttachment, Store};
pub use settings::Settings;
pub use snapshot::{Changes, PartitionSnapshot, Snapshot};
pub use unlocker::{Closing, Prepared, UnlockCommand, UnlockRequest, Unlocked, Unlocker};
pub use volume::VolumeId;
pub use warning::Warning;
