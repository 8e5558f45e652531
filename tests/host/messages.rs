//! No message on the bus ends the daemon or the client, or delays others.

use std::collections::HashSet;
use std::os::fd::AsFd as _;
use std::time::Duration;

use anyhow::Context as _;
use loopd_dbus::names::{BUS_NAME, MANAGER, ROOT_PATH, TAKES_DESCRIPTORS};
use loopd_dbus::proxy::{Interaction, Manager};
use loopd_dbus::{AttachOptions, ErrorKind, ListOptions};
use loopd_tests::daemon::Daemon;
use loopd_tests::fixture::{Fixture, expect_kind, refusal};
use loopd_tests::hanging::Hanging;
use loopd_tests::hostile::{Attack, Trial};
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::Setup;
use loopd_tests::process::{Process, eventually, peak, run, tied};
use loopd_tests::raw_bus::{Bytes, RawBus, RawMessage, become_user};
use loopd_tests::{GAMES, NOBODY, Outcome, ROOT, User, rounds};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

loopd_tests::tests! {
    "messages";
    Setup::None => [
        random_messages_do_not_harm_loopd,
        random_messages_do_not_harm_loopctl,
        deep_signature_is_refused,
        long_option_name_is_shortened_in_the_error,
        long_body_is_refused,
        unexpected_descriptors_are_refused,
        invalid_descriptor_indices_are_refused,
        hanging_close_does_not_delay_others,
        hanging_closes_of_a_user_are_limited,
        call_without_free_descriptors_fails,
        introspection_returns_direct_children_only,
    ];
}

/// A time limit that no reply exceeds.
const SOON: Duration = Duration::from_secs(8);

/// Runs as this user on another thread.
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

/// Sends a raw call to the manager; returns the error's name, or an empty text.
async fn answer_to(fixture: &Fixture, call: RawMessage) -> anyhow::Result<String> {
    as_user(NOBODY, fixture.bus_address(), move |bus| {
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

/// Checks that another client is served.
async fn is_served(fixture: &Fixture) -> Outcome {
    timeout(SOON, fixture.manager.list(&ListOptions::default())).await.context("no answer in time")??;
    Ok(())
}

/// `LOOPD_TEST_ROUNDS` is the number of messages.
async fn random_messages_do_not_harm_loopd(fixture: &mut Fixture) -> Outcome {
    let (mut random, messages) = rounds::of("messages::random_messages_do_not_harm_loopd", 100_000);
    let is_long = rounds::is_set();
    fixture.restart_daemon(&[("LOOPD_LOG", "warn")]).await?;
    let pid = fixture.daemon()?.pid();
    let attack = Attack {
        address: fixture.bus_address().to_owned(),
        user: NOBODY,
        target: BUS_NAME.to_owned(),
        answers: true,
        seed: random.u64(..),
        messages: usize::try_from(messages)?,
        batch: 32,
        time: if is_long { Duration::MAX } else { Duration::from_secs(120) },
    };
    let trial = spawn_blocking(move || Trial::run(&attack, pid)).await??;
    println!("{trial}");
    assert_eq!(fixture.daemon()?.exited()?, None);
    is_served(fixture).await
}

async fn random_messages_do_not_harm_loopctl(fixture: &mut Fixture) -> Outcome {
    let names = zbus::fdo::DBusProxy::new(&fixture.connection).await?;
    let before = names.list_names().await?;
    let output = fixture.directory.join("monitor");
    let mut command = tied(fixture.tool(NOBODY, "loopctl")?.get_program());
    command
        .args(["monitor", "--json"])
        .env("DBUS_SYSTEM_BUS_ADDRESS", fixture.bus_address())
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
        address: fixture.bus_address().to_owned(),
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
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    eventually("the monitor reports it", async || {
        Ok(std::fs::read_to_string(&output)?.contains(&attached.device.node()))
    })
    .await?;
    fixture.detach(&attached).await?;
    monitor.terminate().await.map(drop)
}

async fn deep_signature_is_refused(fixture: &mut Fixture) -> Outcome {
    let pid = fixture.daemon()?.pid();
    let signature = format!("{}y{}", "aa(".repeat(17), ")".repeat(17));
    let error = answer_to(fixture, call("List").body(&signature, vec![0; 4])).await?;
    assert_eq!(error, ErrorKind::InvalidArgs.name());
    is_served(fixture).await?;
    assert_eq!((fixture.daemon()?.pid(), fixture.daemon()?.exited()?), (pid, None));
    Ok(())
}

async fn long_option_name_is_shortened_in_the_error(fixture: &mut Fixture) -> Outcome {
    let mut body = Bytes::new(false);
    let mut entry = Bytes::new(false);
    entry.text(&[0x1b; 60_000]);
    entry.signature("b");
    entry.number(1);
    body.number(u32::try_from(entry.bytes.len())?);
    body.align(8);
    body.bytes.extend(entry.bytes);
    let call = call("List").body("a{sv}", body.bytes);
    let text = as_user(NOBODY, fixture.bus_address(), move |bus| {
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

async fn long_body_is_refused(fixture: &mut Fixture) -> Outcome {
    let before = peak(fixture.daemon()?.pid())?;
    let mut text = Bytes::new(false);
    text.text(&vec![b'x'; 31 << 20]);
    for (member, signature, body) in [
        // Less than the calls of a user may have together: only the limit of one call refuses these.
        ("List", "a{sv}", option_of_bytes(64 << 10)),
        ("List", "a{sv}", option_of_bytes(3 << 20)),
        ("Detach", "s", text),
    ] {
        let error = answer_to(fixture, call(member).body(signature, body.bytes)).await?;
        assert_eq!(error, "org.freedesktop.DBus.Error.LimitsExceeded", "{member}");
        let after = peak(fixture.daemon()?.pid())?;
        assert!(after < before + 8 * 1024, "{member}: {before} kB before, {after} kB after");
    }
    is_served(fixture).await
}

/// A dictionary with one option, an array of this many bytes. In memory each of them takes more than a hundred.
fn option_of_bytes(length: usize) -> Bytes {
    let mut body = Bytes::new(false);
    body.number(0);
    body.align(8);
    let start = body.bytes.len();
    body.text(b"file");
    body.signature("ay");
    body.number(u32::try_from(length).unwrap_or(u32::MAX));
    body.bytes.resize(body.bytes.len() + length, 7);
    body.put_number(0, body.bytes.len() - start);
    body
}

async fn unexpected_descriptors_are_refused(fixture: &mut Fixture) -> Outcome {
    // The policy of the bus refuses it. The unit tests of loopd have a bus without one.
    let error = as_user(NOBODY, fixture.bus_address(), |bus| {
        let file = std::fs::File::open("/dev/null")?;
        let mut call = call("FindFree").descriptors(1);
        call.serial = bus.next_serial();
        bus.send(&call.bytes(), &[file.as_fd()])?;
        Ok(bus.answer(call.serial)?.0.error)
    })
    .await?;
    assert_eq!(error, ErrorKind::AccessDenied.name());
    is_served(fixture).await
}

async fn invalid_descriptor_indices_are_refused(fixture: &mut Fixture) -> Outcome {
    for (index, expected) in [
        (0, ErrorKind::InvalidBackingFile.name()),
        (1, ErrorKind::InvalidArgs.name()),
        (u32::MAX, ErrorKind::InvalidArgs.name()),
    ] {
        let error = as_user(ROOT, fixture.bus_address(), move |bus| {
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
    is_served(fixture).await
}

async fn hanging_close_does_not_delay_others(fixture: &mut Fixture) -> Outcome {
    let hanging = Hanging::mount(&fixture.directory, 1 << 20)?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let read_only = AttachOptions { read_only: true, ..AttachOptions::default() };
    let attached = fixture.attach(&image.open()?, &read_only).await?;
    let object = fixture.object(&attached.path).await?;
    hanging.withhold_flush(fixture.daemon()?.pid());
    let connection = fixture.connect().await?;
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
    is_served(fixture).await?;
    let other = timeout(SOON, fixture.attach(&image.open()?, &AttachOptions::default())).await??;
    fixture.detach(&other).await?;
    hanging.go_on();
    if let Ok((path, device)) = of_the_file {
        let attached = loopd_tests::fixture::Attached::new((path, device))?;
        fixture.detach(&attached).await?;
    }
    fixture.detach(&attached).await?;
    drop(file);
    fixture.assert_no_leak().await
}

/// More than the threads that close files of one user.
const CALLS_THAT_HANG: usize = 12;
/// The number of these threads.
const THREADS_THAT_HANG: usize = 8;

/// The same by an unprivileged user with their own file system, in each method that takes a file.
async fn hanging_closes_of_a_user_are_limited(fixture: &mut Fixture) -> Outcome {
    let alone = Hanging::mount_for(NOBODY, &fixture.directory, 1 << 20)?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    closing_hangs_by(fixture, &alone, &image).await?;
    drop(alone);
    let for_all = Hanging::mount_for_all(NOBODY, &fixture.directory, 1 << 20)?;
    closing_hangs_by(fixture, &for_all, &image).await
}

async fn closing_hangs_by(fixture: &mut Fixture, hanging: &Hanging, image: &Image) -> Outcome {
    let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    for &(interface, member, _) in TAKES_DESCRIPTORS {
        hanging.withhold_flush(fixture.daemon()?.pid());
        let path = if interface == MANAGER { ROOT_PATH } else { attached.path.as_str() };
        let call = RawMessage::call(BUS_NAME, path, interface, member).descriptors(1);
        let call = with_a_file(call, member)?;
        let errors = send_file(fixture, call, hanging.path()).await?;
        println!("{member}: {errors:?}");
        let hang = format!("{member} leaves files whose close hangs");
        eventually(&hang, async || Ok(hanging.closing() == THREADS_THAT_HANG)).await?;
        others_are_served(fixture, image).await?;
        let mut old = ends_and_starts_again(fixture, image).await?;
        hanging.go_on();
        let status = old.end().await?;
        assert!(status.success(), "{status}");
    }
    fixture.detach(&attached).await?;
    fixture.assert_no_leak().await
}

/// Adds the body with the file, in the form of the member.
fn with_a_file(call: RawMessage, member: &str) -> anyhow::Result<RawMessage> {
    let mut body = Bytes::new(false);
    Ok(match member {
        "SetupLoop" | "Unlock" => {
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
        other => anyhow::bail!("no body is known for {other}"),
    })
}

/// Makes the call several times as `nobody` with the file at this path; returns the errors, empty for none.
async fn send_file(
    fixture: &Fixture,
    call: RawMessage,
    path: std::path::PathBuf,
) -> anyhow::Result<HashSet<String>> {
    as_user(NOBODY, fixture.bus_address(), move |bus| {
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

async fn others_are_served(fixture: &Fixture, image: &Image) -> Outcome {
    let other = timeout(SOON, fixture.attach(&image.open()?, &AttachOptions::default())).await??;
    timeout(SOON, fixture.detach(&other)).await??;
    timeout(SOON, fixture.probe(GAMES, ["list"])).await??.ok().map(drop)
}

/// The kernel keeps the old daemon until its threads have finished, but releases its name and its lock.
async fn ends_and_starts_again(fixture: &mut Fixture, image: &Image) -> anyhow::Result<Daemon> {
    let old = fixture.take_daemon().context("there is no loopd")?;
    old.ask_to_end()?;
    let gone = timeout(SOON, eventually("the name is free", async || Ok(!fixture.daemon_is_there().await?)));
    gone.await.context("it did not give up its name")??;
    timeout(SOON, fixture.restart_daemon(&[])).await.context("another one did not start")??;
    others_are_served(fixture, image).await?;
    Ok(old)
}

async fn call_without_free_descriptors_fails(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    let daemon = fixture.daemon()?;
    let pid = daemon.pid().to_string();
    let open: Vec<u64> = std::fs::read_dir(format!("/proc/{pid}/fd"))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .collect();
    let limit = async |limit: u64| run("prlimit", ["--pid", &pid, &format!("--nofile={limit}:16384")]).await;
    // The next descriptor gets the lowest free number.
    let lowest = (0..).find(|number| !open.contains(number)).context("no free number")?;
    for spare in 0..3 {
        limit(lowest + spare).await?;
        let error = timeout(SOON, fixture.attach_fails(&image.open()?, &AttachOptions::default())).await??;
        println!("{spare} free descriptors: {error}");
        if spare == 0 {
            expect_kind(&error, ErrorKind::LimitExceeded)?;
        }
        is_served(fixture).await?;
    }
    limit(16384).await?;
    let other = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    fixture.detach(&other).await?;
    fixture.detach(&attached).await
}

async fn introspection_returns_direct_children_only(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    for (path, is_there) in [
        ("/", false),
        ("/org", false),
        (ROOT_PATH, false),
        ("/org/loopd1/attachment", false),
        (attached.path.as_str(), true),
    ] {
        let proxy = zbus::Proxy::new(&fixture.connection, BUS_NAME, path, MANAGER).await?;
        let xml = proxy.introspect().await?;
        assert_eq!(xml.contains("org.loopd1.Attachment"), is_there, "{path}: {xml}");
    }
    fixture.detach(&attached).await
}
