//! `loopctl mount` and `unmount`, and umount's helper, as a user meets them; with a stand-in for the
//! service manager.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::{eventually, output};
use loopd_tests::sysfs::{self, Extent};
use loopd_tests::table::Gpt;
use loopd_tests::units::{Conduct, Units};
use loopd_tests::world::World;
use loopd_tests::{GAMES, Outcome, ROOT, User};
use serde_json::Value;

loopd_tests::tests! {
    "loopctl_mount";
    Setup::None => [
        there_and_back,
        twice,
        json,
        of_several_partitions,
        on_an_attachment_of_one_s_own,
        by_every_name,
        in_use,
        lazily,
        again_after_a_lazy_unmount,
        throwaway,
        what_fails_is_undone,
        interrupted,
        without_a_service_manager,
        helper,
        helper_called_wrongly,
    ];
    Setup::StandIn(Answer::Yes) => [as_a_user];
    Setup::StandIn(Answer::No) => [denied];
}

const UUID: &str = "11111111-2222-3333-4444-0000000000d1";

async fn image(world: &World) -> Result<Image> {
    Image::ext4(&world.folder, "image", "data", UUID).await
}

/// What a command printed, without the newline; it must have worked.
fn printed(output: Output) -> Result<String> {
    ensure!(output.status.success(), "{output:?}");
    Ok(String::from_utf8(output.stdout)?.trim_end_matches('\n').to_owned())
}

/// What a command that failed so said; nothing of it on standard output.
fn complaint(output: Output, status: i32) -> Result<String> {
    ensure!(output.status.code() == Some(status) && output.stdout.is_empty(), "{output:?}");
    Ok(String::from_utf8(output.stderr)?)
}

async fn mount(world: &World, words: &[&str]) -> Result<PathBuf> {
    Ok(printed(world.loopctl([&["mount"], words].concat()).await?)?.into())
}

async fn unmount(world: &World, words: &[&str]) -> Outcome {
    let said = world.loopctl([&["unmount"], words].concat()).await?;
    ensure!(said.stderr.is_empty(), "{said:?}");
    ensure!(printed(said)?.is_empty(), "unmount prints nothing");
    Ok(())
}

fn is_mounted(place: &Path) -> bool {
    let table = std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    table.lines().any(|line| line.split(' ').nth(4) == place.to_str())
}

/// How many devices the tests have attached.
fn attached(world: &World) -> usize {
    sysfs::bound_by_tests(&world.folder).len()
}

/// No folder and no device, and that at once.
async fn nothing_left(world: &mut World) -> Outcome {
    let folders = world.folder.join("media").read_dir().map_or(0, Iterator::count);
    ensure!(folders == 0, "{folders} folders are left");
    ensure!(attached(world) == 0, "a device is left");
    world.assert_no_leak().await
}

async fn there_and_back(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world).await?;
    let place = mount(world, &[image.name()]).await?;
    assert_eq!(place, world.folder.join("media/root/data"));
    assert!(is_mounted(&place) && place.join("lost+found").exists());
    unmount(world, &[image.name()]).await?;
    assert!(!is_mounted(&place));
    nothing_left(world).await
}

async fn twice(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world).await?;
    let first = mount(world, &[image.name()]).await?;
    assert_eq!(mount(world, &[image.name()]).await?, first);
    // Also one that looks only.
    assert_eq!(mount(world, &["-r", image.name()]).await?, first);
    assert_eq!(attached(world), 1);
    unmount(world, &[image.name()]).await?;
    let said = complaint(world.loopctl(["unmount", image.name()]).await?, 1)?;
    assert!(said.contains("is not attached"), "{said}");
    nothing_left(world).await
}

async fn json(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world).await?;
    let shown = printed(world.loopctl(["mount", "--json", "-r", image.name()]).await?)?;
    let shown: Value = serde_json::from_str(&shown)?;
    assert_eq!(shown["lifetime"], "mount");
    assert_eq!(shown["read_only"], true);
    assert_eq!(shown["mount_points"][0].as_str(), world.folder.join("media/root/data").to_str());
    unmount(world, &[shown["device"].as_str().unwrap()]).await?;
    nothing_left(world).await
}

/// An image with two partitions that hold ext4, and one that holds nothing.
async fn partitioned(world: &World) -> Result<Image> {
    let image = Image::sparse(&world.folder, "image", 24 * MIB)?;
    Gpt::new(&[(2048, 18431), (18432, 34815), (34816, 36863)]).write(&image)?;
    for (start, label) in [(2048, "one"), (18432, "two")] {
        image.add_ext4(Extent { start: start * 512, size: 8 * MIB }, label, UUID).await?;
    }
    Ok(image)
}

async fn of_several_partitions(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = partitioned(world).await?;
    let said = complaint(world.loopctl(["mount", image.name()]).await?, 1)?;
    let lines: Vec<&str> = said.lines().collect();
    assert!(lines[0].contains("has 2 file systems; choose one with --partition"), "{said}");
    for (line, words) in lines[2..].iter().zip([["1", "8M", "ext4", "one"], ["2", "8M", "ext4", "two"]]) {
        let shown: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(shown[..4], words);
    }
    assert_eq!(lines.len(), 5, "{said}");
    complaint(world.loopctl(["mount", "-p", "9", image.name()]).await?, 1)?;
    nothing_left(world).await?;

    let one = mount(world, &["-p", "1", image.name()]).await?;
    let node = sysfs::bound_by_tests(&world.folder)[0].node();
    let two = mount(world, &[&format!("{node}p2")]).await?;
    assert!(is_mounted(&one) && is_mounted(&two));
    assert_eq!(attached(world), 1);
    unmount(world, &[one.to_str().unwrap()]).await?;
    assert!(is_mounted(&two), "only one was meant");
    mount(world, &["-p", "1", image.name()]).await?;
    unmount(world, &[image.name()]).await?;
    nothing_left(world).await
}

async fn on_an_attachment_of_one_s_own(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world).await?;
    let node = printed(world.loopctl(["attach", "-r", image.name()]).await?)?;
    // Whoever looks only is served by it, and it stays.
    let place = mount(world, &["-r", image.name()]).await?;
    assert_eq!(attached(world), 1);
    unmount(world, &[place.to_str().unwrap()]).await?;
    assert_eq!(attached(world), 1);
    let said = complaint(world.loopctl(["unmount", &node]).await?, 1)?;
    assert!(said.contains(&format!("`loopctl detach {node}`")), "{said}");
    // Whoever writes is not.
    mount(world, &[image.name()]).await?;
    assert_eq!(attached(world), 2);
    unmount(world, &[image.name()]).await?;
    assert_eq!(attached(world), 1);
    printed(world.loopctl(["detach", &node]).await?)?;
    nothing_left(world).await
}

async fn by_every_name(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world).await?;
    let place = world.folder.join("media/root/data");
    let link = world.folder.join("link");
    std::os::unix::fs::symlink(&place, &link)?;
    let (below, around) = (link.join("lost+found"), link.join("../data"));
    for name in [&image.path, &place, &link, &below, &around] {
        mount(world, &[image.name()]).await?;
        unmount(world, &[name.to_str().unwrap()]).await.with_context(|| format!("{name:?}"))?;
        nothing_left(world).await?;
    }
    for name in ["/", "/proc", "/nonexistent", image.name()] {
        complaint(world.loopctl(["unmount", name]).await?, 1).with_context(|| name.to_owned())?;
    }
    Ok(())
}

async fn in_use(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world).await?;
    let place = mount(world, &[image.name()]).await?;
    let below = place.join("lost+found");
    let mut sitter = Command::new("sleep").arg("600").current_dir(&below).spawn()?;
    let said = complaint(world.loopctl(["unmount", image.name()]).await?, 1);
    sitter.kill()?;
    sitter.wait()?;
    let expected =
        format!("loopctl: process {} (sleep) has its working directory at {}", sitter.id(), below.display());
    let said = said?;
    assert!(said.lines().any(|line| line == expected), "{said}");
    assert!(is_mounted(&place));
    unmount(world, &[image.name()]).await?;
    nothing_left(world).await
}

async fn lazily(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world).await?;
    let place = mount(world, &[image.name()]).await?;
    let open = std::fs::File::create(place.join("file"))?;
    unmount(world, &["--lazy", image.name()]).await?;
    assert!(!is_mounted(&place));
    drop(open);
    eventually("it is detached", async || Ok(attached(world) == 0)).await
}

/// The device that is still in use comes back: a second one would be a second file system on the same bytes.
async fn again_after_a_lazy_unmount(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world).await?;
    let place = mount(world, &[image.name()]).await?;
    let open = std::fs::File::create(place.join("file"))?;
    unmount(world, &["--lazy", image.name()]).await?;
    assert!(!is_mounted(&place));

    let again = mount(world, &[image.name()]).await?;
    assert_eq!(attached(world), 1, "a second device shows the same bytes");
    std::io::Write::write_all(&mut &open, b"by the descriptor of before")?;
    assert_eq!(std::fs::read(again.join("file"))?, b"by the descriptor of before");
    drop(open);
    unmount(world, &[image.name()]).await?;
    nothing_left(world).await?;
    loopd_tests::process::run("e2fsck", ["-fn", image.name()]).await.map(drop)
}

async fn throwaway(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world).await?;
    let before = std::fs::read(&image.path)?;
    let place = mount(world, &["--throwaway", image.name()]).await?;
    std::fs::write(place.join("file"), "changed")?;
    // Each is one of its own.
    let other = mount(world, &["--throwaway", image.name()]).await?;
    assert!(!other.join("file").exists());
    unmount(world, &[image.name()]).await?;
    assert_eq!(std::fs::read(&image.path)?, before);
    nothing_left(world).await
}

async fn what_fails_is_undone(world: &mut World) -> Outcome {
    let units = Units::start(world.bus()).await?;
    let image = image(world).await?;
    let empty = Image::sparse(&world.folder, "empty", MIB)?;
    for (words, status, hint) in [
        (&[empty.name()][..], 1, Some("loopctl: -t names the type of a file system")),
        (&["--options", "suid", image.name()], 2, None),
        (&["-t", "vfat", image.name()], 1, None),
        (&["--throwaway", "/dev/loop0"], 1, None),
        (&["nothing"], 1, None),
    ] {
        let said = complaint(world.loopctl([&["mount"], words].concat()).await?, status)?;
        let mut lines = said.lines();
        ensure!(lines.next().is_some_and(|line| line.starts_with("loopctl: ")), "{words:?}: {said}");
        let is_as_expected = match (lines.next(), hint) {
            (Some(line), Some(hint)) => line.starts_with(hint),
            (line, hint) => line.is_none() && hint.is_none(),
        };
        ensure!(is_as_expected && lines.next().is_none(), "{words:?}: {said}");
        nothing_left(world).await?;
    }
    units.behave(Conduct::Fails);
    complaint(world.loopctl(["mount", image.name()]).await?, 1)?;
    nothing_left(world).await
}

async fn interrupted(world: &mut World) -> Outcome {
    let units = Units::start(world.bus()).await?;
    let image = image(world).await?;
    units.behave(Conduct::Hangs);
    let mut command = world.tool(ROOT, "loopctl")?;
    command.args(["mount", image.name()]);
    let mut client = command.spawn()?;
    eventually("the mount is under way", async || Ok(!units.started().is_empty())).await?;
    units.behave(Conduct::Works);
    nix::sys::signal::kill(loopd_tests::process::pid(client.id()), nix::sys::signal::Signal::SIGINT)?;
    let status = tokio::task::spawn_blocking(move || client.wait()).await??;
    assert_eq!(status.code(), Some(130));
    eventually("all of it is gone", async || {
        Ok(attached(world) == 0 && world.folder.join("media").read_dir().map_or(0, Iterator::count) == 0)
    })
    .await?;
    nothing_left(world).await
}

async fn without_a_service_manager(world: &mut World) -> Outcome {
    let image = image(world).await?;
    let said = complaint(world.loopctl(["mount", image.name()]).await?, 1)?;
    assert!(said.contains("systemd"), "{said}");
    nothing_left(world).await
}

/// The helper under its name, as umount(8) calls it.
async fn call_helper(world: &World, user: User, words: &[&str]) -> Result<Output> {
    use std::os::unix::process::CommandExt as _;
    let mut command = world.tool(user, "loopctl")?;
    command.arg0("/sbin/umount.loopd").args(words);
    output(command).await
}

async fn helper(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world).await?;
    let place = mount(world, &[image.name()]).await?;
    let name = place.to_str().unwrap();
    let open = std::fs::File::create(place.join("file"))?;
    let said = complaint(call_helper(world, ROOT, &[name]).await?, 32)?;
    assert!(said.lines().all(|line| line.starts_with("umount.loopd: ")), "{said}");
    drop(open);
    assert_eq!(printed(call_helper(world, ROOT, &[name, "-n", "-v", "-t", "ext4"]).await?)?, "");
    nothing_left(world).await
}

async fn helper_called_wrongly(world: &mut World) -> Outcome {
    for words in [&[][..], &["/mnt", "/tmp"], &["--lazy", "/mnt"], &["/mnt", "-N", "1"]] {
        let said = complaint(call_helper(world, ROOT, words).await?, 1)?;
        assert!(said.contains("umount.loopd [OPTION]... DIR|DEVICE"), "{said}");
    }
    complaint(call_helper(world, ROOT, &["/proc"]).await?, 32)?;
    Ok(())
}

async fn as_a_user(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world).await?;
    image.chown(GAMES)?;
    let place = printed(world.loopctl_as(GAMES, ["mount", image.name()]).await?)?;
    assert_eq!(Path::new(&place), world.folder.join("media/games/data"));
    // Who may not look into it can still name it; and is asked.
    let output = call_helper(world, loopd_tests::WWW_DATA, &[&place]).await?;
    assert!(output.status.success(), "{output:?}");
    let checks = world.stand_in()?.checks();
    let last = checks.last().context("polkit was not asked")?;
    assert_eq!(last.action, loopd_dbus::names::ACTION_MANAGE_OTHERS);
    nothing_left(world).await
}

async fn denied(world: &mut World) -> Outcome {
    let _units = Units::start(world.bus()).await?;
    let image = image(world).await?;
    let place = mount(world, &[image.name()]).await?;
    let name = place.to_str().unwrap();
    let said = complaint(call_helper(world, GAMES, &[name]).await?, 1)?;
    assert!(said.contains("not authorized"), "{said}");
    assert!(is_mounted(&place));
    unmount(world, &[name]).await?;
    nothing_left(world).await
}
