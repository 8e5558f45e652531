//! A machine with clients, the daemons that live on it one after the other, and what must hold whenever
//! nothing is under way.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use loopd_common::{ErrorKind, State};

use crate::kernel::{DiskSequence, Udev as _};
use crate::simulated::Files;
use crate::simulated::Simulated;
use crate::tests::clock;
use crate::tests::harness::{Client, Harness, SimulatedEngine};
use crate::tests::mount::whole;
use crate::tests::restart::connected;
use crate::{Phase, VolumeId};

/// udev takes this long for an event, in microseconds.
const PROCESSING: u64 = 1000;
/// How late events may be.
const LATE: Duration = Duration::from_millis(300);
/// Between two daemons, in microseconds.
const BETWEEN: u64 = 10_000;

/// A machine, what is written on it, and its clients.
pub struct World {
    pub machine: Simulated,
    pub files: Files,
    pub clients: Vec<Client>,
    /// Of the random delays and losses of udev's events.
    pub udev_seed: Option<u64>,
    time: u64,
}

/// udev and the watch on the mount table, which sleep while there is nothing to tell. With a seed udev takes a random
/// time for an event, and one in fifty is lost.
async fn prompt_udev(machine: Simulated, engine: SimulatedEngine, late: Arc<AtomicBool>, seed: Option<u64>) {
    let mut random = seed.map(fastrand::Rng::with_seed);
    let mut mount_changes = 0;
    loop {
        if mount_changes != machine.mount_changes() {
            mount_changes = machine.mount_changes();
            engine.mounts_changed(machine.mount_table());
        }
        if late.swap(false, Ordering::Relaxed) {
            tokio::time::sleep(LATE).await;
        }
        if machine.udev_is_idle() {
            machine.news().await;
            continue;
        }
        let processing =
            random.as_mut().map_or(PROCESSING, |random| random.u64(PROCESSING / 2..5 * PROCESSING));
        tokio::time::sleep(Duration::from_micros(processing)).await;
        let is_lost = random.as_mut().is_some_and(|random| random.u8(..50) == 0);
        match (machine.take_uevent(), is_lost) {
            (Some(event), false) => engine.observe(event),
            (Some(_), true) => engine.events_lost(),
            (None, true) if machine.take_mapping_event().is_some() => engine.events_lost(),
            (None, _) => {
                let event = machine.take_mapping_event();
                event.iter().for_each(|event| engine.observe_mapping(event));
            }
        }
    }
}

impl Harness {
    /// The next event comes late.
    pub fn delay_events(&self) {
        self.late.store(true, Ordering::Relaxed);
    }

    fn start_prompt_udev(&self, seed: Option<u64>) {
        let udev = prompt_udev(self.machine.clone(), Arc::clone(&self.engine), Arc::clone(&self.late), seed);
        self.tasks.lock().unwrap().spawn(udev);
    }

    /// Waits until nothing is under way, not even a time that something has left.
    pub async fn quiesce(&self) {
        let settings = self.engine.settings();
        tokio::time::sleep(settings.mount_grace + 2 * settings.wait_for_users).await;
        self.engine.flush_events().await;
    }

    /// Engine, kernel, bus, files, directories, mounts and quotas agree.
    pub fn agree_on_everything(&self, files: &Files, stores_holds: bool) {
        self.agree();
        let list = self.engine.list();
        let ours: BTreeMap<DiskSequence, _> =
            list.iter().filter_map(|found| Some((found.id, (found, found.ownership.as_ref()?)))).collect();
        let written: BTreeMap<DiskSequence, _> =
            files.saved().into_iter().map(|saved| (saved.id, saved)).collect();
        assert_eq!(
            written.keys().collect::<Vec<_>>(),
            ours.keys().collect::<Vec<_>>(),
            "what is written and what is listed"
        );
        for (id, (found, ownership)) in &ours {
            let saved = &written[id];
            let phase = if found.state == State::Attached { Phase::Attached } else { Phase::Detaching };
            assert_eq!(
                (&saved.ownership, saved.phase, saved.disk_sequence, saved.next_file, &saved.cleartexts),
                (*ownership, phase, found.device.disk_sequence, None, &found.saved_cleartexts),
                "what is written of {id}"
            );
        }
        assert_eq!(files.marks(), Vec::<u64>::new(), "announcements are left");
        self.check_directories(files);
        self.check_devices(stores_holds);
        self.check_quotas();
    }

    fn check_directories(&self, files: &Files) {
        let directories = self.mounts.directories();
        let known: Vec<_> = files.directories().into_iter().map(|place| place.path).collect();
        assert_eq!(directories, known, "the directories, and what is written of them");
        let table = self.machine.mount_table();
        for directory in directories {
            assert!(table.has(&directory), "nothing is mounted on {directory:?}");
        }
    }

    fn check_devices(&self, stores_holds: bool) {
        let state = self.engine.state();
        for (id, record) in &state.records {
            let number = record.device.number;
            assert_eq!(state.by_number.get(&number), Some(id), "what /dev/loop{number} stands for");
            assert!(record.is_published() && !record.lifecycle.is_replacing(), "{id} is under way");
            assert!(record.operation.try_lock().is_ok(), "{id} is locked");
            let held = usize::from(record.hold.is_some());
            assert_eq!(self.machine.holds(number), held, "descriptors of /dev/loop{number}");
            let stored_copies = if stores_holds { held } else { 0 };
            assert_eq!(
                self.machine.stored_copies(number),
                stored_copies,
                "copies of descriptors of /dev/loop{number}"
            );
        }
    }

    fn check_quotas(&self) {
        let mut expected = BTreeMap::new();
        for ownership in self.engine.list().iter().filter_map(|found| found.ownership.as_ref()) {
            *expected.entry(ownership.uid).or_insert(0) += 1;
        }
        assert_eq!(self.engine.attachment_quota.counted(), expected, "attachments of each uid");
        let mut unlocked = BTreeMap::new();
        for cleartext in self.engine.list().iter().flat_map(|found| &found.saved_cleartexts) {
            *unlocked.entry(cleartext.uid).or_insert(0) += 1;
        }
        assert_eq!(self.engine.cleartext_quota.counted(), unlocked, "cleartexts of each uid");
        let directories = self.mounts.directories().len();
        assert_eq!(
            self.engine.mount_quota.counted().values().sum::<usize>(),
            directories,
            "mounts of each uid"
        );
    }

    /// Everyone goes and everything is closed, unmounted and detached: nothing is left.
    pub async fn clear_out(&self, files: &Files, clients: &[Client]) {
        for client in clients {
            client.vanish(&self.engine);
        }
        for (number, ..) in self.machine.bound() {
            self.machine.leave_alone(number);
        }
        self.quiesce().await;
        self.engine.resync().await;
        for found in self.engine.list() {
            let client = found.ownership.as_ref().and_then(|ownership| ownership.client.clone());
            assert_eq!(client, None, "the client of {} is gone", found.device.node());
            for cleartext in &found.saved_cleartexts {
                let VolumeId { attachment, is_cleartext, .. } = whole(&found);
                let volume = VolumeId { attachment, partition: cleartext.partition, is_cleartext };
                if let Err(error) = self.engine.lock(volume, false).await {
                    assert_eq!(error.kind(), ErrorKind::NotFound, "{volume:?} cannot be locked: {error}");
                }
            }
            if let Err(error) = self.engine.detach(found.id, false).await {
                panic!("{} cannot be detached: {error}", found.device.node());
            }
        }
        self.quiesce().await;
        self.agree_on_everything(files, false);
        assert_eq!(self.machine.bound(), [], "devices are left");
        assert_eq!(self.mounts.directories(), Vec::<std::path::PathBuf>::new(), "directories are left");
        assert!(self.engine.file_locks.are_free() && self.engine.status_locks.are_free(), "locks are left");
    }
}

impl World {
    pub fn new(machine: Simulated, stores_holds: bool) -> Self {
        if stores_holds {
            machine.keep_holds();
        }
        let files = Files::on(&machine);
        Self { machine, files, clients: Vec::new(), udev_seed: None, time: 1_000_000 }
    }

    /// A daemon lives on the machine until the body ends or it dies; it first adopts what an earlier
    /// one has left. `None` if it died.
    pub fn live<T>(&mut self, body: impl AsyncFnOnce(&Arc<Harness>, &mut Vec<Client>) -> T) -> Option<T> {
        self.machine.revive();
        self.files.stay_alive();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build();
        let runtime = runtime.unwrap();
        let (machine, files, clients) = (self.machine.clone(), self.files.clone(), &mut self.clients);
        let (start, seed) = (self.time, self.udev_seed);
        let (done, time) = runtime.block_on(async {
            clock::start(start);
            let harness = Arc::new(Harness::with_files(machine.clone(), files));
            let connected = connected(clients.clone());
            let done = tokio::select! {
                biased;
                () = machine.death() => None,
                done = async {
                    harness.engine.restore(connected).await;
                    harness.engine.resync().await;
                    harness.engine.flush_events().await;
                    harness.start_prompt_udev(seed);
                    body(&harness, clients).await
                } => Some(done),
            };
            (done, clock::microseconds().unwrap_or(start))
        });
        // Everything that the daemon has begun ends here, and its descriptors are closed.
        drop(runtime);
        clock::stop();
        self.time = time + BETWEEN;
        done
    }
}

/// A future that says each time that it is suspended.
pub struct Watched<F> {
    future: Pin<Box<F>>,
    machine: Simulated,
}

impl<F> Watched<F> {
    pub fn new(machine: &Simulated, future: F) -> Self {
        Self { future: Box::pin(future), machine: machine.clone() }
    }
}

impl<F: Future> Future for Watched<F> {
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<F::Output> {
        let polled = self.future.as_mut().poll(context);
        if polled.is_pending() {
            self.machine.moment();
        }
        polled
    }
}
