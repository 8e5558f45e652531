//! loopd(8), from what the daemon says of itself.

use std::process::Command;

use anyhow::{Context as _, Result, ensure};
use roff::bold;

use super::{Manual, Page};

/// The page. The help's first paragraph is what loopd is; further ones are sections, where they start
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
udev activates nothing that it finds in an image that a user other than root has attached: no LVM volume group, no MD array, no \
bcache, no btrfs scan. The same holds for the partitions of such an image and for what is built on it. Those devices have \
LOOPD_UNTRUSTED=1, and the type of what was hidden is in LOOPD_FS_TYPE. Their links in /dev/disk give way to those of any \
other device.

An administrator can allow it with a rule of a lower number that sets LOOPD_TRUSTED, for some of what udev finds or for all. For \
example, in /etc/udev/rules.d/62-trust.rules: ENV{ID_FS_TYPE}==\"LVM2_member\", ENV{LOOPD_TRUSTED}=\"1\"";

/// What is installed beside it, and where it keeps things.
const FILES: &[(&str, &str)] = &[
    ("/run/loopd", "What it keeps while the machine is up."),
    ("loopd.service", "The unit, which runs it without capabilities."),
    (
        "partitions.conf",
        "A drop-in for the unit, which lets it make the nodes of partitions where the kernel does not.",
    ),
    ("63-untrusted-loop.rules", "What udev leaves alone: see above."),
    ("org.loopd1.policy", "The actions of polkit, with who may do what by default."),
    ("org.loopd1.conf", "What the message bus lets through."),
];
