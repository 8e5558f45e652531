//! Copies a file without its holes.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

/// Bytes per system call; small enough for a progress line that moves and prompt interruption.
const CHUNK: u64 = 8 << 20;
/// Size of the buffer if the kernel cannot copy.
const BUFFER: usize = 1 << 20;

/// The ranges of a file to copy.
#[derive(Debug)]
pub struct Plan {
    size: u64,
    data: Vec<Range<u64>>,
}

impl Plan {
    /// Finds the file's data, as far as its file system distinguishes data from holes.
    ///
    /// # Errors
    /// The file cannot be examined.
    pub fn of(file: &File) -> io::Result<Self> {
        let size = file.metadata()?.len();
        let mut data = Vec::new();
        let mut end = 0;
        while end < size {
            let start = match seek(file, SeekFrom::Data(end)) {
                Ok(start) => start,
                Err(Errno::NXIO) => break, // a hole up to the end
                Err(error) => return Err(error.into()),
            };
            end = seek(file, SeekFrom::Hole(start))?.min(size);
            data.push(start..end);
        }
        Ok(Self { size, data })
    }

    /// The number of bytes to copy.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.data.iter().map(|range| range.end - range.start).sum()
    }

    /// Copies to an empty file; calls `progress` with the bytes of each step.
    ///
    /// # Errors
    /// A read or write failed, or the file was truncated in the meantime.
    pub fn execute(&self, from: &File, to: &File, mut progress: impl FnMut(u64)) -> io::Result<()> {
        to.set_len(self.size)?;
        for range in &self.data {
            let mut at = range.start;
            while at < range.end {
                let copied = step(from, to, at, (range.end - at).min(CHUNK))?;
                if copied == 0 {
                    return Err(io::Error::new(
                        io::ErrorKind::UnexpectedEof,
                        "the file was truncated while it was copied",
                    ));
                }
                at += copied;
                progress(copied);
            }
        }
        Ok(())
    }
}

/// Copies at most this many bytes; returns 0 at the end of the file.
fn step(from: &File, to: &File, at: u64, bytes: u64) -> io::Result<u64> {
    let (mut source, mut target) = (at, at);
    let length = usize::try_from(bytes).unwrap_or(BUFFER);
    match rustix::fs::copy_file_range(from, Some(&mut source), to, Some(&mut target), length) {
        Ok(copied) => Ok(copied as u64),
        // Not between these two file systems, or not by this kernel.
        Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP) => {
            with_buffer(from, to, at, length)
        }
        Err(error) => Err(error.into()),
    }
}

fn with_buffer(from: &File, to: &File, at: u64, bytes: usize) -> io::Result<u64> {
    let mut buffer = vec![0; bytes.min(BUFFER)];
    let read = from.read_at(&mut buffer, at)?;
    to.write_all_at(&buffer[..read], at)?;
    Ok(read as u64)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    const MIB: u64 = 1 << 20;

    /// 64 MiB with data at 1 MiB and at 32 MiB.
    fn sparse() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(64 * MIB).unwrap();
        file.write_all_at(&[1; 4096], MIB).unwrap();
        file.write_all_at(&[2; 8192], 32 * MIB).unwrap();
        file
    }

    fn bytes_at(file: &File, at: u64) -> [u8; 2] {
        let mut bytes = [0; 2];
        file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    #[test]
    fn data_is_copied_and_holes_are_not() {
        let from = sparse();
        let plan = Plan::of(&from).unwrap();
        assert!(plan.bytes() < MIB, "{plan:?}");
        let to = tempfile::tempfile().unwrap();
        let mut reported = 0;
        plan.execute(&from, &to, |bytes| reported += bytes).unwrap();
        assert_eq!(reported, plan.bytes());
        assert_eq!(to.metadata().unwrap().len(), 64 * MIB);
        assert!(to.metadata().unwrap().blocks() * 512 < 2 * MIB);
        assert_eq!((bytes_at(&to, MIB), bytes_at(&to, 32 * MIB)), ([1; 2], [2; 2]));
        assert_eq!((bytes_at(&to, 0), bytes_at(&to, 64 * MIB - 2)), ([0; 2], [0; 2]));
    }

    #[test]
    fn an_empty_file_and_a_hole_have_no_data() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(Plan::of(&file).unwrap().bytes(), 0);
        file.set_len(MIB).unwrap();
        assert_eq!(Plan::of(&file).unwrap().bytes(), 0);
    }

    #[test]
    fn the_buffered_copy_works() {
        let from = sparse();
        let to = tempfile::tempfile().unwrap();
        assert_eq!(with_buffer(&from, &to, 32 * MIB, 8192).unwrap(), 8192);
        assert_eq!(bytes_at(&to, 32 * MIB), [2; 2]);
        assert_eq!(with_buffer(&from, &to, 64 * MIB, 8192).unwrap(), 0);
    }

    #[test]
    fn a_truncated_file_is_an_error() {
        let from = sparse();
        let plan = Plan::of(&from).unwrap();
        from.set_len(MIB).unwrap();
        let error = plan.execute(&from, &tempfile::tempfile().unwrap(), |_| ()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn a_full_disk_is_an_error() {
        let full = std::fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
        let error = with_buffer(&sparse(), &full, MIB, 4096).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::NOSPC.raw_os_error()));
    }
}
