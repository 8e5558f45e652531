//! A file system on which images are.

use std::path::{Path, PathBuf};

use anyhow::Result;
use loopd_tests::image::{Image, Mounted};
use loopd_tests::losetup::Losetup;
use loopd_tests::process::{needs, needs_file_system, run};
use loopd_tests::{Skipped, skip};

use crate::results::Results;
use crate::workspace::Workspace;

/// Of a file system that is made for the run.
const SIZE: u64 = 1 << 30;
const MADE: [&str; 3] = ["ext4", "xfs", "btrfs"];

/// A directory on a file system.
pub struct Place {
    /// The type of the file system.
    pub name: &'static str,
    /// The directory.
    pub directory: PathBuf,
    /// Unmounted, and then detached.
    _made: Option<(Mounted, Losetup)>,
}

impl Place {
    /// The file that is read.
    pub fn iso(&self) -> Image {
        Image { path: self.directory.join("iso") }
    }

    /// An image without blocks, instead of the last one.
    pub fn new_image(&self, bytes: u64) -> Result<Image> {
        let path = self.directory.join("image");
        if path.exists() {
            std::fs::remove_file(&path)?;
        }
        Image::sparse(&self.directory, "image", bytes)
    }
}

/// The file system of the working directory, a tmpfs, and those of ext4, xfs and btrfs that can be made here.
pub async fn all(workspace: &Workspace, directory: &Path, results: &mut Results) -> Result<Vec<Place>> {
    let memory = workspace.memory().join("direct-io-files");
    std::fs::create_dir(&memory)?;
    let working = type_of(directory).await;
    let mut places = vec![
        Place { name: working, directory: directory.to_owned(), _made: None },
        Place { name: "tmpfs", directory: memory, _made: None },
    ];
    for name in MADE {
        if name == working {
            continue;
        }
        match make(name, directory).await {
            Ok(place) => places.push(place),
            Err(error) => {
                results.skip(format!("direct I/O on {name}"), error.downcast::<Skipped>()?.to_string())
            }
        }
    }
    Ok(places)
}

async fn type_of(directory: &Path) -> &'static str {
    let arguments = ["-n", "-o", "FSTYPE", "--target"].map(std::ffi::OsStr::new).into_iter();
    let found = run("findmnt", arguments.chain([directory.as_os_str()])).await.unwrap_or_default();
    MADE.into_iter().find(|name| *name == found.trim()).unwrap_or("the disk")
}

async fn make(name: &'static str, parent: &Path) -> Result<Place> {
    needs_file_system(name)?;
    let tool = format!("mkfs.{name}");
    needs(&tool)?;
    let image = Image::sparse(parent, name, SIZE)?;
    run(&tool, ["-q", image.name()]).await?;
    let device = Losetup::new(&[], &image).await?;
    match Mounted::new(device.device, parent, &format!("{name}.mounted")).await {
        Ok(mount) => {
            let directory = mount.directory.clone();
            Ok(Place { name, directory, _made: Some((mount, device)) })
        }
        Err(error) => skip(format!("it cannot be mounted: {error:#}")),
    }
}
