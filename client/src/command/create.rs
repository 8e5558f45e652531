//! `loopctl create`.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use loopd_dbus::proxy::Interaction;
use loopd_dbus::{Error, ErrorKind};

use crate::bus::agent::interruptible;
use crate::cli::{Create, FilesystemType};
use crate::image::creation::new_file::NewFile;
use crate::image::creation::{filesystem, luks};
use crate::message::{message, printable};
use crate::passphrase::source::Source;

/// Creates the image, or nothing.
pub async fn run(args: &Create, interaction: Interaction) -> anyhow::Result<u8> {
    check(args)?;
    // Before the file: reading it may wait, and a signal then ends loopctl at once.
    let source = Source::of(&args.passphrase, interaction)?;
    interruptible(create(args, source)).await?;
    Ok(0)
}

fn kind(args: &Create) -> FilesystemType {
    args.filesystem.unwrap_or(FilesystemType::Ext4)
}

/// What can be checked before anything is made.
fn check(args: &Create) -> anyhow::Result<()> {
    let wrong = |text: String| Err(Error::new(ErrorKind::InvalidArgs, text).into());
    if let Some(option) = args.passphrase.given()
        && !args.encrypt
    {
        return wrong(format!("{option} needs --encrypt"));
    }
    if args.encrypt && args.filesystem.is_some() {
        // It takes root's rights, or a method that loopd does not have.
        return wrong("--filesystem cannot be combined with --encrypt: loopd makes no file system within an encrypted image; \
            leave it out, and make the file system after `loopctl unlock`".to_owned());
    }
    if args.encrypt && args.size < luks::SMALLEST {
        return wrong("the size of an encrypted image is at least 32M: LUKS takes 16M of it".to_owned());
    }
    if let (Some(label), false) = (&args.label, args.encrypt) {
        kind(args).check_label(label)?;
    }
    if args.encrypt { luks::CRYPTSETUP.find() } else { kind(args).program().find() }.map(drop)
}

async fn create(args: &Create, source: Source) -> anyhow::Result<()> {
    let label = args.label.as_deref();
    let new = NewFile::create(&args.file, args.size)?;
    if args.encrypt {
        let secret = source.choose(&printable(args.file.as_os_str().as_bytes())).await?;
        luks::format(new.path(), &secret, label).await?;
    } else {
        filesystem::make(kind(args), new.path(), label).await?;
    }
    new.keep()?;
    if args.encrypt {
        message(&next_steps(&args.file));
    }
    Ok(())
}

/// A new encrypted image has no file system.
fn next_steps(file: &Path) -> String {
    let shown = printable(file.as_os_str().as_bytes());
    format!("{shown} has no file system yet; `loopctl run --unlock FILE -- sudo mkfs.ext4 {{}}` makes one")
}

#[cfg(test)]
mod tests {
    use std::fs;

    use clap::Parser;

    use super::*;
    use crate::cli::{Cli, Verb};
    use crate::report::report;

    fn create_image(path: &Path, options: &[&str]) -> anyhow::Result<u8> {
        let line = [&["loopctl", "create", path.to_str().unwrap()], options].concat();
        let Ok(Verb::Create(args)) = Cli::try_parse_from(line).map(|cli| cli.verb) else { panic!() };
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(run(&args, Interaction::Forbidden))
    }

    #[test]
    fn an_image_is_created_and_never_overwritten() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.img");
        create_image(&path, &["--size", "16M", "--label", "data"]).unwrap();
        let contents = fs::read(&path).unwrap();
        assert_eq!(contents.len(), 16 << 20);
        let text = create_image(&path, &["--size", "32M"]).unwrap_err().to_string();
        assert!(text.contains("exists"), "{text}");
        assert!(fs::read(&path).unwrap() == contents);
    }

    #[test]
    fn an_encrypted_image_takes_its_passphrase_from_a_file() {
        if luks::CRYPTSETUP.find().is_err() {
            return eprintln!("skipped: no cryptsetup");
        }
        let directory = tempfile::tempdir().unwrap();
        let (path, passphrase) = (directory.path().join("x.img"), directory.path().join("passphrase"));
        fs::write(&passphrase, "secret\n").unwrap();
        let file = passphrase.to_str().unwrap();
        create_image(&path, &["--size", "32M", "--encrypt", "--label", "vault", "--passphrase-file", file])
            .unwrap();
        assert!(fs::read(&path).unwrap().starts_with(b"LUKS\xba\xbe\0\x02"));
        assert!(next_steps(&path).contains("has no file system yet"));
    }

    #[test]
    fn a_failed_creation_leaves_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("x.img");
        for options in [&["--size", "512"][..], &["--size", "64M", "--encrypt"]] {
            create_image(&path, options).unwrap_err();
            assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0, "{options:?}");
        }
    }

    #[test]
    fn wrong_options_are_explained_before_anything_is_made() {
        let path = Path::new("/nonexistent/x.img");
        let error = create_image(path, &["--size", "64M", "--passphrase-file", "/dev/null"]).unwrap_err();
        assert_eq!(error.to_string(), "--passphrase-file needs --encrypt");
        assert_eq!(report(&error, crate::advice::Operation::Other), 2);
        let inside = create_image(path, &["--size", "64M", "--encrypt", "--filesystem", "xfs"]).unwrap_err();
        assert!(inside.to_string().starts_with("--filesystem cannot be combined with --encrypt"), "{inside}");
        let small = create_image(path, &["--size", "16M", "--encrypt"]).unwrap_err().to_string();
        assert!(small.contains("at least 32M"), "{small}");
        let long = create_image(path, &["--size", "64M", "--label", "seventeen letters"]).unwrap_err();
        assert_eq!(long.to_string(), "the label has 17 bytes; ext4 allows at most 16");
    }
}
