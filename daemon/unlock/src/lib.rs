//! Unlocks an encrypted volume for loopd.
//!
//! loopd starts the program `loopd-unlock` in a unit of its own, with one end of a socket pair as standard input. The
//! program makes a second socket pair and sends one end of it to loopd: the service manager keeps its copy of the
//! standard input, so nothing that comes from a user may ever be queued there. Over the second pair loopd sends one
//! [`Request`] with the descriptors that the caller has passed, and gets one [`Reply`]. For a volume to be opened,
//! [`Outcome::Done`] says that the descriptors were read to their ends: a caller can delay that, so loopd takes its locks
//! and checks the volume only then. It sends [`BEGIN`], and the next reply says whether the volume is open. If so, loopd
//! sends a [`Keep`], which has a reply too. If loopd closes its end instead, the volume is closed again.
//!
//! The secret is read here, written to a pipe of cryptsetup, and nowhere else.

#![forbid(unsafe_code)]

pub mod channel;
mod cryptsetup;
mod input;
mod reply;
mod request;
mod serve;
#[cfg(test)]
mod tests;
mod wait;

pub use cryptsetup::find as find_cryptsetup;
pub use reply::{Outcome, Reply};
pub use request::{BEGIN, Keep, OpenRequest, Request};
pub use serve::serve;
