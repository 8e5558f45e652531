//! The objects below loopd's root, as its `ObjectManager` tells them in one call.

use std::collections::HashMap;

use loopd_dbus::names::{ROOT_PATH, disk_sequence_of};
use zbus::message::Sequence;
use zbus::wire::OwnedObjectPath;
use zbus::{Connection, OwnedVariant};

use crate::target::decimal;

/// Properties as they are sent, by name.
pub type Properties = HashMap<String, OwnedVariant>;
/// The properties of each interface of an object.
pub type Interfaces = HashMap<String, Properties>;
/// Objects by their path.
pub type Objects = HashMap<String, Interfaces>;

const OBJECT_MANAGER: &str = "org.freedesktop.DBus.ObjectManager";

/// Every object of the daemon that has this bus name, and when the reply came.
///
/// # Errors
/// The bus or the daemon failed.
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

/// Where an object stands: the disk sequence in its path, and the number of the partition where it is
/// one. `None` for any other object.
#[must_use]
pub fn place(path: &str) -> Option<(u64, Option<u32>)> {
    match path.rsplit_once("/p") {
        Some((attachment, digits)) => Some((disk_sequence_of(attachment)?, Some(decimal(digits)?))),
        None => Some((disk_sequence_of(path)?, None)),
    }
}

#[cfg(test)]
mod tests {
    use loopd_dbus::names::{attachment_path, partition_path};

    use super::*;

    #[test]
    fn paths_are_told_apart() {
        assert_eq!(place(attachment_path(7).as_str()), Some((7, None)));
        assert_eq!(place(partition_path(7, 128).as_str()), Some((7, Some(128))));
        for other in ["/org/loopd1", "/org/loopd1/p1", "/org/loopd1/attachment/7/p", "/p1"] {
            assert_eq!(place(other), None, "{other}");
        }
        assert_eq!(place("/org/loopd1/attachment/7/p01"), None);
        assert_eq!(place("/org/loopd1/attachment/7/p1/p2"), None);
    }
}
