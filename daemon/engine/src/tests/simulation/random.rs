//! Random actions of random clients, with daemons that die: a million of them by default.
//!
//! `LOOPD_SEED` and `LOOPD_STEPS` play one run of so many actions, the same one each time; with `LOOPD_TRACE`
//! it says everything that happens.

use std::collections::{BTreeMap, VecDeque};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use loopd_common::{Lifetime, Overlap, State};

use super::action::{Action, Answer, Reply, Target, perform};
use super::guarantees;
use super::world::World;
use crate::kernel::DiskSequence;
use crate::simulated::Simulated;
use crate::tests::harness::{Client, Harness};
use crate::tests::restart::Death;

/// By default, over all runs.
const STEPS: usize = 1_000_000;
/// Of one run.
const STEPS_OF_A_RUN: usize = 2_000;
/// Of one daemon, at most.
const STEPS_OF_A_LIFE: usize = 400;
/// After so many of them everything comes to rest, and is compared.
const STEPS_OF_A_ROUND: usize = 50;
/// Actions that a failure shows.
const SHOWN: usize = 14;
/// Devices that are acted on.
const DEVICES: u32 = 5;
/// More than there ever are.
const MOST_DEVICES: u32 = 200;
const MOST_CLIENTS: usize = 5;

/// Each with how often it comes.
const WEIGHTS: [(u32, Action); 50] = [
    (6, Action::Attach(Lifetime::Client, Overlap::Allow)),
    (3, Action::Attach(Lifetime::Mount, Overlap::Allow)),
    (6, Action::Attach(Lifetime::Persistent, Overlap::Allow)),
    (2, Action::Attach(Lifetime::Mount, Overlap::Reuse)),
    (2, Action::Attach(Lifetime::Persistent, Overlap::Reuse)),
    (2, Action::Attach(Lifetime::Client, Overlap::Refuse)),
    (2, Action::AttachAtOnce(Lifetime::Client)),
    (2, Action::AttachAtOnce(Lifetime::Persistent)),
    (1, Action::AttachPart(Overlap::Reuse)),
    (2, Action::AttachPart(Overlap::Refuse)),
    (8, Action::Detach),
    (3, Action::DetachLazily),
    (3, Action::SetLifetime(Lifetime::Client)),
    (3, Action::SetLifetime(Lifetime::Mount)),
    (4, Action::SetLifetime(Lifetime::Persistent)),
    (6, Action::Mount),
    (2, Action::MountPartition),
    (6, Action::Unmount),
    (2, Action::UnmountLazily),
    (10, Action::Unlock),
    (2, Action::UnlockPartition),
    (4, Action::Lock),
    (2, Action::LockLazily),
    (6, Action::MountCleartext),
    (6, Action::UnmountCleartext),
    (3, Action::Replace),
    (1, Action::SetCapacity),
    (1, Action::DirectIo),
    (1, Action::NoDirectIo),
    (1, Action::SetBlockSize),
    (2, Action::Rescan),
    (1, Action::ListAll),
    (8, Action::Vanish),
    (1, Action::DelayEvents),
    (2, Action::LoseEvents),
    (2, Action::ForeignAttach),
    (2, Action::ForeignDetach),
    (2, Action::ForeignMount),
    (4, Action::ForeignUnmount),
    (1, Action::ForeignMap),
    (2, Action::ForeignUnmap),
    (1, Action::OpenCleartext),
    (2, Action::CloseCleartext),
    (2, Action::Open),
    (4, Action::Close),
    (1, Action::Reread),
    (1, Action::DropPartitions),
    (1, Action::Partition(0)),
    (1, Action::Partition(2)),
    (1, Action::GiveUp),
];

fn choose(random: &mut fastrand::Rng) -> Action {
    let all: u32 = WEIGHTS.iter().map(|(weight, _)| weight).sum();
    let mut left = random.u32(..all);
    let chosen = WEIGHTS.iter().find(|(weight, _)| {
        let is_it = left < *weight;
        left = left.saturating_sub(*weight);
        is_it
    });
    chosen.map_or(Action::LoseEvents, |(_, action)| *action)
}

/// What an answer has promised, and nothing has broken since.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Promise {
    /// The attachment stays until somebody detaches it.
    Stays(Target),
    /// It stays for as long as its client, and ends with it.
    StaysWith(Target, String),
    /// It is mounted there.
    Mounted(Target, std::path::PathBuf),
}

/// What was promised, and which actions may break it.
#[derive(Default)]
struct Promises {
    kept: Vec<Promise>,
    /// How many actions that end attachments have begun on each device, and are under way.
    ends: BTreeMap<u32, (u64, u32)>,
    /// The same of those that unmount.
    unmounts: BTreeMap<u32, (u64, u32)>,
    /// Actions that are under way.
    under_way: usize,
    trace: Trace,
    broken: Vec<String>,
}

/// What has happened: its hash, and the last of it.
#[derive(Default)]
struct Trace {
    hasher: DefaultHasher,
    last: VecDeque<String>,
    steps: usize,
}

impl Trace {
    fn note(&mut self, text: String) {
        text.hash(&mut self.hasher);
        if std::env::var_os("LOOPD_TRACE").is_some() {
            println!("{text}");
        }
        self.last.push_back(text);
        if self.last.len() > SHOWN {
            self.last.pop_front();
        }
    }
}

/// How the actions on a device stood when one of them began.
struct Begun {
    ends: BTreeMap<u32, (u64, u32)>,
    unmounts: BTreeMap<u32, (u64, u32)>,
}

/// Whether nothing that could break it has been under way since the action began.
fn is_alone(now: &BTreeMap<u32, (u64, u32)>, begun: &BTreeMap<u32, (u64, u32)>, number: u32) -> bool {
    let of = |actions: &BTreeMap<u32, (u64, u32)>| actions.get(&number).copied().unwrap_or_default();
    of(now).0 == of(begun).0 && of(now).1 == 0
}

/// What an action may break: on its device, or on each.
fn devices(action: Action, target: Target) -> Vec<u32> {
    match action {
        Action::Attach(_, Overlap::Reuse) | Action::AttachPart(Overlap::Reuse) => (0..MOST_DEVICES).collect(),
        _ => vec![target.number],
    }
}

fn is_end(action: Action) -> bool {
    guarantees::ends(action)
        && !matches!(
            action,
            Action::Attach(_, Overlap::Allow | Overlap::Refuse) | Action::AttachPart(Overlap::Refuse)
        )
}

impl Promises {
    fn begin(&mut self, action: Action, target: Target) -> Begun {
        for number in devices(action, target) {
            if is_end(action) {
                let (begun, under_way) = self.ends.entry(number).or_default();
                (*begun, *under_way) = (*begun + 1, *under_way + 1);
                self.kept.retain(|promise| promise.target().number != number || promise.is_mount());
            }
            if guarantees::unmounts(action) {
                let (begun, under_way) = self.unmounts.entry(number).or_default();
                (*begun, *under_way) = (*begun + 1, *under_way + 1);
                self.kept.retain(|promise| promise.target().number != number || !promise.is_mount());
            }
        }
        Begun { ends: self.ends.clone(), unmounts: self.unmounts.clone() }
    }

    fn end(&mut self, action: Action, target: Target) {
        for number in devices(action, target) {
            if is_end(action) {
                self.ends.entry(number).or_default().1 -= 1;
            }
            if guarantees::unmounts(action) {
                self.unmounts.entry(number).or_default().1 -= 1;
            }
        }
    }

    /// Takes an answer; to be called once the action has ended.
    fn take(&mut self, action: Action, client: &Client, target: Target, begun: &Begun, answer: &Answer) {
        let Ok(reply) = answer else { return };
        let undisturbed = is_alone(&self.ends, &begun.ends, target.number);
        match (action, reply) {
            (Action::SetLifetime(Lifetime::Persistent), _) if undisturbed => {
                self.kept.push(Promise::Stays(target));
            }
            (Action::SetLifetime(Lifetime::Client), _) if undisturbed && !client.is_gone() => {
                self.kept.push(Promise::StaysWith(target, client.id.0.clone()));
            }
            (
                Action::Attach(lifetime, Overlap::Allow | Overlap::Refuse) | Action::AttachAtOnce(lifetime),
                Reply::Attached(attached),
            ) => match lifetime {
                _ if !is_alone(&self.ends, &begun.ends, attached.number) => {}
                Lifetime::Persistent => self.kept.push(Promise::Stays(*attached)),
                Lifetime::Client if !client.is_gone() => {
                    self.kept.push(Promise::StaysWith(*attached, client.id.0.clone()));
                }
                _ => {}
            },
            (Action::Mount | Action::MountCleartext, Reply::Mounted(directory))
                if is_alone(&self.unmounts, &begun.unmounts, target.number) =>
            {
                self.kept.push(Promise::Mounted(target, directory.clone()));
            }
            _ => {}
        }
    }

    /// Whether everything holds that was promised.
    fn check(&self, harness: &Harness) -> Result<(), String> {
        self.kept.iter().try_for_each(|promise| match promise {
            Promise::Stays(target) => guarantees::stays(harness, *target),
            Promise::StaysWith(target, client) => stays_with(harness, *target, client),
            Promise::Mounted(target, directory) => guarantees::is_mounted(harness, *target, directory),
        })
    }
}

impl Promise {
    fn target(&self) -> Target {
        match self {
            Self::Stays(target) | Self::StaysWith(target, _) | Self::Mounted(target, _) => *target,
        }
    }

    fn is_mount(&self) -> bool {
        matches!(self, Self::Mounted(..))
    }
}

fn stays_with(harness: &Harness, target: Target, client: &str) -> Result<(), String> {
    let found =
        harness.engine.find(target.id).ok_or_else(|| format!("{} is gone before its client", target.id))?;
    let bound = found.ownership.and_then(|ownership| ownership.client);
    if found.state != State::Attached || bound.as_ref().map(|bound| bound.0.as_str()) != Some(client) {
        return Err(format!(
            "{} is to stay with {client}, and is {:?} with {bound:?}",
            target.id, found.state
        ));
    }
    Ok(())
}

/// A run of so many actions.
struct Run {
    random: fastrand::Rng,
    world: World,
    stores_holds: bool,
    promises: Arc<Mutex<Promises>>,
    names: usize,
    left: usize,
}

impl Run {
    fn new(seed: u64, steps: usize) -> Self {
        let stores_holds = !seed.is_multiple_of(3);
        let mut world = World::new(Simulated::unhurried_random(seed), stores_holds);
        if seed.is_multiple_of(5) {
            world.machine.let_programs_die();
        }
        world.udev_seed = seed.is_multiple_of(2).then_some(seed);
        Self {
            random: fastrand::Rng::with_seed(seed),
            world,
            stores_holds,
            promises: Arc::default(),
            names: 0,
            left: steps,
        }
    }

    /// Plays everything; gives the hash of what has happened.
    fn play(&mut self) -> Result<u64, String> {
        while self.left > 0 {
            self.live()?;
        }
        let files = self.world.files.clone();
        let done = self.world.live(async |harness, clients| {
            harness.quiesce().await;
            harness.clear_out(&files, clients).await;
        });
        done.ok_or("the last daemon has died")?;
        Ok(self.promises.lock().unwrap().trace.hasher.finish())
    }

    fn live(&mut self) -> Result<(), String> {
        let steps = self.random.usize(1..=STEPS_OF_A_LIFE).min(self.left);
        self.left -= steps;
        let (files, stores_holds, promises) =
            (self.world.files.clone(), self.stores_holds, Arc::clone(&self.promises));
        let (random, names) = (&mut self.random, &mut self.names);
        // None of the last daemon's calls is under way any more.
        {
            let mut promises = promises.lock().unwrap();
            promises.under_way = 0;
            promises.ends.values_mut().for_each(|(_, under_way)| *under_way = 0);
            promises.unmounts.values_mut().for_each(|(_, under_way)| *under_way = 0);
            if !stores_holds {
                promises.kept.retain(|promise| matches!(promise, Promise::Stays(_)));
            }
        }
        let dies = random.bool();
        let death = random_death(random);
        let lived: Option<Result<(), String>> = self.world.live(async |harness, clients| {
            harness.quiesce().await;
            harness.agree_on_everything(&files, stores_holds);
            promises.lock().unwrap().check(harness).map_err(|text| format!("after a restart, {text}"))?;
            if let Some(death) = death {
                death.arm(&harness.machine, &files);
            }
            for step in 0..steps {
                while clients.len() < MOST_CLIENTS {
                    *names += 1;
                    let uid = [1000, 1000, 1001, 0][random.usize(..4)];
                    clients.push(Client::new(&format!(":1.{names}"), uid));
                }
                let chosen = choose(random);
                let client = random.usize(..clients.len());
                let client = match chosen {
                    Action::Vanish => clients.swap_remove(client),
                    _ => clients[client].clone(),
                };
                let number = number(random, chosen, &harness.machine);
                begin(harness, &promises, chosen, client, number);
                let pause = Duration::from_micros(random.u64(..4000));
                tokio::time::sleep(pause).await;
                let broken = promises.lock().unwrap().broken.pop();
                broken.map_or(Ok(()), Err)?;
                if step % STEPS_OF_A_ROUND == STEPS_OF_A_ROUND - 1 {
                    harness.rest(&promises).await?;
                    harness.agree_on_everything(&files, stores_holds);
                    promises.lock().unwrap().check(harness)?;
                }
            }
            if dies {
                tokio::time::sleep(Duration::from_micros(random.u64(..20_000))).await;
                harness.machine.die();
                std::future::pending::<()>().await;
            }
            harness.rest(&promises).await?;
            harness.agree_on_everything(&files, stores_holds);
            promises.lock().unwrap().check(harness)
        });
        lived.unwrap_or(Ok(()))
    }
}

/// Which device is acted on. Other programs often meet one that is being attached.
fn number(random: &mut fastrand::Rng, action: Action, machine: &Simulated) -> u32 {
    let any = random.u32(..DEVICES);
    let attaching = machine.claimed_number().filter(|_| action == Action::ForeignDetach && random.bool());
    attaching.unwrap_or(any)
}

/// In one of two lives the daemon dies in the middle of a call.
fn random_death(random: &mut fastrand::Rng) -> Option<Death> {
    match random.u8(..4) {
        0 => Some(Death::Step(random.usize(1..2000))),
        1 => Some(Death::Write(random.usize(..500), random.bool())),
        _ => None,
    }
}

impl Harness {
    /// Waits until nothing is under way: what others have open and mounted stays so.
    async fn rest(&self, promises: &Mutex<Promises>) -> Result<(), String> {
        for _ in 0..20 {
            self.quiesce().await;
            if self.machine.is_idle() && promises.lock().unwrap().under_way == 0 {
                return Ok(());
            }
        }
        Err("it does not come to rest".to_owned())
    }
}

/// Has an action begin on what the number stands for now.
fn begin(
    harness: &Arc<Harness>,
    promises: &Arc<Mutex<Promises>>,
    action: Action,
    client: Client,
    number: u32,
) {
    let id = harness.engine.state().by_number.get(&number).copied();
    let target = Target { id: id.unwrap_or(DiskSequence(0)), number };
    let (step, begun) = {
        let mut promises = promises.lock().unwrap();
        promises.trace.steps += 1;
        let step = promises.trace.steps;
        promises.trace.note(format!(
            "{step}: {action:?} by {} of {} on {} ({number})",
            client.id, client.uid, target.id
        ));
        if action == Action::Vanish {
            promises
                .kept
                .retain(|promise| !matches!(promise, Promise::StaysWith(_, bound) if *bound == client.id.0));
        }
        promises.under_way += 1;
        (step, promises.begin(action, target))
    };
    let (harness, promises) = (Arc::clone(harness), Arc::clone(promises));
    tokio::spawn(async move {
        let answer = perform(Arc::clone(&harness), action, client.clone(), target).await;
        // The dead give no answers.
        if harness.machine.is_dead() {
            return;
        }
        let mut promises = promises.lock().unwrap();
        promises.trace.note(format!("{step} gave {answer:?}"));
        promises.under_way -= 1;
        promises.end(action, target);
        promises.take(action, &client, target, &begun, &answer);
        let held = match (action, &answer) {
            (Action::Detach, Ok(_)) => guarantees::is_gone(&harness, target),
            _ => Ok(()),
        };
        if let Err(text) = held.and_then(|()| promises.check(&harness)) {
            promises.broken.push(text);
        }
    });
}

/// Plays one run. A failure shows how to repeat it.
fn play(seed: u64, steps: usize) -> u64 {
    let mut run = Run::new(seed, steps);
    let promises = Arc::clone(&run.promises);
    let played = std::panic::catch_unwind(AssertUnwindSafe(|| run.play()));
    let text = match played {
        Ok(Ok(hash)) => return hash,
        Ok(Err(text)) => text,
        Err(panic) => panic.downcast_ref::<String>().cloned().unwrap_or_else(|| "it panicked".to_owned()),
    };
    let promises = promises.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    let (step, last) = (promises.trace.steps, Vec::from(promises.trace.last.clone()));
    panic!(
        "seed {seed}, step {step}: {text}\nthe last actions:\n  {}\nplay it again: \
         LOOPD_SEED={seed} LOOPD_STEPS={steps} cargo test -p loopd-engine random_actions",
        last.join("\n  ")
    );
}

fn given(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is no number")))
}

#[test]
fn random_actions_break_no_promise() {
    let steps = given("LOOPD_STEPS").map(|steps| usize::try_from(steps).unwrap());
    if let Some(seed) = given("LOOPD_SEED") {
        let hash = play(seed, steps.unwrap_or(STEPS_OF_A_RUN));
        println!("seed {seed}: {hash:016x}");
        return;
    }
    let runs = (steps.unwrap_or(STEPS) / STEPS_OF_A_RUN) as u64;
    let next = AtomicU64::new(1);
    let work = || {
        loop {
            let seed = next.fetch_add(1, Ordering::Relaxed);
            if seed > runs {
                return;
            }
            play(seed, STEPS_OF_A_RUN);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
}

#[test]
fn a_seed_repeats_a_run() {
    for seed in 1..=3 {
        assert_eq!(play(seed, 600), play(seed, 600), "seed {seed}");
    }
    assert_ne!(play(1, 600), play(2, 600));
}
