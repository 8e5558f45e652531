//! The quotas for calls on the bus.

use loopd_engine::{Quota, Settings};

/// Quotas of each uid and of all users together. Clones share them.
#[derive(Clone, Debug)]
pub struct Quotas {
    /// Calls in progress.
    pub calls: Quota,
    /// Open authorization prompts.
    pub prompts: Quota,
}

impl Quotas {
    /// Empty quotas with the limits of these settings.
    #[must_use]
    pub fn new(settings: &Settings) -> Self {
        Self {
            calls: Quota::new("calls in progress", "wait until one has ended", settings.calls),
            prompts: Quota::new("open prompts", "answer one", settings.prompts),
        }
    }

    /// Replaces the limits. Existing calls and prompts stay.
    pub fn set_limits(&self, settings: &Settings) {
        self.calls.set_limits(settings.calls);
        self.prompts.set_limits(settings.prompts);
    }
}
