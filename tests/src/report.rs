//! Reports of benchmarks: statistics, tables of text, plots, and goals that are met or missed.

pub mod goal;
pub mod plot;
pub mod statistics;
pub mod text_table;
