//! The state files in the runtime directory, from which a restarted daemon recovers.

use std::io::Result as IoResult;
use std::path::Path;

use loopd_engine::kernel::DiskSequence;
use loopd_engine::{Error, MountDirectory, SavedAttachment, Store};

mod attachments;
mod mount_directories;
mod state_file;

pub use state_file::runtime_directory;

use attachments::AttachmentFiles;
use mount_directories::MountDirectoryFiles;

/// The state files of attachments and of mount directories.
pub struct StateFiles {
    attachments: AttachmentFiles,
    mount_directories: MountDirectoryFiles,
}

impl StateFiles {
    /// The state files below the runtime directory. `bus` identifies the bus on which the clients' unique
    /// names are valid.
    ///
    /// # Errors
    /// A directory cannot be made.
    pub fn open(runtime_directory: &Path, bus: String) -> IoResult<Self> {
        Ok(Self {
            attachments: AttachmentFiles::open(runtime_directory, bus)?,
            mount_directories: MountDirectoryFiles::open(runtime_directory)?,
        })
    }
}

impl Store for StateFiles {
    fn write(&self, attachment: &SavedAttachment) -> Result<(), Error> {
        self.attachments.write(attachment)
    }

    fn erase(&self, id: DiskSequence) {
        self.attachments.erase(id);
    }

    fn announce(&self, mark: u64) -> Result<(), Error> {
        self.attachments.announce(mark)
    }

    fn retract(&self, mark: u64) {
        self.attachments.retract(mark);
    }

    fn announced(&self) -> Vec<u64> {
        self.attachments.announced()
    }

    fn read(&self) -> Vec<SavedAttachment> {
        self.attachments.read()
    }

    fn write_mount_directory(&self, directory: &MountDirectory) -> Result<(), Error> {
        self.mount_directories.write(directory)
    }

    fn erase_mount_directory(&self, path: &Path) {
        self.mount_directories.erase(path);
    }

    fn read_mount_directories(&self) -> Vec<MountDirectory> {
        self.mount_directories.read()
    }
}
