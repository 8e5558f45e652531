//! What daemon and clients share and is not D-Bus.
//!
//! The engine is built on this crate, which therefore depends on no D-Bus library and makes no system
//! calls.

#![forbid(unsafe_code)]

pub mod acl;
pub mod busy;
mod caller_file;
mod error;
pub mod limits;
pub mod little_endian;
pub mod mountinfo;
mod pace;
pub mod swaps;
pub mod text;
mod values;

pub use caller_file::{CallerFile, Closer};
pub use error::{Error, ErrorKind};
pub use pace::Pace;
pub use values::{EncryptionType, Lifetime, Overlap, State, UnknownValue};
