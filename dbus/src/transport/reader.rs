//! Receives messages from the bus.

use std::fmt::Display;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, warn};
use zbus::Message;
use zbus::connection::socket::ReadHalf;
use zbus::export::async_trait::async_trait;

use super::calls::{Call, Calls};
use super::header::{self, FIXED, Head, Kind, Lengths, Parts};
use super::policy::{CallPolicy, Policy};
use super::queue::{Queue, QueuedCall, Waiting};
use super::{stream, values};
use crate::ErrorKind;
use loopd_common::{CallerFile, Pace};

/// What a call with descriptors costs the bus, loopd and polkit, in calls without descriptors.
const WORK_WITH_DESCRIPTORS: u32 = 10;
/// How many refused calls of a uid other than root get their replies in a second, and how many at once after a rest. A client
/// that calls again as soon as it is refused would keep the bus busy otherwise.
const REFUSALS_PER_SECOND: u32 = 100;
const REFUSALS_AT_ONCE: u32 = 64;
/// A reply to a refused call that would have to wait longer is not sent.
const LONGEST_WAIT_OF_A_REFUSAL: Duration = Duration::from_secs(5);
/// The longest header. The known headers have a few hundred bytes; names have at most 255.
const LONGEST_HEADER: usize = 16 << 10;
/// Calls of this uid never wait.
const ROOT: u32 = 0;
/// The sender name of the bus itself, which no client can have.
const BUS: &str = "org.freedesktop.DBus";
const LIMITS_EXCEEDED: &str = "org.freedesktop.DBus.Error.LimitsExceeded";
/// The error of a call that refers to a descriptor more than once.
pub const USED_TWICE: &str = "a file descriptor is used twice in this call; pass each one once";
pub(super) const INVALID_ARGS: &str = "org.freedesktop.DBus.Error.InvalidArgs";
/// A long message is allocated step by step as it arrives, so much at a time.
const CHUNK: usize = 256 << 10;

/// Receives messages, and passes those that the library can parse.
#[derive(Debug)]
pub struct Reader {
    stream: Arc<UnixStream>,
    policy: Policy,
    calls: Arc<Calls>,
    queue: Queue,
    refusals: mpsc::Sender<Vec<u8>>,
    refusal_pace: Pace,
    scratch: Vec<u8>,
    log: Log,
}

/// What to do with a message.
enum Verdict {
    /// Pass it to the library.
    Pass,
    /// A call of this user: queue it.
    Queue(u32),
    /// Drop it.
    Ignore(&'static str),
    /// Drop it. The caller, or our call that it replies to, gets this error.
    Refuse(Refusal),
}

/// The error that replaces a message.
struct Refusal {
    name: &'static str,
    text: String,
}

impl Refusal {
    fn new(name: &'static str, text: impl Into<String>) -> Self {
        Self { name, text: text.into() }
    }
}

impl Reader {
    pub(super) fn new(
        stream: Arc<UnixStream>,
        policy: Policy,
        calls: Arc<Calls>,
        refusals: mpsc::Sender<Vec<u8>>,
    ) -> Self {
        let backlog = policy.calls.as_ref().map(|calls| calls.backlog.clone()).unwrap_or_default();
        let queue = Queue::new(backlog);
        let refusal_pace = Pace::new(REFUSALS_PER_SECOND, REFUSALS_AT_ONCE);
        Self {
            stream,
            policy,
            calls,
            queue,
            refusals,
            refusal_pace,
            scratch: Vec::new(),
            log: Log::default(),
        }
    }

    /// The next message that passes, or the error that replaces a reply.
    async fn next(&mut self, sequence: u64) -> zbus::Result<Message> {
        loop {
            match self.queue.pop() {
                Some(Waiting::Call(call)) => match self.parse_call(call, sequence).await {
                    Some(message) => return Ok(message),
                    None => continue,
                },
                Some(Waiting::Refusal(reply)) => {
                    self.send_refusal(reply);
                    continue;
                }
                None => {}
            }
            let mut fixed = [0; FIXED];
            tokio::select! {
                arrived = stream::peek(&self.stream, &mut fixed) => arrived?,
                () = due(self.queue.next()) => continue,
            }
            if let Some(message) = self.take(&fixed, sequence).await? {
                return Ok(message);
            }
        }
    }

    /// Receives the message with this fixed part. Returns it unless it was queued or dropped.
    async fn take(&mut self, fixed: &[u8; FIXED], sequence: u64) -> zbus::Result<Option<Message>> {
        // Without a length the start of the next message is unknown.
        let lengths = Lengths::read(fixed).ok_or_else(|| {
            io::Error::new(io::ErrorKind::InvalidData, "the bus has sent an invalid message")
        })?;
        let mut start = vec![0; lengths.header.min(LONGEST_HEADER)];
        stream::peek(&self.stream, &mut start).await?;
        let head = Head::read(&start);
        let verdict = self.judge(&head, lengths).await;
        let parts = Parts::from(&head);
        let refusal = match verdict {
            Verdict::Pass => match self.pass(&head, &parts, lengths, sequence).await? {
                Ok(message) => return Ok(Some(message)),
                Err(refusal) => refusal,
            },
            Verdict::Queue(uid) => match self.enqueue(uid, &head, parts.clone(), lengths).await? {
                Ok(()) => return Ok(None),
                Err(refusal) => refusal,
            },
            Verdict::Ignore(why) => {
                self.skip(lengths.message).await?;
                self.log.record(&parts, &why);
                return Ok(None);
            }
            Verdict::Refuse(refusal) => {
                self.skip(lengths.message).await?;
                refusal
            }
        };
        self.log.record(&parts, &refusal.text);
        if parts.kind == Kind::Call {
            self.refuse_call(&parts, &refusal).await;
            return Ok(None);
        }
        match refused_reply(&parts, &refusal) {
            Some(error) => parse(error, Vec::new(), sequence).await.map(Some),
            None => Ok(None),
        }
    }

    async fn judge(&self, head: &Head<'_>, lengths: Lengths) -> Verdict {
        match (head.kind, &self.policy.calls) {
            (Kind::Call, Some(policy)) => self.judge_call(head, lengths, policy).await,
            (Kind::Call, None) => Verdict::Ignore("this connection has no objects"),
            (Kind::Unknown, _) => Verdict::Ignore("its type is unknown"),
            // Only broadcasts that match a subscription arrive.
            (Kind::Signal, _) if head.destination.is_some() && head.sender != Some(BUS) => {
                Verdict::Ignore("it is a unicast signal that is not from the bus")
            }
            (Kind::Signal, _) => bounded(lengths, self.policy.longest_signal),
            (Kind::Return | Kind::Error, _) => bounded(lengths, self.policy.longest_reply),
        }
    }

    async fn judge_call(&self, head: &Head<'_>, lengths: Lengths, policy: &CallPolicy) -> Verdict {
        let Some(sender) = head.sender else { return Verdict::Ignore("it has no sender") };
        if let Verdict::Refuse(refusal) = bounded(lengths, policy.longest) {
            return Verdict::Refuse(refusal);
        }
        if let Some(why) = self.calls.refusal(sender, head.serial, lengths.message) {
            return Verdict::Refuse(Refusal::new(LIMITS_EXCEEDED, why));
        }
        let wanted = head.descriptors;
        let (interface, member) = (head.interface.unwrap_or_default(), head.member.unwrap_or_default());
        let taken = (policy.takes_descriptors)(interface, member);
        if wanted > taken {
            let text =
                format!("{member} takes at most {taken} file descriptors, and the message has {wanted}");
            return Verdict::Refuse(Refusal::new(INVALID_ARGS, text));
        }
        let Some(uid) = policy.users.uid(sender).await else {
            return Verdict::Ignore("its sender has disconnected");
        };
        if let Some(why) = self.calls.refusal_of_uid(uid, lengths.message) {
            return Verdict::Refuse(Refusal::new(LIMITS_EXCEEDED, why));
        }
        match policy.descriptors.closer().refusal(uid, wanted as usize) {
            Some(why) if wanted > 0 => Verdict::Refuse(Refusal::new(ErrorKind::LimitExceeded.name(), why)),
            _ => Verdict::Queue(uid),
        }
    }

    /// Receives a reply or a signal.
    async fn pass(
        &self,
        head: &Head<'_>,
        parts: &Parts,
        lengths: Lengths,
        sequence: u64,
    ) -> zbus::Result<Result<Message, Refusal>> {
        let message = self.receive(lengths.message, None).await?;
        // Calls are limited by their length.
        if exceeds_limits(head, lengths, &message) {
            let text = format!(
                "a message has too many values or too long a text: the limits are {} and {} bytes",
                values::MOST,
                values::LONGEST_TEXT
            );
            return Ok(Err(Refusal::new(LIMITS_EXCEEDED, text)));
        }
        let message = header::normalize(message, parts);
        Ok(parse(message, Vec::new(), sequence).await.map_err(|error| unreadable(&error)))
    }

    /// Receives a call and queues it after the other calls of its user.
    async fn enqueue(
        &mut self,
        uid: u32,
        head: &Head<'_>,
        parts: Parts,
        lengths: Lengths,
    ) -> zbus::Result<Result<(), Refusal>> {
        let descriptors = head.descriptors;
        let mut files = Vec::new();
        let message = self.receive(lengths.message, (descriptors > 0).then_some(&mut files)).await?;
        let Some(policy) = &self.policy.calls else { return Ok(Ok(())) };
        let files = files.into_iter().map(|file| policy.descriptors.closer().adopt(uid, file)).collect();
        if descriptors > 0 && handles(head, lengths, &message) > descriptors as usize {
            return Ok(Err(Refusal::new(INVALID_ARGS, USED_TWICE)));
        }
        let message = header::normalize(message, &parts);
        let (placeholders, keys) = match keep(policy, files, descriptors) {
            Ok(kept) => kept,
            Err(refusal) => return Ok(Err(refusal)),
        };
        let begin = if uid == ROOT {
            Instant::now()
        } else {
            let work = if descriptors > 0 { WORK_WITH_DESCRIPTORS } else { 1 };
            policy.pace.book(Instant::now().into_std(), policy.users.payer(uid), work).into()
        };
        let call = Call { uid, bytes: lengths.message, wants_reply: parts.wants_reply, descriptors: keys };
        self.calls.begin(parts.sender.as_deref().unwrap_or_default(), parts.serial, call);
        self.queue.push(begin, QueuedCall { message, placeholders, parts });
        Ok(Ok(()))
    }

    /// Passes a queued call to the library's parser. A call that cannot be parsed is refused.
    async fn parse_call(&mut self, call: QueuedCall, sequence: u64) -> Option<Message> {
        let QueuedCall { message, placeholders, parts } = call;
        match parse(message, placeholders, sequence).await {
            Ok(message) => Some(message),
            Err(error) => {
                let ended = self.calls.end(parts.sender.as_deref().unwrap_or_default(), parts.serial);
                if let (Some(ended), Some(policy)) = (ended, &self.policy.calls) {
                    policy.descriptors.release(&ended.descriptors);
                }
                let refusal = unreadable(&error);
                self.log.record(&parts, &refusal.text);
                if parts.wants_reply {
                    self.send_refusal(error_reply(&parts, &refusal));
                }
                None
            }
        }
    }

    async fn receive(
        &self,
        length: usize,
        mut descriptors: Option<&mut Vec<OwnedFd>>,
    ) -> io::Result<Vec<u8>> {
        let mut message = Vec::new();
        while message.len() < length {
            let start = message.len();
            message.resize(length.min(start + CHUNK), 0);
            let space = &mut message[start..];
            let received = match &mut descriptors {
                Some(descriptors) => {
                    stream::receive_with_descriptors(&self.stream, space, descriptors).await?
                }
                None => stream::receive(&self.stream, space).await?,
            };
            message.truncate(start + received);
        }
        Ok(message)
    }

    async fn skip(&mut self, mut length: usize) -> io::Result<()> {
        self.scratch.resize(CHUNK.min(length), 0);
        while length > 0 {
            let space = length.min(self.scratch.len());
            length -= stream::receive(&self.stream, &mut self.scratch[..space]).await?;
        }
        self.scratch = Vec::new();
        Ok(())
    }

    /// Replies to a dropped call with an error, at the pace of its user's refusals.
    async fn refuse_call(&mut self, call: &Parts, refusal: &Refusal) {
        let (Some(policy), Some(sender)) = (&self.policy.calls, call.sender.as_deref()) else { return };
        if !call.wants_reply {
            return;
        }
        let Some(uid) = policy.users.uid(sender).await else { return };
        let now = Instant::now();
        let begin = if uid == ROOT {
            now
        } else {
            self.refusal_pace.book(now.into_std(), policy.users.payer(uid), 1).into()
        };
        let is_sent = begin - now <= LONGEST_WAIT_OF_A_REFUSAL
            && self.queue.push_refusal(begin, error_reply(call, refusal));
        if !is_sent {
            debug!(uid, "a refused call gets no reply: too many are waiting to be sent");
        }
    }

    fn send_refusal(&self, reply: Vec<u8>) {
        if self.refusals.try_send(reply).is_err() {
            debug!("a refused call gets no reply: too many are waiting to be sent");
        }
    }
}

/// The error reply to a refused call.
fn error_reply(call: &Parts, refusal: &Refusal) -> Vec<u8> {
    header::error(call.serial, call.sender.as_deref(), refusal.name, &refusal.text)
}

/// The error that replaces a dropped reply, for our call that it replies to.
fn refused_reply(reply: &Parts, refusal: &Refusal) -> Option<Vec<u8>> {
    let serial = reply.reply_serial.filter(|_| reply.kind.is_reply())?;
    Some(header::error(serial, None, refusal.name, &refusal.text))
}

fn bounded(lengths: Lengths, longest: usize) -> Verdict {
    let too_long = |what, length, longest| {
        let text = format!("{what} of {length} bytes is too long: the limit is {longest}");
        Verdict::Refuse(Refusal::new(LIMITS_EXCEEDED, text))
    };
    if lengths.header > LONGEST_HEADER {
        return too_long("a message header", lengths.header, LONGEST_HEADER);
    }
    if lengths.message > longest {
        return too_long("a message", lengths.message, longest);
    }
    Verdict::Pass
}

async fn due(next: Option<Instant>) {
    match next {
        Some(next) => sleep_until(next).await,
        None => std::future::pending().await,
    }
}

/// How many times the body of a message refers to its descriptors.
fn handles(head: &Head<'_>, lengths: Lengths, message: &[u8]) -> usize {
    let (Some(types), Some(endian)) = (head.signature, header::endian(message[0])) else { return 0 };
    message.get(lengths.header..).map_or(0, |body| values::handles(types, body, endian))
}

fn exceeds_limits(head: &Head<'_>, lengths: Lengths, message: &[u8]) -> bool {
    let (Some(types), Some(endian)) = (head.signature, header::endian(message[0])) else { return false };
    message.get(lengths.header..).is_some_and(|body| values::exceed_limits(types, body, endian))
}

fn unreadable(error: &zbus::Error) -> Refusal {
    Refusal::new(INVALID_ARGS, format!("the message cannot be read: {error}"))
}

/// Stores the descriptors of a call for its method.
fn keep(
    policy: &CallPolicy,
    files: Vec<CallerFile>,
    wanted: u32,
) -> Result<(Vec<OwnedFd>, Vec<u64>), Refusal> {
    let shortage = |reason: &dyn Display| {
        let text =
            format!("loopd cannot accept the file descriptors of this call: {reason}; try again later");
        Refusal::new(ErrorKind::LimitExceeded.name(), text)
    };
    if files.len() != wanted as usize {
        return Err(shortage(&"it has too many files open"));
    }
    policy.descriptors.keep(files).map_err(|error| shortage(&error))
}

/// Parses a message with the library.
async fn parse(bytes: Vec<u8>, descriptors: Vec<OwnedFd>, sequence: u64) -> zbus::Result<Message> {
    Whole { bytes, read: 0, descriptors }.receive_message(sequence, &mut Vec::new(), &mut Vec::new()).await
}

/// One message in memory, as a socket for the library's parser.
#[derive(Debug)]
struct Whole {
    bytes: Vec<u8>,
    read: usize,
    descriptors: Vec<OwnedFd>,
}

#[async_trait]
impl ReadHalf for Whole {
    async fn recvmsg(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        let left = &self.bytes[self.read..];
        let length = left.len().min(buffer.len());
        buffer[..length].copy_from_slice(&left[..length]);
        self.read += length;
        Ok((length, std::mem::take(&mut self.descriptors)))
    }
}

#[async_trait]
impl ReadHalf for Reader {
    async fn receive_message(
        &mut self,
        sequence: u64,
        already_received: &mut Vec<u8>,
        _: &mut Vec<OwnedFd>,
    ) -> zbus::Result<Message> {
        if !already_received.is_empty() {
            return Err(zbus::Error::Handshake("the bus has sent more than was requested".to_owned()));
        }
        self.next(sequence).await
    }

    /// Only for the handshake: byte by byte, so that it receives no part of a message.
    async fn recvmsg(&mut self, buffer: &mut [u8]) -> io::Result<(usize, Vec<OwnedFd>)> {
        let one = buffer.len().min(1);
        Ok((stream::receive(&self.stream, &mut buffer[..one]).await?, Vec::new()))
    }

    fn can_pass_unix_fd(&self) -> bool {
        true
    }
}

/// Logs dropped messages, at most one line a second.
#[derive(Debug, Default)]
struct Log {
    last: Option<Instant>,
    skipped: usize,
}

impl Log {
    fn record(&mut self, message: &Parts, why: &dyn Display) {
        const PAUSE: Duration = Duration::from_secs(1);
        if self.last.is_some_and(|last| last.elapsed() < PAUSE) {
            self.skipped += 1;
            return;
        }
        let Parts { kind, sender, .. } = message;
        let sender = sender.as_deref().unwrap_or("unknown");
        warn!(more = self.skipped, "message dropped ({kind:?} from {sender:?}): {why}");
        self.last = Some(Instant::now());
        self.skipped = 0;
    }
}

#[cfg(test)]
pub(super) async fn parse_for_tests(bytes: Vec<u8>) -> Message {
    parse(bytes, Vec::new(), 1).await.unwrap()
}

#[cfg(test)]
impl Reader {
    pub(super) fn calls_for_tests(&self) -> Arc<Calls> {
        Arc::clone(&self.calls)
    }
}
