//! The D-Bus service: one file for each interface, and the path of every method call in `context`.

mod accounts;
mod attachment;
mod authority;
mod board;
mod call_error;
mod caller;
mod cleartext;
mod clients;
mod connection;
mod context;
mod convert;
mod detach;
mod encrypted;
mod encryption;
mod interfaces;
mod introspection;
mod large_replies;
mod manager;
mod name;
mod object_manager;
mod objects;
mod partition;
mod publisher;
mod quotas;
mod root;
mod volume;

pub use authority::Authority;
pub use caller::Callers;
pub use clients::{Clients, watch_disconnects};
pub use connection::{Link, connect, proxy};
pub use context::Context;
pub use name::{release_name, take_name};
pub use publisher::Publisher;
pub use quotas::Quotas;
pub use root::serve_root;
