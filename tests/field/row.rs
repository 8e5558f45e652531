//! A row of the table: an input, and a check of the outcome.

use std::path::Path;
use std::sync::Mutex;

use anyhow::{Context as _, Result, ensure};
use libtest_mimic::{Completion, Failed};
use loopd_tests::fixture::Fixture;
use loopd_tests::image::Image;
use loopd_tests::polkit::{Answer, Setup};
use loopd_tests::process::run;
use loopd_tests::runner::{Test, TestFn};
use loopd_tests::sysfs::LoopDevice;

/// A row.
#[derive(Clone, Copy)]
pub struct Row {
    /// The kind of the case.
    pub kind: &'static str,
    /// The input, in words.
    pub input: &'static str,
    /// Makes the input and tries it. Fails if the outcome is wrong.
    pub run: TestFn,
}

/// How a row ended.
#[derive(Clone, Copy)]
pub enum Verdict {
    Right,
    Wrong,
    Skipped,
}

/// The notes of the current row.
static NOTES: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// Adds a line to the result of the current row.
pub fn note(text: impl Into<String>) {
    NOTES.lock().unwrap().push(text.into());
}

/// The verdict of an outcome.
pub fn verdict(outcome: &Result<Completion, Failed>) -> Verdict {
    match outcome {
        Ok(Completion::Completed) => Verdict::Right,
        Ok(_) => Verdict::Skipped,
        Err(_) => Verdict::Wrong,
    }
}

impl Row {
    pub fn is_about(&self, word: &str) -> bool {
        self.kind.contains(word) || self.input.contains(word)
    }

    pub fn test(&self) -> Test {
        Test { name: self.input, polkit: Setup::StandIn(Answer::Yes), run: self.run }
    }

    pub fn print(&self, verdict: Verdict, outcome: &Result<Completion, Failed>) {
        let word = match verdict {
            Verdict::Right => "right",
            Verdict::Wrong => "WRONG",
            Verdict::Skipped => "SKIPPED",
        };
        println!("{word:8} {}: {}", self.kind, self.input);
        for line in std::mem::take(&mut *NOTES.lock().unwrap()) {
            println!("         {line}");
        }
        if let (Verdict::Wrong, Err(failed)) = (verdict, outcome) {
            println!("         {}", failed.message().unwrap_or_default().lines().next().unwrap_or_default());
        }
    }
}

/// What a command has printed.
pub struct Printed {
    pub status: Option<i32>,
    pub output: String,
    pub messages: String,
}

impl Printed {
    /// The device that it has printed.
    pub fn device(&self) -> Result<LoopDevice> {
        ensure!(self.status == Some(0), "{}", self.messages);
        LoopDevice::from_node(self.output.trim_end())
    }

    /// Fails unless the command failed with this message.
    pub fn fails_with(&self, text: &str) -> Result<()> {
        ensure!(
            matches!(self.status, Some(1 | 2)) && self.output.is_empty(),
            "it did not fail: {}",
            self.output
        );
        self.warns_of(text)
    }

    /// Fails unless this is in its messages.
    pub fn warns_of(&self, text: &str) -> Result<()> {
        ensure!(self.messages.contains(text), "no {text:?} in {:?}", self.messages);
        Ok(())
    }

    /// Fails if it has messages.
    pub fn is_silent(&self) -> Result<()> {
        ensure!(self.messages.is_empty(), "{}", self.messages);
        Ok(())
    }
}

/// Runs loopctl, and notes what it prints; the test's directory is left out.
pub async fn loopctl(fixture: &Fixture, arguments: &[&str]) -> Result<Printed> {
    let output = fixture.loopctl(arguments).await?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let printed = Printed {
        status: output.status.code(),
        output: text(&output.stdout),
        messages: text(&output.stderr),
    };
    let directory = format!("{}/", fixture.directory.display());
    let shown = |text: &str| text.trim_end().replace(&directory, "").replace('\n', "\n         ");
    note(format!("$ loopctl {}", shown(&arguments.join(" "))));
    for part in [&printed.output, &printed.messages].into_iter().filter(|part| !part.is_empty()) {
        note(shown(part));
    }
    Ok(printed)
}

/// Attaches with loopctl, calls `judge`, and detaches even if that fails.
pub async fn attached(
    fixture: &Fixture,
    arguments: &[&str],
    judge: impl AsyncFnOnce(LoopDevice, &Printed) -> Result<()>,
) -> Result<()> {
    let printed = loopctl(fixture, &[&["attach"], arguments].concat()).await?;
    let device = printed.device()?;
    let judged = judge(device, &printed).await;
    let output = fixture.loopctl(["detach", &device.node()]).await?;
    judged?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

/// Fails unless the attach warns of this.
pub async fn warns(fixture: &Fixture, arguments: &[&str], text: &str) -> Result<()> {
    attached(fixture, arguments, async |_, printed| printed.warns_of(text)).await
}

/// A file of zeros with these bytes at these offsets.
pub fn file(fixture: &Fixture, name: &str, size: u64, contents: &[(u64, &[u8])]) -> Result<Image> {
    use std::os::unix::fs::FileExt as _;
    let image = Image::sparse(&fixture.directory, name, size)?;
    for (offset, bytes) in contents {
        image.open()?.write_all_at(bytes, *offset)?;
    }
    Ok(image)
}

/// The output of another program.
pub async fn other(program: &str, arguments: &[&str]) -> Result<String> {
    run(program, arguments).await.with_context(|| format!("{program} {arguments:?}"))
}

/// Whether a directory has what mkfs.ext4 puts into each file system.
pub fn has_ext4(directory: &str) -> Result<()> {
    ensure!(Path::new(directory).join("lost+found").exists(), "nothing is mounted at {directory}");
    Ok(())
}

/// Makes a list of rows: `rows! { "kind": "input" => function, … }`.
macro_rules! rows {
    ($($kind:literal: $($input:literal => $name:ident),+;)*) => {
        pub const ROWS: &[crate::row::Row] = &[$($(crate::row::Row {
            kind: $kind,
            input: $input,
            run: |fixture| Box::pin($name(fixture)),
        },)+)*];
    };
}
pub(crate) use rows;
