//! No udev, a udev that does not answer, and the rules for devices of users.

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use loopd_dbus::{AttachOptions, ErrorKind, Lifetime};
use loopd_tests::bus::repository;
use loopd_tests::fixture::{Attached, Fixture, expect_kind};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::run;
use loopd_tests::sysfs::{Extent, LoopDevice};
use loopd_tests::table::Gpt;
use loopd_tests::{GAMES, Outcome, host, sysfs};

loopd_tests::tests! {
    "udev";
    Setup::None => [attach_without_udev, attach_with_a_hanging_udev_is_undone, attach_without_wait_ignores_a_hanging_udev,
        udev_that_has_ended_is_named_within_a_second, udev_that_is_not_heard_is_named_within_a_second];
    Setup::StandIn(Answer::Yes) => [types_of_user_images_are_hidden, attach_without_a_mark_fails];
}

/// Stops or freezes udev until it is dropped.
struct Outage {
    absent: bool,
}

impl Outage {
    fn absent() -> anyhow::Result<Self> {
        host::get()?.udev.stop()?;
        Ok(Self { absent: true })
    }

    /// Its socket stays.
    fn killed() -> anyhow::Result<Self> {
        host::get()?.udev.kill()?;
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

async fn attach_without_udev(fixture: &mut Fixture) -> Outcome {
    let _outage = Outage::absent()?;
    for restart in [false, true] {
        if restart {
            fixture.restart_daemon(&[]).await?;
        }
        let image = Image::sparse(&fixture.directory, format!("image-{restart}"), MIB)?;
        let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
        assert!(attached.device.bound());
        assert_eq!(fixture.properties(&attached.path).await?.state, "attached");
        fixture.detach(&attached).await?;
        assert!(!attached.device.bound());
    }
    Ok(())
}

async fn attach_with_a_hanging_udev_is_undone(fixture: &mut Fixture) -> Outcome {
    fixture.configure("[times]\nwait-for-udev = 0.5\n")?;
    fixture.restart_daemon(&[]).await?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let outage = Outage::frozen()?;
    for lifetime in [Lifetime::Client, Lifetime::Persistent] {
        let options = AttachOptions { lifetime, ..AttachOptions::default() };
        let error = fixture.attach_fails(&image.open()?, &options).await?;
        expect_kind(&error, ErrorKind::Timeout)?;
        assert!(sysfs::bound_by_tests(&fixture.directory).is_empty(), "{lifetime}: still attached");
        assert!(fixture.list(false).await?.is_empty());
    }
    drop(outage);
    loopd_tests::udev::settle().await?;
    assert!(sysfs::bound_by_tests(&fixture.directory).is_empty());
    // Afterwards everything works again.
    let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    fixture.detach(&attached).await
}

async fn attach_without_wait_ignores_a_hanging_udev(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let outage = Outage::frozen()?;
    let options = AttachOptions { wait: false, ..AttachOptions::default() };
    let attached = fixture.attach(&image.open()?, &options).await?;
    fixture.detach(&attached).await?;
    assert!(!attached.device.bound());
    drop(outage);
    loopd_tests::udev::settle().await
}

const SOON: Duration = Duration::from_secs(1);

/// An image with two partitions, of which the second has a file system.
async fn partitioned(fixture: &Fixture) -> anyhow::Result<Image> {
    let image = Image::sparse(&fixture.directory, "partitioned", 24 * MIB)?;
    Gpt::new(&[(2048, 4095), (4096, 40_959)]).write(&image)?;
    let second = Extent { start: 2 * MIB, size: 18 * MIB };
    image.add_ext4(second, "second", "11111111-2222-3333-4444-0000000000c0").await?;
    Ok(image)
}

/// The time that an attach took, the message of its warning, and the attachment.
async fn attach_in_silence(fixture: &Fixture, image: &Image) -> anyhow::Result<(Duration, String, Attached)> {
    let options = AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() };
    let begin = Instant::now();
    let attached = fixture.attach(&image.open()?, &options).await?;
    let took = begin.elapsed();
    let found = fixture.properties(&attached.path).await?.warnings.0;
    anyhow::ensure!(found.len() == 1 && found[0].code == "udev-silent", "{found:?}");
    Ok((took, found[0].message.clone(), attached))
}

async fn udev_that_has_ended_is_named_within_a_second(fixture: &mut Fixture) -> Outcome {
    let image = partitioned(fixture).await?;
    let outage = Outage::killed()?;
    let (took, message, attached) = attach_in_silence(fixture, &image).await?;
    assert!(took < SOON, "{took:?}");
    assert!(message.contains("udev does not answer"), "{message}");
    assert_eq!(attached.device.partition_nodes(), [1, 2].into());
    assert_eq!(fixture.partitions(&attached).await?.len(), 2);
    fixture.detach(&attached).await?;
    // What was found holds for the next ones.
    let (took, _, attached) = attach_in_silence(fixture, &image).await?;
    assert!(took < SOON / 2, "{took:?}");
    fixture.detach(&attached).await?;
    let output = fixture.loopctl(["attach", image.name()]).await?;
    anyhow::ensure!(output.status.success(), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("udev does not answer"), "{output:?}");
    let device = LoopDevice::from_node(std::str::from_utf8(&output.stdout)?.trim_end())?;
    fixture.loopctl(["detach", &device.node()]).await?;
    // And ends with it.
    drop(outage);
    let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    assert_eq!(fixture.properties(&attached.path).await?.warnings.0, []);
    fixture.detach(&attached).await
}

/// As in a container: udevd's events go to its own network namespace.
async fn udev_that_is_not_heard_is_named_within_a_second(fixture: &mut Fixture) -> Outcome {
    let image = partitioned(fixture).await?;
    fixture.restart_daemon_under(&["unshare", "--net"]).await?;
    let (took, message, attached) = attach_in_silence(fixture, &image).await?;
    assert!(took < SOON, "{took:?}");
    assert!(message.contains("udev's events do not arrive"), "{message}");
    let partitions = fixture.partitions(&attached).await?;
    assert_eq!(partitions.len(), 2);
    let labels: Vec<String> = partitions.into_values().map(|(_, volume)| volume.filesystem_label).collect();
    assert!(labels.contains(&"second".to_owned()), "{labels:?}");
    fixture.detach(&attached).await?;
    fixture.restart_daemon(&[]).await
}

/// The shipped rules, for the daemon of this test.
struct Rules {
    installed: Vec<PathBuf>,
}

impl Rules {
    async fn install(fixture: &Fixture) -> anyhow::Result<Self> {
        let directory = Path::new("/run/udev/rules.d");
        std::fs::create_dir_all(directory)?;
        let sources = repository().join("systemd");
        let mut rules = Self { installed: Vec::new() };
        for (source, name) in [
            ("63-untrusted-loop.rules.in", "63-untrusted-loop.rules"),
            ("98-untrusted-loop.rules", "98-untrusted-loop.rules"),
        ] {
            let text = std::fs::read_to_string(sources.join(source))?;
            let run = fixture.directory.join("run").display().to_string();
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
        // The directory is not empty if others use it.
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
async fn types_of_user_images_are_hidden(fixture: &mut Fixture) -> Outcome {
    let _rules = Rules::install(fixture).await?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    image.chown(GAMES)?;
    image.open()?.write_all_at(b"verity\0\0\x01\0\0\0\x01\0\0\0", 0)?;
    let path = image.name().to_owned();
    let kind = "DM_verity_hash";
    for wait in ["wait=b:true", "wait=b:false"] {
        let attached = fixture
            .probe(GAMES, ["setup", "regular", &path, "lifetime=s:persistent", wait])
            .await?
            .attached()?;
        loopd_tests::udev::settle().await?;
        assert_eq!(property(attached.device, "LOOPD_UNTRUSTED").await?, "1");
        assert_eq!(property(attached.device, "LOOPD_FS_TYPE").await?, kind);
        assert_eq!(property(attached.device, "ID_FS_TYPE").await?, "");
        assert_eq!(fixture.volume(&attached.path).await?.filesystem_type, kind, "loopd knows it");
        // The mark outlives the daemon.
        fixture.end_daemon().await?;
        run("udevadm", ["trigger", "--settle", "--action=change", &attached.device.node()]).await?;
        assert_eq!(property(attached.device, "ID_FS_TYPE").await?, "");
        fixture.restart_daemon(&[]).await?;
        fixture.detach(&attached).await?;
    }
    let options = AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() };
    let attached = fixture.attach(&image.open()?, &options).await?;
    assert_eq!(property(attached.device, "LOOPD_UNTRUSTED").await?, "");
    assert_eq!(property(attached.device, "ID_FS_TYPE").await?, kind);
    fixture.detach(&attached).await?;
    fixture.assert_no_leak().await
}

async fn attach_without_a_mark_fails(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    image.chown(GAMES)?;
    let path = image.name().to_owned();
    std::fs::remove_dir_all(fixture.directory.join("run/untrusted"))?;
    for lifetime in ["lifetime=s:client", "lifetime=s:persistent"] {
        let error =
            fixture.probe(GAMES, ["setup", "regular", &path, lifetime]).await?.refused(ErrorKind::Kernel)?;
        assert!(error.message.contains("cannot tell udev"), "{error}");
    }
    assert!(sysfs::bound_by_tests(&fixture.directory).is_empty());
    fixture.assert_no_leak().await
}
