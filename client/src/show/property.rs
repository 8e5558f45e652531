//! Properties of attachments as text for people.

use std::time::{Duration, UNIX_EPOCH};

use loopd_dbus::VolumeProperties;
use loopd_dbus::properties::{NO_OWNER, from_bus_path};

use crate::bus::attachment::{AttachmentInfo, FileState};
use crate::message::escaped;

/// Stands for an empty value, so that each line of a table has the same number of fields.
pub const NOTHING: &str = "-";

/// udev's `ID_FS_USAGE` of an encrypted volume.
pub const CRYPTO: &str = "crypto";

/// How a volume is encrypted, as `Unlock` calls it: from udev's `ID_FS_TYPE`, which is returned if loopd cannot unlock it.
#[must_use]
pub fn encryption_type(filesystem_type: &str) -> &str {
    match filesystem_type {
        "crypto_LUKS" => "luks",
        "BitLocker" => "bitlocker",
        other => other,
    }
}

/// `yes` or `no`.
#[must_use]
pub fn yes_no(value: bool) -> String {
    if value { "yes" } else { "no" }.to_owned()
}

/// A text with control characters escaped; - if it is empty.
#[must_use]
pub fn text(value: &str) -> String {
    if value.is_empty() { NOTHING.to_owned() } else { escaped(value.as_bytes()) }
}

/// The path of the backing file.
#[must_use]
pub fn file(info: &AttachmentInfo) -> String {
    path(&info.attachment.backing_file)
}

/// What has become of the backing file.
#[must_use]
pub fn file_state(info: &AttachmentInfo) -> String {
    info.file_state.map_or(NOTHING, FileState::as_str).to_owned()
}

/// The mount points, separated by commas.
#[must_use]
pub fn mount_points(volume: &VolumeProperties) -> String {
    let points: Vec<String> = volume.mount_points.iter().map(|bytes| path(bytes)).collect();
    if points.is_empty() { NOTHING.to_owned() } else { points.join(",") }
}

/// The owner's uid.
#[must_use]
pub fn owner(info: &AttachmentInfo) -> String {
    match info.attachment.owner {
        NO_OWNER => NOTHING.to_owned(),
        uid => uid.to_string(),
    }
}

/// The time of the attach, in UTC.
#[must_use]
pub fn since(info: &AttachmentInfo) -> String {
    time_or_nothing(info.attachment.since)
}

/// Microseconds since 1970 as date and time; - for 0.
#[must_use]
pub fn time_or_nothing(microseconds: u64) -> String {
    match microseconds {
        0 => NOTHING.to_owned(),
        microseconds => time(microseconds),
    }
}

/// Formats microseconds since 1970 as date and time in UTC (RFC 3339).
#[must_use]
pub fn time(microseconds: u64) -> String {
    /// The last second of the year 9999, the largest that RFC 3339 can express.
    const LAST: u64 = 253_402_300_799;
    let seconds = (microseconds / 1_000_000).min(LAST);
    humantime::format_rfc3339_seconds(UNIX_EPOCH + Duration::from_secs(seconds)).to_string()
}

fn path(bytes: &[u8]) -> String {
    let bytes = from_bus_path(bytes);
    if bytes.is_empty() { NOTHING.to_owned() } else { escaped(bytes) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_utc_and_end_with_the_year_9999() {
        assert_eq!(time(1_700_000_000_999_999), "2023-11-14T22:13:20Z");
        assert_eq!(time(u64::MAX), "9999-12-31T23:59:59Z");
    }
}
