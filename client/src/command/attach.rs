//! `loopctl attach`.

use std::fs::{self, File, FileType, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;

use loopd_dbus::proxy::{Interaction, Manager};
use loopd_dbus::{AttachOptions, Lifetime, ListOptions, Overlap};
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use zbus::wire::OwnedObjectPath;

use crate::agent::with_agent;
use crate::cli::{Attach, AttachArgs};
use crate::connection::Bus;
use crate::output::json::Device;
use crate::output::{printable, reason};
use crate::target::{Attached, list};
use crate::{connection, output, partition, throwaway};

/// Attaches the file and prints the device.
pub async fn run(args: &Attach, interaction: Interaction) -> anyhow::Result<u8> {
    let file = backing_file(&args.attach)?;
    let bus = connection::open(interaction).await?;
    let options = options(&args.attach, args.lifetime);
    let (path, device) = with_agent(interaction, setup(&bus.manager, &file, &options)).await?;
    if args.json {
        let mut attached = attached_as(&bus.manager, &file, &path, &device).await?;
        partition::add(&bus.connection, std::slice::from_mut(&mut attached)).await?;
        output::print_json(&Device::from(&attached))?;
        warn_of_unmade_partitions(&options, &device, attached.attachment.partition_scan);
    } else {
        output::print(&format!("{device}\n"))?;
        look_for_unmade_partitions(&bus, &options, &path, &device).await;
    }
    Ok(0)
}

/// Asks loopd for the device; gives its object and its node.
pub async fn setup(
    manager: &Manager,
    file: &File,
    options: &AttachOptions,
) -> anyhow::Result<(OwnedObjectPath, String)> {
    manager.setup_loop(file.as_fd(), options).await.map_err(connection::explain)
}

/// The properties of what was just attached.
pub async fn attached_as(
    manager: &Manager,
    file: &File,
    path: &OwnedObjectPath,
    device: &str,
) -> anyhow::Result<Attached> {
    let same_file = ListOptions { file: Some(file.try_clone()?.into()), all: true, ..ListOptions::default() };
    let found = list(manager, &same_file).await?.into_iter().find(|attached| attached.path == *path);
    found.ok_or_else(|| anyhow::anyhow!("{device} was attached, but somebody has detached it already"))
}

/// Asks loopd whether the partitions were made, and says so where they were not. Nothing is asked
/// for those who do not wait, and no failure is one of the attach.
pub async fn look_for_unmade_partitions(
    bus: &Bus,
    options: &AttachOptions,
    path: &OwnedObjectPath,
    device: &str,
) {
    if !options.wait || !options.partition_scan {
        return;
    }
    let Ok(attachment) = bus.attachment(path).await else { return };
    if let Ok(partition_scan) = attachment.partition_scan().await {
        warn_of_unmade_partitions(options, device, partition_scan);
    }
}

/// Says so where partitions were asked for and there are none.
pub fn warn_of_unmade_partitions(options: &AttachOptions, device: &str, partition_scan: bool) {
    if let Some(text) = unmade_partitions(options, device, partition_scan) {
        output::message(&text);
    }
}

/// loopd takes the property back where the image has partitions that cannot be made. A device that
/// was attached before may also have been attached without them.
fn unmade_partitions(options: &AttachOptions, device: &str, partition_scan: bool) -> Option<String> {
    if partition_scan || !options.partition_scan {
        return None;
    }
    let before = match options.overlap {
        Overlap::Reuse => "it was attached before and with --no-partitions, or ",
        Overlap::Allow | Overlap::Refuse => "",
    };
    Some(format!(
        "{device} has no partition nodes: {before}this kernel reads no partition tables and loopd may not \
         add partitions itself; to allow that put partitions.conf, which is among loopd's documents, into \
         /etc/systemd/system/loopd.service.d, and see `journalctl -u loopd`"
    ))
}

/// What the command line says, as loopd takes it.
pub fn options(args: &AttachArgs, lifetime: Lifetime) -> AttachOptions {
    AttachOptions {
        offset: args.offset,
        size_limit: args.size_limit,
        read_only: args.read_only,
        partition_scan: !args.no_partitions,
        direct_io: args.direct_io,
        block_size: args.block_size,
        lifetime,
        reference: reference(args),
        number: args.device,
        overlap: args.overlap,
        wait: !args.no_wait,
    }
}

fn reference(args: &AttachArgs) -> String {
    if args.reference.is_empty() && args.throwaway.throwaway {
        return throwaway::reference(&args.file);
    }
    args.reference.clone()
}

/// The file to attach: the one that is named, or a throwaway copy of it.
pub fn backing_file(args: &AttachArgs) -> anyhow::Result<File> {
    if args.throwaway.throwaway {
        throwaway::make(&args.file, &args.throwaway)
    } else {
        open_backing_file(&args.file, args.read_only)
    }
}

/// Opens the file with the user's own rights, for reading only where writing is not wanted or not
/// possible.
pub fn open_backing_file(path: &Path, read_only: bool) -> anyhow::Result<File> {
    let shown = printable(path.as_os_str().as_bytes());
    let cannot =
        |error: io::Error| anyhow::anyhow!("cannot open {shown}: {}{}", reason(&error), remedy(&error));
    // Looked at before it is opened: to open some devices has effects of its own.
    if let Some(kind) = unfit(fs::metadata(path).map_err(cannot)?.file_type()) {
        anyhow::bail!("cannot attach {shown}: it is {kind}; name a regular file or a block device");
    }
    let file = match open(path, !read_only) {
        Err(error) if !read_only && is_write_protected(&error) => {
            let file = open(path, false).map_err(cannot)?;
            output::message(&format!("{shown} is write-protected; the device will be read-only"));
            file
        }
        result => result.map_err(cannot)?,
    };
    Ok(file)
}

/// Opens a backing file.
///
/// # Errors
/// It cannot be opened.
pub fn open(path: &Path, write: bool) -> io::Result<File> {
    // Should the path have become a FIFO meanwhile, a plain open would wait for ever.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    let file = OpenOptions::new().read(true).write(write).custom_flags(flags.bits()).open(path)?;
    let status = OFlag::from_bits_truncate(fcntl(&file, FcntlArg::F_GETFL)?);
    fcntl(&file, FcntlArg::F_SETFL(status - OFlag::O_NONBLOCK))?;
    Ok(file)
}

/// Whether the file can perhaps be opened for reading.
#[must_use]
pub fn is_write_protected(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw);
    matches!(errno, Some(Errno::EACCES | Errno::EROFS | Errno::EPERM))
}

fn unfit(kind: FileType) -> Option<&'static str> {
    if kind.is_file() || kind.is_block_device() {
        None
    } else if kind.is_dir() {
        Some("a folder")
    } else if kind.is_fifo() {
        Some("a FIFO")
    } else if kind.is_socket() {
        Some("a socket")
    } else {
        Some("a character device")
    }
}

fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::NotFound => "; check the path, or make the file first, as with `truncate -s 64M FILE`",
        io::ErrorKind::PermissionDenied => {
            "; loopctl opens it with your own rights, so you must be able to read it"
        }
        _ => "",
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::fs::{MetadataExt, PermissionsExt};

    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, ThrowawayArgs, Verb};

    #[test]
    fn options_are_passed_on() {
        let args = AttachArgs {
            file: "x".into(),
            read_only: true,
            offset: 1,
            size_limit: 2,
            block_size: 512,
            direct_io: true,
            no_partitions: true,
            reference: "r".to_owned(),
            device: Some(3),
            overlap: Overlap::Refuse,
            no_wait: true,
            throwaway: ThrowawayArgs::default(),
        };
        let expected = AttachOptions {
            offset: 1,
            size_limit: 2,
            read_only: true,
            partition_scan: false,
            direct_io: true,
            block_size: 512,
            lifetime: Lifetime::Mount,
            reference: "r".to_owned(),
            number: Some(3),
            overlap: Overlap::Refuse,
            wait: false,
        };
        assert_eq!(options(&args, Lifetime::Mount), expected);
    }

    #[test]
    fn a_throwaway_view_is_named_after_its_file() {
        let file = tempfile::Builder::new().suffix(".img").tempfile().unwrap();
        let path = file.path().to_str().unwrap();
        let parse = |words: &[&str]| {
            let cli = Cli::try_parse_from([&["loopctl", "attach", path, "--throwaway"], words].concat());
            let Ok(Verb::Attach(args)) = cli.map(|cli| cli.verb) else { panic!() };
            args.attach
        };
        let args = parse(&[]);
        assert_eq!(reference(&args).as_str(), file.path().file_name().unwrap());
        assert_eq!(reference(&parse(&["--reference", "mine"])), "mine");
        let copy = backing_file(&args).unwrap().metadata().unwrap();
        assert_ne!(copy.ino(), file.as_file().metadata().unwrap().ino());
    }

    #[test]
    fn unmade_partitions_are_named_with_their_remedy() {
        let asked = AttachOptions::default();
        let text = unmade_partitions(&asked, "/dev/loop3", false).unwrap();
        assert!(text.starts_with("/dev/loop3 has no partition nodes: this kernel reads no"), "{text}");
        assert!(text.contains("partitions.conf") && text.contains("/etc/systemd/system/loopd.service.d"));
        assert!(text.contains("journalctl -u loopd"), "{text}");
        assert_eq!(unmade_partitions(&asked, "/dev/loop3", true), None);
        let unasked = AttachOptions { partition_scan: false, ..asked.clone() };
        assert_eq!(unmade_partitions(&unasked, "/dev/loop3", false), None);
        let reused = AttachOptions { overlap: Overlap::Reuse, ..asked };
        let text = unmade_partitions(&reused, "/dev/loop3", false).unwrap();
        assert!(text.contains("attached before and with --no-partitions, or this kernel"), "{text}");
    }

    #[test]
    fn files_are_opened_as_asked_and_block_again() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for (read_only, mode) in [(false, OFlag::O_RDWR), (true, OFlag::O_RDONLY)] {
            let opened = open_backing_file(file.path(), read_only).unwrap();
            let flags = OFlag::from_bits_truncate(fcntl(&opened, FcntlArg::F_GETFL).unwrap());
            assert_eq!(flags & OFlag::O_ACCMODE, mode);
            assert!(!flags.contains(OFlag::O_NONBLOCK));
        }
    }

    #[test]
    fn a_protected_file_is_opened_for_reading() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::set_permissions(file.path(), fs::Permissions::from_mode(0o444)).unwrap();
        let mut text = String::new();
        open_backing_file(file.path(), false).unwrap().read_to_string(&mut text).unwrap();
        assert!(is_write_protected(&io::Error::from(Errno::EROFS)));
        assert!(!is_write_protected(&io::Error::from(Errno::ENOENT)));
    }

    #[test]
    fn what_cannot_be_attached_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("fifo");
        nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
        let text = |path: &Path| open_backing_file(path, false).unwrap_err().to_string();
        assert!(text(&fifo).contains("it is a FIFO"));
        assert!(text(folder.path()).contains("it is a folder"));
        assert!(text(Path::new("/dev/null")).contains("a character device"));
        let missing = text(Path::new("/nonexistent/x.img"));
        assert!(
            missing.starts_with("cannot open /nonexistent/x.img: No such file or directory;"),
            "{missing}"
        );
    }
}
