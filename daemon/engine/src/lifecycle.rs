//! The lifecycle of an attachment.

use loopd_common::State;

use crate::client::ClientId;

/// The life of an attachment. What clients see ([`State`]) follows from it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Lifecycle {
    /// Its attach is in progress. No client sees it.
    Attaching {
        /// The client that waits for it.
        client: ClientId,
        /// Whether the attach is to fail: the client disconnected, or calls are aborted.
        cancelled: bool,
    },
    /// It is attached.
    Attached,
    /// Its backing file is being replaced, and its disk sequence with it.
    Replacing {
        /// Whether it was being detached before.
        detaching: bool,
    },
    /// It ends with its last user.
    Detaching,
}

impl Lifecycle {
    /// What clients see.
    pub const fn state(&self) -> State {
        match self {
            Self::Attaching { .. } | Self::Attached | Self::Replacing { detaching: false } => State::Attached,
            Self::Detaching | Self::Replacing { detaching: true } => State::Detaching,
        }
    }

    /// Whether clients see it.
    pub const fn is_published(&self) -> bool {
        !matches!(self, Self::Attaching { .. })
    }

    /// Whether its attach is to fail.
    pub const fn is_cancelled(&self) -> bool {
        matches!(self, Self::Attaching { cancelled: true, .. })
    }

    /// Whether its disk sequence may change at any moment.
    pub const fn is_replacing(&self) -> bool {
        matches!(self, Self::Replacing { .. })
    }

    /// The client that waits for the attach.
    pub const fn waiting_client(&self) -> Option<&ClientId> {
        match self {
            Self::Attaching { client, .. } => Some(client),
            _ => None,
        }
    }

    /// Makes the attach fail, if it is in progress; returns whether it is.
    pub fn cancel(&mut self) -> bool {
        match self {
            Self::Attaching { cancelled, .. } => {
                *cancelled = true;
                true
            }
            _ => false,
        }
    }

    /// Begins to replace the backing file.
    pub fn begin_replacement(&mut self) {
        *self = Self::Replacing { detaching: self.state() == State::Detaching };
    }

    /// Ends the replacement of the backing file.
    pub fn end_replacement(&mut self) {
        if let Self::Replacing { detaching } = self {
            *self = if *detaching { Self::Detaching } else { Self::Attached };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_replacement_restores_the_state_before() {
        for before in [Lifecycle::Attached, Lifecycle::Detaching] {
            let mut lifecycle = before.clone();
            lifecycle.begin_replacement();
            assert!(lifecycle.is_replacing() && lifecycle.is_published());
            assert_eq!(lifecycle.state(), before.state());
            lifecycle.end_replacement();
            assert_eq!(lifecycle, before);
        }
    }

    #[test]
    fn only_an_attach_in_progress_can_be_cancelled() {
        let client = ClientId(":1.1".to_owned());
        let mut attaching = Lifecycle::Attaching { client: client.clone(), cancelled: false };
        assert_eq!((attaching.waiting_client(), attaching.is_cancelled()), (Some(&client), false));
        assert!(attaching.cancel() && attaching.is_cancelled() && !attaching.is_published());
        for mut other in [Lifecycle::Attached, Lifecycle::Detaching] {
            assert!(!other.cancel() && !other.is_cancelled());
        }
    }
}
