//! What is heard of udev.

use tokio::time::Instant;

/// What is heard of udev.
#[derive(Debug, Default)]
pub struct Hearing {
    /// When the last event came.
    pub last: Option<Instant>,
    /// Whether udev did not answer when it was asked last.
    pub is_gone: bool,
}
