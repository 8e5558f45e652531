//! The floor of a long reply: the bus passes the same bytes from one connection to another.

use std::time::{Duration, Instant};

use anyhow::Result;
use loopd_tests::process::PATIENCE;
use loopd_tests::raw_bus::{RawBus, RawMessage, Value};
use zbus::Message;

/// The name of the signal.
const MEMBER: &str = "Passed";

/// Two connections that nothing else uses.
pub struct Passing {
    sender: RawBus,
    receiver: RawBus,
}

impl Passing {
    /// Connects to the bus with this address.
    pub fn connect(address: &str) -> Result<Self> {
        let [sender, receiver] = [RawBus::connect(address)?, RawBus::connect(address)?];
        receiver.patience(PATIENCE)?;
        Ok(Self { sender, receiver })
    }

    /// How long the bus takes to pass the body of this message on, until it is received. It is sent as a signal: the policy
    /// of a system bus allows those.
    pub fn pass(&mut self, message: &Message) -> Result<Duration> {
        let text = |text: &str| Value::Text(text.as_bytes().to_vec());
        let signal = RawMessage {
            big: false,
            kind: 4,
            flags: 0,
            serial: self.sender.next_serial(),
            fields: vec![
                (1, b'o', text("/")),
                (2, b's', text("org.loopd1.Benchmark")),
                (3, b's', text(MEMBER)),
                (6, b's', text(&self.receiver.name)),
            ],
            body: Vec::new(),
        };
        let body = message.body();
        let bytes = signal.body(&body.signature().to_string_no_parens(), body.data().to_vec()).bytes();
        let start = Instant::now();
        self.sender.send(&bytes, &[])?;
        while self.receiver.receive()?.0.member != MEMBER {}
        Ok(start.elapsed())
    }
}
