//! umount.loopd(8), from what the helper itself is made of.

use ::loopctl::umount;
use roff::bold;

use super::{Manual, Page, synopsis};

/// The page.
#[must_use]
pub fn page() -> Page {
    let mut manual = Manual::new("umount.loopd", 8, "umount's helper for what loopd has mounted");
    manual.heading("Synopsis").form(umount::SYNOPSIS);
    manual.heading("Description").prose(DESCRIPTION);
    manual.heading("Options");
    for option in umount::OPTIONS {
        manual.item(synopsis(&option.usage()), option.help);
    }
    manual.heading("Exit status");
    for (status, what) in umount::STATUSES {
        manual.item(vec![bold(status.to_string())], what);
    }
    manual.see_also(&[("loopctl", 1), ("umount", 8), ("loopd", 8)])
}

const DESCRIPTION: &str = "\
umount(8) calls this program where a user who is not root unmounts what loopd has mounted, as the mount \
option uhelper=loopd says. It is loopctl under another name, and does what `loopctl unmount` does: loopd \
unmounts one's own without asking, and what is another's where polkit says yes. What was attached to be \
mounted is detached with its last mount. It has no more rights than the user.

Nobody need call it by hand. What holds a file system that is busy it cannot always see, since it comes out \
of a setuid program: where the user's session has a capability, only `loopctl unmount` does.";
