//! `loopd-docs`: generates the manual pages and completions from the definitions of the programs and the
//! bus interfaces, or checks that the committed ones are current (`--check`).

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context as _, Result};
use loopd_tests::bus::repository;
use loopd_tests::docs::{Page, completion, daemon, interfaces, loopctl, losetup, umount};

fn main() -> ExitCode {
    match run(std::env::args().nth(1).as_deref() == Some("--check")) {
        Ok(status) => status,
        Err(error) => {
            eprintln!("loopd-docs: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(only_check: bool) -> Result<ExitCode> {
    let mut pages: Vec<Page> =
        vec![loopctl::page(), losetup::page(), umount::page(), daemon::page()?, interfaces::page()?];
    pages.extend(completion::scripts());
    let mut is_right = true;
    for page in pages {
        let path = repository().join(&page.path);
        if !only_check {
            write(&path, &page.text)?;
        } else if std::fs::read_to_string(&path).ok().as_deref() != Some(&page.text) {
            eprintln!("{} is outdated; run `make docs`", page.path.display());
            is_right = false;
        }
    }
    Ok(if is_right { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn write(path: &Path, text: &str) -> Result<()> {
    let directory: PathBuf = path.parent().map(Path::to_owned).unwrap_or_default();
    std::fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
    std::fs::write(path, text).with_context(|| path.display().to_string())
}
