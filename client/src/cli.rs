//! The command line's definition: what there is to say, not what is done about it.

use std::ffi::OsString;
use std::path::PathBuf;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use loopd_dbus::{Lifetime, Overlap};

use crate::{size, target};

const EXAMPLES: &str = "\
EXAMPLES
  See the files in an image, and put everything back:
    $ loopctl mount disk.img
    /run/media/alice/holiday
    $ loopctl unmount disk.img

  Attach an image without mounting it, and detach it when done:
    $ loopctl attach disk.img
    /dev/loop0
    $ loopctl detach disk.img

  Check the file system in an image; the device is gone when fsck is:
    $ loopctl run disk.img -- fsck.ext4 -f {}

  See every loop device of the machine:
    $ loopctl list --all

EXIT STATUS
  0 it is done, 1 it failed, 2 the arguments are wrong. `run` exits with the status of its command.";

const ATTACH_EXAMPLES: &str = "\
EXAMPLES
  Attach an image and keep the device node:
    $ device=$(loopctl attach disk.img)

  Attach the 512 MiB that start 1 MiB into the file, read-only:
    $ loopctl attach -r -o 1M --size-limit 512M disk.img

SIZES
  N is a number of bytes, or has a suffix: K, M, G, T, P, E (also KiB, MiB, …) are powers of 1024; \
KB, MB, GB, TB, PB, EB are powers of 1000.";

const RUN_EXAMPLES: &str = "\
EXAMPLES
  Make a file system; {} is the device:
    $ loopctl run disk.img -- mkfs.ext4 {}

  Look at the partitions, with the device taken from the environment:
    $ loopctl run -r disk.img -- sh -c 'fdisk -l \"$LOOPCTL_DEVICE\"'

  See what a repair would come to, and leave the image as it is:
    $ loopctl run --throwaway disk.img -- fsck.ext4 -fy {}

EXIT STATUS
  That of COMMAND; 128 and the signal's number where a signal ended it; 126 where it cannot be executed and 127 where \
it is not found. 1 where the file could not be attached: COMMAND did not run then. 2 where the arguments are wrong.

SIZES
  N is a number of bytes, or has a suffix: K, M, G, T, P, E (also KiB, MiB, …) are powers of 1024; \
KB, MB, GB, TB, PB, EB are powers of 1000.";

const LIST_EXAMPLES: &str = "\
EXAMPLES
  The partitions, with what their table says of them:
    $ loopctl list -o device,start,size,parttype,partlabel

  The devices and files, for a script:
    $ loopctl list --json | jq -r '.[] | [.device, .backing_file] | @tsv'

  The devices and partitions that hold an ext4 file system:
    $ loopctl list --json | jq -r '.. | select(.filesystem?.type == \"ext4\").device'";

const MOUNT_EXAMPLES: &str = "\
EXAMPLES
  Look into an image, and put everything back:
    $ cd \"$(loopctl mount -r cd.iso)\"
    $ cd - && loopctl unmount cd.iso

  Mount the second partition of an image:
    $ loopctl mount -p 2 disk.img

  Try something out on an image that must stay as it is:
    $ loopctl mount --throwaway disk.img";

const UNMOUNT_EXAMPLES: &str = "\
EXAMPLES
  By the image, by the device, or by the mount point:
    $ loopctl unmount disk.img
    $ loopctl unmount loop3
    $ loopctl unmount /run/media/alice/holiday";

const INFO_EXAMPLES: &str = "\
EXAMPLES
  One partition, named by its node:
    $ loopctl info loop3p1";

const RESIZE_EXAMPLES: &str = "\
EXAMPLES
  Make an image larger, and its device and file system with it:
    $ truncate -s 2G disk.img
    $ loopctl resize disk.img
    $ sudo resize2fs /dev/loop3";

const SET_EXAMPLES: &str = "\
EXAMPLES
  Have the device detached with its last unmount, and bypass the page cache until then:
    $ loopctl set loop3 --lifetime mount --direct-io on

SIZES
  N is a number of bytes, or has a suffix: K (or KiB) is 1024 bytes, KB 1000.";

const RESCAN_EXAMPLES: &str = "\
EXAMPLES
  Write a partition table into the image, and have its partitions made:
    $ sfdisk --no-reread --no-tell-kernel disk.img < table
    $ loopctl rescan disk.img";

/// Over the options of throwaway views.
const THROWAWAY: &str = "Throwaway views";
/// Over the options for menus.
const DESKTOP: &str = "On a desktop";

/// Environment variables, for the manual page.
pub const ENVIRONMENT: &[(&str, &str)] = &[
    ("NO_COLOR", "Where it is set and not empty, nothing is printed in colours or bold letters."),
    ("LOOPCTL_DEVICE", "The device node, for the command of `loopctl run`."),
    ("DBUS_SYSTEM_BUS_ADDRESS", "The address of the system bus, where it is not the usual one."),
];

/// Attach, list and detach loop devices through loopd.
///
/// A loop device makes a regular file (the backing file) usable as a block device. loopctl asks the
/// daemon loopd for it over the system bus; loopd decides with polkit who may do what, so that no
/// root rights are needed for one's own files.
#[derive(Debug, Parser)]
#[command(name = "loopctl", version, max_term_width = 100, after_help = EXAMPLES)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    /// What holds for every verb.
    #[command(flatten)]
    pub global: Global,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// Options that every verb takes.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Never prompt for authorization.
    ///
    /// A request that would need a password then fails. Without this option a text prompt is
    /// offered where loopctl runs on a terminal and no graphical agent is there.
    #[arg(long, global = true)]
    pub no_ask_password: bool,
    /// Print without colours and bold letters.
    ///
    /// The environment variable NO_COLOR does the same when it is set and not empty.
    #[arg(long, global = true)]
    pub no_color: bool,
}

/// The verbs.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Attach a file to a free loop device and print the device node.
    ///
    /// loopctl opens FILE with your own rights; loopd never reads a file that you may not read. A
    /// file that you may not write to gives a read-only device. The device stays until it is
    /// detached, unless --lifetime says otherwise.
    ///
    /// The partitions of an image get nodes of their own: /dev/loop3p1 is the first one of
    /// /dev/loop3.
    #[command(after_help = ATTACH_EXAMPLES)]
    Attach(Attach),
    /// Detach loop devices.
    ///
    /// Without --lazy a device that is in use is left as it is, and the message names what holds
    /// it. When the command succeeds the device really is free. Partitions go with their device.
    #[command(override_usage = "loopctl detach [OPTIONS] <TARGET>...\n       loopctl detach [OPTIONS] --all")]
    Detach(Detach),
    /// List the loop devices and their partitions.
    ///
    /// Without --all these are the devices that loopd attached. Where there is none, nothing is
    /// printed. Partitions stand below their device; a column that says nothing of them has a -
    /// there.
    #[command(after_help = LIST_EXAMPLES)]
    List(List),
    /// Show every property of a loop device.
    ///
    /// For a backing file that is attached more than once, each of its devices is shown. The
    /// properties of the partitions stand below those of their device.
    #[command(after_help = INFO_EXAMPLES)]
    Info(Info),
    /// Mount the file system in an image and print the mount point.
    ///
    /// A file that is not attached yet is attached, and detached again with its last unmount, by
    /// whomever: `loopctl unmount`, umount(8), or the file manager. One that you have attached
    /// already is not attached once more, unless it is read-only and you want to write.
    ///
    /// The mount point is below /run/media/USER and has the name of the file system's label. What
    /// is mounted already is not mounted again: its mount point is printed. Of several partitions
    /// with file systems --partition chooses; without it loopctl lists them and mounts none.
    ///
    /// When it fails nothing is left attached or mounted that was not before.
    #[command(after_help = MOUNT_EXAMPLES)]
    Mount(Mount),
    /// Unmount an image, a device, a partition or a directory.
    ///
    /// An image or a device is unmounted with all of its partitions. What was attached to be
    /// mounted is detached with its last mount, and is so when the command succeeds; other devices
    /// stay attached, see `loopctl detach`.
    ///
    /// Without --lazy a file system that is in use stays mounted, and the processes that hold it
    /// are listed as far as you may see them.
    #[command(after_help = UNMOUNT_EXAMPLES)]
    Unmount(Unmount),
    /// Give a loop device the size that its backing file has now.
    ///
    /// That is for a file that has grown or shrunk since it was attached. A file system on the device
    /// keeps its own size until it is resized by its own tool.
    #[command(after_help = RESIZE_EXAMPLES)]
    Resize(Resize),
    /// Change how a loop device works.
    ///
    /// Block size, direct I/O and lifetime are changed in this order; where one of them fails, what
    /// was changed before it stays so.
    #[command(after_help = SET_EXAMPLES)]
    Set(Set),
    /// Read the partition table of a loop device again.
    ///
    /// That is for a table that was changed after the device was attached. When the command
    /// succeeds the partitions' nodes are what the table says. It can fail while a partition is in
    /// use.
    #[command(after_help = RESCAN_EXAMPLES)]
    Rescan(Rescan),
    /// Attach a file for as long as a command runs.
    ///
    /// Each {} in the arguments of COMMAND is replaced by the device node, and the environment
    /// variable LOOPCTL_DEVICE is set to it. The device is detached when COMMAND ends.
    ///
    /// The device belongs to a bus connection that loopctl and COMMAND share, as flock(1) shares
    /// its lock: it also lives as long as COMMAND where loopctl itself is killed, and it goes when
    /// both are gone. SIGTERM and SIGHUP are passed on to COMMAND. A device that `--overlap reuse` found
    /// attached is left as it was.
    #[command(after_help = RUN_EXAMPLES)]
    Run(Run),
    /// Print a line for each loop device and partition that comes, changes or goes.
    ///
    /// The events are attached, changed, detaching (it goes at the last close) and detached;
    /// partition-added, changed and partition-removed, which name the partition's node; and
    /// daemon-started and daemon-stopped for loopd itself. It ends at SIGINT or SIGTERM. It does
    /// not start loopd.
    Monitor(Monitor),
    /// Take losetup's arguments, and print what losetup prints.
    ///
    /// The same happens when loopctl is started under the name losetup. loopctl-losetup(1) tells
    /// what differs from losetup(8); `loopctl losetup --help` lists the options.
    #[command(disable_help_flag = true)]
    Losetup(Losetup),
    /// Print the completion script for a shell.
    ///
    /// For example: loopctl completion bash > ~/.local/share/bash-completion/completions/loopctl
    Completion(Completion),
}

/// What `attach` and `run` have in common.
#[derive(Args, Clone, Debug)]
pub struct AttachArgs {
    /// The file to attach: a regular file or a block device.
    pub file: PathBuf,
    /// Make the device read-only.
    #[arg(short, long)]
    pub read_only: bool,
    /// Start this many bytes into the file.
    #[arg(short, long, value_name = "N", default_value = "0", value_parser = size::parse)]
    pub offset: u64,
    /// Use at most this many bytes of the file; 0 is up to its end.
    #[arg(long, value_name = "N", default_value = "0", value_parser = size::parse)]
    pub size_limit: u64,
    /// The logical block size: a power of two from 512 to 64K; 0 lets loopd choose.
    ///
    /// loopd chooses 512, or 4096 where the partition table of the image says so.
    #[arg(short, long, value_name = "N", default_value = "0", value_parser = block_size)]
    pub block_size: u32,
    /// Bypass the page cache of the backing file; an error where the file cannot do that.
    #[arg(long)]
    pub direct_io: bool,
    /// Do not make the partitions' nodes.
    #[arg(long)]
    pub no_partitions: bool,
    /// A name of at most 63 bytes for the device, which losetup shows as REF.
    #[arg(long, value_name = "S", default_value = "", hide_default_value = true, value_parser = reference)]
    pub reference: String,
    /// Ask for this device: /dev/loop3, loop3 or 3. By default any free one is taken.
    #[arg(long, value_name = "DEV", value_parser = device)]
    pub device: Option<u32>,
    /// What to do where the file is attached already.
    ///
    /// `allow` attaches it once more, `refuse` fails, and `reuse` gives back the device whose file,
    /// offset and size limit are the same; that device is not changed, and its other options stay
    /// what they are. `reuse` also fails where the file is attached at another offset or with
    /// another size, read-only where --read-only is not given, or with another block size than the
    /// one asked for, and if another user could change what the device shows.
    #[arg(long, value_name = "POLICY", default_value = "allow", value_parser = overlap())]
    pub overlap: Overlap,
    /// Do not wait until udev has processed the device.
    ///
    /// Links below /dev/disk and the file system's type and label may then come later than loopctl
    /// returns.
    #[arg(long)]
    pub no_wait: bool,
    /// Whether the device is to be a throwaway view of the file.
    #[command(flatten)]
    pub throwaway: ThrowawayArgs,
}

/// How a throwaway view is made.
#[derive(Args, Clone, Debug, Default)]
pub struct ThrowawayArgs {
    /// Give a writable view of the file whose changes vanish with the device.
    ///
    /// The device gets a copy of the file: one that shares the file's blocks where the file system
    /// can do that, as Btrfs and XFS can, and else one of all that is not a hole. It has no name and
    /// lies beside the file. You need only be able to read the file itself; its name is shown as REF.
    #[arg(long, conflicts_with = "read_only", help_heading = THROWAWAY)]
    pub throwaway: bool,
    /// Keep the throwaway copy in this folder, instead of beside the file.
    #[arg(long, value_name = "DIR", requires = "throwaway", help_heading = THROWAWAY)]
    pub throwaway_dir: Option<PathBuf>,
    /// Do not ask before more than 1 GiB is copied. Without a terminal nothing is asked, and no more
    /// is copied.
    #[arg(long, requires = "throwaway", help_heading = THROWAWAY)]
    pub yes: bool,
}

/// The arguments of `attach`.
#[derive(Args, Clone, Debug)]
pub struct Attach {
    /// What to attach, and how.
    #[command(flatten)]
    pub attach: AttachArgs,
    /// When the device is detached by itself.
    ///
    /// `persistent`: never. `mount`: with the last unmount of the device or of one of its
    /// partitions, and after 60 seconds where it is not mounted at all. For a device that goes with a
    /// command, see `loopctl run`.
    #[arg(long, value_name = "LIFETIME", default_value = "persistent", value_parser = lifetime())]
    pub lifetime: Lifetime,
    /// Print the device's properties as a JSON object instead of the device node.
    #[arg(long)]
    pub json: bool,
}

/// The arguments of `detach`.
#[derive(Args, Clone, Debug)]
pub struct Detach {
    /// A device node (/dev/loop3, loop3) or a backing file; a file stands for each device it is
    /// attached to. A file with the name loop3 is ./loop3.
    #[arg(value_name = "TARGET", required_unless_present = "all", conflicts_with = "all")]
    pub targets: Vec<OsString>,
    /// Detach every device that loopd attached; those that fail do not stop the others.
    #[arg(long)]
    pub all: bool,
    /// Where the device is in use, let the last close detach it, and do not wait for that.
    #[arg(long)]
    pub lazy: bool,
}

/// The arguments of `list`.
#[derive(Args, Clone, Debug)]
pub struct List {
    /// Show also the loop devices that loopd did not attach.
    #[arg(long)]
    pub all: bool,
    /// Print a JSON array; sizes are in bytes, and a path that is not UTF-8 is shown with U+FFFD in
    /// place of the other bytes.
    #[arg(long, conflicts_with_all = ["columns", "no_legend"])]
    pub json: bool,
    /// The columns to show, separated by commas; upper or lower case.
    #[arg(
        short = 'o',
        long = "output",
        value_name = "COL",
        value_enum,
        value_delimiter = ',',
        ignore_case = true,
        default_value = "DEVICE,SIZE,RO,TYPE,LABEL,MOUNTPOINTS,STATE,FILE"
    )]
    pub columns: Vec<Column>,
    /// Do not print the header.
    #[arg(long)]
    pub no_legend: bool,
}

/// A column of `list`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "UPPER")]
pub enum Column {
    /// Device node
    Device,
    /// N of /dev/loopN; of a partition, its number
    Number,
    /// Size of the device or partition
    Size,
    /// Whether the device is read-only
    Ro,
    /// Type of the file system
    Type,
    /// Version of the file system
    Version,
    /// Label of the file system
    Label,
    /// UUID of the file system
    Uuid,
    /// Where the device or partition is mounted
    Mountpoints,
    /// Where a partition starts on its device, in bytes
    Start,
    /// Kind of the partition table: gpt, dos
    Pttype,
    /// Type of a partition: a GUID, or a number as 0x83
    Parttype,
    /// Name of a partition in its table
    Partlabel,
    /// UUID of a partition in its table
    Partuuid,
    /// When the device is detached by itself; - where loopd did not attach it
    Lifetime,
    /// attached, or detaching: it goes at the last close
    State,
    /// Backing file
    File,
    /// Inode of the backing file
    Inode,
    /// Where the device starts in the backing file, in bytes
    Offset,
    /// How many bytes of the backing file it uses at most; 0 is up to the end
    Sizelimit,
    /// Logical block size in bytes
    Blocksize,
    /// Whether the page cache of the backing file is bypassed
    Dio,
    /// Whether the kernel looks for partitions
    Partscan,
    /// Whether the kernel detaches the device at the last close
    Autoclear,
    /// Reference
    Ref,
    /// Whether loopd attached the device
    Managed,
    /// uid that attached the device
    Owner,
    /// When it was attached
    Since,
    /// Disk sequence
    Diskseq,
}

/// The arguments of `info`.
#[derive(Args, Clone, Debug)]
pub struct Info {
    /// A device node (/dev/loop3, loop3), a partition's node (/dev/loop3p1, loop3p1) or a backing
    /// file. A file with the name loop3 is ./loop3.
    ///
    /// For a partition its device is shown, with this partition only; but where its node itself is
    /// attached as a backing file, the device that it is attached to.
    #[arg(value_name = "TARGET")]
    pub target: OsString,
    /// Print a JSON object; for a file that is attached more than once, one after the other.
    #[arg(long)]
    pub json: bool,
}

/// The arguments of `mount`.
#[derive(Args, Clone, Debug)]
pub struct Mount {
    /// An image, a device node (/dev/loop3, loop3) or a partition's node (/dev/loop3p1, loop3p1). A
    /// file with the name loop3 is ./loop3.
    #[arg(value_name = "FILE|TARGET")]
    pub target: OsString,
    /// Mount this partition of the image.
    ///
    /// By default that is the file system on the whole image where there is one, and else the only
    /// partition with a file system.
    #[arg(short, long, value_name = "N")]
    pub partition: Option<u32>,
    /// Mount it read-only; a file that is not attached yet is attached read-only, too.
    #[arg(short, long)]
    pub read_only: bool,
    /// The type of the file system, where it is not the one that udev has found.
    #[arg(short = 't', long = "type", value_name = "TYPE", default_value = "", hide_default_value = true)]
    pub kind: String,
    /// Further mount options, separated by commas. loopd knows for each file system which may be
    /// given.
    #[arg(long, value_name = "S", default_value = "", hide_default_value = true)]
    pub options: String,
    /// Print the device's properties as a JSON object instead of the mount point.
    #[arg(long)]
    pub json: bool,
    /// Whether the device is to be a throwaway view of the file.
    #[command(flatten)]
    pub throwaway: ThrowawayArgs,
    /// Where there is no terminal to look at.
    #[command(flatten)]
    pub desktop: MountOnDesktop,
}

/// What the entries of a desktop's menus ask of `mount`.
#[derive(Args, Clone, Copy, Debug)]
pub struct MountOnDesktop {
    /// Show the mount point in the file manager.
    #[arg(long, help_heading = DESKTOP)]
    pub open: bool,
    /// Show what goes wrong in a notification as well.
    #[arg(long, help_heading = DESKTOP)]
    pub notify: bool,
}

/// The arguments of `unmount`.
#[derive(Args, Clone, Debug)]
pub struct Unmount {
    /// An image, a device node (/dev/loop3, loop3), a partition's node (/dev/loop3p1, loop3p1), a
    /// mount point or a folder below one.
    #[arg(value_name = "TARGET|DIR")]
    pub target: OsString,
    /// Take a file system that is in use from the tree at once; it is unmounted, and the device
    /// detached, with its last user.
    #[arg(long)]
    pub lazy: bool,
    /// Show what goes wrong in a notification of the desktop as well.
    #[arg(long)]
    pub notify: bool,
}

/// The arguments of `resize`.
#[derive(Args, Clone, Debug)]
pub struct Resize {
    /// A device node (/dev/loop3, loop3) or a backing file; a file stands for each device it is
    /// attached to. A file with the name loop3 is ./loop3.
    #[arg(value_name = "TARGET")]
    pub target: OsString,
}

/// The arguments of `set`.
#[derive(Args, Clone, Debug)]
#[command(group = clap::ArgGroup::new("change").required(true).multiple(true))]
pub struct Set {
    /// A device node (/dev/loop3, loop3) or a backing file; a file stands for each device it is
    /// attached to. A file with the name loop3 is ./loop3.
    #[arg(value_name = "TARGET")]
    pub target: OsString,
    /// Whether to bypass the page cache of the backing file; an error where the file cannot do that.
    #[arg(long, value_name = "SWITCH", group = "change")]
    pub direct_io: Option<Switch>,
    /// The logical block size: a power of two from 512 to 64K.
    #[arg(short, long, value_name = "N", value_parser = given_block_size, group = "change")]
    pub block_size: Option<u32>,
    /// When the device is detached by itself.
    ///
    /// `persistent`: never. `mount`: with the last unmount of the device or of one of its
    /// partitions, and after 60 seconds where it is not mounted at all.
    #[arg(long, value_name = "LIFETIME", value_parser = lifetime(), group = "change")]
    pub lifetime: Option<Lifetime>,
}

/// On or off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Switch {
    /// On
    On,
    /// Off
    Off,
}

/// The arguments of `rescan`.
#[derive(Args, Clone, Debug)]
pub struct Rescan {
    /// A device node (/dev/loop3, loop3) or a backing file; a file stands for each device it is
    /// attached to. A file with the name loop3 is ./loop3.
    #[arg(value_name = "TARGET")]
    pub target: OsString,
}

/// The arguments of `run`.
#[derive(Args, Clone, Debug)]
pub struct Run {
    /// What to attach, and how.
    #[command(flatten)]
    pub attach: AttachArgs,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// The arguments of `monitor`.
#[derive(Args, Clone, Copy, Debug)]
pub struct Monitor {
    /// Print a JSON object a line, with event, time_us (microseconds since 1970), device, path (of
    /// the bus object) and changed (the properties with their new values; all of them at attached
    /// and partition-added); for a partition also partition, its number.
    #[arg(long)]
    pub json: bool,
}

/// The arguments of `losetup`.
#[derive(Args, Clone, Debug)]
pub struct Losetup {
    /// What losetup is given.
    #[arg(value_name = "ARGUMENT", trailing_var_arg = true, allow_hyphen_values = true)]
    pub words: Vec<OsString>,
}

/// The arguments of `completion`.
#[derive(Args, Clone, Copy, Debug)]
pub struct Completion {
    /// The shell.
    #[arg(value_name = "SHELL", value_enum)]
    pub shell: clap_complete::Shell,
}

/// The whole definition, as completion scripts and manual pages are made from it.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
}

fn overlap() -> impl TypedValueParser<Value = Overlap> {
    PossibleValuesParser::new(["allow", "refuse", "reuse"]).try_map(|word| word.parse::<Overlap>())
}

fn lifetime() -> impl TypedValueParser<Value = Lifetime> {
    let word = PossibleValuesParser::new([
        clap::builder::PossibleValue::new("persistent"),
        clap::builder::PossibleValue::new("mount"),
        clap::builder::PossibleValue::new("client").hide(true),
    ]);
    word.try_map(|word| match word.parse() {
        Ok(Lifetime::Client) => Err("it would end as soon as loopctl does; \
             `loopctl run FILE -- COMMAND` keeps a device as long as a command runs"
            .to_owned()),
        other => other.map_err(|error| error.to_string()),
    })
}

fn block_size(text: &str) -> Result<u32, String> {
    match size::parse_u32(text) {
        Ok(size) if size == 0 || (size.is_power_of_two() && (512..=65536).contains(&size)) => Ok(size),
        Ok(_) => Err("a block size is a power of two from 512 to 65536, or 0".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

fn given_block_size(text: &str) -> Result<u32, String> {
    match block_size(text)? {
        0 => Err("a block size is a power of two from 512 to 65536".to_owned()),
        size => Ok(size),
    }
}

fn reference(text: &str) -> Result<String, String> {
    match text.len() {
        0..=63 => Ok(text.to_owned()),
        bytes => Err(format!("it has {bytes} bytes, and the kernel keeps 63")),
    }
}

fn device(text: &str) -> Result<u32, String> {
    let number = target::loop_number(text).or_else(|| target::decimal(text));
    number.ok_or_else(|| "name a loop device, as /dev/loop3, loop3 or 3".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Verb, clap::Error> {
        Cli::try_parse_from(line.split(' ')).map(|cli| cli.verb)
    }

    fn usage_error(line: &str) -> String {
        let error = parse(line).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{line}");
        error.to_string()
    }

    #[test]
    fn the_definition_is_sound() {
        command().debug_assert();
    }

    #[test]
    fn options_come_in_any_order() {
        let line = "loopctl attach -r x.img --device loop7 -o 1M --overlap reuse -b 4K --json";
        let Ok(Verb::Attach(Attach { attach, lifetime, json })) = parse(line) else { panic!() };
        assert!(attach.read_only && json);
        assert_eq!((attach.offset, attach.block_size, attach.device), (1 << 20, 4096, Some(7)));
        assert_eq!((attach.overlap, lifetime), (Overlap::Reuse, Lifetime::Persistent));
    }

    #[test]
    fn a_command_follows_two_dashes() {
        let Ok(Verb::Run(run)) = parse("loopctl run x.img -r -- mount -r {}") else { panic!() };
        assert!(run.attach.read_only);
        assert_eq!(run.command, ["mount", "-r", "{}"]);
        usage_error("loopctl run x.img");
        usage_error("loopctl run x.img mount");
    }

    #[test]
    fn a_mount_has_one_target_and_its_options() {
        let line = "loopctl mount -p 2 -t vfat --options flush,umask=077 -r x.img --open";
        let Ok(Verb::Mount(mount)) = parse(line) else { panic!() };
        assert_eq!((mount.partition, mount.kind.as_str()), (Some(2), "vfat"));
        assert_eq!(mount.options, "flush,umask=077");
        assert!(mount.read_only && mount.desktop.open && !mount.desktop.notify && !mount.json);
        let Ok(Verb::Unmount(unmount)) = parse("loopctl unmount --lazy /mnt") else { panic!() };
        assert!(unmount.lazy && unmount.target == "/mnt");
        for line in ["mount", "mount a b", "mount -p x a", "mount -p -1 a", "unmount", "unmount a b"] {
            usage_error(&format!("loopctl {line}"));
        }
    }

    #[test]
    fn throwaway_views_are_writable() {
        for verb in ["attach x", "mount x", "run x -- true"] {
            let (verb, rest) = verb.split_once(' ').unwrap();
            parse(&format!("loopctl {verb} --throwaway --yes --throwaway-dir /tmp {rest}")).unwrap();
            usage_error(&format!("loopctl {verb} --throwaway -r {rest}"));
            usage_error(&format!("loopctl {verb} --yes {rest}"));
            usage_error(&format!("loopctl {verb} --throwaway-dir /tmp {rest}"));
        }
    }

    #[test]
    fn a_rescan_has_one_target() {
        let Ok(Verb::Rescan(rescan)) = parse("loopctl rescan x.img") else { panic!() };
        assert_eq!(rescan.target, "x.img");
        usage_error("loopctl rescan");
        usage_error("loopctl rescan loop3 loop4");
    }

    #[test]
    fn a_change_has_a_target_and_something_to_change() {
        let Ok(Verb::Set(set)) = parse("loopctl set loop3 --direct-io off -b 4K --lifetime persistent")
        else {
            panic!()
        };
        assert_eq!((set.direct_io, set.block_size), (Some(Switch::Off), Some(4096)));
        assert_eq!(set.lifetime, Some(Lifetime::Persistent));
        usage_error("loopctl set loop3");
        usage_error("loopctl set --direct-io on");
        usage_error("loopctl set loop3 --direct-io perhaps");
        assert!(usage_error("loopctl set loop3 -b 0").contains("power of two"));
        usage_error("loopctl resize");
        usage_error("loopctl resize loop3 2G");
    }

    #[test]
    fn losetup_gets_its_words_untouched() {
        let words = |line| match parse(line) {
            Ok(Verb::Losetup(losetup)) => losetup.words,
            other => panic!("{line}: {other:?}"),
        };
        assert_eq!(words("loopctl losetup"), [""; 0]);
        assert_eq!(words("loopctl losetup --help"), ["--help"]);
        assert_eq!(words("loopctl losetup -V"), ["-V"]);
        assert_eq!(words("loopctl losetup -fP --show x.img"), ["-fP", "--show", "x.img"]);
        assert_eq!(words("loopctl losetup -a --no-color -- x"), ["-a", "--no-color", "--", "x"]);
    }

    #[test]
    fn devices_are_named_in_three_ways() {
        for word in ["/dev/loop3", "loop3", "3"] {
            assert_eq!(device(word), Ok(3), "{word}");
        }
        for word in ["", "loop", "sda", "/dev/loop3p1", "03", "-3", "loop03", "99999999999"] {
            assert!(device(word).is_err(), "{word}");
        }
    }

    #[test]
    fn wrong_arguments_are_explained() {
        let lifetime = usage_error("loopctl attach x.img --lifetime client");
        assert!(lifetime.contains("loopctl run FILE -- COMMAND"), "{lifetime}");
        let column = usage_error("loopctl list -o device,colour");
        assert!(column.contains("'colour'") && column.contains("MOUNTPOINTS"), "{column}");
        assert!(usage_error("loopctl attach x -b 1000").contains("power of two"));
        assert!(usage_error("loopctl attach x -o 1.5M").contains("fractions"));
        assert!(
            usage_error(&format!("loopctl attach x --reference {}", "r".repeat(64))).contains("64 bytes")
        );
        usage_error("loopctl detach");
        usage_error("loopctl detach --all loop3");
        usage_error("loopctl list --json -o device");
    }

    #[test]
    fn columns_are_read_in_any_case() {
        let Ok(Verb::List(list)) = parse("loopctl list -o device,FILE") else { panic!() };
        assert_eq!(list.columns, [Column::Device, Column::File]);
        let Ok(Verb::List(list)) = parse("loopctl list -o start,PTTYPE,PartType,partlabel,partuuid") else {
            panic!()
        };
        let of_partitions =
            [Column::Start, Column::Pttype, Column::Parttype, Column::Partlabel, Column::Partuuid];
        assert_eq!(list.columns, of_partitions);
        let Ok(Verb::List(list)) = parse("loopctl list --json --all") else { panic!() };
        assert!(list.json && list.all);
    }
}
