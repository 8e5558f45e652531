//! `loopctl losetup`, compared with util-linux's losetup.
//!
//! Both run the same command lines on new devices. util-linux 2.42 is the reference: if the machine's losetup
//! is older and its answers differ from `losetup/util-linux-2.42.txt`, ours is compared with that recording.
//! `LOOPD_LOSETUP=/path/to/losetup` compares with another one, and `LOOPD_LOSETUP_RECORD=1` records its
//! answers again.

mod differences;
mod recording;
mod script;
mod scripts;

use anyhow::{Result, bail, ensure};
use loopd_tests::fixture::Fixture;
use loopd_tests::image::Image;
use loopd_tests::polkit::{Answer as Says, Setup};
use loopd_tests::sysfs::{self, LoopDevice};
use loopd_tests::{GAMES, Outcome, ROOT, User, skip};

use self::differences::Difference;
use self::recording::Recording;
use self::script::{Answer, Script, Side, Stage, ours, theirs, version};

loopd_tests::tests! {
    "losetup";
    Setup::None => [
        answers_match_util_linux,
        answers_for_all_devices_match_util_linux,
        answers_for_devices_of_util_linux_match,
        answers_match_the_recording,
        version_and_help_are_printed,
        busy_detach_names_the_holders,
        subcommand_matches_the_link,
        missing_daemon_is_reported,
    ];
    Setup::StandIn(Says::Yes) => [authorized_user_matches_root, authorized_user_manages_devices_of_util_linux];
    Setup::Real => [polkitd_authorizes_a_user];
    Setup::StandIn(Says::No) => [denied_user_matches_an_unprivileged_user];
}

/// The reference version.
const REFERENCE: (u32, u32) = (2, 42);

/// The result of a comparison.
#[derive(Debug, Default)]
struct Verdict {
    same: usize,
    meant: usize,
    older: usize,
    wrong: Vec<String>,
}

impl Verdict {
    fn compare(
        &mut self,
        stage: &Stage,
        script: &Script,
        (theirs, version): (&Answer, (u32, u32)),
        ours: &Answer,
        recording: &Recording,
    ) {
        let difference = differences::all().find(|one| (one.script, one.line) == (script.name, ours.line));
        let is_recorded = |answer: &Answer| recording.has(stage, script, answer);
        match difference {
            Some(Difference { part, since, .. }) if version >= since => {
                if part.differs(theirs, ours) {
                    self.meant += 1;
                } else {
                    self.wrong(script, theirs, ours, "should differ, and in nothing but what is listed");
                }
            }
            _ if theirs == ours => self.same += 1,
            Some(_) => self.older += 1,
            // Recordings have no column widths, which older versions compute differently without headings.
            None if version < REFERENCE && (!is_recorded(theirs) || has_no_headings(ours.line)) => {
                if is_recorded(ours) {
                    self.older += 1;
                } else {
                    self.wrong(script, theirs, ours, "theirs is older, and ours is not as recorded");
                }
            }
            None => self.wrong(script, theirs, ours, "should be the same"),
        }
    }

    fn wrong(&mut self, script: &Script, theirs: &Answer, ours: &Answer, why: &str) {
        self.wrong.push(format!("{}: losetup {}: {why}\n  {theirs:?}\n  {ours:?}", script.name, ours.line));
    }

    fn end(self, version: (u32, u32)) -> Outcome {
        println!(
            "losetup {}.{}: {} lines the same, {} differ as meant, {} held to the recorded {}.{}",
            version.0, version.1, self.same, self.meant, self.older, REFERENCE.0, REFERENCE.1
        );
        ensure!(self.wrong.is_empty(), "{}", self.wrong.join("\n"));
        Ok(())
    }
}

fn has_no_headings(line: &str) -> bool {
    line.split(' ').any(|word| word.starts_with("-n"))
}

/// Runs the scripts with both, and compares.
async fn compare(fixture: &Fixture, scripts: impl IntoIterator<Item = &Script>, user: User) -> Outcome {
    let stage = Stage::new(fixture)?;
    let (theirs, ours) = (theirs(ROOT), ours(fixture, user)?);
    let version = version(&theirs).await?;
    let recording = Recording::read()?;
    let mut verdict = Verdict::default();
    for script in scripts {
        let expected = shown(&stage, stage.play(fixture, script, &theirs).await?);
        let found = shown(&stage, stage.play(fixture, script, &ours).await?);
        for (theirs, ours) in expected.iter().zip(&found) {
            verdict.compare(&stage, script, (theirs, version), ours, &recording);
        }
    }
    verdict.end(version)
}

/// The answers, without the numbers that the kernel chooses.
fn shown(stage: &Stage, answers: Vec<Answer>) -> Vec<Answer> {
    let shown = |answer: Answer| Answer {
        stdout: stage.anonymous(&answer.stdout),
        stderr: stage.anonymous(&answer.stderr),
        ..answer
    };
    answers.into_iter().map(shown).collect()
}

async fn answers_match_util_linux(fixture: &mut Fixture) -> Outcome {
    let lines: usize = scripts::SCRIPTS.iter().map(|script| script.commands().count()).sum();
    ensure!(lines >= 120, "only {lines} command lines");
    compare(fixture, scripts::SCRIPTS.iter().chain(scripts::ROOTS), ROOT).await
}

/// Skips the test if other programs have loop devices: these would be listed and detached.
fn needs_the_machine(fixture: &Fixture) -> Result<()> {
    let bound = sysfs::all().into_iter().filter(|device| device.bound());
    let others: Vec<String> = bound.map(LoopDevice::node).collect();
    ensure!(sysfs::bound_by_tests(&fixture.directory).is_empty());
    if others.is_empty() { Ok(()) } else { skip(format!("others have loop devices: {others:?}")) }
}

async fn answers_for_all_devices_match_util_linux(fixture: &mut Fixture) -> Outcome {
    needs_the_machine(fixture)?;
    compare(fixture, scripts::WHOLE_MACHINE, ROOT).await
}

/// Compares with the recording, independent of the machine's losetup.
async fn answers_match_the_recording(fixture: &mut Fixture) -> Outcome {
    let stage = Stage::new(fixture)?;
    if std::env::var_os("LOOPD_LOSETUP_RECORD").is_some() {
        return record(fixture, &stage).await;
    }
    let (recording, ours) = (Recording::read()?, ours(fixture, ROOT)?);
    let mut wrong = Vec::new();
    for script in scripts::SCRIPTS {
        for answer in shown(&stage, stage.play(fixture, script, &ours).await?) {
            let is_meant = differences::all().any(|one| (one.script, one.line) == (script.name, answer.line));
            if is_meant == recording.has(&stage, script, &answer) {
                let expected = recording.of(script, &answer);
                wrong.push(format!("{}: {answer:?}\n  recorded {expected:?}", script.name));
            }
        }
    }
    ensure!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

async fn record(fixture: &Fixture, stage: &Stage) -> Outcome {
    let theirs = theirs(ROOT);
    let version = version(&theirs).await?;
    ensure!(version == REFERENCE, "{version:?} is not the reference");
    needs_the_machine(fixture)?;
    let mut recording = Recording::default();
    for script in scripts::SCRIPTS.iter().chain(scripts::ROOTS).chain(scripts::WHOLE_MACHINE) {
        for answer in shown(stage, stage.play(fixture, script, &theirs).await?) {
            recording.add(stage, script, &answer);
        }
    }
    for (scripts, user) in [(scripts::DENIED, GAMES), (scripts::BESIDE_THEIRS, ROOT)] {
        for script in scripts {
            for answer in play_beside_root(fixture, stage, script, &self::theirs(user)).await? {
                recording.add(stage, script, &answer);
            }
        }
    }
    recording.write()
}

async fn version_and_help_are_printed(fixture: &mut Fixture) -> Outcome {
    let (stage, ours) = (Stage::new(fixture)?, ours(fixture, ROOT)?);
    let script = Script { name: "who it is", lines: "-V\n--version\n-h\n--help\n-V -x\n-hx\n-d $A --help" };
    for answer in stage.play(fixture, &script, &ours).await? {
        ensure!(answer.status == 0 && answer.stderr.is_empty(), "{answer:?}");
        let is_version = answer.line.to_lowercase().starts_with("-v") || answer.line == "--version";
        let word = if is_version { "losetup from util-linux 2.42" } else { "--nooverlap" };
        ensure!(answer.stdout.contains(word), "{answer:?}");
    }
    Ok(())
}

async fn busy_detach_names_the_holders(fixture: &mut Fixture) -> Outcome {
    let (stage, ours) = (Stage::new(fixture)?, ours(fixture, ROOT)?);
    let image = Image::ext4(&fixture.directory, "ext4", "", "11111111-2222-3333-4444-00000000001f").await?;
    let lines = format!("$A {}\n!mount $A $D/mount\n-d $A\n!umount $D/mount\n$A", image.name());
    let script = Script { name: "who holds it", lines: lines.leak() };
    let answers = stage.play(fixture, &script, &ours).await?;
    let [_, detached, gone] = answers.as_slice() else { bail!("{answers:?}") };
    let output = stage.anonymous(&detached.stderr);
    ensure!(detached.status == 0 && detached.stdout.is_empty(), "{detached:?}");
    assert_eq!(output, "losetup: $A: still in use (mounted on $D/mount); the last close detaches it\n");
    ensure!(gone.status == 1, "{gone:?}");
    Ok(())
}

/// `loopctl losetup …` equals the link that `make install` creates.
async fn subcommand_matches_the_link(fixture: &mut Fixture) -> Outcome {
    let stage = Stage::new(fixture)?;
    let ours = ours(fixture, ROOT)?;
    let script = Script { name: "a word", lines: "--l\n/dev/null\n-J -l nonexistent\n--help\n-f x y" };
    for answer in stage.play(fixture, &script, &ours).await? {
        let arguments = std::iter::once("losetup").chain(answer.line.split(' '));
        let output = fixture.loopctl(arguments).await?;
        let found = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
        assert_eq!(found, (answer.stdout, answer.stderr), "{}", answer.line);
        assert_eq!(output.status.code(), Some(answer.status), "{}", answer.line);
    }
    Ok(())
}

async fn missing_daemon_is_reported(fixture: &mut Fixture) -> Outcome {
    let side = ours(fixture, ROOT)?;
    if let Some(mut daemon) = fixture.take_daemon() {
        daemon.terminate().await?;
    }
    let mut command = fixture.command(&side.program);
    command.arg("-a");
    let output = loopd_tests::process::output(command).await?;
    let message = String::from_utf8(output.stderr)?;
    ensure!(output.status.code() == Some(1) && output.stdout.is_empty(), "{message}");
    ensure!(message.starts_with("losetup: ") && message.contains("systemctl start loopd"), "{message}");
    Ok(())
}

async fn authorized_user_matches_root(fixture: &mut Fixture) -> Outcome {
    compare(fixture, scripts::SCRIPTS, GAMES).await
}

/// The real polkitd, from attach to detach.
async fn polkitd_authorizes_a_user(fixture: &mut Fixture) -> Outcome {
    let script = Script {
        name: "a life",
        lines: "-f --show a.img\n-j a.img\n$A b.img\n-c $A\n-b 1024 $A\n-l $A\n-d $A",
    };
    compare(fixture, &[script], GAMES).await
}

/// A denial by polkit looks like a failure of an unprivileged user with util-linux's losetup.
async fn denied_user_matches_an_unprivileged_user(fixture: &mut Fixture) -> Outcome {
    compare_beside_root(fixture, scripts::DENIED, theirs(GAMES), GAMES).await
}

/// Devices that util-linux's losetup attached.
async fn answers_for_devices_of_util_linux_match(fixture: &mut Fixture) -> Outcome {
    compare_beside_root(fixture, scripts::BESIDE_THEIRS, theirs(ROOT), ROOT).await
}

async fn authorized_user_manages_devices_of_util_linux(fixture: &mut Fixture) -> Outcome {
    compare_beside_root(fixture, scripts::BESIDE_THEIRS, theirs(ROOT), GAMES).await
}

/// Runs the scripts with both as this user, while root has devices.
async fn compare_beside_root(fixture: &Fixture, scripts: &[Script], theirs: Side, user: User) -> Outcome {
    let stage = Stage::new(fixture)?;
    let ours = ours(fixture, user)?;
    let version = version(&theirs).await?;
    let recording = Recording::read()?;
    let mut verdict = Verdict::default();
    for script in scripts {
        let expected = play_beside_root(fixture, &stage, script, &theirs).await?;
        let found = play_beside_root(fixture, &stage, script, &ours).await?;
        for (theirs, ours) in expected.iter().zip(&found) {
            verdict.compare(&stage, script, (theirs, version), ours, &recording);
        }
    }
    verdict.end(version)
}

/// Runs a script with `$A` and `$B` attached by root.
async fn play_beside_root(
    fixture: &Fixture,
    stage: &Stage,
    script: &Script,
    side: &Side,
) -> Result<Vec<Answer>> {
    let roots = Script { name: "what root has", lines: "$A a.img\n$B b.img" };
    stage.lay_out()?;
    stage.perform(fixture, &roots, &theirs(ROOT)).await?;
    let answers = stage.perform(fixture, script, side).await;
    stage.clear(fixture).await?;
    Ok(shown(stage, answers?))
}
