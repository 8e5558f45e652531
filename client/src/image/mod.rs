//! Images: what a TARGET names, which of its volumes to mount, and where they are mounted.

pub mod backing_file;
mod earlier_file;
pub mod file_state;
pub mod holder;
pub mod mount_point;
mod mount_table;
pub mod target;
pub mod throwaway;
pub mod unmount;
pub mod volume;
