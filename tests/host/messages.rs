//! Nothing that can be sent over the bus ends the daemon or the client, or costs others their time.

use std::collections::HashSet;
use std::os::fd::AsFd as _;
use std::time::Duration;

use anyhow::Context as _;
use loopd_dbus::names::{BUS_NAME, MANAGER, ROOT_PATH, TAKES_DESCRIPTORS};
use loopd_dbus::proxy::{Interaction, Manager};
use loopd_dbus::{AttachOptions, ErrorKind, ListOptions};
use loopd_tests::daemon::Daemon;
use loopd_tests::hanging::Hanging;
use loopd_tests::hostile::{Attack, Trial};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::Setup;
use loopd_tests::process::{Process, eventually, resident, run, tied};
use loopd_tests::raw_bus::{Bytes, RawBus, RawMessage, become_user};
use loopd_tests::world::{World, expect_kind, refusal};
use loopd_tests::{GAMES, NOBODY, Outcome, ROOT, User, rounds};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

loopd_tests::tests! {
    "messages";
    Setup::None => [
        any_messages_at_all,
        any_messages_to_loopctl,
        a_signature_that_nests_too_deep,
        a_long_option_name,
        a_body_that_is_too_long,
        descriptors_that_nobody_takes,
        descriptor_indices,
        closing_that_hangs,
        closing_that_hangs_for_a_user,
        no_descriptors_left,
        introspection_names_children_only,
    ];
}

/// More than any answer takes.
const SOON: Duration = Duration::from_secs(8);

/// Runs as this user on a thread of its own.
async fn as_user<T: Send + 'static>(
    user: User,
    address: &str,
    body: impl FnOnce(&mut RawBus) -> anyhow::Result<T> + Send + 'static,
) -> anyhow::Result<T> {
    let address = address.to_owned();
    let (done, result) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || {
        let run = || {
            if user != ROOT {
                become_user(user)?;
            }
            body(&mut RawBus::connect(&address)?)
        };
        let _nobody_waits = done.send(run());
    });
    timeout(Duration::from_secs(60), result).await??
}

/// A call to the manager, sent as it is; gives the error's name, empty where there is none.
async fn answer_to(world: &World, call: RawMessage) -> anyhow::Result<String> {
    as_user(NOBODY, world.bus_address(), move |bus| {
        let mut call = call;
        call.serial = bus.next_serial();
        bus.send(&call.bytes(), &[])?;
        Ok(bus.answer(call.serial)?.0.error)
    })
    .await
}

fn call(member: &str) -> RawMessage {
    RawMessage::call(BUS_NAME, ROOT_PATH, MANAGER, member)
}

/// Another client is served.
async fn is_served(world: &World) -> Outcome {
    timeout(SOON, world.manager.list(&ListOptions::default())).await.context("no answer in time")??;
    Ok(())
}

/// `LOOPD_TEST_ROUNDS` is the number of messages.
async fn any_messages_at_all(world: &mut World) -> Outcome {
    let (mut random, messages) = rounds::of("messages::any_messages_at_all", 100_000);
    let is_long = rounds::is_set();
    world.restart_daemon(&[("LOOPD_LOG", "warn")]).await?;
    let pid = world.daemon()?.pid();
    let attack = Attack {
        address: world.bus_address().to_owned(),
        user: NOBODY,
        target: BUS_NAME.to_owned(),
        answers: true,
        seed: random.u64(..),
        messages: usize::try_from(messages)?,
        batch: 32,
        time: if is_long { Duration::MAX } else { Duration::from_secs(50) },
    };
    let trial = spawn_blocking(move || Trial::run(&attack, pid)).await??;
    println!("{trial}");
    assert_eq!(world.daemon()?.exited()?, None);
    is_served(world).await
}

async fn any_messages_to_loopctl(world: &mut World) -> Outcome {
    let names = zbus::fdo::DBusProxy::new(&world.connection).await?;
    let before = names.list_names().await?;
    let output = world.folder.join("monitor");
    let mut command = tied(world.tool(NOBODY, "loopctl")?.get_program());
    command
        .args(["monitor", "--json"])
        .env("DBUS_SYSTEM_BUS_ADDRESS", world.bus_address())
        .stdout(std::fs::File::create(&output)?);
    let mut monitor = Process::spawn("loopctl", &mut command)?;
    let mut target = None;
    eventually("the monitor is on the bus", async || {
        let now = names.list_names().await?;
        target = now.into_iter().find(|name| name.starts_with(':') && !before.contains(name));
        Ok(target.is_some())
    })
    .await?;
    let target = target.context("no monitor")?.to_string();
    let attack = Attack {
        address: world.bus_address().to_owned(),
        user: NOBODY,
        target,
        answers: false,
        seed: 7,
        messages: 20_000,
        batch: 32,
        time: Duration::from_secs(20),
    };
    let outcome =
        spawn_blocking(|| std::thread::spawn(move || attack.run()).join()).await?.expect("no panic")?;
    println!("{outcome:?}");
    assert_eq!(monitor.exited()?, None);
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let attached = world.attach(&image.open()?, &AttachOptions::default()).await?;
    eventually("the monitor tells of it", async || {
        Ok(std::fs::read_to_string(&output)?.contains(&attached.device.node()))
    })
    .await?;
    world.detach(&attached).await?;
    monitor.terminate().await.map(drop)
}

async fn a_signature_that_nests_too_deep(world: &mut World) -> Outcome {
    let pid = world.daemon()?.pid();
    let signature = format!("{}y{}", "aa(".repeat(17), ")".repeat(17));
    let error = answer_to(world, call("List").body(&signature, vec![0; 4])).await?;
    assert_eq!(error, ErrorKind::InvalidArgs.name());
    is_served(world).await?;
    assert_eq!((world.daemon()?.pid(), world.daemon()?.exited()?), (pid, None));
    Ok(())
}

async fn a_long_option_name(world: &mut World) -> Outcome {
    let mut body = Bytes::new(false);
    let mut entry = Bytes::new(false);
    entry.text(&[0x1b; 60_000]);
    entry.signature("b");
    entry.number(1);
    body.number(u32::try_from(entry.bytes.len())?);
    body.align(8);
    body.bytes.extend(entry.bytes);
    let call = call("List").body("a{sv}", body.bytes);
    let text = as_user(NOBODY, world.bus_address(), move |bus| {
        let mut call = call;
        call.serial = bus.next_serial();
        bus.send(&call.bytes(), &[])?;
        Ok(bus.answer(call.serial)?.1)
    })
    .await?;
    assert!(text.len() < 4200 && !text.contains(&0x1b), "{} bytes", text.len());
    assert!(String::from_utf8_lossy(&text).contains("unknown option"));
    Ok(())
}

async fn a_body_that_is_too_long(world: &mut World) -> Outcome {
    let before = resident(world.daemon()?.pid())?;
    let mut body = Bytes::new(false);
    body.text(&vec![b'x'; 31 << 20]);
    let error = answer_to(world, call("Detach").body("s", body.bytes)).await?;
    assert_eq!(error, "org.freedesktop.DBus.Error.LimitsExceeded");
    let after = resident(world.daemon()?.pid())?;
    assert!(after < before + 8 * 1024, "{before} kB before, {after} kB after");
    is_served(world).await
}

async fn descriptors_that_nobody_takes(world: &mut World) -> Outcome {
    // Past the bus's own policy: to a daemon on a bus that allows everything, the unit tests speak.
    let error = as_user(NOBODY, world.bus_address(), |bus| {
        let file = std::fs::File::open("/dev/null")?;
        let mut call = call("FindFree").descriptors(1);
        call.serial = bus.next_serial();
        bus.send(&call.bytes(), &[file.as_fd()])?;
        Ok(bus.answer(call.serial)?.0.error)
    })
    .await?;
    assert_eq!(error, ErrorKind::AccessDenied.name());
    is_served(world).await
}

async fn descriptor_indices(world: &mut World) -> Outcome {
    for (index, expected) in [
        (0, ErrorKind::InvalidBackingFile.name()),
        (1, ErrorKind::InvalidArgs.name()),
        (u32::MAX, ErrorKind::InvalidArgs.name()),
    ] {
        let error = as_user(ROOT, world.bus_address(), move |bus| {
            let file = std::fs::File::open("/dev/null")?;
            let mut body = Bytes::new(false);
            body.number(index);
            body.number(0);
            body.align(8);
            let mut call = call("SetupLoop").descriptors(1).body("ha{sv}", body.bytes);
            call.serial = bus.next_serial();
            bus.send(&call.bytes(), &[file.as_fd()])?;
            Ok(bus.answer(call.serial)?.0.error)
        })
        .await?;
        assert_eq!(error, expected, "index {index}");
    }
    is_served(world).await
}

async fn closing_that_hangs(world: &mut World) -> Outcome {
    let hanging = Hanging::mount(&world.folder, 1 << 20)?;
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let read_only = AttachOptions { read_only: true, ..AttachOptions::default() };
    let attached = world.attach(&image.open()?, &read_only).await?;
    let object = world.object(&attached.path).await?;
    hanging.withhold_flush(world.daemon()?.pid());
    let connection = world.connect().await?;
    let client = Manager::new(&connection, Interaction::Forbidden).await?;
    let file = hanging.open()?;
    let listed = ListOptions { file: Some(hanging.open()?.into()), ..ListOptions::default() };
    assert!(timeout(SOON, client.list(&listed)).await??.is_empty());
    let of_the_file = timeout(SOON, client.setup_loop(file.as_fd(), &AttachOptions::default())).await?;
    timeout(SOON, object.replace_backing_file(file.as_fd())).await??;
    let wrong = AttachOptions { reference: "x".repeat(100), ..AttachOptions::default() };
    expect_kind(
        &refusal(timeout(SOON, client.setup_loop(file.as_fd(), &wrong)).await?)?,
        ErrorKind::InvalidArgs,
    )?;
    eventually("closes hang", async || Ok(hanging.closing() >= 4)).await?;
    is_served(world).await?;
    let other = timeout(SOON, world.attach(&image.open()?, &AttachOptions::default())).await??;
    world.detach(&other).await?;
    hanging.go_on();
    if let Ok((path, device)) = of_the_file {
        let attached = loopd_tests::world::Attached::new((path, device))?;
        world.detach(&attached).await?;
    }
    world.detach(&attached).await?;
    drop(file);
    world.assert_no_leak().await
}

/// More than there are threads that close one user's files.
const CALLS_THAT_HANG: usize = 12;
/// How many there are.
const THREADS_THAT_HANG: usize = 8;

/// The same by a user without any rights, with a file system of their own, in each method that takes a file.
async fn closing_that_hangs_for_a_user(world: &mut World) -> Outcome {
    let alone = Hanging::mount_for(NOBODY, &world.folder, 1 << 20)?;
    let image = Image::sparse(&world.folder, "image", MIB)?;
    closing_hangs_by(world, &alone, &image).await?;
    drop(alone);
    let for_all = Hanging::mount_for_all(NOBODY, &world.folder, 1 << 20)?;
    closing_hangs_by(world, &for_all, &image).await
}

async fn closing_hangs_by(world: &mut World, hanging: &Hanging, image: &Image) -> Outcome {
    let attached = world.attach(&image.open()?, &AttachOptions::default()).await?;
    for &(interface, member, _) in TAKES_DESCRIPTORS {
        hanging.withhold_flush(world.daemon()?.pid());
        let path = if interface == MANAGER { ROOT_PATH } else { attached.path.as_str() };
        let call = RawMessage::call(BUS_NAME, path, interface, member).descriptors(1);
        let call = with_a_file(call, member)?;
        let errors = send_file(world, call, hanging.path()).await?;
        println!("{member}: {errors:?}");
        let hang = format!("{member} leaves files whose close hangs");
        eventually(&hang, async || Ok(hanging.closing() == THREADS_THAT_HANG)).await?;
        others_are_served(world, image).await?;
        let old = ends_and_starts_again(world, image).await?;
        hanging.go_on();
        let status = { old }.end().await?;
        assert!(status.success(), "{status}");
    }
    world.detach(&attached).await?;
    world.assert_no_leak().await
}

/// The body with which a member takes its file.
fn with_a_file(call: RawMessage, member: &str) -> anyhow::Result<RawMessage> {
    let mut body = Bytes::new(false);
    Ok(match member {
        "SetupLoop" => {
            body.number(0);
            body.number(0);
            body.align(8);
            call.body("ha{sv}", body.bytes)
        }
        "List" => {
            let mut entry = Bytes::new(false);
            entry.text(b"file");
            entry.signature("h");
            entry.number(0);
            body.number(u32::try_from(entry.bytes.len())?);
            body.align(8);
            body.bytes.extend(entry.bytes);
            call.body("a{sv}", body.bytes)
        }
        "ReplaceBackingFile" => {
            body.number(0);
            call.body("h", body.bytes)
        }
        other => anyhow::bail!("what does {other} take?"),
    })
}

/// Makes the call several times as nobody with the file at this path; gives the errors, empty for none.
async fn send_file(
    world: &World,
    call: RawMessage,
    path: std::path::PathBuf,
) -> anyhow::Result<HashSet<String>> {
    as_user(NOBODY, world.bus_address(), move |bus| {
        let mut errors = HashSet::new();
        for _ in 0..CALLS_THAT_HANG {
            let file = std::fs::File::open(&path)?;
            let mut call = call.clone();
            call.serial = bus.next_serial();
            bus.send(&call.bytes(), &[file.as_fd()])?;
            errors.insert(bus.answer(call.serial)?.0.error);
        }
        Ok(errors)
    })
    .await
}

async fn others_are_served(world: &World, image: &Image) -> Outcome {
    let other = timeout(SOON, world.attach(&image.open()?, &AttachOptions::default())).await??;
    timeout(SOON, world.detach(&other)).await??;
    timeout(SOON, world.probe(GAMES, ["list"])).await??.ok().map(drop)
}

/// The kernel keeps the old daemon until its threads are through, but not its name and its lock.
async fn ends_and_starts_again(world: &mut World, image: &Image) -> anyhow::Result<Daemon> {
    let old = world.take_daemon().context("there is no loopd")?;
    old.ask_to_end()?;
    let gone = timeout(SOON, eventually("the name is free", async || Ok(!world.daemon_is_there().await?)));
    gone.await.context("it did not give up its name")??;
    timeout(SOON, world.restart_daemon(&[])).await.context("another one did not start")??;
    others_are_served(world, image).await?;
    Ok(old)
}

async fn no_descriptors_left(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let attached = world.attach(&image.open()?, &AttachOptions::default()).await?;
    let daemon = world.daemon()?;
    let pid = daemon.pid().to_string();
    let open: Vec<u64> = std::fs::read_dir(format!("/proc/{pid}/fd"))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    let limit = async |limit: u64| run("prlimit", ["--pid", &pid, &format!("--nofile={limit}:16384")]).await;
    // The lowest number that is free is the next one's.
    let lowest = (0..).find(|number| !open.contains(number)).context("no free number")?;
    for room in 0..3 {
        limit(lowest + room).await?;
        let error = timeout(SOON, world.attach_fails(&image.open()?, &AttachOptions::default())).await??;
        println!("room for {room}: {error}");
        if room == 0 {
            expect_kind(&error, ErrorKind::LimitExceeded)?;
        }
        is_served(world).await?;
    }
    limit(16384).await?;
    let other = world.attach(&image.open()?, &AttachOptions::default()).await?;
    world.detach(&other).await?;
    world.detach(&attached).await
}

async fn introspection_names_children_only(world: &mut World) -> Outcome {
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let attached = world.attach(&image.open()?, &AttachOptions::default()).await?;
    for (path, is_told) in [
        ("/", false),
        ("/org", false),
        (ROOT_PATH, false),
        ("/org/loopd1/attachment", false),
        (attached.path.as_str(), true),
    ] {
        let proxy = zbus::Proxy::new(&world.connection, BUS_NAME, path, MANAGER).await?;
        let xml = proxy.introspect().await?;
        assert_eq!(xml.contains("org.loopd1.Attachment"), is_told, "{path}: {xml}");
    }
    world.detach(&attached).await
}
