//! `loopctl mount`.

use std::fs::File;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

use loopd_dbus::proxy::Interaction;
use loopd_dbus::{AttachOptions, Error, ErrorKind, Lifetime, ListOptions, MountOptions, UnmountOptions};
use nix::unistd::getuid;
use zbus::wire::OwnedObjectPath;

use super::attach;
use super::release::release;
use crate::advice::Operation;
use crate::bus::agent::{Interrupted, interruptible, with_agent};
use crate::bus::attachment::{self, AttachmentInfo, add_partitions, list};
use crate::bus::connection::Bus;
use crate::bus::error::{explain, is_busy, is_gone};
use crate::cli::Mount;
use crate::desktop;
use crate::image::backing_file::{is_open_for_writing, open_backing_file};
use crate::image::file_state::add_file_states;
use crate::image::target::Target;
use crate::image::unlock::{UnlockRequest, lock, unlock};
use crate::image::volume::{self, FILESYSTEM, NoChoice, Volume};
use crate::image::{mount_point, throwaway};
use crate::message::printable;
use crate::report::{hint, report};
use crate::show::json::Device;
use crate::show::property::file;
use crate::show::stdout::{print_bytes, print_json};

/// Mounts the target and prints the mount point.
pub async fn run(args: &Mount, interaction: Interaction) -> anyhow::Result<u8> {
    let mut operation = Operation::Mount;
    let result = mount_and_print(args, interaction, &mut operation).await;
    let Err(error) = result else { return Ok(0) };
    let table = error.downcast_ref::<NoChoice>().map(|choice| choice.table.clone()).unwrap_or_default();
    if args.desktop.notify && !error.is::<Interrupted>() {
        let name = printable(args.target.as_bytes());
        let hint = hint(&error, operation).map(|hint| format!("{hint}\n")).unwrap_or_default();
        let body = format!("{error:#}\n{hint}{table}");
        desktop::notify(&format!("{name} is not mounted"), body.trim_end()).await;
    }
    let status = report(&error, operation);
    let _ = std::io::stderr().write_all(table.as_bytes());
    Ok(status)
}

/// Sets `operation` to what is known of the volume, for the hint of an error.
async fn mount_and_print(
    args: &Mount,
    interaction: Interaction,
    operation: &mut Operation,
) -> anyhow::Result<()> {
    // First: reading a FIFO may wait, and a signal then ends loopctl at once.
    let unlock = UnlockRequest::new(&args.encryption, args.encryption_type, args.read_only, interaction)?;
    let source = Source::of(args)?;
    let bus = Bus::open(interaction).await?;
    let (path, point) = mount(&bus, args, &source, &unlock, operation).await?;
    if args.json {
        let info = attachment::find(&bus, &path).await?;
        let mut info = info.ok_or_else(|| anyhow::anyhow!("it was mounted, but has been unmounted since"))?;
        add_file_states(std::slice::from_mut(&mut info)).await;
        print_json(&Device::from(&info))?;
    } else {
        let line = [point.as_os_str().as_bytes(), b"\n"].concat();
        print_bytes(&line)?;
    }
    if args.desktop.open { desktop::open(&point).await } else { Ok(()) }
}

/// What to mount.
enum Source {
    /// A file, which may already be attached.
    File {
        /// Opened with the user's rights.
        file: File,
        /// Whether it is open for writing.
        is_writable: bool,
    },
    /// A new copy.
    Throwaway {
        /// The copy.
        file: File,
        /// The name of the original.
        reference: String,
    },
    /// An existing attachment.
    Target(Target),
}

impl Source {
    fn of(args: &Mount) -> anyhow::Result<Self> {
        let target = Target::resolve(&args.target);
        let path = match &target {
            Target::File(path) => path,
            Target::Device(_) | Target::Partition { .. } if args.throwaway.throwaway => anyhow::bail!(
                "a throwaway view needs a file, and {} is a device",
                printable(args.target.as_bytes())
            ),
            Target::Device(_) | Target::Partition { .. } => return Ok(Self::Target(target)),
        };
        if args.throwaway.throwaway {
            let reference = throwaway::reference(path);
            let directory = args.throwaway.throwaway_dir.as_deref();
            let file = throwaway::make(path, directory, args.throwaway.yes)?;
            return Ok(Self::Throwaway { file, reference });
        }
        // A deleted file may still be attached.
        if !path.exists() {
            return Ok(Self::Target(target));
        }
        let file = open_backing_file(path, args.read_only)?;
        if file.metadata()?.file_type().is_block_device() {
            return Ok(Self::Target(target));
        }
        let is_writable = is_open_for_writing(&file)?;
        Ok(Self::File { file, is_writable })
    }

    /// The attachment to mount, and the options if this call made it.
    async fn attach(&self, bus: &Bus) -> anyhow::Result<(OwnedObjectPath, Option<AttachOptions>)> {
        let (file, reference) = match self {
            Self::Target(target) => {
                let mut found = target.device().find_to_mount(&bus.manager).await?;
                // The latest of several: the user has just attached it.
                found.sort_by_key(|info| info.attachment.disk_sequence);
                let found = found.pop().map(|info| (info.path, None));
                return found.ok_or_else(|| anyhow::anyhow!("nothing is attached"));
            }
            Self::Throwaway { file, reference } => (file, reference.clone()),
            Self::File { file, is_writable } => {
                if let Some(own) = own_attachment(bus, file, *is_writable).await?
                    && (!own.is_detaching() || cancel_detach(bus, &own.path).await?)
                {
                    return Ok((own.path, None));
                }
                (file, String::new())
            }
        };
        let options = AttachOptions { lifetime: Lifetime::Mount, reference, ..AttachOptions::default() };
        let (path, _) = bus.attach(file, &options).await?;
        Ok((path, Some(options)))
    }
}

/// The user's suitable attachment of the whole file. A detaching one is still in use: a second device over
/// the same bytes would mount the same file system twice.
async fn own_attachment(bus: &Bus, file: &File, is_writable: bool) -> anyhow::Result<Option<AttachmentInfo>> {
    let same_file = ListOptions { file: Some(file.try_clone()?.into()), ..ListOptions::default() };
    let mut found = list(&bus.manager, &same_file).await?;
    found.retain(|info| is_suitable(info, getuid().as_raw(), is_writable));
    // Prefer a mounted one.
    add_partitions(&bus.connection, &mut found).await?;
    let is_mounted = |info: &AttachmentInfo| {
        volume::of(info).iter().any(|volume| mount_point::of(&volume.content()).is_some())
    };
    found.sort_by_key(|info| (!is_mounted(info), info.is_detaching()));
    Ok(found.into_iter().next())
}

/// Cancels a lazy detach; returns false if the attachment has ended in the meantime.
async fn cancel_detach(bus: &Bus, path: &OwnedObjectPath) -> anyhow::Result<bool> {
    match bus.attachment(path).await?.set_lifetime(Lifetime::Mount).await.map_err(explain) {
        Ok(()) => Ok(true),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

fn is_suitable(info: &AttachmentInfo, uid: u32, is_writable: bool) -> bool {
    let attachment = &info.attachment;
    let is_whole = attachment.offset == 0 && attachment.size_limit == 0;
    let is_writable_enough = !attachment.read_only || !is_writable;
    attachment.owner == uid && attachment.managed && is_whole && is_writable_enough
}

/// What a mount made, to undo it.
#[derive(Default)]
struct Made {
    /// The attachment.
    attached: Option<OwnedObjectPath>,
    /// The encrypted volume that it unlocked, or was about to.
    unlocked: Option<OwnedObjectPath>,
}

/// Attaches and unlocks if needed, and mounts. If that fails, locks and detaches what it unlocked and attached.
async fn mount(
    bus: &Bus,
    args: &Mount,
    source: &Source,
    unlock: &UnlockRequest<'_>,
    operation: &mut Operation,
) -> anyhow::Result<(OwnedObjectPath, PathBuf)> {
    let mut new = Made::default();
    let attach_and_mount = async {
        let (path, made) = source.attach(bus).await?;
        new.attached = made.is_some().then(|| path.clone());
        let info = attachment::find(bus, &path).await?;
        let info = info.ok_or_else(|| anyhow::anyhow!("it was attached, but has been detached since"))?;
        if let Some(options) = made {
            attach::warn_of(&options, &info.attachment);
        }
        let number = args.partition.or(match source {
            Source::Target(target) => target.partition(),
            Source::File { .. } | Source::Throwaway { .. } => None,
        });
        let info = unlocked(bus, args, info, number, unlock, &mut new.unlocked).await?;
        let point = mount_volume(bus, args, &info, number, operation).await?;
        anyhow::Ok((path, point))
    };
    let result = interruptible(with_agent(bus.interaction, attach_and_mount)).await;
    if let Err(error) = &result {
        undo(bus, &new, error.is::<Interrupted>()).await;
    }
    result
}

/// Unlocks the volume to mount if it is encrypted and locked. Returns the attachment as it is after that.
async fn unlocked(
    bus: &Bus,
    args: &Mount,
    info: AttachmentInfo,
    number: Option<u32>,
    request: &UnlockRequest<'_>,
    made: &mut Option<OwnedObjectPath>,
) -> anyhow::Result<AttachmentInfo> {
    let volume = match args.encryption.given() {
        None if !request.is_explicit() => volume::choose(&info, number)?,
        _ => volume::choose_encrypted(&info, number)?,
    };
    if !volume.is_encrypted() && !request.is_explicit() {
        return match args.encryption.given() {
            None => Ok(info),
            Some(option) => Err(not_encrypted(&info, option)),
        };
    }
    if volume.cleartext.is_some() {
        return Ok(info);
    }
    *made = Some(volume.path.clone());
    if let Err(error) = unlock(bus, &info, &volume, request).await {
        *made = None;
        return Err(error);
    }
    let info = attachment::find(bus, &info.path).await?;
    info.ok_or_else(|| anyhow::anyhow!("it was unlocked, but has been detached since"))
}

fn not_encrypted(info: &AttachmentInfo, option: &str) -> anyhow::Error {
    let device = &info.attachment.device;
    let text = format!("{option} is for encrypted volumes, and {device} ({}) has none", file(info));
    Error::new(ErrorKind::InvalidArgs, text).into()
}

async fn mount_volume(
    bus: &Bus,
    args: &Mount,
    info: &AttachmentInfo,
    number: Option<u32>,
    operation: &mut Operation,
) -> anyhow::Result<PathBuf> {
    let is_encrypted = args.encryption.given().is_some() || args.encryption_type.is_some();
    let choose = if is_encrypted { volume::choose_encrypted } else { volume::choose };
    let chosen = choose(info, number)?.content();
    if let Some(point) = mount_point::of(&chosen) {
        return Ok(point);
    }
    *operation = operation_on(&chosen, info, args);
    let options = MountOptions {
        read_only: args.read_only,
        filesystem: args.kind.clone(),
        options: options(args, &chosen.properties.filesystem_type),
    };
    match bus.volume(chosen.path).await?.mount(&options).await.map_err(explain) {
        Ok(point) => Ok(point.into()),
        // A concurrent mount at one of the user's mount points is equivalent.
        Err(error) if is_busy(&error) => concurrent_mount(bus, info, chosen.path).await?.ok_or(error),
        Err(error) => Err(error),
    }
}

/// The user's options. A throwaway view has the UUID of its image, which may be mounted: xfs then refuses to mount the
/// view without the option `nouuid`.
fn options(args: &Mount, found: &str) -> String {
    const NOUUID: &str = "nouuid";
    let kind = if args.kind.is_empty() { found } else { &args.kind };
    let is_missing = !args.options.split(',').any(|option| option == NOUUID);
    match (args.throwaway.throwaway && kind == "xfs" && is_missing, args.options.is_empty()) {
        (false, _) => args.options.clone(),
        (true, true) => NOUUID.to_owned(),
        (true, false) => format!("{},{NOUUID}", args.options),
    }
}

fn operation_on(volume: &Volume<'_>, info: &AttachmentInfo, args: &Mount) -> Operation {
    match volume.properties.usage.as_str() {
        "" if args.kind.is_empty() => Operation::MountUnrecognized,
        FILESYSTEM if info.attachment.read_only => Operation::MountReadOnly,
        _ => Operation::Mount,
    }
}

async fn concurrent_mount(
    bus: &Bus,
    info: &AttachmentInfo,
    volume: &OwnedObjectPath,
) -> anyhow::Result<Option<PathBuf>> {
    let Some(info) = attachment::find(bus, &info.path).await? else { return Ok(None) };
    let mut contents = volume::of(&info).into_iter().map(Volume::content);
    Ok(contents.find(|other| other.path == volume).and_then(|volume| mount_point::of(&volume)))
}

/// Locks and detaches what was unlocked and attached for the mount. After a signal each step may be pending or complete.
async fn undo(bus: &Bus, made: &Made, is_interrupted: bool) {
    if let Some(volume) = &made.unlocked {
        undo_unlock(bus, volume, is_interrupted).await;
    }
    let Some(path) = &made.attached else { return };
    let Ok(Some(info)) = attachment::find(bus, path).await else { return };
    if is_interrupted {
        for volume in volume::of(&info) {
            // Most of them are not mounted.
            unmount_lazily(bus, volume.path).await;
        }
    }
    release(bus, path, &info.attachment.device).await;
}

/// Locks the volume with this path. loopd answers the call after one that it has in progress on the volume.
async fn undo_unlock(bus: &Bus, volume: &OwnedObjectPath, is_interrupted: bool) {
    if is_interrupted && let Ok(cleartext) = OwnedObjectPath::try_from(format!("{volume}/cleartext")) {
        unmount_lazily(bus, &cleartext).await;
    }
    if let Err(error) = lock(bus, volume, true).await
        && !is_interrupted
    {
        report(&error, Operation::Other);
    }
}

async fn unmount_lazily(bus: &Bus, volume: &OwnedObjectPath) {
    if let Ok(volume) = bus.volume(volume).await {
        let _ = volume.unmount(UnmountOptions { lazy: true }).await;
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::bus::example;
    use crate::bus::fake::FakeLoopd;
    use crate::cli::{Cli, Verb};

    /// Mounts an image with these options through a fake loopd; returns the mount point or the error.
    fn mount_image(loopd: &FakeLoopd, options: &str) -> Result<PathBuf, String> {
        let directory = tempfile::tempdir().unwrap();
        let (image, key) = (directory.path().join("x.img"), directory.path().join("key"));
        std::fs::write(&image, "image").unwrap();
        std::fs::write(&key, "secret").unwrap();
        let options = options.replace("KEY", key.to_str().unwrap());
        let line = format!("loopctl mount {} {options}", image.display());
        let Ok(Verb::Mount(args)) = Cli::try_parse_from(line.split_whitespace()).map(|cli| cli.verb) else {
            panic!("{line}")
        };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let bus = loopd.connect().await;
            let unlock =
                UnlockRequest::new(&args.encryption, args.encryption_type, args.read_only, bus.interaction);
            let source = Source::of(&args).unwrap();
            let result = mount(&bus, &args, &source, &unlock.unwrap(), &mut Operation::Mount).await;
            result.map(|(_, point)| point).map_err(|error| error.to_string())
        })
    }

    /// A loopd with an image whose only partition is encrypted.
    fn with_encrypted_partition() -> FakeLoopd {
        let mut info = example::attachment();
        info.partitions[0].volume.usage = "crypto".to_owned();
        FakeLoopd::new(info)
    }

    #[test]
    fn an_encrypted_image_is_attached_unlocked_and_mounted() {
        let loopd = with_encrypted_partition();
        let point = mount_image(&loopd, "--key-file KEY --discard -r");
        assert_eq!(point, Ok("/run/media/a/x".into()));
        assert_eq!(loopd.state().calls, ["SetupLoop", "Unlock 12/p1", "Mount 12/p1/cleartext"]);
        assert_eq!(loopd.state().unlock_options, ["discard", "read-only"]);
    }

    #[test]
    fn each_failing_step_undoes_those_before() {
        let loopd = with_encrypted_partition();
        loopd.state().mount_error = Some(ErrorKind::NotSupported);
        mount_image(&loopd, "--key-file KEY").unwrap_err();
        let undone = ["SetupLoop", "Unlock 12/p1", "Mount 12/p1/cleartext", "Lock 12/p1", "Detach 12"];
        assert_eq!(loopd.state().calls, undone);

        let loopd = with_encrypted_partition();
        loopd.state().secret = b"another".to_vec();
        assert_eq!(mount_image(&loopd, "--key-file KEY").unwrap_err(), "a test's error");
        assert_eq!(loopd.state().calls, ["SetupLoop", "Unlock 12/p1", "Detach 12"]);

        let loopd = with_encrypted_partition();
        let error = mount_image(&loopd, "").unwrap_err();
        assert!(error.starts_with("partition 1 of /home/a/x.img needs a passphrase"), "{error}");
        assert_eq!(loopd.state().calls, ["SetupLoop", "Detach 12"]);
    }

    #[test]
    fn a_volume_that_is_not_recognized_is_unlocked_if_its_type_is_given() {
        let mut info = example::attachment();
        info.partitions.clear();
        let loopd = FakeLoopd::new(info);
        mount_image(&loopd, "--encryption-type veracrypt --pim 5 --passphrase-file KEY").unwrap();
        assert_eq!(loopd.state().calls, ["SetupLoop", "Unlock 12", "Mount 12/cleartext"]);
        assert_eq!(loopd.state().unlock_options, ["pim", "type"]);
    }

    #[test]
    fn options_for_an_image_that_is_not_encrypted_are_refused() {
        let loopd = FakeLoopd::new(example::attachment());
        let error = mount_image(&loopd, "--passphrase-file KEY").unwrap_err();
        let expected = "--passphrase-file is for encrypted volumes, and /dev/loop0 (/home/a/x.img) has none";
        assert_eq!(error, expected);
        assert_eq!(loopd.state().calls, ["SetupLoop", "Detach 12"]);
    }

    #[test]
    fn only_the_users_own_attachment_of_the_whole_file_is_suitable() {
        let fits = |change: &dyn Fn(&mut AttachmentInfo), is_writable| {
            let mut info = example::attachment();
            change(&mut info);
            is_suitable(&info, 1000, is_writable)
        };
        assert!(fits(&|_| (), true) && fits(&|_| (), false));
        assert!(!fits(&|info| info.attachment.owner = 1001, false));
        assert!(!fits(&|info| info.attachment.offset = 512, false));
        assert!(!fits(&|info| info.attachment.size_limit = 512, false));
        assert!(fits(&|info| info.attachment.state = "detaching".to_owned(), false));
        assert!(!fits(&|info| info.attachment.managed = false, false));
        let read_only = |info: &mut AttachmentInfo| info.attachment.read_only = true;
        assert!(fits(&read_only, false) && !fits(&read_only, true));
    }
}
