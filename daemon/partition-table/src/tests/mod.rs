//! Tests with handmade, random and fuzzed images, with those of other tools, and against other readers.

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
