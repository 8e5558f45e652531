//! Finds which files have given paths. A path may be on a file system that never answers, and a thread that waits for
//! one cannot be killed and keeps its process alive. So a separate process looks, which can be left behind.

use std::ffi::OsStr;
use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::process::Command;

/// The name under which the process is started.
const NAME: &str = "loopctl-inspector";
/// How long all the paths together may take.
const TIMEOUT: Duration = Duration::from_secs(2);
/// How many paths are looked at.
const MOST_PATHS: usize = 4096;
/// How many threads look at first. Their number is doubled whenever none of them has had a result for [`SILENCE`], so
/// that paths that hang do not delay the others.
const FIRST_THREADS: usize = 4;
/// See [`FIRST_THREADS`].
const SILENCE: Duration = Duration::from_millis(10);
/// A thread's stack in bytes.
const STACK: usize = 64 << 10;

/// What identifies a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Identity {
    /// `st_dev`.
    pub device: u64,
    /// `st_ino`.
    pub inode: u64,
}

/// What has a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// This file.
    File(Identity),
    /// Nothing.
    Nothing,
    /// This user may not look, or the file system does not answer.
    Unknown,
}

/// Looks at the paths with the user's own rights; the results have the order of the paths. Takes at most 2 seconds.
pub async fn inspect(paths: &[&[u8]]) -> Vec<Found> {
    let mut found = vec![Found::Unknown; paths.len()];
    if !paths.is_empty() {
        // What is not known by then stays unknown.
        let _ = tokio::time::timeout(TIMEOUT, ask(paths, &mut found)).await;
    }
    found
}

/// Fills in each result as it arrives.
async fn ask(paths: &[&[u8]], found: &mut [Found]) -> io::Result<()> {
    let mut process = Command::new("/proc/self/exe")
        .arg0(NAME)
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let (Some(mut input), Some(output)) = (process.stdin.take(), process.stdout.take()) else {
        return Ok(());
    };
    for path in paths {
        // A zero byte ends a path.
        let path = if path.contains(&0) { b"".as_slice() } else { path };
        input.write_all(&[path, &[0]].concat()).await?;
    }
    drop(input);
    let mut lines = BufReader::new(output).lines();
    // To the end of its output, not to the end of the process, which may hang.
    for _ in paths {
        let Some(line) = lines.next_line().await? else { break };
        if let Some((index, result)) = parse(&line)
            && let Some(place) = found.get_mut(index)
        {
            *place = result;
        }
    }
    Ok(())
}

/// Whether the program was started to look at paths.
#[must_use]
pub fn is_called(program: Option<&OsStr>) -> bool {
    program.is_some_and(|name| name == NAME)
}

/// Reads paths from standard input, each with a zero byte, and prints a line for each one; returns the exit status.
pub fn run() -> u8 {
    let mut input = Vec::new();
    let print = |index, found| writeln!(io::stdout(), "{}", line(index, found));
    let result = io::stdin().read_to_end(&mut input).and_then(|_| look_at_all(&input, look, print));
    u8::from(result.is_err())
}

/// The paths that no thread has taken yet, with their indices.
type Queue = Mutex<std::vec::IntoIter<(usize, Vec<u8>)>>;

/// Looks at the paths, and reports the results in the order in which they arrive. Returns when no path hangs any more.
fn look_at_all(
    input: &[u8],
    look: fn(&[u8]) -> Found,
    mut report: impl FnMut(usize, Found) -> io::Result<()>,
) -> io::Result<()> {
    let paths = input.split_inclusive(|byte| *byte == 0).take(MOST_PATHS);
    let paths: Vec<_> =
        paths.map(|path| path.strip_suffix(&[0]).unwrap_or(path).to_vec()).enumerate().collect();
    let most_threads = paths.len();
    let mut missing = paths.len();
    let queue = Arc::new(Queue::new(paths.into_iter()));
    let (sender, results) = channel();
    let mut threads = 0;
    while missing > 0 {
        let wanted = (2 * threads).max(FIRST_THREADS).min(most_threads);
        while threads < wanted && start_thread(&queue, look, &sender).is_ok() {
            threads += 1;
        }
        while missing > 0
            && let Ok((index, found)) = results.recv_timeout(SILENCE)
        {
            missing -= 1;
            report(index, found)?;
        }
    }
    Ok(())
}

/// Starts a thread that looks at one path of the queue after the other.
fn start_thread(
    queue: &Arc<Queue>,
    look: fn(&[u8]) -> Found,
    results: &Sender<(usize, Found)>,
) -> io::Result<()> {
    let (queue, results) = (Arc::clone(queue), results.clone());
    let next = move || queue.lock().unwrap_or_else(PoisonError::into_inner).next();
    let work = move || {
        while let Some((index, path)) = next() {
            let _ = results.send((index, look(&path)));
        }
    };
    thread::Builder::new().stack_size(STACK).spawn(work).map(drop)
}

/// A link is not followed: the kernel's path of a file has none.
fn look(path: &[u8]) -> Found {
    match fs::symlink_metadata(Path::new(OsStr::from_bytes(path))) {
        Ok(metadata) => Found::File(Identity { device: metadata.dev(), inode: metadata.ino() }),
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => {
            Found::Nothing
        }
        Err(_) => Found::Unknown,
    }
}

/// `INDEX DEVICE INODE`, `INDEX nothing` or `INDEX unknown`.
fn line(index: usize, found: Found) -> String {
    match found {
        Found::File(Identity { device, inode }) => format!("{index} {device} {inode}"),
        Found::Nothing => format!("{index} nothing"),
        Found::Unknown => format!("{index} unknown"),
    }
}

fn parse(line: &str) -> Option<(usize, Found)> {
    let (index, result) = line.split_once(' ')?;
    let found = match (result, result.split_once(' ')) {
        ("nothing", _) => Found::Nothing,
        ("unknown", _) => Found::Unknown,
        (_, identity) => {
            let (device, inode) = identity?;
            Found::File(Identity { device: device.parse().ok()?, inode: inode.parse().ok()? })
        }
    };
    Some((index.parse().ok()?, found))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_identified_and_links_are_not_followed() {
        let directory = tempfile::tempdir().unwrap();
        let (file, link) = (directory.path().join("file"), directory.path().join("link"));
        fs::write(&file, b"").unwrap();
        std::os::unix::fs::symlink(&file, &link).unwrap();
        let metadata = fs::metadata(&file).unwrap();
        let identity = Identity { device: metadata.dev(), inode: metadata.ino() };
        let look_at = |path: &Path| look(path.as_os_str().as_bytes());
        assert_eq!(look_at(&file), Found::File(identity));
        assert!(matches!(look_at(&link), Found::File(other) if other != identity));
        assert_eq!(look_at(&directory.path().join("none")), Found::Nothing);
        assert_eq!(look_at(&file.join("none")), Found::Nothing);
        assert_eq!(look(&[b'x'; 300]), Found::Unknown);
    }

    fn results(input: &[u8], look: fn(&[u8]) -> Found) -> Vec<(usize, Found)> {
        let mut results = Vec::new();
        look_at_all(input, look, |index, found| {
            results.push((index, found));
            Ok(())
        })
        .unwrap();
        results.sort_by_key(|(index, _)| *index);
        results
    }

    #[test]
    fn every_path_has_a_result_with_its_index() {
        let results_of_paths = results(b"/\0/nonexistent\0\0/proc\0", look);
        assert_eq!(results_of_paths.iter().map(|(index, _)| *index).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!((results_of_paths[1].1, results_of_paths[2].1), (Found::Nothing, Found::Nothing));
        let parsed = |(index, found): &(usize, Found)| parse(&line(*index, *found));
        assert!(results_of_paths.iter().all(|result| parsed(result) == Some(*result)));
        assert_eq!(results(b"", look), []);
    }

    #[test]
    fn few_threads_look_at_many_paths() {
        static THREADS: Mutex<Vec<thread::ThreadId>> = Mutex::new(Vec::new());
        let look = |_: &[u8]| {
            let (id, mut threads) = (thread::current().id(), THREADS.lock().unwrap());
            if !threads.contains(&id) {
                threads.push(id);
            }
            Found::Nothing
        };
        assert_eq!(results(&[0; MOST_PATHS + 10], look).len(), MOST_PATHS);
        // More than the first ones, if the machine is slow.
        assert!(THREADS.lock().unwrap().len() < MOST_PATHS / 8);
    }

    #[test]
    fn paths_that_hang_do_not_delay_the_others() {
        static GATE: Mutex<()> = Mutex::new(());
        let mut closed = Some(GATE.lock().unwrap());
        let look = |path: &[u8]| {
            if path == b"hangs" {
                drop(GATE.lock());
                return Found::Unknown;
            }
            Found::Nothing
        };
        let input = ["hangs\0".repeat(50), "/a\0".repeat(50)].concat();
        let mut others = 0;
        look_at_all(input.as_bytes(), look, |_, found| {
            assert!(found == Found::Nothing || closed.is_none());
            others += usize::from(found == Found::Nothing);
            // Ends the hang.
            closed.take_if(|_| others == 50);
            Ok(())
        })
        .unwrap();
        assert_eq!(others, 50);
    }

    #[test]
    fn other_lines_are_ignored() {
        for line in ["", "1", "1 ", "1 x", "1 2", "1 2 x", "x nothing", "1 2 3 4", "-1 nothing"] {
            assert_eq!(parse(line), None, "{line}");
        }
        assert_eq!(parse("7 unknown"), Some((7, Found::Unknown)));
    }
}
