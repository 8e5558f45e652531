//! No reply of a process with loopd's name harms loopctl: it may report an error, but it does not crash, its memory is
//! limited, and control characters do not reach the terminal.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use loopd_tests::fixture::Fixture;
use loopd_tests::hostile_service::HostileService;
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::Setup;
use loopd_tests::process::{Process, output, tied};
use loopd_tests::{Outcome, host, rounds};

loopd_tests::tests! {
    "replies";
    Setup::None => [random_replies_do_not_harm_loopctl];
}

/// The memory limit of loopctl, in bytes.
const MOST_MEMORY: u64 = 512 << 20;
/// The time limit of a command.
const SOON: Duration = Duration::from_secs(20);
/// The exit status of a panic.
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
async fn random_replies_do_not_harm_loopctl(fixture: &mut Fixture) -> Outcome {
    let (mut random, rounds) = rounds::of("replies::random_replies_do_not_harm_loopctl", 300);
    fixture.end_daemon().await?;
    Image::sparse(&fixture.directory, "image", MIB)?;
    let links = fixture.directory.join("links");
    std::fs::create_dir(&links)?;
    std::os::unix::fs::symlink(host::get()?.tool("loopctl"), links.join("losetup"))?;
    let service = HostileService::start(fixture.bus_address())?;
    let mut failed = 0;
    for round in 0..rounds {
        let arguments = random.choice(COMMANDS).context("no command")?;
        let seed = random.u64(..);
        service.seed(seed);
        let code = endure(fixture, &links, arguments).await;
        let code = code.with_context(|| format!("round {round}, seed {seed}: {}", arguments.join(" ")))?;
        failed += u64::from(code != 0);
        if round % 16 == 0 {
            service.seed(random.u64(..));
            monitor(fixture).await.with_context(|| format!("round {round}: monitor"))?;
        }
    }
    println!("{rounds} commands, {failed} of which failed, had {} answers", service.answered());
    ensure!(failed > 0 && failed < rounds, "all commands ended the same way");
    ensure!(service.answered() > rounds / 2, "too few commands called the service");
    service.stop()
}

/// Runs a command with these limits to its end.
async fn endure(fixture: &Fixture, links: &Path, arguments: &[&str]) -> Result<i32> {
    let program =
        if arguments[0] == "losetup" { links.join("losetup") } else { host::get()?.tool("loopctl") };
    let mut command = bounded(fixture, &program);
    command.args(&arguments[1..]).stdin(std::process::Stdio::null());
    let ended = tokio::time::timeout(SOON, output(command)).await.context("it does not end")??;
    // losetup shows names byte by byte in what it lists.
    let shown = if arguments[0] == "losetup" { Vec::new() } else { ended.stdout };
    let text = [shown, ended.stderr].concat();
    let text = String::from_utf8_lossy(&text);
    ensure!(is_plain(&text), "control characters: {text:?}");
    let code = ended.status.code().with_context(|| format!("{}: {text}", ended.status))?;
    ensure!(code != PANICKED && !text.contains("panicked"), "it panicked: {text}");
    Ok(code)
}

fn bounded(fixture: &Fixture, program: &Path) -> Command {
    let mut command = fixture.command("prlimit");
    command.arg(format!("--data={MOST_MEMORY}")).arg("--").arg(program);
    command
}

/// Whether the text has no control characters and nothing else that changes how it is displayed.
fn is_plain(text: &str) -> bool {
    let is_format = |c| matches!(c, '\u{61c}' | '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    text.chars().all(|c| c == '\n' || !(c.is_control() || is_format(c)))
}

/// Checks that the monitor continues or fails with an error, and ends on request.
async fn monitor(fixture: &Fixture) -> Outcome {
    let program = host::get()?.tool("loopctl");
    let path = fixture.directory.join("monitor");
    let mut command = tied("prlimit");
    command
        .arg(format!("--data={MOST_MEMORY}"))
        .arg("--")
        .arg(program)
        .arg("monitor")
        .env("DBUS_SYSTEM_BUS_ADDRESS", fixture.bus_address())
        .stdout(std::fs::File::create(&path)?)
        .stderr(
            std::fs::File::options()
                .append(true)
                .create(true)
                .open(fixture.directory.join("monitor errors"))?,
        );
    let mut monitor = Process::spawn("loopctl monitor", &mut command)?;
    // Each answer of the service to this comes with signals, which the monitor gets as well.
    for _ in 0..8 {
        let links = fixture.directory.join("links");
        endure(fixture, &links, COMMANDS[1]).await?;
    }
    let status = match monitor.exited()? {
        Some(status) => status,
        None => monitor.terminate().await?,
    };
    let code = status.code().with_context(|| format!("{status}"))?;
    let text =
        std::fs::read_to_string(&path)? + &std::fs::read_to_string(fixture.directory.join("monitor errors"))?;
    ensure!(code != PANICKED && !text.contains("panicked"), "{status}: {text}");
    ensure!(is_plain(&text), "control characters: {text:?}");
    Ok(())
}
