//! The nodes of partitions: made by the kernel if it reads partition tables, else by loopd.

mod kernel_scan;
mod nodes;
mod rescan;
mod settle;

pub use kernel_scan::kernel_is_known_to_scan;
pub use settle::{of_new_attach, settle};
