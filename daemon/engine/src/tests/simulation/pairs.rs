//! Every pair of actions on one device, the second one begun at every moment of the first.
//!
//! Two calls at the same time must have the result of one after the other, in either order. A call that failed has
//! changed nothing. A call to which a daemon that died has not replied may have had its effect or not.

use std::collections::HashMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::Duration;

use loopd_common::{ErrorKind, Lifetime, Overlap};

use super::action::{ALL, Action, Answer, Reply, Target, perform};
use super::guarantees::{self, check_answer};
use super::world::{Watched, World};
use crate::Snapshot;
use crate::simulated::Simulated;
use crate::tests::harness::{Client, Harness};

/// Between actions that follow each other: at once; after what a call leaves to be done; after the time for a
/// first mount.
const PAUSES: [Duration; 3] = [Duration::ZERO, Duration::from_millis(1500), Duration::from_secs(5)];

/// Who actions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Who {
    /// The client that the device was attached by.
    Owner,
    /// Another client of the same user.
    Same,
    /// A client of another user.
    Other,
    /// A client of root.
    Root,
}

impl Who {
    fn all() -> Vec<Client> {
        let clients = [(":1.1", 7), (":1.2", 7), (":1.3", 8), (":1.4", 0)];
        clients.map(|(name, uid)| Client::new(name, uid)).to_vec()
    }
}

/// What there is before the first action.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Setup {
    Attached(Lifetime),
    Mounted(Lifetime),
    Unlocked(Lifetime),
    /// The cleartext is mounted.
    MountedCleartext(Lifetime),
    /// By another program.
    Open(Lifetime),
    /// Detached lazily, and open.
    Detaching,
    /// By another program.
    Foreign,
}

const SETUPS: [Setup; 14] = [
    Setup::Attached(Lifetime::Client),
    Setup::Attached(Lifetime::Mount),
    Setup::Attached(Lifetime::Persistent),
    Setup::Mounted(Lifetime::Client),
    Setup::Mounted(Lifetime::Mount),
    Setup::Mounted(Lifetime::Persistent),
    Setup::Unlocked(Lifetime::Client),
    Setup::Unlocked(Lifetime::Persistent),
    Setup::MountedCleartext(Lifetime::Mount),
    Setup::MountedCleartext(Lifetime::Persistent),
    Setup::Open(Lifetime::Client),
    Setup::Open(Lifetime::Persistent),
    Setup::Detaching,
    Setup::Foreign,
];

/// One in so many of the circumstances of each pair is played by default.
const SHARE: usize = 17;

type Step = (Who, Action);

/// Actions, each with the moment at which it begins.
#[derive(Clone, Debug)]
struct Scene {
    setup: Setup,
    stores_holds: bool,
    steps: Vec<Step>,
    begins: Begins,
}

#[derive(Clone, Debug)]
enum Begins {
    /// Each when the one before it has been over for so long.
    InTurn(Duration),
    /// The first at once, the others at these moments of what follows.
    At(Vec<usize>),
}

/// What came of a scene.
#[derive(Clone, Debug)]
struct Outcome {
    answers: Vec<Option<Answer>>,
    /// From and to which moment each action was under way.
    spans: Vec<Option<(usize, usize)>>,
    seen: Vec<Seen>,
    died: bool,
    /// Promises that did not hold at the moment of the answer.
    broken: Vec<String>,
}

impl Outcome {
    fn is_done(&self, index: usize) -> bool {
        matches!(self.answers[index], Some(Ok(_)))
    }

    fn has_failed(&self, index: usize) -> bool {
        matches!(self.answers[index], Some(Err(_)))
    }
}

/// What can be seen of an attachment, by whatever number and sequence it has.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Seen {
    is_target: bool,
    file: u64,
    state: &'static str,
    /// Uid, lifetime, client.
    owner: Option<(u32, &'static str, Option<String>)>,
    mounts: Vec<String>,
    /// Of the cleartext: its mounts, and whether it is locked lazily.
    cleartext: Option<(Vec<String>, bool)>,
    direct_io: bool,
    block_size: u32,
    autoclear: bool,
}

impl Seen {
    fn of(found: &Snapshot, target: Target, machine: &Simulated) -> Self {
        let directory = |path: &std::path::PathBuf| path.parent().map(|parent| parent.display().to_string());
        let owner = found.ownership.as_ref().map(|owner| {
            (owner.uid, owner.lifetime.as_str(), owner.client.as_ref().map(ToString::to_string))
        });
        let directories = |paths: &[std::path::PathBuf]| {
            let mut directories: Vec<String> = paths.iter().filter_map(directory).collect();
            directories.sort_unstable();
            directories
        };
        let cleartext = found.cleartext.as_ref().zip(found.saved_cleartexts.first());
        let cleartext =
            cleartext.map(|(cleartext, saved)| (directories(&cleartext.mount_points), saved.closing));
        Self {
            is_target: found.id == target.id,
            file: found.device.backing_inode,
            state: found.state.as_str(),
            owner,
            mounts: directories(&found.mount_points),
            cleartext,
            direct_io: found.device.direct_io,
            block_size: found.device.block_size,
            // Not as it is shown, which is as of the last event.
            autoclear: machine.goes_at_last_close(&found.device),
        }
    }
}

/// What has begun, and what has ended.
struct Play {
    scene: Scene,
    target: Target,
    clients: Vec<Client>,
    harness: Weak<Harness>,
    machine: Simulated,
    moments: AtomicUsize,
    answers: Mutex<Vec<Option<Answer>>>,
    spans: Mutex<Vec<Option<(usize, usize)>>>,
    broken: Mutex<Vec<String>>,
}

impl Play {
    fn moment(self: &Arc<Self>) {
        let now = self.moments.fetch_add(1, Ordering::Relaxed) + 1;
        if let Begins::At(moments) = &self.scene.begins {
            for (index, _) in moments.iter().enumerate().filter(|(_, at)| **at == now) {
                self.begin(index + 1);
            }
        }
    }

    fn begin(self: &Arc<Self>, index: usize) {
        let Some(harness) = self.harness.upgrade() else { return };
        if self.machine.is_dead() {
            return;
        }
        let now = self.moments.load(Ordering::Relaxed);
        self.spans.lock().unwrap()[index] = Some((now, usize::MAX));
        let (who, action) = self.scene.steps[index];
        if action == Action::Die {
            return self.machine.die();
        }
        let client = self.clients[who as usize].clone();
        let (play, target) = (Arc::clone(self), self.target);
        let performed = Watched::new(&self.machine, perform(harness, action, client, target));
        tokio::spawn(async move {
            let answer = performed.await;
            play.note(index, answer);
        });
    }

    /// The dead give no answers.
    fn note(&self, index: usize, answer: Answer) {
        if self.machine.is_dead() {
            return;
        }
        if let Some(harness) = self.harness.upgrade() {
            let others = self.scene.steps.iter().enumerate().filter(|(other, _)| *other != index);
            let others: Vec<Action> = others.map(|(_, (_, action))| *action).collect();
            let action = self.scene.steps[index].1;
            if let Err(text) = check_answer(&harness, action, &answer, self.target, &others) {
                self.broken.lock().unwrap().push(text);
            }
        }
        let now = self.moments.load(Ordering::Relaxed);
        if let Some(span) = &mut self.spans.lock().unwrap()[index] {
            span.1 = now;
        }
        self.answers.lock().unwrap()[index] = Some(answer);
    }

    async fn await_end(&self, index: usize) {
        for _ in 0..6000 {
            if self.is_over(index) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{:?} comes to no end", self.scene.steps[index]);
    }

    fn is_over(&self, index: usize) -> bool {
        self.spans.lock().unwrap()[index].is_none() || self.answers.lock().unwrap()[index].is_some()
    }
}

impl Scene {
    fn play(&self) -> Outcome {
        let mut world = World::new(Simulated::unhurried(), self.stores_holds);
        world.clients = Who::all();
        let noted: Arc<Mutex<Option<Arc<Play>>>> = Arc::default();
        let files = world.files.clone();
        let seen = world.live(async |harness, clients| {
            let target = self.set_up(harness, &clients[0]).await;
            let play = Arc::new(Play {
                scene: self.clone(),
                target,
                clients: clients.clone(),
                harness: Arc::downgrade(harness),
                machine: harness.machine.clone(),
                moments: AtomicUsize::new(0),
                answers: Mutex::new(vec![None; self.steps.len()]),
                spans: Mutex::new(vec![None; self.steps.len()]),
                broken: Mutex::default(),
            });
            *noted.lock().unwrap() = Some(Arc::clone(&play));
            let watching = Arc::downgrade(&play);
            harness.machine.watch(Arc::new(move || {
                if let Some(play) = watching.upgrade() {
                    play.moment();
                }
            }));
            match self.begins {
                Begins::At(_) => play.begin(0),
                Begins::InTurn(pause) => {
                    for index in 0..self.steps.len() {
                        play.begin(index);
                        play.await_end(index).await;
                        tokio::time::sleep(pause).await;
                    }
                }
            }
            // What is left under way by what was begun is a moment as well.
            harness.quiesce().await;
            for index in 0..self.steps.len() {
                play.await_end(index).await;
            }
            harness.quiesce().await;
            harness.machine.unwatch();
            self.scan(harness, clients, &files, target).await
        });
        let play = noted.lock().unwrap().take().expect("the first daemon got so far");
        let died = seen.is_none();
        let seen = seen.unwrap_or_else(|| {
            let next = world.live(async |harness, clients| {
                harness.quiesce().await;
                self.scan(harness, clients, &files, play.target).await
            });
            next.expect("the second daemon lives")
        });
        let answers = play.answers.lock().unwrap().clone();
        let spans = play.spans.lock().unwrap().clone();
        let broken = play.broken.lock().unwrap().clone();
        Outcome { answers, spans, seen, died, broken }
    }

    async fn set_up(&self, harness: &Harness, owner: &Client) -> Target {
        let attach = async |lifetime| Target::of(&harness.attach(owner, lifetime).await.unwrap());
        let target = match self.setup {
            Setup::Attached(lifetime) => attach(lifetime).await,
            Setup::Mounted(lifetime) => {
                let target = attach(lifetime).await;
                let volume = crate::VolumeId { attachment: target.id, partition: None, is_cleartext: false };
                let wanted = crate::tests::mount::wanted();
                harness.engine.mount(volume, &wanted, owner).await.unwrap();
                target
            }
            Setup::Unlocked(lifetime) | Setup::MountedCleartext(lifetime) => {
                let target = attach(lifetime).await;
                let volume = crate::VolumeId { attachment: target.id, partition: None, is_cleartext: false };
                harness.engine.unlock(volume, crate::tests::unlock::secret(), owner).await.unwrap();
                if self.setup == Setup::MountedCleartext(lifetime) {
                    let cleartext = crate::VolumeId { is_cleartext: true, ..volume };
                    let wanted = crate::tests::mount::wanted();
                    harness.engine.mount(cleartext, &wanted, owner).await.unwrap();
                }
                target
            }
            Setup::Open(lifetime) => {
                let target = attach(lifetime).await;
                harness.machine.open_elsewhere(target.number);
                target
            }
            Setup::Detaching => {
                let target = attach(Lifetime::Persistent).await;
                harness.machine.open_elsewhere(target.number);
                harness.engine.detach(target.id, true).await.unwrap();
                target
            }
            Setup::Foreign => {
                harness.machine.attach_elsewhere(1);
                harness.engine.resync().await;
                Target::of(&harness.engine.list()[0])
            }
        };
        harness.quiesce().await;
        target
    }

    /// What is there at the end; then everything must go.
    async fn scan(
        &self,
        harness: &Harness,
        clients: &[Client],
        files: &crate::simulated::Files,
        target: Target,
    ) -> Vec<Seen> {
        harness.agree_on_everything(files, self.stores_holds);
        let mut seen: Vec<Seen> =
            harness.engine.list().iter().map(|found| Seen::of(found, target, &harness.machine)).collect();
        seen.sort_unstable();
        harness.clear_out(files, clients).await;
        seen
    }
}

/// What comes of actions one after the other.
#[derive(Default)]
struct InTurn(HashMap<(Vec<Step>, Duration), Outcome>);

impl InTurn {
    fn of(&mut self, scene: &Scene, steps: &[Step], pause: Duration) -> &Outcome {
        self.0.entry((steps.to_vec(), pause)).or_insert_with(|| {
            let begins = Begins::InTurn(pause);
            Scene { steps: steps.to_vec(), begins, ..scene.clone() }.play()
        })
    }
}

/// Whether some order of the actions that were made explains what came of them.
fn is_explained(scene: &Scene, outcome: &Outcome, in_turn: &mut InTurn) -> bool {
    let explains = |expected: &Outcome, steps: &[(Step, Option<usize>)]| {
        let answered = steps.iter().zip(&expected.answers).all(|((_, index), expected)| {
            let answer = index.and_then(|index| outcome.answers[index].as_ref());
            answer.is_none() || expected.is_none() || kind(answer) == kind(expected.as_ref())
        });
        answered && expected.seen == outcome.seen && expected.died == outcome.died
    };
    let is_so = explanations(scene, outcome).iter().any(|steps| {
        let actions: Vec<Step> = steps.iter().map(|(step, _)| *step).collect();
        PAUSES.iter().any(|pause| explains(in_turn.of(scene, &actions, *pause), steps))
    });
    has_halves(scene, outcome)
        || is_so && (0..scene.steps.len()).all(|index| is_justified(scene, outcome, index, in_turn))
}

/// What is not as one action after the other, and may be so.
fn has_halves(scene: &Scene, outcome: &Outcome) -> bool {
    use Action::*;
    let any = |wanted: &dyn Fn(usize, Action) -> bool| {
        scene.steps.iter().enumerate().any(|(index, (_, action))| wanted(index, *action))
    };
    let has_failed = |index: usize, kind| outcome.answers[index] == Some(Err(kind));
    // The end that follows the last mount is an action of its own, and others may come before it.
    let ends_by_itself =
        matches!(scene.setup, Setup::Mounted(Lifetime::Mount) | Setup::MountedCleartext(Lifetime::Mount))
            && any(&|_, action| guarantees::unmounts(action));
    // So is the end of the time for the first mount: others may begin to use it at that moment.
    let ends_in_time = matches!(scene.setup, Setup::Attached(Lifetime::Mount))
        && any(&|_, action| action == Vanish)
        && any(&|_, action| matches!(action, ForeignMount | Open));
    // Its lifetime was not published yet, and without its hold it may end with the daemon.
    let dies_during_lifetime = outcome.died
        && any(&|index, action| {
            matches!(action, SetLifetime(_) | Attach(_, Overlap::Reuse)) && outcome.answers[index].is_none()
        });
    // A detach that waits for passing users has the device, and a lazy one does not wait for it.
    let is_lazy = |action| matches!(action, DetachLazily | LockLazily);
    let detaches_twice = any(&|_, action| matches!(action, Detach | Lock | Unlock))
        && any(&|index, action| is_lazy(action) && has_failed(index, ErrorKind::Busy));
    // A lazy detach closes the cleartext first.
    let is_unlocked = matches!(scene.setup, Setup::Unlocked(_) | Setup::MountedCleartext(_));
    let dies_during_end = outcome.died
        && is_unlocked
        && any(&|index, action| action == DetachLazily && outcome.answers[index].is_none());
    // Then another program may mount the device.
    let mounts_during_end = is_unlocked
        && any(&|_, action| matches!(action, DetachLazily | Vanish))
        && any(&|_, action| action == ForeignMount);
    // The kernel has one flag for both: a detach that fails as busy takes back that of another program.
    let takes_back_both = any(&|index, action| action == Detach && has_failed(index, ErrorKind::Busy))
        && any(&|_, action| action == ForeignDetach);
    // Without a stored hold, a mount that a dead daemon has begun keeps the device until the next one undoes it.
    let dies_during_mount = outcome.died
        && !scene.stores_holds
        && any(&|index, action| action == Mount && outcome.answers[index].is_none());
    ends_by_itself
        || ends_in_time
        || dies_during_lifetime
        || detaches_twice
        || dies_during_end
        || mounts_during_end
        || takes_back_both
        || dies_during_mount
}

/// The orders that may explain what came of the actions, each with the indices of those whose answers are
/// known. A mount that has no good answer may have been made and undone. A detach that a daemon died over may
/// have begun to end the device: as with a lazy one, it ends at the last close.
fn explanations(scene: &Scene, outcome: &Outcome) -> Vec<Vec<(Step, Option<usize>)>> {
    let mut all = Vec::new();
    for order in orders(scene.steps.len()).into_iter().filter(|order| is_possible(scene, outcome, order)) {
        let (mut plain, mut undone) = (Vec::new(), Vec::new());
        for index in order {
            let (who, action) = scene.steps[index];
            plain.push(((who, action), Some(index)));
            match action {
                Action::Mount if !outcome.is_done(index) => {
                    undone.extend([((who, action), None), ((who, Action::Unmount), None)]);
                }
                Action::MountCleartext if !outcome.is_done(index) => {
                    undone.extend([((who, action), None), ((who, Action::UnmountCleartext), None)]);
                }
                Action::Unlock if !outcome.is_done(index) => {
                    undone.extend([((who, action), None), ((who, Action::Lock), None)]);
                }
                Action::Lock if outcome.died && outcome.answers[index].is_none() => {
                    undone.push(((who, Action::LockLazily), None));
                }
                Action::Detach if outcome.died && outcome.answers[index].is_none() => {
                    undone.push(((who, Action::DetachLazily), None));
                }
                _ => undone.push(((who, action), Some(index))),
            }
        }
        if plain != undone {
            all.push(undone);
        }
        all.push(plain);
    }
    all
}

/// Whether a call that failed could fail in some order, or was disturbed.
fn is_justified(scene: &Scene, outcome: &Outcome, index: usize, in_turn: &mut InTurn) -> bool {
    if !outcome.has_failed(index) {
        return true;
    }
    scene.steps.iter().any(|(_, action)| !action.is_call())
        || orders(scene.steps.len()).iter().filter(|order| order.contains(&index)).any(|order| {
            let steps: Vec<Step> = order.iter().map(|index| scene.steps[*index]).collect();
            let position = order.iter().position(|other| *other == index);
            position.is_some_and(|position| {
                PAUSES
                    .iter()
                    .any(|pause| matches!(in_turn.of(scene, &steps, *pause).answers[position], Some(Err(_))))
            })
        })
}

fn kind(answer: Option<&Answer>) -> Option<Result<(), ErrorKind>> {
    answer.map(|answer| answer.as_ref().map(|_: &Reply| ()).map_err(|kind| *kind))
}

/// Whether the actions may have been made in this order, and those that are not in it not at all.
fn is_possible(scene: &Scene, outcome: &Outcome, order: &[usize]) -> bool {
    let actions: Vec<Action> = scene.steps.iter().map(|(_, action)| *action).collect();
    let left_out = (0..actions.len()).filter(|index| !order.contains(index));
    let may_be_left_out = |index: usize| {
        outcome.spans[index].is_none() || (actions[index].is_call() && !outcome.is_done(index))
    };
    let has_begun = |index: &usize| outcome.spans[*index].is_some();
    // One that failed has changed nothing, but for one that is undone.
    let is_undone = |action| matches!(action, Action::Mount | Action::MountCleartext | Action::Unlock);
    let has_effect = |index: &usize| is_undone(actions[*index]) || !outcome.has_failed(*index);
    let ends_last = |index: &usize| !actions[*index].ends_daemon() || order.last() == Some(index);
    let keeps_time = order.iter().enumerate().all(|(position, later)| {
        order[..position].iter().all(|earlier| !ended_before(outcome, &actions, *later, *earlier))
    });
    left_out.into_iter().all(may_be_left_out)
        && order.iter().all(has_begun)
        && order.iter().all(has_effect)
        && order.iter().all(ends_last)
        && keeps_time
}

/// Whether one action was over before another began; the effects of a disconnect take longer.
fn ended_before(outcome: &Outcome, actions: &[Action], one: usize, other: usize) -> bool {
    match (outcome.spans[one], outcome.spans[other]) {
        (Some((_, end)), Some((start, _))) => actions[one].is_call() && end < start,
        _ => false,
    }
}

/// Every order of every choice of so many actions.
fn orders(count: usize) -> Vec<Vec<usize>> {
    let (mut all, mut last) = (vec![Vec::new()], vec![Vec::new()]);
    for _ in 0..count {
        let longer = last.iter().flat_map(|order: &Vec<usize>| {
            let free = (0..count).filter(|index| !order.contains(index));
            free.map(|index| order.iter().copied().chain([index]).collect::<Vec<_>>()).collect::<Vec<_>>()
        });
        last = longer.collect();
        all.extend(last.clone());
    }
    all
}

/// Plays the scene; false if an action was not reached.
fn try_scene(scene: &Scene, in_turn: &mut InTurn) -> Result<bool, String> {
    let tried = std::panic::catch_unwind(AssertUnwindSafe(|| explain(scene, in_turn)));
    tried.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().map(String::as_str);
        Err(format!("{scene:?}: {}", text.or(panic.downcast_ref::<&str>().copied()).unwrap_or("panicked")))
    })
}

fn explain(scene: &Scene, in_turn: &mut InTurn) -> Result<bool, String> {
    let outcome = scene.play();
    if outcome.spans.iter().any(Option::is_none) {
        return Ok(false);
    }
    if !outcome.broken.is_empty() {
        return Err(format!("{scene:?}: {:?}", outcome.broken));
    }
    if is_explained(scene, &outcome, in_turn) {
        return Ok(true);
    }
    let mut text = format!("{scene:?}: no order explains {:?}, {:?}", outcome.answers, outcome.seen);
    for steps in explanations(scene, &outcome) {
        let steps: Vec<Step> = steps.iter().map(|(step, _)| *step).collect();
        let expected = in_turn.of(scene, &steps, PAUSES[1]);
        text.push_str(&format!("\n  {steps:?} gives {:?}, {:?}", expected.answers, expected.seen));
    }
    Err(text)
}

/// Does this for each of them, on every processor.
fn on_every_processor<T: Sync>(all: &[T], work: impl Fn(&T) -> usize + Sync) -> usize {
    let next = AtomicUsize::new(0);
    let workers = std::thread::available_parallelism().map_or(1, usize::from);
    let worker = || {
        let mut scenes = 0;
        while let Some(one) = all.get(next.fetch_add(1, Ordering::Relaxed)) {
            scenes += work(one);
        }
        scenes
    };
    std::thread::scope(|scope| {
        let workers: Vec<_> = (0..workers).map(|_| scope.spawn(worker)).collect();
        workers.into_iter().map(|worker| worker.join().expect("a scene failed")).sum()
    })
}

/// A pair, and the circumstances in which it is played.
#[derive(Clone, Copy, Debug)]
struct Pair {
    setup: Setup,
    first: Action,
    second: Action,
    who: Who,
    stores_holds: bool,
}

/// Every pair in some circumstances, so that all of them come up, and everything with a client that
/// disconnects; if `LOOPD_PAIRS` is `all`, every pair in all of them.
fn pairs() -> Vec<Pair> {
    let of_everything = std::env::var("LOOPD_PAIRS").is_ok_and(|wanted| wanted == "all");
    let mut all = Vec::new();
    for first in ALL.into_iter().filter(|action| !action.ends_daemon()) {
        for second in ALL {
            for setup in SETUPS {
                for who in [Who::Owner, Who::Same, Who::Other, Who::Root] {
                    all.push(Pair { setup, first, second, who, stores_holds: all.len() % 3 != 0 });
                }
            }
        }
    }
    let is_always = |pair: &Pair| pair.second == Action::Vanish && pair.who == Who::Owner;
    let chosen = all.into_iter().enumerate();
    let chosen = chosen.filter(|(index, pair)| of_everything || index % SHARE == 0 || is_always(pair));
    chosen.map(|(_, pair)| pair).collect()
}

/// Plays a pair with the second action at every moment; says how many scenes that were.
fn try_pair(pair: &Pair) -> Result<usize, String> {
    let mut in_turn = InTurn::default();
    let steps = vec![(Who::Owner, pair.first), (pair.who, pair.second)];
    for moment in 1.. {
        let begins = Begins::At(vec![moment]);
        let scene =
            Scene { setup: pair.setup, stores_holds: pair.stores_holds, steps: steps.clone(), begins };
        if !try_scene(&scene, &mut in_turn)? {
            return Ok(moment);
        }
    }
    unreachable!("there are no more moments")
}

#[test]
fn every_pair_of_actions_has_the_result_of_some_order() {
    let failures = Mutex::new(Vec::new());
    let scenes = on_every_processor(&pairs(), |pair| {
        try_pair(pair).unwrap_or_else(|text| {
            failures.lock().unwrap().push(text);
            0
        })
    });
    println!("{scenes} scenes");
    let failures = failures.into_inner().unwrap();
    assert!(failures.is_empty(), "{} pairs fail:\n{}", failures.len(), failures.join("\n"));
}
