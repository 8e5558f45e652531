//! The findings in an image beside its partitions. They take a few reads at known offsets, and fail no attach.

mod contents;
mod file_end;
mod file_system;
mod format;
mod table;

pub use contents::find;
pub use file_end::file_end;
pub use table::Nodes;
