//! The error for something that is in use, with its users.

use loopd_dbus::Error;

/// An error of loopd's with the kind `Busy`, and what this process can see of the users.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{error}")]
pub struct InUse {
    /// The error of loopd.
    pub error: Error,
    /// Its users, as far as they are visible to this process.
    pub holders: Vec<String>,
}

/// The holders that an error lists.
#[must_use]
pub fn holders_in(error: &anyhow::Error) -> &[String] {
    error.downcast_ref::<InUse>().map(|in_use| in_use.holders.as_slice()).unwrap_or_default()
}

/// The error and its holders, one per line.
#[must_use]
pub fn explanation(error: &anyhow::Error) -> Vec<String> {
    std::iter::once(format!("{error:#}")).chain(holders_in(error).iter().cloned()).collect()
}
