//! Authorization.

use std::process::Stdio;

use loopd_dbus::names::{ACTION_ATTACH, ACTION_ATTACH_DEVICE, ACTION_MANAGE_OTHERS};
use loopd_dbus::{AttachOptions, DetachOptions, ErrorKind, Lifetime};
use loopd_tests::fixture::Fixture;
use loopd_tests::image::{Image, MIB};
use loopd_tests::losetup;
use loopd_tests::polkit::{Answer, Check, Setup};
use loopd_tests::probe::{Probe, Reply};
use loopd_tests::process::run;
use loopd_tests::sysfs::{self, LoopDevice};
use loopd_tests::{GAMES, NOBODY, Outcome, User, WWW_DATA};

loopd_tests::tests! {
    "authority";
    Setup::None => [without_polkit_users_are_denied, without_polkit_foreign_devices_are_protected, every_user_may_list];
    Setup::Real => [polkitd_allows, polkitd_denies, polkitd_challenges, polkitd_asks_for_block_devices];
    Setup::StandIn(Answer::No) => [root_needs_no_authorization, denial_by_polkit_is_access_denied];
    Setup::StandIn(Answer::Yes) => [
        file_is_checked_with_its_details,
        block_device_is_checked_as_attach_device,
        owner_needs_no_authorization,
        other_users_need_authorization,
        other_users_are_denied,
        foreign_device_needs_manage_others,
    ];
    Setup::StandIn(Answer::Prompt) => [prompt_only_with_the_interactive_flag];
    Setup::StandIn(Answer::Dismissed) => [dismissed_prompt_is_access_denied];
}

/// Attaches as this user, and disconnects.
async fn setup(fixture: &Fixture, user: User, image: &Image, flags: &[&str]) -> anyhow::Result<Reply> {
    let path = image.name();
    fixture.probe(user, flags.iter().copied().chain(["setup", "regular", path])).await
}

fn image(fixture: &Fixture) -> anyhow::Result<Image> {
    Image::sparse(&fixture.directory, "image", MIB)
}

/// A persistent attachment of this user.
async fn owned_by(
    fixture: &Fixture,
    user: User,
    image: &Image,
) -> anyhow::Result<loopd_tests::fixture::Attached> {
    let path = image.name();
    fixture.probe(user, ["setup", "regular", path, "lifetime=s:persistent"]).await?.attached()
}

async fn without_polkit_users_are_denied(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    for flags in [&[][..], &["--interactive"]] {
        setup(fixture, GAMES, &image, flags).await?.refused(ErrorKind::AccessDenied)?;
    }
    assert!(sysfs::bound_by_tests(&fixture.directory).is_empty());
    // Root needs no authorization.
    let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    fixture.detach(&attached).await
}

async fn without_polkit_foreign_devices_are_protected(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let device = losetup::attach(&[image.name()]).await?;
    let reply = fixture.probe(GAMES, ["detach", &device.node()]).await?;
    reply.refused(ErrorKind::AccessDenied)?;
    assert!(device.bound());
    fixture.manager.detach(&device.node(), DetachOptions::default()).await?;
    Ok(())
}

async fn every_user_may_list(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    image.chmod(0o600)?;
    let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    let listed = fixture.probe(GAMES, ["list", "all=b:true"]).await?;
    let found = listed.ok()?.as_array().unwrap().iter().any(|entry| entry[0] == attached.path.as_str());
    assert!(found, "{listed:?}");
    for interface in ["org.loopd1.Attachment", "org.loopd1.Volume"] {
        let properties = fixture.probe(GAMES, ["get", attached.path.as_str(), interface]).await?;
        assert!(properties.ok()?.get("Device").is_some(), "{properties:?}");
    }
    fixture.detach(&attached).await
}

async fn polkitd_allows(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let attached = setup(fixture, GAMES, &image, &[]).await?.attached()?;
    fixture.gone(&attached).await
}

async fn polkitd_denies(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    for flags in [&[][..], &["--interactive"]] {
        setup(fixture, WWW_DATA, &image, flags).await?.refused(ErrorKind::AccessDenied)?;
    }
    Ok(())
}

async fn polkitd_challenges(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let kind = ErrorKind::InteractiveAuthorizationRequired;
    setup(fixture, NOBODY, &image, &[]).await?.refused(kind)?;
    Ok(())
}

async fn polkitd_asks_for_block_devices(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let lower = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    setup_device(fixture, WWW_DATA, lower.device).await?.refused(ErrorKind::AccessDenied)?;
    let upper = setup_device(fixture, GAMES, lower.device).await?.attached()?;
    fixture.gone(&upper).await?;
    fixture.detach(&lower).await
}

/// Attaches a block device that root has opened for this user.
async fn setup_device(fixture: &Fixture, user: User, device: LoopDevice) -> anyhow::Result<Reply> {
    let node = std::fs::File::options().read(true).write(true).open(device.node())?;
    let mut command = fixture.tool(user, "loopd-probe")?;
    command.args(["setup", "stdin", "-"]).stdin(Stdio::from(node));
    let mut probe = Probe::spawn_with_input(command)?;
    let reply = probe.reply().await?;
    probe.close().await?;
    Ok(reply)
}

async fn root_needs_no_authorization(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    fixture.detach(&attached).await?;
    assert_eq!(fixture.stand_in()?.checks(), []);
    Ok(())
}

async fn denial_by_polkit_is_access_denied(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    for flags in [&[][..], &["--interactive"]] {
        setup(fixture, GAMES, &image, flags).await?.refused(ErrorKind::AccessDenied)?;
    }
    assert_eq!(fixture.stand_in()?.checks().len(), 2);
    Ok(())
}

/// Checks what each authorization check has in common; returns the details device, file and owner.
fn asked(check: &Check, action: &str) -> (String, String, String) {
    assert_eq!(check.action, action);
    assert_eq!(check.subject_kind, "system-bus-name");
    assert!(check.subject_name.starts_with(':'), "{check:?}");
    let detail = |key: &str| check.details.get(key).unwrap_or_else(|| panic!("no {key}: {check:?}")).clone();
    (detail("device"), detail("file"), detail("owner"))
}

async fn file_is_checked_with_its_details(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let attached = setup(fixture, GAMES, &image, &[]).await?.attached()?;
    let checks = fixture.stand_in()?.checks();
    let [check] = checks.as_slice() else { panic!("{checks:?}") };
    let (_, file, owner) = asked(check, ACTION_ATTACH);
    assert_eq!(file, image.name());
    assert!(owner == GAMES.name || owner == GAMES.uid.to_string(), "{owner:?}");
    assert!(!check.interactive);
    fixture.gone(&attached).await
}

async fn block_device_is_checked_as_attach_device(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let lower = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    let upper = setup_device(fixture, GAMES, lower.device).await?.attached()?;
    let checks = fixture.stand_in()?.checks();
    let [check] = checks.as_slice() else { panic!("{checks:?}") };
    let (_, file, _) = asked(check, ACTION_ATTACH_DEVICE);
    assert_eq!(file, lower.device.node());
    fixture.gone(&upper).await?;

    fixture.stand_in()?.answer(Answer::No);
    setup_device(fixture, GAMES, lower.device).await?.refused(ErrorKind::AccessDenied)?;
    fixture.detach(&lower).await
}

async fn owner_needs_no_authorization(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    for by_object in [false, true] {
        let attached = owned_by(fixture, GAMES, &image).await?;
        assert_eq!(fixture.properties(&attached.path).await?.owner, GAMES.uid);
        let asked_before = fixture.stand_in()?.checks().len();
        let node = attached.device.node();
        let arguments = if by_object { ["detach-object", attached.path.as_str()] } else { ["detach", &node] };
        fixture.probe(GAMES, arguments).await?.ok()?;
        assert!(!attached.device.bound());
        assert_eq!(fixture.stand_in()?.checks().len(), asked_before);
    }
    Ok(())
}

async fn other_users_need_authorization(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    for by_object in [false, true] {
        let attached = owned_by(fixture, GAMES, &image).await?;
        let node = attached.device.node();
        let arguments = if by_object { ["detach-object", attached.path.as_str()] } else { ["detach", &node] };
        fixture.probe(WWW_DATA, arguments).await?.ok()?;
        assert!(!attached.device.bound());
        let checks = fixture.stand_in()?.checks();
        let (device, file, owner) = asked(checks.last().unwrap(), ACTION_MANAGE_OTHERS);
        assert_eq!((device.as_str(), file.as_str()), (&*node, image.name()));
        assert!(owner == GAMES.name || owner == GAMES.uid.to_string(), "{owner:?}");
    }
    Ok(())
}

async fn other_users_are_denied(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let attached = owned_by(fixture, GAMES, &image).await?;
    let node = attached.device.node();
    let before = fixture.properties(&attached.path).await?;
    fixture.stand_in()?.answer(Answer::No);
    for arguments in [
        vec!["detach", &node],
        vec!["detach", &node, "lazy=b:true"],
        vec!["detach-object", attached.path.as_str()],
        vec!["detach-object", attached.path.as_str(), "lazy=b:true"],
    ] {
        fixture.probe(WWW_DATA, arguments).await?.refused(ErrorKind::AccessDenied)?;
    }
    assert_eq!(fixture.properties(&attached.path).await?, before);
    fixture.detach(&attached).await
}

async fn foreign_device_needs_manage_others(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let attached = fixture
        .attach(&image.open()?, &AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() })
        .await?;
    fixture.probe(GAMES, ["detach", &attached.device.node()]).await?.ok()?;
    asked(fixture.stand_in()?.checks().last().unwrap(), ACTION_MANAGE_OTHERS);

    let node = run("losetup", ["-f", "--show", image.name()]).await?;
    fixture.probe(GAMES, ["detach", node.trim()]).await?.ok()?;
    asked(fixture.stand_in()?.checks().last().unwrap(), ACTION_MANAGE_OTHERS);
    assert_eq!(fixture.stand_in()?.checks().len(), 2);
    Ok(())
}

async fn prompt_only_with_the_interactive_flag(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let kind = ErrorKind::InteractiveAuthorizationRequired;
    setup(fixture, GAMES, &image, &[]).await?.refused(kind)?;
    let attached = setup(fixture, GAMES, &image, &["--interactive"]).await?.attached()?;
    let flags: Vec<bool> = fixture.stand_in()?.checks().iter().map(|check| check.interactive).collect();
    assert_eq!(flags, [false, false, true]);
    fixture.gone(&attached).await
}

async fn dismissed_prompt_is_access_denied(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    setup(fixture, GAMES, &image, &["--interactive"]).await?.refused(ErrorKind::AccessDenied)?;
    Ok(())
}
