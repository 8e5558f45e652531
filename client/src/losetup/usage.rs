//! losetup's help and version.

use super::column;

/// The version of util-linux whose losetup this one answers as.
const UTIL_LINUX: &str = "2.42";

const FORMS: &str = "\
losetup over the bus: loopd attaches and detaches, and polkit decides who may.

Usage:
  losetup [-l] [-a | LOOPDEV | -j FILE [-o N]]    show loop devices
  losetup [options] -f | LOOPDEV FILE             attach FILE to a free loop device, or to LOOPDEV
  losetup -f                                      name a free loop device
  losetup -d LOOPDEV...                           detach
  losetup -c | -b N | --direct-io[=on|off] LOOPDEV
                                                  change a loop device

What to do:
  -a, --all                  show all loop devices in use, one a line
  -l, --list                 show them as a table; this is the default
  -j, --associated FILE      show the loop devices that FILE is attached to
  -f, --find                 take a free loop device
  -d, --detach               detach; a device in use goes at its last close
  -D, --detach-all           detach every loop device
      --remove               take away the nodes of free loop devices
  -c, --set-capacity         read the size of the backing file again

How to attach:
  -o, --offset N             start N bytes into the file
      --sizelimit N          use at most N bytes of it
  -b, --sector-size N        logical block size; without a FILE, change it
  -P, --partscan             make the partitions' nodes
  -r, --read-only            make the device read-only
      --direct-io[=on|off]   bypass the page cache of the file; without a FILE, change it
      --loop-ref TEXT        reference, in place of the file's path
  -L, --nooverlap            do not attach what is attached already; with -f, give that device back
      --show                 print the device

How to show:
  -O, --output COLUMN,...    columns of the table; with a + in front, beside the usual ones
      --output-all           all columns
  -n, --noheadings           no header
      --raw                  without alignment, blanks escaped
  -J, --json                 as JSON

  -h, --help                 this text
  -V, --version              the version

N is a number of bytes; K, M, G and so on, also KiB, are powers of 1024, and KB powers of 1000.

Columns:
";

/// The help.
#[must_use]
pub fn help() -> String {
    let columns = column::ALL.iter().map(|column| format!("  {:12}  {}\n", column.header(), column.help()));
    let end = "\nloopctl-losetup(1) tells what differs from losetup(8).\n";
    FORMS.to_owned() + &columns.collect::<String>() + end
}

/// The version. Scripts look for the words `util-linux` and a number.
#[must_use]
pub fn version() -> String {
    format!("losetup of loopd {}, as losetup from util-linux {UTIL_LINUX}\n", env!("CARGO_PKG_VERSION"))
}
