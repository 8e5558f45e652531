//! Other block devices that show the bytes of a volume: two file systems on the same bytes destroy each
//! other.
//!
//! A file system, dm, md and swap each claim the disk that they are on, or a partition of it, in any mount
//! namespace. `O_EXCL` on the disk is such a claim: it fails while the disk or a partition is
//! claimed (`bd_may_claim`, block/bdev.c), and while it is open no other claim succeeds. A loop device does
//! not claim what it is attached to, so loop devices are followed down to the file.

mod claims;
mod stack;

pub use claims::{Claims, claim};
