//! Structs that are sent as a dictionary of variants (`a{sv}`).

use std::collections::HashMap;

use zbus::Variant;
use zbus::wire::OwnedObjectPath;

use crate::encoder::{Encoder, STRUCT, WORD};
use crate::warnings::{Warning, Warnings};

/// The type of a dictionary on the bus.
pub type Sent = HashMap<&'static str, Variant<'static>>;

/// A struct that is sent as a dictionary.
pub trait Dictionary {
    /// The names of its entries.
    const NAMES: &'static [&'static str];

    /// Writes its entries, without those with a name in `omitted`.
    fn write(&self, omitted: &[&str], encoder: &mut Encoder);
}

impl Encoder {
    /// A dictionary.
    pub fn dictionary(&mut self, dictionary: &impl Dictionary) {
        self.array(STRUCT, |entries| dictionary.write(&[], entries));
    }

    /// The entries of two structs as one dictionary. A name that both have is sent once, with the value of the first.
    pub fn joined<A: Dictionary>(&mut self, first: &A, second: &impl Dictionary) {
        self.array(STRUCT, |entries| {
            first.write(&[], entries);
            second.write(A::NAMES, entries);
        });
    }

    /// An entry of a dictionary.
    pub(crate) fn entry<V: Value>(&mut self, name: &str, value: &V) {
        self.name(name, V::HEAD);
        value.write(self);
    }
}

/// A value in a dictionary.
pub(crate) trait Value {
    /// What is between the name and the value: a zero, and the signature of a variant, which is the length, the text and a
    /// zero.
    const HEAD: &'static [u8];

    fn write(&self, encoder: &mut Encoder);
}

impl Value for bool {
    const HEAD: &'static [u8] = b"\0\x01b\0";

    fn write(&self, encoder: &mut Encoder) {
        encoder.u32((*self).into());
    }
}

impl Value for u32 {
    const HEAD: &'static [u8] = b"\0\x01u\0";

    fn write(&self, encoder: &mut Encoder) {
        encoder.u32(*self);
    }
}

impl Value for u64 {
    const HEAD: &'static [u8] = b"\0\x01t\0";

    fn write(&self, encoder: &mut Encoder) {
        encoder.u64(*self);
    }
}

impl Value for String {
    const HEAD: &'static [u8] = b"\0\x01s\0";

    fn write(&self, encoder: &mut Encoder) {
        encoder.str(self);
    }
}

impl Value for OwnedObjectPath {
    const HEAD: &'static [u8] = b"\0\x01o\0";

    fn write(&self, encoder: &mut Encoder) {
        encoder.str(self.as_str());
    }
}

impl Value for Vec<u8> {
    const HEAD: &'static [u8] = b"\0\x02ay\0";

    fn write(&self, encoder: &mut Encoder) {
        encoder.byte_array(self);
    }
}

impl Value for Vec<Vec<u8>> {
    const HEAD: &'static [u8] = b"\0\x03aay\0";

    fn write(&self, encoder: &mut Encoder) {
        encoder.array(WORD, |elements| self.iter().for_each(|bytes| elements.byte_array(bytes)));
    }
}

impl Value for Warnings {
    const HEAD: &'static [u8] = b"\0\x09a(sa{sv})\0";

    fn write(&self, encoder: &mut Encoder) {
        encoder.array(STRUCT, |elements| {
            for warning in &self.0 {
                elements.align(STRUCT);
                elements.str(&warning.code);
                elements.array(STRUCT, |details| write_details(warning, details));
            }
        });
    }
}

fn write_details(warning: &Warning, details: &mut Encoder) {
    let Warning { code: _, message, bytes, number, format } = warning;
    details.entry("message", message);
    bytes.iter().for_each(|bytes| details.entry("bytes", bytes));
    number.iter().for_each(|number| details.entry("number", number));
    format.iter().for_each(|format| details.entry("format", format));
}
