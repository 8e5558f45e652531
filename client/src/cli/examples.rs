//! Examples and further sections of the help texts.

macro_rules! sizes {
    () => {
        "SIZES
  N is a number of bytes, or has a suffix: K, M, G, T, P, E (also KiB, MiB, …) are powers of 1024; \
KB, MB, GB, TB, PB, EB are powers of 1000."
    };
}

pub const LOOPCTL: &str = "\
EXAMPLES
  Mount an image, and unmount and detach it again:
    $ loopctl mount disk.img
    /run/media/alice/holiday
    $ loopctl unmount disk.img

  Attach an image without mounting it, and detach it when done:
    $ loopctl attach disk.img
    /dev/loop0
    $ loopctl detach disk.img

  Check the file system in an image; the device is detached when fsck exits:
    $ loopctl run disk.img -- fsck.ext4 -f {}

  List every loop device of the machine:
    $ loopctl list --all

EXIT STATUS
  0 success, 1 failure, 2 invalid arguments. `run` exits with the status of its command.";

pub const ATTACH: &str = concat!(
    "\
EXAMPLES
  Attach an image and store the device node in a variable:
    $ device=$(loopctl attach disk.img)

  Attach 512 MiB at offset 1 MiB of the file, read-only:
    $ loopctl attach -r -o 1M --size-limit 512M disk.img

WARNINGS
  An image that is truncated, compressed or of a virtual machine, or whose partition table is damaged or for sectors of \
another size, is attached as it is, with a warning on standard error. `loopctl info` shows it again, and JSON has it with \
a stable code (see org.loopd1(5)).

",
    sizes!()
);

pub const RUN: &str = concat!("\
EXAMPLES
  Make a file system; {} is the device:
    $ loopctl run disk.img -- mkfs.ext4 {}

  List the partitions, with the device from the environment:
    $ loopctl run -r disk.img -- sh -c 'fdisk -l \"$LOOPCTL_DEVICE\"'

  Test a repair without changing the image:
    $ loopctl run --throwaway disk.img -- fsck.ext4 -fy {}

EXIT STATUS
  That of COMMAND; 128 plus the signal number if a signal ended it; 126 if it cannot be executed; 127 if it is not \
found. 1 if the file could not be attached: COMMAND is not run then. 2 if the arguments are invalid.

", sizes!());

pub const LIST: &str = "\
EXAMPLES
  The partitions with their entries in the partition table:
    $ loopctl list -o device,start,size,parttype,partlabel

  The devices and files, for a script:
    $ loopctl list --json | jq -r '.[] | [.device, .backing_file] | @tsv'

  The devices whose file was deleted, or replaced by another one:
    $ loopctl list --json | jq -r '.[] | select(.backing_file_state == (\"deleted\", \"replaced\")).device'

  The devices and partitions that hold an ext4 file system:
    $ loopctl list --json | jq -r '.. | select(.filesystem?.type == \"ext4\").device'";

pub const MOUNT: &str = "\
EXAMPLES
  Mount an image, change into it, and unmount it again:
    $ cd \"$(loopctl mount -r cd.iso)\"
    $ cd - && loopctl unmount cd.iso

  Mount the second partition of an image:
    $ loopctl mount -p 2 disk.img

  Mount an encrypted image with the passphrase of a password manager:
    $ pass show disk | loopctl mount --passphrase-file - disk.img

  Make changes that are discarded with the unmount:
    $ loopctl mount --throwaway disk.img";

pub const UNLOCK: &str = "\
EXAMPLES
  Unlock the second partition of an image, and mount it at a place of your own:
    $ device=$(loopctl attach disk.img)
    $ sudo mount \"$(loopctl unlock -p 2 \"$device\")\" /mnt

  Unlock a VeraCrypt volume with a key file and the passphrase of a password manager:
    $ pass show volume | loopctl unlock volume.hc --type veracrypt --key-file key.jpg --passphrase-file -

  Unlock a LUKS volume with the 512 bytes at offset 4 MiB of a USB stick:
    $ loopctl unlock disk.img --key-file /dev/sdb --key-offset 4M --key-size 512";

pub const LOCK: &str = "\
EXAMPLES
  Lock what `loopctl unlock` has unlocked, and detach the device:
    $ loopctl lock disk.img
    $ loopctl detach disk.img";

pub const CREATE: &str = concat!(
    "\
EXAMPLES
  Create an image and mount it:
    $ loopctl create data.img --size 2G --label data
    $ loopctl mount data.img

  Create an encrypted image, make a file system in it, and mount it:
    $ loopctl create secret.img --size 2G --encrypt
    New passphrase for secret.img:
    Same passphrase for secret.img:
    $ loopctl run --unlock secret.img -- sudo mkfs.ext4 {}
    $ loopctl mount secret.img

",
    sizes!()
);

pub const UNMOUNT: &str = "\
EXAMPLES
  Name the image, the device, or the mount point:
    $ loopctl unmount disk.img
    $ loopctl unmount loop3
    $ loopctl unmount /run/media/alice/holiday";

pub const INFO: &str = "\
EXAMPLES
  Show one partition:
    $ loopctl info loop3p1";

pub const RESIZE: &str = "\
EXAMPLES
  Enlarge an image, its device and its file system:
    $ truncate -s 2G disk.img
    $ loopctl resize disk.img
    $ sudo resize2fs /dev/loop3";

pub const SET: &str = concat!(
    "\
EXAMPLES
  Detach the device with its last unmount, and bypass the page cache until then:
    $ loopctl set loop3 --lifetime mount --direct-io on

",
    sizes!()
);

pub const RESCAN: &str = "\
EXAMPLES
  Write a partition table to the image, and create the partition nodes:
    $ sfdisk --no-reread --no-tell-kernel disk.img < table
    $ loopctl rescan disk.img";
