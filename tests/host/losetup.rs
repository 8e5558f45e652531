//! losetup's name and words, against util-linux's losetup.
//!
//! Both run the same command lines on fresh devices. util-linux 2.42 is the reference: where the
//! machine's losetup is older and answers otherwise than `losetup/util-linux-2.42.txt` has it, ours is
//! held to that recording. `LOOPD_LOSETUP=/path/to/losetup` compares with another one, and
//! `LOOPD_LOSETUP_RECORD=1` makes the recording anew from it.

mod differences;
mod recording;
mod script;
mod scripts;

use anyhow::{Result, bail, ensure};
use loopd_tests::image::Image;
use loopd_tests::polkit::{Answer as Says, Setup};
use loopd_tests::sysfs::{self, LoopDevice};
use loopd_tests::world::World;
use loopd_tests::{GAMES, Outcome, ROOT, User, skip};

use self::differences::Difference;
use self::recording::Recording;
use self::script::{Answer, Script, Side, Stage, ours, theirs, version};

loopd_tests::tests! {
    "losetup";
    Setup::None => [
        is_like_theirs,
        is_like_theirs_on_the_whole_machine,
        is_like_theirs_on_their_devices,
        is_as_recorded,
        says_who_it_is,
        says_what_holds_a_device,
        as_a_word_of_loopctl,
        daemon_not_running,
    ];
    Setup::StandIn(Says::Yes) => [user_with_a_yes_is_like_root, user_with_a_yes_has_their_devices];
    Setup::Real => [polkits_yes];
    Setup::StandIn(Says::No) => [user_with_a_no_is_like_any_user];
}

/// The version whose answers ours gives.
const REFERENCE: (u32, u32) = (2, 42);

/// What a comparison found.
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
            // Recordings do not tell widths, which older versions reckon otherwise without headings.
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

/// Plays the scripts through both, and compares.
async fn compare(world: &World, scripts: impl IntoIterator<Item = &Script>, user: User) -> Outcome {
    let stage = Stage::new(world)?;
    let (theirs, ours) = (theirs(ROOT), ours(world, user)?);
    let version = version(&theirs).await?;
    let recording = Recording::read()?;
    let mut verdict = Verdict::default();
    for script in scripts {
        let expected = shown(&stage, stage.play(world, script, &theirs).await?);
        let found = shown(&stage, stage.play(world, script, &ours).await?);
        for (theirs, ours) in expected.iter().zip(&found) {
            verdict.compare(&stage, script, (theirs, version), ours, &recording);
        }
    }
    verdict.end(version)
}

/// The answers, without the numbers that are the kernel's choice.
fn shown(stage: &Stage, answers: Vec<Answer>) -> Vec<Answer> {
    let shown = |answer: Answer| Answer {
        stdout: stage.anonymous(&answer.stdout),
        stderr: stage.anonymous(&answer.stderr),
        ..answer
    };
    answers.into_iter().map(shown).collect()
}

async fn is_like_theirs(world: &mut World) -> Outcome {
    let lines: usize = scripts::SCRIPTS.iter().map(|script| script.commands().count()).sum();
    ensure!(lines >= 120, "only {lines} command lines");
    compare(world, scripts::SCRIPTS.iter().chain(scripts::ROOTS), ROOT).await
}

/// Where somebody else has a loop device, what is listed is not ours to say, nor is it to detach.
fn needs_the_machine(world: &World) -> Result<()> {
    let bound = sysfs::all().into_iter().filter(|device| device.bound());
    let others: Vec<String> = bound.map(LoopDevice::node).collect();
    ensure!(sysfs::bound_by_tests(&world.folder).is_empty());
    if others.is_empty() { Ok(()) } else { skip(format!("others have loop devices: {others:?}")) }
}

async fn is_like_theirs_on_the_whole_machine(world: &mut World) -> Outcome {
    needs_the_machine(world)?;
    compare(world, scripts::WHOLE_MACHINE, ROOT).await
}

/// The recording, whatever losetup the machine has.
async fn is_as_recorded(world: &mut World) -> Outcome {
    let stage = Stage::new(world)?;
    if std::env::var_os("LOOPD_LOSETUP_RECORD").is_some() {
        return record(world, &stage).await;
    }
    let (recording, ours) = (Recording::read()?, ours(world, ROOT)?);
    let mut wrong = Vec::new();
    for script in scripts::SCRIPTS {
        for answer in shown(&stage, stage.play(world, script, &ours).await?) {
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

async fn record(world: &World, stage: &Stage) -> Outcome {
    let theirs = theirs(ROOT);
    let version = version(&theirs).await?;
    ensure!(version == REFERENCE, "{version:?} is not the reference");
    needs_the_machine(world)?;
    let mut recording = Recording::default();
    for script in scripts::SCRIPTS.iter().chain(scripts::ROOTS).chain(scripts::WHOLE_MACHINE) {
        for answer in shown(stage, stage.play(world, script, &theirs).await?) {
            recording.add(stage, script, &answer);
        }
    }
    for (scripts, user) in [(scripts::DENIED, GAMES), (scripts::BESIDE_THEIRS, ROOT)] {
        for script in scripts {
            for answer in play_beside_root(world, stage, script, &self::theirs(user)).await? {
                recording.add(stage, script, &answer);
            }
        }
    }
    recording.write()
}

async fn says_who_it_is(world: &mut World) -> Outcome {
    let (stage, ours) = (Stage::new(world)?, ours(world, ROOT)?);
    let script = Script { name: "who it is", lines: "-V\n--version\n-h\n--help\n-V -x\n-hx\n-d $A --help" };
    for answer in stage.play(world, &script, &ours).await? {
        ensure!(answer.status == 0 && answer.stderr.is_empty(), "{answer:?}");
        let is_version = answer.line.to_lowercase().starts_with("-v") || answer.line == "--version";
        let word = if is_version { "losetup from util-linux 2.42" } else { "--nooverlap" };
        ensure!(answer.stdout.contains(word), "{answer:?}");
    }
    Ok(())
}

async fn says_what_holds_a_device(world: &mut World) -> Outcome {
    let (stage, ours) = (Stage::new(world)?, ours(world, ROOT)?);
    let image = Image::ext4(&world.folder, "ext4", "", "11111111-2222-3333-4444-00000000001f").await?;
    let lines = format!("$A {}\n!mount $A $D/mount\n-d $A\n!umount $D/mount\n$A", image.name());
    let script = Script { name: "who holds it", lines: lines.leak() };
    let answers = stage.play(world, &script, &ours).await?;
    let [_, detached, gone] = answers.as_slice() else { bail!("{answers:?}") };
    let said = stage.anonymous(&detached.stderr);
    ensure!(detached.status == 0 && detached.stdout.is_empty(), "{detached:?}");
    assert_eq!(said, "losetup: $A: still in use (mounted on $D/mount); the last close detaches it\n");
    ensure!(gone.status == 1, "{gone:?}");
    Ok(())
}

/// `loopctl losetup …` is the same, and `make install` links the other.
async fn as_a_word_of_loopctl(world: &mut World) -> Outcome {
    let stage = Stage::new(world)?;
    let ours = ours(world, ROOT)?;
    let script = Script { name: "a word", lines: "--l\n/dev/null\n-J -l nonexistent\n--help\n-f x y" };
    for answer in stage.play(world, &script, &ours).await? {
        let words = std::iter::once("losetup").chain(answer.line.split(' '));
        let output = world.loopctl(words).await?;
        let found = (String::from_utf8(output.stdout)?, String::from_utf8(output.stderr)?);
        assert_eq!(found, (answer.stdout, answer.stderr), "{}", answer.line);
        assert_eq!(output.status.code(), Some(answer.status), "{}", answer.line);
    }
    Ok(())
}

async fn daemon_not_running(world: &mut World) -> Outcome {
    let side = ours(world, ROOT)?;
    if let Some(mut daemon) = world.take_daemon() {
        daemon.terminate().await?;
    }
    let mut command = world.command(&side.program);
    command.arg("-a");
    let output = loopd_tests::process::output(command).await?;
    let said = String::from_utf8(output.stderr)?;
    ensure!(output.status.code() == Some(1) && output.stdout.is_empty(), "{said}");
    ensure!(said.starts_with("losetup: ") && said.contains("systemctl start loopd"), "{said}");
    Ok(())
}

async fn user_with_a_yes_is_like_root(world: &mut World) -> Outcome {
    compare(world, scripts::SCRIPTS, GAMES).await
}

/// polkitd itself, for the life of one device.
async fn polkits_yes(world: &mut World) -> Outcome {
    let script = Script {
        name: "a life",
        lines: "-f --show a.img\n-j a.img\n$A b.img\n-c $A\n-b 1024 $A\n-l $A\n-d $A",
    };
    compare(world, &[script], GAMES).await
}

/// What polkit forbids looks as if the user had tried it without loopd.
async fn user_with_a_no_is_like_any_user(world: &mut World) -> Outcome {
    compare_beside_root(world, scripts::DENIED, theirs(GAMES), GAMES).await
}

/// What util-linux's losetup attached.
async fn is_like_theirs_on_their_devices(world: &mut World) -> Outcome {
    compare_beside_root(world, scripts::BESIDE_THEIRS, theirs(ROOT), ROOT).await
}

async fn user_with_a_yes_has_their_devices(world: &mut World) -> Outcome {
    compare_beside_root(world, scripts::BESIDE_THEIRS, theirs(ROOT), GAMES).await
}

/// Plays the scripts through theirs and through ours as this user, where root has devices.
async fn compare_beside_root(world: &World, scripts: &[Script], theirs: Side, user: User) -> Outcome {
    let stage = Stage::new(world)?;
    let ours = ours(world, user)?;
    let version = version(&theirs).await?;
    let recording = Recording::read()?;
    let mut verdict = Verdict::default();
    for script in scripts {
        let expected = play_beside_root(world, &stage, script, &theirs).await?;
        let found = play_beside_root(world, &stage, script, &ours).await?;
        for (theirs, ours) in expected.iter().zip(&found) {
            verdict.compare(&stage, script, (theirs, version), ours, &recording);
        }
    }
    verdict.end(version)
}

/// Plays a script where `$A` and `$B` are root's.
async fn play_beside_root(world: &World, stage: &Stage, script: &Script, side: &Side) -> Result<Vec<Answer>> {
    let roots = Script { name: "what root has", lines: "$A a.img\n$B b.img" };
    stage.lay_out()?;
    stage.perform(world, &roots, &theirs(ROOT)).await?;
    let answers = stage.perform(world, script, side).await;
    stage.clear(world).await?;
    Ok(shown(stage, answers?))
}
