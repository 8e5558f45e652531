//! The only place that says yes or no.
//!
//! Root passes. Everyone else is asked of polkit by bus name, never by pid. Where polkit cannot be
//! reached, does not answer or says something that is not understood, the answer is no.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use loopd_common::Pace;
use loopd_dbus::names::{ACTION_ATTACH, ACTION_ATTACH_DEVICE, ACTION_MANAGE_OTHERS, ACTION_MOUNT};
use loopd_dbus::{Error, ErrorKind};
use tokio::time::Instant;
use tracing::{info, warn};
use zbus::Connection;
use zbus_polkit::policykit1::{AuthorityProxy, AuthorizationResult, CheckAuthorizationFlags};

use crate::caller::Caller;
use loopd_common::text::printable;
use loopd_engine::kernel::{FileFacts, FileKind, node};
use loopd_engine::{Caller as _, Quota, Snapshot, is_root};

/// polkit answers at once where it need not ask anyone; below the 25 s of a D-Bus call.
const LONGEST_SILENCE: Duration = Duration::from_secs(15);

/// How many questions of a uid are asked a second, and how many at once after a rest: polkit answers one
/// after the other, for all of the machine's services.
const QUESTIONS_A_SECOND: u32 = 100;
const QUESTIONS_AT_ONCE: u32 = 32;

/// What a caller wants to do.
#[derive(Clone, Copy, Debug)]
pub enum Deed<'a> {
    /// Attach this file, to the device with this number where one is asked for.
    Attach(&'a FileFacts, Option<u32>),
    /// Detach or change this attachment.
    Change(&'a Snapshot),
    /// Remove the device with this number.
    Remove(u32),
    /// Mount the whole device of this attachment, or this partition.
    Mount(&'a Snapshot, Option<u32>),
    /// Unmount it, where loopd has not mounted it for the caller.
    UnmountOthers(&'a Snapshot, Option<u32>),
}

/// Asks polkit.
pub struct Authority {
    polkit: AuthorityProxy<'static>,
    prompts_of_a_uid: Quota,
    pace: Pace,
    questions: AtomicU64,
}

impl Authority {
    /// An authority that asks polkit on this bus. polkit need not be there yet.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn new(connection: &Connection, prompts_of_a_uid: Quota) -> zbus::Result<Self> {
        let polkit = AuthorityProxy::builder(connection)
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .await?;
        let pace = Pace::new(QUESTIONS_A_SECOND, QUESTIONS_AT_ONCE);
        Ok(Self { polkit, prompts_of_a_uid, pace, questions: AtomicU64::new(0) })
    }

    /// Whether anyone need be asked about what this caller does: root does as it likes.
    #[must_use]
    pub fn asks(&self, caller: &Caller) -> bool {
        !is_root(caller.uid())
    }

    /// Lets the caller do it, or not.
    ///
    /// # Errors
    /// `AccessDenied`, `InteractiveAuthorizationRequired`, `LimitExceeded`.
    pub async fn allow(&self, caller: &Caller, deed: Deed<'_>) -> Result<(), Error> {
        let Some(action) = deed.action(caller.uid()).filter(|_| self.asks(caller)) else { return Ok(()) };
        let answer = self.ask(caller, action, deed).await;
        if let Err(error) = &answer {
            let (device, file, _) = deed.details(caller.uid());
            info!(uid = caller.uid(), client = %caller.client(), action, device, file, "refused: {error}");
        }
        answer
    }

    async fn ask(&self, caller: &Caller, action: &'static str, deed: Deed<'_>) -> Result<(), Error> {
        let prompt = if caller.allows_interaction() {
            Some(self.prompts_of_a_uid.acquire(caller.uid())?)
        } else {
            None
        };
        self.wait_for_turn(caller).await?;
        let (device, file, owner) = deed.details(caller.uid());
        let details = HashMap::from([("device", device.as_str()), ("file", &file), ("owner", &owner)]);
        let question = format!("loopd-{}", self.questions.fetch_add(1, Ordering::Relaxed));
        let flags = match prompt {
            Some(_) => CheckAuthorizationFlags::ALLOW_USER_INTERACTION,
            None => CheckAuthorizationFlags::empty(),
        };
        let check = self.polkit.check_authorization(caller.subject(), action, &details, flags, &question);
        let result = tokio::select! {
            result = check => result.map_err(|error| unreachable_polkit(&error))?,
            () = caller.disconnected() => {
                self.cancel(&question).await;
                return Err(denied("the caller vanished while polkit was asked"));
            }
            // A prompt may take as long as the user does.
            () = tokio::time::sleep(LONGEST_SILENCE), if prompt.is_none() => {
                self.cancel(&question).await;
                return Err(denied("polkit did not answer in time"));
            }
        };
        judge(&result, caller, action)
    }

    /// Waits until one more question of this uid leaves polkit to the others.
    async fn wait_for_turn(&self, caller: &Caller) -> Result<(), Error> {
        tokio::select! {
            () = tokio::time::sleep_until(self.pace.book(Instant::now().into_std(), caller.uid(), 1).into()) => Ok(()),
            () = caller.disconnected() => Err(denied("the caller vanished before polkit was asked")),
        }
    }

    async fn cancel(&self, question: &str) {
        if let Err(error) = self.polkit.cancel_check_authorization(question).await {
            warn!("polkit did not take back a question: {error}");
        }
    }
}

impl Deed<'_> {
    /// The action to ask for; `None` where nobody need be asked.
    fn action(self, uid: u32) -> Option<&'static str> {
        match self {
            Self::Attach(file, _) => Some(match file.kind {
                FileKind::Regular => ACTION_ATTACH,
                FileKind::BlockDevice => ACTION_ATTACH_DEVICE,
            }),
            Self::Change(attachment) => (!attachment.is_owned_by(uid)).then_some(ACTION_MANAGE_OTHERS),
            Self::Mount(attachment, _) if attachment.is_owned_by(uid) => Some(ACTION_MOUNT),
            Self::Remove(_) | Self::Mount(..) | Self::UnmountOthers(..) => Some(ACTION_MANAGE_OTHERS),
        }
    }

    /// Device, file and owner, as a prompt shows them; the device is empty where the kernel will
    /// choose one.
    fn details(self, uid: u32) -> (String, String, String) {
        match self {
            Self::Remove(number) => (node(number), String::new(), String::new()),
            Self::Attach(file, number) => {
                (number.map(node).unwrap_or_default(), printable(&file.path), uid.to_string())
            }
            Self::Change(attachment) => of_attachment(attachment, None),
            Self::Mount(attachment, partition) | Self::UnmountOthers(attachment, partition) => {
                of_attachment(attachment, partition)
            }
        }
    }
}

fn of_attachment(attachment: &Snapshot, partition: Option<u32>) -> (String, String, String) {
    let Snapshot { device, ownership, .. } = attachment;
    let node = partition.map_or_else(|| device.node(), |number| device.partition_node(number));
    let owner = ownership.as_ref().map(|ownership| ownership.uid.to_string());
    (node, printable(&device.backing_file), owner.unwrap_or_default())
}

fn judge(result: &AuthorizationResult, caller: &Caller, action: &str) -> Result<(), Error> {
    if result.is_authorized {
        return Ok(());
    }
    if result.details.contains_key("polkit.dismissed") {
        return Err(denied("the prompt was dismissed"));
    }
    if result.is_challenge && !caller.allows_interaction() {
        return Err(Error::new(
            ErrorKind::InteractiveAuthorizationRequired,
            format!("{action} needs a password, and the call did not allow a prompt"),
        ));
    }
    Err(denied(&format!("polkit says no to {action}")))
}

fn denied(message: &str) -> Error {
    Error::new(ErrorKind::AccessDenied, message)
}

fn unreachable_polkit(error: &zbus::Error) -> Error {
    warn!("polkit cannot be asked: {error}");
    denied("polkit cannot be asked, so the answer is no; is polkit installed and running?")
}
