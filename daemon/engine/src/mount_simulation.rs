//! Mounting on a simulated machine: it fails at every step, callers vanish and the daemon is asked to end
//! at every moment, others unmount and detach meanwhile.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use loopd_common::{Error, ErrorKind, Lifetime, State};

use super::simulation::{Client, House};
use super::{
    Account, AttachRequest, Caller as _, Doing, MountOrder, MountRequest, Mounter, Order, Snapshot, VolumeId,
};
use crate::simulated::{Interference, Simulated};

/// Where the first mount of uid 7 comes to lie: the simulated images have neither labels nor names.
const PLACE: &str = "/run/media/user7/image";

/// Who mounts on a simulated machine: what it has made outlives the daemon.
#[derive(Clone)]
pub struct SimulatedMounts {
    machine: Simulated,
    host: Arc<Mutex<Host>>,
}

#[derive(Default)]
struct Host {
    folders: BTreeSet<PathBuf>,
    /// Somebody sits in them.
    used: BTreeSet<PathBuf>,
    /// Mounts come to no end.
    hangs: bool,
}

impl SimulatedMounts {
    pub fn on(machine: &Simulated) -> Self {
        Self { machine: machine.clone(), host: Arc::default() }
    }

    fn host(&self) -> MutexGuard<'_, Host> {
        self.host.lock().unwrap()
    }

    /// The folders that there are.
    pub fn folders(&self) -> Vec<PathBuf> {
        self.host().folders.iter().cloned().collect()
    }

    /// Somebody sits in a folder, or leaves it.
    fn sit_in(&self, path: &Path, sits: bool) {
        if sits {
            self.host().used.insert(path.to_owned());
        } else {
            self.host().used.remove(path);
        }
    }

    async fn start(&self, order: MountOrder) -> Result<(), Error> {
        self.machine.step().await?;
        let hangs = self.host().hangs;
        if hangs {
            tokio::time::sleep(order.patience).await;
            return Err(Error::new(ErrorKind::Timeout, "it hangs"));
        }
        assert!(self.host().folders.contains(&order.place), "{:?} was not made", order.place);
        let (number, partition) = parse(&order.device);
        if !self.machine.mount_on(number, partition, order.place) {
            return Err(Error::new(ErrorKind::Kernel, "the device is gone"));
        }
        // It is mounted, and nobody was told yet.
        self.machine.step().await
    }
}

fn parse(node: &str) -> (u32, Option<u32>) {
    let words = node.strip_prefix("/dev/loop").unwrap();
    let (number, partition) = words.split_once('p').map_or((words, None), |(one, other)| (one, Some(other)));
    (number.parse().unwrap(), partition.map(|partition| partition.parse().unwrap()))
}

impl Mounter for SimulatedMounts {
    fn account(&self, uid: u32) -> Doing<'_, Account> {
        Box::pin(async move { Account { uid, gid: Some(uid), name: format!("user{uid}") } })
    }

    fn path(&self, account: &Account, name: &str) -> PathBuf {
        Path::new("/run/media").join(&account.name).join(name)
    }

    fn is_there(&self, path: PathBuf) -> Doing<'_, bool> {
        Box::pin(async move { self.host().folders.contains(&path) })
    }

    fn make(&self, path: PathBuf, _: u32) -> Doing<'_, Result<bool, Error>> {
        Box::pin(async move {
            self.machine.step().await?;
            Ok(self.host().folders.insert(path))
        })
    }

    fn mount(&self, order: MountOrder) -> Doing<'_, Result<(), Error>> {
        Box::pin(self.start(order))
    }

    fn unmount(&self, path: PathBuf, lazy: bool, _: Duration) -> Doing<'_, Result<(), Error>> {
        Box::pin(async move {
            self.machine.step().await?;
            if self.host().used.contains(&path) && !lazy {
                return Err(Error::new(ErrorKind::Busy, "in use"));
            }
            self.machine.unmount_from(&path);
            self.machine.step().await
        })
    }

    fn undo(&self, path: PathBuf, _: Duration) -> Doing<'_, ()> {
        Box::pin(async move {
            let _nothing_stops_it = self.machine.step().await;
            while self.machine.unmount_from(&path) {}
        })
    }

    fn remove(&self, path: PathBuf) -> Doing<'_, Result<(), Error>> {
        Box::pin(async move {
            let _nothing_stops_it = self.machine.step().await;
            assert!(!self.machine.mount_table().has(&path), "something is mounted on {path:?}");
            self.host().folders.remove(&path);
            Ok(())
        })
    }
}

/// What may be asked for whatever udev says.
pub(super) fn wanted() -> MountRequest {
    MountRequest { filesystem: "ext2".to_owned(), ..MountRequest::default() }
}

pub(super) fn whole(attachment: &Snapshot) -> VolumeId {
    VolumeId { attachment: attachment.id, partition: None }
}

fn part(attachment: &Snapshot, number: u32) -> VolumeId {
    VolumeId { attachment: attachment.id, partition: Some(number) }
}

async fn attached(house: &House, client: &Client, lifetime: Lifetime) -> Snapshot {
    house.attach(client, lifetime).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn a_mount_is_seen_and_everything_goes_with_it() {
    let house = House::with_udev();
    let client = Client::new(":1.1", 7);
    let attachment = attached(&house, &client, Lifetime::Mount).await;
    let place = house.engine.mount(whole(&attachment), &wanted(), &client).await.unwrap();
    assert!(place.starts_with("/run/media/user7"), "{place:?}");
    let shown = house.engine.find(attachment.id).unwrap();
    assert_eq!(shown.mount_points, std::slice::from_ref(&place));
    assert_eq!(shown.ownership.unwrap().client, None, "it ends with its mount now");
    client.vanish(&house.engine);
    tokio::time::sleep(Duration::from_secs(300)).await;
    assert_eq!(house.engine.find(attachment.id).unwrap().state, State::Attached);
    assert!(house.engine.is_mounted_for(whole(&attachment), 7));
    assert!(!house.engine.is_mounted_for(whole(&attachment), 8));
    house.engine.unmount(whole(&attachment), false, 7, true).await.unwrap();
    assert_eq!(house.engine.find(attachment.id), None, "the reply comes after the end");
    assert_eq!(house.mounts.folders(), Vec::<PathBuf>::new());
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn the_last_mount_ends_it_whoever_unmounts() {
    let house = House::with_udev();
    house.machine.set_partitions(2);
    let client = Client::new(":1.1", 7);
    let attachment = attached(&house, &client, Lifetime::Mount).await;
    let number = attachment.device.number;
    let first = house.engine.mount(part(&attachment, 1), &wanted(), &client).await.unwrap();
    let second = house.engine.mount(part(&attachment, 2), &wanted(), &client).await.unwrap();
    assert_ne!(first, second);
    // Root mounts it by hand as well.
    house.machine.mount_on(number, Some(1), PathBuf::from("/mnt"));
    for path in [&first, &second] {
        house.machine.unmount_from(path);
        house.settle().await;
        assert_eq!(house.engine.find(attachment.id).unwrap().state, State::Attached);
        assert!(!house.mounts.folders().contains(path));
    }
    house.machine.unmount_from(Path::new("/mnt"));
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn without_a_mount_it_outlives_its_client_for_a_while() {
    let house = House::with_udev();
    let client = Client::new(":1.1", 7);
    let attachment = attached(&house, &client, Lifetime::Mount).await;
    client.vanish(&house.engine);
    let grace = house.engine.settings().mount_grace;
    tokio::time::sleep(grace - Duration::from_secs(1)).await;
    assert_eq!(house.engine.find(attachment.id).unwrap().ownership.unwrap().client, None);
    house.agree();
    tokio::time::sleep(Duration::from_secs(2)).await;
    house.assert_empty().await;

    // Mounted in time, it stays.
    let attachment = attached(&house, &client.again(), Lifetime::Mount).await;
    client.again().vanish(&house.engine);
    tokio::time::sleep(grace - Duration::from_secs(1)).await;
    house.machine.mount(attachment.device.number);
    tokio::time::sleep(2 * grace).await;
    assert_eq!(house.engine.find(attachment.id).unwrap().state, State::Attached);
    house.machine.unmount(attachment.device.number);
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_lifetime_becomes_mount_and_back() {
    let house = House::with_udev();
    let client = Client::new(":1.1", 7);
    let attachment = attached(&house, &client, Lifetime::Persistent).await;
    house.machine.mount(attachment.device.number);
    house.engine.set_lifetime(attachment.id, Lifetime::Mount, &client).await.unwrap();
    client.vanish(&house.engine);
    house.settle().await;
    house.agree();
    assert_eq!(house.engine.find(attachment.id).unwrap().state, State::Attached);
    house.engine.set_lifetime(attachment.id, Lifetime::Persistent, &client).await.unwrap();
    house.machine.unmount(attachment.device.number);
    house.settle().await;
    assert_eq!(house.engine.find(attachment.id).unwrap().state, State::Attached);
    // With a client that is gone: it has the time that a client's end gives.
    house.engine.set_lifetime(attachment.id, Lifetime::Mount, &client).await.unwrap();
    tokio::time::sleep(house.engine.settings().mount_grace + Duration::from_secs(1)).await;
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn a_mount_that_fails_at_any_step_leaves_nothing() {
    for lifetime in [Lifetime::Client, Lifetime::Mount, Lifetime::Persistent] {
        for failing in 1.. {
            let house = House::with_udev();
            let client = Client::new(":1.1", 7);
            let attachment = attached(&house, &client, lifetime).await;
            let reached = house.fail_at(failing);
            let mounted = house.engine.mount(whole(&attachment), &wanted(), &client).await;
            if !reached.load(Ordering::Relaxed) {
                assert!(failing > 2 && mounted.is_ok(), "no step failed");
                break;
            }
            mounted.unwrap_err();
            house.settle().await;
            assert_eq!(house.mounts.folders(), Vec::<PathBuf>::new());
            let now = house.engine.find(attachment.id);
            // Where it was mounted for a moment, it has ended with that.
            assert!(now.is_none_or(|now| now.mount_points.is_empty()));
            let _ended = house.engine.detach(attachment.id, false).await;
            house.assert_empty().await;
        }
    }
}

/// Whether it was mounted in time or not: whoever is gone, or is told to wait no longer, has left nothing.
#[tokio::test(start_paused = true)]
async fn who_vanishes_at_any_moment_of_a_mount_leaves_nothing() {
    for moment in 0..80 {
        for lifetime in [Lifetime::Client, Lifetime::Mount] {
            let house = House::with_random_udev(moment);
            let client = Client::new(":1.1", 7);
            let attachment = attached(&house, &client, lifetime).await;
            let (leaving, engine) = (client.clone(), Arc::clone(&house.engine));
            tokio::spawn(async move {
                tokio::time::sleep(Duration::from_micros(moment * 250)).await;
                leaving.vanish(&engine);
            });
            let mounted = house.engine.mount(whole(&attachment), &wanted(), &client).await;
            house.settle().await;
            match mounted {
                // It was told of it before it went.
                Ok(place) => assert!(house.machine.unmount_from(&place)),
                Err(_) => assert!(!house.machine.unmount_from(Path::new(PLACE))),
            }
            tokio::time::sleep(house.engine.settings().mount_grace).await;
            house.assert_empty().await;
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_daemon_that_is_to_end_gives_its_mounts_up() {
    for moment in 0..60 {
        let house = House::with_random_udev(moment);
        let client = Client::new(":1.1", 7);
        let attachment = attached(&house, &client, Lifetime::Persistent).await;
        let engine = Arc::clone(&house.engine);
        house.mounts.host().hangs = moment % 2 == 0;
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_micros(moment * 300)).await;
            engine.give_up();
        });
        let mounted = house.engine.mount(whole(&attachment), &wanted(), &client).await;
        house.settle().await;
        match mounted {
            Ok(place) => assert!(house.machine.unmount_from(&place)),
            Err(error) => assert_eq!(error.kind, ErrorKind::AccessDenied, "{error}"),
        }
        house.engine.detach(attachment.id, false).await.unwrap();
        house.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_others_do_during_a_mount_leaves_nothing() {
    for moment in 0..80 {
        let house = House::with_random_udev(moment);
        let client = Client::new(":1.1", 7);
        let attachment = attached(&house, &client, Lifetime::Mount).await;
        let (machine, number) = (house.machine.clone(), attachment.device.number);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_micros(moment * 250)).await;
            if moment % 2 == 0 {
                machine.detach_elsewhere(number);
            }
            machine.unmount_from(Path::new(PLACE));
        });
        let mounted = house.engine.mount(whole(&attachment), &wanted(), &client).await;
        house.settle().await;
        if let Ok(place) = mounted {
            house.machine.unmount_from(&place);
        }
        client.vanish(&house.engine);
        tokio::time::sleep(house.engine.settings().mount_grace).await;
        house.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_disk_and_its_partitions_are_not_mounted_at_once() {
    let house = House::with_udev();
    house.machine.set_partitions(2);
    let client = Client::new(":1.1", 7);
    let attachment = attached(&house, &client, Lifetime::Persistent).await;
    let first = house.engine.mount(part(&attachment, 1), &wanted(), &client).await.unwrap();
    for volume in [part(&attachment, 1), whole(&attachment)] {
        let error = house.engine.mount(volume, &wanted(), &client).await.unwrap_err();
        assert_eq!(error.kind, ErrorKind::Busy);
        assert!(error.message.contains(first.to_str().unwrap()), "{error}");
    }
    let error = house.engine.mount(part(&attachment, 3), &wanted(), &client).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound);
    house.engine.unmount(part(&attachment, 1), false, 7, true).await.unwrap();
    let error = house.engine.unmount(part(&attachment, 1), false, 7, true).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::NotFound);
    house.engine.mount(whole(&attachment), &wanted(), &client).await.unwrap();
    let error = house.engine.mount(part(&attachment, 1), &wanted(), &client).await.unwrap_err();
    assert!(error.message.contains("the whole device /dev/loop0 is mounted on"), "{error}");
    house.engine.unmount(whole(&attachment), false, 7, true).await.unwrap();
    house.engine.detach(attachment.id, false).await.unwrap();
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn what_is_used_stays_mounted_unless_lazily() {
    let house = House::with_udev();
    let client = Client::new(":1.1", 7);
    let attachment = attached(&house, &client, Lifetime::Mount).await;
    let place = house.engine.mount(whole(&attachment), &wanted(), &client).await.unwrap();
    house.mounts.sit_in(&place, true);
    let error = house.engine.unmount(whole(&attachment), false, 7, true).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Busy);
    assert!(error.message.contains("/run/media/user7/"), "{error}");
    let before = house.engine.find(attachment.id).unwrap();
    assert_eq!((before.state, before.mount_points), (State::Attached, vec![place.clone()]));
    let error = house.engine.detach(attachment.id, false).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Busy);
    house.engine.unmount(whole(&attachment), true, 7, true).await.unwrap();
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn an_unmount_that_fails_at_any_step_can_be_repeated() {
    for failing in 1.. {
        let house = House::with_udev();
        let client = Client::new(":1.1", 7);
        let attachment = attached(&house, &client, Lifetime::Mount).await;
        house.engine.mount(whole(&attachment), &wanted(), &client).await.unwrap();
        let reached = house.fail_at(failing);
        let unmounted = house.engine.unmount(whole(&attachment), false, 7, true).await;
        if !reached.load(Ordering::Relaxed) {
            assert!(failing > 1 && unmounted.is_ok());
            house.assert_empty().await;
            break;
        }
        if unmounted.is_err() {
            house.engine.unmount(whole(&attachment), false, 7, true).await.unwrap();
        }
        house.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn what_others_mount_is_not_taken_from_them() {
    let house = House::with_udev();
    let client = Client::new(":1.1", 7);
    let attachment = attached(&house, &client, Lifetime::Mount).await;
    let place = house.engine.mount(whole(&attachment), &wanted(), &client).await.unwrap();
    house.machine.mount(attachment.device.number);
    let error = house.engine.unmount(whole(&attachment), false, 7, true).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::AccessDenied);
    assert_eq!(house.engine.find(attachment.id).unwrap().mount_points.len(), 2);
    house.engine.unmount(whole(&attachment), false, 7, false).await.unwrap();
    assert!(!house.mounts.folders().contains(&place));
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn one_that_has_not_waited_for_udev_waits_to_be_mounted() {
    let house = House::with_udev();
    let client = Client::new(":1.1", 7);
    let request = AttachRequest { wait: false, lifetime: Lifetime::Mount, ..AttachRequest::default() };
    let attachment = house.attach_with(&client, request).await.unwrap();
    let error = house.engine.mount(whole(&attachment), &MountRequest::default(), &client).await.unwrap_err();
    // udev's word has come by then, and names a file system that nobody allows.
    assert!(error.message.contains(&format!("the file system fs{}", attachment.id)), "{error}");
    client.vanish(&house.engine);
    tokio::time::sleep(house.engine.settings().mount_grace).await;
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn names_that_are_taken_get_numbers_and_one_uid_cannot_take_all() {
    let house = House::with_udev();
    let client = Client::new(":1.1", 7);
    let limit = house.engine.settings().mounts.each;
    let attach = async |file: usize| {
        let request = AttachRequest { wait: false, ..AttachRequest::default() };
        let order = Order { file: file as u64, request };
        house.engine.attach(order, &client).await.unwrap()
    };
    for number in 0..limit {
        let attachment = attach(number).await;
        let place = house.engine.mount(whole(&attachment), &wanted(), &client).await.unwrap();
        let expected = if number == 0 { "image".to_owned() } else { format!("image{number}") };
        assert_eq!(place.file_name().unwrap().to_str(), Some(&*expected));
    }
    let more = attach(limit).await;
    let error = house.engine.mount(whole(&more), &wanted(), &client).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::LimitExceeded);
    let other = Client::new(":1.2", 8);
    let place = house.engine.mount(whole(&more), &wanted(), &other).await.unwrap();
    assert_eq!(place, Path::new("/run/media/user8/image"));
}

#[tokio::test(start_paused = true)]
async fn a_step_of_a_hanging_service_manager_is_a_timeout_and_undone() {
    let house = House::with_udev();
    let client = Client::new(":1.1", 7);
    let attachment = attached(&house, &client, Lifetime::Client).await;
    house.mounts.host().hangs = true;
    let error = house.engine.mount(whole(&attachment), &wanted(), &client).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Timeout);
    assert_eq!(house.mounts.folders(), Vec::<PathBuf>::new());
    house.machine.interfere(|_| Interference::None);
    assert!(!client.vanished());
    client.vanish(&house.engine);
    house.assert_empty().await;
}

/// An attachment of the same file as `attached` gives, which is file 1.
async fn read_only(house: &House, client: &Client) -> Snapshot {
    let request =
        AttachRequest { read_only: true, lifetime: Lifetime::Persistent, ..AttachRequest::default() };
    house.attach_with(client, request).await.unwrap()
}

#[tokio::test(start_paused = true)]
async fn the_same_bytes_are_not_mounted_twice() {
    let house = House::with_udev();
    let client = Client::new(":1.1", 7);
    let ours = attached(&house, &client, Lifetime::Persistent).await;
    let foreign = house.machine.attach_elsewhere(1);
    house.machine.mount_on(foreign, None, PathBuf::from("/mnt/other"));
    let error = house.engine.mount(whole(&ours), &wanted(), &client).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Busy);
    assert!(error.message.contains("/dev/loop1 is mounted on /mnt/other"), "{error}");
    assert_eq!(house.mounts.folders(), Vec::<PathBuf>::new());
    house.machine.unmount(foreign);
    house.engine.mount(whole(&ours), &wanted(), &client).await.unwrap();
    let other_file = house.machine.attach_elsewhere(2);
    house.machine.mount_on(other_file, None, PathBuf::from("/mnt/another"));
    house.engine.unmount(whole(&ours), false, 7, true).await.unwrap();
    house.engine.mount(whole(&ours), &wanted(), &client).await.unwrap();
    house.engine.unmount(whole(&ours), false, 7, true).await.unwrap();
    house.machine.unmount(other_file);
    for number in [foreign, other_file] {
        house.machine.detach_elsewhere(number);
    }
    house.engine.detach(ours.id, false).await.unwrap();
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn two_devices_that_cannot_be_written_to_are_both_mounted() {
    let house = House::with_udev();
    let client = Client::new(":1.1", 7);
    let writable = attached(&house, &client, Lifetime::Persistent).await;
    let (one, other) = (read_only(&house, &client).await, read_only(&house, &client).await);
    house.engine.mount(whole(&one), &wanted(), &client).await.unwrap();
    house.engine.mount(whole(&other), &wanted(), &client).await.unwrap();
    let read_only = MountRequest { read_only: true, ..wanted() };
    let error = house.engine.mount(whole(&writable), &read_only, &client).await.unwrap_err();
    assert_eq!(error.kind, ErrorKind::Busy, "even read-only, a journal may be replayed");
    for volume in [&one, &other] {
        house.engine.unmount(whole(volume), false, 7, true).await.unwrap();
    }
    for volume in [&writable, &one, &other] {
        house.engine.detach(volume.id, false).await.unwrap();
    }
    house.assert_empty().await;
}

#[tokio::test(start_paused = true)]
async fn of_two_mounts_of_a_file_at_once_one_is_made() {
    for seed in 0..40 {
        let house = House::with_random_udev(seed);
        let client = Client::new(":1.1", 7);
        let one = attached(&house, &client, Lifetime::Persistent).await;
        let other = attached(&house, &client, Lifetime::Persistent).await;
        let wanted = wanted();
        let (first, second) = tokio::join!(
            house.engine.mount(whole(&one), &wanted, &client),
            house.engine.mount(whole(&other), &wanted, &client),
        );
        assert!(first.is_ok() != second.is_ok(), "{first:?} {second:?}");
        let (mounted, error) = match (first, second) {
            (Ok(_), Err(error)) => (&one, error),
            (_, second) => (&other, second.err().unwrap_or_else(|| Error::new(ErrorKind::Busy, ""))),
        };
        assert_eq!(error.kind, ErrorKind::Busy, "{error}");
        house.engine.unmount(whole(mounted), false, 7, true).await.unwrap();
        for volume in [&one, &other] {
            house.engine.detach(volume.id, false).await.unwrap();
        }
        house.assert_empty().await;
    }
}

#[tokio::test(start_paused = true)]
async fn while_one_is_mounted_nobody_mounts_the_other() {
    let house = House::with_udev();
    let client = Client::new(":1.1", 7);
    let ours = attached(&house, &client, Lifetime::Persistent).await;
    let foreign = house.machine.attach_elsewhere(1);
    house.mounts.host().hangs = true;
    let engine = Arc::clone(&house.engine);
    let (volume, caller) = (whole(&ours), client.clone());
    let mounting = tokio::spawn(async move { engine.mount(volume, &wanted(), &caller).await });
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert!(!house.machine.mount_on(foreign, None, PathBuf::from("/mnt")));
    mounting.await.unwrap().unwrap_err();
    assert!(house.machine.mount_on(foreign, None, PathBuf::from("/mnt")), "the claim ends with the call");
    house.machine.unmount(foreign);
    house.machine.detach_elsewhere(foreign);
    house.engine.detach(ours.id, false).await.unwrap();
    house.assert_empty().await;
}
