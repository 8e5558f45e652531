//! Numbers of loop devices: which are free, and which of them this process works on.

mod claims;
mod control;

pub use claims::{Claim, Numbers, taken};
pub use control::Control;
