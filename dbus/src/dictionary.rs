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
        self.align(STRUCT);
        self.str(name);
        self.signature(V::SIGNATURE);
        value.write(self);
    }
}

/// A value in a dictionary.
pub(crate) trait Value {
    /// Its signature.
    const SIGNATURE: &'static str;

    fn write(&self, encoder: &mut Encoder);
}

impl Value for bool {
    const SIGNATURE: &'static str = "b";

    fn write(&self, encoder: &mut Encoder) {
        encoder.u32((*self).into());
    }
}

impl Value for u32 {
    const SIGNATURE: &'static str = "u";

    fn write(&self, encoder: &mut Encoder) {
        encoder.u32(*self);
    }
}

impl Value for u64 {
    const SIGNATURE: &'static str = "t";

    fn write(&self, encoder: &mut Encoder) {
        encoder.u64(*self);
    }
}

impl Value for String {
    const SIGNATURE: &'static str = "s";

    fn write(&self, encoder: &mut Encoder) {
        encoder.str(self);
    }
}

impl Value for OwnedObjectPath {
    const SIGNATURE: &'static str = "o";

    fn write(&self, encoder: &mut Encoder) {
        encoder.str(self.as_str());
    }
}

impl Value for Vec<u8> {
    const SIGNATURE: &'static str = "ay";

    fn write(&self, encoder: &mut Encoder) {
        encoder.byte_array(self);
    }
}

impl Value for Vec<Vec<u8>> {
    const SIGNATURE: &'static str = "aay";

    fn write(&self, encoder: &mut Encoder) {
        encoder.array(WORD, |elements| self.iter().for_each(|bytes| elements.byte_array(bytes)));
    }
}

impl Value for Warnings {
    const SIGNATURE: &'static str = "a(sa{sv})";

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
