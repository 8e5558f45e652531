//! Chooses the file system and the options of a mount, or refuses it.
//!
//! An option of a caller is used only if it is on one of the lists here.

use loopd_common::text::printable;

use crate::error::Error;
use crate::kernel::FileSystem;
use crate::mounter::Account;
use crate::request::MountRequest;

/// The most bytes of the options: far more than any mount needs.
const LONGEST_OPTIONS: usize = 1024;
/// For every mount: no program in an image runs with its owner's rights, and no node in it is a device.
/// `umount.loopd` is the helper of umount for users (`mount(8)`, `uhelper`).
const ALWAYS: &str = "nosuid,nodev,uhelper=loopd";

/// The superblock of an ext file system has the action after an error, which may be `panic`.
const NO_PANIC: &str = "errors=remount-ro";

/// The administrator's rules for mounts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    /// The file systems that may be mounted, by the kernel's names.
    pub file_systems: Vec<String>,
    /// Whether programs on them may be executed.
    pub programs: bool,
}

impl Default for Policy {
    /// Common file systems whose drivers are maintained.
    fn default() -> Self {
        let common = [
            "ext2", "ext3", "ext4", "xfs", "btrfs", "vfat", "exfat", "ntfs3", "iso9660", "udf", "squashfs",
            "erofs",
        ];
        Self { file_systems: common.map(str::to_owned).to_vec(), programs: true }
    }
}

/// The properties of a volume on which the decision depends.
#[derive(Clone, Debug, Default)]
pub(super) struct PlannedVolume {
    /// The node and the backing file: `/dev/loop0 (/home/a/x.img)`.
    pub shown: String,
    pub file_system: FileSystem,
    pub read_only: bool,
    /// The nodes of its partitions.
    pub partitions: Vec<String>,
}

/// The decision how to mount a volume.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Plan {
    /// The kernel's name of the file system.
    pub kind: String,
    /// All the options.
    pub options: String,
    /// Whether the file system's journal need not be clean.
    pub skips_journal: bool,
}

impl Plan {
    pub fn new(
        volume: &PlannedVolume,
        wanted: &MountRequest,
        policy: &Policy,
        account: &Account,
    ) -> Result<Self, Error> {
        let kind = choose(volume, &wanted.filesystem, policy)?;
        let traits = Traits::of(&kind);
        let given = split(&wanted.options, volume)?;
        let has = |words: &[&str]| given.iter().any(|option| words.contains(option));
        let never_writable = if volume.read_only {
            Some("the device is read-only")
        } else {
            traits.is_read_only.then_some("the file system is never written to")
        };
        let read_only = wanted.read_only || never_writable.is_some() || has(&["ro"]);
        let mut options = vec![ALWAYS.to_owned()];
        options.extend(matches!(kind.as_str(), "ext2" | "ext3" | "ext4").then(|| NO_PANIC.to_owned()));
        options.extend(read_only.then(|| "ro".to_owned()));
        options.extend((!policy.programs).then(|| "noexec".to_owned()));
        options.extend(traits.own(account));
        let judge = Judge { kind: &kind, traits, read_only, never_writable, policy, account };
        for option in &given {
            judge.allow(option).map_err(|why| refused(volume, option, &why))?;
            match (*option, without_replay(&kind)) {
                ("ro", _) => {}
                // One name for all: each file system has its own.
                ("norecovery" | "noload", Some(own)) => options.push(own.to_owned()),
                _ => options.push((*option).to_owned()),
            }
        }
        // A read-only mount of a writable device would replay the journal, which writes to it.
        let replay = (read_only && !volume.read_only).then(|| without_replay(&kind)).flatten();
        let skips_journal = has(&["noload", "norecovery"]);
        options.extend(replay.filter(|_| !skips_journal).map(str::to_owned));
        Ok(Self { kind, options: options.join(","), skips_journal })
    }

    /// What may be wrong if the kernel refuses the mount.
    pub fn advice(&self, device_is_read_only: bool) -> String {
        let has = |word: &str| self.options.split(',').any(|option| option == word);
        let mut advice = vec![format!("is it damaged, or does this kernel not know {}?", self.kind)];
        if self.kind == "xfs" && !has("nouuid") {
            advice.push(
                "If the image is a copy of an xfs that is mounted, mount it with the option nouuid."
                    .to_owned(),
            );
        }
        if device_is_read_only && !self.skips_journal {
            let option = match without_replay(&self.kind) {
                Some(_) => "; the options ro and norecovery show what is there without it",
                None => "",
            };
            advice.push(format!(
                "Its journal may have to be replayed, which a read-only device does not allow{option}."
            ));
        }
        advice.join(" ") + " "
    }
}

/// The option that keeps a file system from replaying its journal.
fn without_replay(kind: &str) -> Option<&'static str> {
    match kind {
        "ext3" | "ext4" => Some("noload"),
        "xfs" => Some("norecovery"),
        "btrfs" => Some("rescue=nologreplay"),
        _ => None,
    }
}

fn choose(volume: &PlannedVolume, wanted: &str, policy: &Policy) -> Result<String, Error> {
    let FileSystem { usage, kind, .. } = &volume.file_system;
    if let Some(why) = not_a_file_system(usage, kind)
        && !is_half_of_a_mirror(volume, wanted)
    {
        return Err(not_supported(volume, why));
    }
    // The kernel's name; udev has another one.
    let found = if kind == "ntfs" { "ntfs3" } else { kind.as_str() };
    let chosen = if wanted.is_empty() { found } else { wanted };
    if chosen.is_empty() {
        return Err(not_supported(volume, &nothing_there(volume)));
    }
    if !policy.file_systems.iter().any(|allowed| allowed == chosen) {
        let allowed = policy.file_systems.join(", ");
        let chosen = printable(chosen.as_bytes());
        return Err(not_supported(
            volume,
            &format!(
                "the file system {chosen} is not among those that may be mounted here ({allowed}); an \
                 administrator can add it (filesystems in /etc/loopd/loopd.toml), or mount it as root"
            ),
        ));
    }
    Ok(chosen.to_owned())
}

/// Of a mirror with its metadata at the end (md 0.90 and 1.0) each half shows the whole file system. Writing to one
/// would make it differ from the other.
fn is_half_of_a_mirror(volume: &PlannedVolume, wanted: &str) -> bool {
    volume.read_only && !wanted.is_empty() && volume.file_system.kind == "linux_raid_member"
}

fn not_a_file_system(usage: &str, kind: &str) -> Option<&'static str> {
    Some(match (usage, kind) {
        ("crypto", "BitLocker") => {
            "it is encrypted with BitLocker; unlock it first (cryptsetup open --type bitlk)"
        }
        ("crypto", _) => "it is encrypted; unlock it first (cryptsetup open), and mount what that gives",
        (_, "swap" | "swsuspend") => "it is swap space, which has no files",
        (_, "LVM2_member") => {
            "it is a part of an LVM volume group; activate that (vgchange), and mount its volumes"
        }
        ("raid", "linux_raid_member") => {
            "it is a member of a RAID; assemble that first, and mount what it gives; one half of a mirror can be read \
             alone if it is attached read-only and its file system is named (option filesystem)"
        }
        ("raid", _) => "it is a member of a RAID; assemble that first, and mount what it gives",
        _ => return None,
    })
}

fn nothing_there(volume: &PlannedVolume) -> String {
    if volume.partitions.is_empty() {
        "there is no file system in it; name one (option filesystem) if you know better".to_owned()
    } else {
        format!("it has a partition table; mount one of its partitions: {}", volume.partitions.join(", "))
    }
}

fn not_supported(volume: &PlannedVolume, why: &str) -> Error {
    Error::NotSupported { operation: format!("mount {}", volume.shown), reason: why.to_owned() }
}

fn refused(volume: &PlannedVolume, option: &str, why: &str) -> Error {
    let option = if option.is_empty() { String::new() } else { printable(option.as_bytes()) };
    invalid(volume, format!("the mount option \"{option}\" {why}"))
}

fn invalid(volume: &PlannedVolume, reason: String) -> Error {
    Error::InvalidArgument { operation: format!("mount {}", volume.shown), reason }
}

fn split<'a>(options: &'a str, volume: &PlannedVolume) -> Result<Vec<&'a str>, Error> {
    if options.len() > LONGEST_OPTIONS {
        let why = format!("the mount options have {} bytes; {LONGEST_OPTIONS} are allowed", options.len());
        return Err(invalid(volume, why));
    }
    if options.is_empty() { Ok(Vec::new()) } else { Ok(options.split(',').collect()) }
}

/// The values that an option accepts.
#[derive(Clone, Copy)]
enum Value {
    /// No value.
    None,
    /// An octal mode.
    Octal,
    Decimal,
    /// Letters, digits, `-` and `_`.
    Word,
    /// The same, and `/`, `.` and `@`.
    Path,
    /// The caller's own uid.
    OwnUid,
    /// The caller's own gid.
    OwnGid,
}

type Known = (&'static str, Value);

/// For every file system.
const COMMON: &[Known] = &[
    ("ro", Value::None),
    ("rw", Value::None),
    ("nosuid", Value::None),
    ("nodev", Value::None),
    ("noexec", Value::None),
    ("exec", Value::None),
    ("atime", Value::None),
    ("noatime", Value::None),
    ("relatime", Value::None),
    ("strictatime", Value::None),
    ("nodiratime", Value::None),
    ("lazytime", Value::None),
    ("sync", Value::None),
    ("async", Value::None),
    ("dirsync", Value::None),
];
const OWNERS: &[Known] = &[("uid", Value::OwnUid), ("gid", Value::OwnGid)];
const MASKS: &[Known] = &[("umask", Value::Octal), ("fmask", Value::Octal), ("dmask", Value::Octal)];
const DISCARD: &[Known] = &[("discard", Value::None), ("nodiscard", Value::None)];
const VFAT: &[Known] = &[
    ("flush", Value::None),
    ("utf8", Value::None),
    ("utf8", Value::Decimal),
    ("codepage", Value::Decimal),
    ("iocharset", Value::Word),
    ("shortname", Value::Word),
    ("showexec", Value::None),
    ("tz", Value::Word),
];
const ISO9660: &[Known] = &[
    ("norock", Value::None),
    ("nojoliet", Value::None),
    ("utf8", Value::None),
    ("iocharset", Value::Word),
    ("map", Value::Word),
    ("mode", Value::Octal),
    ("dmode", Value::Octal),
    // A session of a disc that was written in several: where it starts, in sectors of 2048 bytes.
    ("sbsector", Value::Decimal),
    ("session", Value::Decimal),
];
const UDF: &[Known] =
    &[("iocharset", Value::Word), ("umask", Value::Octal), ("mode", Value::Octal), ("dmode", Value::Octal)];
const BTRFS: &[Known] = &[("subvol", Value::Path), ("subvolid", Value::Decimal), ("compress", Value::Word)];
const NTFS3: &[Known] = &[("iocharset", Value::Word), ("windows_names", Value::None)];
/// Without them a read-only mount would replay the journal, which writes to the device.
const JOURNALED: &[Known] = &[("noload", Value::None), ("norecovery", Value::None)];

/// The properties of a file system.
struct Traits {
    /// Its own options.
    known: &'static [&'static [Known]],
    /// The options that make it show names as UTF-8.
    defaults: &'static [&'static str],
    /// Whether the mount options set the owner of its files.
    takes_owner: bool,
    is_read_only: bool,
}

impl Traits {
    pub(super) fn of(kind: &str) -> Self {
        let is_read_only = matches!(kind, "iso9660" | "squashfs" | "erofs" | "cramfs" | "romfs");
        let with = |known, defaults| Self { known, defaults, takes_owner: true, is_read_only };
        let plain = |known| Self { known, defaults: &[], takes_owner: false, is_read_only };
        match kind {
            "vfat" | "msdos" => with(
                &[OWNERS, MASKS, DISCARD, VFAT],
                if kind == "vfat" { &["utf8", "shortname=mixed"] } else { &[] },
            ),
            "exfat" => with(&[OWNERS, MASKS, DISCARD, &[("iocharset", Value::Word)]], &["iocharset=utf8"]),
            "ntfs3" => with(&[OWNERS, MASKS, DISCARD, NTFS3], &["iocharset=utf8"]),
            "iso9660" => with(&[OWNERS, ISO9660], &["iocharset=utf8"]),
            "udf" => with(&[OWNERS, UDF], &["iocharset=utf8"]),
            "hfs" | "hfsplus" => with(&[OWNERS, &[("umask", Value::Octal)]], &[]),
            "ext2" | "f2fs" => plain(&[DISCARD]),
            "ext3" | "ext4" => plain(&[DISCARD, JOURNALED]),
            "xfs" => plain(&[DISCARD, &[("nouuid", Value::None)], JOURNALED]),
            "btrfs" => plain(&[DISCARD, BTRFS, JOURNALED]),
            _ => plain(&[]),
        }
    }

    fn own(&self, account: &Account) -> Vec<String> {
        let mut options: Vec<String> = self.defaults.iter().map(|option| (*option).to_owned()).collect();
        if self.takes_owner {
            options.push(format!("uid={}", account.uid));
            options.extend(account.gid.map(|gid| format!("gid={gid}")));
        }
        options
    }
}

/// Decides on one option.
struct Judge<'a> {
    kind: &'a str,
    traits: Traits,
    read_only: bool,
    /// Why it can never be mounted writable.
    never_writable: Option<&'static str>,
    policy: &'a Policy,
    account: &'a Account,
}

impl Judge<'_> {
    fn allow(&self, option: &str) -> Result<(), String> {
        if option.is_empty() {
            return Err("is empty".to_owned());
        }
        let (name, value) = match option.split_once('=') {
            Some((name, value)) => (name, Some(value)),
            None => (option, None),
        };
        match (option, self.never_writable) {
            ("rw", Some(why)) => return Err(format!("is not possible: {why}")),
            ("rw", _) if self.read_only => return Err("contradicts a read-only mount".to_owned()),
            ("exec", _) if !self.policy.programs => {
                return Err("is forbidden by the configuration".to_owned());
            }
            ("noload" | "norecovery", _) if !self.read_only => {
                return Err("needs a read-only mount".to_owned());
            }
            _ => {}
        }
        let known = || std::iter::once(&COMMON).chain(self.traits.known).flat_map(|list| list.iter());
        let mut named = known().filter(|(known, _)| *known == name).peekable();
        if named.peek().is_none() {
            let mut all: Vec<_> = known().map(|(known, _)| *known).collect();
            all.dedup();
            return Err(format!("is not allowed for {}; allowed are: {}", self.kind, all.join(", ")));
        }
        if named.any(|(_, expected)| self.fits(*expected, value)) {
            return Ok(());
        }
        Err(match name {
            "uid" => format!("is not the caller's uid {}", self.account.uid),
            "gid" => "is not the caller's primary group".to_owned(),
            _ => "has an invalid value".to_owned(),
        })
    }

    fn fits(&self, expected: Value, value: Option<&str>) -> bool {
        let Some(value) = value else { return matches!(expected, Value::None) };
        let consists = |longest: usize, good: fn(&u8) -> bool| {
            (1..=longest).contains(&value.len()) && value.as_bytes().iter().all(good)
        };
        let is = |id: u32| value == id.to_string();
        match expected {
            Value::None => false,
            Value::Octal => consists(4, |byte| (b'0'..=b'7').contains(byte)),
            Value::Decimal => consists(10, u8::is_ascii_digit),
            Value::Word => consists(32, |byte| byte.is_ascii_alphanumeric() || b"-_".contains(byte)),
            Value::Path => consists(255, |byte| byte.is_ascii_alphanumeric() || b"-_./@".contains(byte)),
            Value::OwnUid => is(self.account.uid),
            Value::OwnGid => self.account.gid.is_some_and(is),
        }
    }
}

#[cfg(test)]
mod tests {
    use loopd_common::ErrorKind;

    use super::*;

    fn volume(usage: &str, kind: &str) -> PlannedVolume {
        let (usage, kind) = (usage.to_owned(), kind.to_owned());
        PlannedVolume {
            shown: "/dev/loop0 (/x.img)".to_owned(),
            file_system: FileSystem { usage, kind, ..FileSystem::default() },
            ..PlannedVolume::default()
        }
    }

    fn alice() -> Account {
        Account { uid: 1000, gid: Some(100), name: "alice".to_owned() }
    }

    fn plan(kind: &str, options: &str) -> Result<Plan, Error> {
        let wanted = MountRequest { options: options.to_owned(), ..MountRequest::default() };
        Plan::new(&volume("filesystem", kind), &wanted, &Policy::default(), &alice())
    }

    fn complaint(kind: &str, options: &str) -> String {
        let error = plan(kind, options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidArgs, "{error}");
        error.to_string()
    }

    #[test]
    fn file_systems_without_owners_belong_to_the_caller() {
        for (kind, expected) in [
            ("ext2", "nosuid,nodev,uhelper=loopd,errors=remount-ro"),
            ("ext3", "nosuid,nodev,uhelper=loopd,errors=remount-ro"),
            ("ext4", "nosuid,nodev,uhelper=loopd,errors=remount-ro"),
            ("xfs", "nosuid,nodev,uhelper=loopd"),
            ("vfat", "nosuid,nodev,uhelper=loopd,utf8,shortname=mixed,uid=1000,gid=100"),
            ("iso9660", "nosuid,nodev,uhelper=loopd,ro,iocharset=utf8,uid=1000,gid=100"),
            ("squashfs", "nosuid,nodev,uhelper=loopd,ro"),
        ] {
            let plan = plan(kind, "").unwrap();
            assert_eq!((plan.kind.as_str(), plan.options.as_str()), (kind, expected));
        }
        let nobody = Account { gid: None, ..alice() };
        let plan =
            Plan::new(&volume("filesystem", "ntfs"), &MountRequest::default(), &Policy::default(), &nobody);
        let plan = plan.unwrap();
        assert_eq!(plan.kind, "ntfs3");
        assert!(plan.options.ends_with(",uid=1000"), "{plan:?}");
    }

    #[test]
    fn allowed_options_are_added() {
        for (kind, options) in [
            ("ext4", "noexec,noatime"),
            ("ext4", "ro,noload"),
            ("vfat", "fmask=0133,dmask=0022,uid=1000,gid=100,iocharset=iso8859-15,codepage=850,utf8=0,flush"),
            ("iso9660", "norock,nojoliet,mode=0400,dmode=500"),
            ("iso9660", "sbsector=123456,session=2"),
            ("btrfs", "subvol=@home/a.b,subvolid=5,compress=zstd,discard"),
            ("xfs", "nouuid"),
        ] {
            let plan = plan(kind, options).unwrap();
            let added = options.strip_prefix("ro,").unwrap_or(options);
            assert!(plan.options.ends_with(&format!(",{added}")), "{plan:?}");
            assert_eq!(plan.skips_journal, options.contains("noload"));
        }
    }

    #[test]
    fn other_options_are_refused_by_name() {
        for (kind, options, named) in [
            ("ext4", "suid", "\"suid\" is not allowed for ext4; allowed are: ro, rw,"),
            ("ext4", "dev", "\"dev\" is not"),
            ("ext4", "noatime,suid", "\"suid\" is not"),
            ("ext4", "x,suid", "\"x\" is not"),
            ("ext4", "uid=1000", "\"uid=1000\" is not"),
            ("ext4", "errors=continue", "\"errors=continue\" is not"),
            ("ext4", "journal_path=/dev/sda3", "\"journal_path=/dev/sda3\" is not"),
            ("ext4", "sb=8193", "\"sb=8193\" is not"),
            ("xfs", "logdev=/dev/sda3", "\"logdev=/dev/sda3\" is not"),
            ("xfs", "rtdev=/dev/sda3", "\"rtdev=/dev/sda3\" is not"),
            ("btrfs", "device=/dev/sda3", "\"device=/dev/sda3\" is not"),
            ("btrfs", "fatal_errors=panic", "\"fatal_errors=panic\" is not"),
            ("erofs", "device=/dev/sda3", "\"device=/dev/sda3\" is not"),
            ("erofs", "fsid=x", "\"fsid=x\" is not"),
            ("ext4", "loop", "\"loop\" is not"),
            ("ext4", "offset=512", "\"offset=512\" is not"),
            ("ext4", "x-systemd.automount", "\"x-systemd.automount\" is not"),
            ("ext4", "uhelper=evil", "\"uhelper=evil\" is not"),
            ("ext4", "helper=evil", "\"helper=evil\" is not"),
            ("ext4", "bind", "\"bind\" is not"),
            ("ext4", "remount", "\"remount\" is not"),
            ("ext4", "user", "\"user\" is not"),
            ("ext4", "context=x", "\"context=x\" is not"),
            ("ext4", "noload", "\"noload\" needs a read-only mount"),
            ("ext4", ",", "\"\" is empty"),
            ("ext4", "ro,", "is empty"),
            ("ext4", "ro=1", "\"ro=1\" has an invalid value"),
            ("ext4", "ro ", "\"ro \" is not"),
            ("ext4", "RO", "\"RO\" is not"),
            ("vfat", "uid=0", "\"uid=0\" is not the caller's uid 1000"),
            ("vfat", "uid=01000", "\"uid=01000\" is not the caller's uid"),
            ("vfat", "gid=0", "\"gid=0\" is not the caller's primary group"),
            ("vfat", "fmask=9", "\"fmask=9\" has an invalid value"),
            ("vfat", "fmask=", "\"fmask=\" has an invalid value"),
            ("vfat", "fmask=00000", "has an invalid value"),
            ("vfat", "iocharset=\"a\"", "has an invalid value"),
            ("vfat", "iocharset=a\\,suid", "has an invalid value"),
            ("vfat", "iocharset='a", "has an invalid value"),
            ("vfat", "codepage=-1", "has an invalid value"),
            ("vfat", "umask=022\n", "has an invalid value"),
            ("btrfs", "subvol=a b", "has an invalid value"),
            ("ext4", "\"noatime\"", "\"\"noatime\"\" is not"),
            ("ext4", "no\natime", "\"no\\natime\" is not"),
        ] {
            let complaint = complaint(kind, options);
            assert!(
                complaint.starts_with("cannot mount /dev/loop0 (/x.img): the mount option "),
                "{complaint}"
            );
            assert!(complaint.contains(named), "{options:?}: {complaint}");
        }
        assert!(complaint("ext4", &"noatime,".repeat(200)).contains("1600 bytes; 1024 are allowed"));
    }

    #[test]
    fn the_option_errors_panic_is_refused() {
        let any = [
            "hfs", "hfsplus", "f2fs", "jfs", "minix", "nilfs2", "reiserfs", "ufs", "cramfs", "romfs", "msdos",
        ];
        let mut policy = Policy::default();
        policy.file_systems.extend(any.map(str::to_owned));
        for kind in &policy.file_systems {
            for options in
                ["errors=panic", "onerror=panic", "ro,errors=panic", "errors=remount-ro,errors=panic"]
            {
                let wanted = MountRequest { options: options.to_owned(), ..MountRequest::default() };
                let error = Plan::new(&volume("filesystem", kind), &wanted, &policy, &alice()).unwrap_err();
                assert_eq!(error.kind(), ErrorKind::InvalidArgs, "{kind} {options}");
            }
        }
    }

    #[test]
    fn a_read_only_device_is_mounted_read_only() {
        let read_only = PlannedVolume { read_only: true, ..volume("filesystem", "ext4") };
        let with = |options: &str| {
            let wanted = MountRequest { options: options.to_owned(), ..MountRequest::default() };
            Plan::new(&read_only, &wanted, &Policy::default(), &alice())
        };
        assert!(with("").unwrap().options.ends_with(",ro"));
        assert!(with("noload").unwrap().skips_journal);
        assert!(with("rw").unwrap_err().to_string().contains("the device is read-only"));
        let wanted = MountRequest { read_only: true, options: "rw".to_owned(), ..MountRequest::default() };
        let both = Plan::new(&volume("filesystem", "ext4"), &wanted, &Policy::default(), &alice());
        assert!(both.unwrap_err().to_string().contains("contradicts"));
        assert!(complaint("iso9660", "rw").contains("never written to"));
        assert!(plan("ext4", "rw").is_ok());
    }

    #[test]
    fn executing_programs_can_be_forbidden() {
        let policy = Policy { programs: false, ..Policy::default() };
        let with = |options: &str| {
            let wanted = MountRequest { options: options.to_owned(), ..MountRequest::default() };
            Plan::new(&volume("filesystem", "ext4"), &wanted, &policy, &alice())
        };
        assert!(with("").unwrap().options.ends_with(",noexec"));
        assert!(with("exec").unwrap_err().to_string().contains("forbidden by the configuration"));
        assert!(plan("ext4", "exec").is_ok());
    }

    #[test]
    fn a_read_only_mount_of_a_writable_device_replays_no_journal() {
        let options = |kind: &str, on_read_only: bool, wanted: &str| {
            let volume = PlannedVolume { read_only: on_read_only, ..volume("filesystem", kind) };
            let wanted =
                MountRequest { options: wanted.to_owned(), read_only: true, ..MountRequest::default() };
            Plan::new(&volume, &wanted, &Policy::default(), &alice()).unwrap().options
        };
        for (kind, expected) in [
            ("ext2", ""),
            ("ext3", "noload"),
            ("ext4", "noload"),
            ("xfs", "norecovery"),
            ("btrfs", "rescue=nologreplay"),
        ] {
            let made: Vec<_> = ["noload", "norecovery", "rescue=nologreplay"]
                .iter()
                .filter(|one| options(kind, false, "").contains(**one))
                .collect();
            assert_eq!(
                made,
                Some(&expected).iter().copied().filter(|one| !one.is_empty()).collect::<Vec<_>>()
            );
            assert!(
                expected.is_empty() || !options(kind, true, "").contains(expected),
                "the device refuses writes"
            );
        }
        assert_eq!(options("ext4", false, "noload").matches("noload").count(), 1);
    }

    #[test]
    fn volumes_without_a_file_system_are_explained() {
        let partitioned = PlannedVolume { partitions: vec!["/dev/loop0p1".to_owned()], ..volume("", "") };
        for (volume, wanted, expected) in [
            (volume("crypto", "crypto_LUKS"), "", "it is encrypted"),
            (volume("crypto", "crypto_LUKS"), "ext4", "it is encrypted"),
            (volume("crypto", "BitLocker"), "", "BitLocker"),
            (volume("other", "swap"), "ext4", "it is swap space"),
            (volume("raid", "LVM2_member"), "", "LVM"),
            (volume("raid", "linux_raid_member"), "", "RAID"),
            (volume("", ""), "", "no file system"),
            (partitioned, "", "mount one of its partitions: /dev/loop0p1"),
            (volume("filesystem", "hfsplus"), "", "the file system hfsplus is not among those"),
            (volume("filesystem", "ext4"), "nfs", "the file system nfs is not among"),
            (volume("filesystem", "ext4"), "ext4,suid", "is not among"),
            (volume("filesystem", "ext4"), "ext4\n", "the file system ext4\\n is not among"),
        ] {
            let wanted = MountRequest { filesystem: wanted.to_owned(), ..MountRequest::default() };
            let error = Plan::new(&volume, &wanted, &Policy::default(), &alice()).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::NotSupported);
            assert!(error.to_string().contains(expected), "{error}");
        }
        let wanted = MountRequest { filesystem: "vfat".to_owned(), ..MountRequest::default() };
        let other = Plan::new(&volume("filesystem", "ext4"), &wanted, &Policy::default(), &alice()).unwrap();
        assert_eq!(other.kind, "vfat");
        assert!(other.options.contains("uid=1000"));
    }
}
