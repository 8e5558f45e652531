//! The service manager's units, over the bus: it mounts in the host's name space, which this daemon in its
//! sandbox cannot (`org.freedesktop.systemd1(5)`).

use std::time::Duration;

use futures_lite::StreamExt;
use loopd_dbus::{Error, ErrorKind};
use zbus::fdo::DBusProxy;
use zbus::message::Type;
use zbus::names::{BusName, OwnedUniqueName};
use zbus::proxy::CacheProperties;
use zbus::wire::{ObjectPath, OwnedObjectPath};
use zbus::{Connection, MatchRule, MessageStream, Proxy, Variant};

const NAME: &str = "org.freedesktop.systemd1";
const PATH: &str = "/org/freedesktop/systemd1";
const INTERFACE: &str = "org.freedesktop.systemd1.Manager";
const NO_SUCH_UNIT: &str = "org.freedesktop.systemd1.NoSuchUnit";
/// What a job says when it has done what it was for.
const DONE: &str = "done";

/// Settings of a unit.
pub type Settings<'a> = Vec<(&'static str, Variant<'a>)>;

/// Starts and stops units.
pub struct Units {
    connection: Connection,
    bus: DBusProxy<'static>,
}

/// Why a job did not do what it was for.
#[derive(Debug)]
pub enum Failure {
    /// There is no service manager on the bus.
    Absent,
    /// It does not want to.
    Refused(String),
    /// It tried, and this is what it calls the end: `failed`, `timeout`, `dependency`…
    Ended(String),
    /// It did not come to an end in time.
    Late,
}

impl Units {
    /// The units of the service manager on this bus.
    pub async fn new(connection: &Connection) -> zbus::Result<Self> {
        let bus = DBusProxy::builder(connection).cache_properties(CacheProperties::No).build().await?;
        Ok(Self { connection: connection.clone(), bus })
    }

    /// Starts a unit that exists only as these settings.
    pub async fn start(
        &self,
        unit: &str,
        settings: &Settings<'_>,
        patience: Duration,
    ) -> Result<(), Failure> {
        let auxiliary: &[(&str, Settings<'_>)] = &[];
        self.job(unit, "StartTransientUnit", &(unit, "fail", settings, auxiliary), patience).await
    }

    /// Stops a unit, and calls off what was going to start it. One that there is not has stopped.
    pub async fn stop(&self, unit: &str, patience: Duration) -> Result<(), Failure> {
        self.job(unit, "StopUnit", &(unit, "replace"), patience).await
    }

    /// Has it forget that a unit has failed.
    pub async fn forget_failure(&self, unit: &str) {
        if let Ok(owner) = self.owner().await
            && let Ok(manager) = self.manager(&owner).await
        {
            let _it_has_not = manager.call_method("ResetFailedUnit", &(unit,)).await;
        }
    }

    async fn job<B>(&self, unit: &str, method: &str, body: &B, patience: Duration) -> Result<(), Failure>
    where
        B: serde::Serialize + zbus::wire::DynamicType,
    {
        let ended = tokio::time::timeout(patience, self.run(unit, method, body)).await;
        match ended.map_err(|_| Failure::Late)?? {
            Some(result) if result != DONE => Err(Failure::Ended(result)),
            _ => Ok(()),
        }
    }

    /// What a job ended with; `None` where there is no such unit.
    async fn run<B>(&self, unit: &str, method: &str, body: &B) -> Result<Option<String>, Failure>
    where
        B: serde::Serialize + zbus::wire::DynamicType,
    {
        let owner = self.owner().await?;
        let manager = self.manager(&owner).await.map_err(refused)?;
        // Before the job is made: it may end before we are told its name.
        let mut ended = self.ends_of(unit, &owner).await.map_err(refused)?;
        // It tells nobody who has not asked; whoever has asked already may not ask again.
        let _asked_before = manager.call_method("Subscribe", &()).await;
        let job: OwnedObjectPath = match manager.call(method, body).await {
            Ok(job) => job,
            Err(zbus::Error::MethodError(name, _, _)) if name.as_str() == NO_SUCH_UNIT => return Ok(None),
            Err(error) => return Err(refused(error)),
        };
        while let Some(signal) = ended.next().await {
            let body = signal.map_err(refused)?.body();
            let Ok((_, path, _, result)) = body.deserialize::<(u32, ObjectPath<'_>, &str, &str)>() else {
                continue;
            };
            if path == *job {
                return Ok(Some(result.to_owned()));
            }
        }
        Err(Failure::Refused("the bus is gone".to_owned()))
    }

    /// Whoever is the service manager now: what others call by its name is not taken for its word.
    async fn owner(&self) -> Result<OwnedUniqueName, Failure> {
        let name = BusName::try_from(NAME).map_err(|_| Failure::Absent)?;
        self.bus.get_name_owner(name).await.map_err(|_| Failure::Absent)
    }

    async fn manager(&self, owner: &OwnedUniqueName) -> zbus::Result<Proxy<'static>> {
        zbus::proxy::Builder::new(&self.connection)
            .destination(owner.clone())
            .path(PATH)
            .interface(INTERFACE)
            .cache_properties(CacheProperties::No)
            .build()
            .await
    }

    /// The ends of this unit's jobs: few, so that the stream holds all that come while it is not polled.
    async fn ends_of(&self, unit: &str, owner: &OwnedUniqueName) -> zbus::Result<MessageStream> {
        let rule = MatchRule::builder()
            .msg_type(Type::Signal)
            .sender(owner.clone())
            .path(PATH)
            .interface(INTERFACE)
            .member("JobRemoved")
            .arg(2, unit)
            .build()?;
        MessageStream::for_match_rule(rule, &self.connection, None).await
    }
}

fn refused(error: zbus::Error) -> Failure {
    Failure::Refused(match error {
        zbus::Error::MethodError(_, Some(message), _) => message,
        error => error.to_string(),
    })
}

impl Failure {
    /// What it is for whoever wanted `asked`: `mount /dev/loop0 (/home/a/x.img)`.
    pub fn explained(&self, asked: &str, unit: &str, advice: &str) -> Error {
        let (kind, why) = match self {
            Self::Absent => (
                ErrorKind::NotSupported,
                "loopd has no privilege to do so itself and asks systemd for it, which is not the service manager here \
                 (nobody has the name org.freedesktop.systemd1 on the system bus); let root do it"
                    .to_owned(),
            ),
            Self::Refused(message) => (ErrorKind::Kernel, format!("the service manager refused {unit}: {message}")),
            Self::Ended(result) => (
                ErrorKind::Kernel,
                format!("the unit {unit} ended with \"{result}\"; {advice}\"journalctl -u '{unit}'\" has the reason"),
            ),
            Self::Late => (
                ErrorKind::Timeout,
                format!("the unit {unit} came to no end in time; \"journalctl -u '{unit}'\" may tell why"),
            ),
        };
        Error::new(kind, format!("cannot {asked}: {why}"))
    }
}
