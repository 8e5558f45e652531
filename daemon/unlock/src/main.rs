//! The program `loopd-unlock`. loopd starts it, with a socket as standard input.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::process::ExitCode;

use loopd_unlock::{channel, find_cryptsetup, serve};
use rustix::mm::{MlockAllFlags, mlockall};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};

fn main() -> ExitCode {
    let served = protect_memory().and_then(|()| connect()).and_then(|loopd| {
        let cryptsetup = find_cryptsetup();
        serve(&loopd, cryptsetup.as_deref())
    });
    match served {
        // Ends a thread whose read from a caller's descriptor hangs.
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("loopd-unlock: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Keeps secrets out of swap and out of core dumps, and this process from being traced.
fn protect_memory() -> io::Result<()> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT)?;
    Ok(())
}

/// Sends loopd one end of a new pair of sockets over standard input, and returns the other end.
fn connect() -> io::Result<OwnedFd> {
    let (ours, theirs) = channel::pair()?;
    channel::send(io::stdin(), "ready", &[theirs.as_fd()])?;
    Ok(ours)
}
