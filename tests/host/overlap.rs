//! A file that is attached already: allowed, refused, or given back.

use std::collections::HashSet;
use std::os::fd::AsFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;

use loopd_dbus::proxy::{Interaction, Manager};
use loopd_dbus::{AttachOptions, DetachOptions, ErrorKind, Lifetime, Overlap, State};
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::run;
use loopd_tests::sysfs::LoopDevice;
use loopd_tests::world::{Attached, World, expect_kind, refusal};
use loopd_tests::{GAMES, Outcome, ROOT, WWW_DATA};

loopd_tests::tests! {
    "overlap";
    Setup::None => [
        allowed_by_default,
        refused_where_a_byte_is_shared,
        given_back_where_all_is_the_same,
        a_read_only_one_does_not_serve_a_writer,
        of_another_program,
        of_another_name_of_the_file,
        at_the_same_time,
        a_lazy_detach_is_taken_back,
        outlives_the_client_of_before,
        not_the_wanted_number,
        of_another_program_for_a_user_s_file,
        another_block_size,
    ];
    Setup::StandIn(Answer::Yes) => [a_device_of_another_user_is_not_given_back];
    Setup::Real => [a_detach_of_another_user_is_not_taken_back];
}

fn with(overlap: Overlap) -> AttachOptions {
    AttachOptions { overlap, lifetime: Lifetime::Persistent, ..AttachOptions::default() }
}

fn part(overlap: Overlap, offset: u64, size_limit: u64) -> AttachOptions {
    AttachOptions { offset, size_limit, ..with(overlap) }
}

fn image(world: &World) -> anyhow::Result<Image> {
    Image::sparse(&world.folder, "image", 4 * MIB)
}

async fn attach(world: &World, image: &Image, options: &AttachOptions) -> anyhow::Result<Attached> {
    world.attach(&image.open()?, options).await
}

async fn allowed_by_default(world: &mut World) -> Outcome {
    let image = image(world)?;
    let first = attach(world, &image, &with(Overlap::Allow)).await?;
    let second = attach(world, &image, &with(Overlap::Allow)).await?;
    assert_ne!(first.device, second.device);
    world.detach(&first).await?;
    world.detach(&second).await
}

async fn refused_where_a_byte_is_shared(world: &mut World) -> Outcome {
    let image = image(world)?;
    let there = attach(world, &image, &part(Overlap::Refuse, MIB, MIB)).await?;
    for (offset, limit) in [(MIB, MIB), (0, 0), (0, MIB + 512), (2 * MIB - 512, 0), (MIB + 512, 512)] {
        let error = world.attach_fails(&image.open()?, &part(Overlap::Refuse, offset, limit)).await?;
        expect_kind(&error, ErrorKind::Overlap)?;
        for word in [image.path.to_str().unwrap(), &there.device.node(), "1048576"] {
            assert!(error.message.contains(word), "no {word} in {error}");
        }
    }
    for (offset, limit) in [(0, MIB), (2 * MIB, 0)] {
        let beside = attach(world, &image, &part(Overlap::Refuse, offset, limit)).await?;
        world.detach(&beside).await?;
    }
    world.detach(&there).await
}

async fn given_back_where_all_is_the_same(world: &mut World) -> Outcome {
    let image = image(world)?;
    let first = attach(world, &image, &part(Overlap::Reuse, MIB, MIB)).await?;
    let sequence = first.device.number::<u64>("diskseq")?;
    assert_eq!(attach(world, &image, &part(Overlap::Reuse, MIB, MIB)).await?, first);
    assert_eq!(world.attach(&image.open_read_only()?, &part(Overlap::Reuse, MIB, MIB)).await?, first);
    assert_eq!(first.device.number::<u64>("diskseq")?, sequence);
    for (offset, limit) in [(MIB, 0), (0, 0), (MIB, 512), (MIB + 512, MIB)] {
        let error = world.attach_fails(&image.open()?, &part(Overlap::Reuse, offset, limit)).await?;
        expect_kind(&error, ErrorKind::Overlap)?;
    }
    world.detach(&first).await
}

async fn a_read_only_one_does_not_serve_a_writer(world: &mut World) -> Outcome {
    let image = image(world)?;
    let read_only = AttachOptions { read_only: true, ..with(Overlap::Reuse) };
    let first = attach(world, &image, &read_only).await?;
    let error = world.attach_fails(&image.open()?, &with(Overlap::Reuse)).await?;
    expect_kind(&error, ErrorKind::Overlap)?;
    assert!(error.message.contains("read-only"), "{error}");
    assert_eq!(attach(world, &image, &read_only).await?, first);
    // A writable one beside it serves both.
    let second = attach(world, &image, &with(Overlap::Allow)).await?;
    assert_eq!(attach(world, &image, &with(Overlap::Reuse)).await?, second);
    world.detach(&first).await?;
    world.detach(&second).await
}

async fn losetup(image: &Path) -> anyhow::Result<LoopDevice> {
    LoopDevice::from_node(run("losetup", ["-f", "--show", image.to_str().unwrap()]).await?.trim())
}

async fn of_another_program(world: &mut World) -> Outcome {
    let image = image(world)?;
    std::fs::set_permissions(&image.path, std::fs::Permissions::from_mode(0o644))?;
    for _ in 0..10 {
        // At once: no event has told of it yet.
        let device = losetup(&image.path).await?;
        let error = world.attach_fails(&image.open()?, &with(Overlap::Refuse)).await?;
        expect_kind(&error, ErrorKind::Overlap)?;
        assert_eq!(attach(world, &image, &with(Overlap::Reuse)).await?.device, device);
        world.manager.detach(&device.node(), DetachOptions::default()).await?;
    }
    Ok(())
}

async fn of_another_name_of_the_file(world: &mut World) -> Outcome {
    let image = image(world)?;
    let first = attach(world, &image, &with(Overlap::Allow)).await?;
    let link = Image { path: world.folder.join("another name") };
    std::fs::hard_link(&image.path, &link.path)?;
    assert_eq!(attach(world, &link, &with(Overlap::Reuse)).await?, first);
    // The same name, another file.
    std::fs::remove_file(&image.path)?;
    let other = Image::sparse(&world.folder, "image", 4 * MIB)?;
    let second = attach(world, &other, &with(Overlap::Refuse)).await?;
    world.detach(&first).await?;
    world.detach(&second).await
}

async fn at_the_same_time(world: &mut World) -> Outcome {
    let image = image(world)?;
    let (mut managers, mut files) = (Vec::new(), Vec::new());
    for _ in 0..12 {
        managers.push(Manager::new(&world.connect().await?, Interaction::Forbidden).await?);
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
            world.manager.detach(&device, DetachOptions::default()).await?;
        }
    }
    Ok(())
}

async fn a_lazy_detach_is_taken_back(world: &mut World) -> Outcome {
    let image =
        Image::ext4(&world.folder, "image", "overlap", "11111111-2222-3333-4444-0000000000a1").await?;
    for lifetime in [Lifetime::Persistent, Lifetime::Client] {
        let options = AttachOptions { lifetime, ..with(Overlap::Reuse) };
        let first = attach(world, &image, &options).await?;
        let mounted = Mounted::new(first.device, &world.folder, "mounted").await?;
        world.manager.detach(&first.device.node(), DetachOptions { lazy: true }).await?;
        assert_eq!(world.properties(&first.path).await?.state, State::Detaching.as_str());
        assert_eq!(attach(world, &image, &options).await?, first);
        let properties = world.properties(&first.path).await?;
        assert_eq!(
            (properties.state.as_str(), properties.lifetime.as_str()),
            ("attached", lifetime.as_str())
        );
        mounted.unmount().await?;
        loopd_tests::udev::settle().await?;
        assert!(first.device.bound(), "{lifetime}: the detach was taken back");
        world.detach(&first).await?;
    }
    Ok(())
}

async fn outlives_the_client_of_before(world: &mut World) -> Outcome {
    let image = image(world)?;
    let other = world.connect().await?;
    let manager = Manager::new(&other, Interaction::Forbidden).await?;
    let options = AttachOptions::default();
    let file = image.open()?;
    let first = Attached::new(manager.setup_loop(file.as_fd(), &options).await?)?;
    assert_eq!(attach(world, &image, &with(Overlap::Reuse)).await?, first);
    drop(manager);
    other.close().await?;
    loopd_tests::udev::settle().await?;
    let properties = world.properties(&first.path).await?;
    assert_eq!((properties.lifetime.as_str(), properties.client.as_str()), ("persistent", ""));
    assert!(!first.device.flag("loop/autoclear")?);
    world.detach(&first).await
}

async fn not_the_wanted_number(world: &mut World) -> Outcome {
    let image = image(world)?;
    let first = attach(world, &image, &with(Overlap::Allow)).await?;
    let number = loopd_tests::sysfs::last_free()?.0;
    let wanted = AttachOptions { number: Some(number), ..with(Overlap::Reuse) };
    expect_kind(&world.attach_fails(&image.open()?, &wanted).await?, ErrorKind::Overlap)?;
    let same = AttachOptions { number: Some(first.device.0), ..with(Overlap::Reuse) };
    assert_eq!(attach(world, &image, &same).await?, first);
    world.detach(&first).await
}

async fn a_detach_of_another_user_is_not_taken_back(world: &mut World) -> Outcome {
    let image =
        Image::ext4(&world.folder, "image", "overlap", "11111111-2222-3333-4444-0000000000a2").await?;
    let path = image.path.to_str().unwrap();
    let words = ["setup", "regular", path, "lifetime=s:persistent", "overlap=s:reuse"];
    let first = world.probe(GAMES, words).await?.attached()?;
    let mounted = Mounted::new(first.device, &world.folder, "mounted").await?;
    world.manager.detach(&first.device.node(), DetachOptions { lazy: true }).await?;
    // www-data may attach nothing, so polkit says no first; root has all it asks for.
    world.probe(WWW_DATA, words).await?.refused(ErrorKind::AccessDenied)?;
    assert_eq!(world.probe(GAMES, words).await?.attached()?, first);
    mounted.unmount().await?;
    assert!(first.device.bound());
    world.detach(&first).await
}

async fn another_block_size(world: &mut World) -> Outcome {
    let image = image(world)?;
    let first = attach(world, &image, &with(Overlap::Allow)).await?;
    for (block_size, fits) in [(512, true), (4096, false)] {
        let wanted = AttachOptions { block_size, ..with(Overlap::Reuse) };
        if fits {
            assert_eq!(attach(world, &image, &wanted).await?, first);
        } else {
            let error = world.attach_fails(&image.open()?, &wanted).await?;
            expect_kind(&error, ErrorKind::Overlap)?;
            assert!(error.message.contains("its block size is 512"), "{error}");
        }
    }
    world.detach(&first).await
}

/// Whoever owns the device could show another file on it while root reads it.
async fn a_device_of_another_user_is_not_given_back(world: &mut World) -> Outcome {
    let image = image(world)?;
    image.chown(GAMES)?;
    let words = ["setup", "regular", image.name(), "lifetime=s:persistent", "overlap=s:reuse"];
    let of_games = world.probe(GAMES, words).await?.attached()?;
    let error = world.attach_fails(&image.open()?, &with(Overlap::Reuse)).await?;
    expect_kind(&error, ErrorKind::Overlap)?;
    assert!(error.message.contains(&format!("it belongs to user {}", GAMES.uid)), "{error}");
    let losetup = world.loopctl(["losetup", "-L", "-f", "--show", image.name()]).await?;
    assert!(!losetup.status.success() && losetup.stdout.is_empty(), "{losetup:?}");
    world.probe(WWW_DATA, words).await?.refused(ErrorKind::Overlap)?;
    assert_eq!(world.probe(GAMES, words).await?.attached()?, of_games, "its owner is given it");
    world.detach(&of_games).await?;
    // What is root's everyone may have.
    let of_root = attach(world, &image, &with(Overlap::Reuse)).await?;
    assert_eq!(world.probe(GAMES, words).await?.attached()?, of_root);
    world.detach(&of_root).await
}

/// Some daemon may have attached it for that user, who can have it detached again.
async fn of_another_program_for_a_user_s_file(world: &mut World) -> Outcome {
    let image = image(world)?;
    let device = losetup(&image.path).await?;
    for (owner, mode, is_given) in
        [(GAMES, 0o644, false), (ROOT, 0o666, false), (ROOT, 0o664, false), (ROOT, 0o644, true)]
    {
        image.chown(owner)?;
        std::fs::set_permissions(&image.path, std::fs::Permissions::from_mode(mode))?;
        if is_given {
            assert_eq!(attach(world, &image, &with(Overlap::Reuse)).await?.device, device);
        } else {
            let error = world.attach_fails(&image.open()?, &with(Overlap::Reuse)).await?;
            expect_kind(&error, ErrorKind::Overlap)?;
            assert!(error.message.contains("not root's alone"), "{error}");
        }
    }
    world.manager.detach(&device.node(), DetachOptions::default()).await?;
    Ok(())
}
