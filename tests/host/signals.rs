//! Changes are published as signals.

use std::os::fd::AsFd as _;

use loopd_dbus::names::{ATTACHMENT, BUS_NAME, MANAGER, ROOT_PATH, VOLUME};
use loopd_dbus::{AttachOptions, AttachmentProperties, DetachOptions, Lifetime};
use loopd_tests::Outcome;
use loopd_tests::fixture::{Attached, Fixture};
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::losetup;
use loopd_tests::polkit::Setup;
use loopd_tests::process::run;
use loopd_tests::signals::What;
use zbus::wire::OwnedObjectPath;

loopd_tests::tests! {
    "signals";
    Setup::None => [
        added_before_the_reply,
        removed_before_the_reply,
        managed_objects_match_the_list,
        changes_by_losetup_are_published,
        mounts_are_published,
        lazy_detach_is_published,
        only_changes_are_published,
    ];
}

fn persistent() -> AttachOptions {
    AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() }
}

async fn added_before_the_reply(fixture: &mut Fixture) -> Outcome {
    let signals = fixture.signals().await?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let file = image.open()?;
    let options = persistent();
    let reply = fixture
        .connection
        .call_method(
            Some(BUS_NAME),
            ROOT_PATH,
            Some(MANAGER),
            "SetupLoop",
            &(zbus::Fd::from(file.as_fd()), options.encode()),
        )
        .await?;
    let body = reply.body();
    let attached = Attached::new(body.deserialize::<(OwnedObjectPath, String)>()?)?;
    for interface in [ATTACHMENT, VOLUME] {
        let added = signals.added(&attached.path, interface).await?;
        assert!(added < reply.recv_position(), "{interface} came after the reply");
    }
    fixture.detach(&attached).await
}

async fn removed_before_the_reply(fixture: &mut Fixture) -> Outcome {
    let signals = fixture.signals().await?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let options = DetachOptions::default().encode();
    let body = (attached.device.node(), options);
    let reply =
        fixture.connection.call_method(Some(BUS_NAME), ROOT_PATH, Some(MANAGER), "Detach", &body).await?;
    for interface in [ATTACHMENT, VOLUME] {
        let removed = signals.removed(&attached.path, interface).await?;
        assert!(removed < reply.recv_position(), "{interface} went after the reply");
    }
    Ok(())
}

async fn managed_objects_match_the_list(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let proxy = zbus::fdo::ObjectManagerProxy::new(&fixture.connection, BUS_NAME, ROOT_PATH).await?;
    let objects = proxy.get_managed_objects().await?;
    let interfaces = &objects[&attached.path];
    assert!(interfaces.contains_key(ATTACHMENT) && interfaces.contains_key(VOLUME), "{interfaces:?}");
    let properties = AttachmentProperties::from_dict(&interfaces[ATTACHMENT])?;
    assert_eq!(properties, fixture.properties(&attached.path).await?);
    fixture.detach(&attached).await
}

async fn changes_by_losetup_are_published(fixture: &mut Fixture) -> Outcome {
    let signals = fixture.signals().await?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let path = image.name();
    let device = losetup::attach(&[path]).await?;

    let sequence: u64 = device.number("diskseq")?;
    let object = loopd_dbus::names::attachment_path(sequence).into();
    signals.added(&object, ATTACHMENT).await?;
    assert_eq!(fixture.object_of(device).await?, Some(object.clone()));
    let properties = fixture.properties(&object).await?;
    assert!(!properties.managed);
    assert_eq!(properties.lifetime, "");
    assert_eq!((properties.owner, properties.client.as_str()), (u32::MAX, ""));
    assert!(fixture.list(false).await?.is_empty(), "a foreign device is not among our own");

    run("losetup", ["-d", &device.node()]).await?;
    signals.removed(&object, ATTACHMENT).await?;
    assert_eq!(fixture.object_of(device).await?, None);
    Ok(())
}

async fn mounts_are_published(fixture: &mut Fixture) -> Outcome {
    let image =
        Image::ext4(&fixture.directory, "image", "mounted", "11111111-2222-3333-4444-00000000000b").await?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let signals = fixture.signals().await?;
    let mounted = Mounted::new(attached.device, &fixture.directory, "mount point").await?;
    let directory = mounted.directory.to_str().unwrap().to_owned();
    let is_there = |value: &zbus::OwnedVariant| {
        let points = value.try_clone().ok().and_then(|value| Vec::<Vec<u8>>::try_from(value).ok());
        points.is_some_and(|points| points == [loopd_dbus::properties::to_bus_path(directory.as_bytes())])
    };
    signals.changed(&attached.path, "MountPoints", is_there).await?;
    let points = fixture.volume(&attached.path).await?.mount_points;
    assert_eq!(points, [loopd_dbus::properties::to_bus_path(directory.as_bytes())]);

    let signals = fixture.signals().await?;
    mounted.unmount().await?;
    let is_empty = |value: &zbus::OwnedVariant| {
        let points = value.try_clone().ok().and_then(|value| Vec::<Vec<u8>>::try_from(value).ok());
        points.is_some_and(|points| points.is_empty())
    };
    signals.changed(&attached.path, "MountPoints", is_empty).await?;
    fixture.detach(&attached).await
}

async fn lazy_detach_is_published(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let signals = fixture.signals().await?;
    let user = std::fs::File::open(attached.device.node())?;
    fixture.manager.detach(&attached.device.node(), DetachOptions { lazy: true }).await?;
    let is_detaching = |value: &zbus::OwnedVariant| <&str>::try_from(value).is_ok_and(|s| s == "detaching");
    signals.changed(&attached.path, "State", is_detaching).await?;
    drop(user);
    signals.removed(&attached.path, ATTACHMENT).await?;
    fixture.gone(&attached).await
}

async fn only_changes_are_published(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    loopd_tests::udev::settle().await?;
    let before = fixture.properties(&attached.path).await?;
    let signals = fixture.signals().await?;
    // After an open and a close for writing udev probes the device again, with the same result.
    drop(std::fs::File::options().write(true).open(attached.device.node())?);
    let last = fixture.events_are_received().await?;
    signals.removed(&last.path, ATTACHMENT).await?;
    let changed = signals.find(|event| match &event.what {
        What::Changed { interface, values } if event.path == attached.path => {
            Some(format!("{interface}: {:?}", values.keys()))
        }
        _ => None,
    });
    assert_eq!(changed, None);
    assert_eq!(fixture.properties(&attached.path).await?, before);
    fixture.detach(&attached).await
}
