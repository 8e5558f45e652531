//! Makes a LUKS volume in a file, with the rights of the user.

use std::ffi::OsString;
use std::path::Path;

use crate::passphrase::pipe;
use crate::passphrase::secret::Secret;
use crate::program::Program;

/// The program that makes it.
pub const CRYPTSETUP: Program = Program { name: "cryptsetup", package: "cryptsetup-bin" };

/// The smallest image in bytes. The header takes 16 MiB; cryptsetup enlarges a smaller file without a message.
pub const SMALLEST: u64 = 32 << 20;

/// Makes a LUKS2 volume that this secret unlocks.
///
/// # Errors
/// cryptsetup is missing or failed.
pub async fn format(file: &Path, secret: &Secret, label: Option<&str>) -> anyhow::Result<()> {
    let mut arguments: Vec<OsString> =
        ["luksFormat", "--batch-mode", "--type", "luks2", "--key-file", "-"].map(OsString::from).to_vec();
    arguments.extend(label.into_iter().flat_map(|label| ["--label".into(), label.into()]));
    arguments.push(std::path::absolute(file)?.into_os_string());
    pipe::send(secret, async |input| CRYPTSETUP.run(&arguments, Some(input)).await).await?
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;
    use crate::image::creation::new_file::NewFile;

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
    }

    #[test]
    fn the_secret_unlocks_the_volume() {
        let Ok(program) = CRYPTSETUP.find() else { return eprintln!("skipped: no cryptsetup") };
        let directory = tempfile::tempdir().unwrap();
        let new = NewFile::create(&directory.path().join("x.img"), 32 << 20).unwrap();
        // With a newline and a NUL, so that each byte counts.
        let mut secret = Secret::new();
        secret.append(b"a\nb\0c").unwrap();
        block_on(format(new.path(), &secret, Some("vault"))).unwrap();
        let opens = |bytes: &str| {
            let script = format!("printf '{bytes}' | \"$0\" open --test-passphrase --key-file - \"$1\"");
            let mut command = Command::new("sh");
            command.args(["-c", &script]).arg(&program).arg(new.path()).stderr(Stdio::null());
            command.status().unwrap().success()
        };
        assert!(opens("a\\nb\\0c") && !opens("a"));
        assert_eq!(std::fs::metadata(new.path()).unwrap().len(), 32 << 20);
    }

    #[test]
    fn a_failure_of_cryptsetup_is_quoted() {
        if CRYPTSETUP.find().is_err() {
            return eprintln!("skipped: no cryptsetup");
        }
        let mut secret = Secret::new();
        secret.append(b"x").unwrap();
        let text = block_on(format(Path::new("/nonexistent/x.img"), &secret, None)).unwrap_err().to_string();
        assert!(text.starts_with("cryptsetup failed: ") && text.contains("/nonexistent/x.img"), "{text}");
    }
}
