//! A stand-in for the service manager: receives notifications (`sd_notify(3)`), stores descriptors, and
//! passes them to the next start.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use anyhow::Result;
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

/// The service manager; closes its descriptors when dropped.
#[derive(Debug)]
pub struct ServiceManager {
    path: PathBuf,
    heard: Arc<Mutex<Heard>>,
}

#[derive(Debug, Default)]
struct Heard {
    store: Vec<(String, OwnedFd)>,
    lines: Vec<String>,
    stopped: bool,
}

impl ServiceManager {
    /// Listens on a socket in the directory.
    ///
    /// # Errors
    /// It cannot.
    pub fn start(directory: &Path) -> Result<Self> {
        let path = directory.join("notify");
        let socket = UnixDatagram::bind(&path)?;
        socket.set_read_timeout(Some(Duration::from_millis(20)))?;
        let heard = Arc::new(Mutex::new(Heard::default()));
        let hearing = Arc::clone(&heard);
        std::thread::spawn(move || {
            while !lock(&hearing).stopped {
                if let Ok((text, descriptors)) = receive(&socket) {
                    lock(&hearing).hear(&text, descriptors);
                }
            }
        });
        Ok(Self { path, heard })
    }

    /// The environment of a service.
    #[must_use]
    pub fn environment(&self) -> Vec<(&str, &str)> {
        vec![("NOTIFY_SOCKET", self.path.to_str().unwrap_or_default())]
    }

    /// A command that executes its arguments with the stored descriptors.
    #[must_use]
    pub fn wrapper(&self) -> Vec<String> {
        let heard = lock(&self.heard);
        let opened = heard.store.iter().enumerate().map(|(index, (_, descriptor))| {
            format!("{}</proc/{}/fd/{}", index + 3, std::process::id(), descriptor.as_raw_fd())
        });
        let opened: Vec<_> = opened.collect();
        let names: Vec<_> = heard.store.iter().map(|(name, _)| name.as_str()).collect();
        let script = match names.len() {
            0 => r#"exec "$@""#.to_owned(),
            count => format!(
                r#"exec {}; LISTEN_PID=$$ LISTEN_FDS={count} LISTEN_FDNAMES={} exec "$@""#,
                opened.join(" "),
                names.join(":")
            ),
        };
        ["bash", "-c", &script, "start"].map(str::to_owned).to_vec()
    }

    /// The names of the stored descriptors.
    #[must_use]
    pub fn kept(&self) -> Vec<String> {
        lock(&self.heard).store.iter().map(|(name, _)| name.clone()).collect()
    }

    /// Adds a descriptor to the store.
    pub fn plant(&self, name: &str, descriptor: OwnedFd) {
        lock(&self.heard).store.push((name.to_owned(), descriptor));
    }

    /// Closes all stored descriptors, as at a stop of the service.
    pub fn forget(&self) {
        lock(&self.heard).store.clear();
    }

    /// How often it has received this line.
    #[must_use]
    pub fn heard(&self, line: &str) -> usize {
        lock(&self.heard).lines.iter().filter(|heard| *heard == line).count()
    }
}

impl Drop for ServiceManager {
    fn drop(&mut self) {
        let mut heard = lock(&self.heard);
        heard.stopped = true;
        heard.store.clear();
    }
}

impl Heard {
    fn hear(&mut self, text: &str, descriptors: Vec<OwnedFd>) {
        let has = |wanted: &str| text.lines().any(|line| line == wanted);
        let name = text.lines().find_map(|line| line.strip_prefix("FDNAME=")).unwrap_or("stored");
        if has("FDSTORE=1") {
            self.store.extend(descriptors.into_iter().map(|descriptor| (name.to_owned(), descriptor)));
        } else if has("FDSTOREREMOVE=1") {
            self.store.retain(|(kept, _)| kept != name);
        }
        // The descriptor of a BARRIER=1 is closed here.
        self.lines.extend(text.lines().map(str::to_owned));
    }
}

fn lock(heard: &Mutex<Heard>) -> MutexGuard<'_, Heard> {
    heard.lock().unwrap_or_else(PoisonError::into_inner)
}

fn receive(socket: &UnixDatagram) -> Result<(String, Vec<OwnedFd>)> {
    let mut text = [0; 4096];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let received =
        recvmsg(socket, &mut [IoSliceMut::new(&mut text)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(passed) = message {
            descriptors.extend(passed);
        }
    }
    Ok((String::from_utf8_lossy(&text[..received.bytes]).into_owned(), descriptors))
}
