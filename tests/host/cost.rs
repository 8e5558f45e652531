//! What calls cost, counted and not timed: the daemon's system calls and allocations and the messages on the bus do not grow
//! with the attachments of others, with their partitions, or with loop devices that nothing is attached to.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::AsFd as _;

use anyhow::{Context as _, Result};
use futures_util::StreamExt as _;
use loopd_dbus::proxy::{Interaction, Manager};
use loopd_dbus::{AttachOptions, Lifetime};
use loopd_tests::Outcome;
use loopd_tests::allocations::{Allocations, Counts};
use loopd_tests::fixture::{Attached, Fixture};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::Setup;
use loopd_tests::process::{PATIENCE, eventually};
use loopd_tests::strace::Strace;
use loopd_tests::table::Gpt;
use loopd_tests::udev;
use zbus::MessageStream;
use zbus::fdo::MonitoringProxy;

loopd_tests::tests! {
    "cost";
    Setup::None => [
        system_calls_and_messages_do_not_grow_with_other_devices,
        allocations_do_not_grow_with_other_devices,
        an_attachment_holds_little_memory,
    ];
}

/// How often each operation is counted.
const ROUNDS: usize = 4;
/// Attachments of others, each with three partitions.
const OTHERS: usize = 60;
/// Devices that others have had and left.
const UNBOUND: usize = 40;
/// Calls that depend on how threads meet, and on the allocator.
const LEFT_OUT: [&str; 18] = [
    "brk",
    "clone3",
    "epoll_wait",
    "exit",
    "futex",
    "getrandom",
    "gettid",
    "madvise",
    "mmap",
    "mprotect",
    "munmap",
    "prctl",
    "restart_syscall",
    "rseq",
    "rt_sigprocmask",
    "sched_yield",
    "set_robust_list",
    "sigaltstack",
];

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Operation {
    /// `SetupLoop`, waiting, and `Detach`.
    AttachAndDetach,
    /// The same without waiting for udev.
    AttachAtOnceAndDetach,
    /// `SetupLoop` by a client that disconnects.
    Vanish,
    /// `List`. Its reply grows with the attachments.
    List,
}

impl Operation {
    const ALL: [Self; 4] = [Self::AttachAndDetach, Self::AttachAtOnceAndDetach, Self::Vanish, Self::List];

    /// A quarter above what was counted when the limit was set. More needs a reason.
    fn limit(self) -> Cost {
        let (system_calls, messages) = match self {
            Self::AttachAndDetach => (200.0, 8.0),
            Self::AttachAtOnceAndDetach => (190.0, 8.0),
            // With the connection of the client.
            Self::Vanish => (165.0, 14.0),
            Self::List => (9.0, 3.0),
        };
        Cost { system_calls, messages }
    }

    async fn run(self, fixture: &Fixture, image: &Image) -> Result<()> {
        let file = image.open()?;
        match self {
            Self::AttachAndDetach => attach_and_detach(fixture, &file, true).await,
            Self::AttachAtOnceAndDetach => attach_and_detach(fixture, &file, false).await,
            Self::Vanish => {
                let connection = fixture.connect().await?;
                let manager = Manager::new(&connection, Interaction::Forbidden).await?;
                let options = AttachOptions::default();
                let attached = Attached::new(manager.setup_loop(file.as_fd(), &options).await?)?;
                connection.close().await?;
                // `List` of all devices would look at each.
                let device = attached.device;
                eventually("the device is free", async || Ok(!device.bound())).await
            }
            Self::List => fixture.list(false).await.map(drop),
        }
    }
}

async fn attach_and_detach(fixture: &Fixture, file: &File, wait: bool) -> Result<()> {
    let options = AttachOptions { wait, ..AttachOptions::default() };
    let attached = fixture.attach(file, &options).await?;
    udev::settle().await?;
    fixture.detach(&attached).await
}

/// What one operation took, on average over the rounds.
#[derive(Clone, Copy, Debug)]
struct Cost {
    system_calls: f64,
    messages: f64,
}

#[expect(clippy::cast_precision_loss, reason = "small numbers")]
async fn cost(fixture: &mut Fixture, operation: Operation, image: &Image) -> Result<Cost> {
    // What only the first one does.
    operation.run(fixture, image).await?;
    udev::settle().await?;
    let strace = Strace::attach(fixture.daemon()?.pid(), &fixture.directory).await?;
    let fixture = &*fixture;
    let monitor = Monitor::start(fixture).await?;
    let calls = strace.count(async || {
        for _ in 0..ROUNDS {
            operation.run(fixture, image).await?;
            udev::settle().await?;
        }
        Ok(())
    });
    let calls = calls.await?;
    let messages = monitor.stop(fixture).await?;
    let system_calls =
        calls.iter().filter(|(name, _)| !LEFT_OUT.contains(&name.as_str())).map(|(_, count)| count).sum();
    let each = |count: usize| count as f64 / ROUNDS as f64;
    Ok(Cost { system_calls: each(system_calls), messages: each(messages) })
}

/// Counts the messages on the bus.
struct Monitor {
    counting: tokio::task::JoinHandle<Result<usize>>,
}

impl Monitor {
    /// The name of the last message.
    const END: &str = "EndOfTheCount";

    async fn start(fixture: &Fixture) -> Result<Self> {
        let connection = fixture.connect().await?;
        MonitoringProxy::new(&connection).await?.become_monitor(&[], 0).await?;
        let mut messages = MessageStream::from(&connection);
        let counting = tokio::spawn(async move {
            let _open = connection;
            for count in 0.. {
                let next = tokio::time::timeout(PATIENCE, messages.next()).await;
                let message = next?.context("the bus has ended the connection")??;
                if message.header().member().is_some_and(|member| member == Self::END) {
                    return Ok(count);
                }
            }
            anyhow::bail!("the count has no end")
        });
        Ok(Self { counting })
    }

    async fn stop(self, fixture: &Fixture) -> Result<usize> {
        let none: Option<&str> = None;
        fixture.connection.emit_signal(none, "/end", "org.loopd1.Tests", Self::END, &()).await?;
        self.counting.await?
    }
}

async fn costs(fixture: &mut Fixture, image: &Image) -> Result<BTreeMap<Operation, Cost>> {
    let mut costs = BTreeMap::new();
    for operation in Operation::ALL {
        costs.insert(operation, cost(fixture, operation, image).await?);
    }
    Ok(costs)
}

async fn attach(fixture: &Fixture, image: &Image, count: usize) -> Result<Vec<Attached>> {
    let file = image.open()?;
    let options = AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() };
    let mut attached = Vec::new();
    for _ in 0..count {
        attached.push(fixture.attach(&file, &options).await?);
    }
    Ok(attached)
}

async fn detach_all(fixture: &Fixture, attached: Vec<Attached>) -> Result<()> {
    for attached in attached {
        fixture.detach(&attached).await?;
    }
    udev::settle().await
}

/// Attachments with partitions, beside devices that nothing is attached to any more.
async fn attach_others(fixture: &Fixture) -> Result<Vec<Attached>> {
    let image = Image::sparse(&fixture.directory, "other", 4 * MIB)?;
    Gpt::new(&[(2048, 2055), (2056, 2063), (2064, 2071)]).write(&image)?;
    let mut others = attach(fixture, &image, OTHERS + UNBOUND).await?;
    detach_all(fixture, others.split_off(OTHERS)).await?;
    Ok(others)
}

async fn system_calls_and_messages_do_not_grow_with_other_devices(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let few = costs(fixture, &image).await?;

    let others = attach_others(fixture).await?;
    let many = costs(fixture, &image).await?;
    detach_all(fixture, others).await?;

    for (operation, few) in few {
        let (many, limit) = (many[&operation], operation.limit());
        println!("{operation:?}: {few:.1?} alone, {many:.1?} beside {OTHERS} attachments");
        assert!(many.system_calls <= few.system_calls * 1.1 + 3.0, "{operation:?}: {few:?}, {many:?}");
        assert!(many.messages <= few.messages + 0.5, "{operation:?}: {few:?}, {many:?}");
        assert!(few.system_calls <= limit.system_calls, "{operation:?}: {few:?} of {limit:?}");
        assert!(few.messages <= limit.messages, "{operation:?}: {few:?} of {limit:?}");
    }
    Ok(())
}

impl Operation {
    /// The allocations of one: a twentieth above the most of several runs, which differ by a thirtieth.
    fn allocation_limit(self) -> f64 {
        match self {
            Self::AttachAndDetach => 1075.0,
            Self::AttachAtOnceAndDetach => 1135.0,
            Self::Vanish => 950.0,
            Self::List => 50.0,
        }
    }
}

/// How many allocations `List` makes for each attachment in its reply, and a twentieth.
const ALLOCATIONS_OF_A_LISTED: f64 = 11.0;
/// How many bytes loopd holds for an attachment without partitions, and a twentieth: runs differ by as much.
const HELD: f64 = 3600.0;

#[expect(clippy::cast_precision_loss, reason = "small numbers")]
fn each(total: i64, count: usize) -> f64 {
    total as f64 / count as f64
}

/// How many allocations each operation makes at least: on a busy machine some take more threads and wake-ups.
async fn allocations(
    fixture: &Fixture,
    counts: &Allocations,
    image: &Image,
) -> Result<BTreeMap<Operation, f64>> {
    let mut allocations = BTreeMap::new();
    for operation in Operation::ALL {
        // What only the first one does.
        operation.run(fixture, image).await?;
        udev::settle().await?;
        let mut least = i64::MAX;
        for _ in 0..ROUNDS {
            let before = counts.at_rest().await?;
            operation.run(fixture, image).await?;
            udev::settle().await?;
            least = least.min(counts.at_rest().await?.allocations - before.allocations);
        }
        allocations.insert(operation, each(least, 1));
    }
    Ok(allocations)
}

async fn allocations_do_not_grow_with_other_devices(fixture: &mut Fixture) -> Outcome {
    let counts = Allocations::start(fixture).await?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let few = allocations(fixture, &counts, &image).await?;
    let others = attach_others(fixture).await?;
    let many = allocations(fixture, &counts, &image).await?;
    detach_all(fixture, others).await?;

    for (operation, few) in few {
        let (many, limit) = (many[&operation], operation.allocation_limit());
        println!("{operation:?}: {few} allocations alone, {many} beside {OTHERS} attachments");
        let grows_by =
            if operation == Operation::List { ALLOCATIONS_OF_A_LISTED * OTHERS as f64 } else { 0.0 };
        assert!(many <= few * 1.1 + grows_by, "{operation:?}: {few}, and {many} beside {OTHERS} attachments");
        assert!(few <= limit, "{operation:?}: {few} of {limit}");
    }
    Ok(())
}

async fn an_attachment_holds_little_memory(fixture: &mut Fixture) -> Outcome {
    let counts = Allocations::start(fixture).await?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    // Tables that grow once.
    let first = attach(fixture, &image, OTHERS).await?;
    detach_all(fixture, first).await?;
    let Counts { held: before, .. } = counts.at_rest().await?;
    let attached = attach(fixture, &image, OTHERS).await?;
    udev::settle().await?;
    let Counts { held: full, .. } = counts.at_rest().await?;
    detach_all(fixture, attached).await?;
    let Counts { held: after, .. } = counts.at_rest().await?;
    let [held, left] = [full - before, after - before].map(|bytes| each(bytes, OTHERS));
    println!("{held} bytes for each of {OTHERS} attachments, {left} after their end");
    assert!(held <= HELD, "{held} of {HELD}");
    assert!(left <= HELD / 20.0, "{left} of {held} bytes are not released");
    Ok(())
}
