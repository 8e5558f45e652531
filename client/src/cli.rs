//! Definition of the command line.

mod create;
mod encryption;
mod examples;
mod values;

use std::ffi::OsString;
use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use loopd_common::EncryptionType;
use loopd_dbus::{Lifetime, Overlap};

pub use self::create::{Create, FilesystemType};
pub use self::encryption::{EncryptionArgs, Lock, PassphraseArgs, Unlock};
use self::encryption::{HEADING, encryption_type};
use crate::show::column::{self, Column};
use crate::show::size;

/// The help for a TARGET that may be a device or a file.
const TARGET_HELP: &str = "A device node (/dev/loop3, loop3) or a backing file, which stands for each device it is \
    attached to. The path of a file that was deleted or replaced stands for the device that is still attached from it. \
    Write ./loop3 for a file of the name loop3";
/// Help heading of the options for throwaway views.
const THROWAWAY: &str = "Throwaway views";
/// Help heading of the options for desktop menus.
const DESKTOP: &str = "On a desktop";

/// Environment variables, for the manual page.
pub const ENVIRONMENT: &[(&str, &str)] = &[
    ("NO_COLOR", "If set and not empty, disables colours and bold text."),
    ("LOOPCTL_DEVICE", "Set to the device node for the command of `loopctl run`."),
    ("DBUS_SYSTEM_BUS_ADDRESS", "The address of the system bus, if it is not the standard one."),
];

/// Attach, list and detach loop devices through loopd.
///
/// A loop device makes a regular file (the backing file) usable as a block device. loopctl calls the
/// daemon loopd over the system bus. loopd authorizes requests with polkit, so users need no root
/// privileges for their own files.
#[derive(Debug, Parser)]
#[command(name = "loopctl", version, max_term_width = 100, after_help = examples::LOOPCTL)]
#[command(subcommand_required = true, arg_required_else_help = true)]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// The command.
    #[command(subcommand)]
    pub verb: Verb,
}

/// Options of every command.
#[derive(Args, Clone, Copy, Debug)]
#[command(next_help_heading = "Global options")]
pub struct Global {
    /// Never prompt for authorization.
    ///
    /// A request that needs a password fails. Without this option loopctl prompts on the terminal, if
    /// there is one, unless a graphical agent does.
    #[arg(long, global = true)]
    pub no_ask_password: bool,
    /// Disable colours and bold text.
    ///
    /// The environment variable NO_COLOR does the same when it is set and not empty.
    #[arg(long, global = true)]
    pub no_color: bool,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Attach a file to a free loop device and print the device node.
    ///
    /// loopctl opens FILE with your own rights; loopd never reads a file that you may not read. If you
    /// may not write to the file, the device is read-only. The device stays attached until it is
    /// detached, unless --lifetime is given.
    ///
    /// Each partition of an image gets a node: /dev/loop3p1 is the first partition of /dev/loop3. An image that is one FAT,
    /// exFAT or NTFS volume has none, even if its boot sector also reads as a partition table.
    #[command(after_help = examples::ATTACH)]
    Attach(Attach),
    /// Detach loop devices.
    ///
    /// Without --lazy a device that is in use stays attached, and the error names its users. Processes
    /// that have it open, mounts in other mount namespaces and swap are listed as far as you may see
    /// them. When the command succeeds, the device is free. Partitions are removed with their device.
    #[command(override_usage = "loopctl detach [OPTIONS] <TARGET>...\n       loopctl detach [OPTIONS] --all")]
    Detach(Detach),
    /// List the loop devices and their partitions.
    ///
    /// Without --all only the devices that loopd attached are listed. If there is none, nothing is
    /// printed. Partitions are listed below their device; a - stands for a column that does not apply
    /// to them.
    ///
    /// FILESTATE shows whether the backing file is still at its path: it may have been deleted, or replaced
    /// by another file. The device shows the contents of the original until it is detached. A - means
    /// that you may not look, or that the file system does not answer within 2 seconds.
    #[command(after_help = examples::LIST)]
    List(List),
    /// Show every property of a loop device.
    ///
    /// If a backing file is attached more than once, each of its devices is shown. File state is present,
    /// deleted, or replaced, if another file has the path of the backing file now. The properties of the
    /// partitions follow those of their device.
    #[command(after_help = examples::INFO)]
    Info(Info),
    /// Mount the file system in an image and print the mount point.
    ///
    /// A file that is not attached is attached first, and detached again with its last unmount, by
    /// `loopctl unmount`, umount(8) or the file manager. Your existing attachment of the file is used,
    /// unless it is read-only and the mount is not. If the image was rebuilt under the same name, the new one
    /// is attached; if it was deleted, your device that is still attached from it is mounted.
    ///
    /// The mount point is below /run/media/USER and is named after the file system's label. A file
    /// system that is already mounted is not mounted again; its mount point is printed. If several
    /// partitions have file systems, --partition chooses one; without it loopctl lists them and mounts
    /// none.
    ///
    /// An encrypted volume is unlocked first; loopctl asks for its passphrase on the terminal, or through pinentry if there
    /// is only a display. It is chosen like a file system if no partition has one.
    ///
    /// If the command fails, everything it attached, unlocked or mounted is undone.
    #[command(after_help = examples::MOUNT)]
    Mount(Mount),
    /// Unmount an image, a device, a partition or a directory.
    ///
    /// An image or a device is unmounted with all of its partitions. An encrypted volume is locked after that. A device
    /// that `loopctl mount` attached is detached with its last mount, before the command returns; other devices stay
    /// attached, see `loopctl detach`.
    ///
    /// Without --lazy a file system that is in use stays mounted, and the processes that use it are
    /// listed as far as you may see them.
    #[command(after_help = examples::UNMOUNT)]
    Unmount(Unmount),
    /// Unlock an encrypted volume and print the device with its cleartext.
    ///
    /// The volume is a whole image or a partition that is attached to a loop device: LUKS and BitLocker are recognized,
    /// VeraCrypt and TrueCrypt need --type, and a volume whose LUKS header is in another file needs --header. `loopctl
    /// mount` attaches, unlocks and mounts an image with one command.
    ///
    /// loopctl asks for the passphrase on the terminal, or through pinentry if there is only a display, and up to three
    /// times. The passphrase goes through a pipe to the program that unlocks the volume; it is in no argument, environment
    /// variable, log or message on the bus. The cleartext stays until it is locked or the device is detached.
    #[command(after_help = examples::UNLOCK)]
    Unlock(Unlock),
    /// Lock an encrypted volume: remove the device with its cleartext.
    ///
    /// Without --lazy a cleartext that is in use stays, and the error names its users. Without --partition each unlocked
    /// volume of the device is locked.
    #[command(after_help = examples::LOCK)]
    Lock(Lock),
    /// Create an image with a file system, or an encrypted one.
    ///
    /// The image is a new file that takes space only for what is written to it; a file that exists is never changed. If the
    /// command fails or is interrupted, it removes the file. Your user owns the top directory of the file system, so that
    /// you can use it after `loopctl mount`.
    ///
    /// The programs that make file systems run with your own rights; if one is missing, its package is named.
    #[command(after_help = examples::CREATE)]
    Create(Create),
    /// Set the size of a loop device to the current size of its backing file.
    ///
    /// Use this after the file has grown or shrunk. A file system on the device keeps its size until it
    /// is resized with its own tool.
    #[command(after_help = examples::RESIZE)]
    Resize(Resize),
    /// Change the settings of a loop device.
    ///
    /// Block size, direct I/O and lifetime are changed in this order; if a change fails, the changes
    /// before it remain.
    #[command(after_help = examples::SET)]
    Set(Set),
    /// Re-read the partition table of a loop device.
    ///
    /// Use this after the partition table has changed. When the command succeeds, the partition nodes
    /// match the table. It may fail while a partition is in use.
    #[command(after_help = examples::RESCAN)]
    Rescan(Rescan),
    /// Attach a file while a command runs.
    ///
    /// Each {} in the arguments of COMMAND is replaced by the device node, and the environment
    /// variable LOOPCTL_DEVICE is set to it. The device is detached when COMMAND exits.
    ///
    /// The attachment is bound to a bus connection that loopctl shares with COMMAND, like the lock of
    /// flock(1): the device stays attached for COMMAND even if loopctl is killed, and is detached when
    /// both have exited. SIGTERM and SIGHUP are forwarded to COMMAND. A device that `--overlap reuse`
    /// found attached is left unchanged.
    ///
    /// With --unlock an encrypted volume is unlocked first, {} and LOOPCTL_DEVICE are the device with its cleartext, and it is
    /// locked when COMMAND exits.
    #[command(after_help = examples::RUN)]
    Run(Run),
    /// Print a line for each loop device and partition that is added, changed or removed.
    ///
    /// The events are attached, changed, detaching (detached at the last close) and detached;
    /// partition-added, changed and partition-removed, which name the partition's node; unlocked, changed and locked, which
    /// name the device with the cleartext of an encrypted volume; and daemon-started and daemon-stopped for loopd itself. The command runs until SIGINT or SIGTERM. It
    /// does not start loopd.
    Monitor(Monitor),
    /// Accept the arguments of losetup, and print what losetup prints.
    ///
    /// loopctl does the same if it is started under the name losetup. loopctl-losetup(1) lists the
    /// differences from losetup(8); `loopctl losetup --help` lists the options.
    #[command(disable_help_flag = true)]
    Losetup(Losetup),
    /// Print the completion script for a shell.
    ///
    /// For example: loopctl completion bash > ~/.local/share/bash-completion/completions/loopctl
    Completion(Completion),
}

/// The common arguments of `attach` and `run`.
#[derive(Args, Clone, Debug)]
pub struct AttachArgs {
    /// The file to attach: a regular file or a block device.
    pub file: PathBuf,
    /// Make the device read-only.
    #[arg(short, long)]
    pub read_only: bool,
    /// Start at this offset in the file.
    #[arg(short, long, value_name = "N", default_value = "0", value_parser = size::parse)]
    pub offset: u64,
    /// Use at most this many bytes of the file; 0 is up to its end.
    #[arg(long, value_name = "N", default_value = "0", value_parser = size::parse)]
    pub size_limit: u64,
    /// The logical block size: a power of two from 512 to 64K; 0 lets loopd choose.
    ///
    /// loopd chooses 512, or 4096 if the partition table of the image was written for it.
    #[arg(short, long, value_name = "N", default_value = "0", value_parser = values::block_size)]
    pub block_size: u32,
    /// Bypass the page cache of the backing file; fails if the file does not support it.
    ///
    /// Without this option loopd does so for large images that are written to, if their file system supports it.
    #[arg(long)]
    pub direct_io: bool,
    /// Do not create partition nodes.
    #[arg(long)]
    pub no_partitions: bool,
    /// A name of at most 63 bytes for the device, which losetup shows as REF.
    #[arg(long, value_name = "S", default_value = "", hide_default_value = true, value_parser = values::reference)]
    pub reference: String,
    /// Use this device: /dev/loop3, loop3 or 3. By default a free one is chosen.
    #[arg(long, value_name = "DEV", value_parser = values::device)]
    pub device: Option<u32>,
    /// What to do if the file is already attached.
    ///
    /// `allow` attaches it again, `refuse` fails, and `reuse` returns the device with the same file,
    /// offset and size limit; that device and its other options are not changed. `reuse` fails if the
    /// file is attached with another offset or size, read-only without --read-only, or with a block
    /// size other than the requested one, and if another user could change the contents of the device.
    #[arg(long, value_name = "POLICY", default_value = "allow", value_parser = values::overlap())]
    pub overlap: Overlap,
    /// Do not wait until udev has processed the device.
    ///
    /// Links below /dev/disk and the file system's type and label may not exist yet when loopctl
    /// returns.
    #[arg(long)]
    pub no_wait: bool,
    /// Attach a throwaway view of the file.
    #[command(flatten)]
    pub throwaway: ThrowawayArgs,
}

/// Options of a throwaway view.
#[derive(Args, Clone, Debug, Default)]
pub struct ThrowawayArgs {
    /// Attach a writable copy of the file that is deleted with the device.
    ///
    /// The copy shares the file's blocks if the file system supports that, as Btrfs and XFS do;
    /// otherwise everything except holes is copied. It is an unnamed file in the same directory. You
    /// need only read access to the file itself; its name is shown as REF.
    #[arg(long, conflicts_with = "read_only", help_heading = THROWAWAY)]
    pub throwaway: bool,
    /// Create the throwaway copy in this directory, instead of that of the file.
    #[arg(long, value_name = "DIR", requires = "throwaway", help_heading = THROWAWAY)]
    pub throwaway_dir: Option<PathBuf>,
    /// Copy more than 1 GiB without a prompt. Without this option and without a terminal, such a copy
    /// fails.
    #[arg(long, requires = "throwaway", help_heading = THROWAWAY)]
    pub yes: bool,
}

/// The arguments of `attach`.
#[derive(Args, Clone, Debug)]
pub struct Attach {
    /// The file and how to attach it.
    #[command(flatten)]
    pub attach: AttachArgs,
    /// When the device is detached automatically.
    ///
    /// `persistent`: never. `mount`: with the last unmount of the device or of one of its
    /// partitions, or after 60 seconds if it is not mounted. To detach a device with the end of a
    /// command, see `loopctl run`.
    #[arg(long, value_name = "LIFETIME", default_value = "persistent", value_parser = values::lifetime())]
    pub lifetime: Lifetime,
    /// Print the device's properties as a JSON object instead of the device node.
    #[arg(long)]
    pub json: bool,
}

/// The arguments of `detach`.
#[derive(Args, Clone, Debug)]
pub struct Detach {
    /// The devices or files.
    #[arg(help = TARGET_HELP, value_name = "TARGET", required_unless_present = "all", conflicts_with = "all")]
    pub targets: Vec<OsString>,
    /// Detach every device that loopd attached; continue after errors.
    #[arg(long)]
    pub all: bool,
    /// If the device is in use, detach it at the last close, and do not wait for that.
    #[arg(long)]
    pub lazy: bool,
}

/// The arguments of `list`.
#[derive(Args, Clone, Debug)]
pub struct List {
    /// Also list the loop devices that loopd did not attach.
    #[arg(long)]
    pub all: bool,
    /// Print a JSON array; sizes are in bytes, and in paths U+FFFD replaces bytes that are not UTF-8.
    #[arg(long, conflicts_with_all = ["columns", "no_legend"])]
    pub json: bool,
    /// The columns to show, separated by commas, in upper or lower case.
    #[arg(
        short = 'o',
        long = "output",
        value_name = "COL",
        value_enum,
        value_delimiter = ',',
        ignore_case = true,
        default_value = column::DEFAULT
    )]
    pub columns: Vec<Column>,
    /// Do not print the header.
    #[arg(long)]
    pub no_legend: bool,
}

/// The arguments of `info`.
#[derive(Args, Clone, Debug)]
pub struct Info {
    /// A device node (/dev/loop3, loop3), a partition node (/dev/loop3p1, loop3p1) or a backing file.
    /// Write ./loop3 for a file of the name loop3.
    ///
    /// For a partition, its device is shown with this partition only; if the partition node itself is
    /// attached as a backing file, the device it is attached to is shown.
    #[arg(value_name = "TARGET")]
    pub target: OsString,
    /// Print a JSON object; for a file that is attached more than once, one for each device.
    #[arg(long)]
    pub json: bool,
}

/// The arguments of `mount`.
#[derive(Args, Clone, Debug)]
pub struct Mount {
    /// An image, a device node (/dev/loop3, loop3) or a partition node (/dev/loop3p1, loop3p1). Write
    /// ./loop3 for a file of the name loop3.
    #[arg(value_name = "FILE|TARGET")]
    pub target: OsString,
    /// Mount this partition of the image.
    ///
    /// By default the file system on the whole image is mounted if there is one, and otherwise the only
    /// partition with a file system, or the only encrypted one if none has a file system.
    #[arg(short, long, value_name = "N")]
    pub partition: Option<u32>,
    /// Mount read-only; a file that is not attached is attached read-only, too.
    #[arg(short, long)]
    pub read_only: bool,
    /// The type of the file system, if udev has not recognized it.
    #[arg(short = 't', long = "type", value_name = "TYPE", default_value = "", hide_default_value = true)]
    pub kind: String,
    /// Further mount options, separated by commas. loopd has a list of the options that are allowed for
    /// each file system.
    #[arg(long, value_name = "S", default_value = "", hide_default_value = true)]
    pub options: String,
    /// Print the device's properties as a JSON object instead of the mount point.
    #[arg(long)]
    pub json: bool,
    /// Attach a throwaway view of the file.
    #[command(flatten)]
    pub throwaway: ThrowawayArgs,
    /// The type of an encrypted volume that is not recognized: VeraCrypt, or a header in another file.
    #[arg(long, value_name = "TYPE", value_parser = encryption_type(), help_heading = HEADING)]
    pub encryption_type: Option<EncryptionType>,
    /// How to unlock an encrypted volume.
    #[command(flatten)]
    pub encryption: EncryptionArgs,
    /// Options for use without a terminal.
    #[command(flatten)]
    pub desktop: MountOnDesktop,
}

/// The options of `mount` for the entries of desktop menus.
#[derive(Args, Clone, Copy, Debug)]
pub struct MountOnDesktop {
    /// Show the mount point in the file manager.
    #[arg(long, help_heading = DESKTOP)]
    pub open: bool,
    /// Also show errors as notifications.
    #[arg(long, help_heading = DESKTOP)]
    pub notify: bool,
}

/// The arguments of `unmount`.
#[derive(Args, Clone, Debug)]
pub struct Unmount {
    /// An image, a device node (/dev/loop3, loop3), a partition node (/dev/loop3p1, loop3p1), a mount
    /// point or a directory below one.
    #[arg(value_name = "TARGET|DIR")]
    pub target: OsString,
    /// Remove a file system that is in use from the tree now; it is unmounted, and the device is
    /// detached, when its last user is done.
    #[arg(long)]
    pub lazy: bool,
    /// Also show errors as desktop notifications.
    #[arg(long)]
    pub notify: bool,
}

/// The arguments of `resize`.
#[derive(Args, Clone, Debug)]
pub struct Resize {
    /// The device or file.
    #[arg(help = TARGET_HELP, value_name = "TARGET")]
    pub target: OsString,
}

/// The arguments of `set`.
#[derive(Args, Clone, Debug)]
#[command(group = clap::ArgGroup::new("change").required(true).multiple(true))]
pub struct Set {
    /// The device or file.
    #[arg(help = TARGET_HELP, value_name = "TARGET")]
    pub target: OsString,
    /// Turn direct I/O on or off; on fails if the backing file does not support it.
    #[arg(long, value_name = "SWITCH", group = "change")]
    pub direct_io: Option<Switch>,
    /// The logical block size: a power of two from 512 to 64K.
    #[arg(short, long, value_name = "N", value_parser = values::nonzero_block_size, group = "change")]
    pub block_size: Option<u32>,
    /// When the device is detached automatically.
    ///
    /// `persistent`: never. `mount`: with the last unmount of the device or of one of its
    /// partitions, or after 60 seconds if it is not mounted.
    #[arg(long, value_name = "LIFETIME", value_parser = values::lifetime(), group = "change")]
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
    /// The device or file.
    #[arg(help = TARGET_HELP, value_name = "TARGET")]
    pub target: OsString,
}

/// The arguments of `run`.
#[derive(Args, Clone, Debug)]
pub struct Run {
    /// The file and how to attach it.
    #[command(flatten)]
    pub attach: AttachArgs,
    /// Unlock the encrypted volume, and run COMMAND with its cleartext.
    #[arg(long, help_heading = HEADING)]
    pub unlock: bool,
    /// Unlock this partition; by default the whole image, or the only encrypted partition.
    #[arg(short, long, value_name = "N", requires = "unlock", help_heading = HEADING)]
    pub partition: Option<u32>,
    /// The type of an encrypted volume that is not recognized: VeraCrypt, or a header in another file.
    #[arg(long, value_name = "TYPE", value_parser = encryption_type(), requires = "unlock", help_heading = HEADING)]
    pub encryption_type: Option<EncryptionType>,
    /// How to unlock the volume.
    #[command(flatten)]
    pub encryption: EncryptionArgs,
    /// The command and its arguments.
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub command: Vec<OsString>,
}

/// The arguments of `monitor`.
#[derive(Args, Clone, Copy, Debug)]
pub struct Monitor {
    /// Print each event as a JSON object on a line, with event, time_us (microseconds since 1970),
    /// device, path (of the bus object) and changed (the properties with their new values; all of them
    /// for attached, partition-added and unlocked); for a partition and its cleartext also partition, its number.
    #[arg(long)]
    pub json: bool,
}

/// The arguments of `losetup`.
#[derive(Args, Clone, Debug)]
pub struct Losetup {
    /// The arguments of losetup.
    #[arg(value_name = "ARGUMENT", trailing_var_arg = true, allow_hyphen_values = true)]
    pub arguments: Vec<OsString>,
}

/// The arguments of `completion`.
#[derive(Args, Clone, Copy, Debug)]
pub struct Completion {
    /// The shell.
    #[arg(value_name = "SHELL", value_enum)]
    pub shell: clap_complete::Shell,
}

/// The definition, from which completion scripts and manual pages are generated.
#[must_use]
pub fn command() -> clap::Command {
    Cli::command()
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
    fn the_definition_is_valid() {
        command().debug_assert();
    }

    #[test]
    fn options_are_accepted_in_any_order() {
        let line = "loopctl attach -r x.img --device loop7 -o 1M --overlap reuse -b 4K --json";
        let Ok(Verb::Attach(Attach { attach, lifetime, json })) = parse(line) else { panic!() };
        assert!(attach.read_only && json);
        assert_eq!((attach.offset, attach.block_size, attach.device), (1 << 20, 4096, Some(7)));
        assert_eq!((attach.overlap, lifetime), (Overlap::Reuse, Lifetime::Persistent));
    }

    #[test]
    fn a_command_must_follow_two_dashes() {
        let Ok(Verb::Run(run)) = parse("loopctl run x.img -r -- mount -r {}") else { panic!() };
        assert!(run.attach.read_only);
        assert_eq!(run.command, ["mount", "-r", "{}"]);
        usage_error("loopctl run x.img");
        usage_error("loopctl run x.img mount");
    }

    #[test]
    fn mount_and_unmount_need_exactly_one_target() {
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
    fn throwaway_options_conflict_with_read_only_and_need_throwaway() {
        for verb in ["attach x", "mount x", "run x -- true"] {
            let (verb, rest) = verb.split_once(' ').unwrap();
            parse(&format!("loopctl {verb} --throwaway --yes --throwaway-dir /tmp {rest}")).unwrap();
            usage_error(&format!("loopctl {verb} --throwaway -r {rest}"));
            usage_error(&format!("loopctl {verb} --yes {rest}"));
            usage_error(&format!("loopctl {verb} --throwaway-dir /tmp {rest}"));
        }
    }

    #[test]
    fn options_of_encrypted_volumes_are_accepted_where_one_is_unlocked() {
        let options = "--passphrase-file - --key-file a --key-file b --key-offset 4K --key-size 64 --header h --pim 485 \
            --hidden --system --discard";
        let line = format!("loopctl unlock loop3 -p 2 --type veracrypt -r {options} --json");
        let Ok(Verb::Unlock(unlock)) = parse(&line) else { panic!() };
        assert_eq!((unlock.partition, unlock.kind), (Some(2), Some(EncryptionType::VeraCrypt)));
        assert!(unlock.read_only && unlock.json && unlock.encryption.hidden && unlock.encryption.discard);
        assert_eq!(unlock.encryption.passphrase.key_files, [PathBuf::from("a"), "b".into()]);
        assert_eq!(unlock.encryption.passphrase.key_offset, Some(4096));
        parse(&format!("loopctl mount x.img --encryption-type luks -t ext4 {options}")).unwrap();
        parse(&format!("loopctl run x.img --unlock -p 1 --encryption-type luks {options} -- true")).unwrap();
        usage_error("loopctl run x.img -p 1 -- true");
        usage_error("loopctl unlock loop3 --key-size 64");
        assert!(usage_error("loopctl unlock loop3 --key-file x --key-size 9M").contains("1 byte to 8M"));
        usage_error("loopctl unlock loop3 --type plain");
        let Ok(Verb::Lock(lock)) = parse("loopctl lock x.img -p 1 --lazy") else { panic!() };
        assert!(lock.lazy && lock.partition == Some(1));
    }

    #[test]
    fn a_new_image_needs_a_size() {
        let line =
            "loopctl create x.img --size 64M --filesystem vfat --label DATA --encrypt --passphrase-file p";
        let Ok(Verb::Create(create)) = parse(line) else { panic!() };
        assert_eq!((create.size, create.filesystem), (64 << 20, Some(FilesystemType::Vfat)));
        assert!(create.encrypt && create.label.as_deref() == Some("DATA"));
        usage_error("loopctl create x.img");
        assert!(usage_error("loopctl create x.img --size 0").contains("512"));
        assert!(usage_error("loopctl create x.img --size 1000").contains("512"));
    }

    #[test]
    fn rescan_needs_exactly_one_target() {
        let Ok(Verb::Rescan(rescan)) = parse("loopctl rescan x.img") else { panic!() };
        assert_eq!(rescan.target, "x.img");
        usage_error("loopctl rescan");
        usage_error("loopctl rescan loop3 loop4");
    }

    #[test]
    fn set_needs_a_target_and_a_change() {
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
    fn arguments_of_losetup_are_passed_unchanged() {
        let arguments = |line| match parse(line) {
            Ok(Verb::Losetup(losetup)) => losetup.arguments,
            other => panic!("{line}: {other:?}"),
        };
        assert_eq!(arguments("loopctl losetup"), [""; 0]);
        assert_eq!(arguments("loopctl losetup --help"), ["--help"]);
        assert_eq!(arguments("loopctl losetup -V"), ["-V"]);
        assert_eq!(arguments("loopctl losetup -fP --show x.img"), ["-fP", "--show", "x.img"]);
        assert_eq!(arguments("loopctl losetup -a --no-color -- x"), ["-a", "--no-color", "--", "x"]);
    }

    #[test]
    fn invalid_arguments_are_explained() {
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
    fn column_names_are_case_insensitive() {
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
