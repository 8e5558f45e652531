//! Whose an attachment is, and who may do as they like with it: the one answer for the authority, for what is
//! given back to a caller, and for the limits.

use super::Snapshot;

/// Root may do everything, with no limits and no questions.
#[must_use]
pub fn is_root(uid: u32) -> bool {
    uid == 0
}

impl Snapshot {
    /// Whether this user attached it. What loopd did not attach belongs to nobody.
    #[must_use]
    pub fn is_owned_by(&self, uid: u32) -> bool {
        self.ownership.as_ref().is_some_and(|ownership| ownership.uid == uid)
    }

    /// Whether this user may change it without being asked: its owner, or root.
    #[must_use]
    pub fn may_be_changed_by(&self, uid: u32) -> bool {
        is_root(uid) || self.is_owned_by(uid)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Ownership;
    use crate::kernel::Device;
    use loopd_common::Lifetime;

    #[test]
    fn an_attachment_is_its_owners_and_roots() {
        let mut attachment = Snapshot::of_device(Device::default());
        let changes = |attachment: &Snapshot| [0, 1000, 1001].map(|uid| attachment.may_be_changed_by(uid));
        assert_eq!(changes(&attachment), [true, false, false], "a foreign device is root's to change");
        assert!(!attachment.is_owned_by(0), "and nobody owns it");
        attachment.ownership = Some(Ownership::new(1000, None, Lifetime::Persistent));
        assert_eq!(changes(&attachment), [true, true, false]);
        assert_eq!([0, 1000].map(|uid| attachment.is_owned_by(uid)), [false, true]);
    }
}
