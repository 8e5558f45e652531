//! `Busy` names what holds a device, as far as loopd and the caller may know.

use std::ffi::OsStr;
use std::fs::File;
use std::io::{BufRead as _, BufReader};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::symlink;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};

use anyhow::{Result, ensure};
use loopd_dbus::{AttachOptions, ErrorKind, Lifetime};
use loopd_tests::fixture::{Attached, Fixture, expect_kind};
use loopd_tests::image::{Image, MIB, Mounted};
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::{Process, eventually, needs, output, run, tied};
use loopd_tests::sysfs::LoopDevice;
use loopd_tests::table::Gpt;
use loopd_tests::{GAMES, Outcome, ROOT, User, skip};

loopd_tests::tests! {
    "holders";
    Setup::None => [
        process_is_named_to_root,
        process_with_a_partition_open_is_named,
        name_of_a_process_is_escaped,
        descriptors_of_loopd_are_not_listed,
        descriptor_that_is_only_a_path_is_not_listed,
        other_commands_name_the_process,
        loop_device_on_the_device_or_a_partition_is_named,
        swap_is_named,
        swap_is_named_without_proc_swaps,
        mount_in_another_namespace_is_named,
        process_on_a_lazily_unmounted_file_system_is_named,
        nothing_visible_is_said,
    ];
    Setup::StandIn(Answer::Yes) => [
        process_is_named_to_its_owner,
        process_of_another_user_is_not_visible,
        mount_in_another_namespace_is_named_to_a_user,
    ];
}

const UUID: &str = "11111111-2222-3333-4444-0000000000e7";
/// The first and last sectors of two partitions, for an image of 32 MiB.
const TWO: &[(u64, u64)] = &[(2048, 20479), (20480, 61439)];

fn persistent() -> AttachOptions {
    AttachOptions { lifetime: Lifetime::Persistent, ..AttachOptions::default() }
}

/// Attaches an image with two partitions.
async fn partitioned(fixture: &Fixture) -> Result<Attached> {
    let image = Image::sparse(&fixture.directory, "image", 32 * MIB)?;
    Gpt::new(TWO).write(&image)?;
    fixture.attach(&image.open()?, &persistent()).await
}

/// A process of this user that has the node open.
fn opener(node: &str, program: impl AsRef<OsStr>, user: User) -> Result<Process> {
    let mut command = Command::new(program);
    command.arg("60").stdin(File::open(node)?).uid(user.uid).gid(user.gid);
    Process::spawn("opener", &mut command)
}

/// The messages of a command that fails.
async fn complaint(fixture: &Fixture, user: User, arguments: &[&str]) -> Result<String> {
    let output = fixture.loopctl_as(user, arguments).await?;
    ensure!(output.status.code() == Some(1) && output.stdout.is_empty(), "{output:?}");
    Ok(String::from_utf8(output.stderr)?)
}

/// The lines below loopd's message after a detach of a device in use. The device stays.
async fn holders(fixture: &Fixture, user: User, device: LoopDevice) -> Result<Vec<String>> {
    let text = complaint(fixture, user, &["detach", &device.node()]).await?;
    assert!(text.starts_with(&format!("loopctl: cannot detach {} (", device.node())), "{text}");
    assert!(device.bound());
    // udev looks at the device after the attempt, and may take its time on a busy machine.
    let others = text.lines().skip(1).filter(|line| !line.contains(" is open in (udev-worker) "));
    Ok(others.map(|line| line.trim_start_matches("loopctl: ").to_owned()).collect())
}

/// The message of a `Busy` of loopd.
async fn busy(fixture: &Fixture, device: LoopDevice) -> Result<String> {
    let error = fixture.detach_fails(device).await?;
    expect_kind(&error, ErrorKind::Busy)?;
    Ok(error.message)
}

async fn process_is_named_to_root(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let node = attached.device.node();
    let processes = [opener(&node, "sleep", ROOT)?, opener(&node, "sleep", GAMES)?];
    let mut expected = processes
        .each_ref()
        .map(|one| (one.pid(), format!("{node} is open in sleep (process {})", one.pid())));
    expected.sort();
    assert_eq!(holders(fixture, ROOT, attached.device).await?, expected.map(|(_, line)| line));
    drop(processes);
    fixture.detach(&attached).await
}

async fn process_is_named_to_its_owner(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let node = attached.device.node();
    let processes = [opener(&node, "sleep", ROOT)?, opener(&node, "sleep", GAMES)?];
    let expected = format!("{node} is open in sleep (process {})", processes[1].pid());
    assert_eq!(holders(fixture, GAMES, attached.device).await?, [expected]);
    drop(processes);
    fixture.detach(&attached).await
}

async fn process_of_another_user_is_not_visible(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let node = attached.device.node();
    let process = opener(&node, "sleep", ROOT)?;
    let expected = format!(
        "{node} is open in a process that is not visible to you, probably one of another user; run this as root to see \
         which"
    );
    assert_eq!(holders(fixture, GAMES, attached.device).await?, [expected]);
    drop(process);
    // loopd names the users of a mounted device, so that none is missing.
    run("mkfs.ext4", ["-q", &node]).await?;
    let mounted = Mounted::new(attached.device, &fixture.directory, "mount").await?;
    assert!(holders(fixture, GAMES, attached.device).await?.is_empty());
    mounted.unmount().await?;
    fixture.detach(&attached).await
}

async fn process_with_a_partition_open_is_named(fixture: &mut Fixture) -> Outcome {
    let attached = partitioned(fixture).await?;
    let node = attached.device.partition_node(2);
    let process = opener(&node, "sleep", ROOT)?;
    let expected = format!("{node} is open in sleep (process {})", process.pid());
    assert_eq!(holders(fixture, ROOT, attached.device).await?, [expected]);
    drop(process);
    fixture.detach(&attached).await
}

async fn name_of_a_process_is_escaped(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let program = fixture.directory.join(OsStr::from_bytes(b"a\n\x1b[31m\xff"));
    symlink("/bin/sleep", &program)?;
    let process = opener(&attached.device.node(), &program, ROOT)?;
    let expected = format!(
        "{} is open in a\\n\\u{{1b}}[31m\u{fffd} (process {})",
        attached.device.node(),
        process.pid()
    );
    assert_eq!(holders(fixture, ROOT, attached.device).await?, [expected]);
    drop(process);
    fixture.detach(&attached).await
}

/// loopd has taken its hold again by the time that loopctl looks.
async fn descriptors_of_loopd_are_not_listed(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &AttachOptions::default()).await?;
    assert!(fixture.properties(&attached.path).await?.autoclear);
    let node = attached.device.node();
    let process = opener(&node, "sleep", ROOT)?;
    let expected = format!("{node} is open in sleep (process {})", process.pid());
    assert_eq!(holders(fixture, ROOT, attached.device).await?, [expected]);
    drop(process);
    fixture.detach(&attached).await
}

async fn descriptor_that_is_only_a_path_is_not_listed(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let node = attached.device.node();
    let path = nix::fcntl::open(node.as_str(), nix::fcntl::OFlag::O_PATH, nix::sys::stat::Mode::empty())?;
    let process = opener(&node, "sleep", ROOT)?;
    let expected = format!("{node} is open in sleep (process {})", process.pid());
    assert_eq!(holders(fixture, ROOT, attached.device).await?, [expected]);
    drop((path, process));
    fixture.detach(&attached).await
}

async fn other_commands_name_the_process(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", 32 * MIB)?;
    Gpt::new(TWO).write(&image)?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let node = attached.device.partition_node(2);
    let process = opener(&node, "sleep", ROOT)?;
    let expected = format!("loopctl: {node} is open in sleep (process {})\n", process.pid());
    Gpt::new(&TWO[..1]).write(&image)?;
    let text = complaint(fixture, ROOT, &["rescan", &attached.device.node()]).await?;
    assert!(text.contains(&expected), "{text}");
    drop(process);
    fixture.detach(&attached).await?;

    // The process that the command leaves behind.
    let image = Image::sparse(&fixture.directory, "left", MIB)?;
    let script = "exec 3<\"$1\"; sleep 60 >/dev/null 2>&1 & echo $!";
    let left = fixture.loopctl(["run", image.name(), "--", "sh", "-c", script, "sh", "{}"]).await?;
    let pid: i32 = String::from_utf8(left.stdout)?.trim().parse()?;
    let text = String::from_utf8(left.stderr)?;
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL)?;
    assert!(text.contains(&format!(" is open in sleep (process {pid})\n")), "{text}");
    fixture.assert_no_leak().await
}

async fn loop_device_on_the_device_or_a_partition_is_named(fixture: &mut Fixture) -> Outcome {
    let lower = partitioned(fixture).await?;
    // Under another name: the path of the file tells nothing.
    let alias = fixture.directory.join("alias");
    let number = std::fs::read_to_string(format!("/sys/block/loop{0}/loop{0}p2/dev", lower.device.0))?;
    let (major, minor) = number.trim().split_once(':').unwrap();
    run("mknod", [alias.to_str().unwrap(), "b", major, minor]).await?;
    // First the alias: the number of a partition that is made again may differ.
    for file in [alias.to_str().unwrap().to_owned(), lower.device.partition_node(1), lower.device.node()] {
        // After a detach that was taken back, udev drops the partitions for a moment.
        let mut node = String::new();
        eventually("it is attached", async || {
            node = run("losetup", ["-r", "-f", "--show", &file]).await.unwrap_or_default();
            Ok(!node.is_empty())
        })
        .await?;
        let upper = LoopDevice::from_node(node.trim())?;
        let message = busy(fixture, lower.device).await?;
        assert!(message.contains(&format!("held by {}, whose file is {file};", upper.node())), "{message}");
        if !file.ends_with("alias") {
            assert!(holders(fixture, ROOT, lower.device).await?.is_empty(), "loopd has named it");
        }
        run("losetup", ["-d", &upper.node()]).await?;
        eventually("the upper one is free", async || Ok(!upper.bound())).await?;
    }
    fixture.detach(&lower).await
}

/// A swap area in use, until it is dropped.
struct Swap(String);

impl Swap {
    async fn on(node: String) -> Result<Self> {
        needs("mkswap")?;
        run("mkswap", [&node]).await?;
        match run("swapon", [&node]).await {
            Ok(_) => Ok(Self(node)),
            Err(error) => skip(format!("this machine allows no swap: {error}")),
        }
    }
}

impl Drop for Swap {
    fn drop(&mut self) {
        let status = Command::new("swapoff").arg(&self.0).status();
        assert!(status.is_ok_and(|status| status.success()), "swapoff {}", self.0);
    }
}

async fn swap_is_named(fixture: &mut Fixture) -> Outcome {
    let attached = partitioned(fixture).await?;
    // The partition first: the other one overwrites the table.
    for node in [attached.device.partition_node(2), attached.device.node()] {
        let swap = Swap::on(node.clone()).await?;
        let message = busy(fixture, attached.device).await?;
        assert!(message.contains(&format!("held by swap on {node};")), "{message}");
        drop(swap);
    }
    fixture.detach(&attached).await
}

/// As in the sandbox of the unit. loopctl still sees it.
async fn swap_is_named_without_proc_swaps(fixture: &mut Fixture) -> Outcome {
    let script = "mount -t proc -o subset=pid proc /proc && exec \"$@\"";
    fixture.restart_daemon_under(&["unshare", "--mount", "sh", "-c", script, "sh"]).await?;
    let attached = partitioned(fixture).await?;
    let node = attached.device.partition_node(2);
    let swap = Swap::on(node.clone()).await?;
    eventually("udev has found it", async || {
        let partitions = fixture.partitions(&attached).await?;
        Ok(partitions.get(&2).is_some_and(|(_, volume)| volume.filesystem_type == "swap"))
    })
    .await?;
    let message = busy(fixture, attached.device).await?;
    assert!(message.contains(&format!("it is claimed by swap on {node}, by a file system")), "{message}");
    assert_eq!(
        holders(fixture, ROOT, attached.device).await?,
        [format!("{node} is in use as swap; `sudo swapoff {node}` ends that")]
    );
    drop(swap);
    fixture.detach(&attached).await?;
    fixture.restart_daemon(&[]).await
}

/// A process in a mount namespace of its own, in which the node is mounted on `/mnt`.
fn container(node: &str) -> Result<Process> {
    let script = "mount \"$1\" /mnt && echo ready && exec sleep 60";
    let mut command = tied("unshare");
    command.args(["--mount", "sh", "-c", script, "sh", node]).stdout(Stdio::piped());
    let mut process = Process::spawn("container", &mut command)?;
    let mut line = String::new();
    BufReader::new(process.child().stdout.take().unwrap()).read_line(&mut line)?;
    ensure!(line == "ready\n", "{line:?}");
    Ok(process)
}

async fn named_in_another_namespace(fixture: &mut Fixture, user: User) -> Outcome {
    let attached = partitioned(fixture).await?;
    let node = attached.device.partition_node(2);
    run("mkfs.ext4", ["-q", "-U", UUID, &node]).await?;
    let container = container(&node)?;
    eventually("it sleeps", async || {
        Ok(std::fs::read(format!("/proc/{}/comm", container.pid()))? == b"sleep\n")
    })
    .await?;
    let message = busy(fixture, attached.device).await?;
    assert!(message.contains("mounted in another mount namespace"), "{message}");
    let expected =
        format!("{node} is mounted on /mnt in the mount namespace of sleep (process {})", container.pid());
    assert_eq!(holders(fixture, user, attached.device).await?, [expected]);
    drop(container);
    fixture.detach(&attached).await
}

async fn mount_in_another_namespace_is_named(fixture: &mut Fixture) -> Outcome {
    named_in_another_namespace(fixture, ROOT).await
}

async fn mount_in_another_namespace_is_named_to_a_user(fixture: &mut Fixture) -> Outcome {
    named_in_another_namespace(fixture, GAMES).await
}

async fn process_on_a_lazily_unmounted_file_system_is_named(fixture: &mut Fixture) -> Outcome {
    let image = Image::ext4(&fixture.directory, "image", "holders", UUID).await?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let mounted = Mounted::new(attached.device, &fixture.directory, "mount").await?;
    let mut command = Command::new("sleep");
    let process = Process::spawn("sleep", command.arg("60").current_dir(&mounted.directory))?;
    run("umount", ["--lazy".as_ref(), mounted.directory.as_os_str()]).await?;
    std::mem::forget(mounted);
    let message = busy(fixture, attached.device).await?;
    assert!(message.contains("unmounted lazily"), "{message}");
    let node = attached.device.node();
    let expected =
        format!("{node} has a file or directory that is in use in sleep (process {})", process.pid());
    assert_eq!(holders(fixture, ROOT, attached.device).await?, [expected]);
    drop(process);
    fixture.detach(&attached).await
}

/// loopctl in a pid namespace without the process.
async fn nothing_visible_is_said(fixture: &mut Fixture) -> Outcome {
    let image = Image::sparse(&fixture.directory, "image", MIB)?;
    let attached = fixture.attach(&image.open()?, &persistent()).await?;
    let node = attached.device.node();
    let process = opener(&node, "sleep", ROOT)?;
    let loopctl = fixture.tool(ROOT, "loopctl")?.get_program().to_owned();
    let mut command = fixture.command("unshare");
    command.args(["--pid", "--fork", "--mount-proc"]).arg(loopctl).args(["detach", &node]);
    let text = String::from_utf8(output(command).await?.stderr)?;
    let expected =
        format!("no process that is visible here has {node} open: it may have closed it since, or run in");
    assert!(text.contains(&expected), "{text}");
    drop(process);
    fixture.detach(&attached).await
}
