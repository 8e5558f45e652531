//! The parts of systemd that loopd uses: notifications, the file descriptor store, the watchdog, and units on the bus.

mod fd_store;
pub mod notify;
pub mod unit_name;
mod units;

pub use fd_store::FdStore;
pub use units::{JobError, UnitProperties, Units};
