//! The property `Warnings` of an attachment.

use std::collections::HashMap;

use zbus::{OwnedVariant, Variant};

/// A warning as it is sent: its code and its details.
type Sent = (String, HashMap<String, Variant<'static>>);

/// A warning: what is unusual about an attachment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Warning {
    /// A stable name: `truncated`, `not-raw`, …
    pub code: String,
    /// The warning in English.
    pub message: String,
    /// How many bytes are missing or cannot be reached.
    pub bytes: Option<u64>,
    /// The number of a partition, or a sector size in bytes.
    pub number: Option<u32>,
    /// The format of an image.
    pub format: Option<String>,
}

impl Warning {
    fn into_sent(self) -> Sent {
        let mut details = HashMap::from([("message".to_owned(), Variant::from(self.message))]);
        details.extend(self.bytes.map(|bytes| ("bytes".to_owned(), bytes.into())));
        details.extend(self.number.map(|number| ("number".to_owned(), number.into())));
        details.extend(self.format.map(|format| ("format".to_owned(), format.into())));
        (self.code, details)
    }

    /// Unknown details are ignored, so that a newer daemon can send more. A missing message is empty.
    fn from_received(code: String, details: HashMap<String, OwnedVariant>) -> zbus::Result<Self> {
        let mut warning = Self { code, ..Self::default() };
        for (name, value) in details {
            match name.as_str() {
                "message" => warning.message = value.try_into()?,
                "bytes" => warning.bytes = Some(value.try_into()?),
                "number" => warning.number = Some(value.try_into()?),
                "format" => warning.format = Some(value.try_into()?),
                _ => {}
            }
        }
        Ok(warning)
    }
}

/// The warnings of an attachment, the most important ones first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Warnings(pub Vec<Warning>);

impl Warnings {
    /// The value on the bus: an array of codes, each with its details.
    #[must_use]
    pub fn to_value(&self) -> Vec<Sent> {
        self.0.iter().cloned().map(Warning::into_sent).collect()
    }
}

impl From<Warnings> for Variant<'static> {
    fn from(warnings: Warnings) -> Self {
        warnings.to_value().into()
    }
}

impl TryFrom<OwnedVariant> for Warnings {
    type Error = zbus::Error;

    fn try_from(value: OwnedVariant) -> zbus::Result<Self> {
        let received: Vec<(String, HashMap<String, OwnedVariant>)> = Variant::from(value).try_into()?;
        let warnings = received.into_iter().map(|(code, details)| Warning::from_received(code, details));
        warnings.collect::<zbus::Result<_>>().map(Self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(value: impl Into<Variant<'static>>) -> zbus::Result<Warnings> {
        value.into().try_into_owned().unwrap().try_into()
    }

    #[test]
    fn warnings_are_parsed_back() {
        let all = Warnings(vec![
            Warning {
                code: "truncated".to_owned(),
                message: "5 bytes are missing".to_owned(),
                bytes: Some(5),
                ..Warning::default()
            },
            Warning { code: "not-raw".to_owned(), format: Some("xz".to_owned()), ..Warning::default() },
            Warning { code: "partition-not-made".to_owned(), number: Some(7), ..Warning::default() },
        ]);
        assert_eq!(received(all.clone()).unwrap(), all);
        let value = Variant::from(Warnings::default());
        assert_eq!(value.value_signature().to_string(), "a(sa{sv})");
        assert_eq!(received(Warnings::default()).unwrap(), Warnings::default());
    }

    #[test]
    fn unknown_details_are_ignored_and_wrong_types_rejected() {
        let sent = |name: &str, value: Variant<'static>| {
            received(vec![("new".to_owned(), HashMap::from([(name.to_owned(), value)]))])
        };
        let expected = Warnings(vec![Warning { code: "new".to_owned(), ..Warning::default() }]);
        assert_eq!(sent("colour", 3_u8.into()).unwrap(), expected);
        assert!(sent("bytes", 3_u8.into()).is_err());
        assert!(received("text".to_owned()).is_err());
    }
}
