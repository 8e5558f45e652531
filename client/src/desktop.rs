//! The user's desktop: notifications, and directories in the file manager.

use std::collections::HashMap;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use tokio::process::Command;
use tokio::time::timeout;
use zbus::Variant;
use zbus::connection::Builder;

use crate::message::message;

/// How long to wait for a desktop service to start and reply.
const TIMEOUT: Duration = Duration::from_secs(20);
/// A name of the icon naming specification.
const ICON: &str = "drive-removable-media";
/// The characters besides letters and digits that a URI path contains unescaped.
const UNESCAPED: &[u8] = b"-._~/";

/// Shows a notification. The caller also prints the text to standard error, in case this fails.
pub async fn notify(summary: &str, body: &str) {
    let hints = HashMap::<&str, Variant<'_>>::new();
    let no_actions: &[&str] = &[];
    // Name, replaced notification, icon, texts, actions, hints, default timeout.
    let body = ("loopctl", 0_u32, ICON, summary, without_markup(body), no_actions, hints, -1_i32);
    let shown = call_session(
        "org.freedesktop.Notifications",
        "/org/freedesktop/Notifications",
        "org.freedesktop.Notifications",
        "Notify",
        &body,
    );
    if let Err(error) = shown.await {
        message(&format!("cannot show a notification: {error}"));
    }
}

/// Shows the directory in the file manager: the one on the session bus, or else the choice of xdg-open.
///
/// # Errors
/// There is neither.
pub async fn open(directory: &Path) -> anyhow::Result<()> {
    let arguments = ([uri(directory)], "");
    let shown = call_session(
        "org.freedesktop.FileManager1",
        "/org/freedesktop/FileManager1",
        "org.freedesktop.FileManager1",
        "ShowFolders",
        &arguments,
    );
    if shown.await.is_ok() {
        return Ok(());
    }
    let opened = Command::new("xdg-open").arg(directory).stdin(Stdio::null()).stdout(Stdio::null()).status();
    match timeout(TIMEOUT, opened).await {
        Ok(Ok(status)) if status.success() => Ok(()),
        // It is the file manager itself, which keeps running.
        Err(_) => Ok(()),
        Ok(_) => {
            anyhow::bail!("it is mounted, but there is no file manager to show it; install one, or xdg-utils")
        }
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
    timeout(TIMEOUT, async {
        let session = Builder::session().build().await?;
        session.call_method(Some(name), path, Some(interface), method, body).await?;
        anyhow::Ok(())
    })
    .await?
}

/// Escapes the text, since the body of a notification may contain markup.
fn without_markup(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

fn uri(path: &Path) -> String {
    let mut uri = "file://".to_owned();
    for byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || UNESCAPED.contains(byte) {
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
    fn paths_are_escaped_in_uris() {
        assert_eq!(uri(Path::new("/run/media/a/data")), "file:///run/media/a/data");
        assert_eq!(uri(Path::new("/a b/ü#%?")), "file:///a%20b/%C3%BC%23%25%3F");
    }

    #[test]
    fn markup_is_escaped() {
        assert_eq!(without_markup("<b>a & b</b>"), "&lt;b&gt;a &amp; b&lt;/b&gt;");
    }
}
