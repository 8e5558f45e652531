//! `loopctl attach`.

use std::fs::File;

use loopd_dbus::proxy::Interaction;
use loopd_dbus::{AttachOptions, AttachmentProperties, Lifetime, Overlap};
use zbus::wire::OwnedObjectPath;

use crate::bus::agent::with_agent;
use crate::bus::attachment::{add_partitions, find_new};
use crate::bus::connection::Bus;
use crate::cli::{Attach, AttachArgs};
use crate::image::backing_file::open_backing_file;
use crate::image::file_state::add_file_states;
use crate::image::throwaway;
use crate::message::{message, warn};
use crate::show::json::Device;
use crate::show::stdout::{print, print_json};

/// Attaches the file and prints the device.
pub async fn run(args: &Attach, interaction: Interaction) -> anyhow::Result<u8> {
    let file = backing_file(&args.attach)?;
    let bus = Bus::open(interaction).await?;
    let options = options(&args.attach, args.lifetime);
    let (path, device) = with_agent(interaction, bus.attach(&file, &options)).await?;
    if args.json {
        let mut info = find_new(&bus.manager, &file, &path, &device).await?;
        add_partitions(&bus.connection, std::slice::from_mut(&mut info)).await?;
        add_file_states(std::slice::from_mut(&mut info)).await;
        print_json(&Device::from(&info))?;
        warn_of(&options, &info.attachment);
    } else {
        print(&format!("{device}\n"))?;
        check(&bus, &options, &path).await;
    }
    Ok(0)
}

/// Prints what is unusual about a new attachment. A failed call does not fail the attach.
pub async fn check(bus: &Bus, options: &AttachOptions, path: &OwnedObjectPath) {
    let Ok(attachment) = bus.attachment(path).await else { return };
    if let Ok(properties) = attachment.properties().await {
        warn_of(options, &properties);
    }
}

/// Prints loopd's warnings, and one if partition nodes were requested and there are none.
pub fn warn_of(options: &AttachOptions, attachment: &AttachmentProperties) {
    warn(&attachment.warnings);
    if let Some(text) = missing_partitions(options, &attachment.device, attachment.partition_scan) {
        message(&text);
    }
}

/// loopd clears the property if the image has partitions whose nodes cannot be created. A reused device
/// may also have been attached without them.
fn missing_partitions(options: &AttachOptions, device: &str, partition_scan: bool) -> Option<String> {
    if partition_scan || !options.partition_scan {
        return None;
    }
    let reused = match options.overlap {
        Overlap::Reuse => "it was attached earlier with --no-partitions, or ",
        Overlap::Allow | Overlap::Refuse => "",
    };
    Some(format!(
        "{device} has no partition nodes: {reused}this kernel reads no partition tables and loopd may not \
         add partitions itself; to allow that, copy partitions.conf from loopd's documentation to \
         /etc/systemd/system/loopd.service.d, and see `journalctl -u loopd`"
    ))
}

/// The options of the command line in the form of the D-Bus method.
pub fn options(args: &AttachArgs, lifetime: Lifetime) -> AttachOptions {
    AttachOptions {
        offset: args.offset,
        size_limit: args.size_limit,
        read_only: args.read_only,
        partition_scan: !args.no_partitions,
        direct_io: args.direct_io.then_some(true),
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

/// Opens the file to attach: the given one, or a throwaway copy of it.
pub fn backing_file(args: &AttachArgs) -> anyhow::Result<File> {
    if args.throwaway.throwaway {
        throwaway::make(&args.file, args.throwaway.throwaway_dir.as_deref(), args.throwaway.yes)
    } else {
        open_backing_file(&args.file, args.read_only)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, ThrowawayArgs, Verb};

    #[test]
    fn options_are_passed_to_loopd() {
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
            direct_io: Some(true),
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
    fn the_reference_of_a_throwaway_view_is_the_file_name() {
        let file = tempfile::Builder::new().suffix(".img").tempfile().unwrap();
        let path = file.path().to_str().unwrap();
        let parse = |options: &[&str]| {
            let cli = Cli::try_parse_from([&["loopctl", "attach", path, "--throwaway"], options].concat());
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
    fn missing_partitions_are_explained() {
        let requested = AttachOptions::default();
        let text = missing_partitions(&requested, "/dev/loop3", false).unwrap();
        assert!(text.starts_with("/dev/loop3 has no partition nodes: this kernel reads no"), "{text}");
        assert!(text.contains("partitions.conf") && text.contains("/etc/systemd/system/loopd.service.d"));
        assert!(text.contains("journalctl -u loopd"), "{text}");
        assert_eq!(missing_partitions(&requested, "/dev/loop3", true), None);
        let unrequested = AttachOptions { partition_scan: false, ..requested.clone() };
        assert_eq!(missing_partitions(&unrequested, "/dev/loop3", false), None);
        let reused = AttachOptions { overlap: Overlap::Reuse, ..requested };
        let text = missing_partitions(&reused, "/dev/loop3", false).unwrap();
        assert!(text.contains("attached earlier with --no-partitions, or this kernel"), "{text}");
    }
}
