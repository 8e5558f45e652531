//! Images made by hand, by tools and by chance.

mod bad_input;
mod commands;
mod described;
mod fuzz;
pub mod images;
mod kernel;
mod kernel_rules;
mod libblkid;
mod sector_sizes;
mod tools;
