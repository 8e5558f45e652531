//! Limits of the loop driver, and of what loopd sends.

/// The maximum length of a reference in the kernel, in bytes.
pub const REFERENCE_LENGTH: usize = 63;

/// The most warnings of one attachment.
pub const MOST_WARNINGS: usize = 12;

/// The most bytes of the messages of its warnings together.
pub const MOST_WARNING_TEXT: usize = 1200;

/// Whether a loop device can have logical blocks of this size: a power of two from 512 to 64 KiB.
#[must_use]
pub const fn is_block_size(bytes: u32) -> bool {
    bytes.is_power_of_two() && 512 <= bytes && bytes <= 65536
}

#[cfg(test)]
mod tests {
    use super::is_block_size;

    #[test]
    fn block_sizes_are_powers_of_two_from_512_to_64_kib() {
        for bytes in [512, 1024, 4096, 65536] {
            assert!(is_block_size(bytes), "{bytes}");
        }
        for bytes in [0, 1, 256, 1000, 4095, 131_072, 1 << 31] {
            assert!(!is_block_size(bytes), "{bytes}");
        }
    }
}
