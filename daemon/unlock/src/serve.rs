//! Handles the request of loopd.

use std::io::Result;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use loopd_common::EncryptionType;
use zeroize::Zeroizing;

use crate::channel;
use crate::cryptsetup::{Cryptsetup, Inputs, Stopped, is_tcrypt};
use crate::input::{self, Bytes, Input, Unread};
use crate::reply::{Outcome, Reply};
use crate::request::{BEGIN, Keep, OpenRequest, Request};

/// The maximum length of a secret and of a key file in bytes, as in cryptsetup.
const LONGEST_SECRET: usize = 8 << 20;
/// The maximum length of a detached header in bytes. A header is 16 MiB long, if nothing else is asked for.
const LONGEST_HEADER: usize = 64 << 20;
/// How long the inputs may take.
const INPUT_TIMEOUT: Duration = Duration::from_secs(30);
const OTHER_VERSION: &str = "loopd and loopd-unlock are not of the same version";

/// Receives the request and handles it. `cryptsetup` is the path of the program, if it is installed.
///
/// # Errors
/// The channel does not work.
pub fn serve(loopd: &OwnedFd, cryptsetup: Option<&Path>) -> Result<()> {
    let Some((text, files)) = channel::receive(loopd)? else { return Ok(()) };
    let answer = |reply: &Reply| channel::send(loopd, &reply.encode(), &[]);
    let Some(request) = Request::decode(&text) else {
        return answer(&Reply::new(Outcome::Failed, OTHER_VERSION));
    };
    let Some(program) = cryptsetup else { return answer(&Reply::new(Outcome::NoProgram, "")) };
    let cryptsetup = Cryptsetup { program, loopd: loopd.as_fd() };
    let done = match request {
        Request::Open(open) => return serve_open(loopd, &cryptsetup, &open, files),
        Request::Close(name) => cryptsetup.close(&name),
        Request::Keep(name, keep) => cryptsetup.keep(&name, keep),
    };
    match done {
        Ok(()) => answer(&Reply::done()),
        Err(Stopped::Failed(reply)) => answer(&reply),
        Err(Stopped::Abandoned) => Ok(()),
    }
}

/// Opens a volume, and closes it again if loopd does not keep it.
fn serve_open(
    loopd: &OwnedFd,
    cryptsetup: &Cryptsetup<'_>,
    request: &OpenRequest,
    files: Vec<OwnedFd>,
) -> Result<()> {
    match open(loopd, cryptsetup, request, files) {
        Ok(()) => {}
        Err(Stopped::Failed(reply)) => return channel::send(loopd, &reply.encode(), &[]),
        Err(Stopped::Abandoned) => return Ok(()),
    }
    let kept = keep(loopd, cryptsetup, &request.name);
    if !matches!(kept, Ok(true)) {
        // loopd is gone, and looks for the mapping at its next start.
        let _result = cryptsetup.undo(&request.name);
    }
    kept.map(drop)
}

/// Returns whether the mapping is kept.
fn keep(loopd: &OwnedFd, cryptsetup: &Cryptsetup<'_>, name: &str) -> Result<bool> {
    channel::send(loopd, &Reply::done().encode(), &[])?;
    let Some((text, _)) = channel::receive(loopd)? else { return Ok(false) };
    let kept = match Keep::decode(&text) {
        Some(Keep::UntilLastClose) => cryptsetup.keep(name, Keep::UntilLastClose),
        // A new mapping stays.
        Some(Keep::UntilClosed) => Ok(()),
        None => return Ok(false),
    };
    match kept {
        Ok(()) => channel::send(loopd, &Reply::done().encode(), &[]).map(|()| true),
        Err(Stopped::Failed(reply)) => channel::send(loopd, &reply.encode(), &[]).map(|()| false),
        Err(Stopped::Abandoned) => Ok(false),
    }
}

fn open(
    loopd: &OwnedFd,
    cryptsetup: &Cryptsetup<'_>,
    request: &OpenRequest,
    files: Vec<OwnedFd>,
) -> std::result::Result<(), Stopped> {
    let start = Instant::now();
    let end = start + request.timeout;
    let inputs = read_inputs(cryptsetup, request, files, end.min(start + INPUT_TIMEOUT))?;
    let left = end.saturating_duration_since(Instant::now());
    await_begin(loopd)?;
    cryptsetup.open(request, inputs, Instant::now() + left)?;
    let checked = match cryptsetup.cipher(&request.name) {
        Ok(Some(_)) => return Ok(()),
        Ok(None) => {
            let reason = "it has no cipher, so that the content is not encrypted";
            Err(Stopped::Failed(Reply::new(Outcome::UnusableHeader, reason)))
        }
        Err(stopped) => Err(stopped),
    };
    let _result = cryptsetup.undo(&request.name);
    checked
}

/// Reports that the inputs are read, and waits until loopd has checked that the volume may be opened.
fn await_begin(loopd: &OwnedFd) -> std::result::Result<(), Stopped> {
    let is_gone = |_| Stopped::Abandoned;
    channel::send(loopd, &Reply::done().encode(), &[]).map_err(is_gone)?;
    match channel::receive(loopd).map_err(is_gone)? {
        Some((text, _)) if text == BEGIN => Ok(()),
        Some(_) => Err(Stopped::Failed(Reply::new(Outcome::Failed, OTHER_VERSION))),
        None => Err(Stopped::Abandoned),
    }
}

fn read_inputs(
    cryptsetup: &Cryptsetup<'_>,
    request: &OpenRequest,
    files: Vec<OwnedFd>,
    end: Instant,
) -> std::result::Result<Inputs, Stopped> {
    let mut files = files.into_iter();
    let mut inputs = Vec::new();
    // A VeraCrypt volume may have key files and no passphrase.
    let is_required = !is_tcrypt(request.kind);
    let secret = |file| Input { what: "the secret", file, most: LONGEST_SECRET, is_required };
    inputs.extend(files.next().map(secret));
    let header = |file| Input { what: "the header", file, most: LONGEST_HEADER, is_required: true };
    if request.has_header {
        inputs.extend(files.next().map(header));
    }
    let key_file = |file| Input { what: "a key file", file, most: LONGEST_SECRET, is_required: true };
    inputs.extend(files.map(key_file));
    let read = match input::read_all(inputs, cryptsetup.loopd, end)? {
        Ok(read) => read,
        Err(Unread::Abandoned) => return Err(Stopped::Abandoned),
        Err(Unread::TimedOut) => {
            let reason = "the secret did not end in time";
            return Err(Stopped::Failed(Reply::new(Outcome::TimedOut, reason)));
        }
        Err(Unread::Invalid(reason)) => return Err(invalid(reason)),
    };
    let mut read = read.into_iter();
    let secret = read.next().ok_or_else(|| invalid("there is no secret"))?;
    let header = request.has_header.then(|| read.next()).flatten();
    let key_files: Vec<Bytes> = read.collect();
    Ok(Inputs { secret: for_cryptsetup(request, secret, !key_files.is_empty())?, key_files, header })
}

/// The part of the secret that is used, as cryptsetup reads it.
fn for_cryptsetup(
    request: &OpenRequest,
    secret: Bytes,
    has_key_files: bool,
) -> std::result::Result<Bytes, Stopped> {
    let size = |size| usize::try_from(size).unwrap_or(usize::MAX);
    let start = size(request.key_offset);
    let end = if request.key_size == 0 { secret.len() } else { start.saturating_add(size(request.key_size)) };
    let Some(used) = secret.get(start..end) else {
        return Err(invalid(format!("the secret has only {} bytes", secret.len())));
    };
    if used.is_empty() && !has_key_files {
        return Err(invalid("the secret is empty"));
    }
    let mut bytes = Zeroizing::new(Vec::with_capacity(used.len() + 1));
    bytes.extend_from_slice(used);
    if is_tcrypt(request.kind) {
        if used.contains(&b'\n') {
            let kind = if request.kind == EncryptionType::TrueCrypt { "TrueCrypt" } else { "VeraCrypt" };
            return Err(invalid(format!("a passphrase of {kind} has no newline")));
        }
        bytes.push(b'\n');
    }
    Ok(bytes)
}

fn invalid(reason: impl Into<String>) -> Stopped {
    Stopped::Failed(Reply::new(Outcome::InvalidInput, reason))
}
