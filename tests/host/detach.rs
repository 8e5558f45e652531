//! Detach tells the truth: free means free, `Busy` names who holds the device, and then nothing has
//! changed.

use std::fs::File;
use std::time::Duration;

use loopd_dbus::{AttachOptions, DetachOptions, ErrorKind, Lifetime};
use loopd_tests::Outcome;
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::polkit::Setup;
use loopd_tests::process::{eventually, run};
use loopd_tests::sysfs::{self, LoopDevice};
use loopd_tests::world::{Attached, World, expect_kind, refusal};

loopd_tests::tests! {
    "detach";
    Setup::None => [
        free_when_it_says_so,
        through_the_object,
        mounted,
        mounted_twice,
        open,
        transient_opener,
        loop_on_top,
        lazy_with_an_opener,
        lazy_without_one,
        lazy_while_mounted,
        lazy_then_not_lazy,
        foreign,
        foreign_and_busy,
        names_that_are_none,
        unbound,
        gone_object,
    ];
}

const LIFETIMES: [Lifetime; 2] = [Lifetime::Client, Lifetime::Persistent];

fn with(lifetime: Lifetime) -> AttachOptions {
    AttachOptions { lifetime, ..AttachOptions::default() }
}

async fn ext4(world: &World, name: &str) -> anyhow::Result<Image> {
    Image::ext4(&world.folder, name, "detach", "11111111-2222-3333-4444-00000000000c").await
}

async fn free_when_it_says_so(world: &mut World) -> Outcome {
    let image = ext4(world, "image").await?;
    for lifetime in LIFETIMES {
        for _ in 0..20 {
            let attached = world.attach(&image.open()?, &with(lifetime)).await?;
            world.detach(&attached).await?;
            assert!(!attached.device.bound(), "{lifetime}: {} is still bound", attached.device.node());
        }
    }
    Ok(())
}

async fn through_the_object(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let attached = world.attach(&image.open()?, &with(Lifetime::Persistent)).await?;
    world.object(&attached.path).await?.detach(DetachOptions::default()).await?;
    assert!(!attached.device.bound());
    Ok(())
}

/// Detaching fails with `Busy` and a message that has these words, and changes nothing.
async fn assert_busy(world: &World, attached: &Attached, words: &[&str]) -> Outcome {
    let before = world.properties(&attached.path).await?;
    let error = world.detach_fails(attached.device).await?;
    expect_kind(&error, ErrorKind::Busy)?;
    for word in words {
        assert!(error.message.contains(word), "{word:?} is not in {:?}", error.message);
    }
    assert!(attached.device.bound());
    assert_eq!(attached.device.flag("loop/autoclear")?, before.autoclear);
    assert_eq!(world.properties(&attached.path).await?, before);
    Ok(())
}

async fn mounted(world: &mut World) -> Outcome {
    let image = ext4(world, "image").await?;
    for lifetime in LIFETIMES {
        let attached = world.attach(&image.open()?, &with(lifetime)).await?;
        let mounted = Mounted::new(attached.device, &world.folder, "mount point").await?;
        let folder = mounted.folder.to_str().unwrap().to_owned();
        assert_busy(world, &attached, &[&folder, &attached.device.node()]).await?;
        // The file system still works.
        std::fs::write(mounted.folder.join("file"), "data")?;
        mounted.unmount().await?;
        world.detach(&attached).await?;
        assert!(!attached.device.bound());
    }
    Ok(())
}

async fn mounted_twice(world: &mut World) -> Outcome {
    let image = ext4(world, "image").await?;
    let attached = world.attach(&image.open()?, &with(Lifetime::Persistent)).await?;
    let first = Mounted::new(attached.device, &world.folder, "first").await?;
    let second = Mounted::new(attached.device, &world.folder, "second").await?;
    let names = [first.folder.to_str().unwrap(), second.folder.to_str().unwrap()];
    assert_busy(world, &attached, &names).await?;
    second.unmount().await?;
    assert_busy(world, &attached, &[first.folder.to_str().unwrap()]).await?;
    first.unmount().await?;
    world.detach(&attached).await
}

async fn open(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    for lifetime in LIFETIMES {
        let attached = world.attach(&image.open()?, &with(lifetime)).await?;
        let opener = File::open(attached.device.node())?;
        assert_busy(world, &attached, &["opened by a process"]).await?;
        drop(opener);
        world.detach(&attached).await?;
        assert!(!attached.device.bound());
    }
    Ok(())
}

async fn transient_opener(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    for lifetime in LIFETIMES {
        let attached = world.attach(&image.open()?, &with(lifetime)).await?;
        let opener = File::open(attached.device.node())?;
        // Well within the second that the daemon gives it.
        let closing = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(200)).await;
            drop(opener);
        });
        world.detach(&attached).await?;
        assert!(!attached.device.bound());
        closing.await?;
    }
    Ok(())
}

async fn loop_on_top(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let lower = world.attach(&image.open()?, &with(Lifetime::Persistent)).await?;
    let node = run("losetup", ["-f", "--show", &lower.device.node()]).await?;
    let upper = LoopDevice::from_node(node.trim())?;
    assert_busy(world, &lower, &[]).await?;
    run("losetup", ["-d", &upper.node()]).await?;
    // losetup does not wait: udev may have it open still.
    eventually("the upper one is free", async || Ok(!upper.bound())).await?;
    world.detach(&lower).await?;
    assert!(!lower.device.bound());
    Ok(())
}

async fn lazy_with_an_opener(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    for lifetime in LIFETIMES {
        let attached = world.attach(&image.open()?, &with(lifetime)).await?;
        let opener = File::open(attached.device.node())?;
        world.object(&attached.path).await?.detach(DetachOptions { lazy: true }).await?;
        assert_eq!(world.properties(&attached.path).await?.state, "detaching");
        drop(opener);
        world.gone(&attached).await?;
    }
    Ok(())
}

async fn lazy_without_one(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    for lifetime in LIFETIMES {
        let attached = world.attach(&image.open()?, &with(lifetime)).await?;
        world.manager.detach(&attached.device.node(), DetachOptions { lazy: true }).await?;
        world.gone(&attached).await?;
    }
    Ok(())
}

async fn lazy_while_mounted(world: &mut World) -> Outcome {
    let image = ext4(world, "image").await?;
    for lifetime in LIFETIMES {
        let attached = world.attach(&image.open()?, &with(lifetime)).await?;
        let mounted = Mounted::new(attached.device, &world.folder, "mount point").await?;
        world.manager.detach(&attached.device.node(), DetachOptions { lazy: true }).await?;
        assert_eq!(world.properties(&attached.path).await?.state, "detaching");
        std::fs::write(mounted.folder.join("file"), "still there")?;
        run("sync", ["-f".as_ref(), mounted.folder.as_os_str()]).await?;
        mounted.unmount().await?;
        world.gone(&attached).await?;
    }
    Ok(())
}

async fn lazy_then_not_lazy(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let attached = world.attach(&image.open()?, &with(Lifetime::Persistent)).await?;
    let opener = File::open(attached.device.node())?;
    world.manager.detach(&attached.device.node(), DetachOptions { lazy: true }).await?;
    expect_kind(&world.detach_fails(attached.device).await?, ErrorKind::Busy)?;
    assert_eq!(world.properties(&attached.path).await?.state, "detaching");
    drop(opener);
    world.gone(&attached).await
}

async fn foreign(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let node = run("losetup", ["-f", "--show", image.path.to_str().unwrap()]).await?;
    let device = LoopDevice::from_node(node.trim())?;
    world.manager.detach(&device.node(), DetachOptions::default()).await?;
    assert!(!device.bound());
    Ok(())
}

async fn foreign_and_busy(world: &mut World) -> Outcome {
    let image = ext4(world, "image").await?;
    let node = run("losetup", ["-f", "--show", image.path.to_str().unwrap()]).await?;
    let device = LoopDevice::from_node(node.trim())?;
    let mounted = Mounted::new(device, &world.folder, "mount point").await?;
    let error = world.detach_fails(device).await?;
    expect_kind(&error, ErrorKind::Busy)?;
    assert!(error.message.contains(mounted.folder.to_str().unwrap()), "{error}");
    assert!(device.bound() && !device.flag("loop/autoclear")?);
    mounted.unmount().await?;
    world.manager.detach(&device.node(), DetachOptions::default()).await?;
    assert!(!device.bound());
    Ok(())
}

async fn names_that_are_none(world: &mut World) -> Outcome {
    let names = [
        "",
        "/",
        "loop",
        "/dev/loop",
        "/dev/sda",
        "/dev/loop-control",
        "/dev/loop4294967296",
        "/dev/loop99999999999999999999",
        "/dev/loop-1",
        "/dev/loop+1",
        "/dev/loop00",
        "/dev/loop0 ",
        "/dev/loop0/",
        "/dev/loop0\n",
        "../dev/loop0",
        "/dev/../dev/loop0",
        "/dev/loop0p1",
        "/tmp/loop0",
    ];
    for name in names {
        let error = refusal(world.manager.detach(name, DetachOptions::default()).await)?;
        let fits = matches!(error.kind, ErrorKind::InvalidArgs | ErrorKind::NotFound);
        assert!(fits, "{name:?}: {:?}: {error}", error.kind);
    }
    Ok(())
}

async fn unbound(world: &mut World) -> Outcome {
    let free = sysfs::last_free()?;
    expect_kind(&world.detach_fails(free).await?, ErrorKind::NotFound)?;
    let none = LoopDevice(sysfs::all().last().map_or(0, |last| last.0 + 100));
    expect_kind(&world.detach_fails(none).await?, ErrorKind::NotFound)?;
    assert!(!std::path::Path::new(&none.node()).exists(), "asking made a device");
    Ok(())
}

async fn gone_object(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let attached = world.attach(&image.open()?, &with(Lifetime::Persistent)).await?;
    world.detach(&attached).await?;
    // The same number again: the handle of before must not reach it.
    let options = AttachOptions { number: Some(attached.device.0), ..with(Lifetime::Persistent) };
    let again = world.attach(&image.open()?, &options).await?;
    assert_ne!(again.path, attached.path);
    let object = world.object(&attached.path).await?;
    expect_kind(&refusal(object.detach(DetachOptions::default()).await)?, ErrorKind::UnknownObject)?;
    assert!(again.device.bound());
    world.detach(&again).await
}
