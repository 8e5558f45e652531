//! The test house: everything that the tests of the whole system stand on.
//!
//! A [`World`](world::World) is a private system bus with the shipped policy, a polkit (the real
//! one, a stand-in or none) and the built daemon. The loop devices and udev are the machine's own,
//! which is why the tests want root; see [`host`].

pub mod bus;
pub mod crates;
pub mod daemon;
pub mod docs;
pub mod hanging;
pub mod host;
pub mod hostile;
pub mod hostile_service;
pub mod image;
pub mod loop_ioctl;
#[cfg(test)]
mod modules;
pub mod polkit;
pub mod probe;
pub mod process;
pub mod raw_bus;
pub mod rounds;
pub mod runner;
pub mod service_manager;
pub mod signals;
pub mod sysfs;
pub mod table;
pub mod threat_model;
pub mod udev;
pub mod units;
pub mod world;

/// An unprivileged user that every Debian has, with its uid and gid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct User {
    /// The name, for polkit rules.
    pub name: &'static str,
    /// The uid.
    pub uid: u32,
    /// The gid.
    pub gid: u32,
}

/// The superuser.
pub const ROOT: User = User { name: "root", uid: 0, gid: 0 };
/// The user that the real polkit's rule says yes to.
pub const GAMES: User = User { name: "games", uid: 5, gid: 60 };
/// The user that the real polkit's rule says no to.
pub const WWW_DATA: User = User { name: "www-data", uid: 33, gid: 33 };
/// A user that no rule names.
pub const NOBODY: User = User { name: "nobody", uid: 65534, gid: 65534 };

/// What a test function gives back.
pub type Outcome = anyhow::Result<()>;

/// The error of a test that cannot run on this machine.
#[derive(Debug)]
pub struct Skipped(
    /// Why.
    pub String,
);

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Skipped {}

/// Ends a test as skipped.
///
/// # Errors
/// Always: that is how it ends the test.
pub fn skip<T>(why: impl Into<String>) -> anyhow::Result<T> {
    Err(Skipped(why.into()).into())
}
