//! Parses sizes such as 64M, and formats them.

/// An invalid size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// It does not start with a number.
    #[error(
        "it does not start with a whole number; give a number of bytes, or a number with a suffix such as 64M"
    )]
    NoNumber,
    /// The number has a fraction.
    #[error("fractions are not supported; use a smaller unit, such as 1536M for 1.5G")]
    Fraction,
    /// The suffix is unknown.
    #[error(
        "unknown unit {0:?}; K, M, G, T, P, E (or KiB, MiB, …) are powers of 1024, \
         KB, MB, GB, TB, PB, EB powers of 1000"
    )]
    Unit(String),
    /// The number does not fit.
    #[error("it is larger than the maximum of {} bytes", u64::MAX)]
    TooLarge,
}

const UNITS: &[u8] = b"KMGTPE";

/// Parses a size: plain bytes, K, M, G, T, P, E or KiB, MiB … (powers of 1024), KB, MB … (powers of
/// 1000). Upper and lower case are equivalent.
///
/// # Errors
/// It is not a size, or does not fit into 64 bits.
pub fn parse(text: &str) -> Result<u64, SizeError> {
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    if number.is_empty() {
        return Err(SizeError::NoNumber);
    }
    if suffix.starts_with(['.', ',']) {
        return Err(SizeError::Fraction);
    }
    let unit = unit(suffix)?;
    // Only digits, so the only possible error is an overflow.
    let number: u64 = number.parse().map_err(|_| SizeError::TooLarge)?;
    number.checked_mul(unit).ok_or(SizeError::TooLarge)
}

/// Parses a size that fits into 32 bits, such as a block size.
///
/// # Errors
/// As [`parse`].
pub fn parse_u32(text: &str) -> Result<u32, SizeError> {
    u32::try_from(parse(text)?).map_err(|_| SizeError::TooLarge)
}

fn unit(suffix: &str) -> Result<u64, SizeError> {
    let unknown = || SizeError::Unit(suffix.to_owned());
    let upper = suffix.to_ascii_uppercase();
    let (letter, base) = match upper.as_bytes() {
        [] | [b'B'] => return Ok(1),
        [letter] | [letter, b'I', b'B'] => (*letter, 1024),
        [letter, b'B'] => (*letter, 1000),
        _ => return Err(unknown()),
    };
    let power = (1..).zip(UNITS).find(|(_, unit)| **unit == letter);
    let (power, _): (u32, _) = power.ok_or_else(unknown)?;
    Ok(u64::pow(base, power))
}

/// Formats a size with at most one decimal and a unit that is a power of 1024, as lsblk does.
#[must_use]
pub fn human(bytes: u64) -> String {
    if bytes < 1024 {
        return format!("{bytes}B");
    }
    let mut tenths = 0;
    let mut unit = ' ';
    for (power, letter) in (1..).zip(UNITS) {
        let divisor = 1024_u128.pow(power);
        tenths = (u128::from(bytes) * 10 + divisor / 2) / divisor;
        unit = char::from(*letter);
        // Rounding may reach the next unit: 1023.96K is 1M.
        if tenths < 10240 {
            break;
        }
    }
    match tenths % 10 {
        0 => format!("{}{unit}", tenths / 10),
        tenth => format!("{}.{tenth}{unit}", tenths / 10),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_parsed() {
        for (text, bytes) in [
            ("0", 0),
            ("512", 512),
            ("512B", 512),
            ("1K", 1 << 10),
            ("1k", 1 << 10),
            ("64M", 64 << 20),
            ("3G", 3 << 30),
            ("2T", 2 << 40),
            ("1P", 1 << 50),
            ("15E", 15 << 60),
            ("1KiB", 1 << 10),
            ("5mib", 5 << 20),
            ("1KB", 1_000),
            ("1kB", 1_000),
            ("20MB", 20_000_000),
            ("7GB", 7_000_000_000),
            ("18EB", 18_000_000_000_000_000_000),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn invalid_sizes_are_rejected() {
        for text in ["", "K", "-1", "+1", " 1", "M5", "0x10K", "1 M", "1KK", "1Z", "1iB", "1Ki", "1é"] {
            assert!(
                matches!(parse(text), Err(SizeError::NoNumber | SizeError::Unit(_))),
                "{text:?}: {:?}",
                parse(text)
            );
        }
        assert_eq!(parse("1.5G"), Err(SizeError::Fraction));
        assert_eq!(parse("1,5G"), Err(SizeError::Fraction));
        assert_eq!(parse("16E"), Err(SizeError::TooLarge));
        assert_eq!(parse("19EB"), Err(SizeError::TooLarge));
        assert_eq!(parse("18446744073709551616"), Err(SizeError::TooLarge));
        assert_eq!(parse_u32("4K"), Ok(4096));
        assert_eq!(parse_u32("4G"), Err(SizeError::TooLarge));
    }

    #[test]
    fn sizes_are_formatted() {
        for (bytes, text) in [
            (0, "0B"),
            (1023, "1023B"),
            (1024, "1K"),
            (1536, "1.5K"),
            (64 << 20, "64M"),
            (3 << 29, "1.5G"),
            ((1 << 20) - 1, "1M"),
            (1_000_000, "976.6K"),
            (u64::MAX, "16E"),
        ] {
            assert_eq!(human(bytes), text);
        }
    }
}
