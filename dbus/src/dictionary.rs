//! Structs that are sent as a dictionary of variants (`a{sv}`). Their fields are written directly: a map of
//! [`Variant`](enum@zbus::Variant)s takes an allocation for each value, and an element for each byte of a path;
//! zbus's `SerializeDict` writes each byte by itself, and cannot join two structs.

use std::collections::HashMap;

use serde::ser::{Serialize, SerializeMap, Serializer};
use zbus::wire::{OwnedObjectPath, Signature};
use zbus::{Type, Variant, as_variant};

use crate::warnings::Warnings;

/// The signature of a dictionary.
pub(crate) const SIGNATURE: &Signature = <HashMap<&str, Variant<'_>> as Type>::SIGNATURE;

/// A struct that is sent as a dictionary.
pub trait Dictionary {
    /// The names of its entries.
    const NAMES: &'static [&'static str];

    /// Writes its entries, without those with a name in `omitted`.
    ///
    /// # Errors
    /// Those of the serializer.
    fn write<M: SerializeMap>(&self, omitted: &[&str], map: &mut M) -> Result<(), M::Error>;
}

/// The entries of two structs as one dictionary. A name that both have is sent once, with the value of the first.
#[derive(Clone, Debug)]
pub struct Joined<A, B>(pub A, pub B);

impl<A: Dictionary, B: Dictionary> Serialize for Joined<A, B> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        self.0.write(&[], &mut map)?;
        self.1.write(A::NAMES, &mut map)?;
        map.end()
    }
}

impl<A, B> Type for Joined<A, B> {
    const SIGNATURE: &'static Signature = SIGNATURE;
}

pub(crate) fn serialize<S: Serializer>(
    dictionary: &impl Dictionary,
    serializer: S,
) -> Result<S::Ok, S::Error> {
    let mut map = serializer.serialize_map(None)?;
    dictionary.write(&[], &mut map)?;
    map.end()
}

/// A value in a dictionary.
pub(crate) trait Value {
    fn write<M: SerializeMap>(&self, name: &'static str, map: &mut M) -> Result<(), M::Error>;
}

macro_rules! values {
    ($($type:ty),*) => {$(
        impl Value for $type {
            fn write<M: SerializeMap>(&self, name: &'static str, map: &mut M) -> Result<(), M::Error> {
                map.serialize_entry(name, &as_variant::Serialize(self))
            }
        }
    )*};
}

values!(bool, u32, u64, String, OwnedObjectPath);

impl Value for Vec<u8> {
    fn write<M: SerializeMap>(&self, name: &'static str, map: &mut M) -> Result<(), M::Error> {
        map.serialize_entry(name, &as_variant::Serialize(&Bytes(self)))
    }
}

impl Value for Vec<Vec<u8>> {
    fn write<M: SerializeMap>(&self, name: &'static str, map: &mut M) -> Result<(), M::Error> {
        let all: Vec<Bytes<'_>> = self.iter().map(|bytes| Bytes(bytes)).collect();
        map.serialize_entry(name, &as_variant::Serialize(&all))
    }
}

impl Value for Warnings {
    fn write<M: SerializeMap>(&self, name: &'static str, map: &mut M) -> Result<(), M::Error> {
        map.serialize_entry(name, &as_variant::Serialize(&self.to_value()))
    }
}

/// Bytes, written at once.
struct Bytes<'a>(&'a [u8]);

impl Type for Bytes<'_> {
    const SIGNATURE: &'static Signature = <[u8] as Type>::SIGNATURE;
}

impl Serialize for Bytes<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(self.0)
    }
}
