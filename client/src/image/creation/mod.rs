//! Makes images: a new file, a LUKS volume, a file system.

pub mod filesystem;
pub mod luks;
pub mod new_file;
