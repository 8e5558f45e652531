//! Searches procfs for users of a loop device that the kernel does not list: processes, mounts in other mount
//! namespaces, swap. The sandbox of loopd hides all of them, so loopctl looks with the rights of its user.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::thread::Builder;
use std::time::Duration;

use loopd_common::{mountinfo, swaps};
use rustix::fs::OFlags;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::time::{Instant, timeout_at};

use super::device_nodes::{Mounts, Nodes, status};
use super::device_user::{DeviceUser, How};
use super::process::{Process, mapped_path};

/// The time limit of the search: the file system of another file that a process has open may hang.
const TIME: Duration = Duration::from_secs(2);

/// A process that does not use the device any more after this time is not reported: udev opens it after each change.
const PASSING: Duration = Duration::from_millis(200);

/// What the search has found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SearchResult {
    /// The users.
    pub users: Vec<DeviceUser>,
    /// Whether there are processes that this user may not look into.
    pub has_hidden: bool,
    /// Whether the search has ended in time.
    pub is_complete: bool,
}

impl SearchResult {
    fn take(&mut self, finding: Finding) {
        match finding {
            Finding::User(user) => self.users.push(user),
            Finding::Hidden => self.has_hidden = true,
            Finding::Ended(ended) => self
                .users
                .retain(|user| !matches!(user, DeviceUser::Process { process, .. } if *process == ended)),
        }
    }
}

enum Finding {
    User(DeviceUser),
    /// A process that this user may not look into.
    Hidden,
    /// A process that was reported and does not use the device any more.
    Ended(Process),
}

/// Searches for the users of the nodes, in another thread, which is abandoned when the time is over. The descriptors of
/// the processes `keepers` do not count.
pub async fn search(nodes: &Nodes, keepers: Vec<u32>) -> SearchResult {
    let (sender, mut receiver) = unbounded_channel();
    let nodes = nodes.clone();
    let mut found = SearchResult::default();
    if Builder::new().spawn(move || Search::new(&nodes, &keepers, sender).run()).is_err() {
        return found;
    }
    let deadline = Instant::now() + TIME;
    loop {
        match timeout_at(deadline, receiver.recv()).await {
            Ok(Some(finding)) => found.take(finding),
            Ok(None) => return SearchResult { is_complete: true, ..found },
            Err(_) => return found,
        }
    }
}

/// A search through all processes.
struct Search<'a> {
    nodes: &'a Nodes,
    keepers: &'a [u32],
    /// The mounts of the nodes in this process's namespace.
    own_mounts: Mounts,
    /// The mount namespaces that were searched, and this process's.
    namespaces: HashSet<PathBuf>,
    /// The mounts that were found in other namespaces whose identity this user may not read.
    mounts: Mounts,
    /// The processes that use a node.
    processes: Vec<Process>,
    found: UnboundedSender<Finding>,
}

impl<'a> Search<'a> {
    fn new(nodes: &'a Nodes, keepers: &'a [u32], found: UnboundedSender<Finding>) -> Self {
        let table = fs::read(mountinfo::FILE).unwrap_or_default();
        Self {
            nodes,
            keepers,
            own_mounts: nodes.mounts(&table),
            namespaces: fs::read_link("/proc/self/ns/mnt").into_iter().collect(),
            mounts: Mounts::new(),
            processes: Vec::new(),
            found,
        }
    }

    fn run(&mut self) {
        let swaps = fs::read(swaps::FILE).unwrap_or_default();
        for node in swaps::devices(&swaps).filter_map(|path| self.nodes.at(&path)) {
            self.report(Finding::User(DeviceUser::Swap { node: node.clone() }));
        }
        for process in Process::all() {
            self.search_mounts(process);
            if !self.keepers.contains(&process.pid) {
                self.search_descriptors(process);
            }
        }
        self.check_again();
    }

    /// Withdraws the processes that do not use a node any more.
    fn check_again(&self) {
        if self.processes.is_empty() {
            return;
        }
        std::thread::sleep(PASSING);
        for process in &self.processes {
            if !matches!(self.use_by(&process.directory()), Ok(Some(_))) {
                self.report(Finding::Ended(*process));
            }
        }
    }

    fn report(&self, finding: Finding) {
        // Fails if the time is over.
        let _abandoned = self.found.send(finding);
    }

    fn search_mounts(&mut self, process: Process) {
        let directory = process.directory();
        let namespace = fs::read_link(directory.join("ns/mnt")).ok();
        if namespace.as_ref().is_some_and(|namespace| !self.namespaces.insert(namespace.clone())) {
            return;
        }
        let Ok(table) = fs::read(directory.join("mountinfo")) else { return };
        for (node, point) in self.nodes.mounts(&table) {
            let mount = (node, point);
            // A mount at the same place is a copy: sandboxed services have copies of all mounts.
            let is_known = self.own_mounts.contains(&mount)
                || (namespace.is_none() && !self.mounts.insert(mount.clone()));
            if !is_known {
                let (node, point) = mount;
                let name = process.name();
                self.report(Finding::User(DeviceUser::Mount { node, point, process, name }));
            }
        }
    }

    fn search_descriptors(&mut self, process: Process) {
        match self.use_by(&process.directory()) {
            Ok(Some((node, how))) => {
                let name = process.name();
                self.processes.push(process);
                self.report(Finding::User(DeviceUser::Process { node, how, process, name }));
            }
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
                self.report(Finding::Hidden);
            }
            Ok(None) | Err(_) => {}
        }
    }

    /// The first use of a node, if the process has one.
    fn use_by(&self, directory: &Path) -> io::Result<Option<(String, How)>> {
        for entry in fs::read_dir(directory.join("fd"))? {
            let link = entry?.path();
            if let Some(found) = self.use_of(&link)? {
                return Ok(Some(found));
            }
        }
        for link in ["cwd", "root"] {
            if let Some(found) = self.use_of(&directory.join(link))? {
                return Ok(Some(found));
            }
        }
        self.mapped(directory)
    }

    fn use_of(&self, link: &Path) -> io::Result<Option<(String, How)>> {
        let target = match fs::read_link(link) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            target => target?,
        };
        // Sockets and pipes have no path.
        if !target.is_absolute() {
            return Ok(None);
        }
        let Ok(file) = status(link) else { return Ok(None) };
        if let Some(node) = self.nodes.is(&file) {
            return Ok((!is_path_only(link)).then(|| (node.clone(), How::Open)));
        }
        let is_mounted_here = |node: &&String| self.own_mounts.iter().any(|(mounted, _)| mounted == *node);
        let node = self.nodes.has(&file).filter(|node| !is_mounted_here(node));
        Ok(node.map(|node| (node.clone(), How::FileSystem)))
    }

    fn mapped(&self, directory: &Path) -> io::Result<Option<(String, How)>> {
        let maps = BufReader::new(File::open(directory.join("maps"))?);
        for line in maps.split(b'\n') {
            if let Some(node) = mapped_path(&line?).and_then(|path| self.nodes.named(path)) {
                return Ok(Some((node.clone(), How::Mapped)));
            }
        }
        Ok(None)
    }
}

/// Whether a descriptor has `O_PATH`: it does not open the device.
fn is_path_only(descriptor: &Path) -> bool {
    let flags = || {
        let directory = descriptor.parent()?.with_file_name("fdinfo");
        let text = fs::read_to_string(directory.join(descriptor.file_name()?)).ok()?;
        let flags = text.lines().find_map(|line| line.strip_prefix("flags:"))?;
        u32::from_str_radix(flags.trim(), 8).ok()
    };
    flags().is_some_and(|flags| flags & OFlags::PATH.bits() != 0)
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;
    use std::os::fd::AsRawFd;
    use std::os::unix::fs::OpenOptionsExt;
    use std::process::{Command, Stdio};

    use super::*;

    /// The file system of the temporary directory stands for the one of a device.
    #[test]
    fn files_on_a_file_system_that_is_not_mounted_here_are_found() {
        let directory = tempfile::tempdir().unwrap();
        let device = status(directory.path()).unwrap();
        let node = "/dev/loop3".to_owned();
        let nodes = Nodes::from([((device.stx_dev_major, device.stx_dev_minor), node.clone())]);
        let mut child =
            Command::new("cat").current_dir(directory.path()).stdin(Stdio::piped()).spawn().unwrap();
        let process = Process { pid: child.id() };
        let (sender, _receiver) = unbounded_channel();
        let mut search = Search::new(&nodes, &[], sender);
        search.own_mounts.clear();
        assert_eq!(search.use_by(&process.directory()).unwrap(), Some((node.clone(), How::FileSystem)));
        search.own_mounts.insert((node, "/mnt".into()));
        assert_eq!(search.use_by(&process.directory()).unwrap(), None);
        drop(child.stdin.take());
        child.wait().unwrap();
    }

    #[tokio::test]
    async fn a_process_that_uses_the_device_for_a_moment_is_not_reported() {
        let directory = tempfile::tempdir().unwrap();
        let device = status(directory.path()).unwrap();
        let number = (device.stx_dev_major, device.stx_dev_minor);
        let mut children = ["0.05", "60"]
            .map(|seconds| Command::new("sleep").arg(seconds).current_dir(directory.path()).spawn().unwrap());
        let [passing, staying] = children.each_ref().map(|child| Process { pid: child.id() });
        let (sender, mut receiver) = unbounded_channel();
        let nodes = Nodes::from([(number, "/dev/loop3".to_owned())]);
        let mut search = Search::new(&nodes, &[], sender);
        search.own_mounts.clear();
        [passing, staying].into_iter().for_each(|process| search.search_descriptors(process));
        search.check_again();
        drop(search);
        children[1].kill().unwrap();
        children.iter_mut().for_each(|child| drop(child.wait()));
        let mut found = SearchResult::default();
        while let Some(finding) = receiver.recv().await {
            found.take(finding);
        }
        let found: Vec<String> = found.users.iter().map(ToString::to_string).collect();
        let [only] = &found[..] else { panic!("{found:?}") };
        assert!(only.ends_with(&format!("(process {})", staying.pid)), "{only}");
    }

    #[test]
    fn mapped_nodes_are_found() {
        let program = fs::read_link("/proc/self/exe").unwrap().to_str().unwrap().to_owned();
        let nodes = Nodes::from([((7, 3), program.clone())]);
        let mapped = |nodes: &Nodes| {
            let (sender, _receiver) = unbounded_channel();
            Search::new(nodes, &[], sender).mapped(Path::new("/proc/self")).unwrap()
        };
        assert_eq!(mapped(&nodes), Some((program.clone(), How::Mapped)));
        assert_eq!(mapped(&Nodes::from([((7, 3), program[1..].to_owned())])), None);
    }

    #[test]
    fn a_descriptor_that_is_only_a_path_opens_nothing() {
        let opened = File::open("/dev/null").unwrap();
        let path = OpenOptions::new()
            .read(true)
            .custom_flags(OFlags::PATH.bits().cast_signed())
            .open("/dev/null")
            .unwrap();
        let link = |file: &File| PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
        assert!(!is_path_only(&link(&opened)));
        assert!(is_path_only(&link(&path)));
    }
}
