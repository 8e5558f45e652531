//! Identifies the caller of a method: its bus name, its uid, and whether it allows interaction.

use std::sync::Arc;
use std::time::Duration;

use loopd_dbus::transport::Backlog;
use loopd_dbus::{Error, ErrorKind};
use zbus::fdo::DBusProxy;
use zbus::message::{Flags, Header};
use zbus::names::{BusName, UniqueName};
use zbus_polkit::policykit1::Subject;

use super::accounts::Accounts;
use super::clients::{Clients, Watch};
use loopd_engine::{ClientId, Permit, Quota};

/// How long a call waits for earlier calls of its uid; less than the 25 s timeout of a D-Bus call.
const QUEUE_TIMEOUT: Duration = Duration::from_secs(10);

/// Identifies callers.
pub struct Callers {
    bus: DBusProxy<'static>,
    clients: Clients,
    accounts: Accounts,
    call_quota: Quota,
    backlog: Backlog,
}

/// The caller of one method call. It is watched and counts against its uid's quota until it is dropped.
pub struct Caller {
    watch: Watch,
    uid: u32,
    subject: Subject,
    allows_interaction: bool,
    _permit: Permit,
}

impl Callers {
    /// Identifies callers on this bus.
    #[must_use]
    pub fn new(bus: DBusProxy<'static>, clients: Clients, call_quota: Quota, backlog: Backlog) -> Arc<Self> {
        Arc::new(Self { bus, clients, accounts: Accounts::default(), call_quota, backlog })
    }

    /// Waits until no call is in progress. Calls that have no handler yet do not count.
    pub async fn idle(&self) {
        self.clients.idle().await;
    }

    /// Waits until all calls received so far have been answered.
    pub async fn drain(&self) {
        // The bus delivers in order: after its reply, all earlier calls have handlers or are in the backlog.
        self.round_trip().await;
        self.backlog.cleared().await;
        self.round_trip().await;
        self.idle().await;
        // Replies are sent in order: after this call, all earlier ones have been sent.
        self.round_trip().await;
    }

    /// Waits until no call waits in the transport.
    pub async fn backlog_cleared(&self) {
        self.backlog.cleared().await;
    }

    async fn round_trip(&self) {
        let _the_reply_does_not_matter = self.bus.get_id().await;
    }

    /// Whether this client is connected to the bus.
    pub async fn is_connected(self: Arc<Self>, client: ClientId) -> bool {
        let Ok(name) = BusName::try_from(client.0.as_str()) else { return false };
        // If the bus does not answer, the client keeps its attachments.
        self.bus.name_has_owner(name).await.unwrap_or(true)
    }

    /// Identifies the caller of a message. The bus sets the sender, so it cannot be forged.
    ///
    /// # Errors
    /// The caller has disconnected, its uid is not in the user database, or it has too many calls in progress.
    pub async fn identify(&self, header: &Header<'_>) -> Result<Caller, Error> {
        let sender = header.sender().ok_or_else(disconnected)?;
        let watch = self.clients.watch(ClientId(sender.to_string()));
        let uid = self.uid(&watch, sender).await?;
        self.require_user(&watch, uid).await?;
        let permit = self.wait_for_permit(uid, &watch).await?;
        let subject = Subject::new_for_message_header(header).map_err(|_| disconnected())?;
        let allows_interaction = header.primary().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH);
        Ok(Caller { watch, uid, subject, allows_interaction, _permit: permit })
    }

    /// The uid of the watched client.
    async fn uid(&self, watch: &Watch, sender: &UniqueName<'_>) -> Result<u32, Error> {
        if let Some(uid) = watch.known_uid() {
            return Ok(uid);
        }
        let uid = self.bus.get_connection_unix_user(BusName::from(sender.clone())).await;
        let uid = uid.map_err(|_| disconnected())?;
        watch.learn_uid(uid);
        Ok(uid)
    }

    /// Checks that the uid is in the user database.
    async fn require_user(&self, watch: &Watch, uid: u32) -> Result<(), Error> {
        // The transport learns uids as well, but does not look them up.
        if watch.is_user(uid) {
            return Ok(());
        }
        let found = self.accounts.require(uid).await;
        match &found {
            Ok(()) => watch.learn_user(uid),
            Err(error) if error.kind == ErrorKind::AccessDenied => self.clients.learn_unknown_uid(uid),
            Err(_) => {}
        }
        found
    }

    /// Takes a permit of the uid's call quota, or waits until an earlier call has ended.
    async fn wait_for_permit(&self, uid: u32, watch: &Watch) -> Result<Permit, Error> {
        tokio::select! {
            permit = self.call_quota.acquire_in_turn(uid) => Ok(permit?),
            () = watch.wait_for_disconnect() => Err(disconnected()),
            () = tokio::time::sleep(QUEUE_TIMEOUT) => Err(self.call_quota.refusal(uid).into()),
        }
    }
}

fn disconnected() -> Error {
    Error::new(ErrorKind::AccessDenied, "the caller has disconnected from the bus")
}

impl Caller {
    /// The caller as a polkit subject: by bus name.
    #[must_use]
    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// Whether the call has the interactive authorization flag.
    #[must_use]
    pub fn allows_interaction(&self) -> bool {
        self.allows_interaction
    }
}

impl loopd_engine::Caller for Caller {
    fn client(&self) -> &ClientId {
        self.watch.client()
    }

    fn uid(&self) -> u32 {
        self.uid
    }

    fn is_disconnected(&self) -> bool {
        self.watch.is_disconnected()
    }

    async fn disconnected(&self) {
        self.watch.wait_for_disconnect().await;
    }
}

#[cfg(test)]
impl Caller {
    /// The caller `client` with this uid.
    pub fn for_test(clients: &Clients, client: &str, uid: u32, allows_interaction: bool) -> Self {
        let message = zbus::Message::method_call("/", "Test").sender(client).build(&()).unwrap();
        Self {
            watch: clients.watch(ClientId(client.to_owned())),
            uid,
            subject: Subject::new_for_message_header(&message.header()).unwrap(),
            allows_interaction,
            _permit: Quota::new("calls", "", loopd_engine::Limits { each: 1, all: 1 }).adopt(uid),
        }
    }
}
