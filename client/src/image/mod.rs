//! Images: what a TARGET names, which of its volumes to mount, and where they are mounted.

pub mod backing_file;
pub mod busy_device;
pub mod creation;
mod device_nodes;
mod device_search;
mod device_user;
mod earlier_file;
pub mod file_state;
pub mod holder;
pub mod mount_point;
mod mount_table;
mod process;
pub mod target;
pub mod throwaway;
pub mod unlock;
pub mod unmount;
pub mod volume;
