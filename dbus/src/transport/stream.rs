//! Bytes and descriptors from and to the bus's socket.

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

/// The most descriptors that a message can bring: dbus-daemon's own limit on the system bus.
pub const MOST_DESCRIPTORS: usize = 16;

/// Fills the buffer, and leaves what it shows in the socket.
///
/// The kernel does not look behind the first part of a message that came with descriptors, which
/// has some 36 KiB at least: a longer buffer would never be filled.
pub async fn peek(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<()> {
    stream
        .async_io(Interest::READABLE, || {
            if recv(stream, &mut *buffer, RecvFlags::PEEK)?.1 == buffer.len() {
                return Ok(());
            }
            if !is_hung_up(stream)? {
                return Err(ErrorKind::WouldBlock.into());
            }
            // What came right before the end.
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

/// Receives bytes. Descriptors that come with them are dropped by the kernel: they never become this
/// process's own, so that nothing is flushed and nothing can hang.
pub async fn receive(stream: &UnixStream, buffer: &mut [u8]) -> io::Result<usize> {
    let received =
        stream.async_io(Interest::READABLE, || Ok(recv(stream, &mut *buffer, RecvFlags::empty())?.1));
    match received.await? {
        0 if !buffer.is_empty() => Err(ErrorKind::UnexpectedEof.into()),
        length => Ok(length),
    }
}

/// Receives bytes and the descriptors that come with them; those that this process has no room for
/// are missing.
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

/// Sends some bytes, and all of the descriptors with the first of them.
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

/// Sends all of the bytes.
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
