//! Runs the tests, each with its own fixture, and checks that they leave nothing behind.

use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::pin::Pin;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context as _, bail};
use futures_util::FutureExt as _;
use libtest_mimic::{Arguments, Completion, Failed, Trial};
use nix::unistd::Pid;

use crate::fixture::Fixture;
use crate::polkit::Setup;
use crate::{Outcome, Skipped, host, process, rounds, sysfs};

/// The time limit of a test, in seconds; a long run sets `LOOPD_TEST_LIMIT`.
const LIMIT: u64 = 180;

/// A test.
#[derive(Clone, Copy, Debug)]
pub struct Test {
    /// `subject::name`.
    pub name: &'static str,
    /// The polkit of its fixture.
    pub polkit: Setup,
    /// The test function.
    pub run: TestFn,
}

/// The type of test functions.
pub type TestFn = for<'w> fn(&'w mut Fixture) -> Pin<Box<dyn Future<Output = Outcome> + 'w>>;

/// Lists the tests of a module, grouped by their polkit:
/// `tests! { "subject"; Setup::None => [first, second]; Setup::Real => [third]; }`.
#[macro_export]
macro_rules! tests {
    ($subject:literal; $($polkit:expr => [$($name:ident),* $(,)?];)*) => {
        /// The tests of this module.
        pub const TESTS: &[$crate::runner::Test] = &[$($($crate::runner::Test {
            name: concat!($subject, "::", stringify!($name)),
            polkit: $polkit,
            run: |fixture| Box::pin($name(fixture)),
        },)*)*];
    };
}

/// Runs the tests one at a time: they share the machine's udev and its loop devices.
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
    // Orphans of a test become children of this process, so they are found.
    if let Err(error) = nix::sys::prctl::set_child_subreaper(true) {
        eprintln!("orphans of the tests will not be seen: {error}");
    }
    let trials = tests.into_iter().map(|test| Trial::ignorable_test(test.name, move || run(test))).collect();
    let conclusion = libtest_mimic::run(&arguments, trials);
    host::stop();
    conclusion.exit_code()
}

/// Runs one test with a fixture of its own.
///
/// # Errors
/// It has failed, or left something behind.
pub fn run(test: Test) -> Result<Completion, Failed> {
    match run_in_new_fixture(test) {
        Ok(()) => Ok(Completion::Completed),
        Err(error) if error.is::<Skipped>() => {
            println!("SKIPPED {}: {error}", test.name);
            Ok(Completion::ignored_with(error))
        }
        Err(error) => Err(format!("{error:#}").into()),
    }
}

fn run_in_new_fixture(test: Test) -> Outcome {
    let directory = host::get()?.new_directory()?;
    let mut known = process::children(Pid::this());
    let limit = Duration::from_secs(rounds::from_environment("LOOPD_TEST_LIMIT").unwrap_or(LIMIT));
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let mut log = String::new();
    let outcome = runtime.block_on(async {
        let mut fixture = Fixture::start(test.polkit, directory.path()).await?;
        let body = AssertUnwindSafe(run_in_fixture(test, &mut fixture)).catch_unwind();
        let outcome = tokio::time::timeout(limit, body).await;
        log = fixture.log();
        match outcome.with_context(|| format!("still not done after {limit:?}"))? {
            Ok(outcome) => outcome,
            Err(panic) => bail!("{}", panic_message(&*panic)),
        }
    });
    drop(runtime);
    // Leftovers of a failed test must not fail the next one.
    let devices = detach_all(directory.path());
    // The test may have restarted udev.
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

async fn run_in_fixture(test: Test, fixture: &mut Fixture) -> Outcome {
    (test.run)(fixture).await?;
    fixture.assert_no_leak().await?;
    if let Some(mut daemon) = fixture.take_daemon() {
        let status = daemon.terminate().await?;
        if !status.success() {
            bail!("loopd answered SIGTERM with {status}");
        }
    }
    Ok(())
}

/// The source lines of the error in our tests, if `RUST_BACKTRACE` is set.
fn lines_of_ours(error: &anyhow::Error) -> String {
    let trace = error.backtrace().to_string();
    let ours = trace.lines().filter(|line| line.contains("tests/") && !line.contains("runner.rs"));
    ours.map(|line| format!("{}\n", line.trim())).collect()
}

/// Detaches the devices of files in the directory, and unmounts what is mounted below it; returns the nodes of
/// the devices.
pub fn detach_all(directory: &Path) -> Vec<String> {
    // Before the unmount: a file on an unmounted file system loses its path. A mounted device is detached with the unmount.
    let left = sysfs::bound_by_tests(directory);
    for device in &left {
        let _ = std::process::Command::new("losetup").arg("-d").arg(device.node()).status();
    }
    for mount in sysfs::mounts_below(directory) {
        let _ = std::process::Command::new("umount").arg("-l").arg(mount).status();
    }
    left.into_iter().map(sysfs::LoopDevice::node).collect()
}

fn panic_message(panic: &(dyn std::any::Any + Send)) -> String {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked").to_owned()
}
