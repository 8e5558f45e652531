//! The fixture of a host test: a bus, a polkit and a daemon, and the calls that tests make.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, bail};
use loopd_dbus::names::{ATTACHMENT, BUS_NAME, PARTITION, ROOT_PATH, VOLUME};
use loopd_dbus::proxy::{Attachment, Interaction, Listed, Manager};
use loopd_dbus::{
    AttachOptions, AttachmentProperties, DetachOptions, Error, ErrorKind, Lifetime, ListOptions,
    PartitionProperties, VolumeProperties,
};
use zbus::wire::OwnedObjectPath;
use zbus::{Connection, OwnedVariant};

use crate::bus::{Bus, SERVICES};
use crate::daemon::Daemon;
use crate::image::MIB;
use crate::polkit::{Polkit, Setup, StandIn};
use crate::probe::{Probe, Reply};
use crate::process::eventually;
use crate::service_manager::ServiceManager;
use crate::signals::Signals;
use crate::sysfs::{self, LoopDevice};
use crate::{User, host};

/// An attachment that a test made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Attached {
    /// Its object path.
    pub path: OwnedObjectPath,
    /// Its device.
    pub device: LoopDevice,
}

impl Attached {
    /// Converts the result of `SetupLoop`.
    ///
    /// # Errors
    /// The device is not a loop device.
    pub fn new((path, device): (OwnedObjectPath, String)) -> Result<Self> {
        Ok(Self { path, device: LoopDevice::from_node(&device)? })
    }
}

/// The objects of an attachment's partitions, by number.
pub type Partitions = BTreeMap<u32, (PartitionProperties, VolumeProperties)>;

/// The environment of a test.
#[derive(Debug)]
pub struct Fixture {
    /// The directory for its files; all users can enter it.
    pub directory: PathBuf,
    /// Root's connection.
    pub connection: Connection,
    /// The manager on root's connection.
    pub manager: Manager,
    daemon: Option<Daemon>,
    idle_descriptors: Vec<String>,
    polkit: Polkit,
    bus: Bus,
}

impl Fixture {
    /// Starts bus, polkit and daemon.
    ///
    /// # Errors
    /// One of them does not start.
    pub async fn start(polkit: Setup, directory: &Path) -> Result<Self> {
        let bus = Bus::start(directory)?;
        let polkit = Polkit::start(polkit, &bus, directory).await?;
        let daemon = Daemon::start(&bus, directory, &[], &[]).await?;
        let connection = bus.connect().await?;
        let manager = Manager::new(&connection, Interaction::Forbidden).await?;
        let mut fixture = Self {
            directory: directory.to_owned(),
            connection,
            manager,
            daemon: Some(daemon),
            idle_descriptors: Vec::new(),
            polkit,
            bus,
        };
        fixture.note_descriptors().await?;
        Ok(fixture)
    }

    /// The daemon.
    ///
    /// # Errors
    /// The test has stopped it.
    pub fn daemon(&mut self) -> Result<&mut Daemon> {
        self.daemon.as_mut().context("loopd is not running")
    }

    /// Removes the daemon from the fixture.
    pub fn take_daemon(&mut self) -> Option<Daemon> {
        self.daemon.take()
    }

    /// Starts a further daemon on the same bus, and does not wait for it.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn_daemon(&self, directory: &Path) -> Result<Daemon> {
        Daemon::spawn(&self.bus, directory, &[], &[])
    }

    /// Writes the configuration that the daemon reads at its next start or SIGHUP.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn configure(&self, text: &str) -> Result<()> {
        Ok(std::fs::write(crate::daemon::configuration(&self.directory)?, text)?)
    }

    /// Starts a daemon with these environment variables; a running one is stopped first.
    ///
    /// # Errors
    /// It does not start, or the old one fails.
    pub async fn restart_daemon(&mut self, environment: &[(&str, &str)]) -> Result<()> {
        self.restart(&[], environment).await
    }

    /// Starts the daemon as this service manager does; a running one is stopped first.
    ///
    /// # Errors
    /// It does not start, or the old one fails.
    pub async fn restart_managed(&mut self, manager: &ServiceManager) -> Result<()> {
        self.end_daemon().await?;
        // After its end: it may have passed descriptors to the store.
        let wrapper = manager.wrapper();
        let wrapper: Vec<_> = wrapper.iter().map(String::as_str).collect();
        self.restart(&wrapper, &manager.environment()).await
    }

    /// Kills the daemon.
    ///
    /// # Errors
    /// It cannot be killed.
    pub async fn kill_daemon(&mut self) -> Result<()> {
        let mut daemon = self.daemon.take().context("loopd is not running")?;
        daemon.kill().await
    }

    /// Stops the daemon with SIGTERM.
    ///
    /// # Errors
    /// It does not end, or fails.
    pub async fn end_daemon(&mut self) -> Result<()> {
        if let Some(mut daemon) = self.daemon.take() {
            let status = daemon.terminate().await?;
            if !status.success() {
                bail!("loopd answered SIGTERM with {status}");
            }
        }
        Ok(())
    }

    /// The bus.
    #[must_use]
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Stops the daemon; the bus starts it on demand.
    ///
    /// # Errors
    /// The old one fails.
    pub async fn activate_daemon(&mut self) -> Result<()> {
        self.end_daemon().await?;
        let service = self.directory.join(SERVICES).join(format!("{BUS_NAME}.service"));
        let program = host::built("loopd");
        let directory = self.directory.display();
        let configuration = crate::daemon::configuration(&self.directory)?;
        let command = format!(
            "exec env LOOPD_LOG=debug DBUS_SYSTEM_BUS_ADDRESS={} RUNTIME_DIRECTORY={directory}/run:{directory}/media {} --config {} \
             2>>{directory}/loopd.log",
            self.bus.address(),
            program.display(),
            configuration.display(),
        );
        std::fs::write(
            service,
            format!("[D-BUS Service]\nName={BUS_NAME}\nExec=/bin/sh -c \"{command}\"\nUser=root\n"),
        )?;
        Ok(())
    }

    /// Whether a daemon owns the bus name.
    ///
    /// # Errors
    /// The bus does not answer.
    pub async fn daemon_is_there(&self) -> Result<bool> {
        let names = zbus::fdo::DBusProxy::new(&self.connection).await?;
        Ok(names.name_has_owner(BUS_NAME.try_into()?).await?)
    }

    /// Kills the bus and starts another one.
    ///
    /// # Errors
    /// It does not start.
    pub async fn restart_bus(&mut self) -> Result<()> {
        self.bus.kill().await?;
        self.bus = Bus::start(&self.directory)?;
        self.connection = self.bus.connect().await?;
        self.manager = Manager::new(&self.connection, Interaction::Forbidden).await?;
        Ok(())
    }

    /// Restarts the daemon through a wrapper: a command that executes its arguments.
    ///
    /// # Errors
    /// It does not start, or the old one fails.
    pub async fn restart_daemon_under(&mut self, wrapper: &[&str]) -> Result<()> {
        self.restart(wrapper, &[]).await
    }

    async fn restart(&mut self, wrapper: &[&str], environment: &[(&str, &str)]) -> Result<()> {
        self.end_daemon().await?;
        self.daemon = Some(Daemon::start(&self.bus, &self.directory, wrapper, environment).await?);
        self.note_descriptors().await
    }

    async fn note_descriptors(&mut self) -> Result<()> {
        // After a first call, all lasting descriptors are open.
        self.manager.list(&ListOptions::default()).await?;
        self.idle_descriptors = self.daemon()?.descriptors()?;
        Ok(())
    }

    /// The daemon's log.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.directory.join("loopd.log")).unwrap_or_default()
    }

    /// The stand-in for polkit.
    ///
    /// # Errors
    /// The test has another polkit.
    pub fn stand_in(&self) -> Result<&StandIn> {
        match &self.polkit {
            Polkit::StandIn(stand_in) => Ok(stand_in),
            _ => bail!("this test has no stand-in for polkit"),
        }
    }

    /// Another connection of root.
    ///
    /// # Errors
    /// The bus refuses the connection.
    pub async fn connect(&self) -> Result<Connection> {
        self.bus.connect().await
    }

    /// For `DBUS_SYSTEM_BUS_ADDRESS`.
    #[must_use]
    pub fn bus_address(&self) -> &str {
        self.bus.address()
    }

    /// Attaches as root.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn attach(&self, file: &File, options: &AttachOptions) -> Result<Attached> {
        Attached::new(self.manager.setup_loop(file.as_fd(), options).await?)
    }

    /// Tries to attach as root; returns the error.
    ///
    /// # Errors
    /// It succeeded, or failed with an error outside the contract.
    pub async fn attach_fails(&self, file: &File, options: &AttachOptions) -> Result<Error> {
        refusal(self.manager.setup_loop(file.as_fd(), options).await)
    }

    /// Detaches as root, not lazily.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn detach(&self, attached: &Attached) -> Result<()> {
        Ok(self.manager.detach(&attached.device.node(), DetachOptions::default()).await?)
    }

    /// Tries to detach as root, not lazily; returns the error.
    ///
    /// # Errors
    /// It succeeded, or failed with an error outside the contract.
    pub async fn detach_fails(&self, device: LoopDevice) -> Result<Error> {
        refusal(self.manager.detach(&device.node(), DetachOptions::default()).await)
    }

    /// The attachment's methods, as root.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn object(&self, path: &OwnedObjectPath) -> Result<Attachment> {
        Ok(Attachment::new(&self.connection, path.clone().into(), Interaction::Forbidden).await?)
    }

    /// The properties of the attachment.
    ///
    /// # Errors
    /// The daemon's, or one is missing.
    pub async fn properties(&self, path: &OwnedObjectPath) -> Result<AttachmentProperties> {
        Ok(AttachmentProperties::from_dict(&self.get_all(path, ATTACHMENT).await?)?)
    }

    /// The properties of the volume of an attachment or a partition.
    ///
    /// # Errors
    /// The daemon's, or one is missing.
    pub async fn volume(&self, path: &OwnedObjectPath) -> Result<VolumeProperties> {
        Ok(VolumeProperties::from_dict(&self.get_all(path, VOLUME).await?)?)
    }

    /// The objects of the attachment's partitions, by number.
    ///
    /// # Errors
    /// The daemon's, or a property or an interface is missing.
    pub async fn partitions(&self, attached: &Attached) -> Result<Partitions> {
        let manager = zbus::fdo::ObjectManagerProxy::new(&self.connection, BUS_NAME, ROOT_PATH).await?;
        let mut found = Partitions::new();
        for (path, interfaces) in manager.get_managed_objects().await? {
            let Some(number) = path.as_str().strip_prefix(&format!("{}/p", attached.path)) else { continue };
            let of = |name: &str| interfaces.get(name).with_context(|| format!("{path} has no {name}"));
            let partition = PartitionProperties::from_dict(of(PARTITION)?)?;
            let volume = VolumeProperties::from_dict(of(VOLUME)?)?;
            found.insert(number.parse()?, (partition, volume));
        }
        Ok(found)
    }

    async fn get_all(
        &self,
        path: &OwnedObjectPath,
        interface: &str,
    ) -> Result<HashMap<String, OwnedVariant>> {
        let proxy = zbus::fdo::PropertiesProxy::new(&self.connection, BUS_NAME, path.as_ref()).await?;
        Ok(proxy.get_all(interface.try_into()?).await?)
    }

    /// The result of `List`, with or without foreign devices.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn list(&self, all: bool) -> Result<Vec<Listed>> {
        Ok(self.manager.list(&ListOptions { all, ..ListOptions::default() }).await?)
    }

    /// The object of this device, also of a foreign one.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn object_of(&self, device: LoopDevice) -> Result<Option<OwnedObjectPath>> {
        for (path, properties) in self.list(true).await? {
            if AttachmentProperties::from_dict(&properties)?.number == device.0 {
                return Ok(Some(path));
            }
        }
        Ok(None)
    }

    /// Waits until loopd has a device that another program has attached.
    ///
    /// # Errors
    /// It does not get it.
    pub async fn foreign(&self, device: LoopDevice) -> Result<Attached> {
        let mut path = None;
        eventually(&format!("loopd lists {}", device.node()), async || {
            path = self.object_of(device).await?;
            Ok(path.is_some())
        })
        .await?;
        Ok(Attached { path: path.context("no object")?, device })
    }

    /// Waits until loopd has received all events that udev has sent so far: those of a later attach come after them.
    /// Returns that attachment, which has ended.
    ///
    /// # Errors
    /// udev or the daemon does not answer.
    pub async fn events_are_received(&self) -> Result<Attached> {
        crate::udev::settle().await?;
        let blank = tempfile::tempfile_in(&self.directory)?;
        blank.set_len(MIB)?;
        let options = AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() };
        let attached = self.attach(&blank, &options).await?;
        self.detach(&attached).await?;
        Ok(attached)
    }

    /// Starts to record the daemon's signals.
    ///
    /// # Errors
    /// The bus refuses.
    pub async fn signals(&self) -> Result<Signals> {
        Signals::record(&self.connection).await
    }

    /// Waits until the device is free and its object is removed.
    ///
    /// # Errors
    /// That does not happen in time.
    pub async fn gone(&self, attached: &Attached) -> Result<()> {
        let Attached { path, device } = attached;
        eventually(&format!("{} is free", device.node()), async || Ok(!device.bound())).await?;
        eventually(&format!("{path} is gone"), async || {
            Ok(self.list(true).await?.iter().all(|(listed, _)| listed != path))
        })
        .await
    }

    /// A command with the test's bus as the system bus.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new(program);
        command.env("DBUS_SYSTEM_BUS_ADDRESS", self.bus.address()).current_dir(&self.directory);
        command
    }

    /// A command with the test's bus, for a program of the workspace, as this user.
    ///
    /// # Errors
    /// The program is not built.
    pub fn tool(&self, user: User, name: &str) -> Result<Command> {
        let program = host::get()?.tool(name);
        if !program.exists() {
            bail!("{name} is not built");
        }
        let mut command = self.command(program);
        if user != crate::ROOT {
            command.uid(user.uid).gid(user.gid);
        }
        Ok(command)
    }

    /// Runs loopctl as root.
    ///
    /// # Errors
    /// It cannot be run.
    pub async fn loopctl(&self, arguments: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Result<Output> {
        self.loopctl_as(crate::ROOT, arguments).await
    }

    /// Runs loopctl as this user.
    ///
    /// # Errors
    /// It cannot be run.
    pub async fn loopctl_as(
        &self,
        user: User,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Result<Output> {
        let mut command = self.tool(user, "loopctl")?;
        command.args(arguments);
        crate::process::output(command).await
    }

    /// Makes a raw call as this user and returns the reply.
    ///
    /// # Errors
    /// The probe itself failed.
    pub async fn probe(
        &self,
        user: User,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Result<Reply> {
        let mut probe = self.probe_hold(user, arguments)?;
        let reply = probe.reply().await?;
        probe.close().await?;
        Ok(reply)
    }

    /// Starts a raw call as this user that keeps its connection: `--hold` is among the arguments, or
    /// the call does not end by itself.
    ///
    /// # Errors
    /// The probe cannot be started.
    pub fn probe_hold(
        &self,
        user: User,
        arguments: impl IntoIterator<Item = impl AsRef<OsStr>>,
    ) -> Result<Probe> {
        let mut command = self.tool(user, "loopd-probe")?;
        command.args(arguments);
        Probe::spawn(command)
    }

    /// Waits until no device of this test is attached and the daemon has no more descriptors than when it was
    /// idle.
    ///
    /// # Errors
    /// Something is left.
    pub async fn assert_no_leak(&mut self) -> Result<()> {
        let directory = self.directory.clone();
        let mut left = Vec::new();
        let free = eventually("all devices are free", async || {
            left = sysfs::bound_by_tests(&directory);
            Ok(left.is_empty())
        });
        free.await.with_context(|| format!("{left:?}"))?;
        if self.daemon.is_none() {
            return Ok(());
        }
        let idle = self.idle_descriptors.len();
        let mut open = Vec::new();
        let daemon = self.daemon()?;
        let closed = eventually("loopd has closed everything", async || {
            open = daemon.descriptors()?;
            Ok(open.len() <= idle)
        });
        closed.await.with_context(|| format!("idle {:?}, now {open:?}", self.idle_descriptors))
    }
}

/// The contract's error in a call that must fail.
///
/// # Errors
/// It succeeded, or failed with an error outside the contract.
pub fn refusal<T: std::fmt::Debug>(result: zbus::Result<T>) -> Result<Error> {
    match result {
        Ok(value) => bail!("it should have failed and returned {value:?}"),
        Err(error) => {
            let known = loopd_dbus::error::from_call(&error)
                .with_context(|| format!("not the contract's: {error}"))?;
            if known.message.is_empty() {
                bail!("{:?} has no message", known.kind);
            }
            Ok(known)
        }
    }
}

/// Fails unless the error has this kind.
///
/// # Errors
/// It has another.
pub fn expect_kind(error: &Error, kind: ErrorKind) -> Result<()> {
    if error.kind != kind {
        bail!("expected {kind:?}, got {:?}: {error}", error.kind);
    }
    Ok(())
}
