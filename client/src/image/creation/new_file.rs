//! A new file that is removed unless it is kept.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::message::{printable, reason};

/// A file that did not exist before. It is removed when this is dropped, unless [`NewFile::keep`] was called.
#[derive(Debug)]
pub struct NewFile {
    path: PathBuf,
    file: File,
    is_kept: bool,
}

impl NewFile {
    /// Creates a sparse file.
    ///
    /// # Errors
    /// It exists, or cannot be created with this size.
    pub fn create(path: &Path, size: u64) -> anyhow::Result<Self> {
        let shown = printable(path.as_os_str().as_bytes());
        let opened = OpenOptions::new().read(true).write(true).create_new(true).open(path);
        let file = opened.map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => {
                anyhow::anyhow!("{shown} exists; choose another name, or remove it first")
            }
            _ => anyhow::anyhow!("cannot create {shown}: {}", reason(&error)),
        })?;
        let new = Self { path: path.to_owned(), file, is_kept: false };
        new.file.set_len(size).map_err(|error| {
            anyhow::anyhow!("cannot create {shown} with {size} bytes: {}", reason(&error))
        })?;
        Ok(new)
    }

    /// Its path.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes it to its disk, and keeps it.
    ///
    /// # Errors
    /// The write failed; the file is removed.
    pub fn keep(mut self) -> anyhow::Result<()> {
        let shown = printable(self.path.as_os_str().as_bytes());
        self.file.sync_all().map_err(|error| anyhow::anyhow!("cannot write {shown}: {}", reason(&error)))?;
        self.is_kept = true;
        Ok(())
    }

    /// Whether the path still names this file.
    fn is_in_place(&self) -> bool {
        let identity = |metadata: fs::Metadata| (metadata.dev(), metadata.ino());
        match (self.file.metadata(), fs::symlink_metadata(&self.path)) {
            (Ok(own), Ok(found)) => identity(own) == identity(found),
            _ => false,
        }
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if !self.is_kept && self.is_in_place() {
            let _ = fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_file_is_sparse_and_removed_unless_it_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.img");
        let new = NewFile::create(&path, 1 << 30).unwrap();
        let metadata = fs::metadata(&path).unwrap();
        assert_eq!((metadata.len(), metadata.blocks()), (1 << 30, 0));
        drop(new);
        assert!(!path.exists());
        NewFile::create(&path, 512).unwrap().keep().unwrap();
        assert!(path.exists());
    }

    #[test]
    fn an_existing_file_is_left_unchanged() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.img");
        fs::write(&path, "data").unwrap();
        let text = NewFile::create(&path, 512).unwrap_err().to_string();
        assert!(text.ends_with("x.img exists; choose another name, or remove it first"), "{text}");
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        assert!(NewFile::create(&link, 512).unwrap_err().to_string().contains("exists"));
        assert_eq!(fs::read_to_string(&path).unwrap(), "data");
        assert!(link.is_symlink() && !directory.path().join("nowhere").exists());
    }

    #[test]
    fn a_file_of_another_program_at_the_path_is_not_removed() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.img");
        let new = NewFile::create(&path, 512).unwrap();
        fs::remove_file(&path).unwrap();
        fs::write(&path, "other").unwrap();
        drop(new);
        assert_eq!(fs::read_to_string(&path).unwrap(), "other");
    }

    #[test]
    fn a_file_that_cannot_be_created_is_explained() {
        let text = |path: &str, size| NewFile::create(Path::new(path), size).unwrap_err().to_string();
        let missing = text("/nonexistent/x.img", 512);
        assert_eq!(missing, "cannot create /nonexistent/x.img: No such file or directory");
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.img");
        let huge = text(path.to_str().unwrap(), u64::MAX - 511);
        assert!(huge.contains("cannot create") && huge.contains(" bytes: "), "{huge}");
        assert!(!path.exists());
    }
}
