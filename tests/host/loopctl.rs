//! The command line.

use std::process::Output;

use anyhow::{Context as _, Result, ensure};
use loopd_dbus::AttachmentProperties;
use loopd_tests::fixture::Fixture;
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::losetup;
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::{alive, eventually, output, pid};
use loopd_tests::strace::count_of;
use loopd_tests::sysfs::{self, LoopDevice};
use loopd_tests::{GAMES, NOBODY, Outcome, ROOT, WWW_DATA};
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, BufReader};

loopd_tests::tests! {
    "loopctl";
    Setup::None => [
        attach_prints_the_device,
        attach_options_are_applied,
        attach_accepts_size_suffixes,
        detach_accepts_node_name_and_file,
        detach_accepts_several_targets_and_all,
        detach_of_a_busy_device_fails,
        detach_lazy_waits_for_the_last_close,
        list_prints_a_table,
        list_prints_the_chosen_columns,
        list_all_includes_foreign_devices,
        list_json_matches_the_contract,
        info_prints_all_properties,
        info_json_matches_the_contract,
        run_attaches_for_the_command,
        run_returns_the_status_of_the_command,
        run_reports_a_command_that_cannot_start,
        device_stays_for_the_command_if_run_is_killed,
        monitor_prints_events,
        monitor_json_prints_objects,
        completion_scripts_are_valid,
        version_and_help_are_printed,
        invalid_arguments_are_usage_errors,
        missing_file_is_reported,
        target_that_is_not_attached_is_reported,
        missing_daemon_is_reported,
        pipes_get_no_colors,
        attach_and_detach_make_few_system_calls,
    ];
    Setup::StandIn(Answer::Yes) => [authorized_user_attaches_and_detaches, unreadable_file_is_reported];
    Setup::StandIn(Answer::No) => [denial_is_reported];
    Setup::StandIn(Answer::Prompt) => [no_ask_password_prevents_the_prompt];
}

/// The system calls of a command on the bus's socket: a quarter above what was counted when the limit was set.
const MOST_RECEIVED: usize = 27;

const UUID: &str = "11111111-2222-3333-4444-00000000000f";

/// The output of a command, which must have succeeded without a message.
fn printed(output: &Output) -> Result<String> {
    ensure!(output.status.success(), "{output:?}");
    ensure!(output.stderr.is_empty(), "{output:?}");
    Ok(String::from_utf8(output.stdout.clone())?)
}

/// The message of a failed command; standard output must be empty.
fn complaint(output: &Output, status: i32) -> Result<String> {
    ensure!(output.status.code() == Some(status), "{output:?}");
    ensure!(output.stdout.is_empty(), "{output:?}");
    ensure!(!output.stderr.is_empty(), "{output:?}");
    Ok(String::from_utf8(output.stderr.clone())?)
}

async fn loopctl(fixture: &Fixture, arguments: &[&str]) -> Result<String> {
    printed(&fixture.loopctl(arguments).await?)
}

async fn attach(fixture: &Fixture, arguments: &[&str]) -> Result<LoopDevice> {
    let node = loopctl(fixture, &[&["attach"], arguments].concat()).await?;
    ensure!(node.ends_with('\n') && node.lines().count() == 1, "{node:?}");
    LoopDevice::from_node(node.trim_end())
}

async fn detach(fixture: &Fixture, device: LoopDevice) -> Outcome {
    let nothing = loopctl(fixture, &["detach", &device.node()]).await?;
    ensure!(nothing.is_empty(), "{nothing:?}");
    ensure!(!device.bound(), "still bound");
    Ok(())
}

async fn properties(fixture: &Fixture, device: LoopDevice) -> Result<AttachmentProperties> {
    let object = fixture.object_of(device).await?.context("no object")?;
    fixture.properties(&object).await
}

async fn image(fixture: &Fixture) -> Result<(Image, String)> {
    let image = Image::ext4(&fixture.directory, "image", "data", UUID).await?;
    let path = image.name().to_owned();
    Ok((image, path))
}

async fn attach_prints_the_device(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    let device = attach(fixture, &[&path]).await?;
    assert_eq!(device.backing_file().unwrap(), path.as_bytes());
    assert_eq!(properties(fixture, device).await?.lifetime, "persistent");
    detach(fixture, device).await
}

/// Counted and not timed: one connection, no thread and no process; the handshake, the call, and for an attach its warnings.
async fn attach_and_detach_make_few_system_calls(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    let run = async |arguments: &[&str]| {
        let mut command = fixture.tool(ROOT, "loopctl")?;
        command.args(arguments);
        let (printed, calls) = count_of(&command, &fixture.directory).await?;
        let count = |name: &str| calls.get(name).copied().unwrap_or_default();
        ensure!(count("connect") == 1 && count("recvfrom") <= MOST_RECEIVED, "{arguments:?}: {calls:?}");
        ensure!(["clone", "clone3", "fork", "vfork"].iter().all(|name| count(name) == 0), "{calls:?}");
        Ok((printed, count("sendmsg")))
    };
    let (node, sent) = run(&["attach", &path]).await?;
    ensure!(sent == 3, "{sent}");
    let (_, sent) = run(&["detach", node.trim_end()]).await?;
    ensure!(sent == 2, "{sent}");
    Ok(())
}

async fn attach_options_are_applied(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    let free = sysfs::last_free()?;
    let arguments = [
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
    let device = attach(fixture, &arguments).await?;
    assert_eq!(device, free);
    let found = properties(fixture, device).await?;
    assert!(found.read_only && !found.partition_scan);
    assert_eq!((found.offset, found.size_limit, found.block_size), (4096, MIB, 1024));
    assert_eq!((found.lifetime.as_str(), found.reference.as_str()), ("persistent", "mine"));
    detach(fixture, device).await
}

async fn attach_accepts_size_suffixes(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    for (size, bytes) in [("1024", 1024), ("1K", 1024), ("1M", MIB), ("512KB", 512_000), ("1MB", 1_000_000)] {
        // What the limit leaves out of the file system and of a sector is warned of.
        let output = fixture.loopctl(["attach", "--size-limit", size, "--no-wait", &path]).await?;
        ensure!(output.status.success(), "{output:?}");
        let device = LoopDevice::from_node(std::str::from_utf8(&output.stdout)?.trim_end())?;
        assert_eq!(properties(fixture, device).await?.size_limit, bytes, "{size}");
        detach(fixture, device).await?;
    }
    for size in ["", "M", "1X", "-1", "1.5M", "99999999999999999999", "18446744073709551615K"] {
        complaint(&fixture.loopctl(["attach", "--size-limit", size, &path]).await?, 2).context(size)?;
    }
    Ok(())
}

async fn detach_accepts_node_name_and_file(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    for by in [0, 1, 2] {
        let device = attach(fixture, &[&path]).await?;
        let node = device.node();
        let name = [node.as_str(), node.trim_start_matches("/dev/"), &path][by];
        assert_eq!(loopctl(fixture, &["detach", name]).await?, "");
        assert!(!device.bound(), "{name}");
    }
    Ok(())
}

async fn detach_accepts_several_targets_and_all(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    let first = attach(fixture, &[&path]).await?;
    let second = attach(fixture, &[&path]).await?;
    loopctl(fixture, &["detach", &first.node(), &second.node()]).await?;
    assert!(!first.bound() && !second.bound());

    let first = attach(fixture, &[&path]).await?;
    let second = attach(fixture, &[&path]).await?;
    loopctl(fixture, &["detach", "--all"]).await?;
    assert!(!first.bound() && !second.bound());
    // Without devices it succeeds.
    loopctl(fixture, &["detach", "--all"]).await?;
    Ok(())
}

async fn detach_of_a_busy_device_fails(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    let busy = attach(fixture, &[&path]).await?;
    let idle = attach(fixture, &[&path]).await?;
    let mounted = Mounted::new(busy, &fixture.directory, "mount point").await?;
    // A failure does not stop the others.
    let output = fixture.loopctl(["detach", &busy.node(), &idle.node()]).await?;
    let output = complaint(&output, 1)?;
    assert!(output.contains(mounted.directory.to_str().unwrap()), "{output}");
    assert!(busy.bound() && !idle.bound());
    mounted.unmount().await?;
    detach(fixture, busy).await
}

async fn detach_lazy_waits_for_the_last_close(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    let device = attach(fixture, &[&path]).await?;
    let opener = std::fs::File::open(device.node())?;
    loopctl(fixture, &["detach", "--lazy", &device.node()]).await?;
    drop(opener);
    eventually("it is gone", async || Ok(!device.bound())).await
}

async fn list_prints_a_table(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    let empty = loopctl(fixture, &["list", "--no-legend"]).await?;
    assert_eq!(empty, "");
    let device = attach(fixture, &[&path]).await?;
    let mounted = Mounted::new(device, &fixture.directory, "mount").await?;
    eventually("the list has all of it", async || {
        let table = loopctl(fixture, &["list"]).await?;
        let line = table.lines().find(|line| line.contains(&device.node())).unwrap_or_default();
        Ok([path.as_str(), "ext4", mounted.directory.to_str().unwrap()]
            .iter()
            .all(|word| line.contains(word)))
    })
    .await?;
    let with_legend = loopctl(fixture, &["list"]).await?.lines().count();
    assert_eq!(loopctl(fixture, &["list", "--no-legend"]).await?.lines().count() + 1, with_legend);
    mounted.unmount().await?;
    detach(fixture, device).await
}

async fn list_prints_the_chosen_columns(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    let device = attach(fixture, &[&path]).await?;
    let shown = loopctl(fixture, &["list", "-o", "device", "--no-legend"]).await?;
    assert_eq!(shown.trim(), device.node());
    complaint(&fixture.loopctl(["list", "-o", "nonsense"]).await?, 2)?;
    detach(fixture, device).await
}

async fn list_all_includes_foreign_devices(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    let device = losetup::attach(&[&path]).await?;
    assert!(!loopctl(fixture, &["list"]).await?.contains(&path));
    eventually("the foreign one is listed", async || {
        Ok(loopctl(fixture, &["list", "--all"]).await?.contains(&path))
    })
    .await?;
    let listed: Value = serde_json::from_str(&loopctl(fixture, &["list", "--all", "--json"]).await?)?;
    let entry = listed.as_array().unwrap().iter().find(|entry| entry["device"] == device.node().as_str());
    let entry = entry.context("not listed")?;
    assert_shape(entry);
    assert!(entry["owner"].is_null() && entry["lifetime"].is_null() && entry["managed"] == false, "{entry}");
    detach(fixture, device).await
}

/// The keys of the example in the contract, with the types of their values; `?` may be null.
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
    ("backing_file_state", "string?"),
    ("warnings", "array"),
    ("filesystem", "object?"),
    ("encrypted", "object?"),
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

/// Checks the entry of the test's image, attached and not mounted.
fn assert_describes(entry: &Value, device: LoopDevice, path: &str) {
    assert_shape(entry);
    assert_eq!(entry["device"], device.node().as_str());
    assert_eq!(entry["number"], device.0);
    assert_eq!(entry["backing_file"], path);
    assert_eq!(entry["size"], 16 * MIB);
    assert_eq!(entry["lifetime"], "persistent");
    assert_eq!(entry["owner"], 0);
    assert_eq!(entry["state"], "attached");
    assert_eq!(entry["backing_file_state"], "present");
    assert!(entry["reference"].is_null(), "{entry}");
    let filesystem = &entry["filesystem"];
    assert_eq!(filesystem["type"], "ext4");
    assert_eq!(filesystem["version"], "1.0");
    assert_eq!(filesystem["label"], "data");
    assert_eq!(filesystem["uuid"], UUID);
    assert!(entry["encrypted"].is_null(), "{entry}");
    assert_eq!(entry["mount_points"], Value::Array(Vec::new()));
}

async fn list_json_matches_the_contract(fixture: &mut Fixture) -> Outcome {
    let nothing: Value = serde_json::from_str(&loopctl(fixture, &["list", "--json"]).await?)?;
    assert_eq!(nothing, Value::Array(Vec::new()));
    let (_image, path) = image(fixture).await?;
    let device = attach(fixture, &[&path]).await?;
    let listed: Value = serde_json::from_str(&loopctl(fixture, &["list", "--json"]).await?)?;
    assert_eq!(listed.as_array().unwrap().len(), 1);
    assert_describes(&listed[0], device, &path);
    detach(fixture, device).await
}

async fn info_prints_all_properties(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    let device = attach(fixture, &[&path]).await?;
    for target in [&device.node(), &path] {
        let shown = loopctl(fixture, &["info", target]).await?;
        for word in [device.node().as_str(), &path, "ext4", "data", UUID, "persistent"] {
            assert!(shown.contains(word), "no {word} in {shown}");
        }
    }
    detach(fixture, device).await
}

async fn info_json_matches_the_contract(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    let attached: Value = serde_json::from_str(&loopctl(fixture, &["attach", "--json", &path]).await?)?;
    let device = LoopDevice::from_node(attached["device"].as_str().unwrap())?;
    assert_describes(&attached, device, &path);
    let shown: Value = serde_json::from_str(&loopctl(fixture, &["info", "--json", &path]).await?)?;
    assert_describes(&shown, device, &path);
    detach(fixture, device).await
}

async fn run_attaches_for_the_command(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    let script = "test -b \"$1\" && test \"$1\" = \"$LOOPCTL_DEVICE\" && cat /sys/block/${1#/dev/}/loop/autoclear; echo \"$1\"";
    let shown = loopctl(fixture, &["run", &path, "-r", "--", "sh", "-c", script, "sh", "{}"]).await?;
    let (autoclear, node) = shown.trim_end().split_once('\n').context(shown.clone())?;
    assert_eq!(autoclear, "1");
    let device = LoopDevice::from_node(node)?;
    eventually("the device is gone", async || Ok(!device.bound())).await
}

async fn run_returns_the_status_of_the_command(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    for status in [0, 1, 2, 7, 255] {
        let output = fixture.loopctl(["run", &path, "--", "sh", "-c", &format!("exit {status}")]).await?;
        assert_eq!(output.status.code(), Some(status), "{output:?}");
    }
    fixture.assert_no_leak().await
}

async fn run_reports_a_command_that_cannot_start(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    let output = fixture.loopctl(["run", &path, "--", "/nonexistent/program"]).await?;
    assert!(!output.status.success() && !output.stderr.is_empty(), "{output:?}");
    fixture.assert_no_leak().await
}

async fn device_stays_for_the_command_if_run_is_killed(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    let mut command = fixture.tool(ROOT, "loopctl")?;
    // The command does not open the device: the device stays because the command runs.
    command.args(["run", &path, "--", "sh", "-c", "echo $$ $LOOPCTL_DEVICE > started; exec sleep 600"]);
    let mut client = tokio::process::Command::from(command).kill_on_drop(true).spawn()?;
    let started = fixture.directory.join("started");
    let mut output = String::new();
    eventually("the command runs", async || {
        output = std::fs::read_to_string(&started).unwrap_or_default();
        Ok(output.ends_with('\n'))
    })
    .await?;
    let (process, node) = output.trim_end().split_once(' ').context(output.clone())?;
    let (process, device) = (pid(process.parse()?), LoopDevice::from_node(node)?);

    client.kill().await?;
    // A later client: when its device is gone, the bus and the daemon have noticed the end of the first client.
    let other = Image::sparse(&fixture.directory, "other", MIB)?;
    let reply = fixture.probe(ROOT, ["setup", "regular", other.name()]).await?;
    fixture.gone(&reply.attached()?).await?;
    assert!(alive(process) && device.bound());

    nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGKILL)?;
    eventually("the device goes with the command", async || Ok(!device.bound())).await
}

/// Attaches and detaches a file until a monitor has printed some lines; returns these.
async fn monitored(fixture: &Fixture, arguments: &[&str]) -> Result<Vec<String>> {
    let (_image, path) = image(fixture).await?;
    let mut command = fixture.tool(ROOT, "loopctl")?;
    command.arg("monitor").args(arguments).stdout(std::process::Stdio::piped());
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
        let device = attach(fixture, &[&path]).await?;
        detach(fixture, device).await?;
        while let Ok(line) = receiver.try_recv() {
            seen.push(line);
        }
        Ok(seen.len() >= 2)
    })
    .await?;
    // Interrupted as from a terminal, the usual way to end it.
    let process = pid(monitor.id().context("it ended")?);
    nix::sys::signal::kill(process, nix::sys::signal::Signal::SIGINT)?;
    let status = tokio::time::timeout(loopd_tests::process::PATIENCE, monitor.wait()).await??;
    use std::os::unix::process::ExitStatusExt as _;
    ensure!(status.success() || status.signal() == Some(2) || status.code() == Some(130), "{status}");
    reader.await?;
    Ok(seen)
}

async fn monitor_prints_events(fixture: &mut Fixture) -> Outcome {
    let lines = monitored(fixture, &[]).await?;
    assert!(lines.iter().all(|line| line.contains("/dev/loop")), "{lines:?}");
    Ok(())
}

async fn monitor_json_prints_objects(fixture: &mut Fixture) -> Outcome {
    for line in monitored(fixture, &["--json"]).await? {
        let event: Value = serde_json::from_str(&line).with_context(|| line.clone())?;
        assert!(event.is_object(), "{line}");
    }
    Ok(())
}

async fn completion_scripts_are_valid(fixture: &mut Fixture) -> Outcome {
    for (shell, checker) in [("bash", &["-n"][..]), ("zsh", &["-n"]), ("fish", &["--no-execute"])] {
        let script = loopctl(fixture, &["completion", shell]).await?;
        assert!(script.contains("attach"), "{shell}");
        if !loopd_tests::process::installed(shell) {
            continue;
        }
        let file = fixture.directory.join(format!("completion.{shell}"));
        std::fs::write(&file, script)?;
        let mut command = fixture.command(shell);
        command.args(checker).arg(file);
        printed(&output(command).await?)?;
    }
    complaint(&fixture.loopctl(["completion", "tclsh"]).await?, 2)?;
    Ok(())
}

async fn version_and_help_are_printed(fixture: &mut Fixture) -> Outcome {
    assert!(loopctl(fixture, &["--version"]).await?.contains(env!("CARGO_PKG_VERSION")));
    assert!(loopctl(fixture, &["--help"]).await?.contains("attach"));
    for verb in ["attach", "detach", "list", "info", "run", "monitor", "completion"] {
        assert!(loopctl(fixture, &[verb, "--help"]).await?.contains(verb));
    }
    Ok(())
}

async fn invalid_arguments_are_usage_errors(fixture: &mut Fixture) -> Outcome {
    let arguments: &[&[&str]] = &[
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
    for arguments in arguments {
        complaint(&fixture.loopctl(*arguments).await?, 2).with_context(|| format!("{arguments:?}"))?;
    }
    Ok(())
}

async fn missing_file_is_reported(fixture: &mut Fixture) -> Outcome {
    let output = complaint(&fixture.loopctl(["attach", "no-such-file"]).await?, 1)?;
    assert!(output.contains("no-such-file"), "{output}");
    assert!(output.contains("No such file"), "{output}");
    Ok(())
}

async fn target_that_is_not_attached_is_reported(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    let free = sysfs::last_free()?.node();
    for verb in ["detach", "info"] {
        for target in [&free, &path] {
            let output = complaint(&fixture.loopctl([verb, target]).await?, 1)?;
            assert!(output.contains(target.as_str()), "{output}");
        }
    }
    Ok(())
}

async fn missing_daemon_is_reported(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    let mut daemon = fixture.take_daemon().context("no daemon")?;
    daemon.terminate().await?;
    for arguments in [&["list"][..], &["attach", &path], &["info", &path], &["run", &path, "--", "true"]] {
        let output =
            complaint(&fixture.loopctl(arguments).await?, 1).with_context(|| format!("{arguments:?}"))?;
        assert!(output.contains("systemctl start loopd"), "{output}");
    }
    Ok(())
}

async fn pipes_get_no_colors(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    let device = attach(fixture, &[&path]).await?;
    for arguments in [&["list"][..], &["info", &path], &["--no-color", "list"], &["--help"]] {
        let shown = loopctl(fixture, arguments).await?;
        assert!(!shown.contains('\x1b'), "{arguments:?}: {shown:?}");
    }
    detach(fixture, device).await
}

async fn authorized_user_attaches_and_detaches(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    let node = printed(&fixture.loopctl_as(GAMES, ["attach", &path]).await?)?;
    let device = LoopDevice::from_node(node.trim_end())?;
    let listed: Value =
        serde_json::from_str(&printed(&fixture.loopctl_as(WWW_DATA, ["list", "--json"]).await?)?)?;
    assert_eq!(listed[0]["owner"], GAMES.uid);
    let checks = fixture.stand_in()?.checks();
    assert!(checks.iter().all(|check| !check.interactive), "who is authorized is not asked: {checks:?}");
    printed(&fixture.loopctl_as(GAMES, ["detach", node.trim_end()]).await?)?;
    assert!(!device.bound());
    Ok(())
}

async fn unreadable_file_is_reported(fixture: &mut Fixture) -> Outcome {
    let (image, path) = image(fixture).await?;
    image.chmod(0o600)?;
    let output = complaint(&fixture.loopctl_as(NOBODY, ["attach", &path]).await?, 1)?;
    assert!(output.contains(&path) && output.contains("Permission denied"), "{output}");
    // A file without write permission gives a read-only device.
    image.chmod(0o644)?;
    let output = fixture.loopctl_as(NOBODY, ["attach", &path]).await?;
    assert!(output.status.success(), "{output:?}");
    let device = LoopDevice::from_node(String::from_utf8(output.stdout)?.trim_end())?;
    assert!(device.flag("ro")?);
    detach(fixture, device).await
}

async fn denial_is_reported(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    complaint(&fixture.loopctl_as(GAMES, ["attach", &path]).await?, 1)?;
    assert!(sysfs::bound_by_tests(&fixture.directory).is_empty());
    Ok(())
}

async fn no_ask_password_prevents_the_prompt(fixture: &mut Fixture) -> Outcome {
    let (_image, path) = image(fixture).await?;
    complaint(&fixture.loopctl_as(GAMES, ["--no-ask-password", "attach", &path]).await?, 1)?;
    let checks = fixture.stand_in()?.checks();
    assert!(checks.iter().all(|check| !check.interactive), "{checks:?}");
    let node = printed(&fixture.loopctl_as(GAMES, ["attach", &path]).await?)?;
    detach(fixture, LoopDevice::from_node(node.trim_end())?).await
}
