//! A service that owns loopd's name and sends malformed replies, generated from a seed so that a run can be
//! repeated.

use std::os::fd::AsFd as _;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use fastrand::Rng;
use loopd_dbus::names::{ATTACHMENT, BUS_NAME, PARTITION, ROOT_PATH, VOLUME};

use crate::raw_bus::{Arrived, Bytes, RawBus, RawMessage, Value};

const BUS: &str = "org.freedesktop.DBus";
const OBJECT_MANAGER: &str = "org.freedesktop.DBus.ObjectManager";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
/// A little less than the limit of the bus.
const HUGE: usize = 31 << 20;

/// The properties of attachments, volumes and partitions, and their types.
const PROPERTIES_SENT: [(&str, &str); 34] = [
    ("Device", "s"),
    ("Number", "u"),
    ("DiskSequence", "t"),
    ("BackingFile", "ay"),
    ("BackingDevice", "t"),
    ("BackingInode", "t"),
    ("Offset", "t"),
    ("SizeLimit", "t"),
    ("Reference", "s"),
    ("ReadOnly", "b"),
    ("DirectIo", "b"),
    ("BlockSize", "u"),
    ("PartitionScan", "b"),
    ("Autoclear", "b"),
    ("Lifetime", "s"),
    ("Managed", "b"),
    ("Owner", "u"),
    ("Client", "s"),
    ("Since", "t"),
    ("State", "s"),
    ("Warnings", "a(sa{sv})"),
    ("Size", "t"),
    ("Usage", "s"),
    ("FilesystemType", "s"),
    ("FilesystemVersion", "s"),
    ("FilesystemLabel", "s"),
    ("FilesystemUuid", "s"),
    ("MountPoints", "aay"),
    ("Table", "s"),
    ("Type", "s"),
    ("Uuid", "s"),
    ("Label", "s"),
    ("Attachment", "o"),
    ("Version", "s"),
];

/// The running service. It releases its name when dropped.
#[derive(Debug)]
pub struct HostileService {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<Result<()>>>,
}

#[derive(Debug)]
struct Shared {
    random: Mutex<Rng>,
    answered: AtomicU64,
    ended: AtomicBool,
}

impl HostileService {
    /// Acquires the name on this bus.
    ///
    /// # Errors
    /// Another connection owns it.
    pub fn start(address: &str) -> Result<Self> {
        let shared = Arc::new(Shared {
            random: Mutex::new(Rng::with_seed(0)),
            answered: AtomicU64::new(0),
            ended: AtomicBool::new(false),
        });
        let (bus, address, service) = (own_name(address)?, address.to_owned(), Arc::clone(&shared));
        let thread = std::thread::spawn(move || serve(bus, &address, &service));
        Ok(Self { shared, thread: Some(thread) })
    }

    /// Sets the seed of further replies.
    pub fn seed(&self, seed: u64) {
        *self.shared.random.lock().unwrap_or_else(PoisonError::into_inner) = Rng::with_seed(seed);
    }

    /// The number of calls that it has answered.
    #[must_use]
    pub fn answered(&self) -> u64 {
        self.shared.answered.load(Ordering::Relaxed)
    }

    /// Releases the name.
    ///
    /// # Errors
    /// The service has failed.
    pub fn stop(mut self) -> Result<()> {
        self.shared.ended.store(true, Ordering::Relaxed);
        self.thread.take().map_or(Ok(()), |thread| thread.join().expect("no panic"))
    }
}

impl Drop for HostileService {
    fn drop(&mut self) {
        self.shared.ended.store(true, Ordering::Relaxed);
    }
}

fn own_name(address: &str) -> Result<RawBus> {
    let mut bus = RawBus::connect(address)?;
    let mut body = Bytes::new(false);
    body.text(BUS_NAME.as_bytes());
    body.number(0);
    let mut call = RawMessage::call(BUS, "/org/freedesktop/DBus", BUS, "RequestName").body("su", body.bytes);
    call.serial = bus.next_serial();
    bus.send(&call.bytes(), &[])?;
    let (answer, body) = bus.answer(call.serial)?;
    ensure!(answer.error.is_empty() && body.first() == Some(&1), "{BUS_NAME} is taken: {answer:?}");
    Ok(bus)
}

fn serve(mut bus: RawBus, address: &str, shared: &Shared) -> Result<()> {
    // The call to the bus after the last reply, and its time.
    let mut asked: Option<(u32, Instant)> = None;
    while !shared.ended.load(Ordering::Relaxed) {
        let served = match bus.is_readable(Duration::from_millis(20))? {
            true => serve_one(&mut bus, &mut asked, shared),
            false => Ok(()),
        };
        // The bus has closed the connection or waits for the rest of a message: it sends the caller an error.
        if served.is_err() || asked.is_some_and(|(_, when)| when.elapsed() > Duration::from_secs(1)) {
            drop(bus);
            bus = own_name(address)?;
            asked = None;
        }
    }
    Ok(())
}

fn serve_one(bus: &mut RawBus, asked: &mut Option<(u32, Instant)>, shared: &Shared) -> Result<()> {
    let (message, _) = bus.receive()?;
    if asked.is_some_and(|(serial, _)| serial == message.reply_serial) {
        *asked = None;
    }
    if message.kind == 1 {
        answer(bus, &message, &mut shared.random.lock().unwrap_or_else(PoisonError::into_inner))?;
        shared.answered.fetch_add(1, Ordering::Relaxed);
        *asked = Some((bus.call_bus("GetId")?, Instant::now()));
    }
    Ok(())
}

fn answer(bus: &mut RawBus, call: &Arrived, random: &mut Rng) -> Result<()> {
    for _ in 0..random.usize(..4) {
        let mut signal = signal(random);
        signal.serial = bus.next_serial();
        bus.send(&signal.bytes(), &[])?;
    }
    let mut reply = reply(call, random);
    reply.serial = bus.next_serial();
    let mut bytes = reply.bytes();
    if random.u8(..4) == 0 {
        mutate(&mut bytes, reply.body.len(), random);
    }
    if random.u8(..16) == 0 {
        let file = std::fs::File::open("/dev/null")?;
        let count = reply.descriptors(1);
        bus.send(&count.bytes(), &[file.as_fd()])?;
    } else {
        bus.send(&bytes, &[])?;
    }
    // In case the bus did not accept that as a reply. It drops a second reply to the same call.
    let mut last = failure(call, "org.example.Last", b"the last word");
    last.serial = bus.next_serial();
    Ok(bus.send(&last.bytes(), &[])?)
}

/// Changes the body, and sometimes the header: most changes of a header end the connection.
fn mutate(bytes: &mut [u8], body: usize, random: &mut Rng) {
    let start = if random.u8(..16) == 0 { 0 } else { bytes.len() - body };
    for _ in 0..random.usize(1..6) {
        if start < bytes.len() {
            let at = random.usize(start..bytes.len());
            bytes[at] = random.u8(..);
        }
    }
}

fn to_caller(call: &Arrived, kind: u8) -> RawMessage {
    let mut reply = RawMessage::call(&call.sender, "/", BUS_NAME, "None");
    reply.kind = kind;
    reply.fields.retain(|(code, ..)| *code == 6);
    reply.fields.push((5, b'u', Value::Number(call.serial)));
    reply
}

fn failure(call: &Arrived, name: &str, text: &[u8]) -> RawMessage {
    let mut reply = to_caller(call, 3);
    reply.fields.push((4, b's', Value::Text(name.as_bytes().to_vec())));
    let mut body = Bytes::new(reply.big);
    body.text(text);
    reply.body("s", body.bytes)
}

fn reply(call: &Arrived, random: &mut Rng) -> RawMessage {
    let expected = match call.member.as_str() {
        "List" => "a(oa{sv})",
        "SetupLoop" => "os",
        "GetManagedObjects" => "a{oa{sa{sv}}}",
        "GetAll" => "a{sv}",
        "Get" => "v",
        "FindFree" | "Mount" | "Introspect" => "s",
        _ => "",
    };
    let big = random.u8(..4) == 0;
    let mut reply = to_caller(call, 2);
    reply.big = big;
    if random.u8(..8) == 0 {
        reply.fields.push((random.u8(10..), b's', Value::Text(b"unknown".to_vec())));
    }
    match random.u8(..100) {
        0..60 => {
            let body = Maker::new(random, big).body(expected);
            reply.body(expected, body)
        }
        60..75 => {
            let signature = signature(random);
            let body = Maker::new(random, big).body(&signature);
            reply.body(&signature, body)
        }
        75..77 => {
            let signature = if expected.is_empty() { "v" } else { expected };
            let body = Maker::huge(random, big).body(signature);
            reply.body(signature, body)
        }
        77..80 => {
            // The value does not have the declared type.
            let body = (0..random.usize(..64)).map(|_| random.u8(..)).collect();
            reply.body(if expected.is_empty() { "as" } else { expected }, body)
        }
        _ => {
            let names = [
                "org.loopd1.Error.NotAttached",
                "org.loopd1.Error.Busy",
                "org.loopd1.Error.NoSuchThing",
                "org.freedesktop.DBus.Error.AccessDenied",
                "org.freedesktop.DBus.Error.UnknownMethod",
                "org.freedesktop.DBus.Error.NoReply",
                "a.b",
            ];
            let name = names[random.usize(..names.len())];
            let mut text = text(random).into_bytes();
            if random.u8(..10) == 0 {
                text = text.repeat(1 << 16);
            }
            failure(call, name, &text)
        }
    }
}

/// A broadcast like those of the daemon.
fn signal(random: &mut Rng) -> RawMessage {
    let signals = [
        (ROOT_PATH, OBJECT_MANAGER, "InterfacesAdded", "oa{sa{sv}}"),
        (ROOT_PATH, OBJECT_MANAGER, "InterfacesRemoved", "oas"),
        ("/org/loopd1/attachment/1", PROPERTIES, "PropertiesChanged", "sa{sv}as"),
        ("/org/loopd1/attachment/1/p1", PROPERTIES, "PropertiesChanged", "sa{sv}as"),
    ];
    let (path, interface, member, expected) = signals[random.usize(..signals.len())];
    let mut signal = RawMessage::call(BUS_NAME, path, interface, member);
    signal.kind = 4;
    signal.fields.retain(|(code, ..)| *code != 6);
    signal.big = random.bool();
    let other = signature(random);
    let signature = if random.u8(..4) == 0 { &other } else { expected };
    let body = Maker::new(random, signal.big).body(signature);
    signal.body(signature, body)
}

fn signature(random: &mut Rng) -> String {
    let signatures = [
        "",
        "s",
        "v",
        "as",
        "a{sv}",
        "(os)",
        "os",
        "so",
        "oss",
        "ay",
        "aas",
        "a(oa{sv})",
        "a{oa{sa{sv}}}",
        "d",
        "tttt",
    ];
    match random.u8(..6) {
        0 => {
            let depth = random.usize(1..16);
            format!("{}y{}", "a(".repeat(depth), ")".repeat(depth))
        }
        _ => signatures[random.usize(..signatures.len())].to_owned(),
    }
}

fn text(random: &mut Rng) -> String {
    let words = [
        "/dev/loop0",
        "/dev/loop4294967296",
        "/dev/../etc/passwd",
        "",
        "\u{1b}[31mred\u{1b}[0m",
        "\u{202e}\u{2066}\u{61c}\u{200b}",
        "\r\n\t\u{7}\u{8}\u{7f}\u{85}\u{9b}",
        "é\u{301}\u{1f600}",
        "attached",
        "client",
        "18446744073709551616",
        "-1",
        "$(id)",
        "%s%n",
    ];
    let word = words[random.usize(..words.len())];
    word.repeat(if random.u8(..8) == 0 { random.usize(1..200) } else { 1 })
}

/// Writes random values of a type.
struct Maker<'r> {
    random: &'r mut Rng,
    bytes: Bytes,
    is_huge: bool,
}

impl<'r> Maker<'r> {
    fn new(random: &'r mut Rng, big: bool) -> Self {
        Self { random, bytes: Bytes::new(big), is_huge: false }
    }

    /// One value of the body has almost the maximum length of a message.
    fn huge(random: &'r mut Rng, big: bool) -> Self {
        Self { is_huge: true, ..Self::new(random, big) }
    }

    fn body(mut self, signature: &str) -> Vec<u8> {
        let mut rest = signature;
        while !rest.is_empty() {
            rest = self.value(rest, 0);
        }
        self.bytes.bytes
    }

    /// Writes a value of the first type; returns the types after it.
    fn value<'s>(&mut self, signature: &'s str, depth: usize) -> &'s str {
        let (first, rest) = signature.split_at(1);
        match first {
            "y" => self.bytes.bytes.push(self.random.u8(..)),
            "b" => self.bytes.number(self.random.u32(..2)),
            "i" | "u" => {
                let number = if self.random.bool() { self.random.u32(..4) } else { self.random.u32(..) };
                self.bytes.number(number);
            }
            "x" | "t" | "d" => {
                self.bytes.align(8);
                let shift = self.random.u32(..64);
                self.bytes.bytes.extend((self.random.u64(..) >> shift).to_ne_bytes());
            }
            "s" => {
                let text = self.text();
                self.bytes.text(&text);
            }
            "o" => {
                let paths = [
                    "/org/loopd1/attachment/1",
                    "/org/loopd1/attachment/1/p1",
                    "/",
                    "/org/loopd1/attachment/2",
                ];
                let path = paths[self.random.usize(..paths.len())];
                self.bytes.text(path.as_bytes());
            }
            "v" => self.variant(depth),
            "(" | "{" => {
                self.bytes.align(8);
                let mut fields = rest;
                while !fields.starts_with([')', '}']) {
                    fields = self.value(fields, depth + 1);
                }
                return &fields[1..];
            }
            "a" => return self.array(rest, depth),
            other => unreachable!("no signature here has {other}"),
        }
        rest
    }

    fn array<'s>(&mut self, element: &'s str, depth: usize) -> &'s str {
        self.bytes.number(0);
        let at = self.bytes.bytes.len() - 4;
        if element.starts_with(['(', '{', 'x', 't', 'd']) {
            self.bytes.align(8);
        }
        let start = self.bytes.bytes.len();
        let end = end_of(element);
        if element.starts_with("{sv}") && self.random.u8(..4) != 0 {
            self.all_properties(depth);
        }
        for _ in 0..self.random.usize(..if depth < 3 { 5 } else { 2 }) {
            let _rest = self.value(element, depth + 1);
        }
        // An array must have an element if it is to have the huge value.
        if self.is_huge && self.bytes.bytes.len() < HUGE / 2 && depth < 8 {
            let _rest = self.value(element, depth + 1);
        }
        self.bytes.put_number(at, self.bytes.bytes.len() - start);
        &element[end..]
    }

    /// All properties, nearly always with their own types: a client stops at a missing one.
    fn all_properties(&mut self, depth: usize) {
        for (name, kind) in PROPERTIES_SENT {
            self.bytes.align(8);
            self.bytes.text(name.as_bytes());
            if self.random.u8(..200) == 0 {
                self.variant(depth + 1);
            } else {
                self.bytes.signature(kind);
                let _rest = self.value(kind, depth + 1);
            }
        }
    }

    fn variant(&mut self, depth: usize) {
        if self.is_huge {
            return self.huge_variant();
        }
        let types = ["s", "s", "b", "u", "t", "t", "y", "o", "as", "ay", "a{sv}", "v", "(su)"];
        let kind = types[self.random.usize(..if depth < 8 { types.len() } else { 8 })];
        self.bytes.signature(kind);
        let _rest = self.value(kind, depth + 1);
    }

    fn huge_variant(&mut self) {
        self.is_huge = false;
        let length = HUGE.saturating_sub(self.bytes.bytes.len());
        if self.random.bool() {
            self.bytes.signature("ay");
            self.bytes.number(u32::try_from(length).unwrap_or_default());
            self.bytes.bytes.resize(self.bytes.bytes.len() + length, b'x');
        } else {
            self.bytes.signature("s");
            self.bytes.text(&vec![b'\x1b'; length]);
        }
    }

    fn text(&mut self) -> Vec<u8> {
        if self.random.u8(..3) == 0 {
            let interface = [ATTACHMENT, VOLUME, PARTITION][self.random.usize(..3)];
            return interface.as_bytes().to_vec();
        }
        if self.random.bool() {
            let (name, _) = PROPERTIES_SENT[self.random.usize(..PROPERTIES_SENT.len())];
            return name.as_bytes().to_vec();
        }
        text(self.random).into_bytes()
    }
}

/// The end of the first type of a signature.
fn end_of(signature: &str) -> usize {
    let mut depth = 0;
    for (index, kind) in signature.char_indices() {
        match kind {
            '(' | '{' => depth += 1,
            ')' | '}' => depth -= 1,
            'a' => continue,
            _ => {}
        }
        if depth == 0 {
            return index + 1;
        }
    }
    signature.len()
}
