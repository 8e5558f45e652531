//! Adds the users of a loop device to the error that it is busy.

use loopd_common::busy::{CLAIMED, OPENED};
use loopd_dbus::names::BUS_NAME;
use loopd_dbus::{Error, ErrorKind};
use nix::unistd::geteuid;
use zbus::fdo::DBusProxy;

use super::device_nodes::Nodes;
use super::device_search::{SearchResult, search};
use super::process::Process;
use crate::bus::connection::Bus;
use crate::device_node::device_node;
use crate::in_use::InUse;

/// How many users are listed.
const MOST: usize = 8;

/// Adds the users to a `Busy` about this device; returns any other error as it is.
pub async fn explained(bus: &Bus, error: anyhow::Error, number: u32) -> anyhow::Error {
    match error.downcast::<Error>() {
        Ok(error) if error.kind == ErrorKind::Busy => {
            let nodes = Nodes::of(number);
            let found = search(&nodes, keepers(bus).await).await;
            let holders = lines(&found, names_users(&error.message), &device_node(number));
            InUse { error, holders }.into()
        }
        Ok(error) => error.into(),
        Err(error) => error,
    }
}

/// The processes whose descriptors a detach releases: loopd, and the service manager, which stores copies for it.
async fn keepers(bus: &Bus) -> Vec<u32> {
    let manager = Process { pid: 1 };
    let manager = (manager.name() == "systemd").then_some(manager.pid);
    loopd(bus).await.into_iter().chain(manager).collect()
}

async fn loopd(bus: &Bus) -> Option<u32> {
    let proxy = DBusProxy::new(&bus.connection).await.ok()?;
    proxy.get_connection_unix_process_id(BUS_NAME.try_into().ok()?).await.ok()
}

/// Whether loopd has named a user, or its error has another reason: see [`loopd_common::busy`].
fn names_users(message: &str) -> bool {
    !message.contains(OPENED) && !message.contains(CLAIMED)
}

/// The lines below the error. `is_explained`: loopd has named users.
fn lines(found: &SearchResult, is_explained: bool, device: &str) -> Vec<String> {
    let users = &found.users;
    let mut lines: Vec<String> = users.iter().take(MOST).map(ToString::to_string).collect();
    if let Some(more @ 1..) = users.len().checked_sub(MOST) {
        lines.push(format!("and {more} more"));
    }
    if !found.is_complete {
        lines.push(format!("the search for processes that use {device} did not end in time"));
    } else if users.is_empty() && !is_explained {
        lines.push(unseen(device, found.has_hidden));
    }
    lines
}

fn unseen(device: &str, has_hidden: bool) -> String {
    let root = if geteuid().is_root() { "" } else { "; run this as root to see which" };
    if has_hidden {
        format!(
            "{device} is open in a process that is not visible to you, probably one of another user{root}"
        )
    } else {
        format!(
            "no process that is visible here has {device} open: it may have closed it since, or run in another pid \
             namespace{root}"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::device_user::{DeviceUser, How};

    fn found(processes: u32, has_hidden: bool) -> SearchResult {
        let user = |pid| DeviceUser::Process {
            node: "/dev/loop3".to_owned(),
            how: How::Open,
            process: Process { pid },
            name: "vim".to_owned(),
        };
        SearchResult { users: (1..=processes).map(user).collect(), has_hidden, is_complete: true }
    }

    #[test]
    fn the_list_is_bounded() {
        let shown = lines(&found(11, false), false, "/dev/loop3");
        assert_eq!((shown.len(), shown[MOST].as_str()), (MOST + 1, "and 3 more"));
        assert_eq!(lines(&found(8, false), false, "/dev/loop3").len(), MOST);
    }

    #[test]
    fn users_that_loopd_cannot_name_are_recognized() {
        let busy = |users: &str| format!("cannot detach /dev/loop3 (/x.img): {users}; end that first");
        assert!(!names_users(&busy("it is opened by a process")));
        assert!(!names_users(&busy("it is claimed by swap, by a file system, or by another program")));
        assert!(names_users(&busy("it is mounted on /mnt")));
        assert!(names_users(&busy("another operation is in progress on it")));
    }

    #[test]
    fn users_that_cannot_be_seen_are_mentioned() {
        let text = |found: &SearchResult, is_explained| lines(found, is_explained, "/dev/loop3").join("\n");
        let hidden = text(&found(0, true), false);
        assert!(hidden.starts_with("/dev/loop3 is open in a process that is not visible to you"), "{hidden}");
        let none = text(&found(0, false), false);
        assert!(none.starts_with("no process that is visible here has /dev/loop3 open"), "{none}");
        assert_eq!(text(&found(0, true), true), "");
        assert_eq!(text(&found(1, true), false), "/dev/loop3 is open in vim (process 1)");
        assert!(text(&SearchResult::default(), true).contains("did not end in time"));
    }
}
