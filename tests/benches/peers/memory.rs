//! The part `memory`: loopd's memory while it is idle, with many attachments, and after they have gone.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use anyhow::{Context as _, Result, ensure};
use loopd_tests::host::built;
use loopd_tests::image::{Image, MIB};
use loopd_tests::process::{Process, tied};
use nix::sys::signal::Signal;
use nix::unistd::Pid;

use crate::growth::{hold, until_all_free};
use crate::names::{process, table};
use crate::results::{Key, Results};
use crate::scale::Scale;
use crate::scene::Scene;
use crate::workspace::{Workspace, quiet};

/// Bytes of a megabyte, and of a kibibyte.
const MB: f64 = 1e6;
const KIB: f64 = 1024.0;

/// The memory of a process, in bytes.
#[derive(Clone, Copy, Debug)]
struct Memory {
    resident: f64,
    proportional: f64,
}

impl Memory {
    fn of(process: Pid) -> Result<Self> {
        let rollup = std::fs::read_to_string(format!("/proc/{process}/smaps_rollup"))?;
        let field = |name: &str| -> Result<f64> {
            let line = rollup.lines().find_map(|line| line.strip_prefix(name));
            let kibibytes: f64 = line.context("no such field")?.trim().trim_end_matches(" kB").parse()?;
            Ok(kibibytes * KIB)
        };
        Ok(Self { resident: field("Rss:")?, proportional: field("Pss:")? })
    }
}

/// Measures a new loopd.
pub async fn measure(workspace: &Workspace, scale: &Scale, results: &mut Results) -> Result<()> {
    let scene = Scene::start(workspace, "memory").await?;
    let image = Image::sparse(&scene.directory, "image", MIB)?;
    let (client, manager) = scene.connect().await?;
    manager.version().await?;
    let pid = scene.daemon.pid();
    let rest = || tokio::time::sleep(scale.rest);
    rest().await;
    let idle = Memory::of(pid)?;
    let devices = hold(&manager, &image, scale.attachments).await?;
    quiet().await?;
    rest().await;
    let full = Memory::of(pid)?;
    client.close().await?;
    until_all_free(&devices)?;
    quiet().await?;
    rest().await;
    let after = Memory::of(pid)?;
    let mut add = |side, unit, value| {
        results.add(
            Key { table: table::PROCESS, group: "memory", side, column: process::VALUE },
            unit,
            value,
        );
    };
    add(process::RESIDENT, "MB", idle.resident / MB);
    add(process::PROPORTIONAL, "MB", idle.proportional / MB);
    let each = (full.resident - idle.resident) / scale.attachments as f64;
    add(process::PER_ATTACHMENT, "KiB", each / KIB);
    add(process::RESIDENT_AFTER, "MB", after.resident / MB);
    add(process::LEFT, "MB", (after.resident - idle.resident) / MB);
    let floor = floor(&scene).await?;
    add(process::FLOOR_RESIDENT, "MB", floor.resident / MB);
    add(process::FLOOR_PROPORTIONAL, "MB", floor.proportional / MB);
    Ok(())
}

/// The memory of a service with the same libraries that does nothing.
async fn floor(scene: &Scene) -> Result<Memory> {
    let mut command = tied(built("loopd-floor"));
    command.env("DBUS_SYSTEM_BUS_ADDRESS", scene.bus.address());
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut service = Process::spawn("loopd-floor", &mut command)?;
    let mut line = String::new();
    let output = service.child().stdout.take().context("no output")?;
    BufReader::new(output).read_line(&mut line)?;
    ensure!(line == "ready\n", "loopd-floor does not start");
    let memory = Memory::of(service.pid())?;
    service.signal(Signal::SIGKILL)?;
    service.end().await?;
    Ok(memory)
}
