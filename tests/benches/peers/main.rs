//! loopd beside its peers: plain ioctls, udev, losetup and UDisks2, interleaved in one run on the same files with udevd
//! running. `make bench` runs it in release mode as root. It prints tables, and the goals beside the figures of the run;
//! `--json FILE` and `--svg FILE` write the figures and a plot. Words select parts:
//!
//! | part | content |
//! | --- | --- |
//! | `attach` | attaches and detaches of all sides |
//! | `growth` | the same beside 1 to 1,000 held devices; lists; the end of a client |
//! | `memory` | of loopd: idle, of an attachment, after all have gone |
//! | `idle` | system calls while loopd is idle |
//! | `start` | exec to first reply |
//! | `sizes` | of the binaries |
//! | `direct-io` | reading and writing through devices, on several file systems |
//!
//! Without `--bench`, as in `cargo test --benches`, a few rounds show that it works. `LOOPD_TEST_ROUNDS` is the number of
//! attaches; the other numbers follow it.

mod attach;
mod authorization;
mod chart;
mod commands;
mod direct_io;
mod goals;
mod growth;
mod idle;
mod ioctls;
mod memory;
mod names;
mod passing;
mod process_table;
mod results;
mod scale;
mod scene;
mod side;
mod sizes;
mod start;
mod udisks;
mod workspace;

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::{Context as _, Result, bail};
use clap::{Parser, ValueEnum};
use futures_util::future::{Either, select};
use loopd_tests::host;
use loopd_tests::process::end_strays;
use loopd_tests::report::goal;
use loopd_tests::report::text_table::TextTable;
use tokio::signal::unix::{SignalKind, signal};

use crate::results::Results;
use crate::scale::Scale;
use crate::workspace::{Workspace, quiet};

/// Measures loopd beside its peers; needs root.
///
/// The environment variable LOOPD_TEST_ROUNDS is the number of attaches; the other numbers follow it.
#[derive(Debug, Parser)]
#[command(name = "peers")]
struct Arguments {
    /// What is measured; everything, unless parts are named
    #[arg(value_name = "PART")]
    parts: Vec<Part>,
    /// Measure, instead of a few rounds that show that it works
    #[arg(long)]
    bench: bool,
    /// Write the figures and the goals to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Write a plot to this file
    #[arg(long, value_name = "FILE")]
    svg: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Attaches and detaches of all sides
    Attach,
    /// The same beside held devices; lists; the end of a client
    Growth,
    /// loopd's memory: idle, of an attachment, after all have gone
    Memory,
    /// System calls while loopd is idle
    Idle,
    /// Exec to first reply
    Start,
    /// Sizes of the binaries
    Sizes,
    /// Reading and writing through devices, on several file systems
    DirectIo,
}

impl Part {
    fn name(self) -> &'static str {
        match self {
            Self::Attach => "attach",
            Self::Growth => "growth",
            Self::Memory => "memory",
            Self::Idle => "idle",
            Self::Start => "start",
            Self::Sizes => "sizes",
            Self::DirectIo => "direct-io",
        }
    }

    async fn measure(self, workspace: &Workspace, scale: &Scale, results: &mut Results) -> Result<()> {
        match self {
            Self::Attach => attach::measure(workspace, scale, results).await,
            Self::Growth => growth::measure(workspace, scale, results).await,
            Self::Memory => memory::measure(workspace, scale, results).await,
            Self::Idle => idle::measure(workspace, scale, results).await,
            Self::Start => start::measure(workspace, scale, results).await,
            Self::Sizes => sizes::measure(results),
            Self::DirectIo => direct_io::measure(workspace, scale, results).await,
        }
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if let Some(why) = host::unfit() {
        println!("SKIPPED the benchmark: {why}");
        return ExitCode::SUCCESS;
    }
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Releases what the runs of this process share, also after a panic.
struct SharedHost;

impl Drop for SharedHost {
    fn drop(&mut self) {
        host::stop();
    }
}

/// Runs the parts, and prints and writes what they have measured.
fn run(arguments: &Arguments) -> Result<()> {
    let mut results = Results::default();
    measure_and_clean(arguments, &mut results)?;
    print(&results, !arguments.parts.is_empty());
    write(arguments, &results)
}

/// Removes everything that the parts have made, also after an error or a signal.
fn measure_and_clean(arguments: &Arguments, results: &mut Results) -> Result<()> {
    // Orphans become children of this process, so they are found.
    nix::sys::prctl::set_child_subreaper(true)?;
    let _shared = SharedHost;
    let workspace = Workspace::new()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let outcome = runtime.block_on(until_signal(measure(arguments, &workspace, results)));
    drop(runtime);
    drop(workspace);
    let strays = end_strays(&host::get()?.udev.pids());
    outcome?;
    if !strays.is_empty() {
        bail!("left running: {strays:?}");
    }
    Ok(())
}

/// Drops the future at SIGINT or SIGTERM, and with it what it has started.
async fn until_signal(work: impl Future<Output = Result<()>>) -> Result<()> {
    let (mut interrupt, mut terminate) = (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?);
    let (interrupted, terminated) = (pin!(interrupt.recv()), pin!(terminate.recv()));
    match select(pin!(work), select(interrupted, terminated)).await {
        Either::Left((outcome, _)) => outcome,
        Either::Right(_) => bail!("stopped by a signal"),
    }
}

async fn measure(arguments: &Arguments, workspace: &Workspace, results: &mut Results) -> Result<()> {
    let scale = Scale::new(arguments.bench);
    if !arguments.bench {
        println!("without --bench: a few rounds, which show that it works and measure nothing");
    }
    for &part in Part::value_variants() {
        if !arguments.parts.is_empty() && !arguments.parts.contains(&part) {
            continue;
        }
        eprintln!("measuring: {}", part.name());
        let start = Instant::now();
        part.measure(workspace, &scale, results).await.with_context(|| part.name())?;
        workspace.remove_new_devices();
        quiet().await?;
        results.part(part.name(), start.elapsed());
    }
    Ok(())
}

/// Prints all tables that have figures; for a run of some parts, only the goals of those.
fn print(results: &Results, is_partial: bool) {
    let tables: [TextTable; 4] = [
        attach::table(results),
        growth::table(results),
        process_table::table(results),
        direct_io::table(results),
    ];
    let names = [names::table::ATTACH, names::table::GROWTH, names::table::PROCESS, names::table::DIRECT_IO];
    for (name, table) in names.into_iter().zip(tables) {
        if !results.groups(name).is_empty() {
            print!("\n{table}");
        }
    }
    let mut goals = goals::of(results);
    if is_partial {
        goals.retain(|goal| goal.found.is_some());
    }
    if !goals.is_empty() {
        print!("\n{}", goal::table(&goals));
    }
    let parts: Vec<_> =
        results.parts().iter().map(|(name, time)| format!("{name} {:.0} s", time.as_secs_f64())).collect();
    println!("\nduration: {}", parts.join(", "));
}

fn write(arguments: &Arguments, results: &Results) -> Result<()> {
    let write = |path: &Path, text: String| -> Result<()> {
        std::fs::write(path, text).with_context(|| path.display().to_string())?;
        println!("written: {}", path.display());
        Ok(())
    };
    if let Some(path) = &arguments.json {
        write(path, format!("{:#}\n", results.json(&goals::of(results))))?;
    }
    if let Some(path) = &arguments.svg {
        write(path, chart::of(results).to_string())?;
    }
    Ok(())
}
