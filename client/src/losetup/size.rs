//! Sizes as losetup parses them: octal, hexadecimal, and fractions with its rounding.

use nix::errno::Errno;

/// Powers of the base, from the first on.
const UNITS: &[u8] = b"KMGTPEZY";

/// Parses `10`, `0x200`, `010` (octal), `1K` and `1KiB` (1024), `1KB` (1000), `1.5M`.
///
/// # Errors
/// `EINVAL` if the format is invalid, `ERANGE` if the value does not fit.
pub fn parse(text: &[u8]) -> Result<u64, Errno> {
    let text = std::str::from_utf8(text).map_err(|_| Errno::EINVAL)?;
    let text = text.trim_start_matches(|letter: char| letter.is_ascii_whitespace() || letter == '\u{b}');
    let (whole, rest) = integer(text.strip_prefix('+').unwrap_or(text))?;
    if rest.is_empty() {
        return Ok(whole);
    }
    let (fraction, suffix) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(digits_of(rest, 10)),
        None => ("", rest),
    };
    let (base, power) = unit(suffix)?;
    if whole == 0 && fraction.is_empty() {
        return Ok(0);
    }
    let unit = u64::checked_pow(base, power).ok_or(Errno::ERANGE)?;
    let whole = whole.checked_mul(unit).ok_or(Errno::ERANGE)?;
    whole.checked_add(part(fraction, unit)?).ok_or(Errno::ERANGE)
}

/// The number at the start, in the base of its prefix, and the rest.
fn integer(text: &str) -> Result<(u64, &str), Errno> {
    let hexadecimal = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let (text, base) = match hexadecimal {
        Some(rest) if digits_of(rest, 16) > 0 => (rest, 16),
        _ if text.starts_with('0') => (text, 8),
        _ => (text, 10),
    };
    let (digits, rest) = text.split_at(digits_of(text, base));
    if digits.is_empty() {
        return Err(Errno::EINVAL);
    }
    // Only digits, so the only possible error is an overflow.
    Ok((u64::from_str_radix(digits, base).map_err(|_| Errno::ERANGE)?, rest))
}

fn digits_of(text: &str, base: u32) -> usize {
    text.find(|letter: char| !letter.is_digit(base)).unwrap_or(text.len())
}

fn unit(suffix: &str) -> Result<(u64, u32), Errno> {
    let base = match suffix.as_bytes() {
        [_] | [_, b'i', b'B' | b'b'] => 1024,
        [_, b'B' | b'b'] => 1000,
        _ => return Err(Errno::EINVAL),
    };
    let letter = suffix.as_bytes()[0].to_ascii_uppercase();
    let (power, _) = (1..).zip(UNITS).find(|(_, unit)| **unit == letter).ok_or(Errno::EINVAL)?;
    Ok((base, power))
}

/// The value of the digits after the point. Scripts may depend on losetup's results: it divides the unit
/// by an integer for each digit, so 0.7 is rounded to a whole unit, and treats 10, 100 and so on as if they
/// had one digit less.
fn part(digits: &str, unit: u64) -> Result<u64, Errno> {
    let value: u64 = digits.trim_start_matches('0').parse().unwrap_or_default();
    if value == 0 && digits.bytes().any(|digit| digit != b'0') {
        return Err(Errno::ERANGE);
    }
    let shift = u32::from(value > 1 && value.to_string().trim_end_matches('0') == "1");
    let mut sum = 0_u64;
    for (place, digit) in (1..).zip(digits.bytes().map(|digit| u64::from(digit - b'0'))) {
        let weight = 10_u64.checked_pow(place - shift).ok_or(Errno::ERANGE)?;
        let share = weight.checked_div(digit).and_then(|divisor| unit.checked_div(divisor));
        sum = sum.checked_add(share.unwrap_or_default()).ok_or(Errno::ERANGE)?;
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_parsed() {
        for (text, bytes) in [
            ("0", 0),
            (" +5", 5),
            ("0x200", 512),
            ("010", 8),
            ("010K", 8192),
            ("0x1K", 1024),
            ("1kib", 1024),
            ("1Kb", 1000),
            ("1.M", 1 << 20),
            ("0Z", 0),
            ("15E", 15 << 60),
            ("18446744073709551615", u64::MAX),
        ] {
            assert_eq!(parse(text.as_bytes()), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn fractions_are_added_up_digit_by_digit() {
        for (text, bytes) in [
            ("1.5K", 1536),
            ("1.05K", 1075),
            ("1.005K", 1029),
            ("1.999K", 2150),
            ("1.0K", 1024),
            ("1.10K", 2048),
            ("1.01M", 1_059_061),
            ("1.15M", 1_205_861),
            ("1.234567M", 1_294_853),
            ("2.75G", 3_274_912_563),
            ("1.9999999999G", 2_255_843_725),
            ("1.25KB", 1250),
            ("1.7EB", 2_000_000_000_000_000_000),
        ] {
            assert_eq!(parse(text.as_bytes()), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn invalid_sizes_are_rejected() {
        for text in [
            "", "K", "-1", "1X", "1B", "1b", "1Ki", "1KIB", "5 ", "5K5", "1.5", "1.", ".5M", "1,5M", "08",
            "0x", "1.-5K", "1.0x5K", "1e3", "1R", "\u{e9}",
        ] {
            assert_eq!(parse(text.as_bytes()), Err(Errno::EINVAL), "{text}");
        }
        assert_eq!(parse(b"1\xff"), Err(Errno::EINVAL));
        for text in ["1Z", "16E", "20EB", "18446744073709551616", "1.123456789012345678901234567890K"] {
            assert_eq!(parse(text.as_bytes()), Err(Errno::ERANGE), "{text}");
        }
    }
}
