//! Phrases in a `Busy` error about users of a device that the daemon cannot name. loopctl recognizes them, and then adds
//! what its own search has not found either.
//!
//! The phrases are needed because an error of the contract has only a name and a message, and because `Busy` has other
//! reasons, too: a user that the message names, or another operation in progress. The state of the device does not tell
//! them apart, since it may have changed since the error. A message without a phrase only lacks that line.

/// The device is open, and nobody has claimed it.
pub const OPENED: &str = "opened by a process";

/// The device is claimed; a list of the possible users follows.
pub const CLAIMED: &str = "claimed by";
