//! The configuration: `/etc/loopd/loopd.toml` and its drop-ins.

use std::io::ErrorKind;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use tracing::warn;

use loopd_common::EncryptionType;
use loopd_engine::{Limits, Policy, Settings};

const FILE: &str = "/etc/loopd/loopd.toml";
/// The last valid configuration, in the runtime directory.
const LAST_GOOD: &str = "configuration.toml";
/// The longest time in seconds: a year, which no clock overflows.
const MAX_SECONDS: f64 = 365.0 * 24.0 * 3600.0;

/// The files of the configuration: `FILE`, then `FILE.d/*.toml` in the order of their names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Source {
    file: PathBuf,
    /// Whether the file must exist.
    required: bool,
}

impl Default for Source {
    fn default() -> Self {
        Self { file: PathBuf::from(FILE), required: false }
    }
}

/// The contents of the configuration. Absent keys have their defaults.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
pub struct Config {
    limits: EachUser,
    all_users: AllUsers,
    times: Times,
    mount: Mount,
    unlock: Unlock,
}

/// Limits for each user.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct EachUser {
    attachments: Option<u32>,
    partitions: Option<u32>,
    mounts: Option<u32>,
    cleartexts: Option<u32>,
    calls: Option<NonZeroU32>,
    prompts: Option<u32>,
}

/// Limits for all users together, except root.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct AllUsers {
    attachments: Option<u32>,
    partitions: Option<u32>,
    mounts: Option<u32>,
    cleartexts: Option<u32>,
    calls: Option<Calls>,
    prompts: Option<u32>,
}

/// Concurrent calls of all users. Each may block a thread, and root needs some.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
struct Calls(u32);

impl Calls {
    const MAX: u32 = 384;
}

impl<'de> Deserialize<'de> for Calls {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let calls = u32::deserialize(deserializer)?;
        if (1..=Self::MAX).contains(&calls) {
            Ok(Self(calls))
        } else {
            Err(D::Error::custom(format!("{calls} is not a number from 1 to {}", Self::MAX)))
        }
    }
}

/// Times in seconds.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Times {
    idle_exit: Option<Seconds>,
    wait_for_udev: Option<Seconds>,
    wait_for_users: Option<Seconds>,
    wait_for_mount: Option<Seconds>,
    wait_for_unlock: Option<Seconds>,
    mount_grace: Option<Seconds>,
}

/// Which file systems may be mounted, and how.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Mount {
    filesystems: Option<Vec<FileSystemName>>,
    exec: Option<bool>,
}

/// Which encrypted volumes may be unlocked.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields, rename_all = "kebab-case")]
struct Unlock {
    types: Option<Vec<UnlockType>>,
}

/// A type of encryption, by its name on the bus.
#[derive(Clone, Copy, Debug, PartialEq)]
struct UnlockType(EncryptionType);

impl<'de> Deserialize<'de> for UnlockType {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        name.parse().map(Self).map_err(|_| {
            let known: Vec<_> = EncryptionType::ALL.iter().map(|kind| kind.as_str()).collect();
            D::Error::custom(format!("{name:?} is not one of the types {}", known.join(", ")))
        })
    }
}

impl Serialize for UnlockType {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.0.as_str())
    }
}

/// The name of a file system type in the kernel and mount(8).
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(transparent)]
struct FileSystemName(String);

impl<'de> Deserialize<'de> for FileSystemName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        let is_known = |byte: u8| byte.is_ascii_alphanumeric() || b"_-".contains(&byte);
        if name.starts_with(|first: char| first.is_ascii_alphanumeric()) && name.bytes().all(is_known) {
            Ok(Self(name))
        } else {
            Err(D::Error::custom(format!("{name:?} is not the name of a file system")))
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
struct Seconds(Duration);

impl<'de> Deserialize<'de> for Seconds {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let seconds = f64::deserialize(deserializer)?;
        if (0.0..=MAX_SECONDS).contains(&seconds) {
            Ok(Self(Duration::from_secs_f64(seconds)))
        } else {
            Err(D::Error::custom(format!(
                "{seconds} is not a time: a number of seconds from 0 to {MAX_SECONDS}"
            )))
        }
    }
}

impl Serialize for Seconds {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0.as_secs_f64())
    }
}

impl Source {
    /// This file and its drop-ins.
    #[must_use]
    pub fn named(file: PathBuf) -> Self {
        Self { file, required: true }
    }

    /// Reads all files.
    ///
    /// # Errors
    /// One line with the file, line and column of the error.
    pub fn read(&self) -> Result<Config, String> {
        let mut config = Config::default();
        for file in self.files()? {
            config.overlay(read(&file)?);
        }
        Ok(config)
    }

    /// Reads all files, and saves the result in the runtime directory for [`Source::read_or_last_good`].
    ///
    /// # Errors
    /// As [`Source::read`].
    pub fn read_and_save(&self, runtime_directory: &Path) -> Result<Config, String> {
        let config = self.read()?;
        let path = runtime_directory.join(LAST_GOOD);
        if let Err(error) = config.save(&path) {
            warn!("{}: cannot be written: {error}", path.display());
        }
        Ok(config)
    }

    /// Reads all files, or the last valid configuration if they are invalid: so a restart after an exit on
    /// idle or an upgrade does not fail.
    ///
    /// # Errors
    /// As [`Source::read`], if there was no valid configuration since the machine started.
    pub fn read_or_last_good(&self, runtime_directory: &Path) -> Result<Config, String> {
        self.read_and_save(runtime_directory).or_else(|message| {
            let config = read(&runtime_directory.join(LAST_GOOD)).map_err(|_| message.clone())?;
            warn!("using the last valid configuration: {message}");
            Ok(config)
        })
    }

    /// Checks all files. Returns a line for each.
    ///
    /// # Errors
    /// As [`Source::read`].
    pub fn check(&self) -> Result<String, String> {
        self.read()?;
        let files = self.files()?;
        if files.is_empty() {
            return Ok("there is no configuration: all settings have their defaults\n".to_owned());
        }
        Ok(files.iter().map(|file| format!("{}: ok\n", file.display())).collect())
    }

    /// The existing files. Each overrides those before it.
    ///
    /// # Errors
    /// A directory cannot be read.
    fn files(&self) -> Result<Vec<PathBuf>, String> {
        let mut drop_ins = self.file.clone().into_os_string();
        drop_ins.push(".d");
        let mut files = drop_ins_in(Path::new(&drop_ins))?;
        let is_absent =
            matches!(self.file.symlink_metadata(), Err(error) if error.kind() == ErrorKind::NotFound);
        if self.required || !is_absent {
            files.insert(0, self.file.clone());
        }
        Ok(files)
    }
}

fn drop_ins_in(directory: &Path) -> Result<Vec<PathBuf>, String> {
    let cannot_read = |error: std::io::Error| format!("{}: cannot be read: {error}", directory.display());
    let entries = match directory.read_dir() {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(cannot_read(error)),
    };
    let mut files = Vec::new();
    for entry in entries {
        let path = entry.map_err(cannot_read)?.path();
        let is_hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        if path.extension().is_some_and(|extension| extension == "toml") && !is_hidden {
            files.push(path);
        }
    }
    files.sort_unstable();
    Ok(files)
}

fn read(file: &Path) -> Result<Config, String> {
    let text = std::fs::read_to_string(file)
        .map_err(|error| format!("{}: cannot be read: {error}", file.display()))?;
    toml::from_str(&text).map_err(|error| {
        let before = &text[..error.span().map_or(0, |span| span.start.min(text.len()))];
        let line = before.split('\n').count();
        let column = before.rsplit('\n').next().unwrap_or_default().chars().count() + 1;
        format!("{}:{line}:{column}: {}", file.display(), error.message().replace('\n', ", "))
    })
}

impl Config {
    fn save(&self, file: &Path) -> std::io::Result<()> {
        let text = toml::to_string(self).map_err(std::io::Error::other)?;
        let new = file.with_extension("new");
        std::fs::write(&new, text)?;
        std::fs::rename(new, file)
    }

    /// Replaces the keys that `other` has.
    fn overlay(&mut self, other: Self) {
        fn take<T>(old: &mut Option<T>, new: Option<T>) {
            if new.is_some() {
                *old = new;
            }
        }
        take(&mut self.limits.attachments, other.limits.attachments);
        take(&mut self.limits.partitions, other.limits.partitions);
        take(&mut self.limits.mounts, other.limits.mounts);
        take(&mut self.limits.cleartexts, other.limits.cleartexts);
        take(&mut self.limits.calls, other.limits.calls);
        take(&mut self.limits.prompts, other.limits.prompts);
        take(&mut self.all_users.attachments, other.all_users.attachments);
        take(&mut self.all_users.partitions, other.all_users.partitions);
        take(&mut self.all_users.mounts, other.all_users.mounts);
        take(&mut self.all_users.cleartexts, other.all_users.cleartexts);
        take(&mut self.all_users.calls, other.all_users.calls);
        take(&mut self.all_users.prompts, other.all_users.prompts);
        take(&mut self.times.idle_exit, other.times.idle_exit);
        take(&mut self.times.wait_for_udev, other.times.wait_for_udev);
        take(&mut self.times.wait_for_users, other.times.wait_for_users);
        take(&mut self.times.wait_for_mount, other.times.wait_for_mount);
        take(&mut self.times.wait_for_unlock, other.times.wait_for_unlock);
        take(&mut self.times.mount_grace, other.times.mount_grace);
        take(&mut self.mount.filesystems, other.mount.filesystems);
        take(&mut self.mount.exec, other.mount.exec);
        take(&mut self.unlock.types, other.unlock.types);
    }

    /// The settings, with defaults for absent keys.
    #[must_use]
    pub fn settings(&self) -> Settings {
        let count = |configured: Option<u32>, default| configured.map_or(default, |count| count as usize);
        let limit = |each, all, default: Limits| Limits {
            each: count(each, default.each),
            all: count(all, default.all),
        };
        let time = |configured: Option<Seconds>, default| configured.map_or(default, |Seconds(time)| time);
        let default = Settings::default();
        let Self { limits, all_users: all, times, mount, unlock } = self;
        let names = |configured: &Vec<FileSystemName>| {
            configured.iter().map(|FileSystemName(name)| name.clone()).collect()
        };
        let kinds = |configured: &Vec<UnlockType>| configured.iter().map(|UnlockType(kind)| *kind).collect();
        let file_systems = mount.filesystems.as_ref().map_or(default.mounting.file_systems, names);
        Settings {
            cleartexts: limit(limits.cleartexts, all.cleartexts, default.cleartexts),
            unlock_types: unlock.types.as_ref().map_or(default.unlock_types, kinds),
            wait_for_unlock: time(times.wait_for_unlock, default.wait_for_unlock),
            mounting: Policy { file_systems, programs: mount.exec.unwrap_or(default.mounting.programs) },
            wait_for_mount: time(times.wait_for_mount, default.wait_for_mount),
            mount_grace: time(times.mount_grace, default.mount_grace),
            mounts: limit(limits.mounts, all.mounts, default.mounts),
            wait_for_udev: time(times.wait_for_udev, default.wait_for_udev),
            wait_for_users: time(times.wait_for_users, default.wait_for_users),
            idle_exit: time(times.idle_exit, default.idle_exit),
            attachments: limit(limits.attachments, all.attachments, default.attachments),
            partitions: limit(limits.partitions, all.partitions, default.partitions),
            calls: limit(
                limits.calls.map(NonZeroU32::get),
                all.calls.map(|Calls(calls)| calls),
                default.calls,
            ),
            prompts: limit(limits.prompts, all.prompts, default.prompts),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with these files; the configuration is `loopd.toml` in it.
    fn source(files: &[(&str, &str)]) -> (tempfile::TempDir, Source) {
        let directory = tempfile::tempdir().unwrap();
        std::fs::create_dir(directory.path().join("loopd.toml.d")).unwrap();
        for (name, text) in files {
            std::fs::write(directory.path().join(name), text).unwrap();
        }
        let source = Source { file: directory.path().join("loopd.toml"), required: false };
        (directory, source)
    }

    fn read_error(text: &str) -> String {
        let (directory, source) = source(&[("loopd.toml", text)]);
        let error = source.read().unwrap_err();
        error.replace(&format!("{}/", directory.path().display()), "")
    }

    #[test]
    fn an_absent_or_empty_file_gives_the_defaults() {
        let (_directory, nothing) = source(&[]);
        assert_eq!(nothing.read().unwrap().settings(), Settings::default());
        let (_directory, empty) = source(&[("loopd.toml", "# nothing\n[limits]\n")]);
        assert_eq!(empty.read().unwrap().settings(), Settings::default());
    }

    #[test]
    fn drop_ins_override_in_the_order_of_their_names() {
        let (_directory, source) = source(&[
            (
                "loopd.toml",
                "[limits]\nattachments = 1\ncalls = 1\nprompts = 0\n[times]\nidle-exit = 0\n[unlock]\ntypes = []\n",
            ),
            ("loopd.toml.d/20-b.toml", "[limits]\nattachments = 3\n"),
            (
                "loopd.toml.d/10-a.toml",
                "[limits]\nattachments = 2\npartitions = 20\ncalls = 2\n[all-users]\npartitions = 200\ncalls = 9\n[times]\n\
                 wait-for-udev = 0.5\n",
            ),
            (
                "loopd.toml.d/25-c.toml",
                "[mount]\nfilesystems = [\"ext4\"]\nexec = false\n[times]\nmount-grace = 5\n\
                 wait-for-unlock = 45\n[unlock]\ntypes = [\"luks\"]\n[limits]\ncleartexts = 5\n\
                 [all-users]\ncleartexts = 50\n",
            ),
            ("loopd.toml.d/30-c.toml~", "nonsense"),
            ("loopd.toml.d/.40-d.toml", "nonsense"),
        ]);
        let default = Settings::default();
        let expected = Settings {
            attachments: Limits { each: 3, ..default.attachments },
            partitions: Limits { each: 20, all: 200 },
            calls: Limits { each: 2, all: 9 },
            prompts: Limits { each: 0, ..default.prompts },
            cleartexts: Limits { each: 5, all: 50 },
            unlock_types: vec![EncryptionType::Luks],
            wait_for_unlock: Duration::from_secs(45),
            mounting: Policy { file_systems: vec!["ext4".to_owned()], programs: false },
            mount_grace: Duration::from_secs(5),
            idle_exit: Duration::ZERO,
            wait_for_udev: Duration::from_millis(500),
            ..Settings::default()
        };
        assert_eq!(source.read().unwrap().settings(), expected);
    }

    #[test]
    fn errors_have_line_and_column() {
        for (text, expected) in [
            ("[limits]\n  calls = 5\n  cals = 4\n", "loopd.toml:3:3: unknown field `cals`"),
            ("[limit]\n", "loopd.toml:1:2: unknown field `limit`"),
            ("[limits]\ncalls = 0\n", "loopd.toml:2:9: invalid value: integer `0`"),
            ("[all-users]\ncalls = 385\n", "loopd.toml:2:9: 385 is not a number from 1 to 384"),
            ("[limits]\ncalls = \"5\"\n", "loopd.toml:2:9: invalid type: string"),
            ("[limits]\nattachments = -1\n", "loopd.toml:2:15: invalid value: integer `-1`"),
            ("[limits]\nattachments = 1\nattachments = 2\n", "loopd.toml:3:1: duplicate key"),
            ("[times]\nidle-exit = -1\n", "loopd.toml:2:13: -1 is not a time"),
            ("[times]\nidle-exit = nan\n", "loopd.toml:2:13: NaN is not a time"),
            ("[times]\nidle-exit = 1e300\n", "loopd.toml:2:13: "),
            ("[mount]\nfilesystems = [\"ext4\", \"x,y\"]\n", "loopd.toml:2:15: \"x,y\" is not the name"),
            ("[mount]\nfilesystems = \"ext4\"\n", "loopd.toml:2:15: invalid type"),
            ("[mount]\nfilesystems = [\"\"]\n", "loopd.toml:2:15: \"\" is not the name"),
            ("[mount]\nexec = 1\n", "loopd.toml:2:8: invalid type"),
            (
                "[unlock]\ntypes = [\"luks\", \"plain\"]\n",
                "loopd.toml:2:9: \"plain\" is not one of the types luks,",
            ),
            ("[unlock]\ntypes = \"luks\"\n", "loopd.toml:2:9: invalid type"),
            ("[unlock]\ntype = []\n", "loopd.toml:2:1: unknown field"),
            ("[limits\n", "loopd.toml:1:"),
            ("\u{e9} = 1 2", "loopd.toml:1:"),
        ] {
            let error = read_error(text);
            assert!(error.starts_with(expected), "{text:?}: {error}");
            assert!(!error.contains('\n'), "{error:?}");
        }
    }

    #[test]
    fn an_invalid_file_leaves_the_last_valid_configuration() {
        let (directory, source) =
            source(&[("loopd.toml", "[limits]\nprompts = 7\n[times]\nidle-exit = 0.1\n")]);
        let good = source.read_or_last_good(directory.path()).unwrap();
        std::fs::write(directory.path().join("loopd.toml"), "[limits]\nprompts = 8\ncals = 1\n").unwrap();
        assert_eq!(source.read_or_last_good(directory.path()).unwrap(), good);
        assert!(source.read_and_save(directory.path()).is_err());
        std::fs::remove_file(directory.path().join(LAST_GOOD)).unwrap();
        assert!(
            source.read_or_last_good(directory.path()).unwrap_err().contains("loopd.toml:3:1: unknown field")
        );
    }

    #[test]
    fn a_check_names_the_files_or_the_error() {
        let (directory, source) = source(&[("loopd.toml.d/10-a.toml", "[limits]\ncalls = 3\n")]);
        let drop_in = directory.path().join("loopd.toml.d/10-a.toml");
        assert_eq!(source.check().unwrap(), format!("{}: ok\n", drop_in.display()));
        std::fs::write(&drop_in, "nonsense").unwrap();
        assert!(source.check().unwrap_err().contains("10-a.toml:1:"));
        std::fs::remove_file(&drop_in).unwrap();
        assert!(source.check().unwrap().contains("defaults"));
    }

    #[test]
    fn unreadable_files_are_errors() {
        let (directory, _) = source(&[]);
        let missing = Source::named(directory.path().join("other.toml"));
        assert!(missing.read().unwrap_err().contains("other.toml: cannot be read"));
        std::fs::write(directory.path().join("other.toml"), b"\xff").unwrap();
        assert!(missing.read().unwrap_err().contains("other.toml: cannot be read"));
        std::fs::create_dir(directory.path().join("loopd.toml.d/directory.toml")).unwrap();
        let unreadable = Source { file: directory.path().join("loopd.toml"), required: false };
        assert!(unreadable.read().unwrap_err().contains("directory.toml: cannot be read"));
    }

    #[test]
    fn the_example_has_every_key_with_its_default() {
        let example = Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/../../docs/loopd.toml"));
        let Config { limits, all_users, times, mount, unlock } = read(example).unwrap();
        let EachUser { attachments, partitions, mounts, cleartexts, calls, prompts } = limits;
        assert!(attachments.is_some() && mounts.is_some() && calls.is_some() && prompts.is_some());
        assert!(partitions.is_some() && cleartexts.is_some());
        let AllUsers { attachments, partitions, mounts, cleartexts, calls, prompts } = all_users;
        assert!(attachments.is_some() && mounts.is_some() && calls.is_some() && prompts.is_some());
        assert!(partitions.is_some() && cleartexts.is_some());
        let Times { idle_exit, wait_for_udev, wait_for_users, wait_for_mount, wait_for_unlock, mount_grace } =
            times;
        assert!(idle_exit.is_some() && wait_for_udev.is_some() && wait_for_users.is_some());
        assert!(wait_for_mount.is_some() && wait_for_unlock.is_some() && mount_grace.is_some());
        assert!(mount.filesystems.is_some() && mount.exec.is_some() && unlock.types.is_some());
        let source = Source::named(example.to_owned());
        assert_eq!(source.read().unwrap().settings(), Settings::default());
    }
}
