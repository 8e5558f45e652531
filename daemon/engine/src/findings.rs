//! What was found in an image besides its partitions: the source of warnings.

use loopd_common::limits::{MOST_WARNING_TEXT, MOST_WARNINGS};

use crate::device::Device;
use crate::image_format::ImageFormat;
use crate::warning::{Describer, Silence, Warning};

/// The smallest sector in bytes: the unit of a loop device's size.
const SECTOR: u64 = 512;

/// What the bytes of a device show. It is read again with the partitions.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Findings {
    /// The format of the bytes if they are not raw.
    pub format: Option<ImageFormat>,
    /// How large the image is in bytes according to its own contents: the largest description.
    pub described: Option<(Describer, u64)>,
    /// Warnings of the partition table, the most important ones first.
    pub warnings: Vec<Warning>,
}

/// What the backing file shows and the device does not, as of the last time that loopd had the file: the file ends
/// behind the last whole sector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileEnd {
    /// The bytes of the file from the offset to its end or the size limit; 0 if unknown.
    pub bytes: u64,
    /// The format that the last bytes of the file show.
    pub format: Option<ImageFormat>,
}

impl FileEnd {
    /// How many bytes follow the last sector of the device; `None` if the file is not known to be of the device's
    /// size, which may have changed since.
    fn beyond(self, device: &Device) -> Option<u64> {
        self.bytes.checked_sub(device.size).filter(|beyond| *beyond < SECTOR)
    }
}

/// The warnings of a device, the most important ones first, bounded in number and in length.
pub fn warnings(
    device: &Device,
    findings: &Findings,
    end: FileEnd,
    silence: Option<Silence>,
) -> Vec<Warning> {
    let beyond = end.beyond(device);
    let format = findings.format.or(end.format.filter(|_| beyond.is_some()));
    let (truncated, missing_tail) = missing(device, findings, beyond);
    let tail = beyond.unwrap_or(missing_tail) + device.size % u64::from(device.block_size.max(512));
    let tail =
        (tail > 0).then_some(Warning::UnreachableTail { bytes: tail, sector: device.block_size.max(512) });
    let mut all: Vec<Warning> = silence.map(Warning::UdevSilent).into_iter().collect();
    all.extend(format.map(Warning::NotRaw).into_iter().chain(truncated).chain(tail));
    all.extend(findings.warnings.iter().cloned());
    all.truncate(MOST_WARNINGS);
    let mut left = MOST_WARNING_TEXT;
    let fits = |warning: &Warning| {
        let space = left.checked_sub(warning.to_string().len());
        left = space.unwrap_or(0);
        space.is_some()
    };
    all.into_iter().take_while(fits).collect()
}

/// The warning of a truncated image, and 0. If less than a sector is missing and the end of the file is not known, the
/// file may have the rest behind the last whole sector: then no warning, and the number of missing bytes.
fn missing(device: &Device, findings: &Findings, beyond: Option<u64>) -> (Option<Warning>, u64) {
    let Some((by, described)) = findings.described else { return (None, 0) };
    let there = device.size.saturating_add(beyond.unwrap_or(0));
    match described.saturating_sub(there) {
        0 => (None, 0),
        bytes if beyond.is_none() && bytes < SECTOR => (None, bytes),
        bytes => (Some(Warning::Truncated { by, described, bytes }), 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn warnings(device: &Device, findings: &Findings, end: FileEnd) -> Vec<Warning> {
        super::warnings(device, findings, end, None)
    }

    fn device(size: u64, block_size: u32) -> Device {
        Device { size, block_size, ..Device::default() }
    }

    fn described(bytes: u64) -> Findings {
        Findings { described: Some((Describer::Ext, bytes)), ..Findings::default() }
    }

    fn file(bytes: u64) -> FileEnd {
        FileEnd { bytes, format: None }
    }

    fn tail(bytes: u64, sector: u32) -> Vec<Warning> {
        vec![Warning::UnreachableTail { bytes, sector }]
    }

    #[test]
    fn the_tail_is_what_whole_sectors_leave() {
        let none = Findings::default();
        assert_eq!(warnings(&device(999_936, 512), &none, file(1_000_001)), tail(65, 512));
        assert_eq!(warnings(&device(999_936, 512), &none, file(999_936)), []);
        assert_eq!(warnings(&device(999_936, 512), &none, file(999_937)), tail(1, 512));
        assert_eq!(warnings(&device(999_936, 512), &none, file(1_000_447)), tail(511, 512));
        assert_eq!(warnings(&device(999_936, 4096), &none, file(1_000_001)), tail(512 + 65, 4096));
    }

    #[test]
    fn the_end_of_a_file_of_another_size_is_ignored() {
        let (none, dmg) = (Findings::default(), Some(ImageFormat::Dmg));
        let end = FileEnd { bytes: 1_000_001, format: dmg };
        assert_eq!(warnings(&device(999_936, 512), &none, end)[0], Warning::NotRaw(ImageFormat::Dmg));
        for size in [999_424, 1_000_448, 2_000_384] {
            assert_eq!(warnings(&device(size, 512), &none, end), [], "{size}");
        }
        // The rest within the device is still known.
        assert_eq!(warnings(&device(999_424, 1024), &none, end), []);
        assert_eq!(warnings(&device(2_000_384, 1024), &none, end), tail(512, 1024));
    }

    #[test]
    fn missing_bytes_are_those_that_the_file_does_not_have() {
        let missing = |bytes| vec![Warning::Truncated { by: Describer::Ext, described: 4096, bytes }];
        assert_eq!(warnings(&device(1024, 512), &described(4096), file(1024)), missing(3072));
        assert_eq!(warnings(&device(4096, 512), &described(4096), file(4096)), []);
        assert_eq!(warnings(&device(8192, 512), &described(4096), file(8192)), []);
        let short = warnings(&device(3584, 512), &described(4096), file(4095));
        assert_eq!(short, [missing(1), tail(511, 512)].concat());
        assert_eq!(warnings(&device(3584, 512), &described(4000), file(4001)), tail(417, 512));
        assert_eq!(warnings(&device(1024, 512), &described(4096), FileEnd::default()), missing(3072));
        let most = warnings(&device(u64::MAX / 512 * 512, 512), &described(u64::MAX), FileEnd::default());
        assert_eq!(most, tail(511, 512));
    }

    #[test]
    fn less_than_a_sector_of_an_unknown_file_is_its_tail() {
        assert_eq!(warnings(&device(3584, 512), &described(4095), FileEnd::default()), tail(511, 512));
        assert_eq!(warnings(&device(3584, 512), &described(3584), FileEnd::default()), []);
    }

    #[test]
    fn there_are_few_and_the_most_important_come_first() {
        let not_made =
            |number| Warning::PartitionNotMade { number, reason: crate::warning::NotMade::PastEnd };
        let findings = Findings {
            format: Some(ImageFormat::Xz),
            warnings: (1..=255).map(not_made).collect(),
            ..described(1 << 20)
        };
        let all = warnings(&device(1024, 512), &findings, file(1025));
        let codes: Vec<&str> = all.iter().map(Warning::code).collect();
        assert_eq!(codes.len(), MOST_WARNINGS);
        assert_eq!(codes[..4], ["not-raw", "truncated", "unreachable-tail", "partition-not-made"]);
    }
}
