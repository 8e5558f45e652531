//! Words in a `Busy` for users of a device that the daemon cannot name. If a message has them, loopctl says what it cannot
//! see either.

/// The device is open, and nobody claims it.
pub const OPENED: &str = "opened by a process";

/// The device is claimed by one of those that follow.
pub const CLAIMED: &str = "claimed by";
