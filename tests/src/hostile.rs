//! Malformed messages, generated from a seed so that a run can be repeated.

use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use fastrand::Rng;
use nix::unistd::Pid;

use crate::process::{alive, resident};
use crate::raw_bus::{Bytes, RawBus, RawMessage, Value, become_user};
use crate::{ROOT, User};

const MANAGER: &str = "org.loopd1.Manager";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
/// The number of messages of the maximum length: the bus keeps at most four for a service.
const MOST_HUGE: usize = 2;
/// The number of messages after which one-time allocations are complete.
const WARM_UP: usize = 5000;
/// The time limits for the bus and the target to answer a batch: normally, and if the bus may treat the rest of the
/// batch as one message.
const WHOLE: Duration = Duration::from_secs(2);
const CUT: Duration = Duration::from_millis(200);
/// How long another client may wait for an answer.
const SOON: Duration = Duration::from_secs(8);
/// The allowed growth of the target's resident memory, in KiB.
const MOST_GROWTH: u64 = 32 << 10;

/// The parameters of an attack.
#[derive(Clone, Debug)]
pub struct Attack {
    /// The address of the bus.
    pub address: String,
    /// The sender.
    pub user: User,
    /// The bus name of the target.
    pub target: String,
    /// Whether the target answers calls.
    pub answers: bool,
    /// The seed of the messages.
    pub seed: u64,
    /// The number of messages.
    pub messages: usize,
    /// The number of messages sent between checks of the connection. If the bus closes the connection, all of
    /// them count as lost.
    pub batch: usize,
    /// The maximum duration.
    pub time: Duration,
}

/// The result of an attack.
#[derive(Clone, Copy, Debug, Default)]
pub struct Outcome {
    /// Messages that were written to the bus.
    pub sent: usize,
    /// Messages that the target has answered, and so has received.
    pub answered: usize,
    /// Messages that the bus may not have received, since it closed the connection.
    pub lost: usize,
    /// Connections that were made.
    pub connections: usize,
}

impl Attack {
    /// Runs the attack on the calling thread, which changes to the user for good.
    ///
    /// # Errors
    /// The bus refuses connections.
    pub fn run(&self) -> Result<Outcome> {
        if self.user != ROOT {
            become_user(self.user)?;
        }
        let mut outcome = Outcome::default();
        let mut generator = Generator::new(self.seed, &self.target);
        let start = Instant::now();
        let goes_on = |sent| sent < self.messages && start.elapsed() < self.time;
        while goes_on(outcome.sent) {
            let mut bus = RawBus::connect(&self.address)?;
            outcome.connections += 1;
            while goes_on(outcome.sent) {
                outcome.sent += self.batch;
                match self.batch(&mut bus, &mut generator) {
                    Ok(answered) => outcome.answered += answered,
                    // The bus refuses further connections.
                    Err(_) => {
                        outcome.lost += self.batch;
                        break;
                    }
                }
            }
        }
        Ok(outcome)
    }

    /// Sends a batch; returns how many messages the target has answered.
    fn batch(&self, bus: &mut RawBus, generator: &mut Generator) -> Result<usize> {
        generator.is_cut = false;
        for _ in 0..self.batch {
            let (bytes, descriptors) = generator.message(bus);
            let descriptors: Vec<_> = descriptors.iter().map(|file| file.as_fd()).collect();
            bus.send(&bytes, &descriptors)?;
        }
        let mut ping = RawMessage::call(&self.target, "/", "org.freedesktop.DBus.Peer", "Ping");
        ping.serial = bus.next_serial();
        if self.answers {
            bus.send(&ping.bytes(), &[])?;
        }
        let barrier = if self.answers { ping.serial } else { bus.call_bus("GetId")? };
        bus.patience(if generator.is_cut { CUT } else { WHOLE })?;
        let mut answered = 0;
        loop {
            let (arrived, _) = bus.receive()?;
            if arrived.reply_serial == barrier {
                return Ok(answered);
            }
            answered += usize::from(arrived.sender.starts_with(':'));
        }
    }
}

/// The effect of an attack on its target and on another client.
#[derive(Clone, Copy, Debug)]
pub struct Trial {
    /// The result of the attack.
    pub outcome: Outcome,
    /// Calls of the other client that were answered.
    pub served: usize,
    /// How often the bus refused them.
    pub refused: usize,
    /// The longest wait of the other client.
    pub slowest: Duration,
    /// The target's resident KiB after the warm-up.
    pub before: u64,
    /// The same at the end.
    pub after: u64,
}

impl Trial {
    /// Attacks the process while a client of root calls it continuously.
    ///
    /// # Errors
    /// The process has ended, the client was not served, or memory grew.
    pub fn run(attack: &Attack, process: Pid) -> Result<Self> {
        let warm_up = Attack { seed: attack.seed ^ 1, messages: WARM_UP, ..attack.clone() };
        std::thread::spawn(move || warm_up.run()).join().expect("no panic")?;
        let mut client = Client::connect(attack)?;
        client.call()?;
        let before = resident(process)?;
        let (done, ended) = channel();
        let running = attack.clone();
        std::thread::spawn(move || done.send(running.run()));
        let outcome = loop {
            client.call()?;
            // The other client must not flood the bus itself.
            match ended.recv_timeout(Duration::from_millis(100)) {
                Ok(outcome) => break outcome?,
                Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => bail!("the attacker panicked"),
            }
        };
        client.call()?;
        let Client { served, refused, slowest, .. } = client;
        let trial = Self { outcome, served, refused, slowest, before, after: resident(process)? };
        trial.judge(process).map_err(|error| error.context(format!("{trial:?}")))?;
        Ok(trial)
    }

    fn judge(&self, process: Pid) -> Result<()> {
        let Self { outcome, before, after, .. } = self;
        ensure!(alive(process), "process {process} has ended");
        ensure!(outcome.answered * 3 > outcome.sent - outcome.lost, "most messages must reach the target");
        ensure!(outcome.answered * 4 > outcome.sent, "the bus has ended most connections");
        ensure!(*after < before + MOST_GROWTH, "resident memory grew from {before} to {after} KiB");
        Ok(())
    }
}

impl std::fmt::Display for Trial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Outcome { sent, answered, lost, connections } = self.outcome;
        write!(
            f,
            "{sent} messages, {answered} answered, {lost} lost in {connections} connections; with {} other calls \
             served, the slowest in {} ms, {} refused by the bus; resident KiB {} before, {} after",
            self.served,
            self.slowest.as_millis(),
            self.refused,
            self.before,
            self.after
        )
    }
}

/// The other client.
struct Client {
    bus: RawBus,
    target: String,
    served: usize,
    refused: usize,
    slowest: Duration,
}

impl Client {
    fn connect(attack: &Attack) -> Result<Self> {
        let bus = RawBus::connect(&attack.address)?;
        bus.patience(SOON)?;
        let target = attack.target.clone();
        Ok(Self { bus, target, served: 0, refused: 0, slowest: Duration::ZERO })
    }

    /// Calls `List`. The bus may refuse, since its queue for a service is limited.
    fn call(&mut self) -> Result<()> {
        let asked = Instant::now();
        loop {
            let mut call = RawMessage::call(&self.target, "/org/loopd1", MANAGER, "List");
            let mut body = Bytes::new(false);
            body.number(0);
            body.align(8);
            call = call.body("a{sv}", body.bytes);
            call.serial = self.bus.next_serial();
            self.bus.send(&call.bytes(), &[])?;
            let (answer, body) = self.bus.answer(call.serial)?;
            let waited = asked.elapsed();
            ensure!(waited < SOON, "the other client waited {waited:?}");
            if answer.error.is_empty() {
                self.served += 1;
                self.slowest = self.slowest.max(waited);
                return Ok(());
            }
            let text = String::from_utf8_lossy(&body);
            let is_full = answer.error == "org.freedesktop.DBus.Error.LimitsExceeded"
                && !answer.sender.starts_with(':');
            ensure!(is_full, "the other client was refused: {} {text}", answer.error);
            self.refused += 1;
        }
    }
}

/// How the bus filters messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BusConduct {
    /// It forwards header fields that the specification does not define.
    pub passes_unknown_fields: bool,
    /// It refuses a call with more descriptors than the policy allows for the member.
    pub bounds_descriptors: bool,
}

impl BusConduct {
    /// Tests both on the calling thread, which changes to the user for good.
    ///
    /// # Errors
    /// The bus refuses the connection, or neither bus nor target refuses a call with too many descriptors.
    pub fn learn(address: &str, user: User, target: &str) -> Result<Self> {
        if user != ROOT {
            become_user(user)?;
        }
        let passes_unknown_fields = Self::try_field(address)?;
        Ok(Self { passes_unknown_fields, bounds_descriptors: Self::try_descriptor(address, target)? })
    }

    /// A signal from one connection to another.
    fn try_field(address: &str) -> Result<bool> {
        const FIELD: u8 = 77;
        let (mut from, mut to) = (RawBus::connect(address)?, RawBus::connect(address)?);
        let mut signal = RawMessage::call(&to.name, "/", "org.example.Test", "Unknown");
        signal.kind = 4;
        signal.fields.insert(0, (FIELD, b's', Value::Text(b"text".to_vec())));
        signal.serial = from.next_serial();
        from.send(&signal.bytes(), &[])?;
        loop {
            let (arrived, _) = to.receive()?;
            if arrived.member == "Unknown" {
                return Ok(arrived.fields.contains(&FIELD));
            }
        }
    }

    fn try_descriptor(address: &str, target: &str) -> Result<bool> {
        let mut bus = RawBus::connect(address)?;
        let file = std::fs::File::open("/dev/null")?;
        let mut call = RawMessage::call(target, "/org/loopd1", MANAGER, "FindFree").descriptors(1);
        call.serial = bus.next_serial();
        bus.send(&call.bytes(), &[file.as_fd()])?;
        let (answer, _) = bus.answer(call.serial)?;
        let is_by_bus = !answer.sender.starts_with(':');
        let expected = if is_by_bus { "AccessDenied" } else { "InvalidArgs" };
        ensure!(
            answer.error.ends_with(expected),
            "a call with a descriptor too many was answered: {answer:?}"
        );
        Ok(is_by_bus)
    }
}

struct Generator {
    random: Rng,
    target: String,
    huge: usize,
    /// Whether the bus may wait for the rest of a generated message.
    is_cut: bool,
}

type Made = (Vec<u8>, Vec<OwnedFd>);

impl Generator {
    fn new(seed: u64, target: &str) -> Self {
        Self { random: Rng::with_seed(seed), target: target.to_owned(), huge: 0, is_cut: false }
    }

    fn message(&mut self, bus: &mut RawBus) -> Made {
        let (mut message, descriptors) = match self.random.u8(..100) {
            0..35 => (self.any_call(), Vec::new()),
            35..55 => (self.deep_signature(), Vec::new()),
            55..65 => (self.deep_value(), Vec::new()),
            65..77 => (self.unknown_fields(), Vec::new()),
            77..92 => self.with_descriptors(),
            92..94 => (self.long(), Vec::new()),
            94..97 => (self.answer_or_signal(), Vec::new()),
            97 if self.random.bool() => (self.odd_header(), Vec::new()),
            _ => return self.mutated(bus),
        };
        if message.serial == 1 {
            message.serial = bus.next_serial();
        }
        message.flags |= u8::from(self.random.u8(..10) == 0);
        (message.bytes(), descriptors)
    }

    fn call(&mut self, interface: &str, member: &str) -> RawMessage {
        let paths =
            ["/org/loopd1", "/org/loopd1/attachment/1", "/", "/org/loopd1/attachment/99999999999999999999"];
        let path = paths[self.random.usize(..paths.len())];
        let mut call = RawMessage::call(&self.target, path, interface, member);
        call.big = self.random.u8(..4) == 0;
        call
    }

    fn any_call(&mut self) -> RawMessage {
        let calls = [
            (MANAGER, "SetupLoop"),
            (MANAGER, "Detach"),
            (MANAGER, "List"),
            (MANAGER, "FindFree"),
            ("org.loopd1.Attachment", "SetLifetime"),
            ("org.loopd1.Attachment", "ReplaceBackingFile"),
            ("org.loopd1.Volume", "Mount"),
            (PROPERTIES, "Get"),
            (PROPERTIES, "GetAll"),
            ("org.freedesktop.DBus.ObjectManager", "GetManagedObjects"),
            ("org.freedesktop.DBus.Introspectable", "Introspect"),
            ("org.freedesktop.DBus.Peer", "Ping"),
        ];
        let (interface, member) = calls[self.random.usize(..calls.len())];
        let call = self.call(interface, member);
        let mut body = Bytes::new(call.big);
        match self.random.u8(..6) {
            0 => call,
            1 => {
                body.text(&self.text());
                call.body("s", body.bytes)
            }
            2 => {
                body.number(0);
                body.align(8);
                call.body("a{sv}", body.bytes)
            }
            3 => {
                body.text(&self.text());
                body.number(0);
                body.align(8);
                call.body("sa{sv}", body.bytes)
            }
            4 => {
                body.number(self.random.u32(..));
                call.body("u", body.bytes)
            }
            _ => {
                body.text(&self.text());
                body.text(&self.text());
                call.body("ss", body.bytes)
            }
        }
    }

    fn text(&mut self) -> Vec<u8> {
        let words = ["/dev/loop0", "/dev/loop4294967296", "Version", "client", "", "\u{1b}[31m\u{202e}", "é"];
        let word = words[self.random.usize(..words.len())];
        word.repeat(self.random.usize(1..20)).into_bytes()
    }

    /// Alternates arrays and structures: the bus limits consecutive arrays.
    fn deep_signature(&mut self) -> RawMessage {
        let depth = self.random.usize(1..32);
        let signature = format!("{}y{}", "aa(".repeat(depth), ")".repeat(depth));
        let call = self.call(MANAGER, "List");
        call.body(&signature, vec![0; 4])
    }

    /// Variants in variants.
    fn deep_value(&mut self) -> RawMessage {
        let call = self.call(MANAGER, "List");
        let depth = self.random.usize(1..64);
        let mut body = Bytes::new(call.big);
        for _ in 0..depth {
            body.signature("v");
        }
        body.signature("y");
        body.bytes.push(7);
        call.body("v", body.bytes)
    }

    fn unknown_fields(&mut self) -> RawMessage {
        let mut call = self.call(MANAGER, "List");
        for _ in 0..self.random.usize(1..4) {
            let code = self.random.u8(10..);
            let at = self.random.usize(..=call.fields.len());
            let value = if self.random.bool() {
                (code, b's', Value::Text(self.text()))
            } else {
                (code, b'u', Value::Number(self.random.u32(..)))
            };
            call.fields.insert(at, value);
        }
        let mut body = Bytes::new(call.big);
        body.number(0);
        body.align(8);
        call.body("a{sv}", body.bytes)
    }

    /// Usually as many descriptors as the header declares, with an index that may be invalid.
    fn with_descriptors(&mut self) -> (RawMessage, Vec<OwnedFd>) {
        let members = ["SetupLoop", "List", "Detach"];
        let member = members[self.random.usize(..members.len())];
        let call = self.call(MANAGER, member);
        let there = self.random.usize(..4);
        // A wrong count ends the connection.
        let declared =
            if self.random.u8(..40) == 0 { self.random.u32(..20) } else { u32::try_from(there).unwrap_or(0) };
        let indices = [0, 1, 2, u32::MAX, 1 << 31];
        let mut body = Bytes::new(call.big);
        body.number(indices[self.random.usize(..indices.len())]);
        body.number(0);
        body.align(8);
        let files = (0..there).filter_map(|_| std::fs::File::open("/dev/null").ok()).map(OwnedFd::from);
        (call.descriptors(declared).body("ha{sv}", body.bytes), files.collect())
    }

    fn long(&mut self) -> RawMessage {
        let call = self.call(MANAGER, "Detach");
        let is_huge = self.huge < MOST_HUGE && self.random.u8(..20) == 0;
        self.huge += usize::from(is_huge);
        let length = if is_huge { 31 << 20 } else { self.random.usize(60_000..200_000) };
        let mut body = Bytes::new(call.big);
        body.text(&vec![b'x'; length]);
        call.body("s", body.bytes)
    }

    fn answer_or_signal(&mut self) -> RawMessage {
        let mut message = self.call("org.freedesktop.DBus", "NameOwnerChanged");
        message.kind = self.random.u8(2..=5);
        if message.kind != 4 {
            message.fields.push((5, b'u', Value::Number(self.random.u32(1..100))));
            message.fields.push((4, b's', Value::Text(b"org.example.Error".to_vec())));
        }
        let mut body = Bytes::new(message.big);
        body.text(&self.text());
        message.body("s", body.bytes)
    }

    fn odd_header(&mut self) -> RawMessage {
        let mut call = self.call(MANAGER, "List");
        match self.random.u8(..6) {
            0 => call.serial = 0,
            1 => call.fields.clear(),
            2 => call.fields.push((0, b's', Value::Text(b"a".to_vec()))),
            3 => call.fields.push((2, b'u', Value::Number(7))),
            4 => call.fields[0].2 = Value::Text(b"not a path".to_vec()),
            _ => {
                call.fields.push((8, b'g', Value::Text(b"s".to_vec())));
                call.body = vec![2, 0, 0, 0, 0xff, 0xfe, 0];
            }
        }
        call
    }

    fn mutated(&mut self, bus: &mut RawBus) -> Made {
        let mut call = self.any_call();
        call.serial = bus.next_serial();
        let mut bytes = call.bytes();
        // Most changes end the connection, except those of flags and body.
        let is_tame = self.random.u8(..4) != 0;
        self.is_cut |= !is_tame;
        for _ in 0..self.random.usize(1..4) {
            let at = self.random.usize(..bytes.len());
            if !is_tame || at == 2 || at >= bytes.len() - call.body.len() {
                bytes[at] = self.random.u8(..);
            }
        }
        if !is_tame && self.random.u8(..8) == 0 {
            bytes.truncate(self.random.usize(1..bytes.len()));
        }
        (bytes, Vec::new())
    }
}
