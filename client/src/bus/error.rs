//! Errors of calls over the bus: their meaning for the user, and their kind.

use std::io;

use loopd_dbus::{Error, ErrorKind};
use zbus::{DBusError, fdo};

use crate::in_use::InUse;
use crate::message::reason;

/// Explains a failed call. An error of loopd's keeps its kind and message.
#[must_use]
pub fn explain(error: zbus::Error) -> anyhow::Error {
    if let Some(error) = loopd_dbus::error::from_call(&error) {
        return error.into();
    }
    anyhow::anyhow!(match &error {
        zbus::Error::Connection(error, address) => bus_unreachable(address, error),
        zbus::Error::InputOutput(error) => {
            format!("lost the connection to the system message bus: {}", reason(error))
        }
        zbus::Error::Address(detail) =>
            format!("invalid system bus address: {detail}; correct or unset DBUS_SYSTEM_BUS_ADDRESS"),
        zbus::Error::Handshake(detail) => format!("the system message bus refused the connection: {detail}"),
        zbus::Error::FDO(error) => explain_standard(error),
        zbus::Error::MethodError(name, detail, _) => {
            explain_named(name.as_str(), detail.as_deref().unwrap_or_default())
        }
        other => format!("the call to loopd failed: {other}"),
    })
}

/// The text for a bus that cannot be connected to.
pub fn bus_unreachable(address: &impl std::fmt::Display, error: &io::Error) -> String {
    format!(
        "cannot connect to the system message bus at {address}: {}; check it with `systemctl status dbus`, \
         and start it with `sudo systemctl start dbus`",
        reason(error)
    )
}

fn explain_standard(error: &fdo::Error) -> String {
    use fdo::Error as E;
    let detail = error.description().unwrap_or_default();
    match error {
        E::ServiceUnknown(_)
        | E::NameHasNoOwner(_)
        | E::TimedOut(_)
        | E::SpawnExecFailed(_)
        | E::SpawnForkFailed(_)
        | E::SpawnChildExited(_)
        | E::SpawnChildSignaled(_)
        | E::SpawnFailed(_)
        | E::SpawnFailedToSetup(_)
        | E::SpawnConfigInvalid(_)
        | E::SpawnServiceNotValid(_)
        | E::SpawnServiceNotFound(_)
        | E::SpawnPermissionsInvalid(_)
        | E::SpawnFileInvalid(_)
        | E::SpawnNoMemory(_) => not_running(detail),
        E::NoReply(_) | E::Disconnected(_) => format!(
            "loopd stopped before it replied ({detail}); `journalctl -u loopd` may show why, and \
             `loopctl list --all` shows what is attached now"
        ),
        _ => explain_named(error.name().as_str(), detail),
    }
}

fn explain_named(name: &str, detail: &str) -> String {
    // With systemd the bus passes on systemd's own errors about the unit: masked, not found, failed.
    if name.starts_with("org.freedesktop.systemd1.") {
        return not_running(detail);
    }
    format!("the call to loopd failed: {detail} ({name})")
}

fn not_running(detail: &str) -> String {
    format!(
        "loopd is not running and the system bus could not start it ({detail}); start it with \
         `sudo systemctl start loopd`, and check `systemctl status loopd` if that fails"
    )
}

/// The kind of an error of loopd's; `None` for any other error.
#[must_use]
pub fn kind(error: &anyhow::Error) -> Option<ErrorKind> {
    let in_use = || error.downcast_ref::<InUse>().map(|in_use| in_use.error.kind);
    error.downcast_ref::<Error>().map(|error| error.kind).or_else(in_use)
}

/// Whether the device or the file system is in use.
#[must_use]
pub fn is_busy(error: &anyhow::Error) -> bool {
    kind(error) == Some(ErrorKind::Busy)
}

/// Whether the attachment has ended.
#[must_use]
pub fn is_gone(error: &anyhow::Error) -> bool {
    matches!(kind(error), Some(ErrorKind::UnknownObject | ErrorKind::NotFound))
}

/// Whether the object does not have the interface that was called.
#[must_use]
pub fn lacks_interface(error: &zbus::Error) -> bool {
    matches!(error, zbus::Error::FDO(error) if matches!(**error, fdo::Error::UnknownInterface(_)))
}

/// Whether the user is not authorized.
#[must_use]
pub fn is_refused(error: &anyhow::Error) -> bool {
    matches!(kind(error), Some(ErrorKind::AccessDenied | ErrorKind::InteractiveAuthorizationRequired))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_daemon_is_explained() {
        let missing = fdo::Error::ServiceUnknown("The name org.loopd1 was not provided".to_owned());
        let text = explain(zbus::Error::FDO(Box::new(missing))).to_string();
        assert!(text.contains("was not provided") && text.contains("systemctl start loopd"), "{text}");
        assert!(explain_named("org.freedesktop.systemd1.UnitMasked", "masked").contains("start loopd"));
    }

    #[test]
    fn errors_of_loopd_keep_message_and_kind() {
        let refused = fdo::Error::AccessDenied("you may not".to_owned());
        let error = explain(zbus::Error::FDO(Box::new(refused)));
        assert_eq!(error.to_string(), "you may not");
        assert_eq!(kind(&error), Some(ErrorKind::AccessDenied));
        assert!(is_refused(&error) && !is_busy(&error) && !is_gone(&error));
    }

    #[test]
    fn an_ended_attachment_is_recognized() {
        assert!(is_gone(&Error::new(ErrorKind::UnknownObject, "").into()));
        assert!(is_gone(&Error::new(ErrorKind::NotFound, "").into()));
        assert!(!is_gone(&Error::new(ErrorKind::Busy, "").into()));
        assert!(!is_gone(&anyhow::anyhow!("other")));
    }
}
