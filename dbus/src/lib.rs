//! The contract between loopd and its clients, used by both sides.
//!
//! Beside the Rust types this folder holds what a bus needs of the contract: the bus policy, the
//! activation file and the introspection XML of each interface.

#![forbid(unsafe_code)]

pub mod error;
pub mod names;
pub mod options;
pub mod properties;
pub mod proxy;
pub mod transport;

pub use loopd_common::{Error, ErrorKind, Lifetime, Overlap, State, UnknownWord};

pub use error::ErrorReply;
pub use options::{AttachOptions, DetachOptions, InvalidOption, ListOptions, MountOptions, UnmountOptions};
pub use properties::{AttachmentProperties, PartitionProperties, VolumeProperties};
