//! What one user does at their worst costs that user, and not the others.

use std::collections::BTreeMap;
use std::fs::File;

use anyhow::Context as _;
use futures_util::StreamExt as _;
use loopd_dbus::{AttachOptions, ErrorKind};
use loopd_tests::hanging::Hanging;
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::probe::Probe;
use loopd_tests::process::{PATIENCE, eventually};
use loopd_tests::sysfs;
use loopd_tests::table::Gpt;
use loopd_tests::world::World;
use loopd_tests::{GAMES, NOBODY, Outcome, User, WWW_DATA};
use zbus::MessageStream;
use zbus::fdo::MonitoringProxy;
use zbus::wire::OwnedObjectPath;

loopd_tests::tests! {
    "isolation";
    Setup::StandIn(Answer::Yes) => [
        a_uid_that_is_no_user,
        hung_files_of_several_users,
        calls_over_the_limit_wait_for_their_turn,
        partitions_are_bounded,
        messages_of_an_attach,
    ];
    Setup::StandIn(Answer::Never) => [prompts_are_bounded];
}

/// So a subordinate uid looks to the daemon. A bus that asks the user database itself lets none in.
async fn a_uid_that_is_no_user(world: &mut World) -> Outcome {
    let users = std::fs::read_to_string("/etc/passwd")?;
    let users: String = users.split_inclusive('\n').filter(|line| !line.starts_with("games:")).collect();
    let passwd = world.folder.join("passwd");
    std::fs::write(&passwd, users)?;
    let script = r#"mount --bind "$0" /etc/passwd && exec "$@""#;
    world.restart_daemon_under(&["unshare", "--mount", "sh", "-c", script, passwd.to_str().unwrap()]).await?;
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let path = image.path.to_str().unwrap();
    for _ in 0..2 {
        let reply = world.probe(GAMES, ["setup", "regular", path]).await?;
        let error = reply.refused(ErrorKind::AccessDenied)?;
        assert!(error.message.contains("getent passwd 5"), "{error}");
    }
    assert!(world.stand_in()?.checks().is_empty(), "polkit would judge it by the session of its owner");
    world.probe(NOBODY, ["setup", "regular", path]).await?.attached()?;
    world.assert_no_leak().await
}

/// A call of this user's with this file.
fn call_with(world: &World, user: User, file: File) -> anyhow::Result<Probe> {
    let mut command = world.tool(user, "loopd-probe")?;
    command.args(["setup", "stdin", "-", "wait=b:false"]).stdin(file);
    Probe::spawn_with_input(command)
}

async fn hung_files_of_several_users(world: &mut World) -> Outcome {
    world.configure("[limits]\ncalls = 3\n[all-users]\ncalls = 6\n")?;
    world.restart_daemon(&[]).await?;
    let hanging = Hanging::mount(&world.folder, 16 << 20)?;
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let path = image.path.to_str().unwrap();
    let mut files = Vec::new();
    for _ in 0..8 {
        files.push(hanging.open()?);
    }
    hanging.hang();
    let mut hung = Vec::new();
    for user in [GAMES, WWW_DATA] {
        for _ in 0..3 {
            hung.push(call_with(world, user, files.remove(0))?);
        }
    }
    eventually("all of them hang", async || Ok(hanging.waiting() >= 6)).await?;

    // Who has no call yet gets one of those that are kept for that, and root gets what it wants.
    world.probe(NOBODY, ["setup", "regular", path]).await?.attached()?;
    for _ in 0..8 {
        let attached = world.attach(&image.open()?, &AttachOptions::default()).await?;
        world.detach(&attached).await?;
    }
    hung.push(call_with(world, NOBODY, files.remove(0))?);
    eventually("that one hangs too", async || Ok(hanging.waiting() >= 7)).await?;
    let reply = world.probe(NOBODY, ["setup", "regular", path]).await?;
    let error = reply.refused(ErrorKind::LimitExceeded)?;
    assert!(error.message.contains("all users together have 7 calls in progress"), "{error}");

    hanging.go_on();
    for mut probe in hung {
        probe.reply().await?.attached()?;
    }
    drop(files);
    world.assert_no_leak().await
}

async fn calls_over_the_limit_wait_for_their_turn(world: &mut World) -> Outcome {
    world.configure("[limits]\ncalls = 2\n")?;
    world.restart_daemon(&[]).await?;
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let path = image.path.to_str().unwrap();
    let mut calls = Vec::new();
    for _ in 0..8 {
        calls.push(world.probe_hold(GAMES, ["--prompted", "setup", "regular", path])?);
    }
    for call in &mut calls {
        call.ready().await?;
    }
    for call in &mut calls {
        call.go().await?;
    }
    for mut call in calls {
        call.reply().await?.attached()?;
    }
    world.assert_no_leak().await
}

async fn prompts_are_bounded(world: &mut World) -> Outcome {
    world.configure("[limits]\nprompts = 2\n")?;
    world.restart_daemon(&[]).await?;
    let image = Image::sparse(&world.folder, "image", MIB)?;
    let words = ["--interactive", "setup", "regular", image.path.to_str().unwrap()];
    let mut open = Vec::new();
    for _ in 0..2 {
        open.push(world.probe_hold(GAMES, words)?);
    }
    let polkit = world.stand_in()?;
    eventually("polkit asks", async || Ok(polkit.checks().len() == 2)).await?;
    world.probe(GAMES, words).await?.refused(ErrorKind::LimitExceeded)?;
    open.push(world.probe_hold(WWW_DATA, words)?);
    eventually("polkit asks another user", async || Ok(polkit.checks().len() == 3)).await?;
    for probe in open {
        probe.kill().await?;
    }
    eventually("the questions are taken back", async || Ok(polkit.cancelled().len() == 3)).await?;
    world.assert_no_leak().await
}

async fn partitions_are_bounded(world: &mut World) -> Outcome {
    world.configure("[limits]\npartitions = 3\n")?;
    world.restart_daemon(&[]).await?;
    let image = Image::sparse(&world.folder, "image", 4 * MIB)?;
    Gpt::new(&[(2048, 2055), (2056, 2063)]).write(&image)?;
    let words = ["--hold", "setup", "regular", image.path.to_str().unwrap()];
    let mut first = world.probe_hold(GAMES, words)?;
    let attached = first.reply().await?.attached()?;
    let error = world.probe(GAMES, &words[1..]).await?.refused(ErrorKind::LimitExceeded)?;
    assert!(error.message.contains("has 2 partitions") && error.message.contains("may have 3"), "{error}");
    eventually("only the first one is there", async || {
        Ok(sysfs::bound_by_tests(&world.folder) == [attached.device])
    })
    .await?;
    let mut other = world.probe_hold(WWW_DATA, words)?;
    other.reply().await?.attached()?;
    let roots = world.attach(&image.open()?, &AttachOptions::default()).await?;
    world.detach(&roots).await?;
    for probe in [first, other] {
        probe.close().await?;
    }
    world.assert_no_leak().await
}

/// Everything on the bus from the start of a client that attaches an image to the end of its attachment, by
/// member: `reply` for what answers a call.
async fn traffic(world: &World, partitions: usize) -> anyhow::Result<BTreeMap<String, usize>> {
    let image = Image::sparse(&world.folder, format!("image-{partitions}"), 4 * MIB)?;
    if partitions > 0 {
        let entries: Vec<_> =
            (0..partitions as u64).map(|entry| (2048 + 8 * entry, 2055 + 8 * entry)).collect();
        Gpt::new(&entries).write(&image)?;
    }
    let monitor = world.connect().await?;
    MonitoringProxy::new(&monitor).await?.become_monitor(&[], 0).await?;
    let mut messages = MessageStream::from(&monitor);
    let words = ["setup", "regular", image.path.to_str().unwrap()];
    let attached = world.probe(WWW_DATA, words).await?.attached()?;
    let mut counts = BTreeMap::new();
    loop {
        let next = tokio::time::timeout(PATIENCE, messages.next()).await;
        let message = next?.context("the bus has ended the connection")??;
        let header = message.header();
        let member = header.member().map_or("reply", |member| member.as_str()).to_owned();
        let is_last = member == "InterfacesRemoved" && {
            let (path, _): (OwnedObjectPath, Vec<String>) = message.body().deserialize()?;
            path == attached.path
        };
        *counts.entry(member).or_default() += 1;
        if is_last {
            return Ok(counts);
        }
    }
}

/// However many partitions there are, each costs the bus one signal when it comes and one when it goes.
async fn messages_of_an_attach(world: &mut World) -> Outcome {
    world.configure("[times]\nidle-exit = 0\n")?;
    world.restart_daemon(&[]).await?;
    // The first call of a uid may cost more.
    traffic(world, 1).await?;
    for partitions in [0, 2, 128] {
        let mut counts = traffic(world, partitions).await?;
        println!("{partitions} partitions: {counts:?}");
        for member in ["InterfacesAdded", "InterfacesRemoved"] {
            assert_eq!(counts.remove(member), Some(1 + partitions), "{member}");
        }
        assert_eq!(counts.get("SetupLoop"), Some(&1));
        assert_eq!(counts.get("CheckAuthorization"), Some(&1));
        // The connections of client and monitor come and go.
        for member in ["Hello", "NameAcquired", "NameLost", "NameOwnerChanged"] {
            counts.remove(member);
        }
        let others: usize = counts.values().sum();
        assert!(others <= 10, "{others} other messages with {partitions} partitions: {counts:?}");
    }
    world.assert_no_leak().await
}
