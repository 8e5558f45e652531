//! Tests over a socket pair: the bus's end, and the messages that the library receives.

use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use zbus::connection::socket::{ReadHalf as _, WriteHalf as _};
use zbus::message::{Flags, Type};
use zbus::{Fd, Message};

use zbus::export::async_trait::async_trait;

use loopd_common::Pace;

use super::*;

const CALLER: &str = ":1.7";
const OTHER: &str = ":1.8";
const ROOTS: &str = ":1.10";

struct Everyone;

#[async_trait]
impl Users for Everyone {
    async fn uid(&self, sender: &str) -> Option<u32> {
        [(CALLER, 7), (OTHER, 8), (ROOTS, 0)].into_iter().find(|known| known.0 == sender).map(|known| known.1)
    }
}

struct Pair {
    bus: UnixStream,
    reader: Reader,
    writer: Writer,
    descriptors: Descriptors,
}

impl Pair {
    fn new() -> Self {
        Self::paced(Pace::new(10_000, 100))
    }

    fn paced(pace: Pace) -> Self {
        let (bus, ours) = UnixStream::pair().unwrap();
        let descriptors = Descriptors::default();
        let policy = Policy {
            longest_reply: 1 << 20,
            longest_signal: 64 << 10,
            calls: Some(CallPolicy {
                longest: 64 << 10,
                takes_descriptors: |interface, member| {
                    if (interface, member) == ("org.loopd1.Manager", "SetupLoop") { 3 } else { 0 }
                },
                users: Arc::new(Everyone),
                descriptors: descriptors.clone(),
                pace: Arc::new(pace),
                backlog: Backlog::default(),
            }),
        };
        let (reader, writer) = Transport::new(ours, policy).unwrap().split().take();
        Self { bus, reader, writer, descriptors }
    }

    fn send(&mut self, bytes: &[u8]) {
        self.bus.write_all(bytes).unwrap();
    }

    fn send_with(&self, bytes: &[u8], files: &[OwnedFd]) {
        let files: Vec<_> = files.iter().map(|file| file.as_fd()).collect();
        let mut space = vec![std::mem::MaybeUninit::uninit(); 1024];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(&files)));
        let sent = sendmsg(&self.bus, &[io::IoSlice::new(bytes)], &mut control, SendFlags::empty()).unwrap();
        assert_eq!(sent, bytes.len());
    }

    async fn next(&mut self) -> Message {
        self.try_next().await.unwrap()
    }

    async fn try_next(&mut self) -> zbus::Result<Message> {
        let (mut bytes, mut descriptors) = (Vec::new(), Vec::new());
        let next = self.reader.receive_message(1, &mut bytes, &mut descriptors);
        tokio::time::timeout(Duration::from_secs(10), next).await.unwrap()
    }

    /// Checks that the next message is this call: all before it were dropped.
    async fn next_is(&mut self, member: &str) {
        assert_eq!(self.next().await.header().member().unwrap(), member);
    }

    /// The reply to a refused call: the serial of the call, the error's name and its text.
    async fn refusal(&mut self) -> (u32, String, String) {
        let answer = self.sent().await;
        let message = reader::parse_for_tests(answer).await;
        let header = message.header();
        assert_eq!((message.message_type(), header.destination().unwrap().as_str()), (Type::Error, CALLER));
        let text = message.body().deserialize::<String>().unwrap();
        (header.reply_serial().unwrap().get(), header.error_name().unwrap().to_string(), text)
    }

    /// Waits until at least so many replies to refused calls have come; returns how many.
    async fn refusals(&mut self, at_least: usize) -> usize {
        let name = reader::INVALID_ARGS.as_bytes();
        let mut count = 0;
        while count < at_least {
            let answers = self.sent().await;
            count += answers.windows(name.len()).filter(|part| *part == name).count();
        }
        count
    }

    /// The bytes that another task sends to the bus.
    async fn sent(&mut self) -> Vec<u8> {
        self.bus.set_nonblocking(true).unwrap();
        let mut bytes = vec![0; 1 << 20];
        let received = async {
            loop {
                match self.bus.read(&mut bytes) {
                    Ok(length) => return length,
                    Err(_) => tokio::time::sleep(Duration::from_millis(1)).await,
                }
            }
        };
        let length = tokio::time::timeout(Duration::from_secs(10), received).await.expect("bytes are sent");
        self.bus.set_nonblocking(false).unwrap();
        bytes.truncate(length);
        bytes
    }

    fn is_silent(&mut self) -> bool {
        self.bus.set_nonblocking(true).unwrap();
        self.bus.read(&mut [0; 1]).is_err()
    }
}

fn call(member: &str) -> zbus::message::Builder<'_> {
    Message::method_call("/org/loopd1", member)
        .sender(CALLER)
        .destination("org.loopd1")
        .interface("org.loopd1.Manager")
}

fn bytes(message: &Message) -> Vec<u8> {
    message.data().bytes().to_vec()
}

/// A call whose header declares this signature of the body.
fn call_of(signature: &str) -> Vec<u8> {
    let mut message = bytes(&call("Deep").build(&(7_u8,)).unwrap());
    let at = message.windows(5).position(|field| field == [8, 1, b'g', 0, 1]).unwrap();
    // It is the last field.
    message.truncate(at + 4);
    message.push(u8::try_from(signature.len()).unwrap());
    message.extend(signature.as_bytes());
    message.push(0);
    let fields = u32::try_from(message.len() - 16).unwrap();
    message[12..16].copy_from_slice(&fields.to_le_bytes());
    message.resize((message.len() + 7) & !7, 0);
    message.push(7);
    message
}

fn file() -> OwnedFd {
    std::fs::File::open("/dev/null").unwrap().into()
}

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[tokio::test]
async fn a_signature_that_nests_too_deep_is_refused_and_the_next_call_is_served() {
    let mut pair = Pair::new();
    for depth in [1, 17, 33, 60] {
        pair.send(&call_of(&format!("{}y{}", "aa(".repeat(depth), ")".repeat(depth))));
        pair.send(&bytes(&call("List").build(&()).unwrap()));
        if depth == 1 {
            pair.next_is("Deep").await;
            pair.next_is("List").await;
        } else {
            pair.next_is("List").await;
            let (_, name, text) = pair.refusal().await;
            assert_eq!(name, "org.freedesktop.DBus.Error.InvalidArgs", "{text}");
        }
    }
}

#[tokio::test]
async fn a_long_call_is_refused_before_it_is_received() {
    let mut pair = Pair::new();
    let long = call("Long").build(&("x".repeat(70_000),)).unwrap();
    pair.send(&bytes(&long));
    pair.send(&bytes(&call("List").build(&()).unwrap()));
    pair.next_is("List").await;
    let (serial, name, text) = pair.refusal().await;
    assert_eq!(serial, long.primary_header().serial_num().get());
    assert!(name.ends_with("LimitsExceeded") && text.contains("65536"), "{name}: {text}");
    let silent = call("Long").with_flags(Flags::NO_REPLY_EXPECTED);
    pair.send(&bytes(&silent.build(&("x".repeat(70_000),)).unwrap()));
    pair.send(&bytes(&call("List").build(&()).unwrap()));
    pair.next_is("List").await;
    assert!(pair.is_silent());
}

#[tokio::test]
async fn a_reply_that_is_too_long_fails_its_call() {
    let mut pair = Pair::new();
    let question = call("Question").build(&()).unwrap();
    let answer =
        Message::method_return(&question.header()).sender(":1.9").build(&"x".repeat(2 << 20)).unwrap();
    let mut whole = bytes(&answer);
    let mut bus = pair.bus.try_clone().unwrap();
    let sender = std::thread::spawn(move || bus.write_all(&std::mem::take(&mut whole)).unwrap());
    let message = pair.next().await;
    sender.join().unwrap();
    assert_eq!(message.message_type(), Type::Error);
    assert_eq!(message.header().reply_serial(), Some(question.primary_header().serial_num()));
}

#[tokio::test]
async fn a_reply_that_cannot_be_parsed_fails_its_call() {
    let mut pair = Pair::new();
    let question = call("Question").build(&()).unwrap();
    let mut answer = bytes(&Message::method_return(&question.header()).sender(":1.9").build(&()).unwrap());
    // An unknown protocol version.
    answer[3] = 9;
    pair.send(&answer);
    let message = pair.next().await;
    assert_eq!(message.message_type(), Type::Error);
    assert_eq!(message.header().reply_serial(), Some(question.primary_header().serial_num()));
}

#[tokio::test]
async fn unicast_signals_are_accepted_only_from_the_bus() {
    let mut pair = Pair::new();
    let signal = |sender: &'static str, member: &'static str| {
        let signal = Message::signal("/", "org.freedesktop.DBus", member).sender(sender);
        bytes(&signal.destination(":1.1").build(&()).unwrap())
    };
    pair.send(&signal(":1.66", "NameLost"));
    pair.send(&signal("org.freedesktop.DBus", "NameAcquired"));
    pair.next_is("NameAcquired").await;
    let broadcast = Message::signal("/", "org.freedesktop.systemd1.Manager", "JobRemoved").sender(":1.2");
    pair.send(&bytes(&broadcast.build(&()).unwrap()));
    pair.next_is("JobRemoved").await;
}

#[tokio::test]
async fn messages_of_unknown_types_are_ignored() {
    let mut pair = Pair::new();
    let mut unknown = bytes(&call("Unknown").build(&()).unwrap());
    unknown[1] = 5;
    pair.send(&unknown);
    pair.send(&bytes(&call("List").build(&()).unwrap()));
    pair.next_is("List").await;
    assert!(pair.is_silent());
}

#[tokio::test]
async fn the_handshake_receives_line_by_line_and_no_part_of_a_message() {
    let mut pair = Pair::new();
    let message = bytes(&call("List").build(&()).unwrap());
    pair.send(&[b"OK 0123\r\nAGREE_UNIX_FD\r\n", &message[..]].concat());
    for line in ["OK 0123\r\n", "AGREE_UNIX_FD\r\n"] {
        let mut buffer = [0; 1024];
        let (length, _) = pair.reader.recvmsg(&mut buffer).await.unwrap();
        assert_eq!(&buffer[..length], line.as_bytes());
    }
    pair.next_is("List").await;
    pair.send(b"OK 01");
    pair.bus.shutdown(std::net::Shutdown::Both).unwrap();
    let mut buffer = [0; 1024];
    let (length, _) = pair.reader.recvmsg(&mut buffer).await.unwrap();
    assert_eq!(&buffer[..length], b"OK 01");
    assert!(pair.reader.recvmsg(&mut buffer).await.is_err());
}

#[tokio::test]
async fn an_invalid_message_ends_the_connection() {
    let mut pair = Pair::new();
    pair.send(b"HTTP/1.1 400 Bad Request");
    assert!(pair.try_next().await.is_err());
}

#[tokio::test]
async fn a_truncated_message_ends_the_connection() {
    for length in [1, 15, 17, 40] {
        let mut pair = Pair::new();
        pair.send(&bytes(&call("List").build(&()).unwrap())[..length]);
        pair.bus.shutdown(std::net::Shutdown::Both).unwrap();
        assert!(pair.try_next().await.is_err(), "{length}");
    }
}

#[tokio::test]
async fn a_message_in_many_pieces_is_received() {
    let mut pair = Pair::new();
    let message = bytes(&call("List").build(&("x".repeat(300),)).unwrap());
    let mut bus = pair.bus.try_clone().unwrap();
    let sender = std::thread::spawn(move || {
        for piece in message.chunks(7) {
            bus.write_all(piece).unwrap();
            std::thread::sleep(Duration::from_millis(1));
        }
    });
    pair.next_is("List").await;
    sender.join().unwrap();
}

#[tokio::test]
async fn descriptors_are_received_if_the_member_takes_them() {
    let mut pair = Pair::new();
    let file = file();
    let files = [file.as_fd(), file.as_fd()].map(Fd::from);
    let message = call("SetupLoop").build(&(&files[0], &files[1])).unwrap();
    pair.send_with(&bytes(&message), &[file.try_clone().unwrap(), file.try_clone().unwrap()]);
    let message = pair.next().await;
    let (first, second): (zbus::OwnedFd, zbus::OwnedFd) = message.body().deserialize().unwrap();
    let claimed = pair.descriptors.claim(&first).unwrap();
    let link = std::fs::read_link(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&*claimed)));
    assert_eq!(link.unwrap().to_str(), Some("/dev/null"));
    // The reply drops the unclaimed one.
    pair.writer.send_message(&Message::method_return(&message.header()).build(&()).unwrap()).await.unwrap();
    assert!(pair.descriptors.claim(&second).is_none());
}

#[tokio::test]
async fn unexpected_descriptors_are_never_installed() {
    let mut pair = Pair::new();
    let file = file();
    let descriptor = Fd::from(file.as_fd());
    let message = bytes(&call("Detach").build(&(&descriptor,)).unwrap());
    let before = open_descriptors();
    pair.send_with(&message, &[file.try_clone().unwrap()]);
    pair.send(&bytes(&call("List").build(&()).unwrap()));
    pair.next_is("List").await;
    let (_, name, text) = pair.refusal().await;
    assert!(name.ends_with("InvalidArgs") && text.contains("Detach takes at most 0"), "{name}: {text}");
    assert!(open_descriptors() <= before + 8, "other tests open some as well");
    // The same for signals, and for messages that have more descriptors than their header declares.
    let signal = Message::signal("/", "org.example.A", "B").sender(":1.2").build(&()).unwrap();
    pair.send_with(&bytes(&signal), &[file.try_clone().unwrap()]);
    let message = pair.next().await;
    assert_eq!(message.data().fds().len(), 0);
}

#[tokio::test]
async fn descriptors_that_are_missing_fail_the_call() {
    let mut pair = Pair::new();
    let file = file();
    let descriptors = [file.as_fd(), file.as_fd()].map(Fd::from);
    let message = bytes(&call("SetupLoop").build(&(&descriptors[0], &descriptors[1])).unwrap());
    pair.send_with(&message, &[file.try_clone().unwrap()]);
    pair.send(&bytes(&call("List").build(&()).unwrap()));
    pair.next_is("List").await;
    let (_, name, text) = pair.refusal().await;
    assert!(name.ends_with("LimitExceeded") && text.contains("too many files open"), "{name}: {text}");
}

#[tokio::test]
async fn a_reply_that_is_too_long_for_the_bus_becomes_an_error() {
    let mut pair = Pair::new();
    pair.send(&bytes(&call("List").build(&()).unwrap()));
    let message = pair.next().await;
    let answer = Message::method_return(&message.header()).build(&"x".repeat(32 << 20)).unwrap();
    pair.writer.send_message(&answer).await.unwrap();
    let (_, name, text) = pair.refusal().await;
    assert!(name.ends_with("LimitsExceeded") && text.contains("bytes"), "{name}: {text}");
}

#[tokio::test]
async fn calls_that_expect_no_reply_end_too() {
    let mut pair = Pair::new();
    let silent = call("List").with_flags(Flags::NO_REPLY_EXPECTED).build(&()).unwrap();
    for _ in 0..3000 {
        pair.send(&bytes(&silent));
        let message = pair.next().await;
        assert_eq!(message.header().member().unwrap(), "List");
        let answer = Message::method_return(&message.header()).build(&()).unwrap();
        pair.writer.send_message(&answer).await.unwrap();
    }
    assert!(pair.is_silent());
}

/// One call a second, and five at once: no others begin during the test.
#[tokio::test]
async fn a_flood_delays_no_other_user() {
    const FLOOD: usize = 300;
    let mut pair = Pair::paced(Pace::new(1, 5));
    // In one write: each message by itself takes a lot of the socket's buffer.
    let flood: Vec<u8> = (0..FLOOD).flat_map(|_| bytes(&call("Flood").build(&()).unwrap())).collect();
    pair.send(&flood);
    let question = call("Question").build(&()).unwrap();
    pair.send(&bytes(&Message::method_return(&question.header()).sender(":1.9").build(&()).unwrap()));
    pair.send(&bytes(&call("OfOther").sender(OTHER).build(&()).unwrap()));
    for _ in 0..10 {
        pair.send(&bytes(&call("OfRoot").sender(ROOTS).build(&()).unwrap()));
    }
    let mut before = Vec::new();
    for _ in 0..FLOOD {
        let message = pair.next().await;
        let member = message.header().member().map(ToString::to_string);
        before.push(member.unwrap_or_else(|| "answer".to_owned()));
        if before.iter().filter(|member| *member == "OfRoot").count() == 10 {
            break;
        }
    }
    let count = |wanted: &str| before.iter().filter(|member| *member == wanted).count();
    assert_eq!((count("answer"), count("OfOther"), count("OfRoot")), (1, 1, 10), "{before:?}");
    assert!((5..10).contains(&count("Flood")), "{before:?}");
}

/// What is refused at once would be called again at once.
#[tokio::test]
async fn refusals_of_a_user_are_paced_and_delay_no_other_user() {
    let mut pair = Pair::new();
    let file = file();
    let refused =
        |sender: &str| bytes(&call("Detach").sender(sender).build(&(Fd::from(file.as_fd()),)).unwrap());
    let start = std::time::Instant::now();
    for _ in 0..100 {
        pair.send_with(&refused(CALLER), &[file.try_clone().unwrap()]);
    }
    pair.send_with(&refused(OTHER), &[file.try_clone().unwrap()]);
    pair.send_with(&refused(ROOTS), &[file.try_clone().unwrap()]);
    pair.send(&bytes(&call("List").build(&()).unwrap()));
    pair.next_is("List").await;
    // A burst of the one, and those of the others.
    const AT_ONCE: usize = 64 + 2;
    let mut sent = pair.refusals(AT_ONCE).await;
    loop {
        let paced = u32::try_from(sent - AT_ONCE).unwrap();
        assert!(start.elapsed() >= paced * Duration::from_millis(10), "{sent} are too many");
        if sent == 102 {
            break;
        }
        // Receiving also sends the replies whose time has come.
        let _no_message = tokio::time::timeout(Duration::from_millis(20), pair.next()).await;
        sent += pair.refusals(1).await;
    }
}

#[tokio::test]
async fn calls_of_a_user_keep_their_order() {
    let mut pair = Pair::paced(Pace::new(1000, 5));
    let members: Vec<String> = (0..50).map(|number| format!("Call{number}")).collect();
    for member in &members {
        pair.send(&bytes(&call(member).build(&()).unwrap()));
    }
    for member in &members {
        pair.next_is(member).await;
    }
}

/// Descriptors of a queued call count, and are dropped if it cannot be parsed.
#[tokio::test]
async fn a_queued_call_that_cannot_be_parsed_is_refused_in_order() {
    let mut pair = Pair::paced(Pace::new(20, 1));
    pair.send(&bytes(&call("List").build(&()).unwrap()));
    pair.next_is("List").await;
    let calls = pair.reader.calls_for_tests();
    pair.send(&call_of(&format!("{}y{}", "aa(".repeat(33), ")".repeat(33))));
    pair.send(&bytes(&call("After").build(&()).unwrap()));
    pair.next_is("After").await;
    let (_, name, text) = pair.refusal().await;
    assert_eq!(name, "org.freedesktop.DBus.Error.InvalidArgs", "{text}");
    assert_eq!(calls.of_sender(CALLER), 2, "the calls that are not answered yet");
}
