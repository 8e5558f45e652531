//! The contract between loopd and its clients, used by both sides.
//!
//! This directory also contains the files that a bus reads: the bus policy, the
//! activation file and the introspection XML of each interface.

#![forbid(unsafe_code)]

pub mod dictionary;
pub mod encoder;
pub mod error;
pub mod names;
pub mod options;
pub mod properties;
pub mod proxy;
pub mod transport;
mod warnings;

pub use loopd_common::{Error, ErrorKind, Lifetime, Overlap, State, UnknownValue};

pub use error::ErrorReply;
pub use options::{AttachOptions, DetachOptions, InvalidOption, ListOptions, MountOptions, UnmountOptions};
pub use properties::{AttachmentProperties, PartitionProperties, VolumeProperties};
pub use warnings::{Warning, Warnings};
