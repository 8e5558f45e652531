//! No udev, and a udev that does not answer.

use loopd_dbus::{AttachOptions, ErrorKind, Lifetime};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::Setup;
use loopd_tests::world::{World, expect_kind};
use loopd_tests::{Outcome, host, sysfs};

loopd_tests::tests! {
    "udev";
    Setup::None => [absent, stuck, stuck_and_not_waited_for];
}

/// Stops udev for as long as it lives, in one way or the other.
struct Outage {
    absent: bool,
}

impl Outage {
    fn absent() -> anyhow::Result<Self> {
        host::get()?.udev.stop()?;
        Ok(Self { absent: true })
    }

    fn frozen() -> anyhow::Result<Self> {
        host::get()?.udev.freeze(true)?;
        Ok(Self { absent: false })
    }
}

impl Drop for Outage {
    fn drop(&mut self) {
        let mut host = host::get().expect("the host was there before");
        let back = if self.absent { host.udev.start() } else { host.udev.freeze(false) };
        back.expect("udev comes back");
    }
}

async fn absent(world: &mut World) -> Outcome {
    let _outage = Outage::absent()?;
    for restart in [false, true] {
        if restart {
            world.restart_daemon(&[]).await?;
        }
        let image = Image::sparse(&world.folder, format!("image-{restart}"), MIB)?;
        let attached = world.attach(&image.open()?, &AttachOptions::default()).await?;
        assert!(attached.device.bound());
        assert_eq!(world.properties(&attached.path).await?.state, "attached");
        world.detach(&attached).await?;
        assert!(!attached.device.bound());
    }
    Ok(())
}

async fn stuck(world: &mut World) -> Outcome {
    world.configure("[times]\nwait-for-udev = 0.5\n")?;
    world.restart_daemon(&[]).await?;
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let outage = Outage::frozen()?;
    for lifetime in [Lifetime::Client, Lifetime::Persistent] {
        let options = AttachOptions { lifetime, ..AttachOptions::default() };
        let error = world.attach_fails(&image.open()?, &options).await?;
        expect_kind(&error, ErrorKind::Timeout)?;
        assert!(sysfs::bound_by_tests(&world.folder).is_empty(), "{lifetime}: still attached");
        assert!(world.list(false).await?.is_empty());
    }
    drop(outage);
    loopd_tests::udev::settle().await?;
    assert!(sysfs::bound_by_tests(&world.folder).is_empty());
    // And all is well again.
    let attached = world.attach(&image.open()?, &AttachOptions::default()).await?;
    world.detach(&attached).await
}

async fn stuck_and_not_waited_for(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let outage = Outage::frozen()?;
    let options = AttachOptions { wait: false, ..AttachOptions::default() };
    let attached = world.attach(&image.open()?, &options).await?;
    world.detach(&attached).await?;
    assert!(!attached.device.bound());
    drop(outage);
    loopd_tests::udev::settle().await
}
