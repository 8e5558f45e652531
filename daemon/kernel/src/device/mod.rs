//! The node of a loop device or of a mapping: opening it, and reading through it.

pub mod exclusive;
mod mapping;
mod node;
mod reference;
mod state;

pub use mapping::{open_mapping, read_mapping};
pub use node::{open, open_attached, open_attached_for, read_bytes};
pub use reference::encode_file_name;
pub use state::{is_scanned, is_set_read_only, read_state, status, unreadable};
