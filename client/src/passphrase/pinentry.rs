//! Asks in a window, through the program `pinentry` and its protocol Assuan.
//!
//! The program's lines are bounded in length and number. A passphrase is read from the program's pipe directly into locked
//! memory, and decoded there.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use tokio::io::AsyncWriteExt;
use tokio::net::unix::pipe::{Receiver, Sender};
use tokio::process::Child;
use tokio::time::timeout;

use super::secret::Secret;
use crate::message::{printable, reason};

/// The program, which Debian's alternatives or the user's PATH choose.
const PROGRAM: &str = "pinentry";
/// The longest line of Assuan, without its end.
const LONGEST_LINE: usize = 1000;
/// How many lines one reply may have.
const MOST_LINES: usize = 1000;
/// How long a reply may take that does not wait for the user.
const REPLY: Duration = Duration::from_secs(20);
/// Codes of libgpg-error for a dialog that the user closed: canceled, fully canceled.
const CANCELED: [u32; 2] = [99, 198];
/// The code for a dialog that nobody answered.
const TIMED_OUT: u32 = 62;

/// What the window shows. Each text is in one line, without control characters.
#[derive(Clone, Copy, Debug)]
pub struct Texts<'a> {
    /// What the passphrase is for.
    pub description: &'a str,
    /// The label of the field.
    pub prompt: &'a str,
    /// What was wrong with the last passphrase.
    pub error: Option<&'a str>,
}

/// Whether windows can be shown.
#[must_use]
pub fn has_display() -> bool {
    ["WAYLAND_DISPLAY", "DISPLAY"]
        .iter()
        .any(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
}

/// Asks the user.
///
/// # Errors
/// The user canceled, entered nothing, or the program is missing or does not follow the protocol.
pub async fn ask(texts: Texts<'_>) -> anyhow::Result<Secret> {
    ask_with(Path::new(PROGRAM), texts).await
}

async fn ask_with(program: &Path, texts: Texts<'_>) -> anyhow::Result<Secret> {
    let mut pinentry = Pinentry::start(program)?;
    let answer = pinentry.ask(texts).await;
    pinentry.end().await;
    let secret = answer.map_err(explain)?;
    anyhow::ensure!(!secret.is_empty(), "no passphrase was entered");
    Ok(secret)
}

/// Why there is no passphrase.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("the line is longer than {LONGEST_LINE} bytes")]
    LongLine,
    #[error("the reply has more than {MOST_LINES} lines")]
    ManyLines,
    /// Without the reply, which may contain the passphrase.
    #[error("the reply is not one of Assuan")]
    Unexpected,
    #[error("it ended")]
    Ended,
    #[error("it did not reply within {} seconds", REPLY.as_secs())]
    Late,
    #[error("{}", reason(.0))]
    Io(#[from] io::Error),
    /// `ERR` with its code and text.
    #[error("{1} (error {0})")]
    Refused(u32, String),
}

fn explain(failure: Failure) -> anyhow::Error {
    match failure {
        Failure::Refused(code, _) if CANCELED.contains(&code) => anyhow::anyhow!("no passphrase was entered"),
        Failure::Refused(TIMED_OUT, _) => anyhow::anyhow!("no passphrase was entered in time"),
        other => anyhow::anyhow!(
            "pinentry failed: {other}; run loopctl on a terminal, or use --passphrase-file or --key-file"
        ),
    }
}

/// A running pinentry.
struct Pinentry {
    child: Child,
    commands: Sender,
    replies: Receiver,
    /// What was received after the last line. A passphrase may be in it.
    received: Secret,
}

impl Pinentry {
    fn start(program: &Path) -> anyhow::Result<Self> {
        // Pipes without the buffers of tokio's ChildStdout and ChildStdin.
        let (stdin, commands) = pipe()?;
        let (replies, stdout) = pipe()?;
        let mut command = Command::new(program);
        command.stdin(stdin).stdout(stdout).stderr(Stdio::null());
        let mut command = tokio::process::Command::from(command);
        let child = command.kill_on_drop(true).spawn().map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => anyhow::anyhow!(
                "cannot ask for the passphrase: there is no terminal, and pinentry is missing; install pinentry-gnome3 or \
                 pinentry-qt, or use --passphrase-file or --key-file"
            ),
            _ => anyhow::anyhow!("cannot start pinentry: {}", reason(&error)),
        })?;
        // The command holds the program's ends of the pipes.
        drop(command);
        let (commands, replies) = (Sender::from_owned_fd(commands)?, Receiver::from_owned_fd(replies)?);
        Ok(Self { child, commands, replies, received: Secret::new() })
    }

    async fn ask(&mut self, texts: Texts<'_>) -> Result<Secret, Failure> {
        self.prompt_reply().await?;
        self.command("SETTITLE loopctl").await?;
        self.command(&format!("SETDESC {}", encoded(texts.description))).await?;
        self.command(&format!("SETPROMPT {}", encoded(texts.prompt))).await?;
        if let Some(error) = texts.error {
            self.command(&format!("SETERROR {}", encoded(error))).await?;
        }
        self.send("GETPIN").await?;
        self.reply().await
    }

    /// Sends a command that the program answers without the user.
    async fn command(&mut self, line: &str) -> Result<(), Failure> {
        self.send(line).await?;
        self.prompt_reply().await
    }

    async fn prompt_reply(&mut self) -> Result<(), Failure> {
        timeout(REPLY, self.reply()).await.map_err(|_| Failure::Late)?.map(drop)
    }

    async fn send(&mut self, line: &str) -> Result<(), Failure> {
        let line = format!("{line}\n");
        let sent = timeout(REPLY, self.commands.write_all(line.as_bytes())).await;
        match sent.map_err(|_| Failure::Late)? {
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Err(Failure::Ended),
            result => Ok(result?),
        }
    }

    /// Reads lines up to `OK` or `ERR`; returns the data.
    async fn reply(&mut self) -> Result<Secret, Failure> {
        let mut data = Secret::new();
        for _ in 0..MOST_LINES {
            let length = self.line().await?;
            let line = &self.received.bytes()[..length];
            let (word, rest) = match line.iter().position(|byte| *byte == b' ') {
                Some(space) => (&line[..space], &line[space + 1..]),
                None => (line, &line[length..]),
            };
            let is_end = match word {
                b"OK" => true,
                b"D" => {
                    decode(rest, &mut data)?;
                    false
                }
                b"ERR" => return Err(refused(rest)),
                // Status and comments.
                b"S" | b"#" => false,
                _ if word.starts_with(b"#") => false,
                _ => return Err(Failure::Unexpected),
            };
            self.received.remove_start(length + 1);
            if is_end {
                return Ok(data);
            }
        }
        Err(Failure::ManyLines)
    }

    /// Receives until `received` starts with a line; returns its length without the newline.
    async fn line(&mut self) -> Result<usize, Failure> {
        loop {
            let bytes = self.received.bytes();
            match bytes.iter().take(LONGEST_LINE + 1).position(|byte| *byte == b'\n') {
                Some(length) => return Ok(length),
                None if bytes.len() > LONGEST_LINE => return Err(Failure::LongLine),
                None => {}
            }
            self.replies.readable().await?;
            let Self { received, replies, .. } = self;
            match received.append_from(|space| replies.try_read(space)) {
                Ok(0) => return Err(Failure::Ended),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Ends the program; one that does not end by itself is killed.
    async fn end(mut self) {
        let _ = self.send("BYE").await;
        drop(self.commands);
        if timeout(Duration::from_secs(1), self.child.wait()).await.is_err() {
            let _ = self.child.kill().await;
        }
    }
}

/// A pipe: the end to read and the end to write.
fn pipe() -> anyhow::Result<(OwnedFd, OwnedFd)> {
    Ok(nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?)
}

/// The rest of an `ERR` line: a number, whose lower 16 bits are the code, and a text.
fn refused(rest: &[u8]) -> Failure {
    let text = String::from_utf8_lossy(rest);
    let (number, text) = text.split_once(' ').unwrap_or((&text, "no reason"));
    match number.parse::<u32>() {
        Ok(number) => Failure::Refused(number & 0xffff, printable(text.as_bytes())),
        Err(_) => Failure::Unexpected,
    }
}

/// The text with the characters escaped that end or continue a line of Assuan.
fn encoded(text: &str) -> String {
    text.replace('%', "%25").replace('\r', "%0D").replace('\n', "%0A")
}

/// Appends the bytes of a `D` line, in which %XX stands for a byte.
fn decode(line: &[u8], data: &mut Secret) -> Result<(), Failure> {
    let digit = |byte: Option<&u8>| u8::try_from(char::from(*byte?).to_digit(16)?).ok();
    let mut rest = line;
    while let Some((byte, after)) = rest.split_first() {
        let (byte, after) = match (byte, digit(after.first()), digit(after.get(1))) {
            (b'%', Some(high), Some(low)) => (high << 4 | low, &after[2..]),
            (b'%', _, _) => return Err(Failure::Unexpected),
            _ => (*byte, after),
        };
        data.append(&[byte]).map_err(|_| Failure::ManyLines)?;
        rest = after;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    const TEXTS: Texts<'_> = Texts { description: "Unlock 100%.img", prompt: "Passphrase:", error: None };

    /// A pinentry of a shell script, which is sent the commands on standard input; returns its answer and the commands that
    /// it logged.
    fn answer_of(script: &str, texts: Texts<'_>) -> (Result<Vec<u8>, String>, String) {
        let directory = tempfile::tempdir().unwrap();
        let (program, log) = (directory.path().join("pinentry"), directory.path().join("log"));
        fs::write(&program, format!("#!/bin/sh\nlog='{}'\n{script}\n", log.display())).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o700)).unwrap();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let answer = loop {
            // A test that forks at the same time may hold the script open for writing for a moment.
            match runtime.block_on(ask_with(&program, texts)) {
                Err(error) if error.to_string().contains("Text file busy") => {}
                answer => break answer,
            }
        };
        let answer = answer.map(|secret| secret.bytes().to_vec()).map_err(|error| error.to_string());
        (answer, fs::read_to_string(log).unwrap_or_default())
    }

    /// A pinentry that follows the protocol and answers GETPIN like this.
    fn pin(answer: &str) -> (Result<Vec<u8>, String>, String) {
        let script = format!(
            "echo 'OK Pleased to meet you'\nwhile read -r line; do\n echo \"$line\" >> \"$log\"\n\
             case $line in GETPIN) {answer};; BYE) echo OK; exit;; *) echo OK;; esac\ndone"
        );
        answer_of(&script, TEXTS)
    }

    #[test]
    fn the_passphrase_is_decoded() {
        let (answer, commands) =
            pin("printf 'S PASSWORD_FROM_CACHE\\n# comment\\nD a%%25b%%0Ac%%c3%%BC \\nD d\\nOK\\n'");
        assert_eq!(answer.unwrap(), "a%b\ncü d".as_bytes());
        let expected = "SETTITLE loopctl\nSETDESC Unlock 100%25.img\nSETPROMPT Passphrase:\nGETPIN\nBYE\n";
        assert_eq!(commands, expected);
    }

    #[test]
    fn the_error_of_the_last_try_is_shown() {
        let texts = Texts { error: Some("wrong"), ..TEXTS };
        let script = "echo OK; while read -r line; do echo \"$line\" >> \"$log\"; echo OK; done";
        let (answer, commands) = answer_of(script, texts);
        assert_eq!(answer.unwrap_err(), "no passphrase was entered");
        assert!(commands.contains("\nSETERROR wrong\nGETPIN\n"), "{commands}");
    }

    #[test]
    fn a_canceled_dialog_is_no_passphrase() {
        for code in ["83886179 Operation cancelled <Pinentry>", "83886278 cancelled", "99"] {
            assert_eq!(pin(&format!("echo 'ERR {code}'")).0.unwrap_err(), "no passphrase was entered");
        }
        let late = pin("echo 'ERR 83886142 Timeout'").0.unwrap_err();
        assert_eq!(late, "no passphrase was entered in time");
        assert_eq!(pin("echo OK").0.unwrap_err(), "no passphrase was entered");
        let other = pin("printf 'ERR 83918950 no\\033tty\\n'").0.unwrap_err();
        assert!(
            other.starts_with("pinentry failed: no\\u{1b}tty (error 32870); run loopctl on a"),
            "{other}"
        );
    }

    #[test]
    fn hostile_replies_are_bounded() {
        let fails = |script: &str, expected: &str| {
            let error = answer_of(script, TEXTS).0.unwrap_err();
            assert!(error.starts_with(&format!("pinentry failed: {expected}")), "{error}");
        };
        fails("tr '\\0' x < /dev/zero", "the line is longer than 1000 bytes");
        fails("printf 'OK %01000d\\n' 0; cat", "the line is longer");
        fails("yes 'S x'", "the reply has more than 1000 lines");
        fails("yes '#'", "the reply has more than 1000 lines");
        fails("echo '220 mail ESMTP'; cat", "the reply is not one of Assuan; run loopctl");
        fails("printf '\\033[2J\\n'; cat", "the reply is not one of Assuan;");
        fails("echo 'ERR many errors'; cat", "the reply is not one of Assuan;");
        fails("exit 1", "it ended");
        fails("echo OK; exec <&-; exit", "it ended");
        let error = pin("echo 'D a%zz'").0.unwrap_err();
        assert!(error.contains("is not one of Assuan;"), "{error}");
        let error = pin("yes 'D 0123456789012345678901234567890123456789'").0.unwrap_err();
        assert!(error.contains("more than 1000 lines"), "{error}");
    }

    #[test]
    fn a_missing_program_is_explained() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let error = runtime.block_on(ask_with(Path::new("/nonexistent/pinentry"), TEXTS)).err().unwrap();
        let text = error.to_string();
        assert!(
            text.contains("pinentry is missing; install pinentry-gnome3") && text.contains("--key-file"),
            "{text}"
        );
    }

    #[test]
    fn the_longest_line_is_accepted() {
        let line = "x".repeat(LONGEST_LINE - 2);
        assert_eq!(pin(&format!("printf 'D {line}\\nOK\\n'")).0.unwrap(), line.as_bytes());
    }
}
