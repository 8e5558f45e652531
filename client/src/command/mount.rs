//! `loopctl mount`.

use std::fs::File;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::PathBuf;

use loopd_dbus::proxy::Interaction;
use loopd_dbus::{AttachOptions, ErrorKind, Lifetime, ListOptions, MountOptions, State, UnmountOptions};
use nix::unistd::getuid;
use zbus::wire::OwnedObjectPath;

use super::{attach, detach};
use crate::agent::{Interrupted, interruptible, with_agent};
use crate::cli::Mount;
use crate::connection::{self, Bus, explain};
use crate::output::json::Device;
use crate::output::{self, printable};
use crate::target::{Attached, Target, attached_at, list};
use crate::volume::{self, NoChoice};
use crate::{desktop, mount_point, throwaway};

/// Mounts the target and prints the mount point.
pub async fn run(args: &Mount, interaction: Interaction) -> anyhow::Result<u8> {
    let result = show(args, interaction).await;
    let Err(error) = result else { return Ok(0) };
    let table = error.downcast_ref::<NoChoice>().map(|choice| choice.table.clone()).unwrap_or_default();
    if args.desktop.notify && !error.is::<Interrupted>() {
        let name = printable(args.target.as_bytes());
        desktop::notify(&format!("{name} is not mounted"), &format!("{error:#}\n{table}")).await;
    }
    let status = output::report(&error);
    let _ = std::io::stderr().write_all(table.as_bytes());
    Ok(status)
}

async fn show(args: &Mount, interaction: Interaction) -> anyhow::Result<()> {
    let source = Source::of(args)?;
    let bus = connection::open(interaction).await?;
    let (attached, point) = mount(&bus, args, &source).await?;
    if args.json {
        let attached = attached_at(&bus, &attached).await?;
        let attached =
            attached.ok_or_else(|| anyhow::anyhow!("it was mounted, and somebody unmounted it already"))?;
        output::print_json(&Device::from(&attached))?;
    } else {
        let line = [point.as_os_str().as_bytes(), b"\n"].concat();
        output::print_bytes(&line)?;
    }
    if args.desktop.open { desktop::open(&point).await } else { Ok(()) }
}

/// What is to be mounted.
enum Source {
    /// A file, which may be attached already.
    File {
        /// Opened with the user's rights.
        file: File,
        /// Whether the user wants to write, and may.
        is_writable: bool,
    },
    /// A copy that only we know of.
    Throwaway {
        /// It.
        file: File,
        /// The name of what it is a copy of.
        reference: String,
    },
    /// What is attached already.
    Target(Target),
}

impl Source {
    fn of(args: &Mount) -> anyhow::Result<Self> {
        let target = Target::resolve(&args.target);
        let path = match &target {
            Target::File(path) => path,
            Target::Device(_) | Target::Partition { .. } if args.throwaway.throwaway => anyhow::bail!(
                "a throwaway view is one of a file, and {} is a device",
                printable(args.target.as_bytes())
            ),
            Target::Device(_) | Target::Partition { .. } => return Ok(Self::Target(target)),
        };
        if args.throwaway.throwaway {
            let reference = throwaway::reference(path);
            return Ok(Self::Throwaway { file: throwaway::make(path, &args.throwaway)?, reference });
        }
        // One that is gone may still be attached.
        if !path.exists() {
            return Ok(Self::Target(target));
        }
        let file = attach::open_backing_file(path, args.read_only)?;
        if file.metadata()?.file_type().is_block_device() {
            return Ok(Self::Target(target));
        }
        let is_writable = is_open_for_writing(&file)?;
        Ok(Self::File { file, is_writable })
    }

    /// The attachment to mount, and the options with which it was made, where it was made here.
    async fn attach(&self, bus: &Bus) -> anyhow::Result<(OwnedObjectPath, Option<AttachOptions>)> {
        let (file, reference) = match self {
            Self::Target(target) => {
                let mut found = whole(target).find(&bus.manager).await?;
                // A file that is gone is known by the path that loopd lists, which whoever attached it chose.
                if matches!(target, Target::File(path) if !path.exists()) {
                    found.retain(|attached| attached.attachment.owner == getuid().as_raw());
                }
                // Of several the latest: it is the one that the user has just attached.
                found.sort_by_key(|attached| attached.attachment.disk_sequence);
                let found = found.pop().map(|attached| (attached.path, None));
                return found.ok_or_else(|| anyhow::anyhow!("nothing is attached"));
            }
            Self::Throwaway { file, reference } => (file, reference.clone()),
            Self::File { file, is_writable } => {
                if let Some(own) = own_attachment(bus, file, *is_writable).await?
                    && (!is_detaching(&own) || take_detach_back(bus, &own.path).await?)
                {
                    return Ok((own.path, None));
                }
                (file, String::new())
            }
        };
        let options = AttachOptions { lifetime: Lifetime::Mount, reference, ..AttachOptions::default() };
        let (path, _) = attach::setup(&bus.manager, file, &options).await?;
        Ok((path, Some(options)))
    }
}

/// A partition is reached by its device.
fn whole(target: &Target) -> Target {
    match target {
        Target::Partition { disk, .. } => Target::Device(*disk),
        other => other.clone(),
    }
}

fn is_open_for_writing(file: &File) -> std::io::Result<bool> {
    use nix::fcntl::{FcntlArg, OFlag, fcntl};
    let flags = OFlag::from_bits_truncate(fcntl(file, FcntlArg::F_GETFL)?);
    Ok(flags & OFlag::O_ACCMODE == OFlag::O_RDWR)
}

/// An attachment of the whole file that the user has already and that does. One that is being detached is
/// still in use: another device over the same bytes would be a second file system on them.
async fn own_attachment(bus: &Bus, file: &File, is_writable: bool) -> anyhow::Result<Option<Attached>> {
    let same_file = ListOptions { file: Some(file.try_clone()?.into()), ..ListOptions::default() };
    let mut found = list(&bus.manager, &same_file).await?;
    found.retain(|attached| is_suitable(attached, getuid().as_raw(), is_writable));
    // One that is mounted is what the user sees already.
    crate::partition::add(&bus.connection, &mut found).await?;
    let is_mounted =
        |attached: &Attached| volume::of(attached).iter().any(|volume| mount_point::of(volume).is_some());
    found.sort_by_key(|attached| (!is_mounted(attached), is_detaching(attached)));
    Ok(found.into_iter().next())
}

fn is_detaching(attached: &Attached) -> bool {
    attached.attachment.state == State::Detaching.as_str()
}

/// Takes a lazy detach back; false if the device has gone in the meantime.
async fn take_detach_back(bus: &Bus, path: &OwnedObjectPath) -> anyhow::Result<bool> {
    let taken = bus.attachment(path).await?.set_lifetime(Lifetime::Mount).await;
    match taken {
        Ok(()) => Ok(true),
        Err(error) => match loopd_dbus::error::from_call(&error) {
            Some(gone) if matches!(gone.kind, ErrorKind::NotFound | ErrorKind::UnknownObject) => Ok(false),
            _ => Err(explain(error)),
        },
    }
}

fn is_suitable(attached: &Attached, uid: u32, is_writable: bool) -> bool {
    let attachment = &attached.attachment;
    let is_whole = attachment.offset == 0 && attachment.size_limit == 0;
    let is_writable_enough = !attachment.read_only || !is_writable;
    attachment.owner == uid && attachment.managed && is_whole && is_writable_enough
}

/// Attaches where that is needed, and mounts. What it attached is detached again where it fails.
async fn mount(bus: &Bus, args: &Mount, source: &Source) -> anyhow::Result<(OwnedObjectPath, PathBuf)> {
    let mut ours = None;
    let work = async {
        let (path, made) = source.attach(bus).await?;
        ours = made.is_some().then(|| path.clone());
        let attached = attached_at(bus, &path).await?;
        let attached =
            attached.ok_or_else(|| anyhow::anyhow!("it was attached, and somebody detached it already"))?;
        if let Some(options) = made {
            let Attached { attachment, .. } = &attached;
            attach::warn_of_unmade_partitions(&options, &attachment.device, attachment.partition_scan);
        }
        let point = mount_volume(bus, args, source, &attached).await?;
        anyhow::Ok((path, point))
    };
    let result = interruptible(with_agent(bus.interaction, work)).await;
    if let (Err(error), Some(path)) = (&result, &ours) {
        undo(bus, path, error.is::<Interrupted>()).await;
    }
    result
}

async fn mount_volume(
    bus: &Bus,
    args: &Mount,
    source: &Source,
    attached: &Attached,
) -> anyhow::Result<PathBuf> {
    let named = match source {
        Source::Target(Target::Partition { number, .. }) => Some(*number),
        _ => None,
    };
    let chosen = volume::choose(attached, args.partition.or(named))?;
    if let Some(point) = mount_point::of(&chosen) {
        return Ok(point);
    }
    let options = MountOptions {
        read_only: args.read_only,
        filesystem: args.kind.clone(),
        options: args.options.clone(),
    };
    match bus.volume(chosen.path).await?.mount(&options).await.map_err(explain) {
        Ok(point) => Ok(point.into()),
        // Somebody was faster; as good as our own.
        Err(error) if detach::is_busy(&error) => {
            mounted_meanwhile(bus, attached, chosen.path).await?.ok_or(error)
        }
        Err(error) => Err(error),
    }
}

async fn mounted_meanwhile(
    bus: &Bus,
    attached: &Attached,
    volume: &OwnedObjectPath,
) -> anyhow::Result<Option<PathBuf>> {
    let Some(attached) = attached_at(bus, &attached.path).await? else { return Ok(None) };
    let found = volume::of(&attached).into_iter().find(|other| other.path == volume);
    Ok(found.and_then(|volume| mount_point::of(&volume)))
}

/// Detaches what was attached to be mounted. After a signal the mount may be under way, or done.
async fn undo(bus: &Bus, path: &OwnedObjectPath, is_interrupted: bool) {
    let Ok(Some(attached)) = attached_at(bus, path).await else { return };
    if is_interrupted {
        for volume in volume::of(&attached) {
            if let Ok(volume) = bus.volume(volume.path).await {
                // Most of them are not mounted.
                let _ = volume.unmount(UnmountOptions { lazy: true }).await;
            }
        }
    }
    detach::release(bus, path, &attached.attachment.device).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::output::json::tests::example;

    #[test]
    fn only_one_s_own_and_whole_attachment_does() {
        let fits = |change: &dyn Fn(&mut Attached), is_writable| {
            let mut attached = example();
            change(&mut attached);
            is_suitable(&attached, 1000, is_writable)
        };
        assert!(fits(&|_| (), true) && fits(&|_| (), false));
        assert!(!fits(&|one| one.attachment.owner = 1001, false));
        assert!(!fits(&|one| one.attachment.offset = 512, false));
        assert!(!fits(&|one| one.attachment.size_limit = 512, false));
        assert!(fits(&|one| one.attachment.state = "detaching".to_owned(), false));
        assert!(!fits(&|one| one.attachment.managed = false, false));
        let read_only = |one: &mut Attached| one.attachment.read_only = true;
        assert!(fits(&read_only, false) && !fits(&read_only, true));
    }

    #[test]
    fn files_opened_for_writing_are_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        for write in [false, true] {
            assert_eq!(is_open_for_writing(&attach::open(file.path(), write).unwrap()).unwrap(), write);
        }
    }
}
