//! A daemon without any capability, as the shipped unit starts it.

use std::fs::File;

use loopd_dbus::{AttachOptions, DetachOptions, ErrorKind, Lifetime};
use loopd_tests::Outcome;
use loopd_tests::image::{Image, Mounted};
use loopd_tests::polkit::Setup;
use loopd_tests::table;
use loopd_tests::world::{World, expect_kind, refusal};

use super::{UUID, assert_none, assert_there, assert_warned, persistent, two};

loopd_tests::tests! {
    "partitions::unprivileged";
    Setup::None => [attached_all_the_same, rescan, busy, lazy];
}

/// uid 0 with no capability, and no way to get one.
const WRAPPER: &[&str] = &["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs", "--"];
const LIFETIMES: [Lifetime; 2] = [Lifetime::Client, Lifetime::Persistent];

async fn drop_privileges(world: &mut World) -> Outcome {
    world.restart_daemon_under(WRAPPER).await?;
    let status = std::fs::read_to_string(format!("/proc/{}/status", world.daemon()?.pid()))?;
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

async fn attached_all_the_same(world: &mut World) -> Outcome {
    drop_privileges(world).await?;
    let image = two(world, "image")?;
    let expected = table::of(image.name(), 512).await?;
    let kernel_reads = table::kernel_reads()?;
    for lifetime in LIFETIMES {
        for read_only in [false, true] {
            let attached = world.attach(&image.open()?, &with(lifetime, read_only)).await?;
            assert!(attached.device.bound());
            let properties = world.properties(&attached.path).await?;
            assert_eq!((properties.state.as_str(), properties.read_only), ("attached", read_only));
            assert_eq!(properties.partition_scan, kernel_reads);
            if kernel_reads {
                assert_there(world, &attached, &expected).await?;
            } else {
                assert!(world.partitions(&attached).await?.is_empty());
                assert_none(attached.device);
            }
            world.detach(&attached).await?;
            assert!(!attached.device.bound());
            assert_none(attached.device);
        }
    }
    if kernel_reads {
        assert!(!world.log().contains("partitions.conf"));
    } else {
        assert_warned(world, "partitions.conf");
    }
    Ok(())
}

async fn rescan(world: &mut World) -> Outcome {
    drop_privileges(world).await?;
    let image = two(world, "image")?;
    for lifetime in LIFETIMES {
        let attached = world.attach(&image.open()?, &with(lifetime, false)).await?;
        let result = world.object(&attached.path).await?.rescan_partitions().await;
        if table::kernel_reads()? {
            result?;
            assert_there(world, &attached, &table::of(image.name(), 512).await?).await?;
        } else {
            expect_kind(&refusal(result)?, ErrorKind::NotSupported)?;
        }
        assert_eq!(world.properties(&attached.path).await?.state, "attached");
        world.detach(&attached).await?;
    }
    Ok(())
}

async fn busy(world: &mut World) -> Outcome {
    drop_privileges(world).await?;
    let image = Image::ext4(&world.folder, "image", "busy", UUID).await?;
    for lifetime in LIFETIMES {
        for read_only in [false, true] {
            let attached = world.attach(&image.open()?, &with(lifetime, read_only)).await?;
            let before = world.properties(&attached.path).await?;
            let mounted = Mounted::new(attached.device, &world.folder, "mount point").await?;
            let error = world.detach_fails(attached.device).await?;
            expect_kind(&error, ErrorKind::Busy)?;
            assert!(error.message.contains(mounted.folder.to_str().unwrap()), "{error}");
            mounted.unmount().await?;
            // Whoever just has it open is met only by trying.
            let opener = File::open(attached.device.node())?;
            let error = world.detach_fails(attached.device).await?;
            expect_kind(&error, ErrorKind::Busy)?;
            assert!(attached.device.bound());
            drop(opener);
            let what = format!("{lifetime}, read-only {read_only}");
            assert!(attached.device.bound(), "{what}: gone with its opener");
            assert_eq!(world.properties(&attached.path).await?, before, "{what}");
            world.detach(&attached).await?;
            let file = attached.device.backing_file().map(|file| String::from_utf8_lossy(&file).into_owned());
            assert_eq!(file, None, "{what}: still bound");
        }
    }
    Ok(())
}

async fn lazy(world: &mut World) -> Outcome {
    drop_privileges(world).await?;
    let image = Image::ext4(&world.folder, "image", "lazy", UUID).await?;
    for lifetime in LIFETIMES {
        let attached = world.attach(&image.open()?, &with(lifetime, false)).await?;
        let mounted = Mounted::new(attached.device, &world.folder, "mount point").await?;
        world.manager.detach(&attached.device.node(), DetachOptions { lazy: true }).await?;
        assert_eq!(world.properties(&attached.path).await?.state, "detaching");
        std::fs::write(mounted.folder.join("file"), "still there")?;
        mounted.unmount().await?;
        world.gone(&attached).await?;
        let attached = world.attach(&image.open()?, &AttachOptions { wait: false, ..persistent() }).await?;
        world.manager.detach(&attached.device.node(), DetachOptions { lazy: true }).await?;
        world.gone(&attached).await?;
    }
    Ok(())
}
