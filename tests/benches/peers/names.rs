//! The names of tables, groups, sides and columns, by which the goals find figures.

/// Tables.
pub mod table {
    pub const ATTACH: &str = "attach";
    pub const GROWTH: &str = "growth";
    pub const PROCESS: &str = "process";
    pub const DIRECT_IO: &str = "direct-io";
}

/// Groups of `table::ATTACH`. The first side of a group is what the others are compared with.
pub mod group {
    pub const REPLY: &str = "not waiting for udev";
    pub const PROCESSED: &str = "until udev has processed the device";
    pub const TWO: &str = "2 partitions, until udev has processed them";
    pub const MOST: &str = "255 partitions, until udev has processed them";
    pub const COMMANDS: &str = "whole processes";
    pub const ALL: [&str; 5] = [REPLY, PROCESSED, TWO, MOST, COMMANDS];
}

/// Sides.
pub mod side {
    pub const IOCTLS: &str = "ioctls";
    pub const PASSING: &str = "floor: the bus passes the same bytes on";
    pub const LOOPD: &str = "loopd, root";
    pub const LOOPD_USER: &str = "loopd, ordinary user, polkit";
    pub const POLKIT: &str = "floor of the user: CheckAuthorization alone";
    pub const UDISKS: &str = "UDisks2, root";
    pub const LOSETUP: &str = "losetup -f --show; -d";
    pub const LOSETUP_SETTLE: &str = "losetup and udevadm settle; -d";
    pub const LOOPCTL: &str = "loopctl attach; detach";
    pub const LOOPCTL_NO_WAIT: &str = "loopctl attach --no-wait; detach";
    pub const CONNECT: &str = "floor of loopctl: connect, Hello; twice";
    pub const UDISKSCTL: &str = "udisksctl loop-setup; loop-delete";
}

/// Columns of `table::ATTACH`.
pub mod column {
    pub const ATTACH: &str = "attach";
    pub const DETACH: &str = "detach";
}

/// Groups of `table::GROWTH`.
pub mod growth {
    pub const REPLY: &str = "attach, not waiting for udev";
    pub const PROCESSED: &str = "attach, until udev has processed it";
    pub const DETACH: &str = "detach, until it is free";
    pub const END: &str = "end of a client, until all are free; ioctls: LOOP_CLR_FD on each";
    pub const LIST: &str = "List";
    pub const OBJECTS: &str = "GetManagedObjects";
    pub const ALL: [&str; 6] = [REPLY, PROCESSED, DETACH, LIST, OBJECTS, END];
}

/// Groups of `table::PROCESS`; their figures are in the column `VALUE`.
pub mod process {
    pub const RESIDENT: &str = "RSS, idle";
    pub const PROPORTIONAL: &str = "PSS, idle";
    pub const PER_ATTACHMENT: &str = "RSS of an attachment";
    pub const RESIDENT_AFTER: &str = "RSS, after all attachments have gone";
    pub const LEFT: &str = "the same, above idle";
    pub const CALLS: &str = "system calls while idle";
    pub const START: &str = "exec to first reply";
    pub const DAEMON: &str = "size of loopd, stripped";
    pub const CLIENT: &str = "size of loopctl, stripped";
    pub const FLOOR: &str = "floor: size of a service that does nothing";
    pub const FLOOR_RESIDENT: &str = "floor: RSS of a service that does nothing";
    pub const FLOOR_PROPORTIONAL: &str = "floor: its PSS";
    pub const VALUE: &str = "value";
}
