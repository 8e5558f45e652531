//! The named values of options and properties: the same on the bus, on the command line and in JSON.

/// A value that the contract does not define.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("option {name:?} is {value:?}; it takes {known}")]
pub struct UnknownValue {
    /// The option.
    pub name: &'static str,
    /// The value, shortened to 64 characters.
    pub value: String,
    /// The values that the option accepts.
    pub known: &'static str,
}

macro_rules! named_values {
    ($(#[$doc:meta])* $type:ident, $option:literal, $known:literal,
     { $($(#[$variant_doc:meta])* $variant:ident = $text:literal,)* }) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
        pub enum $type { $($(#[$variant_doc])* $variant,)* }

        impl $type {
            /// All values.
            pub const ALL: &[Self] = &[$(Self::$variant,)*];

            /// Its text on the bus and on the command line.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)* }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.pad(self.as_str())
            }
        }

        impl std::str::FromStr for $type {
            type Err = UnknownValue;

            fn from_str(text: &str) -> Result<Self, UnknownValue> {
                match text {
                    $($text => Ok(Self::$variant),)*
                    _ => Err(UnknownValue { name: $option, value: crate::text::shortened(text), known: $known }),
                }
            }
        }
    };
}

named_values! {
    /// When an attachment ends.
    Lifetime, "lifetime", "\"client\", \"mount\" or \"persistent\"", {
        /// With the bus connection that made it.
        #[default]
        Client = "client",
        /// With the last mount of the device or of one of its partitions.
        Mount = "mount",
        /// When it is detached.
        Persistent = "persistent",
    }
}

named_values! {
    /// What to do if the file is already attached.
    Overlap, "overlap", "\"allow\", \"refuse\" or \"reuse\"", {
        /// Attach it again.
        #[default]
        Allow = "allow",
        /// Fail with `Overlap`.
        Refuse = "refuse",
        /// Return the device with the same file, offset and size limit.
        Reuse = "reuse",
    }
}

named_values! {
    /// The state of an attachment.
    State, "state", "\"attached\" or \"detaching\"", {
        /// In use, or ready for use.
        #[default]
        Attached = "attached",
        /// The last close detaches it.
        Detaching = "detaching",
    }
}

named_values! {
    /// How a volume is encrypted.
    EncryptionType, "type", "\"luks\", \"bitlocker\", \"veracrypt\" or \"truecrypt\"", {
        /// LUKS, version 1 or 2.
        #[default]
        Luks = "luks",
        /// BitLocker.
        BitLocker = "bitlocker",
        /// VeraCrypt.
        VeraCrypt = "veracrypt",
        /// TrueCrypt.
        TrueCrypt = "truecrypt",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_parsed_back_and_others_are_rejected() {
        for lifetime in [Lifetime::Client, Lifetime::Mount, Lifetime::Persistent] {
            assert_eq!(lifetime.as_str().parse(), Ok(lifetime));
        }
        for overlap in [Overlap::Allow, Overlap::Refuse, Overlap::Reuse] {
            assert_eq!(overlap.as_str().parse(), Ok(overlap));
        }
        for state in [State::Attached, State::Detaching] {
            assert_eq!(state.as_str().parse(), Ok(state));
        }
        let unknown = "Client".parse::<Lifetime>().unwrap_err();
        assert_eq!(
            unknown.to_string(),
            r#"option "lifetime" is "Client"; it takes "client", "mount" or "persistent""#
        );
    }
}
