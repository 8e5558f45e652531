//! What loopd gets as the reply.

/// How a request ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// It was done.
    Done,
    /// The secret does not unlock the volume.
    WrongSecret,
    /// The secret, a key file or the header cannot be read or used.
    InvalidInput,
    /// The secret, a key file or the header did not arrive in time, or cryptsetup did not end in time.
    TimedOut,
    /// The derivation of the key needs more memory than there may be used.
    OutOfMemory,
    /// The volume is not of the type that was asked for.
    OtherType,
    /// The header asks for something that is refused or not supported.
    UnusableHeader,
    /// There is a mapping with this name, or another program uses the volume.
    Taken,
    /// The mapping is in use.
    InUse,
    /// cryptsetup is not installed.
    NoProgram,
    /// The kernel has no device mapper.
    NoDeviceMapper,
    /// Something else failed.
    Failed,
}

const OUTCOMES: [(Outcome, &str); 12] = [
    (Outcome::Done, "done"),
    (Outcome::WrongSecret, "wrong-secret"),
    (Outcome::InvalidInput, "invalid-input"),
    (Outcome::TimedOut, "timed-out"),
    (Outcome::OutOfMemory, "out-of-memory"),
    (Outcome::OtherType, "other-type"),
    (Outcome::UnusableHeader, "unusable-header"),
    (Outcome::Taken, "taken"),
    (Outcome::InUse, "in-use"),
    (Outcome::NoProgram, "no-program"),
    (Outcome::NoDeviceMapper, "no-device-mapper"),
    (Outcome::Failed, "failed"),
];

/// A reply.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reply {
    /// How the request ended.
    pub outcome: Outcome,
    /// What is known about a failure, printable and bounded; it may be empty.
    pub detail: String,
}

impl Reply {
    /// A reply with a detail.
    pub fn new(outcome: Outcome, detail: impl Into<String>) -> Self {
        Self { outcome, detail: detail.into() }
    }

    /// The request was done.
    #[must_use]
    pub fn done() -> Self {
        Self::new(Outcome::Done, "")
    }

    /// The text of the message.
    #[must_use]
    pub fn encode(&self) -> String {
        let name =
            OUTCOMES.iter().find(|(outcome, _)| *outcome == self.outcome).map_or("failed", |(_, name)| name);
        format!("{name}\n{}", self.detail)
    }

    /// Reads the text of a message.
    #[must_use]
    pub fn decode(text: &str) -> Option<Self> {
        let (name, detail) = text.split_once('\n')?;
        let (outcome, _) = OUTCOMES.iter().find(|(_, known)| *known == name)?;
        Some(Self::new(*outcome, detail))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn replies_are_read_as_they_were_written() {
        for (outcome, _) in OUTCOMES {
            let reply = Reply::new(outcome, "No key available with this passphrase.");
            assert_eq!(Reply::decode(&reply.encode()), Some(reply));
        }
        assert_eq!(Reply::decode("perhaps\n"), None);
        assert_eq!(Reply::decode("done"), None);
    }
}
