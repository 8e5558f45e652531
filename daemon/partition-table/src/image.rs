//! The bytes that a partition table is read from.

use std::io;

/// The bytes of a disk image: of what a device shows, that is, from the attachment's offset up to
/// its size limit.
pub trait Image {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills the buffer, of at most 64 KiB, with the bytes from `offset` on. Is never asked for
    /// bytes past [`Image::size`].
    ///
    /// # Errors
    /// The bytes cannot be read.
    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()>;
}
