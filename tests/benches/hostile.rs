//! How much attacks of one user slow down another: the latency of a victim's attach and detach, alone and during
//! each attack, interleaved in one run. `make bench-hostile` runs it in release mode as root.
//!
//! The floor is an attack without loopd: its effect is that of the bus.
#![allow(clippy::unwrap_used)]

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context as _, Result};
use loopd_tests::bus::Bus;
use loopd_tests::daemon::Daemon;
use loopd_tests::hanging::Hanging;
use loopd_tests::image::{Image, MIB};
use loopd_tests::polkit::{Answer, Polkit, Setup};
use loopd_tests::process::Process;
use loopd_tests::table::{self, MOST_PARTITIONS};
use loopd_tests::{GAMES, User, WWW_DATA, host, sysfs, udev};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

/// Without `--bench` a single round shows that it works.
const ROUNDS: usize = 5;
/// Attaches of the victim in each half of a round.
const ATTACHES: usize = 20;
/// Of the victim's file system.
const UUID: &str = "11111111-2222-3333-4444-000000000011";
/// Uids that the user database does not know.
const SUBORDINATE: std::ops::Range<u32> = 2_999_000_000..2_999_000_040;

fn main() -> ExitCode {
    if let Some(why) = host::unfit() {
        println!("SKIPPED the benchmark: {why}");
        return ExitCode::SUCCESS;
    }
    let is_bench = std::env::args().any(|argument| argument == "--bench");
    let rounds = std::env::var("LOOPD_TEST_ROUNDS").ok().and_then(|rounds| rounds.parse().ok());
    let (rounds, attaches) = if is_bench { (rounds.unwrap_or(ROUNDS), ATTACHES) } else { (1, 2) };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let outcome = runtime.block_on(bench(rounds, attaches));
    drop(runtime);
    host::stop();
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The action of the attacker.
#[derive(Clone, Copy, Debug)]
enum Attack {
    /// Attaches and detaches an image with the maximum number of partitions.
    Partitions,
    /// The maximum number of `SetupLoop` calls with a file that hangs.
    HungFiles,
    /// The same with a file whose close hangs.
    HeldFlush,
    /// Eight connections, each with a hundred pending calls.
    Flood(&'static str),
    /// The same with calls to the bus itself.
    FloodFloor,
    /// The same with attaches that make polkit prompt.
    Prompts,
    /// Attaches by forty uids that the user database does not know.
    SubordinateUids,
}

impl Attack {
    const ALL: [Self; 12] = [
        Self::Partitions,
        Self::HungFiles,
        Self::HeldFlush,
        Self::FloodFloor,
        Self::Flood("ping"),
        Self::Flood("list"),
        Self::Flood("list-all"),
        Self::Flood("properties"),
        Self::Flood("objects"),
        Self::Flood("setup"),
        Self::Prompts,
        Self::SubordinateUids,
    ];

    fn name(self) -> String {
        match self {
            Self::Partitions => format!("{MOST_PARTITIONS} partitions"),
            Self::HungFiles => "hung files".to_owned(),
            Self::HeldFlush => "FLUSH held".to_owned(),
            Self::FloodFloor => "floor: flood of the bus".to_owned(),
            Self::Flood(kind) => format!("flood of {kind}"),
            Self::Prompts => "flood of prompts".to_owned(),
            Self::SubordinateUids => "40 subordinate uids".to_owned(),
        }
    }

    fn start(self, scene: &Scene<'_>) -> Result<Vec<Process>> {
        let path = |image: &Image| image.path.to_str().unwrap().to_owned();
        let plain = path(&scene.plain);
        match self {
            Self::Partitions => (0..4)
                .map(|_| scene.probe(GAMES, &["clock", "1000000", &path(&scene.partitioned)], Stdio::null()))
                .collect(),
            Self::HungFiles => {
                let file = scene.hanging.open()?;
                scene.hanging.hang();
                Ok(vec![scene.probe(GAMES, &["flood", "hang"], file)?])
            }
            Self::HeldFlush => {
                scene.hanging.withhold_flush(scene.daemon);
                let file = scene.hanging.open()?;
                Ok(vec![scene.probe(GAMES, &["flood", "hang"], file)?])
            }
            Self::FloodFloor => {
                (0..8).map(|_| scene.probe(GAMES, &["flood", "bus"], Stdio::null())).collect()
            }
            Self::Flood(kind) => {
                (0..8).map(|_| scene.probe(GAMES, &["flood", kind, &plain], Stdio::null())).collect()
            }
            Self::Prompts => {
                let arguments = ["--interactive", "flood", "setup", &plain];
                (0..8).map(|_| scene.probe(GAMES, &arguments, Stdio::null())).collect()
            }
            Self::SubordinateUids => SUBORDINATE
                .map(|uid| User { name: "", uid, gid: uid })
                .map(|user| scene.probe(user, &["flood", "setup", &plain], Stdio::null()))
                .collect(),
        }
    }
}

/// The resources of the attacks.
struct Scene<'a> {
    bus: &'a Bus,
    plain: Image,
    partitioned: Image,
    hanging: Hanging,
    daemon: Pid,
}

impl Scene<'_> {
    fn command(&self, user: User, arguments: &[&str]) -> Result<Command> {
        let mut command = Command::new(host::get()?.tool("loopd-probe"));
        command
            .env("DBUS_SYSTEM_BUS_ADDRESS", self.bus.address())
            .args(arguments)
            .uid(user.uid)
            .gid(user.gid);
        Ok(command)
    }

    fn probe(&self, user: User, arguments: &[&str], input: impl Into<Stdio>) -> Result<Process> {
        let mut command = self.command(user, arguments)?;
        command.stdin(input).stdout(Stdio::null()).stderr(Stdio::null());
        Process::spawn("loopd-probe", &mut command)
    }

    /// The durations of the victim's attaches and detaches.
    async fn victim(&self, attaches: usize) -> Result<Vec<[Duration; 2]>> {
        let attaches = attaches.to_string();
        let arguments = ["--json", "clock", &attaches, self.plain.path.to_str().unwrap()];
        let output = loopd_tests::process::output(self.command(WWW_DATA, &arguments)?).await?;
        let answer: serde_json::Value = serde_json::from_slice(&output.stdout)?;
        let times = answer["ok"].as_array().with_context(|| format!("the victim was refused: {answer}"))?;
        let time = |value: &serde_json::Value| Duration::from_micros(value.as_u64().unwrap_or(u64::MAX));
        Ok(times.iter().map(|pair| [time(&pair[0]), time(&pair[1])]).collect())
    }

    async fn stop(&self, attackers: Vec<Process>, directory: &Path) -> Result<()> {
        self.hanging.go_on();
        for mut attacker in attackers {
            let _ended_by_itself = attacker.signal(Signal::SIGKILL);
            attacker.end().await?;
        }
        // On a busy machine udev needs time to catch up.
        for attempt in 1.. {
            let is_over = sysfs::bound_by_tests(directory).is_empty() && udev::settle().await.is_ok();
            if is_over {
                break;
            }
            anyhow::ensure!(attempt < 60, "something is still attached, or udev is still at work");
            tokio::time::sleep(Duration::from_secs(1)).await;
        }
        Ok(())
    }
}

async fn bench(rounds: usize, attaches: usize) -> Result<()> {
    let directory = host::get()?.new_directory()?;
    let directory = directory.path();
    let bus = Bus::start(directory)?;
    let _polkit = Polkit::start(Setup::StandIn(Answer::Yes), &bus, directory).await?;
    let daemon = Daemon::start(&bus, directory, &[], &[("LOOPD_LOG", "warn")]).await?;
    let scene = Scene {
        bus: &bus,
        plain: Image::ext4_sized(directory, "image", "bench", UUID, 64 * MIB).await?,
        partitioned: table::with_most_partitions(directory, "partitioned").await?,
        hanging: Hanging::mount(directory, 16 << 20)?,
        daemon: daemon.pid(),
    };
    let mut times = vec![[Vec::new(), Vec::new()]; Attack::ALL.len()];
    for _ in 0..rounds {
        for (attack, [quiet, attacked]) in Attack::ALL.into_iter().zip(&mut times) {
            match scene.victim(attaches).await {
                Ok(seen) => quiet.extend(seen),
                Err(why) => {
                    println!("{}, before the attack: {why:#}\n", attack.name());
                    continue;
                }
            }
            let attackers = attack.start(&scene)?;
            tokio::time::sleep(Duration::from_millis(500)).await;
            let seen = scene.victim(attaches).await;
            scene.stop(attackers, directory).await?;
            match seen {
                Ok(seen) => attacked.extend(seen),
                Err(why) => println!("{}: {why:#}\n", attack.name()),
            }
        }
    }
    print(rounds * attaches, &times);
    Ok(())
}

fn print(attaches: usize, times: &[[Vec<[Duration; 2]>; 2]]) {
    println!("{attaches} attaches and detaches of 64 MiB, ext4, each; milliseconds, quiet and attacked\n");
    println!(
        "{:<24}{:>28}{:>8}{:>28}{:>8}",
        "", "attach median, p95", "ratio", "detach median, p95", "ratio"
    );
    for (attack, [quiet, attacked]) in Attack::ALL.into_iter().zip(times) {
        print!("{:<24}", attack.name());
        for step in 0..2 {
            let of = |times: &[[Duration; 2]], percent: usize| {
                let mut times: Vec<Duration> = times.iter().map(|pair| pair[step]).collect();
                times.sort_unstable();
                times[(times.len() * percent / 100).min(times.len() - 1)].as_secs_f64() * 1000.0
            };
            if attacked.is_empty() || quiet.is_empty() {
                print!("{:>28}{:>8}", "none ended", "");
                continue;
            }
            let (before, now) = (of(quiet, 50), of(attacked, 50));
            let figures = format!("{before:.1}, {:.1} | {now:.1}, {:.1}", of(quiet, 95), of(attacked, 95));
            print!("{figures:>28}{:>8.2}", now / before);
        }
        println!();
    }
}
