//! What is found in an image beside its partitions: a few reads at known offsets, none of which fails an attach.

mod contents;
mod file_end;
mod file_system;
mod format;
mod table;

pub use contents::find;
pub use file_end::file_end;
pub use table::Nodes;
