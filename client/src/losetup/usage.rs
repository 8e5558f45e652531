//! losetup's help and version, and what its manual page says: one definition for both.

use super::column;

/// The version of util-linux whose losetup this one answers as.
const UTIL_LINUX: &str = "2.42";

/// A way to call it, and what that does.
pub const FORMS: &[(&str, &str)] = &[
    ("losetup [-l] [-a | LOOPDEV | -j FILE [-o N]]", "show loop devices"),
    ("losetup [OPTION]... -f | LOOPDEV FILE", "attach FILE to a free loop device, or to LOOPDEV"),
    ("losetup -f", "name a free loop device"),
    ("losetup -d LOOPDEV...", "detach"),
    ("losetup -c | -b N | --direct-io[=on|off] LOOPDEV", "change a loop device"),
    ("losetup --remove LOOPDEV...", "take away the nodes of free loop devices"),
];

/// The options in groups, each with what it does.
pub const OPTIONS: &[(&str, &[(&str, &str)])] = &[
    (
        "What to do",
        &[
            ("-a, --all", "show all loop devices in use, one a line"),
            ("-l, --list", "show them as a table; this is the default"),
            ("-j, --associated FILE", "show the loop devices that FILE is attached to"),
            ("-f, --find", "take a free loop device"),
            ("-d, --detach", "detach; a device in use goes at its last close"),
            ("-D, --detach-all", "detach every loop device"),
            ("    --remove", "take away the nodes of free loop devices"),
            ("-c, --set-capacity", "read the size of the backing file again"),
        ],
    ),
    (
        "How to attach",
        &[
            ("-o, --offset N", "start N bytes into the file"),
            ("    --sizelimit N", "use at most N bytes of it"),
            ("-b, --sector-size N", "logical block size; without FILE, change it"),
            ("-P, --partscan", "make the partitions' nodes"),
            ("-r, --read-only", "make the device read-only"),
            ("    --direct-io[=on|off]", "bypass the page cache of the file; without FILE, change it"),
            ("    --loop-ref TEXT", "reference, in place of the file's path"),
            ("-L, --nooverlap", "attach nothing twice; with -f, give back the device that has it"),
            ("    --show", "print the device"),
        ],
    ),
    (
        "How to show",
        &[
            ("-O, --output COLUMN,...", "columns of the table; with a + in front, beside the usual ones"),
            ("    --output-all", "all columns"),
            ("-n, --noheadings", "no header"),
            ("    --raw", "without alignment, blanks escaped"),
            ("-J, --json", "as JSON"),
        ],
    ),
    (
        "Other",
        &[
            ("-v, --verbose", "accepted and without effect"),
            ("-h, --help", "print a short help"),
            ("-V, --version", "print the version"),
        ],
    ),
];

/// What it is.
pub const DESCRIPTION: &str = "`loopctl losetup`, and loopctl itself where it is started under the name losetup, takes \
    the arguments of losetup(8) from util-linux 2.42, prints what that prints and ends with the same status. Scripts \
    that call losetup then work for users who are not root, as far as polkit lets them. `make install` puts a link of \
    that name into a folder of its own, LIBEXECDIR/loopctl, to be put into PATH in front of the system's where that \
    is wanted. Devices that it attaches stay until they are detached.";

/// What the exit status tells.
pub const STATUS: &str = "0 where all was done, and where a device in use was left to be detached by its last close; \
    1 where something failed, also where LOOPDEV, which was to be shown, is not in use.";

/// How numbers are written.
pub const NUMBERS: &str = "N is a number of bytes, also as 0x200 or 01000 (octal). K, M, G, T, P, E and KiB, MiB and \
    so on are powers of 1024, KB, MB and so on powers of 1000; fractions such as 1.5M are taken.";

/// What is meant to differ from util-linux's losetup.
pub const DIFFERENCES: &[&str] = &[
    "It asks loopd, over the system bus, and never opens a loop device or /dev/loop-control itself: no descriptor \
     of a loop device leaves the daemon. Any user may run it, and polkit decides. What polkit refuses is answered \
     as losetup answers a user without rights. What a listing shows, it shows to every user.",
    "A warning of a file that does not end with a sector also says how many bytes of it are not on the device. An \
     offset past the end of the file is warned of, too.",
    "Where -d or -D leaves a device in use, the exit status is 0 as well, and the last close detaches it; but a \
     message on standard error says who uses it: the mount points, the devices that stand on it, or \"opened by \
     a process\".",
    "A device that was not there and was made to attach a file to it goes again when that is detached.",
    "A setup is back when udev has processed the device and its partitions. A -f that finds its device taken by \
     another process takes another, without waiting.",
    "loopd attaches nothing that would give an empty device, so a file, a size limit, or what is behind the offset \
     must have 512 bytes at least; and the offset must be a multiple of 512. losetup warns of some of these.",
    "-L gives back a device that another program has attached only if its file is root's and nobody else may write to \
     it; losetup gives back any.",
    "--direct-io fails where the backing file cannot do it; losetup attaches the file without it.",
    "A block size of more than 32 bits is refused; losetup takes the lower 32 bits of it.",
    "Of a reference that is not UTF-8, what comes before the first other byte is kept.",
    "The options -e, -E, -k, -N and -p, and --encryption, --keybits, --nohashpass and --pass-fd, of old versions \
     say that the kernel dropped cryptoloop in Linux 5.16, and what to use today. -v, which 2.42 dropped, is accepted.",
    "--help and --version have words of their own. Messages are in English in every locale.",
    "A table is not narrowed to the terminal's width. LOOPDEV_DEBUG and the variables of libsmartcols have no effect.",
];

/// The help.
#[must_use]
pub fn help() -> String {
    let mut text =
        "losetup over the bus: loopd attaches and detaches, polkit decides who may.\n\nUsage:\n".to_owned();
    for (form, what) in FORMS {
        text.push_str(&format!("  {form:50} {what}\n"));
    }
    for (group, options) in OPTIONS {
        text.push_str(&format!("\n{group}:\n"));
        text.extend(options.iter().map(|(flags, what)| format!("  {flags:26} {what}\n")));
    }
    text.push_str(&format!("\n{NUMBERS}\n\nColumns:\n"));
    text.extend(column::ALL.iter().map(|column| format!("  {:12}  {}\n", column.header(), column.help())));
    text + "\nloopctl-losetup(1) tells what differs from losetup(8).\n"
}

/// The columns' headers, each with what the column shows.
pub fn columns() -> impl Iterator<Item = (&'static str, &'static str)> {
    column::ALL.iter().map(|column| (column.header(), column.help()))
}

/// The version. Scripts look for the words `util-linux` and a number.
#[must_use]
pub fn version() -> String {
    format!("losetup of loopd {}, as losetup from util-linux {UTIL_LINUX}\n", env!("CARGO_PKG_VERSION"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::losetup::options;

    #[test]
    fn the_help_has_every_option() {
        let help = help();
        for flags in options::all() {
            assert!(help.contains(&flags), "{flags} is missing in\n{help}");
        }
        assert!(help.contains("BACK-MAJ:MIN  "));
    }
}
