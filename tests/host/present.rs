//! Replies show the state at the time of the call, even if events of other programs' devices have not arrived yet.

use anyhow::{Context as _, Result, ensure};
use loopd_dbus::properties::from_bus_path;
use loopd_dbus::{AttachOptions, AttachmentProperties, Lifetime, ListOptions};
use loopd_tests::Outcome;
use loopd_tests::fixture::Fixture;
use loopd_tests::image::{Image, MIB};
use loopd_tests::losetup::Losetup;
use loopd_tests::polkit::Setup;
use loopd_tests::process::run;
use loopd_tests::sysfs::LoopDevice;

loopd_tests::tests! {
    "present";
    Setup::None => [
        attaches_of_other_programs_are_listed_at_once,
        attaches_of_other_programs_are_found_at_once,
        detaches_of_other_programs_are_known_at_once,
        changes_of_other_programs_are_listed_at_once,
        mounts_of_other_programs_are_listed_at_once,
        renamed_and_deleted_files_are_listed_at_once,
    ];
}

const ROUNDS: usize = 20;

async fn listed(fixture: &Fixture, device: LoopDevice) -> Result<Option<AttachmentProperties>> {
    let all = ListOptions { all: true, ..ListOptions::default() };
    for (_, properties) in fixture.manager.list(&all).await? {
        let found = AttachmentProperties::from_dict(&properties)?;
        if found.number == device.0 {
            return Ok(Some(found));
        }
    }
    Ok(None)
}

async fn printed(fixture: &Fixture, arguments: &[&str]) -> Result<String> {
    let output = fixture.loopctl(arguments).await?;
    ensure!(output.status.success(), "{arguments:?}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

async fn attaches_of_other_programs_are_listed_at_once(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    for round in 0..ROUNDS {
        let foreign = Losetup::new(&[], &image).await?;
        let found = listed(fixture, foreign.device).await?.with_context(|| format!("round {round}"))?;
        assert_eq!(from_bus_path(&found.backing_file), image.name().as_bytes());
        assert!(!found.managed);
    }
    Ok(())
}

async fn attaches_of_other_programs_are_found_at_once(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    for (index, node) in [true, false].into_iter().cycle().take(ROUNDS).enumerate() {
        let foreign = Losetup::new(&[], &image).await?;
        let node_name = foreign.device.node();
        let target = if node { &node_name } else { image.name() };
        let shown = match index % 5 {
            0 => printed(fixture, &["list", "--all"]).await?,
            1 => printed(fixture, &["info", target]).await?,
            2 => printed(fixture, &["losetup", "-a"]).await?,
            3 => printed(fixture, &["losetup", &node_name]).await?,
            _ => printed(fixture, &["losetup", "-j", image.name()]).await?,
        };
        assert!(shown.contains(&node_name) && shown.contains(image.name()), "{index}: {shown}");
    }
    // And detached by its file at once.
    let foreign = Losetup::new(&[], &image).await?;
    assert_eq!(printed(fixture, &["detach", image.name()]).await?, "");
    assert!(!foreign.device.bound());
    std::mem::forget(foreign);
    Ok(())
}

async fn detaches_of_other_programs_are_known_at_once(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    for _ in 0..ROUNDS {
        let attached = fixture
            .attach(
                &image.open()?,
                &AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() },
            )
            .await?;
        run("losetup", ["-d", &attached.device.node()]).await?;
        assert_eq!(listed(fixture, attached.device).await?, None);
    }
    Ok(())
}

async fn changes_of_other_programs_are_listed_at_once(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let foreign = Losetup::new(&[], &image).await?;
    let own = fixture
        .attach(&image.open()?, &AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() })
        .await?;
    let size = async |device: &str| -> Result<u64> {
        let output = printed(fixture, &["losetup", "-l", "-n", "-O", "LOG-SEC", device]).await?;
        output.split_whitespace().last().context("no sector size")?.parse().context("no number")
    };
    for device in [foreign.device, own.device] {
        for block_size in [4096, 512, 1024] {
            run("losetup", ["-b", &block_size.to_string(), &device.node()]).await?;
            let found = listed(fixture, device).await?.context("not listed")?;
            assert_eq!(found.block_size, block_size, "{}", device.node());
            assert_eq!(size(&device.node()).await?, u64::from(block_size));
        }
    }
    for megabytes in 2..6 {
        image.open()?.set_len(megabytes * MIB)?;
        run("losetup", ["-c", &foreign.device.node()]).await?;
        let info = printed(fixture, &["list", "--all", "--json"]).await?;
        let json: serde_json::Value = serde_json::from_str(&info)?;
        let sizes = json.as_array().context("no array")?.iter();
        let mut sizes = sizes.filter(|found| found["device"] == foreign.device.node().as_str());
        assert_eq!(sizes.next().context("not listed")?["size"], megabytes * MIB);
    }
    fixture.detach(&own).await
}

async fn mounts_of_other_programs_are_listed_at_once(fixture: &mut Fixture) -> Outcome {
    let image =
        Image::ext4(&fixture.directory, "image", "data", "11111111-2222-3333-4444-0000000000b0").await?;
    let directory = fixture.directory.join("mounted");
    std::fs::create_dir(&directory)?;
    let directory = directory.to_str().context("no text")?;
    for _ in 0..3 {
        run("mount", ["-o", "loop", image.name(), directory]).await?;
        let shown = printed(fixture, &["list", "--all"]).await;
        run("umount", [directory]).await?;
        let shown = shown?;
        assert!(shown.contains(directory), "{shown}");
    }
    Ok(())
}

async fn renamed_and_deleted_files_are_listed_at_once(fixture: &mut Fixture) -> Outcome {
    let options = AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() };
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &options).await?;
    let moved = fixture.directory.join("moved");
    std::fs::rename(&image.path, &moved)?;
    let path = async || -> Result<Vec<u8>> {
        let found = listed(fixture, attached.device).await?.context("not listed")?;
        Ok(from_bus_path(&found.backing_file).to_vec())
    };
    assert_eq!(path().await?, moved.as_os_str().as_encoded_bytes());
    std::fs::remove_file(&moved)?;
    assert_eq!(path().await?, format!("{} (deleted)", moved.display()).as_bytes());
    fixture.detach(&attached).await
}
