//! A file that is already attached: `allow`, `refuse` and `reuse`.

use std::collections::HashSet;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;

use loopd_dbus::proxy::{Interaction, Manager};
use loopd_dbus::{AttachOptions, DetachOptions, ErrorKind, Lifetime, Overlap, State};
use loopd_tests::fixture::{Attached, Fixture, expect_kind, refusal};
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::losetup;
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::{GAMES, Outcome, ROOT, WWW_DATA};

loopd_tests::tests! {
    "overlap";
    Setup::None => [
        allowed_by_default,
        refuse_fails_if_a_byte_is_shared,
        reuse_returns_an_equal_attachment,
        reuse_does_not_return_a_read_only_device_to_a_writer,
        foreign_device_is_reused,
        hard_link_is_the_same_file,
        concurrent_reuse_attaches_once,
        reuse_reverts_a_lazy_detach,
        reused_device_outlives_its_first_client,
        reuse_with_another_number_fails,
        foreign_device_with_a_file_of_a_user_is_not_reused,
        reuse_with_another_block_size_fails,
    ];
    Setup::StandIn(Answer::Yes) => [device_of_another_user_is_not_reused];
    Setup::Real => [lazy_detach_of_another_user_is_not_reverted];
}

fn with(overlap: Overlap) -> AttachOptions {
    AttachOptions { overlap, lifetime: Lifetime::Persistent, ..AttachOptions::default() }
}

fn part(overlap: Overlap, offset: u64, size_limit: u64) -> AttachOptions {
    AttachOptions { offset, size_limit, ..with(overlap) }
}

fn image(fixture: &Fixture) -> anyhow::Result<Image> {
    Image::sparse(&fixture.directory, "image", 4 * MIB)
}

async fn attach(fixture: &Fixture, image: &Image, options: &AttachOptions) -> anyhow::Result<Attached> {
    fixture.attach(&image.open()?, options).await
}

async fn allowed_by_default(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let first = attach(fixture, &image, &with(Overlap::Allow)).await?;
    let second = attach(fixture, &image, &with(Overlap::Allow)).await?;
    assert_ne!(first.device, second.device);
    fixture.detach(&first).await?;
    fixture.detach(&second).await
}

async fn refuse_fails_if_a_byte_is_shared(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let there = attach(fixture, &image, &part(Overlap::Refuse, MIB, MIB)).await?;
    for (offset, limit) in [(MIB, MIB), (0, 0), (0, MIB + 512), (2 * MIB - 512, 0), (MIB + 512, 512)] {
        let error = fixture.attach_fails(&image.open()?, &part(Overlap::Refuse, offset, limit)).await?;
        expect_kind(&error, ErrorKind::Overlap)?;
        for word in [image.name(), &there.device.node(), "1048576"] {
            assert!(error.message.contains(word), "no {word} in {error}");
        }
    }
    for (offset, limit) in [(0, MIB), (2 * MIB, 0)] {
        let beside = attach(fixture, &image, &part(Overlap::Refuse, offset, limit)).await?;
        fixture.detach(&beside).await?;
    }
    fixture.detach(&there).await
}

async fn reuse_returns_an_equal_attachment(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let first = attach(fixture, &image, &part(Overlap::Reuse, MIB, MIB)).await?;
    let sequence = first.device.number::<u64>("diskseq")?;
    assert_eq!(attach(fixture, &image, &part(Overlap::Reuse, MIB, MIB)).await?, first);
    assert_eq!(fixture.attach(&image.open_read_only()?, &part(Overlap::Reuse, MIB, MIB)).await?, first);
    assert_eq!(first.device.number::<u64>("diskseq")?, sequence);
    for (offset, limit) in [(MIB, 0), (0, 0), (MIB, 512), (MIB + 512, MIB)] {
        let error = fixture.attach_fails(&image.open()?, &part(Overlap::Reuse, offset, limit)).await?;
        expect_kind(&error, ErrorKind::Overlap)?;
    }
    fixture.detach(&first).await
}

async fn reuse_does_not_return_a_read_only_device_to_a_writer(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let read_only = AttachOptions { read_only: true, ..with(Overlap::Reuse) };
    let first = attach(fixture, &image, &read_only).await?;
    let error = fixture.attach_fails(&image.open()?, &with(Overlap::Reuse)).await?;
    expect_kind(&error, ErrorKind::Overlap)?;
    assert!(error.message.contains("read-only"), "{error}");
    assert_eq!(attach(fixture, &image, &read_only).await?, first);
    // A second, writable device is returned to both.
    let second = attach(fixture, &image, &with(Overlap::Allow)).await?;
    assert_eq!(attach(fixture, &image, &with(Overlap::Reuse)).await?, second);
    fixture.detach(&first).await?;
    fixture.detach(&second).await
}

async fn foreign_device_is_reused(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    std::fs::set_permissions(&image.path, std::fs::Permissions::from_mode(0o644))?;
    for _ in 0..10 {
        // At once: no event has been processed yet.
        let device = losetup::attach(&[image.name()]).await?;
        let error = fixture.attach_fails(&image.open()?, &with(Overlap::Refuse)).await?;
        expect_kind(&error, ErrorKind::Overlap)?;
        assert_eq!(attach(fixture, &image, &with(Overlap::Reuse)).await?.device, device);
        fixture.manager.detach(&device.node(), DetachOptions::default()).await?;
    }
    Ok(())
}

async fn hard_link_is_the_same_file(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let first = attach(fixture, &image, &with(Overlap::Allow)).await?;
    let link = Image { path: fixture.directory.join("another name") };
    std::fs::hard_link(&image.path, &link.path)?;
    assert_eq!(attach(fixture, &link, &with(Overlap::Reuse)).await?, first);
    // The same name, another file.
    std::fs::remove_file(&image.path)?;
    let other = Image::sparse(&fixture.directory, "image", 4 * MIB)?;
    let second = attach(fixture, &other, &with(Overlap::Refuse)).await?;
    fixture.detach(&first).await?;
    fixture.detach(&second).await
}

async fn concurrent_reuse_attaches_once(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let (mut managers, mut files) = (Vec::new(), Vec::new());
    for _ in 0..12 {
        managers.push(Manager::new(&fixture.connect().await?, Interaction::Forbidden).await?);
        files.push(image.open()?);
    }
    for (overlap, attached) in [(Overlap::Refuse, 1), (Overlap::Reuse, 12)] {
        let options = with(overlap);
        let calls =
            managers.iter().zip(&files).map(|(manager, file)| manager.setup_loop(file.as_fd(), &options));
        let (done, refused): (Vec<_>, Vec<_>) =
            futures_util::future::join_all(calls).await.into_iter().partition(Result::is_ok);
        assert_eq!(done.len(), attached, "{overlap}");
        for refused in refused {
            expect_kind(&refusal(refused)?, ErrorKind::Overlap)?;
        }
        let devices: HashSet<String> = done.into_iter().map(|done| done.unwrap().1).collect();
        assert_eq!(devices.len(), 1, "{devices:?}");
        for device in devices {
            fixture.manager.detach(&device, DetachOptions::default()).await?;
        }
    }
    Ok(())
}

async fn reuse_reverts_a_lazy_detach(fixture: &mut Fixture) -> Outcome {
    let image =
        Image::ext4(&fixture.directory, "image", "overlap", "11111111-2222-3333-4444-0000000000a1").await?;
    for lifetime in [Lifetime::Persistent, Lifetime::Client] {
        let options = AttachOptions { lifetime, ..with(Overlap::Reuse) };
        let first = attach(fixture, &image, &options).await?;
        let mounted = Mounted::new(first.device, &fixture.directory, "mounted").await?;
        fixture.manager.detach(&first.device.node(), DetachOptions { lazy: true }).await?;
        assert_eq!(fixture.properties(&first.path).await?.state, State::Detaching.as_str());
        assert_eq!(attach(fixture, &image, &options).await?, first);
        let properties = fixture.properties(&first.path).await?;
        assert_eq!(
            (properties.state.as_str(), properties.lifetime.as_str()),
            ("attached", lifetime.as_str())
        );
        mounted.unmount().await?;
        loopd_tests::udev::settle().await?;
        assert!(first.device.bound(), "{lifetime}: the detach was taken back");
        fixture.detach(&first).await?;
    }
    Ok(())
}

async fn reused_device_outlives_its_first_client(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let other = fixture.connect().await?;
    let manager = Manager::new(&other, Interaction::Forbidden).await?;
    let options = AttachOptions::default();
    let file = image.open()?;
    let first = Attached::new(manager.setup_loop(file.as_fd(), &options).await?)?;
    assert_eq!(attach(fixture, &image, &with(Overlap::Reuse)).await?, first);
    drop(manager);
    other.close().await?;
    loopd_tests::udev::settle().await?;
    let properties = fixture.properties(&first.path).await?;
    assert_eq!((properties.lifetime.as_str(), properties.client.as_str()), ("persistent", ""));
    assert!(!first.device.flag("loop/autoclear")?);
    fixture.detach(&first).await
}

async fn reuse_with_another_number_fails(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let first = attach(fixture, &image, &with(Overlap::Allow)).await?;
    let number = loopd_tests::sysfs::last_free()?.0;
    let wanted = AttachOptions { number: Some(number), ..with(Overlap::Reuse) };
    expect_kind(&fixture.attach_fails(&image.open()?, &wanted).await?, ErrorKind::Overlap)?;
    let same = AttachOptions { number: Some(first.device.0), ..with(Overlap::Reuse) };
    assert_eq!(attach(fixture, &image, &same).await?, first);
    fixture.detach(&first).await
}

async fn lazy_detach_of_another_user_is_not_reverted(fixture: &mut Fixture) -> Outcome {
    let image =
        Image::ext4(&fixture.directory, "image", "overlap", "11111111-2222-3333-4444-0000000000a2").await?;
    let path = image.name();
    let arguments = ["setup", "regular", path, "lifetime=s:persistent", "overlap=s:reuse"];
    let first = fixture.probe(GAMES, arguments).await?.attached()?;
    let mounted = Mounted::new(first.device, &fixture.directory, "mounted").await?;
    fixture.manager.detach(&first.device.node(), DetachOptions { lazy: true }).await?;
    // polkit denies www-data any attach.
    fixture.probe(WWW_DATA, arguments).await?.refused(ErrorKind::AccessDenied)?;
    assert_eq!(fixture.probe(GAMES, arguments).await?.attached()?, first);
    mounted.unmount().await?;
    assert!(first.device.bound());
    fixture.detach(&first).await
}

async fn reuse_with_another_block_size_fails(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let first = attach(fixture, &image, &with(Overlap::Allow)).await?;
    for (block_size, fits) in [(512, true), (4096, false)] {
        let wanted = AttachOptions { block_size, ..with(Overlap::Reuse) };
        if fits {
            assert_eq!(attach(fixture, &image, &wanted).await?, first);
        } else {
            let error = fixture.attach_fails(&image.open()?, &wanted).await?;
            expect_kind(&error, ErrorKind::Overlap)?;
            assert!(error.message.contains("its block size is 512"), "{error}");
        }
    }
    fixture.detach(&first).await
}

/// The owner of the device could replace its file while root reads it.
async fn device_of_another_user_is_not_reused(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    image.chown(GAMES)?;
    let arguments = ["setup", "regular", image.name(), "lifetime=s:persistent", "overlap=s:reuse"];
    let of_games = fixture.probe(GAMES, arguments).await?.attached()?;
    let error = fixture.attach_fails(&image.open()?, &with(Overlap::Reuse)).await?;
    expect_kind(&error, ErrorKind::Overlap)?;
    assert!(error.message.contains(&format!("it belongs to user {}", GAMES.uid)), "{error}");
    let losetup = fixture.loopctl(["losetup", "-L", "-f", "--show", image.name()]).await?;
    assert!(!losetup.status.success() && losetup.stdout.is_empty(), "{losetup:?}");
    fixture.probe(WWW_DATA, arguments).await?.refused(ErrorKind::Overlap)?;
    assert_eq!(fixture.probe(GAMES, arguments).await?.attached()?, of_games, "its owner is given it");
    fixture.detach(&of_games).await?;
    // A device of root is returned to everyone.
    let of_root = attach(fixture, &image, &with(Overlap::Reuse)).await?;
    assert_eq!(fixture.probe(GAMES, arguments).await?.attached()?, of_root);
    fixture.detach(&of_root).await
}

/// A daemon may have attached it for that user, who can detach it again.
async fn foreign_device_with_a_file_of_a_user_is_not_reused(fixture: &mut Fixture) -> Outcome {
    let image = image(fixture)?;
    let device = losetup::attach(&[image.name()]).await?;
    for (owner, mode, is_given) in
        [(GAMES, 0o644, false), (ROOT, 0o666, false), (ROOT, 0o664, false), (ROOT, 0o644, true)]
    {
        image.chown(owner)?;
        std::fs::set_permissions(&image.path, std::fs::Permissions::from_mode(mode))?;
        if is_given {
            assert_eq!(attach(fixture, &image, &with(Overlap::Reuse)).await?.device, device);
        } else {
            let error = fixture.attach_fails(&image.open()?, &with(Overlap::Reuse)).await?;
            expect_kind(&error, ErrorKind::Overlap)?;
            assert!(error.message.contains("users other than root can write to its file"), "{error}");
        }
    }
    fixture.manager.detach(&device.node(), DetachOptions::default()).await?;
    Ok(())
}
