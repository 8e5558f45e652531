//! Who is asking: bus name, uid, and whether a prompt may appear.

use std::sync::Arc;
use std::time::Duration;

use loopd_dbus::transport::Backlog;
use loopd_dbus::{Error, ErrorKind};
use zbus::fdo::DBusProxy;
use zbus::message::{Flags, Header};
use zbus::names::{BusName, UniqueName};
use zbus_polkit::policykit1::Subject;

use crate::accounts::Accounts;
use crate::clients::{Clients, Watch};
use loopd_engine::{ClientId, Permit, Quota};

/// How long a call waits for its uid's earlier ones; below the 25 s of a D-Bus call.
const LONGEST_WAIT: Duration = Duration::from_secs(10);

/// Asks the bus about callers.
pub struct Callers {
    bus: DBusProxy<'static>,
    clients: Clients,
    accounts: Accounts,
    calls_of_a_uid: Quota,
    backlog: Backlog,
}

/// One call's caller, watched until the call ends.
pub struct Caller {
    watch: Watch,
    uid: u32,
    subject: Subject,
    interactive: bool,
    _permit: Permit,
}

impl Callers {
    /// Asks this bus.
    #[must_use]
    pub fn new(
        bus: DBusProxy<'static>,
        clients: Clients,
        calls_of_a_uid: Quota,
        backlog: Backlog,
    ) -> Arc<Self> {
        Arc::new(Self { bus, clients, accounts: Accounts::default(), calls_of_a_uid, backlog })
    }

    /// Resolves when no call is under way that its handler has taken up.
    pub async fn idle(&self) {
        self.clients.idle().await;
    }

    /// Resolves when every call that has arrived is answered.
    pub async fn answered(&self) {
        // What has arrived is with its handler once something later has arrived.
        self.round_trip().await;
        self.backlog.cleared().await;
        self.round_trip().await;
        self.idle().await;
        // Answers go out before what is sent later.
        self.round_trip().await;
    }

    /// Resolves when no call waits for its turn.
    pub async fn backlog_cleared(&self) {
        self.backlog.cleared().await;
    }

    async fn round_trip(&self) {
        let _nobody_to_answer_to = self.bus.get_id().await;
    }

    /// Whether the bus still knows this client.
    pub async fn still_has(self: Arc<Self>, client: ClientId) -> bool {
        let Ok(name) = BusName::try_from(client.0.as_str()) else { return false };
        // Without an answer nothing is taken from anyone.
        self.bus.name_has_owner(name).await.unwrap_or(true)
    }

    /// The caller of a message. Its sender is set by the bus and cannot be forged.
    ///
    /// # Errors
    /// The caller is gone, its uid is no user's, or it has too many calls under way.
    pub async fn identify(&self, header: &Header<'_>) -> Result<Caller, Error> {
        let sender = header.sender().ok_or_else(unknown)?;
        let watch = self.clients.watch(ClientId(sender.to_string()));
        let uid = match watch.known_uid() {
            Some(uid) => uid,
            None => self.ask_uid(&watch, sender).await?,
        };
        // The bus may have been asked before, for the descriptors of the call, and the user database not.
        if !watch.is_user(uid) {
            let known = self.accounts.require(uid).await;
            if known.as_ref().is_err_and(|error| error.kind == ErrorKind::AccessDenied) {
                self.clients.learn_no_user(uid);
            }
            known?;
            watch.learn_user(uid);
        }
        let permit = self.wait_for_turn(uid, &watch).await?;
        let subject = Subject::new_for_message_header(header).map_err(|_| unknown())?;
        let interactive = header.primary().flags().contains(Flags::ALLOW_INTERACTIVE_AUTH);
        Ok(Caller { watch, uid, subject, interactive, _permit: permit })
    }
}

impl Callers {
    /// Takes one of the uid's calls, where there are some left, or when one of them has ended.
    async fn wait_for_turn(&self, uid: u32, watch: &Watch) -> Result<Permit, Error> {
        tokio::select! {
            permit = self.calls_of_a_uid.acquire_in_turn(uid) => permit,
            () = watch.disconnected() => Err(unknown()),
            () = tokio::time::sleep(LONGEST_WAIT) => Err(self.calls_of_a_uid.refusal(uid)),
        }
    }

    async fn ask_uid(&self, watch: &Watch, sender: &UniqueName<'_>) -> Result<u32, Error> {
        let uid =
            self.bus.get_connection_unix_user(BusName::from(sender.clone())).await.map_err(|_| unknown())?;
        watch.learn_uid(uid);
        Ok(uid)
    }
}

fn unknown() -> Error {
    Error::new(ErrorKind::AccessDenied, "the bus does not know the caller any more")
}

impl Caller {
    /// The caller as polkit knows it: by bus name.
    #[must_use]
    pub fn subject(&self) -> &Subject {
        &self.subject
    }

    /// Whether a prompt may appear.
    #[must_use]
    pub fn allows_interaction(&self) -> bool {
        self.interactive
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
        self.watch.is_gone()
    }

    async fn disconnected(&self) {
        self.watch.disconnected().await;
    }
}
