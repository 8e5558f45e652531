//! After a successful `Detach` the device is free; `Busy` names the holders and changes nothing.

use std::fs::File;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::time::Duration;

use anyhow::Context as _;
use loopd_dbus::{AttachOptions, AttachmentProperties, DetachOptions, ErrorKind, Lifetime};
use loopd_tests::bus::repository;
use loopd_tests::fixture::{Attached, Fixture, expect_kind, refusal};
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::losetup;
use loopd_tests::polkit::Setup;
use loopd_tests::process::{eventually, installed, output, run};
use loopd_tests::sysfs::{self, LoopDevice};
use loopd_tests::{Outcome, ROOT, skip};

loopd_tests::tests! {
    "detach";
    Setup::None => [
        device_is_free_after_the_reply,
        object_has_the_same_method,
        mounted_device_is_busy,
        busy_names_all_mount_points,
        open_device_is_busy,
        detach_waits_for_a_transient_opener,
        device_below_another_loop_device_is_busy,
        lazy_detach_ends_at_the_last_close,
        lazy_detach_of_an_unused_device_frees_it,
        lazy_detach_ends_at_the_unmount,
        detach_after_a_lazy_detach,
        foreign_device_is_detached,
        busy_foreign_device_stays,
        helper_of_a_unit_detaches_its_own_attachment,
        invalid_names_are_rejected,
        detach_of_a_free_device_is_not_found,
        object_of_an_ended_attachment_is_unknown,
    ];
}

const LIFETIMES: [Lifetime; 2] = [Lifetime::Client, Lifetime::Persistent];

fn with(lifetime: Lifetime) -> AttachOptions {
    AttachOptions { lifetime, ..AttachOptions::default() }
}

async fn ext4(fixture: &Fixture, name: &str) -> anyhow::Result<Image> {
    Image::ext4(&fixture.directory, name, "detach", "11111111-2222-3333-4444-00000000000c").await
}

async fn device_is_free_after_the_reply(fixture: &mut Fixture) -> Outcome {
    let image = ext4(fixture, "image").await?;
    for lifetime in LIFETIMES {
        for _ in 0..20 {
            let attached = fixture.attach(&image.open()?, &with(lifetime)).await?;
            fixture.detach(&attached).await?;
            assert!(!attached.device.bound(), "{lifetime}: {} is still bound", attached.device.node());
        }
    }
    Ok(())
}

async fn object_has_the_same_method(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &with(Lifetime::Persistent)).await?;
    fixture.object(&attached.path).await?.detach(DetachOptions::default()).await?;
    assert!(!attached.device.bound());
    Ok(())
}

/// Checks that a detach fails with `Busy`, that the message contains these texts, and that nothing changes.
async fn assert_busy(fixture: &Fixture, attached: &Attached, texts: &[&str]) -> Outcome {
    let before = fixture.properties(&attached.path).await?;
    let error = fixture.detach_fails(attached.device).await?;
    expect_kind(&error, ErrorKind::Busy)?;
    for text in texts {
        assert!(error.message.contains(text), "{text:?} is not in {:?}", error.message);
    }
    assert!(attached.device.bound());
    assert_eq!(attached.device.flag("loop/autoclear")?, before.autoclear);
    assert_eq!(fixture.properties(&attached.path).await?, before);
    Ok(())
}

async fn mounted_device_is_busy(fixture: &mut Fixture) -> Outcome {
    let image = ext4(fixture, "image").await?;
    for lifetime in LIFETIMES {
        let attached = fixture.attach(&image.open()?, &with(lifetime)).await?;
        let mounted = Mounted::new(attached.device, &fixture.directory, "mount point").await?;
        let directory = mounted.directory.to_str().unwrap().to_owned();
        assert_busy(fixture, &attached, &[&directory, &attached.device.node()]).await?;
        // The file system still works.
        std::fs::write(mounted.directory.join("file"), "data")?;
        mounted.unmount().await?;
        fixture.detach(&attached).await?;
        assert!(!attached.device.bound());
    }
    Ok(())
}

async fn busy_names_all_mount_points(fixture: &mut Fixture) -> Outcome {
    let image = ext4(fixture, "image").await?;
    let attached = fixture.attach(&image.open()?, &with(Lifetime::Persistent)).await?;
    let first = Mounted::new(attached.device, &fixture.directory, "first").await?;
    let second = Mounted::new(attached.device, &fixture.directory, "second").await?;
    let names = [first.directory.to_str().unwrap(), second.directory.to_str().unwrap()];
    assert_busy(fixture, &attached, &names).await?;
    second.unmount().await?;
    assert_busy(fixture, &attached, &[first.directory.to_str().unwrap()]).await?;
    first.unmount().await?;
    fixture.detach(&attached).await
}

async fn open_device_is_busy(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    for lifetime in LIFETIMES {
        let attached = fixture.attach(&image.open()?, &with(lifetime)).await?;
        let opener = File::open(attached.device.node())?;
        assert_busy(fixture, &attached, &["opened by a process"]).await?;
        drop(opener);
        fixture.detach(&attached).await?;
        assert!(!attached.device.bound());
    }
    Ok(())
}

async fn detach_waits_for_a_transient_opener(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    for lifetime in LIFETIMES {
        let attached = fixture.attach(&image.open()?, &with(lifetime)).await?;
        let opener = File::open(attached.device.node())?;
        // Well within the second that the daemon waits.
        let closing = tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(200)).await;
            drop(opener);
        });
        fixture.detach(&attached).await?;
        assert!(!attached.device.bound());
        closing.await?;
    }
    Ok(())
}

async fn device_below_another_loop_device_is_busy(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let lower = fixture.attach(&image.open()?, &with(Lifetime::Persistent)).await?;
    let upper = losetup::attach(&[&lower.device.node()]).await?;
    assert_busy(fixture, &lower, &[]).await?;
    run("losetup", ["-d", &upper.node()]).await?;
    // losetup does not wait: udev may still have it open.
    eventually("the upper one is free", async || Ok(!upper.bound())).await?;
    fixture.detach(&lower).await?;
    assert!(!lower.device.bound());
    Ok(())
}

async fn lazy_detach_ends_at_the_last_close(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    for lifetime in LIFETIMES {
        let attached = fixture.attach(&image.open()?, &with(lifetime)).await?;
        let opener = File::open(attached.device.node())?;
        fixture.object(&attached.path).await?.detach(DetachOptions { lazy: true }).await?;
        assert_eq!(fixture.properties(&attached.path).await?.state, "detaching");
        drop(opener);
        fixture.gone(&attached).await?;
    }
    Ok(())
}

async fn lazy_detach_of_an_unused_device_frees_it(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    for lifetime in LIFETIMES {
        let attached = fixture.attach(&image.open()?, &with(lifetime)).await?;
        fixture.manager.detach(&attached.device.node(), DetachOptions { lazy: true }).await?;
        fixture.gone(&attached).await?;
    }
    Ok(())
}

async fn lazy_detach_ends_at_the_unmount(fixture: &mut Fixture) -> Outcome {
    let image = ext4(fixture, "image").await?;
    for lifetime in LIFETIMES {
        let attached = fixture.attach(&image.open()?, &with(lifetime)).await?;
        let mounted = Mounted::new(attached.device, &fixture.directory, "mount point").await?;
        fixture.manager.detach(&attached.device.node(), DetachOptions { lazy: true }).await?;
        assert_eq!(fixture.properties(&attached.path).await?.state, "detaching");
        std::fs::write(mounted.directory.join("file"), "still there")?;
        run("sync", ["-f".as_ref(), mounted.directory.as_os_str()]).await?;
        mounted.unmount().await?;
        fixture.gone(&attached).await?;
    }
    Ok(())
}

async fn detach_after_a_lazy_detach(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &with(Lifetime::Persistent)).await?;
    let opener = File::open(attached.device.node())?;
    fixture.manager.detach(&attached.device.node(), DetachOptions { lazy: true }).await?;
    expect_kind(&fixture.detach_fails(attached.device).await?, ErrorKind::Busy)?;
    assert_eq!(fixture.properties(&attached.path).await?.state, "detaching");
    drop(opener);
    fixture.gone(&attached).await
}

async fn foreign_device_is_detached(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let device = losetup::attach(&[image.name()]).await?;
    fixture.manager.detach(&device.node(), DetachOptions::default()).await?;
    assert!(!device.bound());
    Ok(())
}

async fn busy_foreign_device_stays(fixture: &mut Fixture) -> Outcome {
    let image = ext4(fixture, "image").await?;
    let device = losetup::attach(&[image.name()]).await?;
    let mounted = Mounted::new(device, &fixture.directory, "mount point").await?;
    let error = fixture.detach_fails(device).await?;
    expect_kind(&error, ErrorKind::Busy)?;
    assert!(error.message.contains(mounted.directory.to_str().unwrap()), "{error}");
    assert!(device.bound() && !device.flag("loop/autoclear")?);
    mounted.unmount().await?;
    fixture.manager.detach(&device.node(), DetachOptions::default()).await?;
    assert!(!device.bound());
    Ok(())
}

/// A stand-in for a program that the helper of loop-image@.service calls. Before a detach is requested, another
/// program detaches the device and takes its number.
const FASTER: &str = r#"#!/bin/sh
case "$*" in
*etach*)
    losetup -d "$DEVICE"
    for _ in $(seq 100); do losetup "$DEVICE" "$OTHER" && break; sleep 0.05; done
    ;;
esac
exec REAL "$@"
"#;

/// It detaches the attachment that it made, and not what has its number by then.
async fn helper_of_a_unit_detaches_its_own_attachment(fixture: &mut Fixture) -> Outcome {
    if !installed("busctl") {
        return skip("busctl is not installed");
    }
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let other = Image::sparse(&fixture.directory, "other", MIB)?;
    let (tools, state) = (fixture.directory.join("tools"), fixture.directory.join("state"));
    std::fs::create_dir_all(&tools)?;
    std::fs::create_dir_all(&state)?;
    let loopctl = fixture.tool(ROOT, "loopctl")?.get_program().to_str().unwrap().to_owned();
    for (name, real) in [("loopctl", loopctl.as_str()), ("busctl", "/usr/bin/busctl")] {
        executable(&tools.join(name), &FASTER.replace("REAL", real))?;
    }
    executable(&tools.join("systemd-notify"), "#!/bin/sh\n")?;
    let path = format!("{}:{}", tools.display(), std::env::var("PATH")?);
    let helper = async |words: &[&str], device: &str| {
        let mut command = fixture.command(repository().join("systemd/loop-image"));
        command.args(words).env("PATH", &path).env("RUNTIME_DIRECTORY", &state);
        command.env("DEVICE", device).env("OTHER", other.name());
        output(command).await
    };
    let attached = helper(&["attach", "instance", image.name()], "").await?;
    assert!(attached.status.success(), "{attached:?}");
    let (_, properties) = fixture.list(false).await?.pop().context("nothing is attached")?;
    let device = LoopDevice(AttachmentProperties::from_dict(&properties)?.number);
    let detached = helper(&["detach", "instance"], &device.node()).await?;
    assert!(detached.status.success(), "{detached:?}");
    let shown = run("losetup", ["-n", "-O", "BACK-FILE", &device.node()]).await?;
    assert_eq!(shown.trim(), other.name(), "the device of another program");
    run("losetup", ["-d", &device.node()]).await?;
    fixture.assert_no_leak().await
}

fn executable(path: &Path, text: &str) -> anyhow::Result<()> {
    std::fs::write(path, text)?;
    Ok(std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755))?)
}

async fn invalid_names_are_rejected(fixture: &mut Fixture) -> Outcome {
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
        let error = refusal(fixture.manager.detach(name, DetachOptions::default()).await)?;
        let fits = matches!(error.kind, ErrorKind::InvalidArgs | ErrorKind::NotFound);
        assert!(fits, "{name:?}: {:?}: {error}", error.kind);
    }
    Ok(())
}

async fn detach_of_a_free_device_is_not_found(fixture: &mut Fixture) -> Outcome {
    let free = sysfs::last_free()?;
    expect_kind(&fixture.detach_fails(free).await?, ErrorKind::NotFound)?;
    let none = LoopDevice(sysfs::all().last().map_or(0, |last| last.0 + 100));
    expect_kind(&fixture.detach_fails(none).await?, ErrorKind::NotFound)?;
    assert!(!Path::new(&none.node()).exists(), "asking made a device");
    Ok(())
}

async fn object_of_an_ended_attachment_is_unknown(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &with(Lifetime::Persistent)).await?;
    fixture.detach(&attached).await?;
    // The same number again: the old object path must not refer to it.
    let options = AttachOptions { number: Some(attached.device.0), ..with(Lifetime::Persistent) };
    let again = fixture.attach(&image.open()?, &options).await?;
    assert_ne!(again.path, attached.path);
    let object = fixture.object(&attached.path).await?;
    expect_kind(&refusal(object.detach(DetachOptions::default()).await)?, ErrorKind::UnknownObject)?;
    assert!(again.device.bound());
    fixture.detach(&again).await
}
