//! Makes a file system in a file, with the rights of the user.

use std::ffi::OsString;
use std::fs;
use std::io::Write;
use std::path::Path;

use nix::unistd::{getegid, geteuid};

use crate::cli::FilesystemType;
use crate::program::Program;

impl FilesystemType {
    /// The name that `Mount` and `Format` use.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Ext4 => "ext4",
            Self::Xfs => "xfs",
            Self::Btrfs => "btrfs",
            Self::Vfat => "vfat",
            Self::Exfat => "exfat",
            Self::Ntfs => "ntfs3",
        }
    }

    /// The program that makes it.
    #[must_use]
    pub const fn program(self) -> Program {
        match self {
            Self::Ext4 => Program { name: "mkfs.ext4", package: "e2fsprogs" },
            Self::Xfs => Program { name: "mkfs.xfs", package: "xfsprogs" },
            Self::Btrfs => Program { name: "mkfs.btrfs", package: "btrfs-progs" },
            Self::Vfat => Program { name: "mkfs.vfat", package: "dosfstools" },
            Self::Exfat => Program { name: "mkfs.exfat", package: "exfatprogs" },
            Self::Ntfs => Program { name: "mkfs.ntfs", package: "ntfs-3g" },
        }
    }

    /// The longest label in bytes.
    const fn longest_label(self) -> usize {
        match self {
            Self::Ext4 => 16,
            Self::Xfs => 12,
            Self::Btrfs => 255,
            Self::Vfat => 11,
            Self::Exfat => 15,
            Self::Ntfs => 128,
        }
    }

    const fn label_option(self) -> &'static str {
        match self {
            Self::Vfat => "-n",
            _ => "-L",
        }
    }

    /// Checks a label.
    ///
    /// # Errors
    /// It is too long: the programs cut such a label, or fail late.
    pub fn check_label(self, label: &str) -> anyhow::Result<()> {
        let (name, longest) = (self.as_str(), self.longest_label());
        anyhow::ensure!(
            label.len() <= longest,
            "the label has {} bytes; {name} allows at most {longest}",
            label.len()
        );
        Ok(())
    }
}

/// Makes the file system. Its top directory belongs to the user, if it has owners.
///
/// # Errors
/// The program is missing or failed.
pub async fn make(kind: FilesystemType, file: &Path, label: Option<&str>) -> anyhow::Result<()> {
    let (uid, gid) = (geteuid().as_raw(), getegid().as_raw());
    // Both belong to the user, and exist until the program has read them.
    let (mut prototype, directory) = (tempfile::NamedTempFile::new()?, tempfile::tempdir()?);
    let mut arguments: Vec<OsString> = match kind {
        FilesystemType::Ext4 => {
            vec!["-q".into(), "-F".into(), "-E".into(), format!("root_owner={uid}:{gid}").into()]
        }
        FilesystemType::Xfs => {
            // mkfs.xfs reads owner and mode of the top directory from a prototype; see mkfs.xfs(8).
            write!(prototype, "/\n0 0\nd--755 {uid} {gid}\n$\n")?;
            vec!["-q".into(), "-p".into(), prototype.path().into()]
        }
        FilesystemType::Btrfs => {
            // The top directory is a copy of this one.
            fs::set_permissions(directory.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
            vec!["-q".into(), "--rootdir".into(), directory.path().into()]
        }
        FilesystemType::Vfat | FilesystemType::Exfat => Vec::new(),
        // -F: not a block device; -f: without writing zeros everywhere.
        FilesystemType::Ntfs => vec!["-q".into(), "-F".into(), "-f".into()],
    };
    if let Some(label) = label {
        arguments.extend([kind.label_option().into(), label.into()]);
    }
    arguments.push(absolute(file)?);
    kind.program().run(&arguments, None).await
}

/// A path that no program takes for an option.
fn absolute(file: &Path) -> anyhow::Result<OsString> {
    Ok(std::path::absolute(file)?.into_os_string())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use clap::ValueEnum;

    use super::*;
    use crate::image::creation::new_file::NewFile;

    const MIB: u64 = 1 << 20;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    /// What blkid finds in the file.
    fn found(file: &Path, name: &str) -> String {
        let output =
            Command::new("blkid").args(["-p", "-o", "value", "-s", name]).arg(file).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    #[test]
    fn each_file_system_is_made_with_its_label() {
        for kind in FilesystemType::value_variants() {
            if let Err(error) = kind.program().find() {
                eprintln!("skipped: {error}");
                continue;
            }
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("-q.img");
            let size = if *kind == FilesystemType::Xfs { 320 * MIB } else { 160 * MIB };
            let new = NewFile::create(&path, size).unwrap();
            block_on(make(*kind, new.path(), Some("DATA"))).unwrap();
            let name = if *kind == FilesystemType::Ntfs { "ntfs" } else { kind.as_str() };
            assert_eq!((found(&path, "TYPE").as_str(), found(&path, "LABEL").as_str()), (name, "DATA"));
            assert_eq!(fs::metadata(new.path()).unwrap().len(), size);
            let allocated = std::os::unix::fs::MetadataExt::blocks(&fs::metadata(new.path()).unwrap()) * 512;
            assert!(allocated < size / 2, "{kind:?} has {allocated} bytes");
        }
    }

    #[test]
    fn a_program_that_fails_is_quoted() {
        let directory = tempfile::tempdir().unwrap();
        let new = NewFile::create(&directory.path().join("x.img"), 512).unwrap();
        let text = block_on(make(FilesystemType::Ext4, new.path(), None)).unwrap_err().to_string();
        assert!(text.starts_with("mkfs.ext4 failed: "), "{text}");
    }

    #[test]
    fn long_labels_are_refused() {
        FilesystemType::Vfat.check_label("ELEVENCHARS").unwrap();
        let text = FilesystemType::Vfat.check_label("TWELVE CHARS").unwrap_err().to_string();
        assert_eq!(text, "the label has 12 bytes; vfat allows at most 11");
    }
}
