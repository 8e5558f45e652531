//! The texts of losetup's help, version and manual page.

use super::column;
use super::options::Name;

/// The version of util-linux whose losetup this one is compatible with.
const UTIL_LINUX: &str = "2.42";

/// The forms of the command line, with what each does.
pub const FORMS: &[(&str, &str)] = &[
    ("losetup [-l] [-a | LOOPDEV | -j FILE [-o N]]", "list loop devices"),
    ("losetup [OPTION]... -f | LOOPDEV FILE", "attach FILE to a free loop device, or to LOOPDEV"),
    ("losetup -f", "print a free loop device"),
    ("losetup -d LOOPDEV...", "detach"),
    ("losetup -c | -b N | --direct-io[=on|off] LOOPDEV", "change a loop device"),
    ("losetup --remove LOOPDEV...", "remove the nodes of free loop devices"),
];

/// The options in the groups of the help.
const GROUPS: &[(&str, &[Name])] = &[
    (
        "Operations",
        &[
            Name::All,
            Name::List,
            Name::Associated,
            Name::Find,
            Name::Detach,
            Name::DetachAll,
            Name::Remove,
            Name::SetCapacity,
        ],
    ),
    (
        "Attach options",
        &[
            Name::Offset,
            Name::SizeLimit,
            Name::SectorSize,
            Name::PartScan,
            Name::ReadOnly,
            Name::DirectIo,
            Name::LoopRef,
            Name::NoOverlap,
            Name::Show,
        ],
    ),
    ("Output options", &[Name::Output, Name::OutputAll, Name::NoHeadings, Name::Raw, Name::Json]),
    ("Other", &[Name::Verbose, Name::Help, Name::Version]),
];

/// The options in groups, each in the form of the help with what it does.
pub fn options() -> impl Iterator<Item = (&'static str, Vec<(String, &'static str)>)> {
    GROUPS.iter().map(|(group, names)| (*group, names.iter().map(|name| name.usage()).collect()))
}

/// The description in the manual page.
pub const DESCRIPTION: &str = "`loopctl losetup`, and loopctl itself if it is started under the name losetup, accepts the \
    arguments of losetup(8) from util-linux 2.42, prints the same output and exits with the same status. Scripts that \
    call losetup then work for users other than root, as far as polkit authorizes them. `make install` creates a link \
    of that name in the directory LIBEXECDIR/loopctl; to use it, put this directory first in PATH. Attached devices \
    stay until they are detached.";

/// The exit status.
pub const STATUS: &str = "0 on success, and if a device in use will be detached by its last close; 1 on failure, and if \
    LOOPDEV is to be listed and is not in use.";

/// The format of numbers.
pub const NUMBERS: &str = "N is a number of bytes, also as 0x200 or 01000 (octal). K, M, G, T, P, E and KiB, MiB and \
    so on are powers of 1024, KB, MB and so on powers of 1000; fractions such as 1.5M are accepted.";

/// The intended differences from util-linux's losetup.
pub const DIFFERENCES: &[&str] = &[
    "It calls loopd over the system bus, and never opens a loop device or /dev/loop-control itself: no descriptor \
     of a loop device leaves the daemon. Any user may run it, and polkit authorizes each request. A refused request \
     has the error that losetup prints for a user without privileges. Listings are the same for every user.",
    "The warning for a file that does not end at a sector boundary includes the number of bytes that are not on \
     the device. There is also a warning for an offset past the end of the file.",
    "If -d or -D leaves a device in use, the exit status is 0 and the last close detaches it, as with losetup; in \
     addition a message on standard error names the user: mount points, holder devices, or \"opened by a process\".",
    "A device that was created to attach a file to it is removed when the file is detached.",
    "An attach returns after udev has processed the device and its partitions. If another process takes the free \
     device first, -f uses another one, without waiting.",
    "loopd attaches no empty device: the file, the size limit and the part after the offset must have at least \
     512 bytes. losetup warns in some of these cases.",
    "-L returns a device that another program has attached only if its file belongs to root and no other user may \
     write to it; losetup returns any.",
    "--direct-io fails if the backing file does not support it; losetup attaches the file without it.",
    "A block size of more than 32 bits is rejected; losetup uses its lower 32 bits.",
    "A reference is cut at the first byte that is not UTF-8.",
    "The options -e, -E, -k, -N and -p, and --encryption, --keybits, --nohashpass and --pass-fd, of old versions \
     fail with a message that the kernel dropped cryptoloop in Linux 5.16 and what replaces it. -v, which 2.42 dropped, is accepted.",
    "The texts of --help and --version differ. Messages are in English in every locale.",
    "Tables are not cut to the terminal's width. LOOPDEV_DEBUG and the variables of libsmartcols have no effect.",
];

/// The help.
#[must_use]
pub fn help() -> String {
    let mut text =
        "losetup over D-Bus: loopd attaches and detaches, polkit authorizes.\n\nUsage:\n".to_owned();
    for (form, what) in FORMS {
        text.push_str(&format!("  {form:50} {what}\n"));
    }
    for (group, options) in options() {
        text.push_str(&format!("\n{group}:\n"));
        text.extend(options.iter().map(|(flags, what)| format!("  {flags:26} {what}\n")));
    }
    text.push_str(&format!("\n{NUMBERS}\n\nColumns:\n"));
    text.extend(column::ALL.iter().map(|column| format!("  {:12}  {}\n", column.header(), column.help())));
    text + "\nloopctl-losetup(1) lists the differences from losetup(8).\n"
}

/// The columns' headers and descriptions.
pub fn columns() -> impl Iterator<Item = (&'static str, &'static str)> {
    column::ALL.iter().map(|column| (column.header(), column.help()))
}

/// The version. Scripts search it for `util-linux` and a number.
#[must_use]
pub fn version() -> String {
    format!("losetup of loopd {}, as losetup from util-linux {UTIL_LINUX}\n", env!("CARGO_PKG_VERSION"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::losetup::options;

    #[test]
    fn the_help_lists_every_option_once() {
        let help = help();
        for name in options::all() {
            let groups = GROUPS.iter().flat_map(|(_, names)| *names);
            assert_eq!(groups.filter(|other| **other == name).count(), 1, "{name:?}");
            let (flags, _) = name.usage();
            assert!(help.contains(&flags), "{flags} is missing in\n{help}");
        }
        assert!(help.contains("  -o, --offset N             start at offset N in the file\n"), "{help}");
        assert!(help.contains("      --direct-io[=on|off]   bypass"), "{help}");
        assert!(help.contains("BACK-MAJ:MIN  "));
    }
}
