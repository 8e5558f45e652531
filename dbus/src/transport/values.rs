//! Counts the values in a message, and measures its texts, before the library parses it.
//!
//! In memory each value of a variant takes more than a hundred bytes, even a byte of an array, and a text that is
//! escaped to be shown takes six times its length. So the length of a message alone does not bound its memory.

use zbus::wire::Endian;

/// How many values a message may have. A list of 7,000 attachments has about as many.
pub const MOST: usize = 1 << 20;
/// The longest string or array of bytes, in bytes: a path has at most 4 KiB (`PATH_MAX`).
pub const LONGEST_TEXT: usize = 64 << 10;
/// More than the nesting depth that the specification allows.
const DEEPEST: usize = 128;

/// Whether a body with this signature has more than [`MOST`] values, or a text longer than [`LONGEST_TEXT`]. `false`
/// for an invalid body, which the library rejects.
pub fn exceed_limits(signature: &str, body: &[u8], endian: Endian) -> bool {
    matches!(Walk::new(body, endian).all(signature), Err(End::OverLimit))
}

/// How many times a body with this signature refers to a descriptor of its message, up to its end or the first invalid
/// value. The library duplicates the descriptor for each, and a call of 64 KiB may have 16,000 of them.
pub fn handles(signature: &str, body: &[u8], endian: Endian) -> usize {
    let mut walk = Walk::new(body, endian);
    let _an_invalid_body_is_rejected_later = walk.all(signature);
    walk.handles
}

/// Why no value follows.
enum End {
    Unreadable,
    OverLimit,
}

struct Walk<'b> {
    body: &'b [u8],
    at: usize,
    left: usize,
    handles: usize,
    endian: Endian,
}

impl<'b> Walk<'b> {
    fn new(body: &'b [u8], endian: Endian) -> Self {
        Self { body, at: 0, left: MOST, handles: 0, endian }
    }

    /// Skips the values of all types.
    fn all(&mut self, signature: &str) -> Result<(), End> {
        let mut rest = signature.as_bytes();
        while !rest.is_empty() {
            rest = self.value(rest, 0)?;
        }
        Ok(())
    }

    /// Skips a value of the first type; returns the types after it.
    fn value<'s>(&mut self, signature: &'s [u8], depth: usize) -> Result<&'s [u8], End>
    where
        'b: 's,
    {
        self.count(1)?;
        let (&first, rest) = signature.split_first().ok_or(End::Unreadable)?;
        if depth > DEEPEST {
            return Err(End::Unreadable);
        }
        match first {
            b'a' => return self.array(rest, depth),
            b'(' | b'{' => return self.fields(rest, depth),
            b'v' => self.variant(depth)?,
            b's' | b'o' => {
                let length = self.number()?;
                self.skip(length.saturating_add(1))?;
                measure(length)?;
            }
            b'g' => {
                self.signature()?;
            }
            _ => {
                let size = fixed_size(first).ok_or(End::Unreadable)?;
                self.align(size);
                self.skip(size)?;
                self.count_handles(first, 1);
            }
        }
        Ok(rest)
    }

    fn array<'s>(&mut self, element: &'s [u8], depth: usize) -> Result<&'s [u8], End>
    where
        'b: 's,
    {
        let length = self.number()?;
        let (&first, after_first) = element.split_first().ok_or(End::Unreadable)?;
        if let Some(size) = fixed_size(first) {
            self.align(size);
            self.skip(length)?;
            self.count(length / size)?;
            self.count_handles(first, length / size);
            if first == b'y' {
                measure(length)?;
            }
            return Ok(after_first);
        }
        if matches!(first, b'(' | b'{') {
            self.align(8);
        }
        let end = self.at.saturating_add(length);
        while self.at < end {
            self.value(element, depth + 1)?;
        }
        after(element)
    }

    fn fields<'s>(&mut self, mut types: &'s [u8], depth: usize) -> Result<&'s [u8], End>
    where
        'b: 's,
    {
        self.align(8);
        loop {
            match types.split_first() {
                Some((b')' | b'}', rest)) => return Ok(rest),
                Some(_) => types = self.value(types, depth + 1)?,
                None => return Err(End::Unreadable),
            }
        }
    }

    fn variant(&mut self, depth: usize) -> Result<(), End> {
        let signature = self.signature()?;
        self.value(signature, depth + 1).map(drop)
    }

    fn signature(&mut self) -> Result<&'b [u8], End> {
        let length = usize::from(*self.body.get(self.at).ok_or(End::Unreadable)?);
        let text = self.at + 1..self.at + 1 + length;
        self.skip(length + 2)?;
        self.body.get(text).ok_or(End::Unreadable)
    }

    fn number(&mut self) -> Result<usize, End> {
        self.align(4);
        let bytes = self.body.get(self.at..self.at.saturating_add(4)).ok_or(End::Unreadable)?;
        self.at += 4;
        usize::try_from(self.endian.read_u32(bytes)).map_err(|_| End::Unreadable)
    }

    fn align(&mut self, to: usize) {
        self.at = self.at.next_multiple_of(to);
    }

    fn skip(&mut self, length: usize) -> Result<(), End> {
        self.at = self.at.checked_add(length).filter(|at| *at <= self.body.len()).ok_or(End::Unreadable)?;
        Ok(())
    }

    fn count_handles(&mut self, kind: u8, values: usize) {
        if kind == b'h' {
            self.handles = self.handles.saturating_add(values);
        }
    }

    fn count(&mut self, values: usize) -> Result<(), End> {
        self.left = self.left.checked_sub(values).ok_or(End::OverLimit)?;
        Ok(())
    }
}

/// Checks the length of a text.
fn measure(length: usize) -> Result<(), End> {
    if length > LONGEST_TEXT { Err(End::OverLimit) } else { Ok(()) }
}

fn fixed_size(kind: u8) -> Option<usize> {
    match kind {
        b'y' => Some(1),
        b'n' | b'q' => Some(2),
        b'b' | b'i' | b'u' | b'h' => Some(4),
        b'x' | b't' | b'd' => Some(8),
        _ => None,
    }
}

/// The types after the first one.
fn after(signature: &[u8]) -> Result<&[u8], End> {
    let mut depth = 0_usize;
    for (index, kind) in signature.iter().enumerate() {
        match kind {
            b'a' => continue,
            b'(' | b'{' => depth += 1,
            b')' | b'}' => depth = depth.checked_sub(1).ok_or(End::Unreadable)?,
            _ => {}
        }
        if depth == 0 {
            return Ok(&signature[index + 1..]);
        }
    }
    Err(End::Unreadable)
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use zbus::{Message, Variant};

    use super::*;

    fn judge<B: serde::Serialize + zbus::wire::DynamicType>(body: &B) -> bool {
        let message = Message::signal("/", "a.b", "C").build(body).unwrap();
        let body = message.body();
        exceed_limits(&body.signature().to_string_no_parens(), body.data().bytes(), Endian::native())
    }

    #[test]
    fn replies_of_the_daemon_are_accepted() {
        let property = |name: &str| (name.to_owned(), Variant::from(vec![b'x'; 100]));
        let properties: HashMap<_, _> = (0..30).map(|number| property(&number.to_string())).collect();
        assert!(!judge(&vec![("/org/loopd1", properties.clone(), 7_u64, true); 300]));
        assert!(judge(&vec![("/org/loopd1", properties, 7_u64, true); 400]));
    }

    #[test]
    fn each_element_counts() {
        assert!(!judge(&vec![0_u16; MOST - 1]));
        assert!(judge(&vec![0_u16; MOST]));
        assert!(judge(&Variant::from(vec![7_u64; MOST])));
        assert!(judge(&vec![""; MOST]));
    }

    #[test]
    fn handles_are_counted_wherever_they_are() {
        let count = |signature: &str, body: &[u8]| handles(signature, body, Endian::Little);
        assert_eq!(count("h", &[0; 4]), 1);
        assert_eq!(count("hu", &[0; 8]), 1);
        assert_eq!(count("u", &[0; 4]), 0);
        assert_eq!(count("ah", &[8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 2);
        assert_eq!(count("v", &[1, b'h', 0, 0, 0, 0, 0, 0]), 1);
        assert_eq!(count("v", &[2, b'a', b'h', 0, 8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 2);
        assert_eq!(count("h(uh)", &[0; 16]), 2);
        assert_eq!(count("hs", &[0, 0, 0, 0, 255, 255, 0, 0]), 1, "up to the first invalid value");
    }

    #[test]
    fn texts_have_a_limit() {
        let (longest, longer) = ("x".repeat(LONGEST_TEXT), "x".repeat(LONGEST_TEXT + 1));
        assert!(!judge(&longest) && !judge(&longest.as_bytes()) && !judge(&vec![&longest; 3]));
        assert!(judge(&longer) && judge(&longer.as_bytes()) && judge(&Variant::from(longer.as_str())));
    }

    #[test]
    fn an_invalid_body_is_left_to_the_library() {
        for signature in ["", "a", "(", "a(", "{", "a{sv", ")", "z", "s", "v", "ay", "a(oa{sv})"] {
            for body in
                [&[][..], &[0xff; 64], &[1; 64], &[0, 0, 0, 0, 0], &[8, 0, 0, 0, 1, b'v', 0, 1, b'v', 0]]
            {
                assert!(!exceed_limits(signature, body, Endian::Little), "{signature} {body:?}");
            }
        }
        // An array of empty elements would never end.
        assert!(exceed_limits("a()", &[255, 0, 0, 0, 0, 0, 0, 0], Endian::Little));
        let endless = [1, b'v', 0].repeat(1000);
        assert!(!exceed_limits("v", &endless, Endian::Little));
    }
}
