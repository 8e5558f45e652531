//! The desktop of whoever sits there: notifications, and folders in the file manager.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;
use zbus::Variant;
use zbus::connection::Builder;

use crate::output::message;

/// How long a part of the desktop may take to start and answer.
const PATIENCE: Duration = Duration::from_secs(20);
/// From the icon naming specification.
const ICON: &str = "drive-removable-media";
/// What a URI may have as it is, besides letters and digits.
const PLAIN: &[u8] = b"-._~/";

/// Shows a notification. Where that is not possible, it has been said on standard error at least.
pub async fn notify(summary: &str, body: &str) {
    let hints = HashMap::<&str, Variant<'_>>::new();
    let no_actions: &[&str] = &[];
    // Name, what it replaces, icon, texts, actions, hints, and the time that the desktop chooses.
    let body = ("loopctl", 0_u32, ICON, summary, without_markup(body), no_actions, hints, -1_i32);
    let shown = call_session(
        "org.freedesktop.Notifications",
        "/org/freedesktop/Notifications",
        "org.freedesktop.Notifications",
        "Notify",
        &body,
    );
    if let Err(error) = shown.await {
        message(&format!("no notification can be shown: {error}"));
    }
}

/// Shows the folder in the file manager: in the one that the session bus knows, or else in what
/// xdg-open takes.
///
/// # Errors
/// There is neither.
pub async fn open(folder: &Path) -> anyhow::Result<()> {
    let folders = ([uri(folder)], "");
    let shown = call_session(
        "org.freedesktop.FileManager1",
        "/org/freedesktop/FileManager1",
        "org.freedesktop.FileManager1",
        "ShowFolders",
        &folders,
    );
    if shown.await.is_ok() {
        return Ok(());
    }
    let opened = Command::new("xdg-open").arg(folder).stdin(Stdio::null()).stdout(Stdio::null()).status();
    match timeout(PATIENCE, opened).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        // It has become the file manager itself, which stays.
        Err(_) => Ok(()),
        Ok(_) => anyhow::bail!("it is mounted, but no file manager can show it; install one, or xdg-utils"),
    }
}

async fn call_session<B>(
    name: &str,
    path: &str,
    interface: &str,
    method: &str,
    body: &B,
) -> anyhow::Result<()>
where
    B: serde::Serialize + zbus::wire::DynamicType,
{
    timeout(PATIENCE, async {
        let session = Builder::session().build().await?;
        session.call_method(Some(name), path, Some(interface), method, body).await?;
        anyhow::Ok(())
    })
    .await?
}

/// A body may have markup; ours has none.
fn without_markup(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn uri(path: &Path) -> String {
    let mut uri = "file://".to_owned();
    for byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || PLAIN.contains(byte) {
            uri.push(char::from(*byte));
        } else {
            uri.push_str(&format!("%{byte:02X}"));
        }
    }
    uri
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_have_uris() {
        assert_eq!(uri(Path::new("/run/media/a/data")), "file:///run/media/a/data");
        assert_eq!(uri(Path::new("/a b/ü#%?")), "file:///a%20b/%C3%BC%23%25%3F");
    }

    #[test]
    fn texts_have_no_markup() {
        assert_eq!(without_markup("<b>a & b</b>"), "&lt;b&gt;a &amp; b&lt;/b&gt;");
    }
}
