//! Names of loop device nodes: `/dev/loop3`, `loop3`, and `loop3p1` for a partition.

/// Returns N of `/dev/loopN` or `loopN`.
#[must_use]
pub fn loop_number(name: &str) -> Option<u32> {
    decimal(suffix(name)?)
}

/// Returns N and M of `/dev/loopNpM` or `loopNpM`.
#[must_use]
pub fn partition_numbers(name: &str) -> Option<(u32, u32)> {
    let (device, partition) = suffix(name)?.split_once('p')?;
    Some((decimal(device)?, decimal(partition)?))
}

fn suffix(name: &str) -> Option<&str> {
    name.strip_prefix("/dev/").unwrap_or(name).strip_prefix("loop")
}

/// Parses a number as the kernel writes it: without sign and leading zeros.
#[must_use]
pub fn decimal(digits: &str) -> Option<u32> {
    let number: u32 = digits.parse().ok()?;
    (number.to_string() == digits).then_some(number)
}

/// The node of a loop device.
#[must_use]
pub fn device_node(number: u32) -> String {
    format!("/dev/loop{number}")
}

/// The node of a partition.
#[must_use]
pub fn partition_node(device: u32, partition: u32) -> String {
    format!("{}p{partition}", device_node(device))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_are_parsed_with_and_without_directory() {
        assert_eq!((loop_number("loop3"), loop_number("/dev/loop3")), (Some(3), Some(3)));
        assert_eq!(partition_numbers("/dev/loop3p12"), Some((3, 12)));
        assert_eq!(loop_number(&device_node(7)), Some(7));
        assert_eq!(partition_numbers(&partition_node(7, 2)), Some((7, 2)));
    }

    #[test]
    fn other_names_and_leading_zeros_are_rejected() {
        for name in ["loop", "loop03", "3", "sda", "/tmp/loop3", "loop-1", "loop4294967296", ""] {
            assert_eq!(loop_number(name), None, "{name}");
        }
        for name in ["loopp1", "loop3p", "loop3p01", "loop3p1p2", "sda1"] {
            assert_eq!(partition_numbers(name), None, "{name}");
        }
    }
}
