//! Nothing that a peer under loopd's name can answer ends loopctl otherwise than with an error, costs it more than a
//! bounded amount of memory, or reaches the terminal as it is.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use loopd_tests::hostile_service::HostileService;
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::Setup;
use loopd_tests::process::{Process, output, tied};
use loopd_tests::world::World;
use loopd_tests::{Outcome, host, rounds};

loopd_tests::tests! {
    "replies";
    Setup::None => [any_replies_to_loopctl];
}

/// What loopctl may allocate, in bytes.
const MOST_MEMORY: u64 = 512 << 20;
/// How long a command may take.
const SOON: Duration = Duration::from_secs(20);
/// Of a panic.
const PANICKED: i32 = 101;

const COMMANDS: [&[&str]; 22] = [
    &["loopctl", "list"],
    &["loopctl", "list", "--all"],
    &["loopctl", "list", "--all", "--json"],
    &["loopctl", "info", "image"],
    &["loopctl", "info", "--json", "/dev/loop0"],
    &["loopctl", "attach", "image"],
    &["loopctl", "attach", "--json", "image"],
    &["loopctl", "detach", "image"],
    &["loopctl", "detach", "/dev/loop0"],
    &["loopctl", "detach", "--all"],
    &["loopctl", "mount", "image"],
    &["loopctl", "unmount", "image"],
    &["loopctl", "resize", "/dev/loop0"],
    &["loopctl", "rescan", "/dev/loop0"],
    &["loopctl", "run", "image", "--", "true"],
    &["losetup"],
    &["losetup", "--all"],
    &["losetup", "--list", "--json"],
    &["losetup", "--find"],
    &["losetup", "--find", "--show", "image"],
    &["losetup", "--detach", "/dev/loop0"],
    &["losetup", "--associated", "image"],
];

/// `LOOPD_TEST_ROUNDS` is the number of commands.
async fn any_replies_to_loopctl(world: &mut World) -> Outcome {
    let (mut random, rounds) = rounds::of("replies::any_replies_to_loopctl", 300);
    world.end_daemon().await?;
    Image::sparse(&world.folder, "image", MIB)?;
    let links = world.folder.join("links");
    std::fs::create_dir(&links)?;
    std::os::unix::fs::symlink(host::get()?.tool("loopctl"), links.join("losetup"))?;
    let service = HostileService::start(world.bus_address())?;
    let mut failed = 0;
    for round in 0..rounds {
        let words = random.choice(COMMANDS).context("no command")?;
        let seed = random.u64(..);
        service.seed(seed);
        let code = endure(world, &links, words).await;
        let code = code.with_context(|| format!("round {round}, seed {seed}: {}", words.join(" ")))?;
        failed += u64::from(code != 0);
        if round % 16 == 0 {
            service.seed(random.u64(..));
            monitor(world).await.with_context(|| format!("round {round}: monitor"))?;
        }
    }
    println!("{rounds} commands, {failed} of which failed, had {} answers", service.answered());
    ensure!(failed > 0 && failed < rounds, "they all do the same");
    ensure!(service.answered() > rounds / 2, "they asked nothing");
    service.stop()
}

/// Runs a command, bounded, to its end.
async fn endure(world: &World, links: &Path, words: &[&str]) -> Result<i32> {
    let program = if words[0] == "losetup" { links.join("losetup") } else { host::get()?.tool("loopctl") };
    let mut command = bounded(world, &program);
    command.args(&words[1..]).stdin(std::process::Stdio::null());
    let ended = tokio::time::timeout(SOON, output(command)).await.context("it does not end")??;
    // losetup shows names byte by byte in what it lists.
    let shown = if words[0] == "losetup" { Vec::new() } else { ended.stdout };
    let text = [shown, ended.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    ensure!(is_plain(&text), "control characters: {text:?}");
    let code = ended.status.code().with_context(|| format!("{}: {text}", ended.status))?;
    ensure!(code != PANICKED && !text.contains("panicked"), "it panicked: {text}");
    Ok(code)
}

fn bounded(world: &World, program: &Path) -> Command {
    let mut command = world.command("prlimit");
    command.arg(format!("--data={MOST_MEMORY}")).arg("--").arg(program);
    command
}

/// Nothing that a terminal obeys, or that changes what is seen of the rest.
fn is_plain(text: &str) -> bool {
    let is_format = |c| matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.chars().all(|c| c == '\n' || !(c.is_control() || is_format(c)))
}

/// The monitor goes on, or ends with an error, and ends when it is asked to.
async fn monitor(world: &World) -> Outcome {
    let program = host::get()?.tool("loopctl");
    let path = world.folder.join("monitor");
    let mut command = tied("prlimit");
    command
        .arg(format!("--data={MOST_MEMORY}"))
        .arg("--")
        .arg(program)
        .arg("monitor")
        .env("DBUS_SYSTEM_BUS_ADDRESS", world.bus_address())
        .stdout(std::fs::File::create(&path)?)
        .stderr(
            std::fs::File::options().append(true).create(true).open(world.folder.join("monitor errors"))?,
        );
    let mut monitor = Process::spawn("loopctl monitor", &mut command)?;
    // Each answer of the service to this comes with signals, which the monitor gets as well.
    for _ in 0..8 {
        let links = world.folder.join("links");
        endure(world, &links, COMMANDS[1]).await?;
    }
    let status = match monitor.exited()? {
        Some(status) => status,
        None => monitor.terminate().await?,
    };
    let code = status.code().with_context(|| format!("{status}"))?;
    let text =
        std::fs::read_to_string(&path)? + &std::fs::read_to_string(world.folder.join("monitor errors"))?;
    ensure!(code != PANICKED && !text.contains("panicked"), "{status}: {text}");
    ensure!(is_plain(&text), "control characters: {text:?}");
    Ok(())
}
