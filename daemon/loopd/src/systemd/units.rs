//! Starts and stops units of the service manager over the bus (`org.freedesktop.systemd1(5)`). The service manager
//! mounts in the host's mount namespace, which this sandboxed daemon cannot do.

use std::time::Duration;

use futures_lite::StreamExt;
use loopd_engine::Error;
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
const UNIT_EXISTS: &str = "org.freedesktop.systemd1.UnitExists";
/// The result of a successful job.
const DONE: &str = "done";

/// Properties of a transient unit.
pub type UnitProperties<'a> = Vec<(&'static str, Variant<'a>)>;

/// The units of the service manager.
pub struct Units {
    connection: Connection,
    bus: DBusProxy<'static>,
}

/// Why a job did not succeed.
#[derive(Debug)]
pub enum JobError {
    /// There is no service manager on the bus.
    Absent,
    /// There is a unit of this name.
    Exists(String),
    /// It rejected the call.
    Refused(String),
    /// The job ended with this result: `failed`, `timeout`, `dependency`…
    Ended(String),
    /// The job did not end in time.
    TimedOut,
}

impl Units {
    /// Uses the service manager on this bus.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn new(connection: &Connection) -> zbus::Result<Self> {
        let bus = DBusProxy::builder(connection).cache_properties(CacheProperties::No).build().await?;
        Ok(Self { connection: connection.clone(), bus })
    }

    /// Starts a transient unit with these properties.
    ///
    /// # Errors
    /// The job was rejected, failed or timed out.
    pub async fn start(
        &self,
        unit: &str,
        properties: &UnitProperties<'_>,
        timeout: Duration,
    ) -> Result<(), JobError> {
        let auxiliary: &[(&str, UnitProperties<'_>)] = &[];
        self.job(unit, "StartTransientUnit", &(unit, "fail", properties, auxiliary), timeout).await
    }

    /// Stops a unit and cancels its pending start. A unit that does not exist counts as stopped.
    ///
    /// # Errors
    /// The job was rejected, failed or timed out.
    pub async fn stop(&self, unit: &str, timeout: Duration) -> Result<(), JobError> {
        self.job(unit, "StopUnit", &(unit, "replace"), timeout).await
    }

    /// Resets the failed state of a unit.
    pub async fn reset_failed(&self, unit: &str) {
        if let Ok(owner) = self.owner().await
            && let Ok(manager) = self.manager(&owner).await
        {
            let _did_not_fail = manager.call_method("ResetFailedUnit", &(unit,)).await;
        }
    }

    async fn job<B>(&self, unit: &str, method: &str, body: &B, timeout: Duration) -> Result<(), JobError>
    where
        B: serde::Serialize + zbus::wire::DynamicType,
    {
        let ended = tokio::time::timeout(timeout, self.run(unit, method, body)).await;
        match ended.map_err(|_| JobError::TimedOut)?? {
            Some(result) if result != DONE => Err(JobError::Ended(result)),
            _ => Ok(()),
        }
    }

    /// Starts a job and returns its result; `None` if there is no such unit.
    async fn run<B>(&self, unit: &str, method: &str, body: &B) -> Result<Option<String>, JobError>
    where
        B: serde::Serialize + zbus::wire::DynamicType,
    {
        let owner = self.owner().await?;
        let manager = self.manager(&owner).await.map_err(refused)?;
        // Before the job exists: it may end before its path is returned.
        let mut ended = self.removed_jobs(unit, &owner).await.map_err(refused)?;
        // Without a subscription there are no signals; a second one is an error.
        let _already_subscribed = manager.call_method("Subscribe", &()).await;
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
        Err(JobError::Refused("the connection to the bus is closed".to_owned()))
    }

    /// The unique name of the service manager: signals from other senders are ignored.
    async fn owner(&self) -> Result<OwnedUniqueName, JobError> {
        let name = BusName::try_from(NAME).map_err(|_| JobError::Absent)?;
        self.bus.get_name_owner(name).await.map_err(|_| JobError::Absent)
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

    /// The `JobRemoved` signals of this unit. They are few, so none overflow the stream while it is not polled.
    async fn removed_jobs(&self, unit: &str, owner: &OwnedUniqueName) -> zbus::Result<MessageStream> {
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

fn refused(error: zbus::Error) -> JobError {
    match error {
        zbus::Error::MethodError(name, message, _) if name.as_str() == UNIT_EXISTS => {
            JobError::Exists(message.unwrap_or_default())
        }
        zbus::Error::MethodError(_, Some(message), _) => JobError::Refused(message),
        error => JobError::Refused(error.to_string()),
    }
}

impl JobError {
    /// The error for a caller that requested `operation`, such as `mount /dev/loop0 (/home/a/x.img)`.
    pub fn to_error(&self, operation: &str, unit: &str, advice: &str) -> Error {
        let operation = operation.to_owned();
        match self {
            Self::Absent => Error::NotSupported {
                operation,
                reason: "loopd has no privilege to do this itself and asks systemd, which is not running as the \
                         service manager (no owner of org.freedesktop.systemd1 on the system bus); do it as root"
                    .to_owned(),
            },
            Self::Exists(message) | Self::Refused(message) => {
                Error::Failed { operation, reason: format!("the service manager refused {unit}: {message}") }
            }
            Self::Ended(result) => Error::Failed {
                operation,
                reason: format!(
                    "the unit {unit} ended with \"{result}\"; {advice}see \"journalctl -u '{unit}'\""
                ),
            },
            Self::TimedOut => Error::Timeout {
                operation,
                reason: format!("the unit {unit} did not end in time; see \"journalctl -u '{unit}'\""),
            },
        }
    }
}
