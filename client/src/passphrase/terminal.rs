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
    use super::*;
    use crate::passphrase::asking::{self, Asking, until};

    const PROMPT: &str = "Passphrase for x.img: ";

    /// The program of the other tests.
    #[test]
    fn child() {
        if !asking::is_child() {
            return;
        }
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        match runtime.block_on(ask(open().unwrap(), PROMPT)) {
            Ok(secret) => println!("read {}", String::from_utf8_lossy(secret.bytes())),
            Err(error) => println!("failed: {error}"),
        }
    }

    fn start() -> Asking {
        let asking = Asking::start("passphrase::terminal::tests::child");
        asking.expect(PROMPT);
        asking
    }

    #[test]
    fn a_line_is_read_and_not_shown() {
        let asking = start();
        assert!(!asking.is_shown());
        asking.type_text("secret ü\n");
        until("the echo is on again", || asking.is_shown());
        let output = asking.output();
        assert!(output.contains("read secret ü\n"), "{output}");
    }

    #[test]
    fn an_empty_line_and_the_end_are_no_passphrase() {
        for text in ["\n", "\u{4}"] {
            let asking = start();
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
            let asking = start();
            asking.type_text("sec");
            kill(asking.pid(), signal).unwrap();
            until("the echo is on again", || asking.is_shown());
            let output = asking.output();
            assert!(output.contains(&format!("failed: interrupted by signal {number}")), "{output}");
        }
    }

    #[test]
    fn a_stopped_program_leaves_the_terminal_usable() {
        let asking = start();
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
        let asking = start();
        asking.type_text("\u{3}");
        let output = asking.output();
        assert!(output.contains("interrupted by signal 2"), "{output}");
    }
}
