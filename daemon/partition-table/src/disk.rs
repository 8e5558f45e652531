//! Bounded reads of an image, and little-endian numbers.

use std::io;

use crate::image::Image;

/// The size limit of a single read, in bytes.
pub const LONGEST_READ: usize = 64 * 1024;

/// An image as a device with blocks.
pub struct Disk<'a, I> {
    image: &'a mut I,
    block_size: u32,
    size: u64,
}

impl<'a, I: Image> Disk<'a, I> {
    /// # Errors
    /// The block size is no power of two from 512 to 65536.
    pub fn new(image: &'a mut I, block_size: u32) -> io::Result<Self> {
        if !block_size.is_power_of_two() || !(512..=65536).contains(&block_size) {
            let message = format!("no partition table is read in blocks of {block_size} bytes");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        // A device has whole sectors of 512 bytes, and its size in bytes is signed.
        let size = image.size().min(1 << 62) / 512 * 512;
        Ok(Self { image, block_size, size })
    }

    /// Logical block size in bytes.
    pub fn block_size(&self) -> u64 {
        u64::from(self.block_size)
    }

    /// Size of the device in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Number of the last whole block; `None` if there is none.
    pub fn last_block(&self) -> Option<u64> {
        (self.size / self.block_size()).checked_sub(1)
    }

    /// Fills the buffer from a byte offset on; `false` if not all of it is within the device.
    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<bool> {
        debug_assert!(buffer.len() <= LONGEST_READ);
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.size) {
            return Ok(false);
        }
        self.image.read_at(offset, buffer)?;
        Ok(true)
    }

    /// The bytes of a block; `None` if there is no such block.
    pub fn read_block(&mut self, number: u64) -> io::Result<Option<Vec<u8>>> {
        if self.last_block().is_none_or(|last| number > last) {
            return Ok(None);
        }
        let mut block = vec![0; self.block_size as usize];
        let read = self.read(number * self.block_size(), &mut block)?;
        Ok(read.then_some(block))
    }
}

/// The bytes at an offset of a structure, which must reach that far.
pub fn bytes<const N: usize>(structure: &[u8], offset: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&structure[offset..offset + N]);
    bytes
}

/// The number at an offset of a structure, which must reach that far.
pub fn u32_at(structure: &[u8], offset: usize) -> u32 {
    u32::from_le_bytes(bytes(structure, offset))
}

/// The number at an offset of a structure, which must reach that far.
pub fn u64_at(structure: &[u8], offset: usize) -> u64 {
    u64::from_le_bytes(bytes(structure, offset))
}
