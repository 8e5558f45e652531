//! Asks on the terminal, without showing what is typed.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::{Arc, Mutex, MutexGuard, Once, PoisonError};

use nix::errno::Errno;
use nix::fcntl::OFlag;
use nix::libc::{SIGCONT, SIGTSTP};
use nix::sys::signal::{Signal, kill};
use nix::sys::termios::{LocalFlags, SetArg, Termios, tcgetattr, tcsetattr};
use nix::unistd::Pid;
use tokio::net::unix::pipe::Receiver;
use tokio::signal::unix::{SignalKind, signal};

use super::secret::Secret;
use crate::bus::agent::{Interrupted, interruption};
use crate::message::reason;

/// The process's own terminal, whatever standard input is.
const TERMINAL: &str = "/dev/tty";
/// What SIGQUIT adds to the signals of [`interruption`].
const QUIT: u8 = 3;

/// The process's terminal; `None` if it has none.
#[must_use]
pub fn open() -> Option<File> {
    // Not blocking: signals are handled while it waits for a line.
    let flags = OFlag::O_NONBLOCK | OFlag::O_NOCTTY;
    OpenOptions::new().read(true).write(true).custom_flags(flags.bits()).open(TERMINAL).ok()
}

/// Shows the prompt and reads a line. The terminal's settings are restored before this returns, and while the process is
/// stopped (SIGTSTP).
///
/// # Errors
/// [`Interrupted`], nothing was typed, or the terminal cannot be used.
pub async fn ask(terminal: File, prompt: &str) -> anyhow::Result<Secret> {
    let terminal = Arc::new(terminal);
    // Before the settings are changed: a signal must not leave the terminal without echo.
    let interrupted = interruption()?;
    let mut quit = signal(SignalKind::quit())?;
    handle_stops()?;
    let silence = Silence::start(Arc::clone(&terminal), prompt)?;
    let line = tokio::select! {
        line = read_line(&terminal) => line,
        signal = interrupted => Err(Interrupted(signal).into()),
        _ = quit.recv() => Err(Interrupted(QUIT).into()),
    };
    drop(silence);
    // The newline that was typed is not shown, either.
    let _ = terminal.as_ref().write_all(b"\n");
    let line = line?;
    anyhow::ensure!(!line.is_empty(), "no passphrase was typed");
    Ok(line)
}

async fn read_line(terminal: &File) -> anyhow::Result<Secret> {
    // A pipe in name only: any descriptor can be waited for.
    let terminal = Receiver::from_file_unchecked(terminal.try_clone()?)?;
    let mut line = Secret::new();
    while line.bytes().last() != Some(&b'\n') {
        terminal.readable().await?;
        match line.append_from(|space| terminal.try_read(space)) {
            // Ctrl-D.
            Ok(0) => break,
            Ok(_) => {}
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            Err(error) => anyhow::bail!("cannot read the terminal: {}", reason(&error)),
        }
    }
    line.remove_final_newline();
    Ok(line)
}

/// The terminal that does not show what is typed.
static SILENCED: Mutex<Option<Silenced>> = Mutex::new(None);

struct Silenced {
    terminal: Arc<File>,
    before: Termios,
    prompt: String,
}

impl Silenced {
    /// Hides what is typed from now on, drops what was typed before, and shows the prompt.
    fn silence(&self) -> io::Result<()> {
        let mut silent = self.before.clone();
        silent.local_flags.remove(LocalFlags::ECHO | LocalFlags::ECHONL);
        silent.local_flags.insert(LocalFlags::ICANON | LocalFlags::ISIG);
        set(&self.terminal, SetArg::TCSAFLUSH, &silent)?;
        self.terminal.as_ref().write_all(self.prompt.as_bytes())
    }

    fn restore(&self) {
        let _ = set(&self.terminal, SetArg::TCSANOW, &self.before);
    }
}

/// tcsetattr(3) in a background process is interrupted when SIGTTOU stops it.
fn set(terminal: &File, when: SetArg, settings: &Termios) -> io::Result<()> {
    loop {
        match tcsetattr(terminal, when, settings) {
            Err(Errno::EINTR) => {}
            result => return result.map_err(Into::into),
        }
    }
}

fn silenced() -> MutexGuard<'static, Option<Silenced>> {
    SILENCED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Restores the terminal's settings when it is dropped.
struct Silence;

impl Silence {
    fn start(terminal: Arc<File>, prompt: &str) -> io::Result<Self> {
        let before = tcgetattr(&terminal)?;
        let new = Silenced { terminal, before, prompt: prompt.to_owned() };
        let silence = Self;
        let mut current = silenced();
        let result = current.insert(new).silence();
        drop(current);
        result.map(|()| silence)
    }
}

impl Drop for Silence {
    fn drop(&mut self) {
        if let Some(silenced) = silenced().take() {
            silenced.restore();
        }
    }
}

/// Starts the task that stops the process at SIGTSTP with the terminal's settings restored, until the process ends: the
/// default action of a signal that was handled once does not come back.
fn handle_stops() -> io::Result<()> {
    static STARTED: Once = Once::new();
    let mut stop = signal(SignalKind::from_raw(SIGTSTP))?;
    let mut resume = signal(SignalKind::from_raw(SIGCONT))?;
    STARTED.call_once(|| {
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    Some(()) = stop.recv() => {
                        silenced().iter().for_each(Silenced::restore);
                        let _ = kill(Pid::this(), Signal::SIGSTOP);
                    }
                    // The shell may have changed the settings.
                    Some(()) = resume.recv() => silenced().iter().for_each(|silenced| drop(silenced.silence())),
                    else => return,
                }
            }
        });
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::fd::OwnedFd;
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use nix::pty::openpty;

    use super::*;

    const PROMPT: &str = "Passphrase for x.img: ";

    /// A program with a terminal of its own, on which it asks.
    struct Asking {
        child: Child,
        master: File,
        slave: OwnedFd,
    }

    impl Asking {
        fn start() -> Self {
            let pty = openpty(None, None).unwrap();
            let stdio = || Stdio::from(pty.slave.try_clone().unwrap());
            // This test program, which calls `ask` in the test named here.
            let child = Command::new("setsid")
                .args(["--ctty", "--wait"])
                .arg(std::env::current_exe().unwrap())
                .args(["--exact", "passphrase::terminal::tests::child", "--nocapture", "--ignored"])
                .stdin(stdio())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .unwrap();
            let asking = Self { child, master: pty.master.into(), slave: pty.slave };
            asking.expect(PROMPT);
            asking
        }

        /// Waits until the terminal has shown the text.
        fn expect(&self, text: &str) {
            let mut shown = Vec::new();
            while !String::from_utf8_lossy(&shown).contains(text) {
                let mut buffer = [0; 256];
                let count = (&self.master).read(&mut buffer).unwrap();
                shown.extend_from_slice(&buffer[..count]);
            }
            assert!(!String::from_utf8_lossy(&shown).contains("secret"), "{shown:?}");
        }

        fn is_shown(&self) -> bool {
            tcgetattr(&self.slave).unwrap().local_flags.contains(LocalFlags::ECHO)
        }

        fn type_text(&self, text: &str) {
            (&self.master).write_all(text.as_bytes()).unwrap();
        }

        /// The pid of the program itself, a child of setsid if that has forked.
        fn pid(&self) -> Pid {
            let setsid = self.child.id();
            let children = format!("/proc/{setsid}/task/{setsid}/children");
            let child = std::fs::read_to_string(children).unwrap_or_default();
            let pid = child.split_whitespace().next().map_or(setsid, |pid| pid.parse().unwrap());
            Pid::from_raw(i32::try_from(pid).unwrap())
        }

        fn has_state(&self, state: char) -> bool {
            let text = std::fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
            text.rsplit(") ").next().is_some_and(|rest| rest.starts_with(state))
        }

        /// What it prints after the end of the prompt.
        fn output(self) -> String {
            let output = self.child.wait_with_output().unwrap();
            String::from_utf8_lossy(&output.stdout).into_owned()
        }
    }

    fn until(what: &str, condition: impl Fn() -> bool) {
        let start = Instant::now();
        while !condition() {
            assert!(start.elapsed() < Duration::from_secs(20), "{what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    #[test]
    #[ignore = "it is the program of the other tests"]
    fn child() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let result = runtime.block_on(ask(open().unwrap(), PROMPT));
        match result {
            Ok(secret) => println!("read {}", String::from_utf8_lossy(secret.bytes())),
            Err(error) => println!("failed: {error}"),
        }
    }

    #[test]
    fn a_line_is_read_and_not_shown() {
        let asking = Asking::start();
        assert!(!asking.is_shown());
        asking.type_text("secret ü\n");
        until("the echo is on again", || asking.is_shown());
        let output = asking.output();
        assert!(output.contains("read secret ü\n"), "{output}");
    }

    #[test]
    fn an_empty_line_and_the_end_are_no_passphrase() {
        for text in ["\n", "\u{4}"] {
            let asking = Asking::start();
            asking.type_text(text);
            let output = asking.output();
            assert!(output.contains("failed: no passphrase was typed"), "{output}");
        }
    }

    #[test]
    fn signals_restore_the_terminal() {
        for (signal, number) in
            [(Signal::SIGINT, 2), (Signal::SIGTERM, 15), (Signal::SIGHUP, 1), (Signal::SIGQUIT, 3)]
        {
            let asking = Asking::start();
            asking.type_text("sec");
            kill(asking.pid(), signal).unwrap();
            until("the echo is on again", || asking.is_shown());
            let output = asking.output();
            assert!(output.contains(&format!("failed: interrupted by signal {number}")), "{output}");
        }
    }

    #[test]
    fn a_stopped_program_leaves_the_terminal_usable() {
        let asking = Asking::start();
        kill(asking.pid(), Signal::SIGTSTP).unwrap();
        until("it is stopped", || asking.has_state('T'));
        assert!(asking.is_shown());
        kill(asking.pid(), Signal::SIGCONT).unwrap();
        asking.expect(PROMPT);
        assert!(!asking.is_shown());
        asking.type_text("secret\n");
        let output = asking.output();
        assert!(output.contains("read secret\n"), "{output}");
    }

    #[test]
    fn keys_of_the_terminal_interrupt_it() {
        let asking = Asking::start();
        asking.type_text("\u{3}");
        let output = asking.output();
        assert!(output.contains("interrupted by signal 2"), "{output}");
    }
}
