//! Reads what a caller has passed: the secret, key files, a header.
//!
//! A read from a caller's descriptor can hang, and only the end of the process ends it. So another thread reads.

use std::fs::File;
use std::io::{ErrorKind, Read as _, Result};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::mpsc;
use std::thread;
use std::time::Instant;

use rustix::pipe::{PipeFlags, pipe_with};
use zeroize::Zeroizing;

use crate::wait::{self, Woken};

/// Bytes of a caller, wiped when they are dropped.
pub type Bytes = Zeroizing<Vec<u8>>;

/// Something to be read.
pub struct Input {
    /// What it is, for messages.
    pub what: &'static str,
    /// The descriptor.
    pub file: OwnedFd,
    /// The maximum length in bytes.
    pub most: usize,
    /// Whether it must not be empty.
    pub is_required: bool,
}

/// Why the inputs were not read.
#[derive(Debug, PartialEq, Eq)]
pub enum Unread {
    /// loopd has closed its end.
    Abandoned,
    /// One of them did not end in time.
    TimedOut,
    /// One of them cannot be used, for this reason.
    Invalid(String),
}

/// Reads each input to its end.
///
/// # Errors
/// The system has no memory or no descriptor; see [`Unread`].
pub fn read_all(
    inputs: Vec<Input>,
    loopd: BorrowedFd<'_>,
    end: Instant,
) -> Result<std::result::Result<Vec<Bytes>, Unread>> {
    let (ended, end_of_thread) = pipe_with(PipeFlags::CLOEXEC)?;
    let (sender, receiver) = mpsc::channel();
    thread::Builder::new().name("input".to_owned()).spawn(move || {
        let read: std::result::Result<Vec<Bytes>, Unread> = inputs.into_iter().map(read).collect();
        // The receiver is gone only if the process ends.
        let _result = sender.send(read);
        drop(end_of_thread);
    })?;
    Ok(match wait::until_readable(&[ended.as_fd()], Some(loopd), end)? {
        Woken::Ready => {
            receiver.recv().unwrap_or_else(|_| Err(Unread::Invalid("it cannot be read".to_owned())))
        }
        Woken::Abandoned => Err(Unread::Abandoned),
        Woken::TimedOut => Err(Unread::TimedOut),
    })
}

fn read(input: Input) -> std::result::Result<Bytes, Unread> {
    let Input { what, file, most, is_required } = input;
    // All of the space at once: a vector that grows leaves copies behind.
    let mut bytes = Zeroizing::new(vec![0; most + 1]);
    let mut file = File::from(file);
    let mut length = 0;
    while length < bytes.len() {
        match file.read(&mut bytes[length..]) {
            Ok(0) => break,
            Ok(read) => length += read,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(Unread::Invalid(format!("{what} cannot be read: {error}"))),
        }
    }
    if length > most {
        return Err(Unread::Invalid(format!("{what} has more than {most} bytes")));
    }
    if length == 0 && is_required {
        return Err(Unread::Invalid(format!("{what} is empty")));
    }
    bytes.truncate(length);
    Ok(bytes)
}
