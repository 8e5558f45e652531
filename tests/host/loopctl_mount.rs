//! `loopctl mount` and `unmount`, and umount's helper, with a stand-in for the service manager.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use loopd_tests::fixture::Fixture;
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::{eventually, output};
use loopd_tests::sysfs::{self, Extent, is_mount_point};
use loopd_tests::table::Gpt;
use loopd_tests::units::{Conduct, Units};
use loopd_tests::{GAMES, Outcome, ROOT, User};
use serde_json::Value;

loopd_tests::tests! {
    "loopctl_mount";
    Setup::None => [
        mount_and_unmount_leave_nothing,
        second_mount_prints_the_same_mount_point,
        json_shows_the_mount_point,
        one_of_several_partitions_is_chosen,
        existing_attachment_is_used_and_stays,
        unmount_accepts_every_name,
        unmount_lists_the_users,
        lazy_unmount_ends_with_the_last_user,
        mount_after_a_lazy_unmount_reuses_the_device,
        throwaway_mounts_are_separate,
        failed_mount_is_undone,
        interrupted_mount_is_undone,
        missing_service_manager_is_reported,
        helper_unmounts,
        helper_rejects_invalid_arguments,
    ];
    Setup::StandIn(Answer::Yes) => [authorized_user_mounts_and_unmounts];
    Setup::StandIn(Answer::No) => [denial_is_reported];
}

const UUID: &str = "11111111-2222-3333-4444-0000000000d1";

async fn image(fixture: &Fixture) -> Result<Image> {
    Image::ext4(&fixture.directory, "image", "data", UUID).await
}

/// The output of a command, without the newline; it must have succeeded.
fn printed(output: Output) -> Result<String> {
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8(output.stdout)?.trim_end_matches('\n').to_owned())
}

/// The message of a command that failed with this status; standard output must be empty.
fn complaint(output: Output, status: i32) -> Result<String> {
    ensure!(output.status.code() == Some(status) && output.stdout.is_empty(), "{output:?}");
    Ok(String::from_utf8(output.stderr)?)
}

async fn mount(fixture: &Fixture, arguments: &[&str]) -> Result<PathBuf> {
    Ok(printed(fixture.loopctl([&["mount"], arguments].concat()).await?)?.into())
}

async fn unmount(fixture: &Fixture, arguments: &[&str]) -> Outcome {
    let output = fixture.loopctl([&["unmount"], arguments].concat()).await?;
    ensure!(output.stderr.is_empty(), "{output:?}");
    ensure!(printed(output)?.is_empty(), "unmount prints nothing");
    Ok(())
}

/// The number of devices that the tests have attached.
fn attached(fixture: &Fixture) -> usize {
    sysfs::bound_by_tests(&fixture.directory).len()
}

/// Checks that no directory and no device is left, without waiting.
async fn nothing_left(fixture: &mut Fixture) -> Outcome {
    let directories = fixture.directory.join("media").read_dir().map_or(0, Iterator::count);
    ensure!(directories == 0, "{directories} directories are left");
    ensure!(attached(fixture) == 0, "a device is left");
    fixture.assert_no_leak().await
}

async fn mount_and_unmount_leave_nothing(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture).await?;
    let place = mount(fixture, &[image.name()]).await?;
    assert_eq!(place, fixture.directory.join("media/root/data"));
    assert!(is_mount_point(&place) && place.join("lost+found").exists());
    unmount(fixture, &[image.name()]).await?;
    assert!(!is_mount_point(&place));
    nothing_left(fixture).await
}

async fn second_mount_prints_the_same_mount_point(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture).await?;
    let first = mount(fixture, &[image.name()]).await?;
    assert_eq!(mount(fixture, &[image.name()]).await?, first);
    // Also for a read-only mount.
    assert_eq!(mount(fixture, &["-r", image.name()]).await?, first);
    assert_eq!(attached(fixture), 1);
    unmount(fixture, &[image.name()]).await?;
    let output = complaint(fixture.loopctl(["unmount", image.name()]).await?, 1)?;
    assert!(output.contains("is not attached"), "{output}");
    nothing_left(fixture).await
}

async fn json_shows_the_mount_point(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture).await?;
    let shown = printed(fixture.loopctl(["mount", "--json", "-r", image.name()]).await?)?;
    let shown: Value = serde_json::from_str(&shown)?;
    assert_eq!(shown["lifetime"], "mount");
    assert_eq!(shown["read_only"], true);
    assert_eq!(shown["mount_points"][0].as_str(), fixture.directory.join("media/root/data").to_str());
    unmount(fixture, &[shown["device"].as_str().unwrap()]).await?;
    nothing_left(fixture).await
}

/// An image with two ext4 partitions and an empty one.
async fn partitioned(fixture: &Fixture) -> Result<Image> {
    let image = Image::sparse(&fixture.directory, "image", 24 * MIB)?;
    Gpt::new(&[(2048, 18431), (18432, 34815), (34816, 36863)]).write(&image)?;
    for (start, label) in [(2048, "one"), (18432, "two")] {
        image.add_ext4(Extent { start: start * 512, size: 8 * MIB }, label, UUID).await?;
    }
    Ok(image)
}

async fn one_of_several_partitions_is_chosen(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = partitioned(fixture).await?;
    let output = complaint(fixture.loopctl(["mount", image.name()]).await?, 1)?;
    let lines: Vec<&str> = output.lines().collect();
    assert!(lines[0].contains("has 2 file systems; choose one with --partition"), "{output}");
    for (line, arguments) in lines[2..].iter().zip([["1", "8M", "ext4", "one"], ["2", "8M", "ext4", "two"]]) {
        let shown: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(shown[..4], arguments);
    }
    assert_eq!(lines.len(), 5, "{output}");
    complaint(fixture.loopctl(["mount", "-p", "9", image.name()]).await?, 1)?;
    nothing_left(fixture).await?;

    let one = mount(fixture, &["-p", "1", image.name()]).await?;
    let node = sysfs::bound_by_tests(&fixture.directory)[0].node();
    let two = mount(fixture, &[&format!("{node}p2")]).await?;
    assert!(is_mount_point(&one) && is_mount_point(&two));
    assert_eq!(attached(fixture), 1);
    unmount(fixture, &[one.to_str().unwrap()]).await?;
    assert!(is_mount_point(&two), "only one was meant");
    mount(fixture, &["-p", "1", image.name()]).await?;
    unmount(fixture, &[image.name()]).await?;
    nothing_left(fixture).await
}

async fn existing_attachment_is_used_and_stays(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture).await?;
    let node = printed(fixture.loopctl(["attach", "-r", image.name()]).await?)?;
    // A read-only mount uses it, and it stays.
    let place = mount(fixture, &["-r", image.name()]).await?;
    assert_eq!(attached(fixture), 1);
    unmount(fixture, &[place.to_str().unwrap()]).await?;
    assert_eq!(attached(fixture), 1);
    let output = complaint(fixture.loopctl(["unmount", &node]).await?, 1)?;
    assert!(output.contains(&format!("`loopctl detach {node}`")), "{output}");
    // A writable mount does not.
    mount(fixture, &[image.name()]).await?;
    assert_eq!(attached(fixture), 2);
    unmount(fixture, &[image.name()]).await?;
    assert_eq!(attached(fixture), 1);
    printed(fixture.loopctl(["detach", &node]).await?)?;
    nothing_left(fixture).await
}

async fn unmount_accepts_every_name(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture).await?;
    let place = fixture.directory.join("media/root/data");
    let link = fixture.directory.join("link");
    std::os::unix::fs::symlink(&place, &link)?;
    let (below, around) = (link.join("lost+found"), link.join("../data"));
    for name in [&image.path, &place, &link, &below, &around] {
        mount(fixture, &[image.name()]).await?;
        unmount(fixture, &[name.to_str().unwrap()]).await.with_context(|| format!("{name:?}"))?;
        nothing_left(fixture).await?;
    }
    for name in ["/", "/proc", "/nonexistent", image.name()] {
        complaint(fixture.loopctl(["unmount", name]).await?, 1).with_context(|| name.to_owned())?;
    }
    Ok(())
}

async fn unmount_lists_the_users(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture).await?;
    let place = mount(fixture, &[image.name()]).await?;
    let below = place.join("lost+found");
    let mut sitter = Command::new("sleep").arg("600").current_dir(&below).spawn()?;
    let output = complaint(fixture.loopctl(["unmount", image.name()]).await?, 1);
    sitter.kill()?;
    sitter.wait()?;
    let expected =
        format!("loopctl: process {} (sleep) has its working directory at {}", sitter.id(), below.display());
    let output = output?;
    assert!(output.lines().any(|line| line == expected), "{output}");
    assert!(is_mount_point(&place));
    unmount(fixture, &[image.name()]).await?;
    nothing_left(fixture).await
}

async fn lazy_unmount_ends_with_the_last_user(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture).await?;
    let place = mount(fixture, &[image.name()]).await?;
    let open = std::fs::File::create(place.join("file"))?;
    unmount(fixture, &["--lazy", image.name()]).await?;
    assert!(!is_mount_point(&place));
    drop(open);
    eventually("it is detached", async || Ok(attached(fixture) == 0)).await
}

/// The detach of the device in use is reverted: a second device would mean a second file system on the same bytes.
async fn mount_after_a_lazy_unmount_reuses_the_device(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture).await?;
    let place = mount(fixture, &[image.name()]).await?;
    let open = std::fs::File::create(place.join("file"))?;
    unmount(fixture, &["--lazy", image.name()]).await?;
    assert!(!is_mount_point(&place));

    let again = mount(fixture, &[image.name()]).await?;
    assert_eq!(attached(fixture), 1, "a second device shows the same bytes");
    std::io::Write::write_all(&mut &open, b"by the descriptor of before")?;
    assert_eq!(std::fs::read(again.join("file"))?, b"by the descriptor of before");
    drop(open);
    unmount(fixture, &[image.name()]).await?;
    nothing_left(fixture).await?;
    loopd_tests::process::run("e2fsck", ["-fn", image.name()]).await.map(drop)
}

async fn throwaway_mounts_are_separate(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture).await?;
    let before = std::fs::read(&image.path)?;
    let place = mount(fixture, &["--throwaway", image.name()]).await?;
    std::fs::write(place.join("file"), "changed")?;
    // Each view is separate.
    let other = mount(fixture, &["--throwaway", image.name()]).await?;
    assert!(!other.join("file").exists());
    unmount(fixture, &[image.name()]).await?;
    assert_eq!(std::fs::read(&image.path)?, before);
    nothing_left(fixture).await
}

async fn failed_mount_is_undone(fixture: &mut Fixture) -> Outcome {
    let units = Units::start(fixture.bus()).await?;
    let image = image(fixture).await?;
    let empty = Image::sparse(&fixture.directory, "empty", MIB)?;
    for (arguments, status, hint) in [
        (&[empty.name()][..], 1, Some("loopctl: -t names the type of a file system")),
        (&["--options", "suid", image.name()], 2, None),
        (&["-t", "vfat", image.name()], 1, None),
        (&["--throwaway", "/dev/loop0"], 1, None),
        (&["nothing"], 1, None),
    ] {
        let output = complaint(fixture.loopctl([&["mount"], arguments].concat()).await?, status)?;
        let mut lines = output.lines();
        ensure!(lines.next().is_some_and(|line| line.starts_with("loopctl: ")), "{arguments:?}: {output}");
        let is_as_expected = match (lines.next(), hint) {
            (Some(line), Some(hint)) => line.starts_with(hint),
            (line, hint) => line.is_none() && hint.is_none(),
        };
        ensure!(is_as_expected && lines.next().is_none(), "{arguments:?}: {output}");
        nothing_left(fixture).await?;
    }
    units.behave(Conduct::Fails);
    complaint(fixture.loopctl(["mount", image.name()]).await?, 1)?;
    nothing_left(fixture).await
}

async fn interrupted_mount_is_undone(fixture: &mut Fixture) -> Outcome {
    let units = Units::start(fixture.bus()).await?;
    let image = image(fixture).await?;
    units.behave(Conduct::Hangs);
    let mut command = fixture.tool(ROOT, "loopctl")?;
    command.args(["mount", image.name()]);
    let mut client = command.spawn()?;
    eventually("the mount has started", async || Ok(!units.started().is_empty())).await?;
    units.behave(Conduct::Works);
    nix::sys::signal::kill(loopd_tests::process::pid(client.id()), nix::sys::signal::Signal::SIGINT)?;
    let status = tokio::task::spawn_blocking(move || client.wait()).await??;
    assert_eq!(status.code(), Some(130));
    eventually("all of it is gone", async || {
        Ok(attached(fixture) == 0
            && fixture.directory.join("media").read_dir().map_or(0, Iterator::count) == 0)
    })
    .await?;
    nothing_left(fixture).await
}

async fn missing_service_manager_is_reported(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture).await?;
    let output = complaint(fixture.loopctl(["mount", image.name()]).await?, 1)?;
    assert!(output.contains("systemd"), "{output}");
    nothing_left(fixture).await
}

/// Calls the helper by its name, like umount(8).
async fn call_helper(fixture: &Fixture, user: User, arguments: &[&str]) -> Result<Output> {
    use std::os::unix::process::CommandExt as _;
    let mut command = fixture.tool(user, "loopctl")?;
    command.arg0("/sbin/umount.loopd").args(arguments);
    output(command).await
}

async fn helper_unmounts(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture).await?;
    let place = mount(fixture, &[image.name()]).await?;
    let name = place.to_str().unwrap();
    let open = std::fs::File::create(place.join("file"))?;
    let output = complaint(call_helper(fixture, ROOT, &[name]).await?, 32)?;
    assert!(output.lines().all(|line| line.starts_with("umount.loopd: ")), "{output}");
    drop(open);
    assert_eq!(printed(call_helper(fixture, ROOT, &[name, "-n", "-v", "-t", "ext4"]).await?)?, "");
    nothing_left(fixture).await
}

async fn helper_rejects_invalid_arguments(fixture: &mut Fixture) -> Outcome {
    for arguments in [&[][..], &["/mnt", "/tmp"], &["--lazy", "/mnt"], &["/mnt", "-N", "1"]] {
        let output = complaint(call_helper(fixture, ROOT, arguments).await?, 1)?;
        assert!(output.contains("umount.loopd [OPTION]... DIR|DEVICE"), "{output}");
    }
    complaint(call_helper(fixture, ROOT, &["/proc"]).await?, 32)?;
    Ok(())
}

async fn authorized_user_mounts_and_unmounts(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture).await?;
    image.chown(GAMES)?;
    let place = printed(fixture.loopctl_as(GAMES, ["mount", image.name()]).await?)?;
    assert_eq!(Path::new(&place), fixture.directory.join("media/games/data"));
    // Another user can name the mount point without access to it, and needs authorization.
    let output = call_helper(fixture, loopd_tests::WWW_DATA, &[&place]).await?;
    assert!(output.status.success(), "{output:?}");
    let checks = fixture.stand_in()?.checks();
    let last = checks.last().context("polkit was not asked")?;
    assert_eq!(last.action, loopd_dbus::names::ACTION_MANAGE_OTHERS);
    nothing_left(fixture).await
}

async fn denial_is_reported(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = image(fixture).await?;
    let place = mount(fixture, &[image.name()]).await?;
    let name = place.to_str().unwrap();
    let output = complaint(call_helper(fixture, GAMES, &[name]).await?, 1)?;
    assert!(output.contains("not authorized"), "{output}");
    assert!(is_mount_point(&place));
    unmount(fixture, &[name]).await?;
    nothing_left(fixture).await
}
