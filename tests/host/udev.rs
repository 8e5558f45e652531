//! No udev, a udev that does not answer, and the rules for what users attach.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use loopd_dbus::{AttachOptions, ErrorKind, Lifetime};
use loopd_tests::bus::repository;
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::Answer;
use loopd_tests::polkit::Setup;
use loopd_tests::process::run;
use loopd_tests::sysfs::LoopDevice;
use loopd_tests::world::{World, expect_kind};
use loopd_tests::{GAMES, Outcome, host, sysfs};

loopd_tests::tests! {
    "udev";
    Setup::None => [absent, stuck, stuck_and_not_waited_for];
    Setup::StandIn(Answer::Yes) => [types_are_hidden_of_what_users_attach, nothing_is_attached_without_a_mark];
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

/// The shipped rules, for the daemon of this test.
struct Rules {
    installed: Vec<PathBuf>,
}

impl Rules {
    async fn install(world: &World) -> anyhow::Result<Self> {
        let directory = Path::new("/run/udev/rules.d");
        std::fs::create_dir_all(directory)?;
        let sources = repository().join("systemd");
        let mut rules = Self { installed: Vec::new() };
        for (source, name) in [
            ("63-untrusted-loop.rules.in", "63-untrusted-loop.rules"),
            ("98-untrusted-loop.rules", "98-untrusted-loop.rules"),
        ] {
            let text = std::fs::read_to_string(sources.join(source))?;
            let run = world.folder.join("run").display().to_string();
            let text =
                text.replace("/run/loopd", &run).replace("@LIBEXECDIR@", &sources.display().to_string());
            rules.installed.push(directory.join(name));
            std::fs::write(directory.join(name), text)?;
        }
        run("udevadm", ["control", "--reload"]).await?;
        Ok(rules)
    }
}

impl Drop for Rules {
    fn drop(&mut self) {
        for rules in &self.installed {
            let _ = std::fs::remove_file(rules);
        }
        // One that others use is not empty.
        let _ = std::fs::remove_dir("/run/udev/rules.d");
        let _ = std::process::Command::new("udevadm").args(["control", "--reload"]).status();
    }
}

/// A property of a device in udev's database; empty if it has none.
async fn property(device: LoopDevice, name: &str) -> anyhow::Result<String> {
    let known = run("udevadm", ["info", "--query=property", &device.node()]).await?;
    let value = known.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='));
    Ok(value.unwrap_or_default().to_owned())
}

/// A type that no rule of udev acts on, and that is not known to be harmless.
async fn types_are_hidden_of_what_users_attach(world: &mut World) -> Outcome {
    let _rules = Rules::install(world).await?;
    let image = Image::sparse(&world.folder, "image", MIB)?;
    image.chown(GAMES)?;
    image.open()?.write_all_at(b"verity\0\0\x01\0\0\0\x01\0\0\0", 0)?;
    let path = image.path.display().to_string();
    let kind = "DM_verity_hash";
    for wait in ["wait=b:true", "wait=b:false"] {
        let attached = world
            .probe(GAMES, ["setup", "regular", &path, "lifetime=s:persistent", wait])
            .await?
            .attached()?;
        loopd_tests::udev::settle().await?;
        assert_eq!(property(attached.device, "LOOPD_UNTRUSTED").await?, "1");
        assert_eq!(property(attached.device, "LOOPD_FS_TYPE").await?, kind);
        assert_eq!(property(attached.device, "ID_FS_TYPE").await?, "");
        assert_eq!(world.volume(&attached.path).await?.filesystem_type, kind, "loopd knows it");
        // The mark outlives the daemon.
        world.end_daemon().await?;
        run("udevadm", ["trigger", "--settle", "--action=change", &attached.device.node()]).await?;
        assert_eq!(property(attached.device, "ID_FS_TYPE").await?, "");
        world.restart_daemon(&[]).await?;
        world.detach(&attached).await?;
    }
    let options = AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() };
    let attached = world.attach(&image.open()?, &options).await?;
    assert_eq!(property(attached.device, "LOOPD_UNTRUSTED").await?, "");
    assert_eq!(property(attached.device, "ID_FS_TYPE").await?, kind);
    world.detach(&attached).await?;
    world.assert_no_leak().await
}

async fn nothing_is_attached_without_a_mark(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    image.chown(GAMES)?;
    let path = image.path.display().to_string();
    std::fs::remove_dir_all(world.folder.join("run/untrusted"))?;
    for lifetime in ["lifetime=s:client", "lifetime=s:persistent"] {
        let error =
            world.probe(GAMES, ["setup", "regular", &path, lifetime]).await?.refused(ErrorKind::Kernel)?;
        assert!(error.message.contains("cannot tell udev"), "{error}");
    }
    assert!(sysfs::bound_by_tests(&world.folder).is_empty());
    world.assert_no_leak().await
}
