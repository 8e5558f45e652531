//! What loopd asks for.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::str::FromStr;
use std::time::Duration;

use loopd_common::EncryptionType;

/// A volume to be opened. Its descriptors are the secret, the header if there is one, and the key files, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenRequest {
    /// The node of the volume.
    pub device: String,
    /// The name of the mapping to be made.
    pub name: String,
    /// How it is encrypted.
    pub kind: EncryptionType,
    /// Whether the mapping must not be written to.
    pub read_only: bool,
    /// Whether discards are passed on.
    pub discard: bool,
    /// Whether there is a detached header.
    pub has_header: bool,
    /// How many bytes of the secret are used; 0 for all.
    pub key_size: u64,
    /// How many bytes of the secret are skipped.
    pub key_offset: u64,
    /// VeraCrypt's personal iterations multiplier; 0 for its default.
    pub pim: u32,
    /// Whether the hidden volume is meant.
    pub hidden: bool,
    /// Whether it is a system partition.
    pub system: bool,
    /// How long the secret and the derivation of the key may take together, without the time until [`BEGIN`].
    pub timeout: Duration,
}

/// The message after which a volume whose inputs were read is opened.
pub const BEGIN: &str = "begin";

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Request {
    /// Opens a volume.
    Open(Box<OpenRequest>),
    /// Closes the mapping with this name.
    Close(String),
    /// Sets when the mapping with this name is closed.
    Keep(String, Keep),
}

/// When a mapping is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keep {
    /// With its last user.
    UntilLastClose,
    /// On request only.
    UntilClosed,
}

impl Keep {
    /// Its text in a message.
    #[must_use]
    pub fn encode(self) -> &'static str {
        match self {
            Self::UntilLastClose => "until-last-close",
            Self::UntilClosed => "until-closed",
        }
    }

    /// Reads the text of a message.
    #[must_use]
    pub fn decode(text: &str) -> Option<Self> {
        [Self::UntilLastClose, Self::UntilClosed].into_iter().find(|keep| keep.encode() == text)
    }
}

impl Request {
    /// The text of the message: the operation, then a line for each value.
    #[must_use]
    pub fn encode(&self) -> String {
        match self {
            Self::Open(open) => open.encode(),
            Self::Close(name) => format!("close\nname={name}"),
            Self::Keep(name, keep) => format!("keep\nname={name}\nkeep={}", keep.encode()),
        }
    }

    /// Reads the text of a message.
    #[must_use]
    pub fn decode(text: &str) -> Option<Self> {
        let mut lines = text.lines();
        let operation = lines.next()?;
        let mut values = Values(lines.map(|line| line.split_once('=')).collect::<Option<_>>()?);
        let request = match operation {
            "open" => Self::Open(Box::new(OpenRequest::decode(&mut values)?)),
            "close" => Self::Close(values.take("name")?),
            "keep" => Self::Keep(values.take("name")?, Keep::decode(values.0.remove("keep")?)?),
            _ => return None,
        };
        values.0.is_empty().then_some(request)
    }
}

/// The values of a message.
struct Values<'a>(HashMap<&'a str, &'a str>);

impl Values<'_> {
    fn take<T: FromStr>(&mut self, name: &str) -> Option<T> {
        self.0.remove(name)?.parse().ok()
    }
}

impl OpenRequest {
    fn encode(&self) -> String {
        let mut text = "open".to_owned();
        let mut add = |name: &str, value: &dyn std::fmt::Display| {
            let _written = write!(text, "\n{name}={value}");
        };
        add("device", &self.device);
        add("name", &self.name);
        add("type", &self.kind.as_str());
        add("read-only", &self.read_only);
        add("discard", &self.discard);
        add("has-header", &self.has_header);
        add("key-size", &self.key_size);
        add("key-offset", &self.key_offset);
        add("pim", &self.pim);
        add("hidden", &self.hidden);
        add("system", &self.system);
        add("timeout", &self.timeout.as_millis());
        text
    }

    fn decode(values: &mut Values<'_>) -> Option<Self> {
        Some(Self {
            device: values.take("device")?,
            name: values.take("name")?,
            kind: values.take("type")?,
            read_only: values.take("read-only")?,
            discard: values.take("discard")?,
            has_header: values.take("has-header")?,
            key_size: values.take("key-size")?,
            key_offset: values.take("key-offset")?,
            pim: values.take("pim")?,
            hidden: values.take("hidden")?,
            system: values.take("system")?,
            timeout: Duration::from_millis(values.take("timeout")?),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tests::request;

    #[test]
    fn requests_are_read_as_they_were_written() {
        let open = OpenRequest {
            kind: EncryptionType::VeraCrypt,
            read_only: true,
            has_header: true,
            key_size: 7,
            pim: 485,
            system: true,
            ..request()
        };
        let name = || "loopd-11p1".to_owned();
        for request in [
            Request::Open(Box::new(open)),
            Request::Close(name()),
            Request::Keep(name(), Keep::UntilLastClose),
            Request::Keep(name(), Keep::UntilClosed),
        ] {
            assert_eq!(Request::decode(&request.encode()), Some(request));
        }
    }

    #[test]
    fn messages_with_other_values_are_refused() {
        let complete = Request::Open(Box::new(request())).encode();
        for text in [
            "",
            "remove\nname=x",
            "close",
            "close\nname=x\nforce=true",
            "keep\nname=x\nkeep=always",
            &complete.replace("pim=0", "pim=-1"),
            &complete.replace("\nhidden=false", ""),
            &format!("{complete}\nloop"),
        ] {
            assert_eq!(Request::decode(text), None, "{text}");
        }
    }
}
