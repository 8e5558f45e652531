//! A secret in memory that is locked and wiped.

use std::io;
use std::ops::Range;

use region::LockGuard;
use zeroize::Zeroize;

use super::core_dump::NoCoreDumps;

/// The longest secret in bytes, as the bus method `Unlock` accepts it.
pub const LONGEST: usize = 8 << 20;
/// Room for a line of a terminal, which has at most 4095 bytes.
const FIRST_CAPACITY: usize = 4096;

/// The bytes of a passphrase or key. Their pages are locked if the user's limit (RLIMIT_MEMLOCK) allows it, hold nothing
/// else, and are wiped when the secret is dropped. While a secret exists, the process writes no core file and cannot be
/// traced by other processes of the user.
pub struct Secret {
    /// `None` if the limit does not allow it. First, since fields are dropped in this order: the memory must still exist.
    _lock: Option<LockGuard>,
    /// Whole pages, and up to a page before them that is not used.
    memory: Vec<u8>,
    /// The whole pages.
    pages: Range<usize>,
    length: usize,
    _no_core_dumps: NoCoreDumps,
}

impl Secret {
    /// An empty secret.
    #[must_use]
    pub fn new() -> Self {
        Self::with_capacity(FIRST_CAPACITY)
    }

    fn with_capacity(capacity: usize) -> Self {
        let no_core_dumps = NoCoreDumps::new();
        let page = region::page::size();
        let size = capacity.next_multiple_of(page);
        let memory = vec![0; size + page];
        let start = memory.as_ptr().align_offset(page);
        let pages = start..start + size;
        let lock = region::lock(memory[pages.clone()].as_ptr(), size).ok();
        Self { _lock: lock, memory, pages, length: 0, _no_core_dumps: no_core_dumps }
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.memory[self.pages.start..self.pages.start + self.length]
    }

    /// Whether there is no byte.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// The secret would be longer than [`LONGEST`].
    pub fn append(&mut self, bytes: &[u8]) -> Result<(), TooLong> {
        self.reserve(bytes.len())?;
        self.spare()[..bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
        Ok(())
    }

    /// Appends what one call of `read` returns, and returns the number of bytes; 0 is the end. The bytes are read directly
    /// into the locked memory.
    ///
    /// # Errors
    /// [`TooLong`] in an error of the kind `FileTooLarge`, or an error of `read`.
    pub fn append_from(&mut self, read: impl FnOnce(&mut [u8]) -> io::Result<usize>) -> io::Result<usize> {
        if self.spare().is_empty() {
            self.reserve(1).map_err(|error| io::Error::new(io::ErrorKind::FileTooLarge, error))?;
        }
        let count = read(self.spare())?;
        self.length += count;
        Ok(count)
    }

    /// Removes the byte at the end if it is a newline.
    pub fn remove_final_newline(&mut self) {
        if self.bytes().last() == Some(&b'\n') {
            self.length -= 1;
        }
    }

    /// Removes this many bytes at the start.
    pub fn remove_start(&mut self, count: usize) {
        let start = self.pages.start;
        self.memory.copy_within(start + count..start + self.length, start);
        self.length -= count;
        self.spare()[..count].zeroize();
    }

    fn spare(&mut self) -> &mut [u8] {
        &mut self.memory[self.pages.start + self.length..self.pages.end]
    }

    /// Makes space for more bytes; the memory that it replaces is wiped.
    fn reserve(&mut self, more: usize) -> Result<(), TooLong> {
        let needed = self.length + more;
        if needed > LONGEST {
            return Err(TooLong);
        }
        if needed > self.pages.len() {
            let mut larger = Self::with_capacity((self.pages.len() * 2).clamp(needed, LONGEST));
            larger.append(self.bytes())?;
            *self = larger;
        }
        Ok(())
    }
}

impl Drop for Secret {
    fn drop(&mut self) {
        // Before the memory is unlocked and freed.
        self.memory.zeroize();
    }
}

/// A secret has more than [`LONGEST`] bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("it has more than 8 MiB")]
pub struct TooLong;

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    /// The kB of locked memory of this process.
    fn locked() -> u64 {
        let status = fs::read_to_string("/proc/self/status").unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmLck:")).unwrap();
        line.trim().trim_end_matches(" kB").parse().unwrap()
    }

    #[test]
    fn the_pages_are_locked_and_hold_nothing_else() {
        let secret = Secret::new();
        let page = region::page::size();
        assert_eq!(secret.memory[secret.pages.clone()].as_ptr().align_offset(page), 0);
        assert_eq!(secret.pages.len() % page, 0);
        assert!(secret._lock.is_some() && locked() >= 4);
    }

    #[test]
    fn bytes_are_kept_while_it_grows_up_to_the_limit() {
        let mut secret = Secret::new();
        let block = [7; 4096];
        for _ in 0..LONGEST / block.len() {
            secret.append(&block).unwrap();
        }
        assert_eq!((secret.bytes().len(), secret.bytes()[0], secret.bytes()[LONGEST - 1]), (LONGEST, 7, 7));
        assert_eq!(secret.append(&[7]), Err(TooLong));
        let error = secret.append_from(|_| panic!("there is no space")).unwrap_err();
        assert_eq!(
            (error.kind(), error.to_string().as_str()),
            (io::ErrorKind::FileTooLarge, "it has more than 8 MiB")
        );
    }

    #[test]
    fn bytes_are_removed_at_both_ends_and_wiped() {
        let mut secret = Secret::new();
        secret.append(b"ab\n\n").unwrap();
        secret.remove_final_newline();
        assert_eq!(secret.bytes(), b"ab\n");
        secret.remove_start(1);
        assert_eq!(secret.bytes(), b"b\n");
        secret.remove_start(2);
        assert!(secret.is_empty());
        let start = secret.pages.start;
        assert_eq!(secret.memory[start..start + 2], [0, 0]);
        secret.remove_final_newline();
        assert_eq!(secret.bytes(), b"");
    }
}
