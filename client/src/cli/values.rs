//! Parsers of option values.

use clap::builder::{PossibleValuesParser, TypedValueParser};
use loopd_common::limits::{REFERENCE_LENGTH, is_block_size};
use loopd_dbus::{Lifetime, Overlap};

use crate::device_node::{decimal, loop_number};
use crate::show::size;

/// The values of --overlap.
pub fn overlap() -> impl TypedValueParser<Value = Overlap> {
    PossibleValuesParser::new(["allow", "refuse", "reuse"]).try_map(|name| name.parse::<Overlap>())
}

/// The values of --lifetime. `client` is valid on the bus only.
pub fn lifetime() -> impl TypedValueParser<Value = Lifetime> {
    let names = PossibleValuesParser::new([
        clap::builder::PossibleValue::new("persistent"),
        clap::builder::PossibleValue::new("mount"),
        clap::builder::PossibleValue::new("client").hide(true),
    ]);
    names.try_map(|name| match name.parse() {
        Ok(Lifetime::Client) => Err("the device would be detached when loopctl exits; \
             `loopctl run FILE -- COMMAND` keeps a device while a command runs"
            .to_owned()),
        other => other.map_err(|error| error.to_string()),
    })
}

/// Parses a block size, or 0.
///
/// # Errors
/// It is not a block size.
pub fn block_size(text: &str) -> Result<u32, String> {
    match size::parse_u32(text) {
        Ok(size) if size == 0 || is_block_size(size) => Ok(size),
        Ok(_) => Err("a block size is a power of two from 512 to 65536, or 0".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// Parses a block size.
///
/// # Errors
/// It is not a block size.
pub fn nonzero_block_size(text: &str) -> Result<u32, String> {
    match block_size(text)? {
        0 => Err("a block size is a power of two from 512 to 65536".to_owned()),
        size => Ok(size),
    }
}

/// Checks the length of a reference.
///
/// # Errors
/// It is too long.
pub fn reference(text: &str) -> Result<String, String> {
    match text.len() {
        0..=REFERENCE_LENGTH => Ok(text.to_owned()),
        bytes => Err(format!("it has {bytes} bytes; the maximum is {REFERENCE_LENGTH}")),
    }
}

/// Parses /dev/loop3, loop3 or 3.
///
/// # Errors
/// It is not a loop device.
pub fn device(text: &str) -> Result<u32, String> {
    let number = loop_number(text).or_else(|| decimal(text));
    number.ok_or_else(|| "name a loop device: /dev/loop3, loop3 or 3".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_a_node_or_a_name_or_a_number() {
        for name in ["/dev/loop3", "loop3", "3"] {
            assert_eq!(device(name), Ok(3), "{name}");
        }
        for name in ["", "loop", "sda", "/dev/loop3p1", "03", "-3", "loop03", "99999999999"] {
            assert!(device(name).is_err(), "{name}");
        }
    }
}
