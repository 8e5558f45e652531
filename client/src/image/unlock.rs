//! Unlocks and locks encrypted volumes.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use loopd_common::EncryptionType;
use loopd_dbus::names::MOST_KEY_FILES;
use loopd_dbus::proxy::Interaction;
use loopd_dbus::{Error, ErrorKind, LockOptions, UnlockOptions};
use zbus::wire::OwnedObjectPath;

use super::backing_file;
use super::volume::Volume;
use crate::bus::attachment::AttachmentInfo;
use crate::bus::connection::Bus;
use crate::bus::error::{explain, is_gone, kind, lacks_interface};
use crate::cli::{EncryptionArgs, PassphraseArgs};
use crate::message::{printable, reason};
use crate::passphrase::pipe;
use crate::passphrase::secret::Secret;
use crate::passphrase::source::{Source, Try};
use crate::show::property::file;

/// How to unlock a volume.
pub struct UnlockRequest<'a> {
    /// The type, if it is given.
    pub kind: Option<EncryptionType>,
    /// Whether the cleartext is read-only.
    pub read_only: bool,
    /// Further options.
    pub args: &'a EncryptionArgs,
    source: Source,
}

impl<'a> UnlockRequest<'a> {
    /// Checks the options, and reads the passphrase if it is in a file.
    ///
    /// # Errors
    /// Options do not fit together, or the file cannot be read.
    pub fn new(
        args: &'a EncryptionArgs,
        kind: Option<EncryptionType>,
        read_only: bool,
        interaction: Interaction,
    ) -> anyhow::Result<Self> {
        check(args, kind).map_err(|text| Error::new(ErrorKind::InvalidArgs, text))?;
        let source = if has_key_files(kind) {
            let without_keys = PassphraseArgs { key_files: Vec::new(), ..args.passphrase.clone() };
            Source::of(&without_keys, interaction)?
        } else {
            Source::of(&args.passphrase, interaction)?
        };
        Ok(Self { kind, read_only, args, source })
    }

    /// Whether a volume is unlocked even if it is not recognized as encrypted.
    #[must_use]
    pub fn is_explicit(&self) -> bool {
        self.kind.is_some() || self.args.header.is_some()
    }

    /// The options for one try: a descriptor that was read cannot be used again.
    fn options(&self) -> anyhow::Result<UnlockOptions> {
        let Self { kind, read_only, args, .. } = *self;
        let key_files = if has_key_files(kind) { args.passphrase.key_files.as_slice() } else { &[] };
        Ok(UnlockOptions {
            kind,
            read_only,
            discard: args.discard,
            header: args.header.as_deref().map(open).transpose()?,
            key_files: key_files.iter().map(|path| open(path)).collect::<anyhow::Result<_>>()?,
            // The secret is cut here: the file may be larger than a secret.
            key_size: 0,
            key_offset: 0,
            pim: args.pim.unwrap_or_default(),
            hidden: args.hidden,
            system: args.system,
        })
    }
}

/// Whether key files are used in addition to a passphrase.
fn has_key_files(kind: Option<EncryptionType>) -> bool {
    matches!(kind, Some(EncryptionType::VeraCrypt | EncryptionType::TrueCrypt))
}

/// Checks which options fit together.
fn check(args: &EncryptionArgs, kind: Option<EncryptionType>) -> Result<(), String> {
    let EncryptionArgs { passphrase, header, pim, hidden, system, .. } = args;
    if pim.is_some() && kind != Some(EncryptionType::VeraCrypt) {
        return Err("--pim needs the type veracrypt".to_owned());
    }
    if !has_key_files(kind) {
        let option = if *hidden { Some("--hidden") } else { system.then_some("--system") };
        return option
            .map_or(Ok(()), |option| Err(format!("{option} needs the type veracrypt or truecrypt")));
    }
    if header.is_some() {
        return Err("--header is only for LUKS".to_owned());
    }
    if passphrase.key_offset.is_some() || passphrase.key_size.is_some() {
        return Err("--key-offset and --key-size are for keys, not for the key files of this type".to_owned());
    }
    if passphrase.key_files.len() > MOST_KEY_FILES as usize {
        return Err(format!("at most {MOST_KEY_FILES} key files are supported"));
    }
    Ok(())
}

fn open(path: &Path) -> anyhow::Result<OwnedFd> {
    let opened = backing_file::open(path, false);
    let shown = printable(path.as_os_str().as_bytes());
    opened.map(File::into).map_err(|error| anyhow::anyhow!("cannot open {shown}: {}", reason(&error)))
}

/// Unlocks the volume; returns the object and the device node of its cleartext.
///
/// # Errors
/// It is not recognized and no type is given, there is no passphrase, or an error of loopd's.
pub async fn unlock(
    bus: &Bus,
    info: &AttachmentInfo,
    volume: &Volume<'_>,
    request: &UnlockRequest<'_>,
) -> anyhow::Result<(OwnedObjectPath, String)> {
    let subject = subject(info, volume);
    ensure_encrypted(volume, &subject, request.is_explicit())?;
    let encrypted = bus.encrypted(volume.path).await?;
    let attempt = async |secret: &Secret| {
        let options = request.options()?;
        let call = async |pipe: OwnedFd| encrypted.unlock(pipe.as_fd(), &options).await;
        let error = match pipe::send(secret, call).await? {
            Ok(unlocked) => return Ok(Try::Done(unlocked)),
            Err(error) if lacks_interface(&error) => anyhow::bail!("{}", not_unlockable(&subject)),
            Err(error) => explain(error),
        };
        if kind(&error) == Some(ErrorKind::WrongSecret) { Ok(Try::Wrong(error)) } else { Err(error) }
    };
    request.source.attempt(&subject, attempt).await
}

/// `is_explicit`: the user has said how a volume on which nothing is recognized is encrypted.
fn ensure_encrypted(volume: &Volume<'_>, subject: &str, is_explicit: bool) -> anyhow::Result<()> {
    if volume.is_encrypted() {
        return Ok(());
    }
    let found = &volume.properties.filesystem_type;
    anyhow::ensure!(found.is_empty(), "{subject} is not encrypted: it has {}", printable(found.as_bytes()));
    if is_explicit {
        return Ok(());
    }
    anyhow::bail!(
        "{subject} is not recognized as encrypted; a VeraCrypt volume needs --type veracrypt (of `loopctl mount`: \
         --encryption-type), and a detached LUKS header --header"
    )
}

/// loopd offers to unlock each volume that is recognized as encrypted or on which nothing is recognized.
fn not_unlockable(subject: &str) -> String {
    format!(
        "{subject} cannot be unlocked: it has a partition table, of which --partition chooses a partition; or loopd is older \
         than loopctl"
    )
}

/// The name of the volume in prompts and messages.
fn subject(info: &AttachmentInfo, volume: &Volume<'_>) -> String {
    let file = printable(file(info).as_bytes());
    match volume.partition {
        Some(number) => format!("partition {number} of {file}"),
        None => file,
    }
}

/// Locks the volume with this path; one that is locked already is not an error.
///
/// # Errors
/// `Busy` if the cleartext is in use and `lazy` is not set, or another error of loopd's.
pub async fn lock(bus: &Bus, volume: &OwnedObjectPath, lazy: bool) -> anyhow::Result<()> {
    match bus.encrypted(volume).await?.lock(LockOptions { lazy }).await {
        Err(error) if lacks_interface(&error) => Ok(()),
        result => match result.map_err(explain) {
            Err(error) if is_gone(&error) => Ok(()),
            result => result,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::example::{attachment, cleartext};
    use crate::bus::fake::FakeLoopd;
    use crate::image::volume;

    fn check_options(
        change: impl FnOnce(&mut EncryptionArgs),
        kind: Option<EncryptionType>,
    ) -> Option<String> {
        let mut args = EncryptionArgs::default();
        change(&mut args);
        let request = UnlockRequest::new(&args, kind, false, Interaction::Forbidden);
        request.err().map(|error| error.to_string())
    }

    #[test]
    fn options_must_fit_the_type() {
        use EncryptionType::{Luks, TrueCrypt, VeraCrypt};
        let fails = |change: fn(&mut EncryptionArgs), kind| check_options(change, kind).unwrap();
        assert_eq!(fails(|args| args.pim = Some(1), Some(TrueCrypt)), "--pim needs the type veracrypt");
        assert_eq!(check_options(|args| args.pim = Some(1), Some(VeraCrypt)), None);
        assert_eq!(fails(|args| args.hidden = true, None), "--hidden needs the type veracrypt or truecrypt");
        assert_eq!(
            fails(|args| args.system = true, Some(Luks)),
            "--system needs the type veracrypt or truecrypt"
        );
        assert_eq!(
            fails(|args| args.header = Some("h".into()), Some(VeraCrypt)),
            "--header is only for LUKS"
        );
        let key_size = |args: &mut EncryptionArgs| args.passphrase.key_size = Some(1);
        assert!(fails(key_size, Some(TrueCrypt)).starts_with("--key-offset and --key-size are for keys"));
        let many = |args: &mut EncryptionArgs| args.passphrase.key_files = vec!["k".into(); 5];
        assert_eq!(fails(many, Some(VeraCrypt)), "at most 4 key files are supported");
        assert!(fails(many, Some(Luks)).contains("one --key-file is used"));
    }

    #[test]
    fn key_files_are_passed_to_loopd_and_a_key_is_not() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "key").unwrap();
        let passphrase =
            PassphraseArgs { key_files: vec![file.path().to_owned()], ..PassphraseArgs::default() };
        let args = EncryptionArgs { passphrase, discard: true, ..EncryptionArgs::default() };
        let request = |kind| UnlockRequest::new(&args, kind, true, Interaction::Forbidden).unwrap();
        let veracrypt = request(Some(EncryptionType::VeraCrypt));
        assert!(matches!(veracrypt.source, Source::User(_)) && veracrypt.is_explicit());
        let options = veracrypt.options().unwrap();
        assert_eq!(options.key_files.len(), 1);
        assert!(options.read_only && options.discard);
        let luks = request(None);
        assert!(matches!(&luks.source, Source::File(secret) if secret.bytes() == b"key"));
        assert!(luks.options().unwrap().key_files.is_empty() && !luks.is_explicit());
    }

    #[test]
    fn the_secret_is_sent_and_a_locked_volume_can_be_locked() {
        let loopd = FakeLoopd::new(attachment());
        loopd.state().secret = b"key".to_vec();
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "xkeyx").unwrap();
        let passphrase = PassphraseArgs {
            key_files: vec![file.path().to_owned()],
            key_offset: Some(1),
            key_size: Some(3),
            ..PassphraseArgs::default()
        };
        let args = EncryptionArgs { passphrase, ..EncryptionArgs::default() };
        let luks = Some(EncryptionType::Luks);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let (bus, info) = (loopd.connect().await, attachment());
            let request = UnlockRequest::new(&args, luks, false, Interaction::Forbidden).unwrap();
            let whole = volume::of(&info)[0];
            let (path, device) = unlock(&bus, &info, &whole, &request).await.unwrap();
            assert_eq!(
                (path.as_str(), device.as_str()),
                ("/org/loopd1/attachment/12/cleartext", "/dev/dm-3")
            );
            lock(&bus, &info.path, false).await.unwrap();
            lock(&bus, &info.path, false).await.unwrap();
        });
        assert_eq!(loopd.state().unlock_options, ["type"]);
        assert_eq!(loopd.state().calls, ["Unlock 12", "Lock 12", "Lock 12"]);
        loopd.state().lacks_encrypted = true;
        let error = runtime.block_on(async {
            let (bus, info) = (loopd.connect().await, attachment());
            lock(&bus, &info.path, false).await.unwrap();
            let request = UnlockRequest::new(&args, luks, false, Interaction::Forbidden).unwrap();
            unlock(&bus, &info, &volume::of(&info)[0], &request).await.unwrap_err()
        });
        assert!(error.to_string().starts_with("/home/a/x.img cannot be unlocked: it has a partition table"));
    }

    #[test]
    fn a_volume_that_is_not_encrypted_is_explained() {
        let mut info = attachment();
        let explain = |info: &AttachmentInfo| {
            let whole = volume::of(info)[0];
            ensure_encrypted(&whole, &subject(info, &whole), false).err().map(|error| error.to_string())
        };
        ensure_encrypted(&volume::of(&info)[0], "x.img", true).unwrap();
        let text = explain(&info).unwrap();
        assert!(text.starts_with("/home/a/x.img is not recognized as encrypted; a VeraCrypt"), "{text}");
        info.volume.filesystem_type = "ext4".to_owned();
        assert_eq!(explain(&info).unwrap(), "/home/a/x.img is not encrypted: it has ext4");
        assert!(ensure_encrypted(&volume::of(&info)[0], "x.img", true).is_err());
        info.cleartext = Some(cleartext(None));
        assert_eq!(explain(&info), None);
        assert_eq!(subject(&info, &volume::of(&info)[1]), "partition 1 of /home/a/x.img");
    }
}
