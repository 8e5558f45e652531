//! `org.loopd1.Encrypted` as far as it goes without a service manager, which starts the program that unlocks.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::AsFd as _;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::Result;
use loopd_dbus::names::{
    ACTION_MANAGE_OTHERS, ACTION_UNLOCK, BUS_NAME, CLEARTEXT, ENCRYPTED, ROOT_PATH, VOLUME,
};
use loopd_dbus::proxy::{Encrypted, Interaction};
use loopd_dbus::{AttachOptions, DetachOptions, ErrorKind, LockOptions, UnlockOptions};
use loopd_tests::fixture::{Attached, Fixture, expect_kind, refusal};
use loopd_tests::hanging::Hanging;
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::probe::{Probe, Reply};
use loopd_tests::process::{eventually, needs, run};
use loopd_tests::raw_bus::{Bytes, RawBus, RawMessage};
use loopd_tests::table::Gpt;
use loopd_tests::units::{Conduct, Units};
use loopd_tests::{GAMES, NOBODY, Outcome, ROOT, User, WWW_DATA, udev};
use tokio::task::spawn_blocking;
use tokio::time::timeout;
use zbus::wire::OwnedObjectPath;

loopd_tests::tests! {
    "unlock";
    Setup::None => [
        only_volumes_that_may_be_encrypted_have_the_interface,
        interface_comes_and_goes_with_the_contents,
        unlock_needs_a_service_manager,
        failing_service_manager_leaves_nothing_unlocked,
        unlock_of_a_disconnected_caller_is_undone,
        other_contents_are_not_unlocked,
        invalid_options_are_refused,
        repeated_descriptor_is_refused,
        hanging_secret_delays_nobody,
        locked_volume_is_not_locked_again,
        loopctl_reports_the_error,
    ];
    Setup::Real => [polkitd_decides_for_other_users];
    Setup::StandIn(Answer::Yes) => [unlock_is_checked_with_its_details];
}

const UUID: &str = "11111111-2222-3333-4444-0000000000e1";
const SECRET: &str = "correct horse";
/// A time limit for calls that must not wait for a file.
const SOON: Duration = Duration::from_secs(8);

/// The file with the secret of each LUKS volume of these tests, without a final newline.
fn secret(fixture: &Fixture) -> Result<PathBuf> {
    let path = fixture.directory.join("secret");
    std::fs::write(&path, SECRET)?;
    Ok(path)
}

/// Writes a LUKS header, with a key derivation that takes no time.
async fn format(fixture: &Fixture, volume: &str) -> Outcome {
    needs("cryptsetup")?;
    let secret = secret(fixture)?;
    let derivation = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    let arguments = ["luksFormat", "-q", "--type", "luks2"].into_iter().chain(derivation);
    run("cryptsetup", arguments.chain([volume, secret.to_str().unwrap()])).await.map(drop)
}

/// A LUKS volume.
async fn image(fixture: &Fixture) -> Result<Image> {
    let image = Image::sparse(&fixture.directory, "image", 20 * MIB)?;
    format(fixture, image.name()).await?;
    Ok(image)
}

/// An attached LUKS volume.
async fn attach(fixture: &Fixture) -> Result<Attached> {
    fixture.attach(&image(fixture).await?.open()?, &AttachOptions::default()).await
}

/// A persistent attachment of this user.
async fn owned_by(fixture: &Fixture, user: User) -> Result<Attached> {
    let image = image(fixture).await?;
    fixture.probe(user, ["setup", "regular", image.name(), "lifetime=s:persistent"]).await?.attached()
}

async fn encrypted(fixture: &Fixture, attached: &Attached) -> Result<Encrypted> {
    Ok(Encrypted::new(&fixture.connection, attached.path.clone().into(), Interaction::Forbidden).await?)
}

/// Calls `Unlock` as this user.
async fn unlock(fixture: &Fixture, user: User, attached: &Attached, options: &[&str]) -> Result<Reply> {
    let call = ["unlock", attached.path.as_str(), "memfd", "-"];
    fixture.probe(user, call.into_iter().chain(options.iter().copied())).await
}

/// The objects on the bus with their interfaces.
async fn objects(fixture: &Fixture) -> Result<HashMap<OwnedObjectPath, Vec<String>>> {
    let manager = zbus::fdo::ObjectManagerProxy::new(&fixture.connection, BUS_NAME, ROOT_PATH).await?;
    let objects = manager.get_managed_objects().await?.into_iter();
    Ok(objects
        .map(|(path, interfaces)| (path, interfaces.into_keys().map(|name| name.to_string()).collect()))
        .collect())
}

async fn has_interface(fixture: &Fixture, path: &str) -> Result<bool> {
    let objects = objects(fixture).await?;
    let interfaces = objects.iter().find(|(known, _)| known.as_str() == path).map(|(_, names)| names);
    assert!(interfaces.is_some_and(|names| names.iter().any(|name| name == VOLUME)), "{path}: {objects:?}");
    Ok(interfaces.is_some_and(|names| names.iter().any(|name| name == ENCRYPTED)))
}

/// Checks that the volume is locked, and that loopd has no descriptor more than before.
async fn is_locked(fixture: &mut Fixture, attached: &Attached, before: &[String]) -> Outcome {
    let holders = format!("/sys/block/loop{}/holders", attached.device.0);
    assert_eq!(std::fs::read_dir(holders)?.count(), 0, "a mapping is left");
    let cleartext = fixture.probe(ROOT, ["get", attached.path.as_str(), ENCRYPTED]).await?;
    assert!(
        cleartext.ok()?["Cleartext"].as_str().is_some_and(|path| path.contains("\"/\"")),
        "{cleartext:?}"
    );
    let objects = objects(fixture).await?;
    assert!(objects.values().flatten().all(|name| name != CLEARTEXT), "{objects:?}");
    let mut open = Vec::new();
    let daemon = fixture.daemon()?;
    eventually("loopd has closed the caller's files", async || {
        open = daemon.descriptors()?;
        Ok(open.len() <= before.len())
    })
    .await
}

async fn only_volumes_that_may_be_encrypted_have_the_interface(fixture: &mut Fixture) -> Outcome {
    let luks = image(fixture).await?;
    let ext4 = Image::ext4(&fixture.directory, "ext4", "data", UUID).await?;
    let empty = Image::sparse(&fixture.directory, "empty", MIB)?;
    let disk = Image::sparse(&fixture.directory, "disk", 4 * MIB)?;
    Gpt::new(&[(2048, 4095)]).write(&disk)?;
    for (image, expected) in [(luks, true), (ext4, false), (empty, true), (disk, false)] {
        let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
        assert_eq!(has_interface(fixture, attached.path.as_str()).await?, expected, "{image:?}");
        if image.path.ends_with("disk") {
            assert!(has_interface(fixture, &format!("{}/p1", attached.path)).await?, "an empty partition");
        }
        fixture.detach(&attached).await?;
    }
    Ok(())
}

async fn interface_comes_and_goes_with_the_contents(fixture: &mut Fixture) -> Outcome {
    needs("cryptsetup")?;
    let image = Image::ext4(&fixture.directory, "image", "data", UUID).await?;
    let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    let path = attached.path.as_str();
    assert!(!has_interface(fixture, path).await?);
    format(fixture, &attached.device.node()).await?;
    // Between the two contents it is empty.
    eventually("it is encrypted", async || Ok(fixture.volume(&attached.path).await?.usage == "crypto"))
        .await?;
    assert!(has_interface(fixture, path).await?);
    run("wipefs", ["-q", "-a", &attached.device.node()]).await?;
    run("mkfs.ext4", ["-q", "-F", &attached.device.node()]).await?;
    eventually("it is a file system", async || Ok(!has_interface(fixture, path).await?)).await?;
    udev::settle().await?;
    fixture.detach(&attached).await
}

async fn unlock_needs_a_service_manager(fixture: &mut Fixture) -> Outcome {
    let attached = attach(fixture).await?;
    let before = fixture.daemon()?.descriptors()?;
    let file = File::open(secret(fixture)?)?;
    let object = encrypted(fixture, &attached).await?;
    let error = refusal(object.unlock(file.as_fd(), &UnlockOptions::default()).await)?;
    expect_kind(&error, ErrorKind::NotSupported)?;
    for part in ["systemd", &attached.device.node(), "/image"] {
        assert!(error.message.contains(part), "no {part}: {error}");
    }
    is_locked(fixture, &attached, &before).await?;
    let log = fixture.log();
    assert!(!log.contains(SECRET), "{log}");
    fixture.detach(&attached).await?;
    fixture.assert_no_leak().await
}

async fn failing_service_manager_leaves_nothing_unlocked(fixture: &mut Fixture) -> Outcome {
    let units = Units::start(fixture.bus()).await?;
    let attached = attach(fixture).await?;
    let before = fixture.daemon()?.descriptors()?;
    for conduct in [Conduct::Refuses, Conduct::Fails] {
        units.behave(conduct);
        let error = unlock(fixture, ROOT, &attached, &[]).await?.refused(ErrorKind::Kernel)?;
        assert!(error.message.contains(&attached.device.node()), "{conduct:?}: {error}");
        is_locked(fixture, &attached, &before).await?;
    }
    fixture.detach(&attached).await
}

/// The secret is a file that does not answer, and the service manager does not either.
async fn unlock_of_a_disconnected_caller_is_undone(fixture: &mut Fixture) -> Outcome {
    let units = Units::start(fixture.bus()).await?;
    let attached = attach(fixture).await?;
    let before = fixture.daemon()?.descriptors()?;
    let hanging = Hanging::mount(&fixture.directory, 1 << 20)?;
    units.behave(Conduct::Hangs);
    let secret = hanging.open()?;
    hanging.hang();
    let mut command = fixture.tool(ROOT, "loopd-probe")?;
    command.args(["unlock", attached.path.as_str(), "stdin", "-"]).stdin(secret);
    let probe = Probe::spawn_with_input(command)?;
    eventually("the unit starts", async || Ok(!units.started().is_empty())).await?;
    assert!(units.started()[0].unit.starts_with("loopd-unlock-"), "{:?}", units.started());
    others_are_served(fixture).await?;
    // The unit that closes what was made.
    units.behave(Conduct::Fails);
    probe.kill().await?;
    is_locked(fixture, &attached, &before).await?;
    assert_eq!(hanging.waiting(), 0, "loopd has used the secret");
    hanging.go_on();
    timeout(SOON, fixture.detach(&attached)).await??;
    fixture.assert_no_leak().await
}

async fn other_contents_are_not_unlocked(fixture: &mut Fixture) -> Outcome {
    let empty = Image::sparse(&fixture.directory, "empty", MIB)?;
    let attached = fixture.attach(&empty.open()?, &AttachOptions::default()).await?;
    let error = unlock(fixture, ROOT, &attached, &[]).await?.refused(ErrorKind::NotSupported)?;
    assert!(error.message.contains("not known to be encrypted"), "{error}");
    fixture.detach(&attached).await?;
    let ext4 = Image::ext4(&fixture.directory, "ext4", "data", UUID).await?;
    let attached = fixture.attach(&ext4.open()?, &AttachOptions::default()).await?;
    // The object does not have the interface.
    let Reply::Error(name, message) = unlock(fixture, ROOT, &attached, &["type=s:veracrypt"]).await? else {
        panic!("a file system was unlocked")
    };
    assert!(name.starts_with("org.freedesktop.DBus.Error.Unknown"), "{name}: {message}");
    fixture.detach(&attached).await
}

async fn invalid_options_are_refused(fixture: &mut Fixture) -> Outcome {
    let attached = attach(fixture).await?;
    let before = fixture.daemon()?.descriptors()?;
    for (options, named) in [
        (&["colour=s:red"][..], "unknown option"),
        (&["read-only=u:1"], "read-only"),
        (&["key-size=u:1"], "key-size"),
        (&["key-files=h:/dev/null"], "key-files"),
        (&["type=s:plain"], "plain"),
        (&["type=s:LUKS"], "LUKS"),
        (&["pim=u:5"], "veracrypt"),
        (&["type=s:truecrypt", "pim=u:5"], "veracrypt"),
        (&["type=s:luks", "hidden=b:true"], "veracrypt"),
        (&["type=s:bitlocker", "header=h:/dev/null"], "luks"),
    ] {
        let reply = unlock(fixture, ROOT, &attached, options).await?;
        let error = reply.refused(ErrorKind::InvalidArgs)?;
        assert!(error.message.contains(named), "{options:?}: {error}");
    }
    let lock = fixture.probe(ROOT, ["lock", attached.path.as_str(), "lazy=s:yes"]).await?;
    lock.refused(ErrorKind::InvalidArgs)?;
    is_locked(fixture, &attached, &before).await?;
    fixture.detach(&attached).await
}

/// The secret is the header, too: each descriptor of a message is for one argument.
async fn repeated_descriptor_is_refused(fixture: &mut Fixture) -> Outcome {
    let attached = attach(fixture).await?;
    let before = fixture.daemon()?.descriptors()?;
    let (address, path) = (fixture.bus_address().to_owned(), attached.path.to_string());
    let (name, message) = spawn_blocking(move || {
        let mut bus = RawBus::connect(&address)?;
        let mut entry = Bytes::new(false);
        entry.text(b"header");
        entry.signature("h");
        entry.align(4);
        entry.number(0);
        let mut body = Bytes::new(false);
        body.number(0);
        body.number(u32::try_from(entry.bytes.len())?);
        body.align(8);
        body.bytes.extend(entry.bytes);
        let call = RawMessage::call(BUS_NAME, &path, ENCRYPTED, "Unlock").descriptors(1);
        let mut call = call.body("ha{sv}", body.bytes);
        call.serial = bus.next_serial();
        bus.send(&call.bytes(), &[File::open("/dev/null")?.as_fd()])?;
        let (answer, body) = bus.answer(call.serial)?;
        anyhow::Ok((answer.error, String::from_utf8_lossy(&body).into_owned()))
    })
    .await??;
    assert_eq!(name, ErrorKind::InvalidArgs.name(), "{message}");
    assert!(message.contains("descriptor"), "{message}");
    is_locked(fixture, &attached, &before).await?;
    fixture.detach(&attached).await
}

async fn others_are_served(fixture: &Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "other", MIB)?;
    let attached = timeout(SOON, fixture.attach(&image.open()?, &AttachOptions::default())).await??;
    timeout(SOON, fixture.detach(&attached)).await??;
    Ok(std::fs::remove_file(&image.path)?)
}

/// loopd neither reads the secret nor waits for its close.
async fn hanging_secret_delays_nobody(fixture: &mut Fixture) -> Outcome {
    let attached = attach(fixture).await?;
    let hanging = Hanging::mount(&fixture.directory, 1 << 20)?;
    let object = encrypted(fixture, &attached).await?;
    let file = hanging.open()?;
    hanging.hang();
    hanging.withhold_flush(fixture.daemon()?.pid());
    let error = refusal(timeout(SOON, object.unlock(file.as_fd(), &UnlockOptions::default())).await?)?;
    expect_kind(&error, ErrorKind::NotSupported)?;
    eventually("its close hangs", async || Ok(hanging.closing() == 1)).await?;
    assert_eq!(hanging.waiting(), 0, "loopd has used the secret");
    others_are_served(fixture).await?;
    timeout(SOON, fixture.detach(&attached)).await??;
    hanging.go_on();
    drop(file);
    fixture.assert_no_leak().await
}

async fn locked_volume_is_not_locked_again(fixture: &mut Fixture) -> Outcome {
    let attached = attach(fixture).await?;
    let object = encrypted(fixture, &attached).await?;
    for lazy in [false, true] {
        let error = refusal(object.lock(LockOptions { lazy }).await)?;
        expect_kind(&error, ErrorKind::NotFound)?;
        assert!(error.message.contains(&attached.device.node()), "{error}");
    }
    fixture.detach(&attached).await
}

async fn loopctl_reports_the_error(fixture: &mut Fixture) -> Outcome {
    let attached = attach(fixture).await?;
    let secret = secret(fixture)?;
    let node = attached.device.node();
    for arguments in [
        &["unlock", &node, "--passphrase-file", secret.to_str().unwrap()][..],
        &["unlock", &node, "--key-file", secret.to_str().unwrap()],
        &["lock", &node],
    ] {
        let output = fixture.loopctl(arguments).await?;
        assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(1), &[][..]), "{output:?}");
        let error = String::from_utf8(output.stderr)?;
        let way_out = if arguments[0] == "lock" { "`loopctl list` shows unlocked" } else { "systemd" };
        assert!(error.contains(way_out) && error.contains(&node) && !error.contains(SECRET), "{error}");
    }
    fixture.detach(&attached).await
}

/// The rules of the tests allow everything to one user, and nothing to another.
async fn polkitd_decides_for_other_users(fixture: &mut Fixture) -> Outcome {
    let attached = owned_by(fixture, GAMES).await?;
    unlock(fixture, GAMES, &attached, &[]).await?.refused(ErrorKind::NotSupported)?;
    let lock = ["lock", attached.path.as_str()];
    fixture.probe(GAMES, lock).await?.refused(ErrorKind::NotFound)?;
    for (user, kind) in
        [(WWW_DATA, ErrorKind::AccessDenied), (NOBODY, ErrorKind::InteractiveAuthorizationRequired)]
    {
        unlock(fixture, user, &attached, &[]).await?.refused(kind)?;
        fixture.probe(user, lock).await?.refused(kind)?;
    }
    fixture.detach(&attached).await
}

async fn unlock_is_checked_with_its_details(fixture: &mut Fixture) -> Outcome {
    let attached = owned_by(fixture, GAMES).await?;
    let before = fixture.stand_in()?.checks().len();
    let node = attached.device.node();
    for (user, method) in [(GAMES, "unlock"), (WWW_DATA, "unlock"), (GAMES, "lock"), (WWW_DATA, "lock")] {
        if method == "unlock" {
            unlock(fixture, user, &attached, &[]).await?.refused(ErrorKind::NotSupported)?;
        } else {
            let reply = fixture.probe(user, ["lock", attached.path.as_str()]).await?;
            reply.refused(ErrorKind::NotFound)?;
        }
    }
    let checks = &fixture.stand_in()?.checks()[before..];
    let actions: Vec<&str> = checks.iter().map(|check| check.action.as_str()).collect();
    // Its owner may lock it without a question.
    assert_eq!(actions, [ACTION_UNLOCK, ACTION_MANAGE_OTHERS, ACTION_MANAGE_OTHERS]);
    assert!(checks.iter().all(|check| check.details["device"] == node), "{checks:?}");
    fixture.stand_in()?.answer(Answer::No);
    unlock(fixture, GAMES, &attached, &[]).await?.refused(ErrorKind::AccessDenied)?;
    fixture.manager.detach(&node, DetachOptions::default()).await?;
    Ok(())
}
