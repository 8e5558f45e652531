//! Authorizes requests. All decisions are made here.
//!
//! Root needs no authorization. For other callers polkit decides, by bus name, never by pid. If polkit
//! cannot be reached, does not answer or returns an invalid reply, access is denied.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use loopd_common::Pace;
use loopd_dbus::names::{
    ACTION_ATTACH, ACTION_ATTACH_DEVICE, ACTION_MANAGE_OTHERS, ACTION_MOUNT, ACTION_UNLOCK,
};
use loopd_dbus::{Error, ErrorKind};
use tokio::time::Instant;
use tracing::{info, warn};
use zbus::Connection;
use zbus_polkit::policykit1::{AuthorityProxy, AuthorizationResult, CheckAuthorizationFlags};

use super::caller::Caller;
use crate::platform;
use loopd_common::text::printable;
use loopd_engine::kernel::{FileFacts, FileKind, node};
use loopd_engine::{Caller as _, Permit, Quota, Snapshot, is_root};

/// How long polkit may take without a prompt; less than the 25 s timeout of a D-Bus call.
const TIMEOUT: Duration = Duration::from_secs(15);

/// How many checks of a uid are sent to polkit in a second, and how many at once after a rest: polkit processes the
/// checks of all services one after the other.
const CHECKS_PER_SECOND: u32 = 40;
const CHECKS_AT_ONCE: u32 = 32;

/// An operation that may need authorization.
#[derive(Clone, Copy, Debug)]
pub enum Request<'a> {
    /// Attach this file, to the device with this number if one is requested.
    Attach(&'a FileFacts, Option<u32>),
    /// Detach or change this attachment.
    Change(&'a Snapshot),
    /// Remove the device with this number.
    Remove(u32),
    /// Mount the whole device of this attachment, or this partition.
    Mount(&'a Snapshot, Option<u32>),
    /// Unmount a file system that loopd did not mount for the caller.
    UnmountOthers(&'a Snapshot, Option<u32>),
    /// Unlock the whole device of this attachment, or this partition.
    Unlock(&'a Snapshot, Option<u32>),
    /// Lock it.
    Lock(&'a Snapshot, Option<u32>),
}

/// The details of a request that a prompt shows. Unknown values are empty.
struct Details {
    device: String,
    file: String,
    owner: String,
}

/// Authorizes requests by polkit.
pub struct Authority {
    polkit: AuthorityProxy<'static>,
    prompt_quota: Quota,
    pace: Pace,
    checks: AtomicU64,
}

impl Authority {
    /// Uses polkit on this bus. It need not be running yet.
    ///
    /// # Errors
    /// The connection failed.
    pub async fn new(connection: &Connection, prompt_quota: Quota) -> zbus::Result<Self> {
        let polkit = AuthorityProxy::builder(connection)
            .cache_properties(zbus::proxy::CacheProperties::No)
            .build()
            .await?;
        let pace = Pace::new(CHECKS_PER_SECOND, CHECKS_AT_ONCE);
        Ok(Self { polkit, prompt_quota, pace, checks: AtomicU64::new(0) })
    }

    /// Whether requests of this caller may need authorization: not those of root, and none in a simulation.
    #[must_use]
    pub fn needs_authorization(&self, caller: &Caller) -> bool {
        !platform::IS_SIMULATED && !is_root(caller.uid())
    }

    /// Authorizes a request of the caller. A refusal is logged.
    ///
    /// # Errors
    /// `AccessDenied`, `InteractiveAuthorizationRequired`, `LimitExceeded`.
    pub async fn authorize(&self, caller: &Caller, request: Request<'_>) -> Result<(), Error> {
        let Some(action) = request.action(caller.uid()).filter(|_| self.needs_authorization(caller)) else {
            return Ok(());
        };
        let details = request.details(caller.uid());
        let result = self.check(caller, action, &details).await;
        if let Err(error) = &result {
            let Details { device, file, .. } = details;
            info!(uid = caller.uid(), client = %caller.client(), action, device, file, "refused: {error}");
        }
        result
    }

    /// Asks polkit without a prompt first: the number of open prompts is limited.
    async fn check(&self, caller: &Caller, action: &'static str, details: &Details) -> Result<(), Error> {
        let mut result = self.ask(caller, action, details, None).await?;
        if result.is_challenge && !result.is_authorized && caller.allows_interaction() {
            let prompt = self.prompt_quota.acquire(caller.uid())?;
            result = self.ask(caller, action, details, Some(prompt)).await?;
        }
        evaluate(&result, caller, action)
    }

    async fn ask(
        &self,
        caller: &Caller,
        action: &'static str,
        details: &Details,
        prompt: Option<Permit>,
    ) -> Result<AuthorizationResult, Error> {
        self.wait_for_pace(caller).await?;
        let details = HashMap::from([
            ("device", details.device.as_str()),
            ("file", &details.file),
            ("owner", &details.owner),
        ]);
        let cancellation_id = format!("loopd-{}", self.checks.fetch_add(1, Ordering::Relaxed));
        let flags = match prompt {
            Some(_) => CheckAuthorizationFlags::ALLOW_USER_INTERACTION,
            None => CheckAuthorizationFlags::empty(),
        };
        let check =
            self.polkit.check_authorization(caller.subject(), action, &details, flags, &cancellation_id);
        tokio::select! {
            result = check => result.map_err(|error| polkit_failed(&error)),
            () = caller.disconnected() => {
                self.cancel(&cancellation_id).await;
                Err(denied("the caller disconnected before polkit answered"))
            }
            // A prompt may take as long as the user needs.
            () = tokio::time::sleep(TIMEOUT), if prompt.is_none() => {
                self.cancel(&cancellation_id).await;
                Err(denied("polkit did not answer in time"))
            }
        }
    }

    /// Delays a check so that polkit has time for the checks of others.
    async fn wait_for_pace(&self, caller: &Caller) -> Result<(), Error> {
        let start = self.pace.book(Instant::now().into_std(), caller.uid(), 1);
        tokio::select! {
            () = tokio::time::sleep_until(start.into()) => Ok(()),
            () = caller.disconnected() => Err(denied("the caller disconnected before polkit was asked")),
        }
    }

    async fn cancel(&self, cancellation_id: &str) {
        if let Err(error) = self.polkit.cancel_check_authorization(cancellation_id).await {
            warn!("polkit did not cancel a check: {error}");
        }
    }
}

impl Request<'_> {
    /// The polkit action that a user with this uid needs; `None` if it needs none.
    fn action(self, uid: u32) -> Option<&'static str> {
        match self {
            Self::Attach(file, _) => Some(match file.kind {
                FileKind::Regular => ACTION_ATTACH,
                FileKind::BlockDevice => ACTION_ATTACH_DEVICE,
            }),
            Self::Change(attachment) | Self::Lock(attachment, _) => {
                (!attachment.may_be_changed_by(uid)).then_some(ACTION_MANAGE_OTHERS)
            }
            Self::Mount(attachment, _) if attachment.is_owned_by(uid) => Some(ACTION_MOUNT),
            Self::Unlock(attachment, _) if attachment.is_owned_by(uid) => Some(ACTION_UNLOCK),
            Self::Remove(_) | Self::Mount(..) | Self::Unlock(..) | Self::UnmountOthers(..) => {
                Some(ACTION_MANAGE_OTHERS)
            }
        }
    }

    fn details(self, uid: u32) -> Details {
        match self {
            Self::Remove(number) => {
                Details { device: node(number), file: String::new(), owner: String::new() }
            }
            Self::Attach(file, number) => Details {
                device: number.map(node).unwrap_or_default(),
                file: printable(&file.path),
                owner: uid.to_string(),
            },
            Self::Change(attachment) => Details::of(attachment, None),
            Self::Mount(attachment, partition)
            | Self::UnmountOthers(attachment, partition)
            | Self::Unlock(attachment, partition)
            | Self::Lock(attachment, partition) => Details::of(attachment, partition),
        }
    }
}

impl Details {
    fn of(attachment: &Snapshot, partition: Option<u32>) -> Self {
        let Snapshot { device, ownership, .. } = attachment;
        Self {
            device: partition.map_or_else(|| device.node(), |number| device.partition_node(number)),
            file: printable(&device.backing_file),
            owner: ownership.as_ref().map(|ownership| ownership.uid.to_string()).unwrap_or_default(),
        }
    }
}

/// The decision of polkit's result.
fn evaluate(result: &AuthorizationResult, caller: &Caller, action: &str) -> Result<(), Error> {
    if result.is_authorized {
        return Ok(());
    }
    if result.details.contains_key("polkit.dismissed") {
        return Err(denied("the authorization prompt was dismissed"));
    }
    if result.is_challenge && !caller.allows_interaction() {
        return Err(Error::new(
            ErrorKind::InteractiveAuthorizationRequired,
            format!("{action} needs interactive authorization, which the call did not allow"),
        ));
    }
    Err(denied(&format!("not authorized for {action}")))
}

fn denied(message: &str) -> Error {
    Error::new(ErrorKind::AccessDenied, message)
}

fn polkit_failed(error: &zbus::Error) -> Error {
    warn!("polkit cannot be reached: {error}");
    denied("access is denied because polkit cannot be reached; is polkit installed and running?")
}

#[cfg(test)]
mod tests;
