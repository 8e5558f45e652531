//! Reads the partition table of a loop device, or of the part of a file that one shows.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};

use loopd_engine::kernel::{Partition, PartitionNode, TableEntry, node};
use loopd_partition_table::{self as format, Image, Reading, Table};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use rustix::io::{pread, retry_on_intr};
use tracing::{debug, warn};

/// Offset, length and memory of direct I/O are multiples of this: the largest sector that disks have, in bytes
/// (`open(2)`, `O_DIRECT`).
pub const ALIGNMENT: usize = 4096;

/// The bytes of a file from an offset on. The descriptor is not duplicated: closing a duplicate flushes the file,
/// which may hang.
pub struct Bytes<'a> {
    file: BorrowedFd<'a>,
    offset: u64,
    size: u64,
    direct: bool,
}

impl<'a> Bytes<'a> {
    /// `size` bytes from `offset` on.
    pub fn new(file: &'a impl AsFd, offset: u64, size: u64) -> Self {
        let file = file.as_fd();
        let direct = fcntl(file, FcntlArg::F_GETFL)
            .is_ok_and(|flags| OFlag::from_bits_retain(flags).contains(OFlag::O_DIRECT));
        Self { file, offset, size, direct }
    }
}

impl Image for Bytes<'_> {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&mut self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        let offset = self.offset.checked_add(offset).ok_or(io::ErrorKind::InvalidInput)?;
        if self.direct {
            read_aligned(self.file, offset, buffer)
        } else {
            read_exact(self.file, offset, buffer)
        }
    }
}

fn read_exact(file: BorrowedFd<'_>, mut offset: u64, mut buffer: &mut [u8]) -> io::Result<()> {
    while !buffer.is_empty() {
        match retry_on_intr(|| pread(file, &mut *buffer, offset))? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            read => {
                offset += read as u64;
                buffer = &mut buffer[read..];
            }
        }
    }
    Ok(())
}

/// Reads the aligned blocks around the wanted bytes, as direct I/O requires.
fn read_aligned(file: BorrowedFd<'_>, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
    let before = usize::try_from(offset % ALIGNMENT as u64).unwrap_or_default();
    let wanted = before + buffer.len();
    let length = wanted.next_multiple_of(ALIGNMENT);
    let mut memory = vec![0; length + ALIGNMENT];
    let start = memory.as_ptr().align_offset(ALIGNMENT);
    let around = memory.get_mut(start..start + length).ok_or(io::ErrorKind::OutOfMemory)?;
    // Fewer bytes are read only if the file ends within the last block.
    let read = retry_on_intr(|| pread(file, &mut *around, offset - before as u64))?;
    let found = around.get(before..wanted).filter(|_| read >= wanted).ok_or(io::ErrorKind::UnexpectedEof)?;
    buffer.copy_from_slice(found);
    Ok(())
}

/// The sector size in bytes that an image's table was written for; `None` if any fits.
pub fn sector_size(file: impl AsFd, offset: u64, size: u64) -> Option<u32> {
    format::sector_size(&mut Bytes::new(&file, offset, size)).ok().flatten()
}

/// Reads the partition table of a device. The result is without a table if there is none, or if it cannot be read.
/// Logs the warnings.
pub fn read(number: u32, block_size: u32, bytes: &mut Bytes<'_>) -> Reading {
    let reading = format::read(bytes, block_size).unwrap_or_else(|error| {
        debug!(device = node(number), "the partition table cannot be read: {error}");
        Reading::default()
    });
    for warning in &reading.warnings {
        warn!(device = node(number), "partition table: {warning}");
    }
    reading
}

/// The partitions of these nodes, each with its entry in the table.
pub fn describe(nodes: Vec<PartitionNode>, table: Option<&Table>) -> Vec<Partition> {
    nodes.into_iter().map(|node| Partition { entry: entry(table, node.number), node }).collect()
}

fn entry(table: Option<&Table>, number: u32) -> TableEntry {
    let entry = |table: &Table| {
        let partition = table.partitions.iter().find(|partition| partition.number == number)?.clone();
        Some(TableEntry {
            table: table.kind.to_string(),
            kind: partition.kind,
            uuid: partition.uuid,
            label: partition.label,
        })
    };
    table.and_then(entry).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::OpenOptionsExt as _;

    use super::*;

    #[test]
    fn direct_and_buffered_reads_agree() {
        let image = tempfile::NamedTempFile::new().unwrap();
        let content: Vec<u8> = (0..5000_u32).flat_map(u32::to_le_bytes).collect();
        std::fs::write(image.path(), &content).unwrap();
        let direct = File::options().read(true).custom_flags(OFlag::O_DIRECT.bits()).open(image.path());
        let buffered = File::open(image.path()).unwrap();
        let Ok(direct) = direct else {
            return loopd_test_support::skipped("bytes", "no direct I/O in the temporary directory");
        };
        assert!(Bytes::new(&direct, 0, 0).direct);
        for (offset, length) in [(0, 512), (512, 512), (4090, 20), (16_384, 3616), (19_999, 1), (19_990, 512)]
        {
            let read = |file| {
                let mut buffer = vec![0; length];
                Bytes::new(file, 100, 20_000)
                    .read_at(offset, &mut buffer)
                    .map(|()| buffer)
                    .map_err(|error| error.kind())
            };
            assert_eq!(read(&direct), read(&buffered), "{offset} {length}");
        }
    }
}
