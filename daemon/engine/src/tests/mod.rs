//! The engine on a simulated machine.

mod adoption;
mod attach;
mod catch_up;
mod change;
pub mod clock;
mod cost;
mod detach;
mod harness;
mod lifetime;
mod mount;
mod observe;
mod overlap;
mod partitions;
mod quotas;
mod races;
mod restart;
mod silent_udev;
mod simulation;
mod unlock;
mod unlock_restart;
mod volume_check;
mod warnings;
