//! Long runs: many clients and another program at once, and many rounds of one client. `make soak` runs them at
//! full length.

use std::collections::HashMap;
use std::os::fd::AsFd as _;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::{Context as _, Result, bail, ensure};
use loopd_dbus::proxy::{Attachment, Interaction, Manager};
use loopd_dbus::{AttachOptions, AttachmentProperties, DetachOptions, Lifetime, ListOptions};
use loopd_tests::fixture::{Attached, Fixture};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::Setup;
use loopd_tests::process::{eventually, run};
use loopd_tests::sysfs::LoopDevice;
use loopd_tests::{Outcome, rounds};

loopd_tests::tests! {
    "soak";
    Setup::None => [fifty_clients_beside_losetup, memory_stays_level_over_many_rounds];
}

const CLIENTS: u64 = 50;
/// The maximum number of attachments of a client.
const MOST: usize = 3;

/// Fifty clients make random calls and compare each reply with the kernel, while losetup attaches and
/// detaches. `LOOPD_TEST_ROUNDS` is the number of calls.
async fn fifty_clients_beside_losetup(fixture: &mut Fixture) -> Outcome {
    let (mut random, calls) = rounds::of("soak::fifty_clients_beside_losetup", 1000);
    let ended = Arc::new(AtomicBool::new(false));
    let losetup = tokio::spawn(attach_by_losetup(
        Image::sparse(&fixture.directory, "foreign", MIB)?,
        Arc::clone(&ended),
    ));
    let left = Arc::new(AtomicU64::new(calls));
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..CLIENTS {
        let image = Image::sparse(&fixture.directory, format!("image {number}"), MIB)?;
        let client = Client::new(fixture.connect().await?, image, random.fork()).await?;
        clients.spawn(client.run(Arc::clone(&left)));
    }
    while let Some(outcome) = clients.join_next().await {
        outcome??;
    }
    ended.store(true, Ordering::Relaxed);
    let foreign = losetup.await??;
    println!("{calls} calls of {CLIENTS} clients beside {foreign} attaches by losetup");
    ensure!(foreign > 0, "losetup attached nothing");
    let ours = fixture.list(false).await?;
    ensure!(ours.is_empty(), "left: {ours:?}");
    eventually("nothing is listed", async || Ok(fixture.list(true).await?.is_empty())).await?;
    fixture.assert_no_leak().await
}

/// Attaches and detaches with losetup until the end; returns how often. No client may touch the device.
async fn attach_by_losetup(image: Image, ended: Arc<AtomicBool>) -> Result<u64> {
    let mut rounds = 0;
    while !ended.load(Ordering::Relaxed) {
        // losetup sometimes loses the race for a number.
        let Ok(node) = run("losetup", ["--find", "--show", image.name()]).await else { continue };
        let device = LoopDevice::from_node(node.trim_end())?;
        for _ in 0..5 {
            ensure!(shows(device, &image.path), "losetup's {} shows another file", device.node());
            tokio::task::yield_now().await;
        }
        run("losetup", ["--detach", &device.node()]).await?;
        rounds += 1;
    }
    Ok(rounds)
}

fn shows(device: LoopDevice, path: &Path) -> bool {
    device.backing_file().is_some_and(|file| file == path.as_os_str().as_encoded_bytes())
}

/// One of the clients: only it uses its image.
struct Client {
    connection: zbus::Connection,
    manager: Manager,
    image: Image,
    random: fastrand::Rng,
    /// Its attachments, with the lifetime requested last.
    attached: Vec<(Attached, Lifetime)>,
}

impl Client {
    async fn new(connection: zbus::Connection, image: Image, random: fastrand::Rng) -> Result<Self> {
        let manager = Manager::new(&connection, Interaction::Forbidden).await?;
        Ok(Self { connection, manager, image, random, attached: Vec::new() })
    }

    async fn run(mut self, left: Arc<AtomicU64>) -> Result<()> {
        let next = |left: u64| left.checked_sub(1);
        while left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).is_ok() {
            match self.random.u8(..10) {
                0..3 if self.attached.len() < MOST => self.attach().await?,
                3..6 => self.detach().await?,
                6 | 7 => self.set_lifetime().await?,
                8 => self.look().await?,
                _ => self.list().await?,
            }
        }
        while !self.attached.is_empty() {
            self.detach().await?;
        }
        Ok(())
    }

    async fn attach(&mut self) -> Result<()> {
        let lifetime = if self.random.bool() { Lifetime::Client } else { Lifetime::Persistent };
        let options = AttachOptions { lifetime, wait: self.random.u8(..8) == 0, ..AttachOptions::default() };
        let file = self.image.open()?;
        let attached = Attached::new(self.manager.setup_loop(file.as_fd(), &options).await?)?;
        ensure!(shows(attached.device, &self.image.path), "{attached:?} shows another file");
        self.attached.push((attached, lifetime));
        Ok(())
    }

    async fn detach(&mut self) -> Result<()> {
        if self.attached.is_empty() {
            return Ok(());
        }
        let (attached, _) = self.attached.swap_remove(self.random.usize(..self.attached.len()));
        if self.random.bool() {
            self.object(&attached).await?.detach(DetachOptions::default()).await?;
        } else {
            self.manager.detach(&attached.device.node(), DetachOptions::default()).await?;
        }
        // The number may be in use again, by another client or another attachment of this one.
        let listed = self.listed().await?;
        ensure!(!listed.contains_key(attached.path.as_str()), "{attached:?} is still there");
        Ok(())
    }

    async fn set_lifetime(&mut self) -> Result<()> {
        let Some(chosen) = self.random.choice(0..self.attached.len()) else { return Ok(()) };
        let lifetime = if self.random.bool() { Lifetime::Client } else { Lifetime::Persistent };
        let object = self.object(&self.attached[chosen].0).await?;
        object.set_lifetime(lifetime).await?;
        self.attached[chosen].1 = lifetime;
        Ok(())
    }

    /// Compares each attachment with the request and with the kernel.
    async fn look(&self) -> Result<()> {
        let listed = self.listed().await?;
        for (attached, lifetime) in &self.attached {
            let shown = listed.get(attached.path.as_str()).with_context(|| format!("no {attached:?}"))?;
            ensure!(shown.device == attached.device.node() && shown.state == "attached", "{shown:?}");
            ensure!(shown.lifetime == lifetime.as_str(), "{shown:?} should be {lifetime}");
            ensure!(shown.disk_sequence == attached.device.number::<u64>("diskseq")?, "{shown:?}");
            ensure!(shows(attached.device, &self.image.path), "{attached:?} shows another file");
        }
        ensure!(listed.len() == self.attached.len(), "{listed:?} are not {:?}", self.attached);
        Ok(())
    }

    async fn list(&self) -> Result<()> {
        let all = self.manager.list(&ListOptions { all: true, ..ListOptions::default() }).await?;
        let mut numbers = HashMap::new();
        for (path, properties) in &all {
            let shown = AttachmentProperties::from_dict(properties)?;
            if let Some(other) = numbers.insert(shown.number, path) {
                bail!("{path} and {other} are both {}", shown.device);
            }
        }
        for (attached, _) in &self.attached {
            ensure!(numbers.get(&attached.device.0) == Some(&&attached.path), "no {attached:?} in {all:?}");
        }
        Ok(())
    }

    /// The attachments of the image, by path.
    async fn listed(&self) -> Result<HashMap<String, AttachmentProperties>> {
        let options = ListOptions { file: Some(self.image.open()?.into()), ..ListOptions::default() };
        let listed = self.manager.list(&options).await?;
        let read = |(path, properties): &(zbus::wire::OwnedObjectPath, _)| {
            Ok((path.to_string(), AttachmentProperties::from_dict(properties)?))
        };
        listed.iter().map(read).collect()
    }

    async fn object(&self, attached: &Attached) -> Result<Attachment> {
        let path = attached.path.clone().into_inner();
        Ok(Attachment::new(&self.connection, path, Interaction::Forbidden).await?)
    }
}

/// After the first thousand rounds memory, descriptors and threads do not grow.
async fn memory_stays_level_over_many_rounds(fixture: &mut Fixture) -> Outcome {
    const FIRST: u64 = 1000;
    const MOST_GROWTH: u64 = 1024;
    let (_, rounds) = rounds::of("soak::memory_stays_level_over_many_rounds", 2 * FIRST);
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    attach_and_detach(fixture, &image, FIRST).await?;
    let before = settled(fixture).await?;
    attach_and_detach(fixture, &image, rounds.saturating_sub(FIRST)).await?;
    let after = settled(fixture).await?;
    println!("resident KiB, threads, descriptors after {FIRST} rounds {before:?}, after {rounds} {after:?}");
    ensure!(after.0 <= before.0 + MOST_GROWTH, "resident memory grew from {} to {} KiB", before.0, after.0);
    ensure!((after.1, after.2) == (before.1, before.2), "threads or descriptors: {before:?}, then {after:?}");
    Ok(())
}

async fn attach_and_detach(fixture: &Fixture, image: &Image, rounds: u64) -> Outcome {
    let file = image.open()?;
    for round in 0..rounds {
        let lifetime = if round % 2 == 0 { Lifetime::Client } else { Lifetime::Persistent };
        let options = AttachOptions { lifetime, wait: false, ..AttachOptions::default() };
        let attached = fixture.attach(&file, &options).await?;
        fixture.detach(&attached).await?;
    }
    Ok(())
}

/// Resident KiB, threads and descriptors once the threads of the last calls have ended: they stay for a
/// second.
async fn settled(fixture: &mut Fixture) -> Result<(u64, u64, usize)> {
    let daemon = fixture.daemon()?;
    eventually("one thread is left", async || Ok(daemon.memory_and_threads()?.1 == 1)).await?;
    let (resident, threads) = daemon.memory_and_threads()?;
    Ok((resident, threads, daemon.descriptors()?.len()))
}
