//! Runs the tests, one world each, and looks whether they left anything behind.

use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::pin::Pin;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::FutureExt as _;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use nix::unistd::Pid;

use crate::polkit::Setup;
use crate::world::World;
use crate::{Outcome, Skipped, host, process, rounds, sysfs};

/// How long a test may take, in seconds; a long run sets `LOOPD_TEST_LIMIT`.
const LIMIT: u64 = 180;

/// A test, before it has its world.
#[derive(Clone, Copy, Debug)]
pub struct Test {
    /// `subject::name`.
    pub name: &'static str,
    /// The polkit of its world.
    pub polkit: Setup,
    /// The test itself.
    pub run: TestFn,
}

/// A test's body.
pub type TestFn = for<'w> fn(&'w mut World) -> Pin<Box<dyn Future<Output = Outcome> + 'w>>;

/// Lists the tests of a module, in groups by the polkit that they want:
/// `tests! { "subject"; Setup::None => [first, second]; Setup::Real => [third]; }`.
#[macro_export]
macro_rules! tests {
    ($subject:literal; $($polkit:expr => [$($name:ident),* $(,)?];)*) => {
        /// The tests of this module.
        pub const TESTS: &[$crate::runner::Test] = &[$($($crate::runner::Test {
            name: concat!($subject, "::", stringify!($name)),
            polkit: $polkit,
            run: |world| Box::pin($name(world)),
        },)*)*];
    };
}

/// Runs them, one after the other: they share the machine's udev and its loop devices.
#[must_use]
pub fn main(tests: impl IntoIterator<Item = Test>) -> ExitCode {
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    if let Some(why) = host::unfit()
        && !arguments.list
    {
        println!("SKIPPED all tests of this program: {why}");
        return ExitCode::SUCCESS;
    }
    // Whatever a test orphans becomes our child, and is seen.
    if let Err(error) = nix::sys::prctl::set_child_subreaper(true) {
        eprintln!("orphans of the tests will not be seen: {error}");
    }
    let trials = tests.into_iter().map(|test| Trial::ignorable_test(test.name, move || run(test))).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    host::stop();
    conclusion.exit_code()
}

fn run(test: Test) -> Result<Completion, Failed> {
    match in_a_world(test) {
        Ok(()) => Ok(Completion::Completed),
        Err(error) if error.is::<Skipped>() => {
            println!("SKIPPED {}: {error}", test.name);
            Ok(Completion::ignored_with(error))
        }
        Err(error) => Err(format!("{error:#}").into()),
    }
}

fn in_a_world(test: Test) -> Outcome {
    let folder = host::get()?.new_folder()?;
    let mut known = process::children(Pid::this());
    let limit = Duration::from_secs(rounds::from_environment("LOOPD_TEST_LIMIT").unwrap_or(LIMIT));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut log = String::new();
    let outcome = runtime.block_on(async {
        let mut world = World::start(test.polkit, folder.path()).await?;
        let body = AssertUnwindSafe(in_this_world(test, &mut world)).catch_unwind();
        let outcome = tokio::time::timeout(limit, body).await;
        log = world.log();
        match outcome.with_context(|| format!("still not done after {limit:?}"))? {
            Ok(outcome) => outcome,
            Err(panic) => bail!("{}", panic_message(&*panic)),
        }
    });
    drop(runtime);
    // What a failed test left must not fail the next one.
    let devices = detach_all(folder.path());
    // The test may have started udev again.
    known.extend(host::get()?.udev.pids());
    let strays = process::end_strays(&known);
    let verdict = match outcome {
        Ok(()) if !devices.is_empty() => Err(anyhow::anyhow!("left attached: {devices:?}")),
        Ok(()) if !strays.is_empty() => Err(anyhow::anyhow!("left running: {strays:?}")),
        outcome => outcome,
    };
    match verdict {
        Err(error) if !error.is::<Skipped>() => {
            bail!("{error:#}\n{}loopd's log:\n{log}", lines_of_ours(&error))
        }
        verdict => verdict,
    }
}

async fn in_this_world(test: Test, world: &mut World) -> Outcome {
    (test.run)(world).await?;
    world.assert_no_leak().await?;
    if let Some(mut daemon) = world.take_daemon() {
        let status = daemon.terminate().await?;
        if !status.success() {
            bail!("loopd answered SIGTERM with {status}");
        }
    }
    Ok(())
}

/// Where the error came from, in our own sources: known where `RUST_BACKTRACE` is set.
fn lines_of_ours(error: &anyhow::Error) -> String {
    let trace = error.backtrace().to_string();
    let ours = trace.lines().filter(|line| line.contains("tests/") && !line.contains("runner.rs"));
    ours.map(|line| format!("{}\n", line.trim())).collect()
}

fn detach_all(folder: &Path) -> Vec<String> {
    // First: a file on something unmounted has not its path any more. One that is mounted goes with that.
    let left = sysfs::bound_by_tests(folder);
    for device in &left {
        let _ = std::process::Command::new("losetup").arg("-d").arg(device.node()).status();
    }
    for mount in sysfs::mounts_below(folder) {
        let _ = std::process::Command::new("umount").arg("-l").arg(mount).status();
    }
    left.into_iter().map(sysfs::LoopDevice::node).collect()
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked").to_owned()
}
