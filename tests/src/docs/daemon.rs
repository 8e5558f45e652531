//! loopd(8), generated from `loopd --help`.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use roff::bold;

use super::{Manual, Page};

/// The page. The first paragraph of the help describes loopd. A further paragraph is a section if it starts
/// with a heading and a colon.
///
/// # Errors
/// loopd is not built, or its help has another form.
pub fn page() -> Result<Page> {
    let program = std::env::current_exe()?.with_file_name("loopd");
    let output = Command::new(&program).arg("--help").output();
    let output = output.with_context(|| format!("{}: build it first", program.display()))?;
    ensure!(output.status.success(), "loopd --help: {}", output.status);
    let help = String::from_utf8(output.stdout)?;
    let mut manual = Manual::new("loopd", 8, "the daemon that attaches files to loop devices");
    let mut description = Vec::new();
    for paragraph in help.split("\n\n") {
        match paragraph.strip_prefix("Usage: ") {
            Some(usage) => drop(manual.heading("Synopsis").form(usage.trim())),
            None => description.push(paragraph),
        }
    }
    manual.heading("Description").prose(&description.join("\n\n"));
    manual.heading("Udev rules").prose(UDEV);
    manual.heading("Files");
    for (path, what) in FILES {
        manual.item(vec![bold(*path)], what);
    }
    Ok(manual.see_also(&[("loopctl", 1), ("org.loopd1", 5), ("polkit", 8), ("systemd.service", 5)]))
}

/// What `63-untrusted-loop.rules` does.
const UDEV: &str = "\
udev does not activate the contents of an image that a user other than root has attached: no LVM volume group, no MD array, no \
bcache, no btrfs scan. The same holds for its partitions and for devices built on it. These devices have the property \
LOOPD_UNTRUSTED=1, and a hidden type is in LOOPD_FS_TYPE. Links in /dev/disk of any other device take precedence over theirs.

An administrator can allow activation with a rule of a lower number that sets LOOPD_TRUSTED, for all types or for some. For \
example, in /etc/udev/rules.d/62-trust.rules: ENV{ID_FS_TYPE}==\"LVM2_member\", ENV{LOOPD_TRUSTED}=\"1\"";

/// The files of the daemon.
const FILES: &[(&str, &str)] = &[
    ("/run/loopd", "State files, kept until the next boot."),
    ("loopd.service", "The unit, which runs loopd without capabilities."),
    (
        "partitions.conf",
        "A drop-in for the unit: loopd creates the nodes of partitions if the kernel does not.",
    ),
    ("63-untrusted-loop.rules", "Prevents activation by udev: see above."),
    ("66-loopd-cleartext.rules", "Hides cleartexts of loopd from UDisks2 (UDISKS_IGNORE)."),
    (
        "loopd-unlock",
        "Reads the secret of an encrypted volume and runs cryptsetup, in a sandboxed unit of its own.",
    ),
    ("org.loopd1.policy", "The polkit actions and their default authorizations."),
    ("org.loopd1.conf", "The policy of the message bus."),
];
