//! Recognizes images that are not raw by the signature at their start or their end. Compares bytes at fixed offsets;
//! no field is interpreted further.

use loopd_engine::kernel::ImageFormat;

use loopd_common::little_endian::bytes;

/// A signature: an offset, the bytes there, and the format that they show.
type Signature = (usize, &'static [u8], ImageFormat);

const SIGNATURES: [Signature; 12] = [
    (0, b"\xfd7zXZ\0", ImageFormat::Xz),
    (0, b"\x28\xb5\x2f\xfd", ImageFormat::Zstd),
    (0, b"PK\x03\x04", ImageFormat::Zip),
    (0, b"QFI\xfb", ImageFormat::Qcow2),
    (0, b"KDMV", ImageFormat::Vmdk),
    (0, b"COWD", ImageFormat::Vmdk),
    (0, b"# Disk DescriptorFile", ImageFormat::VmdkDescriptor),
    // A dynamic disk has a copy of its footer at the start, a fixed one has not.
    (0, b"conectix", ImageFormat::Vhd),
    (0, b"vhdxfile", ImageFormat::Vhdx),
    (64, b"\x7f\x10\xda\xbe", ImageFormat::Vdi),
    (0, b"\x3a\xff\x26\xed", ImageFormat::AndroidSparse),
    (0, b"\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\0", ImageFormat::CdSectors),
];

/// The format that the first bytes show; 512 are enough.
pub fn of_start(start: &[u8]) -> Option<ImageFormat> {
    let has =
        |offset: usize, signature: &[u8]| start.get(offset..).is_some_and(|rest| rest.starts_with(signature));
    let found = SIGNATURES.iter().find(|(offset, signature, _)| has(*offset, signature));
    found.map(|(.., format)| *format).or_else(|| gzip(start)).or_else(|| bzip2(start))
}

/// Two bytes are few: the method is always 8, and three flags are reserved (RFC 1952, 2.3.1).
fn gzip(start: &[u8]) -> Option<ImageFormat> {
    let [one, two, method, flags] = bytes(start, 0)?;
    ([one, two, method] == [0x1f, 0x8b, 8] && flags & 0xe0 == 0).then_some(ImageFormat::Gzip)
}

/// `BZh`, a digit, and the start of a block or of the end.
fn bzip2(start: &[u8]) -> Option<ImageFormat> {
    let level: [u8; 4] = bytes(start, 0)?;
    let block: [u8; 6] = bytes(start, 4)?;
    let is_block = block == *b"\x31\x41\x59\x26\x53\x59" || block == *b"\x17\x72\x45\x38\x50\x90";
    (level.starts_with(b"BZh") && (b'1'..=b'9').contains(&level[3]) && is_block).then_some(ImageFormat::Bzip2)
}

/// The format that the last 512 bytes show: DMG has a trailer. The footer of a fixed VHD is ignored: the
/// bytes before it are raw.
pub fn of_end(end: &[u8]) -> Option<ImageFormat> {
    // The signature, version 4 and the length of the trailer, big-endian.
    end.starts_with(b"koly\0\0\0\x04\0\0\x02\0").then_some(ImageFormat::Dmg)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn start(offset: usize, signature: &[u8]) -> Vec<u8> {
        let mut bytes = vec![0; 512];
        bytes[offset..offset + signature.len()].copy_from_slice(signature);
        bytes
    }

    #[test]
    fn formats_are_recognized_by_their_start() {
        for (offset, signature, format) in [
            (0, &b"\xfd7zXZ\0\0\x04"[..], ImageFormat::Xz),
            (0, b"\x1f\x8b\x08\0", ImageFormat::Gzip),
            (0, b"\x1f\x8b\x08\x18", ImageFormat::Gzip),
            (0, b"\x28\xb5\x2f\xfd\x24", ImageFormat::Zstd),
            (0, b"BZh91AY&SY", ImageFormat::Bzip2),
            (0, b"BZh1\x17\x72\x45\x38\x50\x90", ImageFormat::Bzip2),
            (0, b"QFI\xfb\0\0\0\x03", ImageFormat::Qcow2),
            (0, b"QFI\xfb\0\0\0\x02", ImageFormat::Qcow2),
            (0, b"KDMV\x01\0\0\0", ImageFormat::Vmdk),
            (0, b"COWD", ImageFormat::Vmdk),
            (0, b"# Disk DescriptorFile\nversion=1", ImageFormat::VmdkDescriptor),
            (0, b"conectix", ImageFormat::Vhd),
            (0, b"vhdxfile", ImageFormat::Vhdx),
            (64, b"\x7f\x10\xda\xbe", ImageFormat::Vdi),
            (0, b"\x3a\xff\x26\xed\x01\0", ImageFormat::AndroidSparse),
            (0, b"\0\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\0\0\x02\0\x01", ImageFormat::CdSectors),
            (0, b"PK\x03\x04\x14", ImageFormat::Zip),
        ] {
            assert_eq!(of_start(&start(offset, signature)), Some(format), "{format:?}");
            let short = &signature[..signature.len().min(3)];
            assert_eq!(of_start(short), None, "{format:?} cut short");
        }
    }

    #[test]
    fn raw_images_have_no_format() {
        for signature in [
            &b""[..],
            b"LUKS\xba\xbe\0\x02",
            b"hsqs",
            b"XFSB",
            b"\xeb\x58\x90mkfs.fat",
            b"\x1f\x8b\x08\xe0",
            b"\x1f\x8b\x09\0",
            b"BZh0\x31AY&SY",
            b"BZh9 a text",
            b"PK\x05\x06",
            b"# Disk",
        ] {
            assert_eq!(of_start(&start(0, signature)), None, "{signature:?}");
        }
        assert_eq!(of_start(&[]), None);
    }

    #[test]
    fn a_dmg_is_recognized_by_its_trailer_and_a_fixed_vhd_is_raw() {
        assert_eq!(of_end(&start(0, b"koly\0\0\0\x04\0\0\x02\0")), Some(ImageFormat::Dmg));
        for other in [&b"koly\0\0\0\x03\0\0\x02\0"[..], b"koly", b"conectix\0\0\0\x02"] {
            assert_eq!(of_end(&start(0, other)), None);
        }
        assert_eq!((of_end(b"koly"), of_end(&[])), (None, None));
    }
}
