//! What a restart needs, in the runtime folder: a file for each attachment, replaced as a whole.

use std::ffi::OsString;
use std::fs::{File, OpenOptions};
use std::io::{Error as IoError, Read as _, Result as IoResult, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use loopd_dbus::{Error, ErrorKind};
use nix::fcntl::OFlag;
use serde::{Deserialize, Serialize};
use tracing::{debug, warn};

use loopd_engine::kernel::{DiskSequence, FileIdentity};
use loopd_engine::{ClientId, MountDirectory, Ownership, SavedAttachment, Store};

mod places;

use places::MountDirectories;

/// Changes when an older daemon would misunderstand the files.
const VERSION: u32 = 1;
/// Far above what is ever written.
const LONGEST: u64 = 4096;
const FOLDER: &str = "/run/loopd";
const SUFFIX: &str = ".toml";
const ANNOUNCED: &str = ".announced";

/// The folder that the service manager has made for us, or the same one made by ourselves.
///
/// # Errors
/// It cannot be made.
pub fn runtime_folder() -> IoResult<PathBuf> {
    let given = std::env::var_os("RUNTIME_DIRECTORY").unwrap_or_default();
    // Behind it is the one for mounts.
    let first = std::env::split_paths(&given).next().filter(|first| !first.as_os_str().is_empty());
    let folder = first.unwrap_or_else(|| PathBuf::from(FOLDER));
    std::fs::DirBuilder::new().recursive(true).mode(0o755).create(&folder)?;
    Ok(folder)
}

/// The files of the attachments, and of the folders to mount on.
pub struct Files {
    folder: PathBuf,
    places: MountDirectories,
    /// Which bus the clients' names are of: another one gives the same names anew.
    bus: String,
}

/// The contents of a file whose name is the disk sequence of the attach.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case")]
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
    /// Of the lifetime `mount`; an older daemon's file has neither.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    mounted: bool,
    #[serde(default)]
    grace_ends: Option<u64>,
    /// `st_dev` and `st_ino`, whose bits the signed numbers of TOML have room for.
    #[serde(default)]
    next_file: Option<(i64, i64)>,
}

impl Files {
    /// The files in the folder `attachments` of the runtime folder.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn open(runtime_folder: &Path, bus: String) -> IoResult<Self> {
        let folder = own_folder(runtime_folder.join("attachments"))?;
        Ok(Self { folder, places: MountDirectories::open(runtime_folder)?, bus })
    }

    fn path(&self, id: DiskSequence) -> PathBuf {
        self.folder.join(format!("{id}{SUFFIX}"))
    }

    fn contents(&self, kept: &SavedAttachment) -> Contents {
        let SavedAttachment { number, disk_sequence, phase, node_made, next_file, ref ownership, .. } = *kept;
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
        }
    }

    fn load(&self, path: &Path) -> Result<SavedAttachment, String> {
        let id = id_of(path).ok_or("it has not the name of a file of loopd")?;
        let text = read_own(path)?;
        let contents: Contents = toml::from_str(&text).map_err(|error| error.message().to_owned())?;
        if contents.version != VERSION {
            return Err(format!("it has version {}, and this loopd knows {VERSION}", contents.version));
        }
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
        })
    }

    fn paths(&self) -> Vec<PathBuf> {
        paths_in(&self.folder)
    }
}

/// Makes a folder that nobody else can write to.
fn own_folder(folder: PathBuf) -> IoResult<PathBuf> {
    if folder.symlink_metadata().is_ok_and(|found| !found.is_dir() || !is_ours(&found)) {
        set_aside(&folder, "it is not loopd's folder");
    }
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&folder)?;
    Ok(folder)
}

/// Puts a file with this text in the place of another, as a whole.
fn replace(path: &Path, text: &str) -> IoResult<()> {
    let mut name = OsString::from(".");
    name.push(path.file_name().unwrap_or_default());
    let new = path.with_file_name(name);
    let flags = (OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC).bits();
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600).custom_flags(flags);
    options.open(&new)?.write_all(text.as_bytes())?;
    std::fs::rename(new, path)
}

fn paths_in(folder: &Path) -> Vec<PathBuf> {
    let paths = || folder.read_dir()?.map(|entry| Ok(entry?.path())).collect::<IoResult<_>>();
    paths().unwrap_or_else(|error| {
        warn!("{} cannot be read: {error}", folder.display());
        Vec::new()
    })
}

impl Store for Files {
    fn write(&self, kept: &SavedAttachment) -> Result<(), Error> {
        let path = self.path(kept.id);
        let text = toml::to_string(&self.contents(kept)).map_err(IoError::other);
        text.and_then(|text| replace(&path, &text)).map_err(|error| not_written(&path, &error))
    }

    fn erase(&self, id: DiskSequence) {
        remove(&self.path(id));
    }

    fn announce(&self, mark: u64) -> Result<(), Error> {
        let path = self.folder.join(announcement(mark));
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path);
        made.map(drop).map_err(|error| not_written(&path, &error))
    }

    fn retract(&self, mark: u64) {
        remove(&self.folder.join(announcement(mark)));
    }

    fn announced(&self) -> Vec<u64> {
        self.paths().iter().filter_map(|path| mark_of(path)).collect()
    }

    fn read(&self) -> Vec<SavedAttachment> {
        let mut all = Vec::new();
        for path in self.paths() {
            match kind_of(&path) {
                Kind::Unfinished => drop(std::fs::remove_file(&path)),
                Kind::Announcement => {}
                Kind::SetAside => debug!("{} is passed over", path.display()),
                Kind::Attachment => match self.load(&path) {
                    Ok(kept) => all.push(kept),
                    Err(why) => set_aside(&path, &why),
                },
            }
        }
        all.sort_unstable_by_key(|kept| kept.id);
        all
    }

    fn write_mount_directory(&self, place: &MountDirectory) -> Result<(), Error> {
        self.places.write(place).map_err(|error| not_written(&self.places.file(&place.path), &error))
    }

    fn erase_mount_directory(&self, path: &Path) {
        remove(&self.places.file(path));
    }

    fn read_mount_directories(&self) -> Vec<MountDirectory> {
        self.places.read()
    }
}

fn announcement(mark: u64) -> String {
    format!("{mark}{ANNOUNCED}")
}

enum Kind {
    Attachment,
    /// Empty: its name has the mark.
    Announcement,
    /// The daemon died before it could give the file its name.
    Unfinished,
    SetAside,
}

fn kind_of(path: &Path) -> Kind {
    let name = path.file_name().unwrap_or_default().as_encoded_bytes();
    if name.starts_with(b".") {
        Kind::Unfinished
    } else if name.ends_with(b".damaged") {
        Kind::SetAside
    } else if mark_of(path).is_some() {
        Kind::Announcement
    } else {
        Kind::Attachment
    }
}

fn mark_of(path: &Path) -> Option<u64> {
    path.file_name()?.to_str()?.strip_suffix(ANNOUNCED)?.parse().ok()
}

fn id_of(path: &Path) -> Option<DiskSequence> {
    let id = path.file_name()?.to_str()?.strip_suffix(SUFFIX)?.parse().ok().map(DiskSequence)?;
    (path.file_name()?.to_str()? == format!("{id}{SUFFIX}")).then_some(id)
}

/// Whether nobody else can have written it.
fn is_ours(metadata: &std::fs::Metadata) -> bool {
    metadata.uid() == nix::unistd::geteuid().as_raw() && metadata.mode() & 0o022 == 0
}

fn read_own(path: &Path) -> Result<String, String> {
    let flags = OFlag::O_NOFOLLOW | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    let file = OpenOptions::new().read(true).custom_flags(flags.bits()).open(path);
    let file: File = file.map_err(|error| format!("it cannot be opened: {error}"))?;
    let metadata = file.metadata().map_err(|error| error.to_string())?;
    if !metadata.is_file() || !is_ours(&metadata) {
        return Err("it is not a file that only loopd can have written".to_owned());
    }
    let mut text = String::new();
    file.take(LONGEST).read_to_string(&mut text).map_err(|error| format!("it cannot be read: {error}"))?;
    Ok(text)
}

fn not_written(path: &Path, error: &IoError) -> Error {
    let path = path.display();
    Error::new(ErrorKind::Kernel, format!("what a restart needs cannot be written to {path}: {error}"))
}

fn remove(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        warn!("{} cannot be removed: {error}", path.display());
    }
}

/// Whoever looks after the machine may want to see it.
fn set_aside(path: &Path, why: &str) {
    let mut damaged = path.to_owned().into_os_string();
    damaged.push(".damaged");
    warn!("{} is set aside as {}: {why}", path.display(), damaged.display());
    if let Err(error) = std::fs::rename(path, &damaged) {
        warn!("{} cannot be set aside: {error}", path.display());
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt as _, symlink};

    use loopd_dbus::Lifetime;

    use super::*;
    use loopd_engine::Phase;

    fn kept(id: u64) -> SavedAttachment {
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
        }
    }

    fn files() -> (tempfile::TempDir, Files) {
        let folder = tempfile::tempdir().unwrap();
        let files = Files::open(folder.path(), "bus".to_owned()).unwrap();
        (folder, files)
    }

    fn names(files: &Files) -> Vec<String> {
        let mut names: Vec<_> = files
            .paths()
            .iter()
            .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
            .collect();
        names.sort_unstable();
        names
    }

    #[test]
    fn what_is_written_is_read_until_it_is_erased() {
        let (folder, files) = files();
        files.write(&kept(7)).unwrap();
        files.write(&SavedAttachment { phase: Phase::Attached, ..kept(12) }).unwrap();
        files.write(&SavedAttachment { phase: Phase::Attaching, ..kept(12) }).unwrap();
        assert_eq!(files.read(), [kept(7), SavedAttachment { phase: Phase::Attaching, ..kept(12) }]);
        let again = Files::open(folder.path(), "bus".to_owned()).unwrap();
        again.erase(DiskSequence(12));
        assert_eq!(again.read(), [kept(7)]);
        assert_eq!(names(&files), ["7.toml"]);
    }

    #[test]
    fn announcements_stay_until_they_are_taken_back() {
        let (_folder, files) = files();
        files.announce(5).unwrap();
        files.announce(7).unwrap();
        assert!(files.announce(7).is_err(), "a mark is used once");
        files.retract(5);
        assert_eq!((files.announced(), files.read()), (vec![7], Vec::new()));
    }

    #[test]
    fn names_of_another_bus_are_nobodys() {
        let (folder, files) = files();
        files.write(&kept(7)).unwrap();
        let elsewhere = Files::open(folder.path(), "other".to_owned()).unwrap();
        assert_eq!(elsewhere.read()[0].ownership.client, None);
    }

    #[test]
    fn what_is_damaged_or_foreign_is_set_aside_and_costs_nothing_else() {
        let (_folder, files) = files();
        files.write(&kept(1)).unwrap();
        let good = std::fs::read_to_string(files.path(DiskSequence(1))).unwrap();
        let put = |name: &str, text: &str, mode: u32| {
            let path = files.folder.join(name);
            std::fs::write(&path, text).unwrap();
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
        };
        put("2.toml", &good[..good.len() / 2], 0o600);
        put("3.toml", "", 0o600);
        put("4.toml", &good.replace("version = 1", "version = 2"), 0o600);
        put("5.toml", &format!("{good}more = 1\n"), 0o600);
        put("6.toml", &good, 0o622);
        put("7.toml", &good.replace("detaching", "flying"), 0o600);
        put("8.toml", &good.replace("\"client\"", "\"eternal\""), 0o600);
        put("9.toml", &good.replace("number = 3", "number = -3"), 0o600);
        put("17.toml", &good.replace("next-file = [7, -1]", "next-file = [7]"), 0o600);
        put("010.toml", &good, 0o600);
        put("foreign", &good, 0o600);
        put("11.toml", &"#".repeat(100_000), 0o600);
        symlink(files.path(DiskSequence(1)), files.folder.join("12.toml")).unwrap();
        std::fs::create_dir(files.folder.join("13.toml")).unwrap();
        nix::unistd::mkfifo(&files.folder.join("14.toml"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        put(".15.toml", "half a fi", 0o600);
        put("16.toml.damaged", "an earlier one", 0o600);
        assert_eq!(files.read(), [kept(1)]);
        let expected = (2..=14).chain([17]).map(|id| match id {
            10 => "010.toml.damaged".to_owned(),
            _ => format!("{id}.toml.damaged"),
        });
        let mut expected: Vec<_> =
            expected.chain(["1.toml", "16.toml.damaged", "foreign.damaged"].map(str::to_owned)).collect();
        expected.sort_unstable();
        assert_eq!(names(&files), expected);
        assert_eq!(files.read(), [kept(1)], "what was set aside stays there");
    }

    #[test]
    fn a_folder_that_is_not_ours_is_set_aside() {
        let (folder, files) = files();
        files.write(&kept(1)).unwrap();
        let mode = std::fs::Permissions::from_mode(0o777);
        std::fs::set_permissions(&files.folder, mode).unwrap();
        let anew = Files::open(folder.path(), "bus".to_owned()).unwrap();
        assert_eq!(anew.read(), []);
        assert!(folder.path().join("attachments.damaged/1.toml").exists());
    }
}
