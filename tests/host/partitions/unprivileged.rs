//! A daemon without any capability, as the shipped unit starts it.

use std::fs::File;

use loopd_dbus::{AttachOptions, DetachOptions, ErrorKind, Lifetime};
use loopd_tests::Outcome;
use loopd_tests::daemon::WITHOUT_CAPABILITIES;
use loopd_tests::fixture::{Fixture, expect_kind, refusal};
use loopd_tests::image::{Image, Mounted};
use loopd_tests::polkit::Setup;
use loopd_tests::table;

use super::{UUID, assert_none, assert_there, assert_warned, persistent, two};

loopd_tests::tests! {
    "partitions::unprivileged";
    Setup::None => [image_with_partitions_is_attached, rescan_needs_no_capability, busy_partition_is_found, lazy_detach_needs_no_capability];
}

const LIFETIMES: [Lifetime; 2] = [Lifetime::Client, Lifetime::Persistent];

async fn drop_privileges(fixture: &mut Fixture) -> Outcome {
    fixture.restart_daemon_under(WITHOUT_CAPABILITIES).await?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", fixture.daemon()?.pid()))?;
    for set in ["CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb"] {
        let empty = format!("{set}:\t0000000000000000");
        assert!(status.lines().any(|line| line == empty), "no {empty} in {status}");
    }
    assert!(status.lines().any(|line| line == "Uid:\t0\t0\t0\t0"), "{status}");
    Ok(())
}

fn with(lifetime: Lifetime, read_only: bool) -> AttachOptions {
    AttachOptions { lifetime, read_only, ..AttachOptions::default() }
}

async fn image_with_partitions_is_attached(fixture: &mut Fixture) -> Outcome {
    drop_privileges(fixture).await?;
    let image = two(fixture, "image")?;
    let expected = table::of(image.name(), 512).await?;
    let kernel_reads = table::kernel_reads()?;
    for lifetime in LIFETIMES {
        for read_only in [false, true] {
            let attached = fixture.attach(&image.open()?, &with(lifetime, read_only)).await?;
            assert!(attached.device.bound());
            let properties = fixture.properties(&attached.path).await?;
            assert_eq!((properties.state.as_str(), properties.read_only), ("attached", read_only));
            assert_eq!(properties.partition_scan, kernel_reads);
            // A list of all devices reads the device again.
            fixture.list(true).await?;
            assert_eq!(fixture.properties(&attached.path).await?.partition_scan, kernel_reads);
            if kernel_reads {
                assert_there(fixture, &attached, &expected).await?;
            } else {
                assert!(fixture.partitions(&attached).await?.is_empty());
                assert_none(attached.device);
            }
            fixture.detach(&attached).await?;
            assert!(!attached.device.bound());
            assert_none(attached.device);
        }
    }
    if kernel_reads {
        assert!(!fixture.log().contains("partitions.conf"));
    } else {
        assert_warned(fixture, "partitions.conf");
    }
    Ok(())
}

async fn rescan_needs_no_capability(fixture: &mut Fixture) -> Outcome {
    drop_privileges(fixture).await?;
    let image = two(fixture, "image")?;
    for lifetime in LIFETIMES {
        let attached = fixture.attach(&image.open()?, &with(lifetime, false)).await?;
        let result = fixture.object(&attached.path).await?.rescan_partitions().await;
        if table::kernel_reads()? {
            result?;
            assert_there(fixture, &attached, &table::of(image.name(), 512).await?).await?;
        } else {
            expect_kind(&refusal(result)?, ErrorKind::NotSupported)?;
        }
        assert_eq!(fixture.properties(&attached.path).await?.state, "attached");
        fixture.detach(&attached).await?;
    }
    Ok(())
}

async fn busy_partition_is_found(fixture: &mut Fixture) -> Outcome {
    drop_privileges(fixture).await?;
    let image = Image::ext4(&fixture.directory, "image", "busy", UUID).await?;
    for lifetime in LIFETIMES {
        for read_only in [false, true] {
            let attached = fixture.attach(&image.open()?, &with(lifetime, read_only)).await?;
            let before = fixture.properties(&attached.path).await?;
            let mounted = Mounted::new(attached.device, &fixture.directory, "mount point").await?;
            let error = fixture.detach_fails(attached.device).await?;
            expect_kind(&error, ErrorKind::Busy)?;
            assert!(error.message.contains(mounted.directory.to_str().unwrap()), "{error}");
            mounted.unmount().await?;
            // Only an attempt finds a process that just has it open.
            let opener = File::open(attached.device.node())?;
            let error = fixture.detach_fails(attached.device).await?;
            expect_kind(&error, ErrorKind::Busy)?;
            assert!(attached.device.bound());
            drop(opener);
            let what = format!("{lifetime}, read-only {read_only}");
            assert!(attached.device.bound(), "{what}: gone with its opener");
            assert_eq!(fixture.properties(&attached.path).await?, before, "{what}");
            fixture.detach(&attached).await?;
            let file = attached.device.backing_file().map(|file| String::from_utf8_lossy(&file).into_owned());
            assert_eq!(file, None, "{what}: still bound");
        }
    }
    Ok(())
}

async fn lazy_detach_needs_no_capability(fixture: &mut Fixture) -> Outcome {
    drop_privileges(fixture).await?;
    let image = Image::ext4(&fixture.directory, "image", "lazy", UUID).await?;
    for lifetime in LIFETIMES {
        let attached = fixture.attach(&image.open()?, &with(lifetime, false)).await?;
        let mounted = Mounted::new(attached.device, &fixture.directory, "mount point").await?;
        fixture.manager.detach(&attached.device.node(), DetachOptions { lazy: true }).await?;
        assert_eq!(fixture.properties(&attached.path).await?.state, "detaching");
        std::fs::write(mounted.directory.join("file"), "still there")?;
        mounted.unmount().await?;
        fixture.gone(&attached).await?;
        let attached = fixture.attach(&image.open()?, &AttachOptions { wait: false, ..persistent() }).await?;
        fixture.manager.detach(&attached.device.node(), DetachOptions { lazy: true }).await?;
        fixture.gone(&attached).await?;
    }
    Ok(())
}
