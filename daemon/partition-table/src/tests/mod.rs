//! Images made by hand, by tools and by chance.

mod bad_input;
mod fuzz;
mod images;
mod kernel;
mod kernel_rules;
mod tools;
