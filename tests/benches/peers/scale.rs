//! How much is measured.

use std::time::Duration;

use loopd_tests::rounds::from_environment;

/// Repeats the attaches this often.
pub const ROUNDS: &str = "LOOPD_TEST_ROUNDS";

/// Numbers of devices that are held while others are attached.
pub const HELD: [Held; 4] = [
    Held { devices: 1, name: "1", ends: 10 },
    Held { devices: 10, name: "10", ends: 10 },
    Held { devices: 100, name: "100", ends: 5 },
    Held { devices: 1000, name: "1,000", ends: 2 },
];

/// A number of devices that are held.
#[derive(Clone, Copy, Debug)]
pub struct Held {
    pub devices: usize,
    /// The number, as a name of a column.
    pub name: &'static str,
    /// How often a client that holds them ends.
    pub ends: usize,
}

/// The numbers of rounds and so on.
#[derive(Clone, Copy, Debug)]
pub struct Scale {
    /// Attaches and detaches of each side.
    pub rounds: usize,
    /// Of the image with the most partitions.
    pub most_rounds: usize,
    /// Attaches and detaches beside held devices.
    pub growth_rounds: usize,
    /// The numbers of held devices, of [`HELD`].
    pub held: &'static [Held],
    /// Whether a client ends only once for each number of held devices.
    pub ends_once: bool,
    /// Attachments for the memory of one.
    pub attachments: usize,
    /// How long loopd is observed while it is idle.
    pub idle: Duration,
    /// How long loopd is left alone before it is called idle: threads end, and the allocator returns what is free.
    pub rest: Duration,
    /// Starts of loopd.
    pub starts: usize,
    /// Rounds of reading and writing.
    pub io_rounds: usize,
    /// Bytes that are read, and twice those that are written.
    pub io_bytes: usize,
}

impl Scale {
    /// A whole run takes some minutes. Without `--bench`, as in `cargo test --benches`, one or two rounds show that it
    /// works.
    pub fn new(is_bench: bool) -> Self {
        let rounds = from_environment(ROUNDS);
        if !is_bench {
            return Self {
                rounds: rounds.unwrap_or(1),
                most_rounds: 0,
                growth_rounds: 1,
                held: &HELD[..2],
                ends_once: true,
                attachments: 10,
                idle: Duration::from_secs(1),
                rest: Duration::from_millis(100),
                starts: 1,
                io_rounds: 1,
                io_bytes: 4 << 20,
            };
        }
        let full = Self {
            rounds: 100,
            most_rounds: 10,
            growth_rounds: 20,
            held: &HELD,
            ends_once: false,
            attachments: 1000,
            idle: Duration::from_secs(30),
            rest: Duration::from_secs(3),
            starts: 20,
            io_rounds: 4,
            io_bytes: 128 << 20,
        };
        rounds.map_or(full, |rounds: usize| full.with_rounds(rounds.max(1)))
    }

    /// The other numbers of rounds do not exceed this one, and grow with it.
    fn with_rounds(self, rounds: usize) -> Self {
        let scaled = |of_full: usize| (of_full * rounds).div_ceil(self.rounds);
        Self {
            rounds,
            most_rounds: scaled(self.most_rounds),
            growth_rounds: scaled(self.growth_rounds),
            ends_once: rounds < self.rounds,
            starts: scaled(self.starts),
            io_rounds: scaled(self.io_rounds),
            ..self
        }
    }
}
