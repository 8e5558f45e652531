//! A kernel made of maps, mounts and files in memory: they can be slow, busy, racy and full, fail when a test
//! wants them to, and keep the rules of the loop driver.

mod file;
mod files;
mod kernel;
mod machine;
mod mappings;
mod mounts;
mod unlocker;

pub use file::SimulatedFile;
pub use files::Files;
pub use machine::{Claim, Claims, Hold, Interference, Simulated};
pub use mounts::SimulatedMounts;
