//! The header of a message, parsed before the library receives the message.
//!
//! This parses only what the checks of [`super::reader`] need: lengths, kind, sender, serial and member.
//! It is lenient: it skips fields that it cannot parse, and the library then rejects the message.

use std::ops::Range;

use zbus::wire::Endian;
use zbus::wire::serialized::{Context, Data};
use zbus::{Message, Variant};

/// The size of the fixed part, which ends with the length of the fields.
pub const FIXED: usize = 16;
/// The protocol's limit.
pub const LONGEST_MESSAGE: usize = 128 << 20;
const NO_REPLY_EXPECTED: u8 = 1;

/// The type of a message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A method call.
    Call,
    /// A reply of a method.
    Return,
    /// An error of a method.
    Error,
    /// A signal.
    Signal,
    /// A type that the specification does not define: to be ignored.
    Unknown,
}

impl Kind {
    /// Whether it answers a call.
    pub fn is_reply(self) -> bool {
        matches!(self, Self::Return | Self::Error)
    }
}

/// The lengths in a header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lengths {
    /// The header with the padding before the body.
    pub header: usize,
    /// The whole message.
    pub message: usize,
}

impl Lengths {
    /// Parses the fixed part. `None` if it is invalid; then the next message cannot be found either.
    pub fn read(fixed: &[u8; FIXED]) -> Option<Self> {
        let endian = endian(fixed[0])?;
        let number = |at: usize| usize::try_from(endian.read_u32(&fixed[at..])).ok();
        let header = align(FIXED.checked_add(number(12)?)?);
        let message = header.checked_add(number(4)?)?;
        (message <= LONGEST_MESSAGE).then_some(Self { header, message })
    }
}

/// The fields that the checks need.
#[derive(Debug)]
pub struct Head<'m> {
    /// The type.
    pub kind: Kind,
    /// The sender's number for it.
    pub serial: u32,
    /// The sender, as set by the bus.
    pub sender: Option<&'m str>,
    /// The destination; `None` for a broadcast.
    pub destination: Option<&'m str>,
    /// The interface.
    pub interface: Option<&'m str>,
    /// The method or signal.
    pub member: Option<&'m str>,
    /// The call that it answers.
    pub reply_serial: Option<u32>,
    /// The signature of its body.
    pub signature: Option<&'m str>,
    /// The number of its descriptors.
    pub descriptors: u32,
    /// Whether the sender expects a reply.
    pub wants_reply: bool,
    has_unknown_fields: bool,
}

impl<'m> Head<'m> {
    /// Parses a header, or the start of one. The fixed part must be complete.
    pub fn read(header: &'m [u8]) -> Self {
        let mut head = Self {
            kind: match header[1] {
                1 => Kind::Call,
                2 => Kind::Return,
                3 => Kind::Error,
                4 => Kind::Signal,
                _ => Kind::Unknown,
            },
            serial: endian(header[0]).map_or(0, |endian| endian.read_u32(&header[8..])),
            sender: None,
            destination: None,
            interface: None,
            member: None,
            reply_serial: None,
            signature: None,
            descriptors: 0,
            wants_reply: header[2] & NO_REPLY_EXPECTED == 0,
            has_unknown_fields: false,
        };
        for field in Fields::new(header) {
            match (field.code, field.value) {
                (2, Value::Text(name)) => head.interface = Some(name),
                (3, Value::Text(name)) => head.member = Some(name),
                (5, Value::Number(serial)) => head.reply_serial = Some(serial),
                (6, Value::Text(name)) => head.destination = Some(name),
                (7, Value::Text(name)) => head.sender = Some(name),
                (8, Value::Signature(types)) => head.signature = Some(types),
                (9, Value::Number(count)) => head.descriptors = count,
                (code, _) => head.has_unknown_fields |= is_unknown(code),
            }
        }
        head
    }
}

/// Rewrites a complete message so that the library can parse it: without the fields that the specification
/// says to ignore, and with a reply expected. [`super::writer`] drops a reply that the sender does not expect.
pub fn normalize(message: Vec<u8>, head: &Parts) -> Vec<u8> {
    let mut message = if head.has_unknown_fields { without_unknown_fields(&message) } else { message };
    if head.kind == Kind::Call {
        message[2] &= !NO_REPLY_EXPECTED;
    }
    message
}

/// The owned fields of a [`Head`].
#[derive(Clone, Debug)]
pub struct Parts {
    /// The type.
    pub kind: Kind,
    /// The sender's number for it.
    pub serial: u32,
    /// The sender.
    pub sender: Option<String>,
    /// The call that it answers.
    pub reply_serial: Option<u32>,
    /// Whether the sender expects a reply.
    pub wants_reply: bool,
    has_unknown_fields: bool,
}

impl From<&Head<'_>> for Parts {
    fn from(head: &Head<'_>) -> Self {
        Self {
            kind: head.kind,
            serial: head.serial,
            sender: head.sender.map(str::to_owned),
            reply_serial: head.reply_serial,
            wants_reply: head.wants_reply,
            has_unknown_fields: head.has_unknown_fields,
        }
    }
}

fn without_unknown_fields(message: &[u8]) -> Vec<u8> {
    let Some(endian) = endian(message[0]) else { return message.to_vec() };
    let fields_length = endian.read_u32(&message[12..]) as usize;
    let mut kept = message[..FIXED].to_vec();
    for field in Fields::new(message).filter(|field| !is_unknown(field.code)) {
        kept.resize(align(kept.len()), 0);
        kept.extend_from_slice(&message[field.bytes]);
    }
    let length = u32::try_from(kept.len() - FIXED).unwrap_or(u32::MAX);
    endian.write_u32(&mut kept[12..], length);
    kept.resize(align(kept.len()), 0);
    kept.extend_from_slice(message.get(align(FIXED + fields_length)..).unwrap_or_default());
    kept
}

/// Zero does not count as unknown: the specification calls a message with that field invalid.
fn is_unknown(code: u8) -> bool {
    code > 9
}

enum Value<'m> {
    Text(&'m str),
    Signature(&'m str),
    Number(u32),
    Other,
}

struct Field<'m> {
    code: u8,
    value: Value<'m>,
    /// Its position, which starts at a multiple of eight.
    bytes: Range<usize>,
}

/// The fields of a header, up to the first that cannot be parsed.
struct Fields<'m> {
    header: &'m [u8],
    endian: Endian,
    position: usize,
}

impl<'m> Fields<'m> {
    fn new(message: &'m [u8]) -> Self {
        let endian = endian(message[0]).unwrap_or(Endian::Little);
        let length = usize::try_from(endian.read_u32(&message[12..])).unwrap_or(usize::MAX);
        let end = FIXED.saturating_add(length).min(message.len());
        Self { header: &message[..end], endian, position: FIXED }
    }

    fn field(&self, start: usize) -> Option<Field<'m>> {
        let code = *self.header.get(start)?;
        // All known fields have a signature of one type, so their value starts at a multiple of four.
        let value = start + 4;
        let (end, found) = match self.header.get(start + 1..value)? {
            [1, b's' | b'o', 0] => {
                let length = self.number(value)? as usize;
                let text = value + 4..(value + 4).checked_add(length)?;
                let found = std::str::from_utf8(self.header.get(text.clone())?).ok()?;
                (text.end + 1, Value::Text(found))
            }
            [1, b'g', 0] => {
                let text = value + 1..value + 1 + usize::from(*self.header.get(value)?);
                let found = std::str::from_utf8(self.header.get(text.clone())?).ok()?;
                (text.end + 1, Value::Signature(found))
            }
            [1, b'u', 0] => (value + 4, Value::Number(self.number(value)?)),
            _ => (start + 1 + self.variant(start + 1)?, Value::Other),
        };
        (end <= self.header.len()).then_some(Field { code, value: found, bytes: start..end })
    }

    fn number(&self, at: usize) -> Option<u32> {
        Some(self.endian.read_u32(self.header.get(at..at + 4)?))
    }

    /// The length of a variant of any type.
    fn variant(&self, at: usize) -> Option<usize> {
        let data = Data::new(self.header.get(at..)?, Context::new(self.endian, at));
        data.deserialize::<Variant<'_>>().ok().map(|(_, length)| length)
    }
}

impl<'m> Iterator for Fields<'m> {
    type Item = Field<'m>;

    fn next(&mut self) -> Option<Field<'m>> {
        let field = self.field(align(self.position))?;
        self.position = field.bytes.end;
        Some(field)
    }
}

/// Serializes an error reply to a call. Nobody replies to an error, so its serial is not used.
pub fn error(reply_serial: u32, destination: Option<&str>, name: &str, text: &str) -> Vec<u8> {
    fn put_text(message: &mut Vec<u8>, text: &str) {
        message.extend(u32::try_from(text.len()).unwrap_or(u32::MAX).to_le_bytes());
        message.extend(text.as_bytes());
        message.push(0);
    }
    fn put_field(message: &mut Vec<u8>, code: u8, kind: u8) {
        message.resize(align(message.len()), 0);
        message.extend([code, 1, kind, 0]);
    }
    let mut body = Vec::new();
    put_text(&mut body, text);
    let mut message = vec![b'l', 3, NO_REPLY_EXPECTED, 1];
    message.extend(u32::try_from(body.len()).unwrap_or(u32::MAX).to_le_bytes());
    message.extend(u32::MAX.to_le_bytes());
    message.extend([0; 4]);
    put_field(&mut message, 5, b'u');
    message.extend(reply_serial.to_le_bytes());
    put_field(&mut message, 4, b's');
    put_text(&mut message, name);
    if let Some(destination) = destination {
        put_field(&mut message, 6, b's');
        put_text(&mut message, destination);
    }
    put_field(&mut message, 8, b'g');
    message.extend([1, b's', 0]);
    let fields = u32::try_from(message.len() - FIXED).unwrap_or(u32::MAX);
    message[12..FIXED].copy_from_slice(&fields.to_le_bytes());
    message.resize(align(message.len()), 0);
    message.extend(body);
    message
}

/// The byte order of a message.
pub fn endian(byte: u8) -> Option<Endian> {
    match byte {
        b'l' => Some(Endian::Little),
        b'B' => Some(Endian::Big),
        _ => None,
    }
}

fn align(length: usize) -> usize {
    length.saturating_add(7) & !7
}

/// The call that a message replies to: its sender and serial.
pub fn answered(message: &Message) -> Option<(String, u32)> {
    let header = message.header();
    Some((header.destination()?.to_string(), header.reply_serial()?.get()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(message: &Message) -> Vec<u8> {
        message.data().bytes().to_vec()
    }

    fn call() -> Message {
        Message::method_call("/org/loopd1", "List")
            .sender(":1.7")
            .destination("org.loopd1")
            .interface("org.loopd1.Manager")
            .build(&("a body",))
            .unwrap()
    }

    #[test]
    fn a_header_is_parsed() {
        let message = bytes(&call());
        let head = Head::read(&message);
        assert_eq!((head.kind, head.sender, head.member), (Kind::Call, Some(":1.7"), Some("List")));
        assert_eq!(head.interface, Some("org.loopd1.Manager"));
        assert_eq!(head.signature, Some("s"));
        assert!(head.wants_reply && !head.has_unknown_fields);
        let fixed = message[..FIXED].try_into().unwrap();
        assert_eq!(Lengths::read(fixed).unwrap().message, message.len());
    }

    #[test]
    fn a_truncated_header_is_parsed_up_to_its_end() {
        let message = bytes(&call());
        for length in FIXED..message.len() {
            let _ = Head::read(&message[..length]);
        }
    }

    #[test]
    fn lengths_beyond_the_limits_of_the_protocol_are_rejected() {
        let mut fixed = [0; FIXED];
        fixed[0] = b'l';
        assert_eq!(Lengths::read(&fixed), Some(Lengths { header: 16, message: 16 }));
        for at in [4, 12] {
            let mut long = fixed;
            long[at..at + 4].copy_from_slice(&u32::MAX.to_le_bytes());
            assert_eq!(Lengths::read(&long), None);
        }
        fixed[0] = b'x';
        assert_eq!(Lengths::read(&fixed), None);
    }

    /// A message with one more field, of this type and value, before its own.
    fn with_field(message: &[u8], variant: &[u8]) -> Vec<u8> {
        let length = u32::from_le_bytes(message[12..16].try_into().unwrap()) as usize;
        let mut field = vec![77];
        field.extend(variant);
        field.resize(align(field.len()), 0);
        let mut longer = message[..FIXED].to_vec();
        longer[12..16].copy_from_slice(&u32::try_from(length + field.len()).unwrap().to_le_bytes());
        longer.extend(field);
        longer.extend(&message[FIXED..]);
        longer
    }

    #[test]
    fn unknown_fields_are_removed() {
        let message = bytes(&call());
        for variant in [
            &[1, b's', 0, 2, 0, 0, 0, b'a', b'b', 0][..],
            &[1, b'y', 0, 9],
            &[2, b'a', b'u', 0, 0, 0, 0, 4, 0, 0, 0, 1, 2, 3, 4],
            &[1, b'v', 0, 1, b'y', 0, 7],
        ] {
            let longer = with_field(&message, variant);
            let head = Head::read(&longer);
            assert!(head.has_unknown_fields, "{variant:?}");
            assert_eq!(head.member, Some("List"));
            let parts = Parts::from(&head);
            assert_eq!(normalize(longer, &parts), message, "{variant:?}");
        }
    }
}
