//! Receives and sends bytes and descriptors on the bus's socket.

use std::io::{self, ErrorKind, IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage,
    SendFlags, recv, recvmsg, sendmsg,
};
use tokio::io::Interest;
use tokio::net::UnixStream;

/// The maximum number of descriptors of a message: dbus-daemon's limit on the system bus.
pub const MOST_DESCRIPTORS: usize = 16;

/// Fills the buffer, and leaves the bytes in the socket.
///
/// The kernel does not peek beyond the first part of a message with descriptors, which has at least
/// 36 KiB: a longer buffer would never be filled.
pub async fn peek(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<()> {
    stream
        .async_io(Interest::READABLE, || {
            if recv(stream, &mut *buffer, RecvFlags::PEEK)?.1 == buffer.len() {
                return Ok(());
            }
            if !is_hung_up(stream)? {
                return Err(ErrorKind::WouldBlock.into());
            }
            // The bytes sent right before the hang-up.
            let there = recv(stream, &mut *buffer, RecvFlags::PEEK)?.1;
            if there == buffer.len() { Ok(()) } else { Err(ErrorKind::UnexpectedEof.into()) }
        })
        .await
}

fn is_hung_up(stream: &UnixStream) -> io::Result<bool> {
    let ends = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    let mut sockets = [PollFd::new(stream, PollFlags::RDHUP)];
    poll(&mut sockets, Some(&Timespec { tv_sec: 0, tv_nsec: 0 }))?;
    Ok(sockets[0].revents().intersects(ends))
}

/// Receives bytes. The kernel drops descriptors that come with them. They are never installed in this
/// process, so no close has to flush, and none can hang.
pub async fn receive(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
    let received =
        stream.async_io(Interest::READABLE, || Ok(recv(stream, &mut *buffer, RecvFlags::empty())?.1));
    match received.await? {
        0 if !buffer.is_empty() => Err(ErrorKind::UnexpectedEof.into()),
        length => Ok(length),
    }
}

/// Receives bytes up to the end of a line, and none after it.
pub async fn receive_line(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
    let line = stream.async_io(Interest::READABLE, || {
        let there = recv(stream, &mut *buffer, RecvFlags::PEEK)?.1;
        let end = buffer[..there].iter().position(|byte| *byte == b'\n');
        Ok(end.map_or(there, |end| end + 1))
    });
    match line.await? {
        0 => Err(ErrorKind::UnexpectedEof.into()),
        length => receive(stream, &mut buffer[..length]).await,
    }
}

/// Receives bytes and the descriptors that come with them. Descriptors beyond this process's limit are
/// missing.
pub async fn receive_with_descriptors(
    stream: &UnixStream,
    buffer: &mut [u8],
    descriptors: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let received = stream.async_io(Interest::READABLE, || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let message = recvmsg(stream, &mut [IoSliceMut::new(&mut *buffer)], &mut control, flags)?;
        for part in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = part {
                descriptors.extend(rights);
            }
        }
        Ok(message.bytes)
    });
    match received.await? {
        0 if !buffer.is_empty() => Err(ErrorKind::UnexpectedEof.into()),
        length => Ok(length),
    }
}

/// Sends some of the bytes, and all descriptors with the first byte.
pub async fn send(stream: &UnixStream, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<usize> {
    let send = || {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(MOST_DESCRIPTORS))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        if !descriptors.is_empty() && !control.push(SendAncillaryMessage::ScmRights(descriptors)) {
            return Err(io::Error::new(ErrorKind::InvalidInput, "too many descriptors for one message"));
        }
        Ok(sendmsg(stream, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL)?)
    };
    stream.async_io(Interest::WRITABLE, send).await
}

/// Sends all bytes.
pub async fn send_all(
    stream: &UnixStream,
    mut bytes: &[u8],
    mut descriptors: &[BorrowedFd<'_>],
) -> io::Result<()> {
    while !bytes.is_empty() {
        bytes = &bytes[send(stream, bytes, descriptors).await?..];
        descriptors = &[];
    }
    Ok(())
}
