//! Attacks of one user do not affect other users.

use std::collections::BTreeMap;
use std::fs::File;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use futures_util::StreamExt as _;
use loopd_dbus::{AttachOptions, ErrorKind};
use loopd_tests::fixture::Fixture;
use loopd_tests::hanging::Hanging;
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::probe::Probe;
use loopd_tests::process::{PATIENCE, eventually};
use loopd_tests::sysfs;
use loopd_tests::table::Gpt;
use loopd_tests::{GAMES, NOBODY, Outcome, User, WWW_DATA};
use zbus::MessageStream;
use zbus::fdo::MonitoringProxy;
use zbus::wire::OwnedObjectPath;

loopd_tests::tests! {
    "isolation";
    Setup::StandIn(Answer::Yes) => [
        unknown_uid_is_refused,
        hanging_files_of_users_leave_threads_to_others,
        calls_over_the_limit_wait,
        calls_that_wait_for_the_pace_are_answered_at_sigterm,
        partitions_are_limited,
        attach_sends_two_signals_per_partition,
    ];
    Setup::StandIn(Answer::OpenPrompt) => [prompts_are_limited];
}

/// The daemon sees a subordinate uid like this. A bus that queries the user database itself refuses it.
async fn unknown_uid_is_refused(fixture: &mut Fixture) -> Outcome {
    let users = std::fs::read_to_string("/etc/passwd")?;
    let users: String = users.split_inclusive('\n').filter(|line| !line.starts_with("games:")).collect();
    let passwd = fixture.directory.join("passwd");
    std::fs::write(&passwd, users)?;
    let script = r#"mount --bind "$0" /etc/passwd && exec "$@""#;
    fixture
        .restart_daemon_under(&["unshare", "--mount", "sh", "-c", script, passwd.to_str().unwrap()])
        .await?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let path = image.name();
    for _ in 0..2 {
        let reply = fixture.probe(GAMES, ["setup", "regular", path]).await?;
        let error = reply.refused(ErrorKind::AccessDenied)?;
        assert!(error.message.contains("getent passwd 5"), "{error}");
    }
    assert!(fixture.stand_in()?.checks().is_empty(), "polkit would judge it by the session of its owner");
    fixture.probe(NOBODY, ["setup", "regular", path]).await?.attached()?;
    fixture.assert_no_leak().await
}

/// A `SetupLoop` of this user with this file.
fn call_with(fixture: &Fixture, user: User, file: File) -> anyhow::Result<Probe> {
    let mut command = fixture.tool(user, "loopd-probe")?;
    command.args(["setup", "stdin", "-", "wait=b:false"]).stdin(file);
    Probe::spawn_with_input(command)
}

async fn hanging_files_of_users_leave_threads_to_others(fixture: &mut Fixture) -> Outcome {
    fixture.configure("[limits]\ncalls = 3\n[all-users]\ncalls = 6\n")?;
    fixture.restart_daemon(&[]).await?;
    let hanging = Hanging::mount(&fixture.directory, 16 << 20)?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let path = image.name();
    let mut files = Vec::new();
    for _ in 0..8 {
        files.push(hanging.open()?);
    }
    hanging.hang();
    let mut hung = Vec::new();
    for user in [GAMES, WWW_DATA] {
        for _ in 0..3 {
            hung.push(call_with(fixture, user, files.remove(0))?);
        }
    }
    eventually("all of them hang", async || Ok(hanging.waiting() >= 6)).await?;

    // A user without calls uses the reserved share, and root has no limit.
    fixture.probe(NOBODY, ["setup", "regular", path]).await?.attached()?;
    for _ in 0..8 {
        let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
        fixture.detach(&attached).await?;
    }
    hung.push(call_with(fixture, NOBODY, files.remove(0))?);
    eventually("that one hangs too", async || Ok(hanging.waiting() >= 7)).await?;
    let reply = fixture.probe(NOBODY, ["setup", "regular", path]).await?;
    let error = reply.refused(ErrorKind::LimitExceeded)?;
    assert!(error.message.contains("all users together have 7 calls in progress"), "{error}");

    hanging.go_on();
    for mut probe in hung {
        probe.reply().await?.attached()?;
    }
    drop(files);
    fixture.assert_no_leak().await
}

async fn calls_over_the_limit_wait(fixture: &mut Fixture) -> Outcome {
    fixture.configure("[limits]\ncalls = 2\n")?;
    fixture.restart_daemon(&[]).await?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let path = image.name();
    let mut calls = Vec::new();
    for _ in 0..8 {
        calls.push(fixture.probe_hold(GAMES, ["--prompted", "setup", "regular", path])?);
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
    fixture.assert_no_leak().await
}

/// After a burst a user gets a hundred calls with descriptors a second; the rest waits before the daemon has received it.
/// These calls fail at once, so that the daemon has none in progress between two of them.
async fn calls_that_wait_for_the_pace_are_answered_at_sigterm(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let mut burst = fixture.probe_hold(GAMES, ["--prompted", "burst", "60", image.name()])?;
    burst.ready().await?;
    burst.go().await?;
    // Twenty-five come at once.
    eventually("the first calls have failed", async || {
        Ok(fixture.log().matches("SetupLoop failed:").count() >= 25)
    })
    .await?;
    let start = Instant::now();
    fixture.end_daemon().await?;
    assert!(start.elapsed() > Duration::from_millis(100), "none has waited");
    assert_eq!(burst.reply().await?.ok()?, 0, "calls without their answer");
    fixture.restart_daemon(&[]).await
}

async fn prompts_are_limited(fixture: &mut Fixture) -> Outcome {
    fixture.configure("[limits]\nprompts = 2\n")?;
    fixture.restart_daemon(&[]).await?;
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let arguments = ["--interactive", "setup", "regular", image.name()];
    let mut open = Vec::new();
    for _ in 0..2 {
        open.push(fixture.probe_hold(GAMES, arguments)?);
    }
    let polkit = fixture.stand_in()?;
    let prompts = || polkit.checks().iter().filter(|check| check.interactive).count();
    eventually("polkit asks", async || Ok(prompts() == 2)).await?;
    fixture.probe(GAMES, arguments).await?.refused(ErrorKind::LimitExceeded)?;
    open.push(fixture.probe_hold(WWW_DATA, arguments)?);
    eventually("polkit asks another user", async || Ok(prompts() == 3)).await?;
    for probe in open {
        probe.kill().await?;
    }
    eventually("the questions are taken back", async || Ok(polkit.cancelled().len() == 3)).await?;
    fixture.assert_no_leak().await
}

async fn partitions_are_limited(fixture: &mut Fixture) -> Outcome {
    fixture.configure("[limits]\npartitions = 3\n")?;
    fixture.restart_daemon(&[]).await?;
    let image = Image::sparse(&fixture.directory, "image", 4 * MIB)?;
    Gpt::new(&[(2048, 2055), (2056, 2063)]).write(&image)?;
    let arguments = ["--hold", "setup", "regular", image.name()];
    let mut first = fixture.probe_hold(GAMES, arguments)?;
    let attached = first.reply().await?.attached()?;
    let error = fixture.probe(GAMES, &arguments[1..]).await?.refused(ErrorKind::LimitExceeded)?;
    assert!(error.message.contains("has 2 partitions") && error.message.contains("may have 3"), "{error}");
    eventually("only the first one is there", async || {
        Ok(sysfs::bound_by_tests(&fixture.directory) == [attached.device])
    })
    .await?;
    let mut other = fixture.probe_hold(WWW_DATA, arguments)?;
    other.reply().await?.attached()?;
    let roots = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    fixture.detach(&roots).await?;
    for probe in [first, other] {
        probe.close().await?;
    }
    fixture.assert_no_leak().await
}

/// Counts the messages on the bus from the start of a client that attaches an image to the end of its attachment, by
/// member; `reply` for replies.
async fn traffic(fixture: &Fixture, partitions: usize) -> anyhow::Result<BTreeMap<String, usize>> {
    let image = Image::sparse(&fixture.directory, format!("image-{partitions}"), 4 * MIB)?;
    if partitions > 0 {
        let entries: Vec<_> =
            (0..partitions as u64).map(|entry| (2048 + 8 * entry, 2055 + 8 * entry)).collect();
        Gpt::new(&entries).write(&image)?;
    }
    let monitor = fixture.connect().await?;
    MonitoringProxy::new(&monitor).await?.become_monitor(&[], 0).await?;
    let mut messages = MessageStream::from(&monitor);
    let arguments = ["setup", "regular", image.name()];
    let attached = fixture.probe(WWW_DATA, arguments).await?.attached()?;
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

/// Each partition sends one signal when it is added and one when it is removed.
async fn attach_sends_two_signals_per_partition(fixture: &mut Fixture) -> Outcome {
    fixture.configure("[times]\nidle-exit = 0\n")?;
    fixture.restart_daemon(&[]).await?;
    // The first call of a uid may cost more.
    traffic(fixture, 1).await?;
    for partitions in [0, 2, 128] {
        let mut counts = traffic(fixture, partitions).await?;
        println!("{partitions} partitions: {counts:?}");
        for member in ["InterfacesAdded", "InterfacesRemoved"] {
            assert_eq!(counts.remove(member), Some(1 + partitions), "{member}");
        }
        assert_eq!(counts.get("SetupLoop"), Some(&1));
        assert_eq!(counts.get("CheckAuthorization"), Some(&1));
        // Not counted: the connections of client and monitor.
        for member in ["Hello", "NameAcquired", "NameLost", "NameOwnerChanged"] {
            counts.remove(member);
        }
        let others: usize = counts.values().sum();
        assert!(others <= 10, "{others} other messages with {partitions} partitions: {counts:?}");
    }
    fixture.assert_no_leak().await
}
