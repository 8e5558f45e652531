//! The command line, as a user meets it.

use std::process::Output;

use anyhow::{Context as _, Result, ensure};
use loopd_dbus::AttachmentProperties;
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::{alive, eventually, output, pid};
use loopd_tests::sysfs::{self, LoopDevice};
use loopd_tests::world::World;
use loopd_tests::{GAMES, NOBODY, Outcome, WWW_DATA};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader};

loopd_tests::tests! {
    "loopctl";
    Setup::None => [
        attach_prints_the_device,
        attach_options,
        attach_sizes,
        detach_by_every_name,
        detach_many_and_all,
        detach_busy,
        detach_lazy,
        list_table,
        list_columns,
        list_all,
        list_json,
        info,
        info_json,
        run_command,
        run_status,
        run_that_cannot_start,
        run_killed,
        monitor,
        monitor_json,
        completion,
        version_and_help,
        wrong_arguments,
        file_not_there,
        not_attached,
        daemon_not_running,
        no_color_on_pipes,
    ];
    Setup::StandIn(Answer::Yes) => [as_a_user, file_without_permission];
    Setup::StandIn(Answer::No) => [denied];
    Setup::StandIn(Answer::Prompt) => [no_ask_password];
}

const UUID: &str = "11111111-2222-3333-4444-00000000000f";

/// What a command printed; it must have worked and said nothing on the side.
fn printed(output: &Output) -> Result<String> {
    ensure!(output.status.success(), "{output:?}");
    ensure!(output.stderr.is_empty(), "{output:?}");
    Ok(String::from_utf8(output.stdout.clone())?)
}

/// What a failed command said; nothing of it on standard output.
fn complaint(output: &Output, status: i32) -> Result<String> {
    ensure!(output.status.code() == Some(status), "{output:?}");
    ensure!(output.stdout.is_empty(), "{output:?}");
    ensure!(!output.stderr.is_empty(), "{output:?}");
    Ok(String::from_utf8(output.stderr.clone())?)
}

async fn loopctl(world: &World, words: &[&str]) -> Result<String> {
    printed(&world.loopctl(words).await?)
}

async fn attach(world: &World, words: &[&str]) -> Result<LoopDevice> {
    let node = loopctl(world, &[&["attach"], words].concat()).await?;
    ensure!(node.ends_with('\n') && node.lines().count() == 1, "{node:?}");
    LoopDevice::from_node(node.trim_end())
}

async fn detach(world: &World, device: LoopDevice) -> Outcome {
    let nothing = loopctl(world, &["detach", &device.node()]).await?;
    ensure!(nothing.is_empty(), "{nothing:?}");
    ensure!(!device.bound(), "still bound");
    Ok(())
}

async fn properties(world: &World, device: LoopDevice) -> Result<AttachmentProperties> {
    let object = world.object_of(device).await?.context("no object")?;
    world.properties(&object).await
}

async fn image(world: &World) -> Result<(Image, String)> {
    let image = Image::ext4(&world.folder, "image", "data", UUID).await?;
    let path = image.path.to_str().unwrap().to_owned();
    Ok((image, path))
}

async fn attach_prints_the_device(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    let device = attach(world, &[&path]).await?;
    assert_eq!(device.backing_file().unwrap(), path.as_bytes());
    assert_eq!(properties(world, device).await?.lifetime, "persistent");
    detach(world, device).await
}

async fn attach_options(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    let free = sysfs::last_free()?;
    let words = [
        "-r",
        "-o",
        "4K",
        "--size-limit",
        "1M",
        "-b",
        "1024",
        "--no-partitions",
        "--lifetime",
        "persistent",
        "--reference",
        "mine",
        "--device",
        &free.node(),
        "--overlap",
        "allow",
        "--no-wait",
        &path,
    ];
    let device = attach(world, &words).await?;
    assert_eq!(device, free);
    let found = properties(world, device).await?;
    assert!(found.read_only && !found.partition_scan);
    assert_eq!((found.offset, found.size_limit, found.block_size), (4096, MIB, 1024));
    assert_eq!((found.lifetime.as_str(), found.reference.as_str()), ("persistent", "mine"));
    detach(world, device).await
}

async fn attach_sizes(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    for (size, bytes) in [("1024", 1024), ("1K", 1024), ("1M", MIB), ("512KB", 512_000), ("1MB", 1_000_000)] {
        let device = attach(world, &["--size-limit", size, "--no-wait", &path]).await?;
        assert_eq!(properties(world, device).await?.size_limit, bytes, "{size}");
        detach(world, device).await?;
    }
    for size in ["", "M", "1X", "-1", "1.5M", "99999999999999999999", "18446744073709551615K"] {
        complaint(&world.loopctl(["attach", "--size-limit", size, &path]).await?, 2).context(size)?;
    }
    Ok(())
}

async fn detach_by_every_name(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    for by in [0, 1, 2] {
        let device = attach(world, &[&path]).await?;
        let node = device.node();
        let name = [node.as_str(), node.trim_start_matches("/dev/"), &path][by];
        assert_eq!(loopctl(world, &["detach", name]).await?, "");
        assert!(!device.bound(), "{name}");
    }
    Ok(())
}

async fn detach_many_and_all(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    let first = attach(world, &[&path]).await?;
    let second = attach(world, &[&path]).await?;
    loopctl(world, &["detach", &first.node(), &second.node()]).await?;
    assert!(!first.bound() && !second.bound());

    let first = attach(world, &[&path]).await?;
    let second = attach(world, &[&path]).await?;
    loopctl(world, &["detach", "--all"]).await?;
    assert!(!first.bound() && !second.bound());
    // Nothing to do is done.
    loopctl(world, &["detach", "--all"]).await?;
    Ok(())
}

async fn detach_busy(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    let busy = attach(world, &[&path]).await?;
    let idle = attach(world, &[&path]).await?;
    let mounted = Mounted::new(busy, &world.folder, "mount point").await?;
    // One that fails does not keep the others.
    let output = world.loopctl(["detach", &busy.node(), &idle.node()]).await?;
    let said = complaint(&output, 1)?;
    assert!(said.contains(mounted.folder.to_str().unwrap()), "{said}");
    assert!(busy.bound() && !idle.bound());
    mounted.unmount().await?;
    detach(world, busy).await
}

async fn detach_lazy(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    let device = attach(world, &[&path]).await?;
    let opener = std::fs::File::open(device.node())?;
    loopctl(world, &["detach", "--lazy", &device.node()]).await?;
    drop(opener);
    eventually("it is gone", async || Ok(!device.bound())).await
}

async fn list_table(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    let empty = loopctl(world, &["list", "--no-legend"]).await?;
    assert_eq!(empty, "");
    let device = attach(world, &[&path]).await?;
    let mounted = Mounted::new(device, &world.folder, "mount").await?;
    eventually("the list has all of it", async || {
        let table = loopctl(world, &["list"]).await?;
        let line = table.lines().find(|line| line.contains(&device.node())).unwrap_or_default();
        Ok([path.as_str(), "ext4", mounted.folder.to_str().unwrap()].iter().all(|word| line.contains(word)))
    })
    .await?;
    let with_legend = loopctl(world, &["list"]).await?.lines().count();
    assert_eq!(loopctl(world, &["list", "--no-legend"]).await?.lines().count() + 1, with_legend);
    mounted.unmount().await?;
    detach(world, device).await
}

async fn list_columns(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    let device = attach(world, &[&path]).await?;
    let shown = loopctl(world, &["list", "-o", "device", "--no-legend"]).await?;
    assert_eq!(shown.trim(), device.node());
    complaint(&world.loopctl(["list", "-o", "nonsense"]).await?, 2)?;
    detach(world, device).await
}

async fn list_all(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    let node = loopd_tests::process::run("losetup", ["-f", "--show", &path]).await?;
    let device = LoopDevice::from_node(node.trim())?;
    assert!(!loopctl(world, &["list"]).await?.contains(&path));
    eventually("the foreign one is listed", async || {
        Ok(loopctl(world, &["list", "--all"]).await?.contains(&path))
    })
    .await?;
    let listed: Value = serde_json::from_str(&loopctl(world, &["list", "--all", "--json"]).await?)?;
    let entry = listed.as_array().unwrap().iter().find(|entry| entry["device"] == device.node().as_str());
    let entry = entry.context("not listed")?;
    assert_shape(entry);
    assert!(entry["owner"].is_null() && entry["lifetime"].is_null() && entry["managed"] == false, "{entry}");
    detach(world, device).await
}

/// The keys of the contract's example with the types of their values; `?` may be null.
const SHAPE: &[(&str, &str)] = &[
    ("device", "string"),
    ("number", "number"),
    ("disk_sequence", "number"),
    ("backing_file", "string"),
    ("offset", "number"),
    ("size_limit", "number"),
    ("size", "number"),
    ("read_only", "bool"),
    ("direct_io", "bool"),
    ("block_size", "number"),
    ("partition_scan", "bool"),
    ("autoclear", "bool"),
    ("reference", "string?"),
    ("lifetime", "string?"),
    ("managed", "bool"),
    ("owner", "number?"),
    ("state", "string"),
    ("filesystem", "object?"),
    ("mount_points", "array"),
    ("partitions", "array"),
];

fn assert_shape(entry: &Value) {
    let object = entry.as_object().unwrap();
    let mut keys: Vec<&str> = object.keys().map(String::as_str).collect();
    let mut expected: Vec<&str> = SHAPE.iter().map(|(key, _)| *key).collect();
    keys.sort_unstable();
    expected.sort_unstable();
    assert_eq!(keys, expected);
    for (key, kind) in SHAPE {
        let found = match &object[*key] {
            Value::Null => "null",
            Value::Bool(_) => "bool",
            Value::Number(_) => "number",
            Value::String(_) => "string",
            Value::Array(_) => "array",
            Value::Object(_) => "object",
        };
        let fits = kind.trim_end_matches('?') == found || (kind.ends_with('?') && found == "null");
        assert!(fits, "{key} is a {found}, not a {kind}: {entry}");
    }
}

/// What is always so for the test's image, attached and not mounted.
fn assert_describes(entry: &Value, device: LoopDevice, path: &str) {
    assert_shape(entry);
    assert_eq!(entry["device"], device.node().as_str());
    assert_eq!(entry["number"], device.0);
    assert_eq!(entry["backing_file"], path);
    assert_eq!(entry["size"], 16 * MIB);
    assert_eq!(entry["lifetime"], "persistent");
    assert_eq!(entry["owner"], 0);
    assert_eq!(entry["state"], "attached");
    assert!(entry["reference"].is_null(), "{entry}");
    let filesystem = &entry["filesystem"];
    assert_eq!(filesystem["type"], "ext4");
    assert_eq!(filesystem["version"], "1.0");
    assert_eq!(filesystem["label"], "data");
    assert_eq!(filesystem["uuid"], UUID);
    assert_eq!(entry["mount_points"], Value::Array(Vec::new()));
}

async fn list_json(world: &mut World) -> Outcome {
    let nothing: Value = serde_json::from_str(&loopctl(world, &["list", "--json"]).await?)?;
    assert_eq!(nothing, Value::Array(Vec::new()));
    let (_image, path) = image(world).await?;
    let device = attach(world, &[&path]).await?;
    let listed: Value = serde_json::from_str(&loopctl(world, &["list", "--json"]).await?)?;
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_describes(&listed[0], device, &path);
    detach(world, device).await
}

async fn info(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    let device = attach(world, &[&path]).await?;
    for target in [&device.node(), &path] {
        let shown = loopctl(world, &["info", target]).await?;
        for word in [device.node().as_str(), &path, "ext4", "data", UUID, "persistent"] {
            assert!(shown.contains(word), "no {word} in {shown}");
        }
    }
    detach(world, device).await
}

async fn info_json(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    let attached: Value = serde_json::from_str(&loopctl(world, &["attach", "--json", &path]).await?)?;
    let device = LoopDevice::from_node(attached["device"].as_str().unwrap())?;
    assert_describes(&attached, device, &path);
    let shown: Value = serde_json::from_str(&loopctl(world, &["info", "--json", &path]).await?)?;
    assert_describes(&shown, device, &path);
    detach(world, device).await
}

async fn run_command(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    let script = "test -b \"$1\" && test \"$1\" = \"$LOOPCTL_DEVICE\" && cat /sys/block/${1#/dev/}/loop/autoclear; echo \"$1\"";
    let shown = loopctl(world, &["run", &path, "-r", "--", "sh", "-c", script, "sh", "{}"]).await?;
    let (autoclear, node) = shown.trim_end().split_once('\n').context(shown.clone())?;
    assert_eq!(autoclear, "1");
    let device = LoopDevice::from_node(node)?;
    eventually("the device is gone", async || Ok(!device.bound())).await
}

async fn run_status(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    for status in [0, 1, 2, 7, 255] {
        let output = world.loopctl(["run", &path, "--", "sh", "-c", &format!("exit {status}")]).await?;
        assert_eq!(output.status.code(), Some(status), "{output:?}");
    }
    world.assert_no_leak().await
}

async fn run_that_cannot_start(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    let output = world.loopctl(["run", &path, "--", "/nonexistent/program"]).await?;
    assert!(!output.status.success() && !output.stderr.is_empty(), "{output:?}");
    world.assert_no_leak().await
}

async fn run_killed(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    let mut command = world.tool(loopd_tests::ROOT, "loopctl")?;
    // The command does not even open the device: it is there because the command lives.
    command.args(["run", &path, "--", "sh", "-c", "echo $$ $LOOPCTL_DEVICE > started; exec sleep 600"]);
    let mut client = tokio::process::Command::from(command).kill_on_drop(true).spawn()?;
    let started = world.folder.join("started");
    let mut said = String::new();
    eventually("the command runs", async || {
        said = std::fs::read_to_string(&started).unwrap_or_default();
        Ok(said.ends_with('\n'))
    })
    .await?;
    let (process, node) = said.trim_end().split_once(' ').context(said.clone())?;
    let (process, device) = (pid(process.parse()?), LoopDevice::from_node(node)?);

    client.kill().await?;
    // A client that comes and goes after it: by then the bus and the daemon have seen the first go.
    let other = Image::sparse(&world.folder, "other", MIB)?;
    let reply = world.probe(loopd_tests::ROOT, ["setup", "regular", other.path.to_str().unwrap()]).await?;
    world.gone(&reply.attached()?).await?;
    assert!(alive(process) && device.bound());

    nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGKILL)?;
    eventually("the device goes with the command", async || Ok(!device.bound())).await
}

/// The lines that a monitor prints while a file is attached and detached until it has printed some.
async fn monitored(world: &World, words: &[&str]) -> Result<Vec<String>> {
    let (_image, path) = image(world).await?;
    let mut command = world.tool(loopd_tests::ROOT, "loopctl")?;
    command.arg("monitor").args(words).stdout(std::process::Stdio::piped());
    let mut monitor = tokio::process::Command::from(command).kill_on_drop(true).spawn()?;
    let mut lines = BufReader::new(monitor.stdout.take().context("no pipe")?).lines();
    let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
    let reader = tokio::spawn(async move {
        while let Ok(Some(line)) = lines.next_line().await {
            let _ = sender.send(line);
        }
    });
    let mut seen = Vec::new();
    eventually("the monitor has seen a device come and go", async || {
        let device = attach(world, &[&path]).await?;
        detach(world, device).await?;
        while let Ok(line) = receiver.try_recv() {
            seen.push(line);
        }
        Ok(seen.len() >= 2)
    })
    .await?;
    // Interrupted as from a terminal: that is how it is meant to end.
    let process = pid(monitor.id().context("it ended")?);
    nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGINT)?;
    let status = tokio::time::timeout(loopd_tests::process::PATIENCE, monitor.wait()).await??;
    use std::os::unix::process::ExitStatusExt as _;
    ensure!(status.success() || status.signal() == Some(2) || status.code() == Some(130), "{status}");
    reader.await?;
    Ok(seen)
}

async fn monitor(world: &mut World) -> Outcome {
    let lines = monitored(world, &[]).await?;
    assert!(lines.iter().all(|line| line.contains("/dev/loop")), "{lines:?}");
    Ok(())
}

async fn monitor_json(world: &mut World) -> Outcome {
    for line in monitored(world, &["--json"]).await? {
        let event: Value = serde_json::from_str(&line).with_context(|| line.clone())?;
        assert!(event.is_object(), "{line}");
    }
    Ok(())
}

async fn completion(world: &mut World) -> Outcome {
    for (shell, checker) in [("bash", &["-n"][..]), ("zsh", &["-n"]), ("fish", &["--no-execute"])] {
        let script = loopctl(world, &["completion", shell]).await?;
        assert!(script.contains("attach"), "{shell}");
        if !loopd_tests::process::installed(shell) {
            continue;
        }
        let file = world.folder.join(format!("completion.{shell}"));
        std::fs::write(&file, script)?;
        let mut command = world.command(shell);
        command.args(checker).arg(file);
        printed(&output(command).await?)?;
    }
    complaint(&world.loopctl(["completion", "tclsh"]).await?, 2)?;
    Ok(())
}

async fn version_and_help(world: &mut World) -> Outcome {
    assert!(loopctl(world, &["--version"]).await?.contains(env!("CARGO_PKG_VERSION")));
    assert!(loopctl(world, &["--help"]).await?.contains("attach"));
    for verb in ["attach", "detach", "list", "info", "run", "monitor", "completion"] {
        assert!(loopctl(world, &[verb, "--help"]).await?.contains(verb));
    }
    Ok(())
}

async fn wrong_arguments(world: &mut World) -> Outcome {
    let words: &[&[&str]] = &[
        &[],
        &["nonsense"],
        &["attach"],
        &["attach", "a", "b"],
        &["attach", "--nonsense", "a"],
        &["attach", "--lifetime", "forever", "a"],
        &["attach", "--overlap", "perhaps", "a"],
        &["attach", "-o", "twelve", "a"],
        &["detach"],
        &["detach", "--all", "/dev/loop0"],
        &["info"],
        &["run"],
        &["run", "a"],
    ];
    for words in words {
        complaint(&world.loopctl(*words).await?, 2).with_context(|| format!("{words:?}"))?;
    }
    Ok(())
}

async fn file_not_there(world: &mut World) -> Outcome {
    let said = complaint(&world.loopctl(["attach", "no-such-file"]).await?, 1)?;
    assert!(said.contains("no-such-file"), "{said}");
    assert!(said.contains("No such file"), "{said}");
    Ok(())
}

async fn not_attached(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    let free = sysfs::last_free()?.node();
    for verb in ["detach", "info"] {
        for target in [&free, &path] {
            let said = complaint(&world.loopctl([verb, target]).await?, 1)?;
            assert!(said.contains(target.as_str()), "{said}");
        }
    }
    Ok(())
}

async fn daemon_not_running(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    let mut daemon = world.take_daemon().context("no daemon")?;
    daemon.terminate().await?;
    for words in [&["list"][..], &["attach", &path], &["info", &path], &["run", &path, "--", "true"]] {
        let said = complaint(&world.loopctl(words).await?, 1).with_context(|| format!("{words:?}"))?;
        assert!(said.contains("systemctl start loopd"), "{said}");
    }
    Ok(())
}

async fn no_color_on_pipes(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    let device = attach(world, &[&path]).await?;
    for words in [&["list"][..], &["info", &path], &["--no-color", "list"], &["--help"]] {
        let shown = loopctl(world, words).await?;
        assert!(!shown.contains('\x1b'), "{words:?}: {shown:?}");
    }
    detach(world, device).await
}

async fn as_a_user(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    let node = printed(&world.loopctl_as(GAMES, ["attach", &path]).await?)?;
    let device = LoopDevice::from_node(node.trim_end())?;
    let listed: Value =
        serde_json::from_str(&printed(&world.loopctl_as(WWW_DATA, ["list", "--json"]).await?)?)?;
    assert_eq!(listed[0]["owner"], GAMES.uid);
    let checks = world.stand_in()?.checks();
    assert!(checks.iter().all(|check| check.interactive), "loopctl lets polkit ask: {checks:?}");
    printed(&world.loopctl_as(GAMES, ["detach", node.trim_end()]).await?)?;
    assert!(!device.bound());
    Ok(())
}

async fn file_without_permission(world: &mut World) -> Outcome {
    let (image, path) = image(world).await?;
    image.chmod(0o600)?;
    let said = complaint(&world.loopctl_as(NOBODY, ["attach", &path]).await?, 1)?;
    assert!(said.contains(&path) && said.contains("Permission denied"), "{said}");
    // What may only be read gives a read-only device.
    image.chmod(0o644)?;
    let output = world.loopctl_as(NOBODY, ["attach", &path]).await?;
    assert!(output.status.success(), "{output:?}");
    let device = LoopDevice::from_node(String::from_utf8(output.stdout)?.trim_end())?;
    assert!(device.flag("ro")?);
    detach(world, device).await
}

async fn denied(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    complaint(&world.loopctl_as(GAMES, ["attach", &path]).await?, 1)?;
    assert!(sysfs::bound_by_tests(&world.folder).is_empty());
    Ok(())
}

async fn no_ask_password(world: &mut World) -> Outcome {
    let (_image, path) = image(world).await?;
    complaint(&world.loopctl_as(GAMES, ["--no-ask-password", "attach", &path]).await?, 1)?;
    let checks = world.stand_in()?.checks();
    assert!(checks.iter().all(|check| !check.interactive), "{checks:?}");
    let node = printed(&world.loopctl_as(GAMES, ["attach", &path]).await?)?;
    detach(world, LoopDevice::from_node(node.trim_end())?).await
}
