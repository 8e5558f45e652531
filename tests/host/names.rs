//! A backing file that was deleted, replaced or renamed while it is attached.

use std::path::Path;
use std::process::Output;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use loopd_dbus::{AttachOptions, Lifetime};
use loopd_tests::fixture::Fixture;
use loopd_tests::hanging::Hanging;
use loopd_tests::image::{Image, MIB};
use loopd_tests::losetup;
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::sysfs::{self, LoopDevice};
use loopd_tests::units::Units;
use loopd_tests::{GAMES, NOBODY, Outcome, ROOT, WWW_DATA};
use serde_json::Value;

loopd_tests::tests! {
    "names";
    Setup::None => [
        deleted_file_is_shown_and_found_by_its_path,
        replaced_file_is_shown_and_found_by_its_path,
        file_that_has_the_path_now_comes_first,
        file_that_is_really_called_deleted_is_another_one,
        every_command_accepts_the_path_of_a_deleted_file,
        several_earlier_files_are_listed,
        foreign_devices_are_shown_and_found,
        renamed_file_is_shown_under_its_new_name,
        path_replaced_by_a_link_or_a_directory,
        restart_changes_nothing,
        state_is_null_where_the_user_may_not_look,
        hanging_file_does_not_delay_the_list,
        file_deleted_on_its_server_is_deleted,
        unnamed_file_is_deleted,
        file_called_deleted_is_no_throwaway_view,
        deleted_image_is_unmounted_by_its_path,
        rebuilt_image_is_mounted_from_a_new_device,
    ];
    Setup::StandIn(Answer::Yes) => [own_earlier_file_comes_first];
}

/// Longer than the limit for the look at the files.
const SOON: Duration = Duration::from_secs(8);
const UUID: &str = "11111111-2222-3333-4444-0000000000e1";

/// The output of a command, which must have succeeded without a message.
fn printed(output: &Output) -> Result<String> {
    ensure!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    Ok(String::from_utf8(output.stdout.clone())?)
}

/// The message of a command that failed.
fn complaint(output: &Output) -> Result<String> {
    ensure!(output.status.code() == Some(1) && output.stdout.is_empty(), "{output:?}");
    Ok(String::from_utf8(output.stderr.clone())?)
}

async fn loopctl(fixture: &Fixture, arguments: &[&str]) -> Result<String> {
    printed(&fixture.loopctl(arguments).await?)
}

fn image(fixture: &Fixture, name: &str) -> Result<Image> {
    Image::sparse(&fixture.directory, name, MIB)
}

async fn attach(fixture: &Fixture, image: &Image) -> Result<LoopDevice> {
    LoopDevice::from_node(loopctl(fixture, &["attach", image.name()]).await?.trim_end())
}

/// Deletes the file.
fn delete(image: &Image) -> Outcome {
    Ok(std::fs::remove_file(&image.path)?)
}

/// Makes another file with the image's path, as a build does: by a rename.
fn rebuild(fixture: &Fixture, image: &Image) -> Outcome {
    let new = Image::sparse(&fixture.directory, "new", 2 * MIB)?;
    Ok(std::fs::rename(new.path, &image.path)?)
}

async fn json(fixture: &Fixture, arguments: &[&str]) -> Result<Value> {
    Ok(serde_json::from_str(&loopctl(fixture, arguments).await?)?)
}

/// Path and state of the device's backing file as all of `list`, `list --json`, `info` and `info --json` show it.
async fn shown(fixture: &Fixture, device: LoopDevice) -> Result<(String, String)> {
    let node = device.node();
    let listed = json(fixture, &["list", "--all", "--json"]).await?;
    let entry = listed.as_array().into_iter().flatten().find(|entry| entry["device"] == node.as_str());
    let entry = entry.with_context(|| format!("{node} is not listed"))?;
    let file = entry["backing_file"].as_str().unwrap_or("-").to_owned();
    let state = entry["backing_file_state"].as_str().unwrap_or("-").to_owned();

    let info = json(fixture, &["info", "--json", &node]).await?;
    assert_eq!(info["backing_file"], entry["backing_file"]);
    assert_eq!(info["backing_file_state"], entry["backing_file_state"]);
    let table = loopctl(fixture, &["list", "--all"]).await?;
    let line = table.lines().find(|line| line.starts_with(&format!("{node} "))).unwrap_or_default();
    assert!(line.ends_with(&format!("{state:9}  {file}")), "{line}");
    let text = loopctl(fixture, &["info", &node]).await?;
    let lines = format!("Backing file:   {file}\nFile state:     {state}\n");
    assert!(text.contains(&lines), "no {lines} in {text}");
    Ok((file, state))
}

/// Checks what [`shown`] returns.
async fn is_shown(fixture: &Fixture, device: LoopDevice, file: &str, state: &str) -> Outcome {
    assert_eq!(shown(fixture, device).await?, (file.to_owned(), state.to_owned()));
    Ok(())
}

/// Detaches by a path and checks that only this device is gone.
async fn detach_hits(fixture: &Fixture, name: &str, device: LoopDevice) -> Outcome {
    let before = sysfs::bound_by_tests(&fixture.directory).len();
    assert_eq!(loopctl(fixture, &["detach", name]).await?, "");
    assert!(!device.bound(), "{} is still attached", device.node());
    assert_eq!(sysfs::bound_by_tests(&fixture.directory).len(), before - 1);
    Ok(())
}

async fn deleted_file_is_shown_and_found_by_its_path(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture, "x")?;
    let attached = json(fixture, &["attach", "--json", image.name()]).await?;
    assert_eq!(attached["backing_file_state"], "present");
    let device = LoopDevice::from_node(attached["device"].as_str().unwrap())?;
    is_shown(fixture, device, image.name(), "present").await?;
    delete(&image)?;
    is_shown(fixture, device, image.name(), "deleted").await?;
    let output = complaint(&fixture.loopctl(["detach", "y"]).await?)?;
    assert!(output.contains("y does not exist, and no deleted file of this path is attached"), "{output}");
    // Relative to the working directory.
    detach_hits(fixture, "x", device).await
}

async fn replaced_file_is_shown_and_found_by_its_path(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture, "x")?;
    let device = attach(fixture, &image).await?;
    rebuild(fixture, &image)?;
    is_shown(fixture, device, image.name(), "replaced").await?;
    // Its size is that of the original.
    loopctl(fixture, &["resize", image.name()]).await?;
    assert_eq!(json(fixture, &["info", "--json", image.name()]).await?["size"], MIB);
    detach_hits(fixture, image.name(), device).await?;
    let output = complaint(&fixture.loopctl(["detach", image.name()]).await?)?;
    assert!(output.contains("is not attached to a loop device"), "{output}");

    // Deleted first, and then made again.
    let device = attach(fixture, &image).await?;
    delete(&image)?;
    let again = Image::sparse(&fixture.directory, "x", MIB)?;
    is_shown(fixture, device, again.name(), "replaced").await?;
    detach_hits(fixture, again.name(), device).await
}

async fn file_that_has_the_path_now_comes_first(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture, "x")?;
    let old = attach(fixture, &image).await?;
    rebuild(fixture, &image)?;
    let new = attach(fixture, &image).await?;
    is_shown(fixture, old, image.name(), "replaced").await?;
    is_shown(fixture, new, image.name(), "present").await?;
    assert_eq!(json(fixture, &["info", "--json", image.name()]).await?["device"], new.node().as_str());
    detach_hits(fixture, image.name(), new).await?;
    detach_hits(fixture, image.name(), old).await
}

async fn file_that_is_really_called_deleted_is_another_one(fixture: &mut Fixture) -> Outcome {
    let (short, long) = (image(fixture, "x")?, image(fixture, "x (deleted)")?);
    let device = attach(fixture, &long).await?;
    is_shown(fixture, device, long.name(), "present").await?;
    // The short name is that of a file that is not attached, and then of none.
    for exists in [true, false] {
        if !exists {
            delete(&short)?;
        }
        let output = complaint(&fixture.loopctl(["detach", short.name()]).await?)?;
        assert!(output.contains("attached") && device.bound(), "{output}");
        is_shown(fixture, device, long.name(), "present").await?;
    }
    // Both are attached.
    let short = image(fixture, "x")?;
    let other = attach(fixture, &short).await?;
    delete(&short)?;
    is_shown(fixture, device, long.name(), "present").await?;
    is_shown(fixture, other, short.name(), "deleted").await?;
    for (name, node) in [(&short, other.node()), (&long, device.node())] {
        assert_eq!(json(fixture, &["info", "--json", name.name()]).await?["device"], node.as_str());
    }
    detach_hits(fixture, short.name(), other).await?;

    // The long name was that of another file, which is not attached.
    let other = attach(fixture, &image(fixture, "x")?).await?;
    delete(&short)?;
    detach_hits(fixture, long.name(), device).await?;
    let output = complaint(&fixture.loopctl(["detach", long.name()]).await?)?;
    assert!(output.contains("is not attached") && other.bound(), "{output}");
    delete(&long)?;
    let output = complaint(&fixture.loopctl(["detach", long.name()]).await?)?;
    assert!(output.contains("does not exist") && other.bound(), "{output}");

    // The long name is deleted, too.
    let long = image(fixture, "x (deleted)")?;
    let device = attach(fixture, &long).await?;
    delete(&long)?;
    is_shown(fixture, device, long.name(), "deleted").await?;
    is_shown(fixture, other, short.name(), "deleted").await?;
    detach_hits(fixture, long.name(), device).await?;
    detach_hits(fixture, short.name(), other).await
}

async fn every_command_accepts_the_path_of_a_deleted_file(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture, "x")?;
    let device = attach(fixture, &image).await?;
    delete(&image)?;
    for arguments in [&["resize"][..], &["set", "-b", "1024"], &["rescan"], &["info"]] {
        loopctl(fixture, &[arguments, &[image.name()]].concat())
            .await
            .with_context(|| format!("{arguments:?}"))?;
    }
    assert_eq!(device.number::<u32>("queue/logical_block_size")?, 1024);
    loopctl(fixture, &["detach", image.name()]).await?;
    fixture.assert_no_leak().await
}

async fn several_earlier_files_are_listed(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture, "x")?;
    let first = attach(fixture, &image).await?;
    rebuild(fixture, &image)?;
    let second = attach(fixture, &image).await?;
    delete(&image)?;
    for verb in ["detach", "info", "resize", "rescan", "mount", "unmount"] {
        let output = complaint(&fixture.loopctl([verb, image.name()]).await?)?;
        assert!(output.contains(image.name()) && output.contains("name the device node"), "{verb}: {output}");
        assert!(output.contains(&first.node()) && output.contains(&second.node()), "{verb}: {output}");
    }
    assert!(first.bound() && second.bound());
    loopctl(fixture, &["detach", &first.node()]).await?;
    detach_hits(fixture, image.name(), second).await
}

async fn foreign_devices_are_shown_and_found(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture, "x")?;
    let device = losetup::attach(&[image.name()]).await?;
    fixture.foreign(device).await?;
    is_shown(fixture, device, image.name(), "present").await?;
    delete(&image)?;
    is_shown(fixture, device, image.name(), "deleted").await?;
    rebuild(fixture, &image)?;
    is_shown(fixture, device, image.name(), "replaced").await?;
    detach_hits(fixture, image.name(), device).await
}

async fn renamed_file_is_shown_under_its_new_name(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture, "x")?;
    let to = fixture.directory.join("y");
    let new = to.to_str().unwrap();
    let device = attach(fixture, &image).await?;
    std::fs::rename(&image.path, &to)?;
    is_shown(fixture, device, new, "present").await?;
    complaint(&fixture.loopctl(["detach", image.name()]).await?)?;
    detach_hits(fixture, new, device).await?;
    std::fs::rename(&to, &image.path)?;
    // Not if the new name looks like that of the deleted file.
    let device = attach(fixture, &image).await?;
    let long = fixture.directory.join("x (deleted)");
    std::fs::rename(&image.path, &long)?;
    is_shown(fixture, device, long.to_str().unwrap(), "present").await?;
    complaint(&fixture.loopctl(["detach", image.name()]).await?)?;
    detach_hits(fixture, long.to_str().unwrap(), device).await
}

async fn path_replaced_by_a_link_or_a_directory(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture, "x")?;
    let device = attach(fixture, &image).await?;
    delete(&image)?;
    std::os::unix::fs::symlink("nowhere", &image.path)?;
    is_shown(fixture, device, image.name(), "replaced").await?;
    assert_eq!(json(fixture, &["info", "--json", image.name()]).await?["device"], device.node().as_str());
    delete(&image)?;
    std::fs::create_dir(&image.path)?;
    is_shown(fixture, device, image.name(), "replaced").await?;
    detach_hits(fixture, image.name(), device).await
}

/// A daemon that reads the kernel's path again sees its suffix.
async fn restart_changes_nothing(fixture: &mut Fixture) -> Outcome {
    let (short, long) = (image(fixture, "x")?, image(fixture, "y (deleted)")?);
    let (first, second) = (attach(fixture, &short).await?, attach(fixture, &long).await?);
    delete(&short)?;
    fixture.restart_daemon(&[]).await?;
    is_shown(fixture, first, short.name(), "deleted").await?;
    is_shown(fixture, second, long.name(), "present").await?;
    let output =
        complaint(&fixture.loopctl(["detach", fixture.directory.join("y").to_str().unwrap()]).await?)?;
    assert!(output.contains("does not exist") && second.bound(), "{output}");
    detach_hits(fixture, short.name(), first).await?;
    detach_hits(fixture, long.name(), second).await
}

async fn state_is_null_where_the_user_may_not_look(fixture: &mut Fixture) -> Outcome {
    use std::os::unix::fs::PermissionsExt as _;
    let directory = fixture.directory.join("closed");
    std::fs::create_dir(&directory)?;
    let image = Image::sparse(&directory, "x", MIB)?;
    let device = attach(fixture, &image).await?;
    let state = async || -> Result<Value> {
        let listed: Value =
            serde_json::from_str(&printed(&fixture.loopctl_as(NOBODY, ["list", "--json"]).await?)?)?;
        Ok(listed[0]["backing_file_state"].clone())
    };
    assert_eq!(state().await?, "present");
    std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o700))?;
    assert_eq!(state().await?, Value::Null);
    let table = printed(&fixture.loopctl_as(NOBODY, ["list", "-o", "filestate", "--no-legend"]).await?)?;
    assert_eq!(table, "-\n");
    delete(&image)?;
    assert_eq!(state().await?, Value::Null);
    // Root may look.
    is_shown(fixture, device, image.name(), "deleted").await?;
    detach_hits(fixture, image.name(), device).await
}

async fn hanging_file_does_not_delay_the_list(fixture: &mut Fixture) -> Outcome {
    let hanging = Hanging::mount_for_all(GAMES, &fixture.directory, 16 << 20)?;
    let options = AttachOptions { wait: false, lifetime: Lifetime::Persistent, ..AttachOptions::default() };
    let stuck = fixture.attach(&hanging.open()?, &options).await?;
    let (gone, there) = (image(fixture, "x")?, image(fixture, "y")?);
    let mut others = Vec::new();
    for image in [&gone, &there] {
        others.push(attach(fixture, image).await?);
    }
    delete(&gone)?;
    loopd_tests::udev::settle().await?;
    hanging.hang();
    let start = Instant::now();
    let listed = json(fixture, &["list", "--json"]).await?;
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    assert!(hanging.waiting() > 0, "the file system was asked");
    let state = |node: &str| {
        let entry = listed.as_array().unwrap().iter().find(|entry| entry["device"] == node);
        entry.unwrap()["backing_file_state"].clone()
    };
    assert_eq!(state(&stuck.device.node()), Value::Null);
    assert_eq!(state(&others[0].node()), "deleted");
    assert_eq!(state(&others[1].node()), "present");
    // The look at a named file does not touch the others.
    let start = Instant::now();
    detach_hits(fixture, gone.name(), others[0]).await?;
    assert!(start.elapsed() < SOON, "{:?}", start.elapsed());
    hanging.go_on();
    is_shown(fixture, stuck.device, hanging.path().to_str().unwrap(), "present").await?;
    fixture.detach(&stuck).await?;
    loopctl(fixture, &["detach", there.name()]).await?;
    Ok(())
}

async fn file_deleted_on_its_server_is_deleted(fixture: &mut Fixture) -> Outcome {
    let remote = Hanging::mount(&fixture.directory, 1 << 20)?;
    let options = AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() };
    let attached = fixture.attach(&remote.open()?, &options).await?;
    let file = remote.path();
    let file = file.to_str().unwrap();
    is_shown(fixture, attached.device, file, "present").await?;
    remote.delete();
    is_shown(fixture, attached.device, file, "deleted").await?;
    detach_hits(fixture, file, attached.device).await
}

async fn unnamed_file_is_deleted(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture, "x")?;
    let node = loopctl(fixture, &["attach", "--throwaway", image.name()]).await?;
    let device = LoopDevice::from_node(node.trim_end())?;
    let (file, state) = shown(fixture, device).await?;
    assert_eq!(state, "deleted");
    assert_eq!(Path::new(&file).parent(), Some(fixture.directory.as_path()));
    // The original is not attached.
    let output = complaint(&fixture.loopctl(["detach", image.name()]).await?)?;
    assert!(output.contains("is not attached"), "{output}");
    loopctl(fixture, &["detach", &device.node()]).await?;
    Ok(())
}

async fn file_called_deleted_is_no_throwaway_view(fixture: &mut Fixture) -> Outcome {
    let (image, other) = (image(fixture, "x")?, image(fixture, "y (deleted)")?);
    let node = loopctl(fixture, &["attach", "--reference", "x", other.name()]).await?;
    let output = complaint(&fixture.loopctl(["unmount", image.name()]).await?)?;
    assert!(output.contains("x is not attached to a loop device"), "{output}");
    loopctl(fixture, &["detach", node.trim_end()]).await?;
    Ok(())
}

/// The mount point of the image, which loopctl attaches for that.
async fn mount(fixture: &Fixture, image: &Image) -> Result<String> {
    Ok(loopctl(fixture, &["mount", image.name()]).await?.trim_end().to_owned())
}

async fn deleted_image_is_unmounted_by_its_path(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = Image::ext4(&fixture.directory, "x", "data", UUID).await?;
    let place = mount(fixture, &image).await?;
    delete(&image)?;
    // The mounted device is used.
    assert_eq!(mount(fixture, &image).await?, place);
    let shown = json(fixture, &["mount", "--json", image.name()]).await?;
    assert_eq!(shown["backing_file_state"], "deleted");
    assert_eq!(shown["backing_file"], image.name());
    loopctl(fixture, &["unmount", image.name()]).await?;
    assert!(!Path::new(&place).exists());
    fixture.assert_no_leak().await
}

async fn rebuilt_image_is_mounted_from_a_new_device(fixture: &mut Fixture) -> Outcome {
    let _units = Units::start(fixture.bus()).await?;
    let image = Image::ext4(&fixture.directory, "x", "old", UUID).await?;
    let old = mount(fixture, &image).await?;
    delete(&image)?;
    let image = Image::ext4(&fixture.directory, "x", "new", &UUID.replace('1', "2")).await?;
    let new = mount(fixture, &image).await?;
    assert!(new.ends_with("/new") && old.ends_with("/old"), "{new} {old}");
    loopctl(fixture, &["unmount", image.name()]).await?;
    assert!(!Path::new(&new).exists() && Path::new(&old).exists());
    loopctl(fixture, &["unmount", image.name()]).await?;
    assert!(!Path::new(&old).exists());
    fixture.assert_no_leak().await
}

/// Two users have attached a file of the same path, and both files are deleted.
async fn own_earlier_file_comes_first(fixture: &mut Fixture) -> Outcome {
    let mut devices = Vec::new();
    for user in [GAMES, ROOT] {
        let image = image(fixture, "x")?;
        image.chown(user)?;
        let node = printed(&fixture.loopctl_as(user, ["attach", image.name()]).await?)?;
        devices.push(LoopDevice::from_node(node.trim_end())?);
        delete(&image)?;
    }
    // No device of another user is mounted by the path of its file, since its owner can choose that.
    let output = complaint(&fixture.loopctl_as(WWW_DATA, ["mount", "x"]).await?)?;
    assert!(output.contains("no deleted file of this path"), "{output}");
    let output = complaint(&fixture.loopctl_as(WWW_DATA, ["info", "x"]).await?)?;
    assert!(output.contains("name the device node"), "{output}");
    for (user, device) in [GAMES, ROOT].into_iter().zip(devices) {
        let shown = printed(&fixture.loopctl_as(user, ["info", "--json", "x"]).await?)?;
        assert_eq!(serde_json::from_str::<Value>(&shown)?["device"], device.node().as_str());
        printed(&fixture.loopctl_as(user, ["detach", "x"]).await?)?;
        assert!(!device.bound());
    }
    fixture.assert_no_leak().await
}
