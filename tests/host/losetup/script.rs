//! Command lines of losetup, run in sequence on devices that no other program uses.
//!
//! A line has the arguments of `losetup`. `$A` and `$B` are two devices that are free when the script starts, `$C`
//! is one that does not exist, `$D` is the directory of the script's files, and quotes protect blanks. A line that
//! starts with `!` is an action between two command lines.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::Mutex;

use anyhow::{Context as _, Result, bail, ensure};
use loopd_tests::fixture::Fixture;
use loopd_tests::process::{eventually, output, run};
use loopd_tests::sysfs::{self, LoopDevice};
use loopd_tests::{User, loop_ioctl};

/// Lines that belong together.
pub struct Script {
    /// Their subject.
    pub name: &'static str,
    /// The lines, separated by newlines.
    pub lines: &'static str,
}

impl Script {
    /// The lines, without those that are empty.
    pub fn lines(&self) -> impl Iterator<Item = &'static str> {
        self.lines.lines().map(str::trim).filter(|line| !line.is_empty())
    }

    /// The command lines.
    pub fn commands(&self) -> impl Iterator<Item = &'static str> {
        self.lines().filter(|line| !line.starts_with('!'))
    }
}

/// A losetup program and its user.
pub struct Side {
    /// The program.
    pub program: PathBuf,
    /// The user.
    pub user: User,
}

/// The answer to a command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The position of its command line in the script, from 0.
    pub place: usize,
    /// The command line.
    pub line: &'static str,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
    /// Exit status; -1 if a signal ended it.
    pub status: i32,
}

impl Answer {
    fn new(place: usize, line: &'static str, output: &Output) -> Self {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (stdout, stderr) = (text(&output.stdout), text(&output.stderr));
        Self { place, line, stdout, stderr, status: output.status.code().unwrap_or(-1) }
    }
}

/// The devices and files on which scripts are run in sequence.
pub struct Stage {
    directory: PathBuf,
    devices: [LoopDevice; 3],
    /// All inodes that the files have had.
    inodes: Mutex<BTreeSet<u64>>,
}

impl Stage {
    /// In the fixture's directory, with unused numbers.
    pub fn new(fixture: &Fixture) -> Result<Self> {
        let directory = fixture.directory.join("files");
        std::fs::create_dir(&directory)?;
        open_to_all(&directory)?;
        let used = sysfs::all();
        let mut free = (700..).map(LoopDevice).filter(|device| !used.contains(device));
        let mut next = || free.next().context("no number");
        let devices = [next()?, next()?, next()?];
        Ok(Self { directory, devices, inodes: Mutex::default() })
    }

    /// Runs the script; detaches its attachments at the end.
    pub async fn play(&self, fixture: &Fixture, script: &Script, side: &Side) -> Result<Vec<Answer>> {
        self.lay_out()?;
        let answers = self.perform(fixture, script, side).await;
        self.clear(fixture).await.with_context(|| script.name)?;
        answers
    }

    /// Runs the script with the current devices, and keeps their state.
    pub async fn perform(&self, fixture: &Fixture, script: &Script, side: &Side) -> Result<Vec<Answer>> {
        let mut held = Vec::new();
        let mut answers = Vec::new();
        for line in script.lines() {
            let played = match line.strip_prefix('!') {
                Some(arguments) => self.act(arguments, &mut held).await,
                None => {
                    let output = self.command(fixture, line, side).await;
                    output.map(|output| answers.push(Answer::new(answers.len(), line, &output)))
                }
            };
            played.with_context(|| format!("{}: {line}", script.name))?;
        }
        Ok(answers)
    }

    async fn command(&self, fixture: &Fixture, line: &str, side: &Side) -> Result<Output> {
        let mut command = fixture.command(&side.program);
        command
            .arg0("losetup")
            .args(self.arguments(line))
            .current_dir(&self.directory)
            .env("LC_ALL", "C.UTF-8");
        if side.user != loopd_tests::ROOT {
            command.uid(side.user.uid).gid(side.user.gid);
        }
        let output = output(command).await?;
        // The next line sees a detach only after udev has closed the device.
        run("udevadm", ["settle"]).await?;
        Ok(output)
    }

    /// An action between two command lines.
    async fn act(&self, arguments: &str, held: &mut Vec<File>) -> Result<()> {
        let arguments = self.arguments(arguments);
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        match arguments.as_slice() {
            // Another program opens the device, and keeps it open.
            ["open", device] => {
                // For a moment after a detach the device has no medium.
                eventually("it can be opened", async || Ok(File::open(device).is_ok())).await?;
                held.push(File::open(device)?);
            }
            // That program closes all its devices.
            ["close"] => held.clear(),
            ["mount", device, directory] => drop(run("mount", [device, directory]).await?),
            ["umount", directory] => drop(run("umount", [directory]).await?),
            ["size", bytes, file] => {
                File::options().write(true).open(self.directory.join(file))?.set_len(bytes.parse()?)?;
            }
            ["remove", file] => std::fs::remove_file(self.directory.join(file))?,
            other => bail!("no such action: {other:?}"),
        }
        run("udevadm", ["settle"]).await.map(drop)
    }

    fn arguments(&self, line: &str) -> Vec<String> {
        let [first, second, missing] = self.devices.map(LoopDevice::node);
        let line = line.replace("$A", &first).replace("$B", &second).replace("$C", &missing);
        split(&line.replace("$D", &self.directory.to_string_lossy()))
    }

    /// Creates the devices and files of every script; existing files keep their inodes.
    pub fn lay_out(&self) -> Result<()> {
        let control = loop_ioctl::control()?;
        for device in &self.devices[..2] {
            loop_ioctl::add(&control, *device)?;
        }
        self.lay_out_files()
    }

    fn lay_out_files(&self) -> Result<()> {
        const MIB: u64 = 1 << 20;
        for (name, size, mode) in [
            ("a.img", MIB, 0o666),
            ("b.img", MIB, 0o666),
            ("sp ace.img", MIB, 0o666),
            ("l\u{f6}sch\tb\\x41.img", MIB, 0o666),
            ("empty.img", 0, 0o666),
            ("tiny.img", 100, 0o666),
            ("odd.img", 1000, 0o666),
            ("read-only.img", MIB, 0o444),
            ("secret.img", MIB, 0o600),
        ] {
            let path = self.directory.join(name);
            let file = File::options().write(true).create(true).truncate(false).open(&path)?;
            file.set_len(size)?;
            self.inodes.lock().unwrap().insert(file.metadata()?.ino());
            std::fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(mode))?;
        }
        let fifo = self.directory.join("fifo");
        if !fifo.exists() {
            nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::from_bits_truncate(0o666))?;
            std::fs::create_dir(self.directory.join("directory"))?;
            std::fs::create_dir(self.directory.join("mount"))?;
            std::os::unix::fs::symlink("a.img", self.directory.join("link.img"))?;
        }
        Ok(())
    }

    /// Detaches the attachments of the script, and removes its devices.
    pub async fn clear(&self, fixture: &Fixture) -> Result<()> {
        for device in sysfs::bound_by_tests(&self.directory) {
            let node = File::open(device.node())?;
            let _ = loop_ioctl::clear(&node);
        }
        eventually("what was attached is gone", async || {
            Ok(sysfs::bound_by_tests(&self.directory).is_empty())
        })
        .await?;
        eventually("loopd has seen it go", async || {
            let listed = fixture.list(true).await?;
            let is_ours = |number: u32| self.devices.contains(&LoopDevice(number));
            let numbers = listed.iter().filter_map(|(_, properties)| properties.get("Number"));
            Ok(!numbers.filter_map(|number| u32::try_from(number).ok()).any(is_ours))
        })
        .await?;
        let control = loop_ioctl::control()?;
        for device in self.devices {
            // loopd itself removes a number that it created for a failed attach.
            eventually("its number is taken away", async || {
                Ok(!Path::new(&device.node()).exists() || loop_ioctl::remove(&control, device).is_ok())
            })
            .await?;
        }
        Ok(())
    }

    /// Numbers that depend on the machine or the run, with names for them.
    pub fn names_of_numbers(&self) -> Vec<(String, &'static str)> {
        let device = std::fs::metadata(&self.directory).map(|directory| directory.dev()).unwrap_or_default();
        let (major, minor) = (nix::sys::stat::major(device), nix::sys::stat::minor(device));
        let inodes = self.inodes.lock().unwrap().iter().map(|inode| (inode.to_string(), "INODE")).collect();
        let mut names: Vec<_> = inodes;
        names.extend([(format!("{major}:{minor}"), "MAJOR:MINOR"), (device.to_string(), "DEVICE")]);
        names.extend(self.devices.map(|device| (device.0.to_string(), "NUMBER")));
        names
    }

    /// The text without what changes between runs: replaces the directory, the devices, the inodes, and the numbers
    /// of other loop devices, which the kernel chooses.
    pub fn anonymous(&self, text: &str) -> String {
        let [first, second, missing] = self.devices;
        let mut text = text.replace(&*self.directory.to_string_lossy(), "$D");
        for inode in self.inodes.lock().unwrap().iter() {
            // Only in the old line format: in a table it would change column widths.
            text = text.replace(&format!("]:{inode} ("), "]:INODE (");
        }
        let mut shown = String::new();
        let mut rest = text.as_str();
        while let Some((before, behind)) = rest.split_once("/dev/loop") {
            let digits = behind.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(behind.len());
            let device = behind[..digits].parse().ok().map(LoopDevice);
            shown.push_str(before);
            shown.push_str(&match device {
                Some(device) if device == first => "$A".to_owned(),
                Some(device) if device == second => "$B".to_owned(),
                Some(device) if device == missing => "$C".to_owned(),
                Some(device) if sysfs::all().contains(&device) => "/dev/loop#".to_owned(),
                _ => format!("/dev/loop{}", &behind[..digits]),
            });
            rest = &behind[digits..];
        }
        shown + rest
    }
}

/// A program under losetup's name that every user can run.
pub fn ours(fixture: &Fixture, user: User) -> Result<Side> {
    let program = fixture.directory.join("losetup");
    if !program.exists() {
        let loopctl = fixture.tool(user, "loopctl")?;
        std::os::unix::fs::symlink(loopctl.get_program(), &program)?;
    }
    Ok(Side { program, user })
}

/// The losetup to compare with.
pub fn theirs(user: User) -> Side {
    let program = std::env::var_os("LOOPD_LOSETUP").unwrap_or_else(|| "losetup".into());
    Side { program: program.into(), user }
}

/// Its version.
pub async fn version(side: &Side) -> Result<(u32, u32)> {
    let mut command = Command::new(&side.program);
    command.arg("--version");
    let text = String::from_utf8(output(command).await?.stdout)?;
    let numbers = text.rsplit(' ').next().unwrap_or_default().split('.').map(|part| part.trim().parse());
    let numbers: Vec<u32> = numbers.map_while(Result::ok).collect();
    ensure!(numbers.len() >= 2, "no version in {text:?}");
    Ok((numbers[0], numbers[1]))
}

fn open_to_all(directory: &Path) -> Result<()> {
    Ok(std::fs::set_permissions(directory, std::os::unix::fs::PermissionsExt::from_mode(0o777))?)
}

/// Words between blanks; single quotes keep a word with blanks, or an empty one, together.
fn split(line: &str) -> Vec<String> {
    let mut arguments = Vec::new();
    let mut word: Option<String> = None;
    let mut is_quoted = false;
    for letter in line.chars() {
        match letter {
            '\'' => {
                is_quoted = !is_quoted;
                word.get_or_insert_default();
            }
            ' ' if !is_quoted => arguments.extend(word.take()),
            letter => word.get_or_insert_default().push(letter),
        }
    }
    arguments.extend(word);
    arguments
}
