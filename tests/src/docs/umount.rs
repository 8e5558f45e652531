//! umount.loopd(8), generated from the definitions of the helper.

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
umount(8) runs this program if a user other than root unmounts what loopd has mounted, because such mounts \
have the option uhelper=loopd. It is loopctl under another name, and works like `loopctl unmount`: loopd \
unmounts the user's own mounts without authorization, and those of others if polkit authorizes it. A device \
that was attached for the mount is detached with its last mount. The program has no more privileges than the \
user.

It is not meant to be run by hand. It cannot always see the users of a file system that is busy, because it \
is run by a setuid program: if the user's session has a capability, only `loopctl unmount` can.";
