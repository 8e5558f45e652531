//! Whether udev's events arrive.

use tokio::time::Instant;

/// Whether udev's events arrive.
#[derive(Debug, Default)]
pub struct Hearing {
    /// When the last event arrived.
    pub last: Option<Instant>,
    /// Whether udev did not answer at the last check ([`Udev::udev_answers`](crate::kernel::Udev::udev_answers)).
    pub is_gone: bool,
}
