//! The objects below loopd's root, read with one call of its `ObjectManager`.

use std::collections::HashMap;

use loopd_dbus::names::{ROOT_PATH, disk_sequence_of};
use zbus::message::Sequence;
use zbus::wire::OwnedObjectPath;
use zbus::{Connection, OwnedVariant};

use crate::device_node::decimal;

/// Property values by name.
pub type Properties = HashMap<String, OwnedVariant>;
/// The properties of each interface of an object.
pub type Interfaces = HashMap<String, Properties>;
/// Objects by path.
pub type Objects = HashMap<String, Interfaces>;

const OBJECT_MANAGER: &str = "org.freedesktop.DBus.ObjectManager";

/// Returns every object of the daemon with this bus name, and the position of the reply among the
/// received messages.
///
/// # Errors
/// The call failed.
pub async fn managed_objects(
    connection: &Connection,
    destination: &str,
) -> zbus::Result<(Sequence, Objects)> {
    let reply = connection
        .call_method(Some(destination), ROOT_PATH, Some(OBJECT_MANAGER), "GetManagedObjects", &())
        .await?;
    let objects: HashMap<OwnedObjectPath, Interfaces> = reply.body().deserialize()?;
    let objects = objects.into_iter().map(|(path, interfaces)| (path.to_string(), interfaces)).collect();
    Ok((reply.recv_position(), objects))
}

/// Splits an object path into the disk sequence and, for a partition, its number. `None` for any other
/// object.
#[must_use]
pub fn parse_path(path: &str) -> Option<(u64, Option<u32>)> {
    match path.rsplit_once("/p") {
        Some((attachment, digits)) => Some((disk_sequence_of(attachment)?, Some(decimal(digits)?))),
        None => Some((disk_sequence_of(path)?, None)),
    }
}

/// The path of the volume whose cleartext has this path; `None` for any other object.
#[must_use]
pub fn volume_of_cleartext(path: &str) -> Option<&str> {
    path.strip_suffix("/cleartext").filter(|volume| parse_path(volume).is_some())
}

#[cfg(test)]
mod tests {
    use loopd_dbus::names::{attachment_path, partition_path};

    use super::*;

    #[test]
    fn paths_of_attachments_and_partitions_are_parsed() {
        assert_eq!(parse_path(attachment_path(7).as_str()), Some((7, None)));
        assert_eq!(parse_path(partition_path(7, 128).as_str()), Some((7, Some(128))));
    }

    #[test]
    fn a_cleartext_is_below_its_volume() {
        for volume in [attachment_path(7), partition_path(7, 1)] {
            let cleartext = format!("{volume}/cleartext");
            assert_eq!(volume_of_cleartext(&cleartext), Some(volume.as_str()));
            assert_eq!((parse_path(&cleartext), volume_of_cleartext(&volume)), (None, None));
        }
        assert_eq!(volume_of_cleartext("/org/loopd1/attachment/7/cleartext/cleartext"), None);
    }

    #[test]
    fn other_paths_are_rejected() {
        for other in [
            "/org/loopd1",
            "/org/loopd1/p1",
            "/org/loopd1/attachment/7/p",
            "/p1",
            "/org/loopd1/attachment/7/p01",
            "/org/loopd1/attachment/7/p1/p2",
        ] {
            assert_eq!(parse_path(other), None, "{other}");
        }
    }
}
