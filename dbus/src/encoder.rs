//! The D-Bus encoding of an array, written at once: zbus's serializer parses the signature of each variant, and writes each
//! value in several steps, which takes ten times the instructions.

use std::marker::PhantomData;

use serde::ser::{Serialize, SerializeSeq as _, Serializer};
use zbus::Type;
use zbus::wire::{Endian, Signature};

/// The alignment in bytes of a struct, and of an entry of a dictionary.
pub const STRUCT: usize = 8;
/// The alignment in bytes of a string, an array, or a number of 32 bits.
pub(crate) const WORD: usize = 4;

/// Writes values in the D-Bus encoding, from a position on that is aligned to eight bytes.
#[derive(Debug)]
pub struct Encoder {
    bytes: Vec<u8>,
    endian: Endian,
}

impl Encoder {
    fn put<const N: usize>(&mut self, little: [u8; N]) {
        let mut bytes = little;
        if self.endian == Endian::Big {
            bytes.reverse();
        }
        self.align(N);
        self.bytes.extend_from_slice(&bytes);
    }

    /// Adds zeros up to a multiple of this number of bytes, at most eight, as before each struct.
    pub fn align(&mut self, alignment: usize) {
        let missing = self.bytes.len().next_multiple_of(alignment) - self.bytes.len();
        if missing > 0 {
            self.bytes.extend_from_slice(&[0; STRUCT][..missing]);
        }
    }

    pub(crate) fn u32(&mut self, value: u32) {
        self.put(value.to_le_bytes());
    }

    pub(crate) fn u64(&mut self, value: u64) {
        self.put(value.to_le_bytes());
    }

    /// A string or an object path.
    pub fn str(&mut self, text: &str) {
        self.byte_array(text.as_bytes());
        self.bytes.push(0);
    }

    /// An array of bytes.
    pub(crate) fn byte_array(&mut self, bytes: &[u8]) {
        self.u32(length(bytes.len()));
        self.bytes.extend_from_slice(bytes);
    }

    /// The name of an entry in a dictionary, and `head`: the end of the name, and the signature of its value.
    pub(crate) fn name(&mut self, name: &str, head: &'static [u8]) {
        self.align(STRUCT);
        self.byte_array(name.as_bytes());
        self.bytes.extend_from_slice(head);
    }

    /// An array of elements with this alignment.
    pub fn array(&mut self, alignment: usize, elements: impl FnOnce(&mut Self)) {
        self.u32(0);
        let end_of_length = self.bytes.len();
        self.align(alignment);
        let start = self.bytes.len();
        elements(self);
        let mut bytes = length(self.bytes.len() - start).to_le_bytes();
        if self.endian == Endian::Big {
            bytes.reverse();
        }
        self.bytes[end_of_length - bytes.len()..end_of_length].copy_from_slice(&bytes);
    }
}

/// The length of an array. The bus takes no message that is longer than this number allows.
fn length(bytes: usize) -> u32 {
    u32::try_from(bytes).unwrap_or(u32::MAX)
}

/// An array of structs, or a dictionary, of the type `T`, whose elements are encoded already.
#[derive(Debug)]
pub struct Encoded<T> {
    encoder: Encoder,
    of_type: PhantomData<fn() -> T>,
}

impl<T> Encoded<T> {
    /// Encodes the elements. The byte order is that of the message: for a reply, that of the call.
    pub fn new(endian: Endian, elements: impl FnOnce(&mut Encoder)) -> Self {
        let mut encoder = Encoder { bytes: Vec::new(), endian };
        elements(&mut encoder);
        Self { encoder, of_type: PhantomData }
    }
}

impl<T> Serialize for Encoded<T> {
    /// The elements, eight bytes at a time: zbus writes numbers in an array whatever its signature, and the array begins at
    /// a multiple of eight bytes, as its elements are aligned.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Encoder { bytes, endian } = &self.encoder;
        let mut array = serializer.serialize_seq(None)?;
        let (chunks, rest) = bytes.as_chunks();
        for chunk in chunks {
            array.serialize_element(&match endian {
                Endian::Little => u64::from_le_bytes(*chunk),
                Endian::Big => u64::from_be_bytes(*chunk),
            })?;
        }
        for byte in rest {
            array.serialize_element(byte)?;
        }
        array.end()
    }
}

impl<T: Type> Type for Encoded<T> {
    const SIGNATURE: &'static Signature = T::SIGNATURE;
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use zbus::wire::serialized::Context;
    use zbus::wire::to_bytes;

    use super::*;

    type Dictionary = BTreeMap<String, (u32, u64, Vec<Vec<u8>>)>;

    fn encode(dictionary: &Dictionary, encoder: &mut Encoder) {
        for (name, (small, large, lists)) in dictionary {
            encoder.align(STRUCT);
            encoder.str(name);
            encoder.align(STRUCT);
            encoder.u32(*small);
            encoder.u64(*large);
            encoder.array(WORD, |encoder| lists.iter().for_each(|list| encoder.byte_array(list)));
        }
    }

    /// At each alignment of the array, and with each number of bytes in the last chunk.
    #[test]
    fn the_encoding_is_that_of_the_library() {
        for endian in [Endian::Little, Endian::Big] {
            for length in 0..9 {
                let text = "x".repeat(length);
                let lists = vec![Vec::new(), vec![7; length]];
                let value = (1, 1 << 40, lists);
                let dictionary =
                    Dictionary::from([(text.clone(), value.clone()), ("second".to_owned(), value)]);
                let encoded = Encoded::<Dictionary>::new(endian, |encoder| encode(&dictionary, encoder));
                let context = Context::new(endian, 0);
                let expected = to_bytes(context, &(&text, &dictionary, 5_u8)).unwrap();
                let bytes = to_bytes(context, &(&text, &encoded, 5_u8)).unwrap();
                assert_eq!(bytes.bytes(), expected.bytes(), "{endian:?}, {length}");
            }
        }
    }

    #[test]
    fn no_elements_are_an_empty_array() {
        let context = Context::new(Endian::Little, 0);
        let encoded = Encoded::<Dictionary>::new(Endian::Little, |_| {});
        let expected = to_bytes(context, &Dictionary::new()).unwrap();
        assert_eq!(to_bytes(context, &encoded).unwrap().bytes(), expected.bytes());
    }
}
