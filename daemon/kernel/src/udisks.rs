//! The user for whom UDisks2 has set up a loop device: that user can make UDisks2 detach it without
//! authentication.
//!
//! The record of UDisks2 is `/run/udisks2/loop`, which outlives the daemon: a serialised GVariant of the type
//! `a{sa{sv}}`, by device node, with a `setup-by-uid` of the type `u` (`udisksstate.c`).

use std::io::ErrorKind;

use loopd_engine::Error;
use loopd_engine::kernel::node;

const RECORD: &str = "/run/udisks2/loop";
/// More than UDisks2 writes for all loop devices that can exist.
const LONGEST: u64 = 16 << 20;

fn reading() -> String {
    format!("read UDisks2's record {RECORD}")
}

fn unreadable(source: std::io::Error) -> Error {
    Error::Io { operation: reading(), source }
}

fn not_understood() -> Error {
    Error::Failed { operation: reading(), reason: "its format is not understood".to_owned() }
}

/// The user that UDisks2 has set the device up for; `None` if it has not set it up.
///
/// # Errors
/// The record cannot be read or understood.
pub fn set_up_for(number: u32) -> Result<Option<u32>, Error> {
    let record = match read() {
        Ok(record) => record,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(unreadable(error)),
    };
    set_up_by(&record, &node(number)).ok_or_else(not_understood)
}

fn read() -> std::io::Result<Vec<u8>> {
    if std::fs::metadata(RECORD)?.len() > LONGEST {
        return Err(std::io::Error::from(ErrorKind::FileTooLarge));
    }
    std::fs::read(RECORD)
}

/// `None` if the record is not understood. An entry without a user counts as root's, as for UDisks2.
fn set_up_by(record: &[u8], device: &str) -> Option<Option<u32>> {
    for entry in elements(record)? {
        let (key, details) = entry_of(entry)?;
        if key == device.as_bytes() {
            return user(details).map(Some);
        }
    }
    Some(None)
}

fn user(details: &[u8]) -> Option<u32> {
    for entry in elements(details)? {
        let (key, value) = entry_of(entry)?;
        if key == b"setup-by-uid" {
            return Some(u32::from_ne_bytes(value.strip_suffix(b"\0u")?.try_into().ok()?));
        }
    }
    Some(0)
}

/// The elements of an array whose elements have no fixed size and are aligned to 8 bytes. The offsets of their
/// ends follow them.
fn elements(array: &[u8]) -> Option<Vec<&[u8]>> {
    if array.is_empty() {
        return Some(Vec::new());
    }
    let size = offset_size(array.len());
    let end_of_last = offset_at(array, array.len().checked_sub(size)?, size)?;
    let offsets = array.get(end_of_last..)?;
    if offsets.is_empty() || offsets.len() % size != 0 {
        return None;
    }
    let mut start = 0;
    let ends = offsets.chunks_exact(size).map(|bytes| offset_at(bytes, 0, size));
    ends.map(|end| {
        let element = array.get(start..end?)?;
        start = end?.next_multiple_of(8);
        Some(element)
    })
    .collect()
}

/// Key and value of an entry whose key is a string. The offset of the end of the key follows them.
fn entry_of(entry: &[u8]) -> Option<(&[u8], &[u8])> {
    let size = offset_size(entry.len());
    let offset = entry.len().checked_sub(size)?;
    let end = offset_at(entry, offset, size)?;
    let key = entry.get(..end)?.strip_suffix(b"\0")?;
    Some((key, entry.get(end.next_multiple_of(8)..offset)?))
}

/// The size of an offset, in bytes, in a container of this length.
fn offset_size(length: usize) -> usize {
    match length {
        0..=0xff => 1,
        0x100..=0xffff => 2,
        0x1_0000..=0xffff_ffff => 4,
        _ => 8,
    }
}

fn offset_at(bytes: &[u8], start: usize, size: usize) -> Option<usize> {
    let offset = bytes.get(start..start + size)?;
    // Offsets are little-endian on every machine.
    let mut whole = [0; 8];
    whole[..size].copy_from_slice(offset);
    usize::try_from(u64::from_le_bytes(whole)).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array(elements: &[Vec<u8>]) -> Vec<u8> {
        let (mut bytes, mut ends) = (Vec::new(), Vec::new());
        for element in elements {
            bytes.resize(bytes.len().next_multiple_of(8), 0);
            bytes.extend(element);
            ends.push(bytes.len());
        }
        let size =
            [1, 2, 4, 8].into_iter().find(|size| offset_size(bytes.len() + ends.len() * size) == *size);
        ends.iter().for_each(|end| bytes.extend(&end.to_le_bytes()[..size.unwrap()]));
        bytes
    }

    fn entry(key: &str, value: &[u8]) -> Vec<u8> {
        let mut bytes = [key.as_bytes(), b"\0"].concat();
        let end = bytes.len();
        bytes.resize(end.next_multiple_of(8), 0);
        bytes.extend(value);
        let size = [1, 2, 4, 8].into_iter().find(|size| offset_size(bytes.len() + size) == *size).unwrap();
        bytes.extend(&end.to_le_bytes()[..size]);
        bytes
    }

    fn record(devices: &[(&str, u32)]) -> Vec<u8> {
        let of_device = |(device, uid): &(&str, u32)| {
            let details = array(&[
                entry("backing-file", b"/home/m/x.img\0\0ay"),
                entry("backing-file-device", &[&64_u64.to_ne_bytes()[..], b"\0t"].concat()),
                entry("setup-by-uid", &[&uid.to_ne_bytes()[..], b"\0u"].concat()),
            ]);
            entry(device, &details)
        };
        array(&devices.iter().map(of_device).collect::<Vec<_>>())
    }

    #[test]
    fn the_user_of_a_device_is_read() {
        let devices = [("/dev/loop1", 1000), ("/dev/loop10", 1001), ("/dev/loop2", 0)];
        let record = record(&devices);
        for (device, uid) in devices {
            assert_eq!(set_up_by(&record, device), Some(Some(uid)));
        }
        assert_eq!(set_up_by(&record, "/dev/loop"), Some(None));
        assert_eq!(set_up_by(b"", "/dev/loop1"), Some(None), "no device at all");
        let many: Vec<String> = (0..3000).map(|number| format!("/dev/loop{number}")).collect();
        let many: Vec<(&str, u32)> = many.iter().zip(5..).map(|(name, uid)| (name.as_str(), uid)).collect();
        assert_eq!(set_up_by(&self::record(&many), "/dev/loop2999"), Some(Some(3004)));
    }

    /// What GLib serialises for `{'/dev/loop3': {…, 'setup-by-uid': <uint32 1000>}, '/dev/loop12': {…, <uint32 0>}}`
    /// on a little-endian machine.
    #[cfg(target_endian = "little")]
    #[test]
    fn a_record_that_glib_has_written_is_read() {
        let record =
            b"/dev/loop3\x00\x00\x00\x00\x00\x00backing-file\x00\x00\x00\x00/home/m/x.img\x00\x00ay\x0d\x00\
          \x00\x00\x00\x00\x00backing-file-device\x00\x00\x00\x00\x00@\x00\x00\x00\x00\x00\x00\x00\x00t\
          \x14\x00\x00\x00\x00\x00setup-by-uid\x00\x00\x00\x00\xe8\x03\x00\x00\x00u\x0d\x22Kg\x0b\x00\x00\
          \x00\x00\x00/dev/loop12\x00\x00\x00\x00\x00backing-file\x00\x00\x00\x00/srv/y.img\x00\x00ay\x0d\
          \x00backing-file-device\x00\x00\x00\x00\x00@\x00\x00\x00\x00\x00\x00\x00\x00t\x14\x00\x00\x00\
          \x00\x00setup-by-uid\x00\x00\x00\x00\x00\x00\x00\x00\x00u\x0d\x1fC_\x0c{\xf3";
        let found = ["/dev/loop3", "/dev/loop12", "/dev/loop1"].map(|device| set_up_by(record, device));
        assert_eq!(found, [Some(Some(1000)), Some(Some(0)), Some(None)]);
    }

    #[test]
    fn a_damaged_record_is_never_taken_for_a_missing_entry() {
        let whole = record(&[("/dev/loop1", 1000)]);
        for length in 1..whole.len() {
            assert_ne!(set_up_by(&whole[..length], "/dev/loop1"), Some(None), "{length} bytes");
        }
        let odd = array(&[entry("/dev/loop1", &array(&[entry("setup-by-uid", b"1000\0\0s")]))]);
        assert_eq!(set_up_by(&odd, "/dev/loop1"), None);
        bolero::check!().with_type::<Vec<u8>>().for_each(|bytes| {
            let _any = set_up_by(bytes, "/dev/loop1");
        });
    }
}
