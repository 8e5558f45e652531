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
mod unlock_options;
mod warnings;

pub use loopd_common::{EncryptionType, Error, ErrorKind, Lifetime, Overlap, State, UnknownValue};

pub use error::ErrorReply;
pub use options::{
    AttachOptions, DetachOptions, InvalidOption, ListOptions, LockOptions, MountOptions, UnmountOptions,
};
pub use properties::{
    AttachmentProperties, CleartextProperties, EncryptedProperties, PartitionProperties, VolumeProperties,
};
pub use unlock_options::UnlockOptions;
pub use warnings::{Warning, Warnings};
