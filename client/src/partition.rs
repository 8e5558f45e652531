//! The partitions of attached devices.

use loopd_dbus::names::{BUS_NAME, PARTITION, VOLUME};
use loopd_dbus::{PartitionProperties, VolumeProperties};
use zbus::Connection;
use zbus::wire::OwnedObjectPath;

use crate::connection::explain;
use crate::objects::{Interfaces, Objects, managed_objects, place};
use crate::target::Attached;

/// A partition as loopd shows it.
#[derive(Clone, Debug)]
pub struct Partition {
    /// Its object on the bus.
    pub path: OwnedObjectPath,
    /// `org.loopd1.Partition`.
    pub partition: PartitionProperties,
    /// `org.loopd1.Volume`.
    pub volume: VolumeProperties,
}

/// Gives each attachment its partitions: one call for all of them.
///
/// # Errors
/// loopd could not be asked.
pub async fn add(connection: &Connection, attached: &mut [Attached]) -> anyhow::Result<()> {
    if attached.is_empty() {
        return Ok(());
    }
    let (_, objects) = managed_objects(connection, BUS_NAME).await.map_err(explain)?;
    join(attached, &objects).map_err(explain)
}

/// Puts each partition to the attachment that it belongs to, by number; one whose attachment was not
/// asked for is left out.
///
/// # Errors
/// A property is missing, or has another type.
pub fn join(attached: &mut [Attached], objects: &Objects) -> zbus::Result<()> {
    for (path, interfaces) in objects {
        if !matches!(place(path), Some((_, Some(_)))) {
            continue;
        }
        if let Some(partition) = read(path, interfaces)?
            && let Some(disk) = attached.iter_mut().find(|disk| disk.path == partition.partition.attachment)
        {
            disk.partitions.push(partition);
        }
    }
    for disk in attached {
        disk.partitions.sort_by_key(|partition| partition.partition.number);
    }
    Ok(())
}

/// `None` where one of the interfaces is not there: the object is just coming, or just going.
fn read(path: &str, interfaces: &Interfaces) -> zbus::Result<Option<Partition>> {
    let (Some(partition), Some(volume)) = (interfaces.get(PARTITION), interfaces.get(VOLUME)) else {
        return Ok(None);
    };
    Ok(Some(Partition {
        path: OwnedObjectPath::try_from(path)?,
        partition: PartitionProperties::from_dict(partition)?,
        volume: VolumeProperties::from_dict(volume)?,
    }))
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::HashMap;

    use loopd_dbus::names::{ATTACHMENT, attachment_path, partition_path};
    use zbus::Variant;

    use super::*;
    use crate::objects::Properties;
    use crate::output::json::tests::{example, partition};

    /// Properties as they arrive.
    pub(crate) fn received(dict: HashMap<&'static str, Variant<'static>>) -> Properties {
        dict.into_iter().map(|(name, value)| (name.to_owned(), value.try_into_owned().unwrap())).collect()
    }

    /// The object of a partition with both of its interfaces.
    fn object(partition: &Partition) -> (String, Interfaces) {
        let interfaces = Interfaces::from([
            (PARTITION.to_owned(), received(partition.partition.to_dict())),
            (VOLUME.to_owned(), received(partition.volume.to_dict())),
        ]);
        (partition.path.to_string(), interfaces)
    }

    fn numbers(attached: &Attached) -> Vec<u32> {
        attached.partitions.iter().map(|partition| partition.partition.number).collect()
    }

    #[test]
    fn partitions_join_their_device_by_number() {
        let mut all = [example(), example()];
        all[1].path = attachment_path(13).into();
        all.iter_mut().for_each(|attached| attached.partitions.clear());
        let places = [(12, 10), (13, 1), (12, 2), (12, 1), (14, 1)];
        let mut objects: Objects =
            places.map(|(sequence, number)| object(&partition(sequence, number))).into();
        let whole = Interfaces::from([(ATTACHMENT.to_owned(), received(all[0].attachment.to_dict()))]);
        objects.insert(all[0].path.to_string(), whole);
        objects.insert("/org/loopd1".to_owned(), Interfaces::new());
        join(&mut all, &objects).unwrap();
        assert_eq!((numbers(&all[0]), numbers(&all[1])), (vec![1, 2, 10], vec![1]));
        assert_eq!(all[0].partitions[0].path, partition_path(12, 1).into());
        assert_eq!(all[0].partitions[0].volume.device, "/dev/loop0p1");
    }

    #[test]
    fn a_partition_that_is_coming_or_going_is_left_out() {
        for missing in [PARTITION, VOLUME] {
            let mut attached = [Attached { partitions: Vec::new(), ..example() }];
            let (path, mut interfaces) = object(&partition(12, 1));
            interfaces.remove(missing);
            join(&mut attached, &Objects::from([(path, interfaces)])).unwrap();
            assert_eq!(numbers(&attached[0]), [0; 0], "{missing}");
        }
    }

    #[test]
    fn a_daemon_that_says_too_little_is_an_error() {
        let (path, mut interfaces) = object(&partition(12, 1));
        interfaces.insert(PARTITION.to_owned(), Properties::new());
        assert!(join(&mut [example()], &Objects::from([(path, interfaces)])).is_err());
    }
}
