//! The harness of the host tests.
//!
//! A [`Fixture`](fixture::Fixture) has a private system bus with the shipped policy, a polkit (the real
//! one, a stand-in or none) and the built daemon. Loop devices and udev are those of the machine, so the
//! tests need root; see [`host`].

pub mod allocations;
pub mod bus;
pub mod crates;
pub mod daemon;
pub mod docs;
pub mod fixture;
pub mod hanging;
pub mod host;
pub mod hostile;
pub mod hostile_service;
pub mod image;
pub mod loop_ioctl;
pub mod losetup;
#[cfg(test)]
mod modules;
pub mod polkit;
pub mod probe;
pub mod process;
pub mod raw_bus;
pub mod report;
pub mod rounds;
pub mod runner;
pub mod service_manager;
pub mod signals;
pub mod strace;
pub mod sysfs;
pub mod table;
pub mod threat_model;
pub mod udev;
pub mod units;

/// A user that exists on every Debian.
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
/// The user that the rule of the real polkit allows.
pub const GAMES: User = User { name: "games", uid: 5, gid: 60 };
/// The user that the rule of the real polkit denies.
pub const WWW_DATA: User = User { name: "www-data", uid: 33, gid: 33 };
/// A user without a rule.
pub const NOBODY: User = User { name: "nobody", uid: 65534, gid: 65534 };

/// The result of a test function.
pub type Outcome = anyhow::Result<()>;

/// The error of a test that cannot run on this machine.
#[derive(Debug)]
pub struct Skipped(
    /// The reason.
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
/// Always: the error ends the test.
pub fn skip<T>(why: impl Into<String>) -> anyhow::Result<T> {
    Err(Skipped(why.into()).into())
}
