//! Images in memory, and tables made without the code under test.

use std::io;

use crate::Image;

/// An image that counts reads, and panics if one is out of bounds.
pub struct Memory {
    pub bytes: Vec<u8>,
    pub reads: usize,
    pub bytes_read: usize,
}

impl From<Vec<u8>> for Memory {
    fn from(bytes: Vec<u8>) -> Self {
        Self { bytes, reads: 0, bytes_read: 0 }
    }
}

impl Image for Memory {
    fn size(&self) -> u64 {
        self.bytes.len() as u64
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        assert!(buffer.len() <= 64 * 1024, "one read of {} bytes", buffer.len());
        let offset = usize::try_from(offset).unwrap();
        buffer.copy_from_slice(&self.bytes[offset..offset + buffer.len()]);
        self.reads += 1;
        self.bytes_read += buffer.len();
        Ok(())
    }
}

pub fn put_u32(bytes: &mut [u8], offset: usize, value: u32) {
    bytes[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
}

pub fn put_u64(bytes: &mut [u8], offset: usize, value: u64) {
    bytes[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
}

fn get_u32(bytes: &[u8], offset: usize) -> usize {
    u32::from_le_bytes(bytes[offset..offset + 4].try_into().unwrap()) as usize
}

/// The checksum of GPT, bit by bit, to be independent of the code under test.
pub fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| (crc >> 1) ^ (0xedb8_8320 & (crc & 1).wrapping_neg()))
    })
}

/// An entry of an MBR or of a link: flag, type, first sector, sectors.
pub type DosEntry = (u8, u8, u32, u32);

/// Writes a boot record's entries and signature.
pub fn put_record(sector: &mut [u8], entries: &[DosEntry]) {
    for (index, (flag, kind, first, sectors)) in entries.iter().enumerate() {
        let entry = &mut sector[446 + 16 * index..][..16];
        entry[0] = *flag;
        entry[4] = *kind;
        put_u32(entry, 8, *first);
        put_u32(entry, 12, *sectors);
    }
    sector[510..512].copy_from_slice(&[0x55, 0xaa]);
}

/// An image of sectors of 512 bytes with an MBR of signature 0x1a2b3c4d.
pub fn dos(sectors: usize, entries: &[DosEntry]) -> Vec<u8> {
    let mut image = vec![0; sectors * 512];
    put_u32(&mut image, 440, 0x1a2b_3c4d);
    put_record(&mut image, entries);
    image
}

/// The boot sector of a FAT16 volume of this many sectors, as `mkfs.fat` writes it, without entries.
pub fn fat_boot_sector(sectors: u16) -> [u8; 512] {
    let mut sector = [0; 512];
    sector[..11].copy_from_slice(b"\xeb\x3c\x90mkfs.fat");
    // Sector and cluster size, reserved sectors, tables, entries of the root directory.
    sector[11..19].copy_from_slice(&[0, 2, 4, 1, 0, 2, 0, 2]);
    sector[19..21].copy_from_slice(&sectors.to_le_bytes());
    // Medium, sectors of a table.
    sector[21..24].copy_from_slice(&[0xf8, 4, 0]);
    sector[54..62].copy_from_slice(b"FAT16   ");
    sector[510..].copy_from_slice(&[0x55, 0xaa]);
    sector
}

/// An image with one extended partition, from sector 100 to the end, and a chain: for each link its
/// sector, and its own entries, relative as on disk.
pub fn chain(sectors: usize, links: &[(usize, &[DosEntry])]) -> Vec<u8> {
    let size = u32::try_from(sectors).unwrap() - 100;
    let mut image = dos(sectors, &[(0, 5, 100, size)]);
    for (sector, entries) in links {
        put_record(&mut image[sector * 512..], entries);
    }
    image
}

/// An image with a GPT.
pub struct Gpt {
    pub image: Vec<u8>,
    pub block_size: usize,
}

impl Gpt {
    /// Partitions by number, first and last block; 128 entries.
    pub fn new(block_size: usize, blocks: usize, partitions: &[(usize, u64, u64)]) -> Self {
        Self::with_entries(block_size, blocks, 128, partitions)
    }

    pub fn with_entries(
        block_size: usize,
        blocks: usize,
        count: usize,
        partitions: &[(usize, u64, u64)],
    ) -> Self {
        let mut gpt = Self { image: vec![0; block_size * blocks], block_size };
        let array_blocks = (count * 128).div_ceil(block_size);
        let last = blocks - 1;
        put_record(&mut gpt.image, &[(0, 0xee, 1, u32::try_from(last).unwrap())]);
        for (block, alternate, array) in [(1, last, 2), (last, 1, last - array_blocks)] {
            for (number, first, last) in partitions {
                gpt.put_entry(array, *number, *first, *last);
            }
            let usable = (2 + array_blocks, last - array_blocks - 1);
            gpt.put_header(block, alternate, usable, array, count);
        }
        gpt
    }

    fn put_entry(&mut self, array: usize, number: usize, first: u64, last: u64) {
        let entry = &mut self.image[array * self.block_size + (number - 1) * 128..][..128];
        let kind = *b"\xaf\x3d\xc6\x0f\x83\x84\x72\x47\x8e\x79\x3d\x69\xd8\x47\x7d\xe4";
        entry[..16].copy_from_slice(&kind);
        entry[16..32].fill(u8::try_from(number % 256).unwrap());
        put_u64(entry, 32, first);
        put_u64(entry, 40, last);
        for (unit, char) in entry[56..].chunks_exact_mut(2).zip(format!("number {number}").encode_utf16()) {
            unit.copy_from_slice(&char.to_le_bytes());
        }
    }

    fn put_header(
        &mut self,
        block: usize,
        alternate: usize,
        usable: (usize, usize),
        array: usize,
        count: usize,
    ) {
        let header = self.block(block);
        header[..8].copy_from_slice(b"EFI PART");
        put_u32(header, 8, 0x0001_0000);
        put_u32(header, 12, 92);
        for (offset, value) in [(24, block), (32, alternate), (40, usable.0), (48, usable.1), (72, array)] {
            put_u64(header, offset, value as u64);
        }
        header[56..72].fill(0xd1);
        put_u32(header, 80, u32::try_from(count).unwrap());
        put_u32(header, 84, 128);
        self.seal(block);
    }

    /// The bytes of a block.
    pub fn block(&mut self, number: usize) -> &mut [u8] {
        &mut self.image[number * self.block_size..][..self.block_size]
    }

    pub fn last(&self) -> usize {
        self.image.len() / self.block_size - 1
    }

    /// Writes both checksums of the copy in this block again, if its header allows that.
    pub fn seal(&mut self, number: usize) {
        seal(&mut self.image, self.block_size, number);
    }

    /// Changes both copies: the function gets the header's block and the bytes of the entries.
    pub fn change(&mut self, change: impl Fn(&mut [u8], &mut [u8])) {
        for number in [1, self.last()] {
            let mut header = self.block(number).to_vec();
            let array = get_u32(&header, 72) * self.block_size;
            let size = get_u32(&header, 80) * 128;
            change(&mut header, &mut self.image[array..array + size]);
            self.block(number).copy_from_slice(&header);
            self.seal(number);
        }
    }
}

/// See [`Gpt::seal`].
pub fn seal(image: &mut [u8], block_size: usize, number: usize) {
    let Some(header) = image.get(number * block_size..(number + 1) * block_size) else { return };
    let start = get_u32(header, 72).saturating_mul(block_size);
    let size = get_u32(header, 80).saturating_mul(get_u32(header, 84));
    let array = image.get(start..start.saturating_add(size)).map(crc32);
    let header = &mut image[number * block_size..(number + 1) * block_size];
    if let Some(array) = array {
        put_u32(header, 88, array);
    }
    put_u32(header, 16, 0);
    let size = get_u32(header, 12).min(block_size);
    let sum = crc32(&header[..size]);
    put_u32(header, 16, sum);
}
