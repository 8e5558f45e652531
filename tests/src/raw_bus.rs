//! A bus client that writes raw bytes, so it can send messages that no library sends.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd as _, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use anyhow::{Context as _, Result, bail, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

use crate::User;

const FIXED: usize = 16;

/// Changes the calling thread, and only it, to this user for good.
///
/// # Errors
/// The thread does not run as root.
pub fn become_user(user: User) -> Result<()> {
    let (uid, gid) = (rustix::process::Uid::from_raw(user.uid), rustix::process::Gid::from_raw(user.gid));
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(gid, gid, gid)?;
    Ok(rustix::thread::set_thread_res_uid(uid, uid, uid)?)
}

/// A serializer for messages, in either byte order.
#[derive(Clone, Debug)]
pub struct Bytes {
    /// The bytes written so far.
    pub bytes: Vec<u8>,
    big: bool,
}

impl Bytes {
    /// An empty message.
    #[must_use]
    pub fn new(big: bool) -> Self {
        Self { bytes: Vec::new(), big }
    }

    /// Zeros up to this alignment.
    pub fn align(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }

    /// A number of four bytes.
    pub fn number(&mut self, number: u32) {
        self.align(4);
        self.bytes.extend(if self.big { number.to_be_bytes() } else { number.to_le_bytes() });
    }

    /// A string.
    pub fn text(&mut self, text: &[u8]) {
        self.number(u32::try_from(text.len()).unwrap_or(u32::MAX));
        self.bytes.extend(text);
        self.bytes.push(0);
    }

    /// A signature.
    pub fn signature(&mut self, signature: &str) {
        self.bytes.push(u8::try_from(signature.len()).unwrap_or(u8::MAX));
        self.bytes.extend(signature.as_bytes());
        self.bytes.push(0);
    }

    /// Overwrites a number of four bytes.
    pub fn put_number(&mut self, at: usize, number: usize) {
        let number = u32::try_from(number).unwrap_or(u32::MAX);
        let bytes = if self.big { number.to_be_bytes() } else { number.to_le_bytes() };
        self.bytes[at..at + 4].copy_from_slice(&bytes);
    }
}

/// A message to be written.
#[derive(Clone, Debug)]
pub struct RawMessage {
    /// Whether the byte order is big-endian.
    pub big: bool,
    /// The type: 1 is a call.
    pub kind: u8,
    /// The flags.
    pub flags: u8,
    /// The serial.
    pub serial: u32,
    /// The fields: code, signature of one type, and the text or number.
    pub fields: Vec<(u8, u8, Value)>,
    /// The body.
    pub body: Vec<u8>,
}

/// The value of a header field.
#[derive(Clone, Debug)]
pub enum Value {
    /// A string, an object path or a signature.
    Text(Vec<u8>),
    /// A number.
    Number(u32),
}

impl RawMessage {
    /// A call of a method.
    #[must_use]
    pub fn call(destination: &str, path: &str, interface: &str, member: &str) -> Self {
        let text = |text: &str| Value::Text(text.as_bytes().to_vec());
        Self {
            big: false,
            kind: 1,
            flags: 0,
            serial: 1,
            fields: vec![
                (1, b'o', text(path)),
                (2, b's', text(interface)),
                (3, b's', text(member)),
                (6, b's', text(destination)),
            ],
            body: Vec::new(),
        }
    }

    /// The same with a body of this signature.
    #[must_use]
    pub fn body(mut self, signature: &str, body: Vec<u8>) -> Self {
        if !signature.is_empty() {
            self.fields.push((8, b'g', Value::Text(signature.as_bytes().to_vec())));
        }
        self.body = body;
        self
    }

    /// The same, with this number of descriptors in its header.
    #[must_use]
    pub fn descriptors(mut self, count: u32) -> Self {
        self.fields.push((9, b'u', Value::Number(count)));
        self
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> Vec<u8> {
        let mut message = Bytes::new(self.big);
        message.bytes = vec![if self.big { b'B' } else { b'l' }, self.kind, self.flags, 1];
        message.number(u32::try_from(self.body.len()).unwrap_or(u32::MAX));
        message.number(self.serial);
        message.number(0);
        for (code, kind, value) in &self.fields {
            message.align(8);
            message.bytes.extend([*code, 1, *kind, 0]);
            match value {
                Value::Number(number) => message.number(*number),
                Value::Text(text) if *kind == b'g' => {
                    message.bytes.push(u8::try_from(text.len()).unwrap_or(u8::MAX));
                    message.bytes.extend(text);
                    message.bytes.push(0);
                }
                Value::Text(text) => message.text(text),
            }
        }
        let fields = message.bytes.len() - FIXED;
        message.put_number(12, fields);
        message.align(8);
        message.bytes.extend(&self.body);
        message.bytes
    }
}

/// A connection to the bus.
#[derive(Debug)]
pub struct RawBus {
    stream: UnixStream,
    /// Our unique name.
    pub name: String,
    serial: u32,
}

/// The header of a received message.
#[derive(Debug, Default)]
pub struct Arrived {
    /// The type.
    pub kind: u8,
    /// The serial.
    pub serial: u32,
    /// The method or signal.
    pub member: String,
    /// The call that it answers.
    pub reply_serial: u32,
    /// The sender.
    pub sender: String,
    /// The error's name.
    pub error: String,
    /// The codes of its fields.
    pub fields: Vec<u8>,
}

impl RawBus {
    /// Connects as the user of the calling thread.
    ///
    /// # Errors
    /// The bus refuses the connection.
    pub fn connect(address: &str) -> Result<Self> {
        let path = address.strip_prefix("unix:path=").context("a unix:path= is needed")?;
        let mut stream = UnixStream::connect(path.split(',').next().unwrap_or_default())?;
        stream.set_read_timeout(Some(Duration::from_secs(20)))?;
        stream.set_write_timeout(Some(Duration::from_secs(20)))?;
        let uid = rustix::process::geteuid().as_raw().to_string();
        let uid: String = uid.bytes().map(|digit| format!("{digit:02x}")).collect();
        stream.write_all(format!("\0AUTH EXTERNAL {uid}\r\nNEGOTIATE_UNIX_FD\r\nBEGIN\r\n").as_bytes())?;
        for expected in ["OK ", "AGREE_UNIX_FD"] {
            let mut line = Vec::new();
            while !line.ends_with(b"\r\n") {
                let mut byte = [0];
                stream.read_exact(&mut byte)?;
                line.extend(byte);
            }
            ensure!(line.starts_with(expected.as_bytes()), "{}", String::from_utf8_lossy(&line));
        }
        let mut bus = Self { stream, name: String::new(), serial: 0 };
        let hello = bus.call_bus("Hello")?;
        let (_, body) = bus.answer(hello)?;
        // After a truncated message the bus waits for the rest, and does not answer.
        bus.stream.set_read_timeout(Some(Duration::from_secs(2)))?;
        bus.name = String::from_utf8(body.get(4..body.len().saturating_sub(1)).unwrap_or_default().to_vec())?;
        Ok(bus)
    }

    /// Sets the time limit for a reply.
    ///
    /// # Errors
    /// The socket is closed.
    pub fn patience(&self, time: Duration) -> io::Result<()> {
        self.stream.set_read_timeout(Some(time))
    }

    /// Whether a message, or the end of the connection, arrives within this time.
    ///
    /// # Errors
    /// The socket cannot be polled.
    pub fn is_readable(&self, within: Duration) -> Result<bool> {
        let mut watched = [PollFd::new(self.stream.as_fd(), PollFlags::POLLIN)];
        let within = PollTimeout::try_from(within).unwrap_or(PollTimeout::MAX);
        match poll(&mut watched, within) {
            Err(Errno::EINTR) => Ok(false),
            ready => Ok(ready? > 0),
        }
    }

    /// An unused serial.
    pub fn next_serial(&mut self) -> u32 {
        self.serial += 1;
        self.serial
    }

    /// Sends bytes, with descriptors.
    ///
    /// # Errors
    /// The bus has ended the connection.
    pub fn send(&mut self, mut bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> io::Result<()> {
        if !descriptors.is_empty() {
            let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(32))];
            let mut control = SendAncillaryBuffer::new(&mut space);
            control.push(SendAncillaryMessage::ScmRights(descriptors));
            let slices = [IoSlice::new(bytes)];
            bytes = &bytes[sendmsg(&self.stream, &slices, &mut control, SendFlags::NOSIGNAL)?..];
        }
        self.stream.write_all(bytes)
    }

    /// Calls a method of the bus itself.
    ///
    /// # Errors
    /// The bus has ended the connection.
    pub fn call_bus(&mut self, member: &str) -> io::Result<u32> {
        let bus = "org.freedesktop.DBus";
        let mut call = RawMessage::call(bus, "/org/freedesktop/DBus", bus, member);
        call.serial = self.next_serial();
        self.send(&call.bytes(), &[])?;
        Ok(call.serial)
    }

    /// The next message, with its body.
    ///
    /// # Errors
    /// The bus has ended the connection.
    pub fn receive(&mut self) -> Result<(Arrived, Vec<u8>)> {
        let mut fixed = [0; FIXED];
        self.stream.read_exact(&mut fixed)?;
        let big = fixed[0] == b'B';
        let number = |bytes: &[u8], at: usize| -> usize {
            let bytes: [u8; 4] =
                bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).unwrap_or_default();
            (if big { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) }) as usize
        };
        let fields = number(&fixed, 12);
        ensure!(fields < 1 << 20, "not a message: {fixed:?}");
        let mut header = fixed.to_vec();
        header.resize(FIXED + fields.next_multiple_of(8), 0);
        self.stream.read_exact(&mut header[FIXED..])?;
        let mut body = vec![0; number(&fixed, 4)];
        self.stream.read_exact(&mut body)?;
        let serial = u32::try_from(number(&fixed, 8))?;
        let mut arrived = Arrived { kind: fixed[1], serial, ..Arrived::default() };
        let mut at = FIXED;
        while at < FIXED + fields {
            let value = at + 4;
            let text = || {
                let text = header.get(value + 4..value + 4 + number(&header, value)).unwrap_or_default();
                String::from_utf8_lossy(text).into_owned()
            };
            arrived.fields.push(header[at]);
            match (header[at], header[at + 2]) {
                (5, b'u') => arrived.reply_serial = u32::try_from(number(&header, value))?,
                (7, b's') => arrived.sender = text(),
                (4, b's') => arrived.error = text(),
                (3, b's') => arrived.member = text(),
                _ => {}
            }
            at = match header[at + 2] {
                b'u' => value + 4,
                b'g' => value + 2 + usize::from(header[value]),
                b's' | b'o' => value + 5 + number(&header, value),
                other => bail!("a field of type {other}"),
            };
            at = at.next_multiple_of(8);
        }
        Ok((arrived, body))
    }

    /// The reply to a call; other messages are skipped.
    ///
    /// # Errors
    /// The bus has ended the connection.
    pub fn answer(&mut self, serial: u32) -> Result<(Arrived, Vec<u8>)> {
        loop {
            let (arrived, body) = self.receive()?;
            if arrived.reply_serial == serial {
                return Ok((arrived, body));
            }
        }
    }
}
