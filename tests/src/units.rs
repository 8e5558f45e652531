//! A stand-in for the service manager on the bus: it mounts in this process's mount namespace, or fails as a
//! test requests.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::{Context as _, Result};
use zbus::object_server::SignalEmitter;
use zbus::wire::{ObjectPath, OwnedObjectPath};
use zbus::{Connection, OwnedVariant};

use crate::bus::Bus;
use crate::process::run;
use crate::sysfs;

const NAME: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";

/// How it behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Conduct {
    /// It mounts and unmounts.
    Works,
    /// The same, slowly.
    Slow(Duration),
    /// Its jobs fail.
    Fails,
    /// Its jobs never finish.
    Hangs,
    /// It refuses the calls.
    Refuses,
}

/// A unit that a call has started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Started {
    /// Its name.
    pub unit: String,
    /// Its settings that are strings.
    pub settings: HashMap<String, String>,
}

#[derive(Debug)]
struct State {
    conduct: Conduct,
    started: Vec<Started>,
    /// The mount points of the mount units.
    mounts: HashMap<String, PathBuf>,
    jobs: u32,
}

/// The service manager; unmounts its mounts when dropped.
#[derive(Debug)]
pub struct Units {
    state: Arc<Mutex<State>>,
    connection: Connection,
}

impl Units {
    /// Acquires its name on the bus.
    ///
    /// # Errors
    /// The name is taken.
    pub async fn start(bus: &Bus) -> Result<Self> {
        let state = State { conduct: Conduct::Works, started: Vec::new(), mounts: HashMap::new(), jobs: 0 };
        let state = Arc::new(Mutex::new(state));
        let connection = zbus::connection::Builder::address(bus.address())
            .serve_at(PATH, Manager { state: Arc::clone(&state) })
            .name(NAME)
            .build()
            .await
            .context("cannot stand in for the service manager")?;
        Ok(Self { state, connection })
    }

    /// Sets its behaviour.
    pub fn behave(&self, conduct: Conduct) {
        lock(&self.state).conduct = conduct;
    }

    /// The started units.
    #[must_use]
    pub fn started(&self) -> Vec<Started> {
        lock(&self.state).started.clone()
    }

    /// The mount units that were started and not stopped.
    #[must_use]
    pub fn units(&self) -> Vec<String> {
        lock(&self.state).mounts.keys().cloned().collect()
    }

    /// Leaves the bus.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn leave(&self) -> Result<()> {
        Ok(self.connection.release_name(NAME).await.map(drop)?)
    }
}

impl Drop for Units {
    fn drop(&mut self) {
        for directory in lock(&self.state).mounts.values().filter(|directory| directory.exists()) {
            let _not_mounted =
                std::process::Command::new("umount").args(["-q", "-l"]).arg(directory).output();
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

#[derive(Debug, zbus::DBusError)]
#[zbus(prefix = "org.freedesktop.systemd1")]
enum UnitError {
    #[zbus(error)]
    ZBus(zbus::Error),
    NoSuchUnit(String),
    UnitExists(String),
    JobTypeNotApplicable(String),
}

struct Manager {
    state: Arc<Mutex<State>>,
}

type Settings = Vec<(String, OwnedVariant)>;

/// What a job does.
enum Work {
    Mount(Started),
    Unmount(String),
    Command(Vec<String>),
}

#[zbus::interface(name = "org.freedesktop.systemd1.Manager")]
impl Manager {
    fn subscribe(&self) {}

    fn start_transient_unit(
        &self,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
        name: String,
        _mode: String,
        settings: Settings,
        _auxiliary: Vec<(String, Settings)>,
    ) -> Result<OwnedObjectPath, UnitError> {
        let command = settings.iter().find(|(key, _)| key == "ExecStartEx").map(|(_, value)| words(value));
        let texts = settings
            .iter()
            .filter_map(|(key, value)| Some((key.clone(), <&str>::try_from(value).ok()?.to_owned())));
        let started = Started { unit: name.clone(), settings: texts.collect() };
        {
            let mut state = lock(&self.state);
            if state.conduct == Conduct::Refuses {
                return Err(UnitError::JobTypeNotApplicable("not today".to_owned()));
            }
            // A unit ends with its mount, no matter who unmounts it.
            if state.mounts.get(&name).is_some_and(|place| sysfs::is_mount_point(place)) {
                return Err(UnitError::UnitExists(format!("Unit {name} was already loaded.")));
            }
            state.started.push(started.clone());
            if let Some(directory) = started.settings.get("Where") {
                state.mounts.insert(name.clone(), PathBuf::from(directory));
            }
        }
        let work = command.map_or(Work::Mount(started), Work::Command);
        Ok(self.begin(&emitter, name, work))
    }

    fn stop_unit(
        &self,
        #[zbus(signal_emitter)] emitter: SignalEmitter<'_>,
        name: String,
        _mode: String,
    ) -> Result<OwnedObjectPath, UnitError> {
        if !lock(&self.state).mounts.contains_key(&name) {
            return Err(UnitError::NoSuchUnit(format!("Unit {name} not loaded.")));
        }
        Ok(self.begin(&emitter, name.clone(), Work::Unmount(name)))
    }

    fn reset_failed_unit(&self, name: String) -> Result<(), UnitError> {
        Err(UnitError::NoSuchUnit(format!("Unit {name} not loaded.")))
    }

    #[zbus(signal)]
    async fn job_removed(
        emitter: &SignalEmitter<'_>,
        id: u32,
        job: ObjectPath<'_>,
        unit: &str,
        result: &str,
    ) -> zbus::Result<()>;
}

/// The arguments of a service's command: an array of structures of a path, arguments and flags.
fn words(value: &OwnedVariant) -> Vec<String> {
    let commands: Vec<(String, Vec<String>, Vec<String>)> =
        value.try_clone().ok().and_then(|value| value.try_into().ok()).unwrap_or_default();
    commands.into_iter().next().map(|(_, words, _)| words).unwrap_or_default()
}

impl Manager {
    fn begin(&self, emitter: &SignalEmitter<'_>, unit: String, work: Work) -> OwnedObjectPath {
        let id = {
            let mut state = lock(&self.state);
            state.jobs += 1;
            state.jobs
        };
        let job = ObjectPath::from_string_unchecked(format!("{PATH}/job/{id}"));
        let (emitter, path, state) = (emitter.to_owned(), job.clone(), Arc::clone(&self.state));
        tokio::spawn(async move {
            let result = carry_out(&state, work).await;
            let _bus_gone = Self::job_removed(&emitter, id, path, &unit, result).await;
        });
        job.into()
    }
}

/// Does the work, and returns the result of the job.
async fn carry_out(state: &Mutex<State>, work: Work) -> &'static str {
    let conduct = lock(state).conduct;
    match (&work, conduct) {
        // A stop cancels a job that hangs.
        (Work::Unmount(_), _) => {}
        (_, Conduct::Hangs) => std::future::pending().await,
        (_, Conduct::Slow(time)) => tokio::time::sleep(time).await,
        (_, Conduct::Fails) => {
            if let Work::Mount(started) = &work {
                lock(state).mounts.remove(&started.unit);
            }
            return "failed";
        }
        _ => {}
    }
    let done = match work {
        Work::Mount(started) => mount(state, &started).await,
        Work::Command(words) => match words.split_first() {
            Some((program, words)) => run(program, words).await.is_ok(),
            None => false,
        },
        Work::Unmount(unit) => unmount(state, &unit).await,
    };
    if done { "done" } else { "failed" }
}

async fn mount(state: &Mutex<State>, started: &Started) -> bool {
    let setting = |name: &str| started.settings.get(name).map(String::as_str).unwrap_or_default();
    // Stopped before it started.
    if !lock(state).mounts.contains_key(&started.unit) {
        return false;
    }
    let words = ["-t", setting("Type"), "-o", setting("Options"), setting("What"), setting("Where")];
    let done = run("mount", words).await.is_ok();
    if !done {
        lock(state).mounts.remove(&started.unit);
    }
    done
}

async fn unmount(state: &Mutex<State>, unit: &str) -> bool {
    let Some(directory) = lock(state).mounts.get(unit).cloned() else { return true };
    let text = directory.to_string_lossy().into_owned();
    let is_mounted = run("mountpoint", ["-q", &text]).await.is_ok();
    let done = !is_mounted || run("umount", ["--internal-only", &text]).await.is_ok();
    if done {
        lock(state).mounts.remove(unit);
    }
    done
}
