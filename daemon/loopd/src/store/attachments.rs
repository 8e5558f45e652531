//! The state file of each attachment, and the marks of attachments in progress.

use std::fs::OpenOptions;
use std::io::Result as IoResult;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use loopd_engine::Error;
use serde::{Deserialize, Serialize};

use super::state_file::{self, SUFFIX, VERSION};
use loopd_engine::kernel::{DiskSequence, FileEnd, FileIdentity, ImageFormat};
use loopd_engine::{ClientId, Ownership, SavedAttachment, SavedCleartext};

/// The suffix of the name of an empty file that announces an attachment; the rest is its mark.
const ANNOUNCED: &str = ".announced";

/// The state files of attachments.
pub struct AttachmentFiles {
    directory: PathBuf,
    /// Identifies the bus on which the clients' unique names are valid: another bus reuses the names.
    bus: String,
}

/// The contents of a state file. Its name is the disk sequence of the attach. A key that a later version has
/// added is ignored, and a key that an earlier version does not write has a default: with each new key a
/// file in `fixtures` is added.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Contents {
    version: u32,
    number: u32,
    disk_sequence: u64,
    phase: String,
    owner: u32,
    lifetime: String,
    client: Option<String>,
    bus: String,
    since: u64,
    node_made: bool,
    /// For the lifetime `mount`. Older daemons write neither this key nor the next two.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    mounted: bool,
    #[serde(default)]
    grace_ends: Option<u64>,
    /// `st_dev` and `st_ino`, reinterpreted as the signed integers of TOML.
    #[serde(default)]
    next_file: Option<(i64, i64)>,
    /// The end of the file: bytes and format. Older daemons write neither.
    #[serde(default)]
    file_bytes: u64,
    #[serde(default)]
    file_format: Option<String>,
    /// Older daemons do not unlock.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    cleartexts: Vec<Cleartext>,
}

/// A cleartext in a state file. The `partition` of a whole device is absent.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Cleartext {
    partition: Option<u32>,
    disk_sequence: u64,
    since: u64,
    user: u32,
    closing: bool,
    #[serde(rename = "type")]
    kind: Option<String>,
}

impl From<SavedCleartext> for Cleartext {
    fn from(saved: SavedCleartext) -> Self {
        let SavedCleartext { partition, disk_sequence, since, uid, closing, kind } = saved;
        let kind = kind.map(|kind| kind.as_str().to_owned());
        Self { partition, disk_sequence: disk_sequence.0, since, user: uid, closing, kind }
    }
}

impl From<Cleartext> for SavedCleartext {
    fn from(contents: Cleartext) -> Self {
        let Cleartext { partition, disk_sequence, since, user, closing, kind } = contents;
        let kind = kind.and_then(|kind| kind.parse().ok());
        Self { partition, disk_sequence: DiskSequence(disk_sequence), since, uid: user, closing, kind }
    }
}

impl AttachmentFiles {
    /// The state files in `attachments` below the runtime directory.
    ///
    /// # Errors
    /// The directory cannot be made.
    pub fn open(runtime_directory: &Path, bus: String) -> IoResult<Self> {
        let directory = state_file::make_private_directory(runtime_directory.join("attachments"))?;
        Ok(Self { directory, bus })
    }

    fn path(&self, id: DiskSequence) -> PathBuf {
        self.directory.join(format!("{id}{SUFFIX}"))
    }

    fn announcement(&self, mark: u64) -> PathBuf {
        self.directory.join(format!("{mark}{ANNOUNCED}"))
    }

    fn paths(&self) -> Vec<PathBuf> {
        state_file::paths_in(&self.directory)
    }

    /// Writes the state of an attachment.
    ///
    /// # Errors
    /// The file cannot be written; the previous one is unchanged.
    pub fn write(&self, attachment: &SavedAttachment) -> Result<(), Error> {
        state_file::write(&self.path(attachment.id), &self.contents(attachment))
    }

    /// Removes the state of an attachment.
    pub fn erase(&self, id: DiskSequence) {
        state_file::remove(&self.path(id));
    }

    /// Records that a device with this mark is about to be attached.
    ///
    /// # Errors
    /// The file cannot be made, or exists.
    pub fn announce(&self, mark: u64) -> Result<(), Error> {
        let path = self.announcement(mark);
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        made.map(drop).map_err(|error| state_file::cannot_write(&path, error))
    }

    /// Removes an announcement.
    pub fn retract(&self, mark: u64) {
        state_file::remove(&self.announcement(mark));
    }

    /// The marks of all announcements.
    pub fn announced(&self) -> Vec<u64> {
        self.paths().iter().filter_map(|path| mark_of(path)).collect()
    }

    /// Reads all state files. Invalid ones are moved aside, temporary ones removed.
    pub fn read(&self) -> Vec<SavedAttachment> {
        let paths = self.paths().into_iter().filter(|path| mark_of(path).is_none());
        let mut all = state_file::load_all(paths, |path| self.load(path));
        all.sort_unstable_by_key(|attachment| attachment.id);
        all
    }

    fn contents(&self, attachment: &SavedAttachment) -> Contents {
        let SavedAttachment {
            number,
            disk_sequence,
            phase,
            node_made,
            next_file,
            file_end,
            ref ownership,
            ref cleartexts,
            ..
        } = *attachment;
        Contents {
            version: VERSION,
            number,
            disk_sequence: disk_sequence.0,
            phase: phase.as_str().to_owned(),
            owner: ownership.uid,
            lifetime: ownership.lifetime.as_str().to_owned(),
            client: ownership.client.as_ref().map(|client| client.0.clone()),
            bus: self.bus.clone(),
            since: ownership.since,
            node_made,
            mounted: ownership.mounted,
            grace_ends: ownership.grace_ends,
            next_file: next_file.map(|file| (file.device.cast_signed(), file.inode.cast_signed())),
            file_bytes: file_end.bytes,
            file_format: file_end.format.map(|format| format.as_str().to_owned()),
            cleartexts: cleartexts.iter().copied().map(Cleartext::from).collect(),
        }
    }

    fn load(&self, path: &Path) -> Result<SavedAttachment, String> {
        let id = id_of(path).ok_or("its name is not that of a state file")?;
        let contents: Contents = state_file::read(path)?;
        state_file::check_version(contents.version)?;
        let client = contents.client.filter(|_| contents.bus == self.bus).map(ClientId);
        Ok(SavedAttachment {
            id,
            number: contents.number,
            disk_sequence: DiskSequence(contents.disk_sequence),
            phase: contents.phase.parse()?,
            ownership: Ownership {
                uid: contents.owner,
                client,
                lifetime: contents.lifetime.parse().map_err(|error| format!("{error}"))?,
                since: contents.since,
                mounted: contents.mounted,
                grace_ends: contents.grace_ends,
            },
            node_made: contents.node_made,
            next_file: contents.next_file.map(|(device, inode)| FileIdentity {
                device: device.cast_unsigned(),
                inode: inode.cast_unsigned(),
            }),
            file_end: FileEnd {
                bytes: contents.file_bytes,
                format: contents.file_format.as_deref().and_then(ImageFormat::named),
            },
            cleartexts: contents.cleartexts.into_iter().map(SavedCleartext::from).collect(),
        })
    }
}

/// The mark of an announcement; `None` for another file.
fn mark_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_suffix(ANNOUNCED)?.parse().ok()
}

fn id_of(path: &Path) -> Option<DiskSequence> {
    let id = path.file_name()?.to_str()?.strip_suffix(SUFFIX)?.parse().ok().map(DiskSequence)?;
    (path.file_name()?.to_str()? == format!("{id}{SUFFIX}")).then_some(id)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use loopd_common::EncryptionType;
    use loopd_dbus::Lifetime;

    use super::*;
    use loopd_engine::Phase;

    fn attachment(id: u64) -> SavedAttachment {
        SavedAttachment {
            id: DiskSequence(id),
            number: 3,
            disk_sequence: DiskSequence(id + 1),
            phase: Phase::Detaching,
            ownership: Ownership {
                uid: 1000,
                client: Some(ClientId(":1.5".to_owned())),
                lifetime: Lifetime::Client,
                since: 1_700_000_000_000_000,
                mounted: false,
                grace_ends: Some(1_700_000_060_000_000),
            },
            node_made: true,
            next_file: Some(FileIdentity { device: 7, inode: u64::MAX }),
            file_end: FileEnd { bytes: 1_000_001, format: Some(ImageFormat::Dmg) },
            cleartexts: cleartexts(),
        }
    }

    fn cleartexts() -> Vec<SavedCleartext> {
        let cleartext = |partition, disk_sequence, closing| SavedCleartext {
            partition,
            disk_sequence: DiskSequence(disk_sequence),
            since: 1_700_000_000_000_000,
            uid: 1001,
            closing,
            kind: partition.map(|_| EncryptionType::TrueCrypt),
        };
        vec![cleartext(None, 9, false), cleartext(Some(2), 10, true)]
    }

    fn files() -> (tempfile::TempDir, AttachmentFiles) {
        let directory = tempfile::tempdir().unwrap();
        let files = AttachmentFiles::open(directory.path(), "bus".to_owned()).unwrap();
        (directory, files)
    }

    fn names(files: &AttachmentFiles) -> Vec<String> {
        let mut names: Vec<_> = files
            .paths()
            .iter()
            .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn written_state_is_read_until_erased() {
        let (directory, files) = files();
        files.write(&attachment(7)).unwrap();
        files.write(&SavedAttachment { phase: Phase::Attached, ..attachment(12) }).unwrap();
        files.write(&SavedAttachment { phase: Phase::Attaching, ..attachment(12) }).unwrap();
        assert_eq!(
            files.read(),
            [attachment(7), SavedAttachment { phase: Phase::Attaching, ..attachment(12) }]
        );
        let reopened = AttachmentFiles::open(directory.path(), "bus".to_owned()).unwrap();
        reopened.erase(DiskSequence(12));
        assert_eq!(reopened.read(), [attachment(7)]);
        assert_eq!(names(&files), ["7.toml"]);
    }

    #[test]
    fn announcements_stay_until_retracted() {
        let (_directory, files) = files();
        files.announce(5).unwrap();
        files.announce(7).unwrap();
        assert!(files.announce(7).is_err(), "a mark is used once");
        files.retract(5);
        assert_eq!((files.announced(), files.read()), (vec![7], Vec::new()));
    }

    #[test]
    fn clients_of_another_bus_are_ignored() {
        let (directory, files) = files();
        files.write(&attachment(7)).unwrap();
        let elsewhere = AttachmentFiles::open(directory.path(), "other".to_owned()).unwrap();
        assert_eq!(elsewhere.read()[0].ownership.client, None);
    }

    #[test]
    fn invalid_files_are_moved_aside_and_the_others_are_read() {
        let (_directory, files) = files();
        files.write(&attachment(1)).unwrap();
        let good = std::fs::read_to_string(files.path(DiskSequence(1))).unwrap();
        let put = |name: &str, text: &str, mode: u32| {
            let path = files.directory.join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        put("2.toml", good.split_inclusive("since").next().unwrap(), 0o600);
        put("3.toml", "", 0o600);
        put("4.toml", &good.replace("version = 1", "version = 2"), 0o600);
        put("5.toml", &good.replace("owner = 1000\n", ""), 0o600);
        put("6.toml", &good, 0o622);
        put("7.toml", &good.replace("detaching", "flying"), 0o600);
        put("8.toml", &good.replace("\"client\"", "\"eternal\""), 0o600);
        put("9.toml", &good.replace("number = 3", "number = -3"), 0o600);
        put("17.toml", &good.replace("next-file = [7, -1]", "next-file = [7]"), 0o600);
        put("010.toml", &good, 0o600);
        put("foreign", &good, 0o600);
        put("11.toml", &"#".repeat(100_000), 0o600);
        symlink(files.path(DiskSequence(1)), files.directory.join("12.toml")).unwrap();
        std::fs::create_dir(files.directory.join("13.toml")).unwrap();
        nix::unistd::mkfifo(&files.directory.join("14.toml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        put(".15.toml", "half a fi", 0o600);
        put("16.toml.damaged", "an earlier one", 0o600);
        assert_eq!(files.read(), [attachment(1)]);
        let expected = (2..=14).chain([17]).map(|id| match id {
            10 => "010.toml.damaged".to_owned(),
            _ => format!("{id}.toml.damaged"),
        });
        let mut expected: Vec<_> =
            expected.chain(["1.toml", "16.toml.damaged", "foreign.damaged"].map(str::to_owned)).collect();
        expected.sort_unstable();
        assert_eq!(names(&files), expected);
        assert_eq!(files.read(), [attachment(1)], "damaged files are ignored");
    }

    /// Files of each version, as it wrote them; the last one is of a version to come.
    #[test]
    fn files_of_other_versions_are_read() {
        let (_directory, files) = files();
        let saved = |lifetime, client: Option<&str>| SavedAttachment {
            id: DiskSequence(5),
            number: 3,
            disk_sequence: DiskSequence(8),
            phase: Phase::Attached,
            ownership: Ownership {
                uid: 1000,
                client: client.map(|client| ClientId(client.to_owned())),
                lifetime,
                since: 1_700_000_000_000_000,
                mounted: false,
                grace_ends: None,
            },
            node_made: true,
            next_file: None,
            file_end: FileEnd::default(),
            cleartexts: Vec::new(),
        };
        let client = || saved(Lifetime::Client, Some(":1.5"));
        let mut mounted = saved(Lifetime::Mount, None);
        mounted.ownership.mounted = true;
        let mut in_grace = saved(Lifetime::Mount, None);
        in_grace.ownership.grace_ends = Some(1_700_000_060_000_000);
        let next_file = Some(FileIdentity { device: 7, inode: u64::MAX });
        let file_end = FileEnd { bytes: 1_000_001, format: Some(ImageFormat::Dmg) };
        for (text, expected) in [
            (include_str!("fixtures/client.toml"), client()),
            (include_str!("fixtures/persistent.toml"), saved(Lifetime::Persistent, None)),
            (include_str!("fixtures/mounted.toml"), mounted),
            (include_str!("fixtures/grace.toml"), in_grace),
            (include_str!("fixtures/next-file.toml"), SavedAttachment { next_file, ..client() }),
            (include_str!("fixtures/file-end.toml"), SavedAttachment { file_end, ..client() }),
            (
                include_str!("fixtures/cleartexts.toml"),
                SavedAttachment { cleartexts: cleartexts(), ..client() },
            ),
            (include_str!("fixtures/later.toml"), client()),
        ] {
            let path = files.path(DiskSequence(5));
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
            assert_eq!(files.read(), [expected], "{text}");
        }
    }

    #[test]
    fn a_directory_that_others_can_write_to_is_moved_aside() {
        let (directory, files) = files();
        files.write(&attachment(1)).unwrap();
        let mode = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(&files.directory, mode).unwrap();
        let reopened = AttachmentFiles::open(directory.path(), "bus".to_owned()).unwrap();
        assert_eq!(reopened.read(), []);
        assert!(directory.path().join("attachments.damaged/1.toml").exists());
    }
}
