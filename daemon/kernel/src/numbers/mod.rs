//! Numbers of loop devices: which are free, and on which of them an operation of this process is in progress.

mod claims;
mod control;

pub use claims::{Claim, Numbers, taken};
pub use control::Control;
