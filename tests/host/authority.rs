//! Who may do what.

use std::process::Stdio;

use loopd_dbus::names::{ACTION_ATTACH, ACTION_ATTACH_DEVICE, ACTION_MANAGE_OTHERS};
use loopd_dbus::{AttachOptions, DetachOptions, ErrorKind, Lifetime};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Check, Setup};
use loopd_tests::probe::{Probe, Reply};
use loopd_tests::process::run;
use loopd_tests::sysfs::{self, LoopDevice};
use loopd_tests::world::World;
use loopd_tests::{GAMES, NOBODY, Outcome, User, WWW_DATA};

loopd_tests::tests! {
    "authority";
    Setup::None => [no_polkit_is_no, no_polkit_and_a_foreign_device, everyone_may_look];
    Setup::Real => [real_yes, real_no, real_challenge, real_block_device];
    Setup::StandIn(Answer::No) => [root_is_not_asked_about, plain_no];
    Setup::StandIn(Answer::Yes) => [
        question_for_a_file,
        question_for_a_block_device,
        owner_is_not_asked,
        others_are_asked,
        others_may_not,
        foreign_device_is_nobodys_own,
    ];
    Setup::StandIn(Answer::Prompt) => [prompt_only_where_allowed];
    Setup::StandIn(Answer::Dismissed) => [dismissed];
}

/// Attaches as this user, and lets go of it again.
async fn setup(world: &World, user: User, image: &Image, flags: &[&str]) -> anyhow::Result<Reply> {
    let path = image.path.to_str().unwrap();
    world.probe(user, flags.iter().copied().chain(["setup", "regular", path])).await
}

fn image(world: &World) -> anyhow::Result<Image> {
    Image::sparse(&world.folder, "image", MIB)
}

/// A persistent attachment of this user's.
async fn owned_by(world: &World, user: User, image: &Image) -> anyhow::Result<loopd_tests::world::Attached> {
    let path = image.path.to_str().unwrap();
    world.probe(user, ["setup", "regular", path, "lifetime=s:persistent"]).await?.attached()
}

async fn no_polkit_is_no(world: &mut World) -> Outcome {
    let image = image(world)?;
    for flags in [&[][..], &["--interactive"]] {
        setup(world, GAMES, &image, flags).await?.refused(ErrorKind::AccessDenied)?;
    }
    assert!(sysfs::bound_by_tests(&world.folder).is_empty());
    // Root needs none.
    let attached = world.attach(&image.open()?, &AttachOptions::default()).await?;
    world.detach(&attached).await
}

async fn no_polkit_and_a_foreign_device(world: &mut World) -> Outcome {
    let image = image(world)?;
    let node = run("losetup", ["-f", "--show", image.path.to_str().unwrap()]).await?;
    let device = LoopDevice::from_node(node.trim())?;
    let reply = world.probe(GAMES, ["detach", &device.node()]).await?;
    reply.refused(ErrorKind::AccessDenied)?;
    assert!(device.bound());
    world.manager.detach(&device.node(), DetachOptions::default()).await?;
    Ok(())
}

async fn everyone_may_look(world: &mut World) -> Outcome {
    let image = image(world)?;
    image.chmod(0o600)?;
    let attached = world.attach(&image.open()?, &AttachOptions::default()).await?;
    let listed = world.probe(GAMES, ["list", "all=b:true"]).await?;
    let found = listed.ok()?.as_array().unwrap().iter().any(|entry| entry[0] == attached.path.as_str());
    assert!(found, "{listed:?}");
    for interface in ["org.loopd1.Attachment", "org.loopd1.Volume"] {
        let properties = world.probe(GAMES, ["get", attached.path.as_str(), interface]).await?;
        assert!(properties.ok()?.get("Device").is_some(), "{properties:?}");
    }
    world.detach(&attached).await
}

async fn real_yes(world: &mut World) -> Outcome {
    let image = image(world)?;
    let attached = setup(world, GAMES, &image, &[]).await?.attached()?;
    world.gone(&attached).await
}

async fn real_no(world: &mut World) -> Outcome {
    let image = image(world)?;
    for flags in [&[][..], &["--interactive"]] {
        setup(world, WWW_DATA, &image, flags).await?.refused(ErrorKind::AccessDenied)?;
    }
    Ok(())
}

async fn real_challenge(world: &mut World) -> Outcome {
    let image = image(world)?;
    let kind = ErrorKind::InteractiveAuthorizationRequired;
    setup(world, NOBODY, &image, &[]).await?.refused(kind)?;
    Ok(())
}

async fn real_block_device(world: &mut World) -> Outcome {
    let image = image(world)?;
    let lower = world.attach(&image.open()?, &AttachOptions::default()).await?;
    setup_device(world, WWW_DATA, lower.device).await?.refused(ErrorKind::AccessDenied)?;
    let upper = setup_device(world, GAMES, lower.device).await?.attached()?;
    world.gone(&upper).await?;
    world.detach(&lower).await
}

/// Attaches a block device that root has opened for this user.
async fn setup_device(world: &World, user: User, device: LoopDevice) -> anyhow::Result<Reply> {
    let node = std::fs::File::options().read(true).write(true).open(device.node())?;
    let mut command = world.tool(user, "loopd-probe")?;
    command.args(["setup", "stdin", "-"]).stdin(Stdio::from(node));
    let mut probe = Probe::spawn_with_input(command)?;
    let reply = probe.reply().await?;
    probe.close().await?;
    Ok(reply)
}

async fn root_is_not_asked_about(world: &mut World) -> Outcome {
    let image = image(world)?;
    let attached = world.attach(&image.open()?, &AttachOptions::default()).await?;
    world.detach(&attached).await?;
    assert_eq!(world.stand_in()?.checks(), []);
    Ok(())
}

async fn plain_no(world: &mut World) -> Outcome {
    let image = image(world)?;
    for flags in [&[][..], &["--interactive"]] {
        setup(world, GAMES, &image, flags).await?.refused(ErrorKind::AccessDenied)?;
    }
    assert_eq!(world.stand_in()?.checks().len(), 2);
    Ok(())
}

/// What must be in every question; gives the details device, file and owner.
fn asked(check: &Check, action: &str) -> (String, String, String) {
    assert_eq!(check.action, action);
    assert_eq!(check.subject_kind, "system-bus-name");
    assert!(check.subject_name.starts_with(':'), "{check:?}");
    let detail = |key: &str| check.details.get(key).unwrap_or_else(|| panic!("no {key}: {check:?}")).clone();
    (detail("device"), detail("file"), detail("owner"))
}

async fn question_for_a_file(world: &mut World) -> Outcome {
    let image = image(world)?;
    let attached = setup(world, GAMES, &image, &[]).await?.attached()?;
    let checks = world.stand_in()?.checks();
    let [check] = checks.as_slice() else { panic!("{checks:?}") };
    let (_, file, owner) = asked(check, ACTION_ATTACH);
    assert_eq!(file, image.path.to_str().unwrap());
    assert!(owner == GAMES.name || owner == GAMES.uid.to_string(), "{owner:?}");
    assert!(!check.interactive);
    world.gone(&attached).await
}

async fn question_for_a_block_device(world: &mut World) -> Outcome {
    let image = image(world)?;
    let lower = world.attach(&image.open()?, &AttachOptions::default()).await?;
    let upper = setup_device(world, GAMES, lower.device).await?.attached()?;
    let checks = world.stand_in()?.checks();
    let [check] = checks.as_slice() else { panic!("{checks:?}") };
    let (_, file, _) = asked(check, ACTION_ATTACH_DEVICE);
    assert_eq!(file, lower.device.node());
    world.gone(&upper).await?;

    world.stand_in()?.answer(Answer::No);
    setup_device(world, GAMES, lower.device).await?.refused(ErrorKind::AccessDenied)?;
    world.detach(&lower).await
}

async fn owner_is_not_asked(world: &mut World) -> Outcome {
    let image = image(world)?;
    for by_object in [false, true] {
        let attached = owned_by(world, GAMES, &image).await?;
        assert_eq!(world.properties(&attached.path).await?.owner, GAMES.uid);
        let asked_before = world.stand_in()?.checks().len();
        let node = attached.device.node();
        let words = if by_object { ["detach-object", attached.path.as_str()] } else { ["detach", &node] };
        world.probe(GAMES, words).await?.ok()?;
        assert!(!attached.device.bound());
        assert_eq!(world.stand_in()?.checks().len(), asked_before);
    }
    Ok(())
}

async fn others_are_asked(world: &mut World) -> Outcome {
    let image = image(world)?;
    for by_object in [false, true] {
        let attached = owned_by(world, GAMES, &image).await?;
        let node = attached.device.node();
        let words = if by_object { ["detach-object", attached.path.as_str()] } else { ["detach", &node] };
        world.probe(WWW_DATA, words).await?.ok()?;
        assert!(!attached.device.bound());
        let checks = world.stand_in()?.checks();
        let (device, file, owner) = asked(checks.last().unwrap(), ACTION_MANAGE_OTHERS);
        assert_eq!((device.as_str(), file.as_str()), (&*node, image.path.to_str().unwrap()));
        assert!(owner == GAMES.name || owner == GAMES.uid.to_string(), "{owner:?}");
    }
    Ok(())
}

async fn others_may_not(world: &mut World) -> Outcome {
    let image = image(world)?;
    let attached = owned_by(world, GAMES, &image).await?;
    let node = attached.device.node();
    let before = world.properties(&attached.path).await?;
    world.stand_in()?.answer(Answer::No);
    for words in [
        vec!["detach", &node],
        vec!["detach", &node, "lazy=b:true"],
        vec!["detach-object", attached.path.as_str()],
        vec!["detach-object", attached.path.as_str(), "lazy=b:true"],
    ] {
        world.probe(WWW_DATA, words).await?.refused(ErrorKind::AccessDenied)?;
    }
    assert_eq!(world.properties(&attached.path).await?, before);
    world.detach(&attached).await
}

async fn foreign_device_is_nobodys_own(world: &mut World) -> Outcome {
    let image = image(world)?;
    let attached = world
        .attach(&image.open()?, &AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() })
        .await?;
    world.probe(GAMES, ["detach", &attached.device.node()]).await?.ok()?;
    asked(world.stand_in()?.checks().last().unwrap(), ACTION_MANAGE_OTHERS);

    let node = run("losetup", ["-f", "--show", image.path.to_str().unwrap()]).await?;
    world.probe(GAMES, ["detach", node.trim()]).await?.ok()?;
    asked(world.stand_in()?.checks().last().unwrap(), ACTION_MANAGE_OTHERS);
    assert_eq!(world.stand_in()?.checks().len(), 2);
    Ok(())
}

async fn prompt_only_where_allowed(world: &mut World) -> Outcome {
    let image = image(world)?;
    let kind = ErrorKind::InteractiveAuthorizationRequired;
    setup(world, GAMES, &image, &[]).await?.refused(kind)?;
    let attached = setup(world, GAMES, &image, &["--interactive"]).await?.attached()?;
    let flags: Vec<bool> = world.stand_in()?.checks().iter().map(|check| check.interactive).collect();
    assert_eq!(flags, [false, true]);
    world.gone(&attached).await
}

async fn dismissed(world: &mut World) -> Outcome {
    let image = image(world)?;
    setup(world, GAMES, &image, &["--interactive"]).await?.refused(ErrorKind::AccessDenied)?;
    Ok(())
}
