//! Messages with descriptors on a socket of the type `SOCK_SEQPACKET`.

use std::io::{Error, ErrorKind, IoSlice, IoSliceMut, Result};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType, recvmsg, sendmsg, socketpair,
};

/// The maximum length of a message in bytes.
const LONGEST: usize = 4096;
/// The maximum number of descriptors of a message.
pub const MOST_FILES: usize = 16;

/// A message and its descriptors.
pub type Message = (String, Vec<OwnedFd>);

/// Makes a pair of connected sockets. They are closed on exec.
///
/// # Errors
/// No descriptor is free.
pub fn pair() -> Result<(OwnedFd, OwnedFd)> {
    Ok(socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?)
}

/// Sends a message.
///
/// # Errors
/// The message is too long, has too many descriptors, or the other end is closed.
pub fn send(socket: impl AsFd, text: &str, files: &[BorrowedFd<'_>]) -> Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    let has_space = files.is_empty() || control.push(SendAncillaryMessage::ScmRights(files));
    if !has_space || files.len() > MOST_FILES || text.len() > LONGEST {
        return Err(Error::new(ErrorKind::InvalidInput, "too much for one message"));
    }
    sendmsg(socket, &[IoSlice::new(text.as_bytes())], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives a message; `None` if the other end is closed.
///
/// # Errors
/// The message is not UTF-8, or is not complete.
pub fn receive(socket: impl AsFd) -> Result<Option<Message>> {
    let mut bytes = [0; LONGEST];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_FILES))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::CMSG_CLOEXEC;
    let message = recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags)?;
    let mut files = Vec::new();
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            files.extend(rights);
        }
    }
    if message.flags.intersects(ReturnFlags::TRUNC | ReturnFlags::CTRUNC) {
        return Err(Error::new(ErrorKind::InvalidData, "an incomplete message"));
    }
    let text = std::str::from_utf8(&bytes[..message.bytes])
        .map_err(|_| Error::new(ErrorKind::InvalidData, "a message that is not UTF-8"))?;
    Ok((!text.is_empty()).then(|| (text.to_owned(), files)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_keep_their_bounds_and_descriptors() {
        let (one, other) = pair().unwrap();
        send(&one, "first", &[one.as_fd(), other.as_fd()]).unwrap();
        send(&one, "second", &[]).unwrap();
        let (text, files) = receive(&other).unwrap().unwrap();
        assert_eq!((text.as_str(), files.len()), ("first", 2));
        drop(files);
        assert_eq!(receive(&other).unwrap().unwrap().0, "second");
        drop(one);
        assert!(receive(&other).unwrap().is_none());
    }

    #[test]
    fn messages_that_do_not_fit_are_refused() {
        let (one, other) = pair().unwrap();
        assert!(send(&one, &"x".repeat(LONGEST + 1), &[]).is_err());
        assert!(send(&one, "x", &[other.as_fd(); MOST_FILES + 1]).is_err());
        send(&one, &"x".repeat(LONGEST), &[]).unwrap();
        assert_eq!(receive(&other).unwrap().unwrap().0.len(), LONGEST);
    }
}
