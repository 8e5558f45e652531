//! Formats of disk images that are not raw: their bytes are not those of the disk.

/// A format that a file's signature shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// Compressed by gzip.
    Gzip,
    /// Compressed by xz.
    Xz,
    /// Compressed by zstd.
    Zstd,
    /// Compressed by bzip2.
    Bzip2,
    /// A zip archive.
    Zip,
    /// QEMU's format, versions 1 to 3.
    Qcow2,
    /// VMware's sparse extent.
    Vmdk,
    /// VMware's descriptor, a text that names the files with the data.
    VmdkDescriptor,
    /// Virtual PC's dynamic or differencing disk. A fixed one is raw, with a footer.
    Vhd,
    /// Hyper-V's format.
    Vhdx,
    /// VirtualBox's format.
    Vdi,
    /// Apple's format.
    Dmg,
    /// A sparse image of Android's fastboot.
    AndroidSparse,
    /// Sectors of a CD with their headers and checksums, 2352 bytes each.
    CdSectors,
}

impl ImageFormat {
    /// All formats.
    pub const ALL: [Self; 14] = [
        Self::Gzip,
        Self::Xz,
        Self::Zstd,
        Self::Bzip2,
        Self::Zip,
        Self::Qcow2,
        Self::Vmdk,
        Self::VmdkDescriptor,
        Self::Vhd,
        Self::Vhdx,
        Self::Vdi,
        Self::Dmg,
        Self::AndroidSparse,
        Self::CdSectors,
    ];

    /// Its name on the bus and in state files.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Xz => "xz",
            Self::Zstd => "zstd",
            Self::Bzip2 => "bzip2",
            Self::Zip => "zip",
            Self::Qcow2 => "qcow2",
            Self::Vmdk => "vmdk",
            Self::VmdkDescriptor => "vmdk-descriptor",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
            Self::Vdi => "vdi",
            Self::Dmg => "dmg",
            Self::AndroidSparse => "android-sparse",
            Self::CdSectors => "cd-sectors",
        }
    }

    /// The format with this name.
    #[must_use]
    pub fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|format| format.as_str() == name)
    }

    /// What it is, for a message.
    pub(super) const fn description(self) -> &'static str {
        match self {
            Self::Gzip => "a gzip-compressed file",
            Self::Xz => "an xz-compressed file",
            Self::Zstd => "a zstd-compressed file",
            Self::Bzip2 => "a bzip2-compressed file",
            Self::Zip => "a zip archive",
            Self::Qcow2 => "a qcow2 image",
            Self::Vmdk => "a VMDK image",
            Self::VmdkDescriptor => {
                "the descriptor of a VMDK image, a text that names the files with the data"
            }
            Self::Vhd => "a dynamic VHD image",
            Self::Vhdx => "a VHDX image",
            Self::Vdi => "a VDI image",
            Self::Dmg => "an Apple DMG image",
            Self::AndroidSparse => "an Android sparse image",
            Self::CdSectors => "an image of CD sectors of 2352 bytes",
        }
    }

    /// How to make a raw image of it, for a message.
    pub(super) const fn remedy(self) -> &'static str {
        match self {
            Self::Gzip => "decompress it first, for example with gunzip",
            Self::Xz => "decompress it first, for example with unxz",
            Self::Zstd => "decompress it first, for example with unzstd",
            Self::Bzip2 => "decompress it first, for example with bunzip2",
            Self::Zip => "extract the image first, for example with unzip",
            Self::Qcow2
            | Self::Vmdk
            | Self::VmdkDescriptor
            | Self::Vhd
            | Self::Vhdx
            | Self::Vdi
            | Self::Dmg => "convert it to raw first, for example with qemu-img convert -O raw",
            Self::AndroidSparse => "convert it to raw first, for example with simg2img",
            Self::CdSectors => "convert it to sectors of 2048 bytes first, for example with bchunk",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_parsed_back() {
        for format in ImageFormat::ALL {
            assert_eq!(ImageFormat::named(format.as_str()), Some(format));
        }
        assert_eq!(ImageFormat::named("raw"), None);
    }
}
