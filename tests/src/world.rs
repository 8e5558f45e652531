//! A bus, a polkit and a daemon, and the calls that tests make.

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
    AttachOptions, AttachmentProperties, DetachOptions, Error, ErrorKind, ListOptions, PartitionProperties,
    VolumeProperties,
};
use zbus::wire::OwnedObjectPath;
use zbus::{Connection, OwnedVariant};

use crate::bus::{Bus, SERVICES};
use crate::daemon::Daemon;
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
    /// Its object.
    pub path: OwnedObjectPath,
    /// Its device.
    pub device: LoopDevice,
}

impl Attached {
    /// From what `SetupLoop` gave.
    ///
    /// # Errors
    /// The device has no loop device's name.
    pub fn new((path, device): (OwnedObjectPath, String)) -> Result<Self> {
        Ok(Self { path, device: LoopDevice::from_node(&device)? })
    }
}

/// The objects of an attachment's partitions, by number.
pub type Partitions = BTreeMap<u32, (PartitionProperties, VolumeProperties)>;

/// What a test runs in.
#[derive(Debug)]
pub struct World {
    /// Where its files are; any user can enter it.
    pub folder: PathBuf,
    /// Root's connection.
    pub connection: Connection,
    /// The manager on root's connection.
    pub manager: Manager,
    daemon: Option<Daemon>,
    idle_descriptors: Vec<String>,
    polkit: Polkit,
    bus: Bus,
}

impl World {
    /// Starts bus, polkit and daemon.
    ///
    /// # Errors
    /// One of them does not start.
    pub async fn start(polkit: Setup, folder: &Path) -> Result<Self> {
        let bus = Bus::start(folder)?;
        let polkit = Polkit::start(polkit, &bus, folder).await?;
        let daemon = Daemon::start(&bus, folder, &[], &[]).await?;
        let connection = bus.connect().await?;
        let manager = Manager::new(&connection, Interaction::Forbidden).await?;
        let mut world = Self {
            folder: folder.to_owned(),
            connection,
            manager,
            daemon: Some(daemon),
            idle_descriptors: Vec::new(),
            polkit,
            bus,
        };
        world.note_descriptors().await?;
        Ok(world)
    }

    /// The daemon.
    ///
    /// # Errors
    /// The test has ended it.
    pub fn daemon(&mut self) -> Result<&mut Daemon> {
        self.daemon.as_mut().context("there is no loopd")
    }

    /// Takes the daemon out of the world.
    pub fn take_daemon(&mut self) -> Option<Daemon> {
        self.daemon.take()
    }

    /// A further daemon on the same bus, not waited for.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn spawn_daemon(&self, folder: &Path) -> Result<Daemon> {
        Daemon::spawn(&self.bus, folder, &[], &[])
    }

    /// Writes the configuration that the daemon reads at its next start or SIGHUP.
    ///
    /// # Errors
    /// It cannot be written.
    pub fn configure(&self, text: &str) -> Result<()> {
        Ok(std::fs::write(crate::daemon::configuration(&self.folder)?, text)?)
    }

    /// Starts a daemon with these environment variables; one that still runs is asked to end first.
    ///
    /// # Errors
    /// It does not start, or the old one does not end well.
    pub async fn restart_daemon(&mut self, environment: &[(&str, &str)]) -> Result<()> {
        self.restart(&[], environment).await
    }

    /// Starts the daemon as this service manager does; one that still runs is asked to end first.
    ///
    /// # Errors
    /// It does not start, or the old one does not end well.
    pub async fn restart_managed(&mut self, manager: &ServiceManager) -> Result<()> {
        self.end_daemon().await?;
        // After its end: it may have given up something.
        let wrapper = manager.wrapper();
        let wrapper: Vec<_> = wrapper.iter().map(String::as_str).collect();
        self.restart(&wrapper, &manager.environment()).await
    }

    /// Kills the daemon.
    ///
    /// # Errors
    /// It cannot be killed.
    pub async fn kill_daemon(&mut self) -> Result<()> {
        let mut daemon = self.daemon.take().context("there is no loopd")?;
        daemon.kill().await
    }

    /// Asks the daemon to end.
    ///
    /// # Errors
    /// It does not, or not well.
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

    /// From now on the bus starts the daemon on demand, and nobody else does.
    ///
    /// # Errors
    /// The old one does not end well.
    pub async fn activate_daemon(&mut self) -> Result<()> {
        self.end_daemon().await?;
        let service = self.folder.join(SERVICES).join(format!("{BUS_NAME}.service"));
        let program = host::built("loopd");
        let folder = self.folder.display();
        let configuration = crate::daemon::configuration(&self.folder)?;
        let command = format!(
            "exec env LOOPD_LOG=debug DBUS_SYSTEM_BUS_ADDRESS={} RUNTIME_DIRECTORY={folder}/run:{folder}/media {} --config {} \
             2>>{folder}/loopd.log",
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

    /// Whether some daemon has the name.
    ///
    /// # Errors
    /// The bus does not answer.
    pub async fn daemon_is_there(&self) -> Result<bool> {
        let names = zbus::fdo::DBusProxy::new(&self.connection).await?;
        Ok(names.name_has_owner(BUS_NAME.try_into()?).await?)
    }

    /// Another bus in the place of this one, which is killed.
    ///
    /// # Errors
    /// It does not start.
    pub async fn restart_bus(&mut self) -> Result<()> {
        self.bus.kill().await?;
        self.bus = Bus::start(&self.folder)?;
        self.connection = self.bus.connect().await?;
        self.manager = Manager::new(&self.connection, Interaction::Forbidden).await?;
        Ok(())
    }

    /// The same, through a wrapper: a command that runs the rest of its words in its own place.
    ///
    /// # Errors
    /// It does not start, or the old one does not end well.
    pub async fn restart_daemon_under(&mut self, wrapper: &[&str]) -> Result<()> {
        self.restart(wrapper, &[]).await
    }

    async fn restart(&mut self, wrapper: &[&str], environment: &[(&str, &str)]) -> Result<()> {
        self.end_daemon().await?;
        self.daemon = Some(Daemon::start(&self.bus, &self.folder, wrapper, environment).await?);
        self.note_descriptors().await
    }

    async fn note_descriptors(&mut self) -> Result<()> {
        // After a first call, everything that is opened once is open.
        self.manager.list(&ListOptions::default()).await?;
        self.idle_descriptors = self.daemon()?.descriptors()?;
        Ok(())
    }

    /// The daemon's log.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(self.folder.join("loopd.log")).unwrap_or_default()
    }

    /// The polkit that answers as it is told.
    ///
    /// # Errors
    /// The test runs with another.
    pub fn stand_in(&self) -> Result<&StandIn> {
        match &self.polkit {
            Polkit::StandIn(stand_in) => Ok(stand_in),
            _ => bail!("this test has no stand-in for polkit"),
        }
    }

    /// Another connection of root's.
    ///
    /// # Errors
    /// The bus does not let us in.
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

    /// Tries to attach as root; gives the error.
    ///
    /// # Errors
    /// It worked, or failed in a way that is not the contract's.
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

    /// Tries to detach as root, not lazily; gives the error.
    ///
    /// # Errors
    /// It worked, or failed in a way that is not the contract's.
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

    /// What `List` gives, with foreign devices or without.
    ///
    /// # Errors
    /// The daemon's.
    pub async fn list(&self, all: bool) -> Result<Vec<Listed>> {
        Ok(self.manager.list(&ListOptions { all, ..ListOptions::default() }).await?)
    }

    /// The object of this device, ours or foreign.
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

    /// Writes down the daemon's signals from now on.
    ///
    /// # Errors
    /// The bus refuses.
    pub async fn signals(&self) -> Result<Signals> {
        Signals::record(&self.connection).await
    }

    /// Waits until the kernel has let go of the device's file, and the daemon of its object.
    ///
    /// # Errors
    /// They do not.
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
        command.env("DBUS_SYSTEM_BUS_ADDRESS", self.bus.address()).current_dir(&self.folder);
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

    /// Makes a raw call as this user and gives the answer.
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

    /// Waits until no device of this test is attached and the daemon has no more open than when it
    /// was idle.
    ///
    /// # Errors
    /// Something is left.
    pub async fn assert_no_leak(&mut self) -> Result<()> {
        let folder = self.folder.clone();
        let mut left = Vec::new();
        let free = eventually("all devices are free", async || {
            left = sysfs::bound_by_tests(&folder);
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
/// It worked, or failed in a way that is not the contract's.
pub fn refusal<T: std::fmt::Debug>(result: zbus::Result<T>) -> Result<Error> {
    match result {
        Ok(value) => bail!("it should have failed and gave {value:?}"),
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
