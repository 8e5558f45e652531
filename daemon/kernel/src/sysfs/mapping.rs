//! Mappings of the device mapper in sysfs.

use std::io;

use loopd_common::EncryptionType;
use loopd_engine::Mapping;
use loopd_engine::kernel::DiskSequence;

use super::block::Block;

/// How `dm/uuid` starts, and the type that it means. VeraCrypt and TrueCrypt have the same one.
const PREFIXES: [(&[u8], EncryptionType); 4] = [
    (b"CRYPT-LUKS1-", EncryptionType::Luks),
    (b"CRYPT-LUKS2-", EncryptionType::Luks),
    (b"CRYPT-BITLK-", EncryptionType::BitLocker),
    (b"CRYPT-TCRYPT-", EncryptionType::VeraCrypt),
];

/// The cleartexts of a disk (`None`) and of its partitions.
///
/// # Errors
/// sysfs cannot be read.
pub fn cleartexts(disk: &Block) -> io::Result<Vec<(Option<u32>, Mapping)>> {
    let mut found = Vec::new();
    for volume in disk.with_partitions()? {
        let partition = volume.value("partition");
        for holder in volume.holders()? {
            found.extend(cleartext(&holder)?.map(|mapping| (partition, mapping)));
        }
    }
    Ok(found)
}

/// The cleartext that is or is on this device; `None` if it is none, or is gone.
fn cleartext(block: &Block) -> io::Result<Option<Mapping>> {
    let Some(mapping) = read(block)? else { return Ok(None) };
    if !is_lower_layer(&mapping) {
        return Ok(Some(mapping));
    }
    for holder in block.holders()? {
        if let Some(above) = cleartext(&holder)? {
            return Ok(Some(above));
        }
    }
    Ok(None)
}

/// Whether it is a layer of a cascade of ciphers: `NAME` is on `NAME_1`, which is on `NAME_2`
/// (`TCRYPT_activate` in cryptsetup).
fn is_lower_layer(mapping: &Mapping) -> bool {
    mapping.kind == EncryptionType::VeraCrypt && ["_1", "_2"].iter().any(|end| mapping.name.ends_with(end))
}

fn read(block: &Block) -> io::Result<Option<Mapping>> {
    let number = block.file_name().and_then(|name| name.strip_prefix("dm-")?.parse().ok());
    let (Some(number), Some(uuid), Some(name)) = (number, block.bytes("dm/uuid"), block.bytes("dm/name"))
    else {
        return Ok(None);
    };
    let kind = PREFIXES.iter().find(|(prefix, _)| uuid.starts_with(prefix)).map(|(_, kind)| *kind);
    let (Some(kind), Some(device_number), Some(disk_sequence), Some(size)) =
        (kind, block.number()?, block.read_value("diskseq")?, block.size())
    else {
        return Ok(None);
    };
    Ok(Some(Mapping {
        number,
        device_number,
        disk_sequence: DiskSequence(disk_sequence),
        name: String::from_utf8_lossy(&name).into_owned(),
        kind,
        size,
        read_only: block.is_read_only(),
    }))
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;
    use std::path::Path;

    use super::*;
    use crate::test_descriptors::without_descriptors;

    /// A block device in sysfs, with the devices that are stacked on it.
    fn device(directory: &Path, attributes: &[(&str, &str)], above: &[&Path]) {
        fs::create_dir_all(directory.join("holders")).unwrap();
        for (name, value) in attributes {
            let path = directory.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, format!("{value}\n")).unwrap();
        }
        for holder in above {
            symlink(holder, directory.join("holders").join(holder.file_name().unwrap())).unwrap();
        }
    }

    fn mapping(directory: &Path, minor: u32, name: &str, uuid: &str, above: &[&Path]) {
        let (number, sequence) = (format!("253:{minor}"), format!("{}", 40 + minor));
        let attributes = [
            ("dev", number.as_str()),
            ("diskseq", &sequence),
            ("size", "2048"),
            ("ro", if minor == 1 { "1" } else { "0" }),
            ("dm/name", name),
            ("dm/uuid", uuid),
        ];
        device(directory, &attributes, above);
    }

    #[test]
    fn cleartexts_of_a_disk_and_of_its_partitions_are_found() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        mapping(&path("dm-0"), 0, "loopd-11", "CRYPT-LUKS2-0123-loopd-11", &[]);
        mapping(&path("dm-1"), 1, "loopd-11p3", "CRYPT-BITLK-0123-loopd-11p3", &[]);
        mapping(&path("dm-2"), 2, "vg-root", "LVM-abc", &[]);
        mapping(&path("dm-3"), 3, "plain", "CRYPT-PLAIN-plain", &[]);
        device(&path("loop3"), &[], &[&path("dm-0"), &path("dm-2"), &path("dm-3")]);
        device(&path("loop3/loop3p3"), &[("partition", "3")], &[&path("dm-1")]);

        let mut found = cleartexts(&Block::at(&path("loop3"))).unwrap();
        found.sort_by_key(|(partition, _)| *partition);
        let expected = Mapping {
            number: 0,
            device_number: (253, 0),
            disk_sequence: DiskSequence(40),
            name: "loopd-11".to_owned(),
            kind: EncryptionType::Luks,
            size: 1 << 20,
            read_only: false,
        };
        assert_eq!(found[0], (None, expected));
        assert_eq!(found.len(), 2, "{found:?}");
        let (partition, second) = &found[1];
        assert_eq!((*partition, second.node().as_str()), (Some(3), "/dev/dm-1"));
        assert!(second.read_only && second.kind == EncryptionType::BitLocker);
    }

    #[test]
    fn a_cascade_of_ciphers_is_one_cleartext() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        mapping(&path("dm-6"), 6, "loopd-11", "CRYPT-TCRYPT-loopd-11", &[]);
        mapping(&path("dm-5"), 5, "loopd-11_1", "CRYPT-TCRYPT-loopd-11_1", &[&path("dm-6")]);
        mapping(&path("dm-4"), 4, "loopd-11_2", "CRYPT-TCRYPT-loopd-11_2", &[&path("dm-5")]);
        device(&path("loop3"), &[], &[&path("dm-4")]);
        let found = cleartexts(&Block::at(&path("loop3"))).unwrap();
        let [(None, top)] = &found[..] else { panic!("{found:?}") };
        assert_eq!((top.number, top.name.as_str(), top.kind), (6, "loopd-11", EncryptionType::VeraCrypt));
    }

    #[test]
    fn a_mapping_that_ends_is_left_out_and_one_that_cannot_be_read_is_not() {
        let root = tempfile::tempdir().unwrap();
        let path = |name: &str| root.path().join(name);
        device(&path("dm-0"), &[("dm/name", "loopd-11"), ("dm/uuid", "CRYPT-LUKS2-0-loopd-11")], &[]);
        device(&path("loop3"), &[], &[&path("dm-0")]);
        assert!(cleartexts(&Block::at(&path("loop3"))).unwrap().is_empty());
        assert!(without_descriptors(|| cleartexts(&Block::at(&path("loop3")))).is_err());
    }
}
