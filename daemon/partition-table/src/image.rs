//! The bytes that a partition table is read from.

use std::io;

/// The bytes that a device shows: those of the backing file from the attachment's offset to its size limit.
pub trait Image {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills the buffer, of at most 64 KiB, with the bytes from `offset` on. The range is always within
    /// [`Image::size`].
    ///
    /// # Errors
    /// The bytes cannot be read.
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}
