//! Results for people and programs: tables, JSON, sizes.

pub mod column;
pub mod json;
pub mod property;
pub mod size;
pub mod stdout;
pub mod table;
