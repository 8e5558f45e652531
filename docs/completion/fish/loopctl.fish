# Print an optspec for argparse to handle cmd's options that are independent of any subcommand.
function __fish_loopctl_global_optspecs
    string join \n no-ask-password no-color h/help V/version
end

function __fish_loopctl_needs_command
    # Figure out if the current invocation already has a command.
    set -l cmd (commandline -opc)
    set -e cmd[1]
    argparse -s (__fish_loopctl_global_optspecs) -- $cmd 2>/dev/null
    or return
    if set -q argv[1]
        # Also print the command, so this can be used to figure out what it is.
        echo $argv[1]
        return 1
    end
    return 0
end

function __fish_loopctl_using_subcommand
    set -l cmd (__fish_loopctl_needs_command)
    test -z "$cmd"
    and return 1
    contains -- $cmd[1] $argv
end

complete -c loopctl -n "__fish_loopctl_needs_command" -l no-ask-password -d 'Never prompt for authorization'
complete -c loopctl -n "__fish_loopctl_needs_command" -l no-color -d 'Disable colours and bold text'
complete -c loopctl -n "__fish_loopctl_needs_command" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopctl -n "__fish_loopctl_needs_command" -s V -l version -d 'Print version'
complete -c loopctl -n "__fish_loopctl_needs_command" -f -a "attach" -d 'Attach a file to a free loop device and print the device node'
complete -c loopctl -n "__fish_loopctl_needs_command" -f -a "detach" -d 'Detach loop devices'
complete -c loopctl -n "__fish_loopctl_needs_command" -f -a "list" -d 'List the loop devices and their partitions'
complete -c loopctl -n "__fish_loopctl_needs_command" -f -a "info" -d 'Show every property of a loop device'
complete -c loopctl -n "__fish_loopctl_needs_command" -f -a "mount" -d 'Mount the file system in an image and print the mount point'
complete -c loopctl -n "__fish_loopctl_needs_command" -f -a "unmount" -d 'Unmount an image, a device, a partition or a directory'
complete -c loopctl -n "__fish_loopctl_needs_command" -f -a "unlock" -d 'Unlock an encrypted volume and print the device with its cleartext'
complete -c loopctl -n "__fish_loopctl_needs_command" -f -a "lock" -d 'Lock an encrypted volume: remove the device with its cleartext'
complete -c loopctl -n "__fish_loopctl_needs_command" -f -a "create" -d 'Create an image with a file system, or an encrypted one'
complete -c loopctl -n "__fish_loopctl_needs_command" -f -a "resize" -d 'Set the size of a loop device to the current size of its backing file'
complete -c loopctl -n "__fish_loopctl_needs_command" -f -a "set" -d 'Change the settings of a loop device'
complete -c loopctl -n "__fish_loopctl_needs_command" -f -a "rescan" -d 'Re-read the partition table of a loop device'
complete -c loopctl -n "__fish_loopctl_needs_command" -f -a "run" -d 'Attach a file while a command runs'
complete -c loopctl -n "__fish_loopctl_needs_command" -f -a "monitor" -d 'Print a line for each loop device and partition that is added, changed or removed'
complete -c loopctl -n "__fish_loopctl_needs_command" -f -a "losetup" -d 'Accept the arguments of losetup, and print what losetup prints'
complete -c loopctl -n "__fish_loopctl_needs_command" -f -a "completion" -d 'Print the completion script for a shell'
complete -c loopctl -n "__fish_loopctl_needs_command" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
complete -c loopctl -n "__fish_loopctl_using_subcommand attach" -s o -l offset -d 'Start at this offset in the file' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand attach" -l size-limit -d 'Use at most this many bytes of the file; 0 is up to its end' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand attach" -s b -l block-size -d 'The logical block size: a power of two from 512 to 64K; 0 lets loopd choose' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand attach" -l reference -d 'A name of at most 63 bytes for the device, which losetup shows as REF' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand attach" -l device -d 'Use this device: /dev/loop3, loop3 or 3. By default a free one is chosen' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand attach" -l overlap -d 'What to do if the file is already attached' -r -f -a "allow\t''
refuse\t''
reuse\t''"
complete -c loopctl -n "__fish_loopctl_using_subcommand attach" -l throwaway-dir -d 'Create the throwaway copy in this directory, instead of that of the file' -r -F
complete -c loopctl -n "__fish_loopctl_using_subcommand attach" -l lifetime -d 'When the device is detached automatically' -r -f -a "persistent\t''
mount\t''"
complete -c loopctl -n "__fish_loopctl_using_subcommand attach" -s r -l read-only -d 'Make the device read-only'
complete -c loopctl -n "__fish_loopctl_using_subcommand attach" -l direct-io -d 'Bypass the page cache of the backing file; fails if the file does not support it'
complete -c loopctl -n "__fish_loopctl_using_subcommand attach" -l no-partitions -d 'Do not create partition nodes'
complete -c loopctl -n "__fish_loopctl_using_subcommand attach" -l no-wait -d 'Do not wait until udev has processed the device'
complete -c loopctl -n "__fish_loopctl_using_subcommand attach" -l throwaway -d 'Attach a writable copy of the file that is deleted with the device'
complete -c loopctl -n "__fish_loopctl_using_subcommand attach" -l yes -d 'Copy more than 1 GiB without a prompt. Without this option and without a terminal, such a copy fails'
complete -c loopctl -n "__fish_loopctl_using_subcommand attach" -l json -d 'Print the device\'s properties as a JSON object instead of the device node'
complete -c loopctl -n "__fish_loopctl_using_subcommand attach" -l no-ask-password -d 'Never prompt for authorization'
complete -c loopctl -n "__fish_loopctl_using_subcommand attach" -l no-color -d 'Disable colours and bold text'
complete -c loopctl -n "__fish_loopctl_using_subcommand attach" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopctl -n "__fish_loopctl_using_subcommand detach" -l all -d 'Detach every device that loopd attached; continue after errors'
complete -c loopctl -n "__fish_loopctl_using_subcommand detach" -l lazy -d 'If the device is in use, detach it at the last close, and do not wait for that'
complete -c loopctl -n "__fish_loopctl_using_subcommand detach" -l no-ask-password -d 'Never prompt for authorization'
complete -c loopctl -n "__fish_loopctl_using_subcommand detach" -l no-color -d 'Disable colours and bold text'
complete -c loopctl -n "__fish_loopctl_using_subcommand detach" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopctl -n "__fish_loopctl_using_subcommand list" -s o -l output -d 'The columns to show, separated by commas, in upper or lower case' -r -f -a "DEVICE\t'Device node'
NUMBER\t'N of /dev/loopN, or the partition\'s number'
SIZE\t'Size of the device or partition'
RO\t'Whether the device is read-only'
TYPE\t'Type of the file system'
VERSION\t'Version of the file system'
LABEL\t'Label of the file system'
UUID\t'UUID of the file system'
MOUNTPOINTS\t'Mount points of the device or partition'
START\t'Offset of the partition on its device, in bytes'
PTTYPE\t'Type of the partition table: gpt, dos'
PARTTYPE\t'Type of the partition: a GUID, or a number such as 0x83'
PARTLABEL\t'Name of the partition in the partition table'
PARTUUID\t'UUID of the partition in the partition table'
LIFETIME\t'When the device is detached automatically; - if loopd did not attach it'
STATE\t'attached, or detaching: detached at the last close'
FILESTATE\t'present, deleted, or replaced: another file has the path of the backing file; - if unknown'
FILE\t'Backing file, or the path that it had'
INODE\t'Inode of the backing file'
OFFSET\t'Offset of the device in the backing file, in bytes'
SIZELIMIT\t'Maximum number of bytes of the backing file; 0 is up to its end'
BLOCKSIZE\t'Logical block size in bytes'
DIO\t'Whether direct I/O bypasses the page cache of the backing file'
PARTSCAN\t'Whether the kernel scans for partitions'
AUTOCLEAR\t'Whether the kernel detaches the device at the last close'
REF\t'Reference'
MANAGED\t'Whether loopd attached the device'
OWNER\t'uid of the user who attached the device'
SINCE\t'When it was attached'
DISKSEQ\t'Disk sequence'"
complete -c loopctl -n "__fish_loopctl_using_subcommand list" -l all -d 'Also list the loop devices that loopd did not attach'
complete -c loopctl -n "__fish_loopctl_using_subcommand list" -l json -d 'Print a JSON array; sizes are in bytes, and in paths U+FFFD replaces bytes that are not UTF-8'
complete -c loopctl -n "__fish_loopctl_using_subcommand list" -l no-legend -d 'Do not print the header'
complete -c loopctl -n "__fish_loopctl_using_subcommand list" -l no-ask-password -d 'Never prompt for authorization'
complete -c loopctl -n "__fish_loopctl_using_subcommand list" -l no-color -d 'Disable colours and bold text'
complete -c loopctl -n "__fish_loopctl_using_subcommand list" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopctl -n "__fish_loopctl_using_subcommand info" -l json -d 'Print a JSON object; for a file that is attached more than once, one for each device'
complete -c loopctl -n "__fish_loopctl_using_subcommand info" -l no-ask-password -d 'Never prompt for authorization'
complete -c loopctl -n "__fish_loopctl_using_subcommand info" -l no-color -d 'Disable colours and bold text'
complete -c loopctl -n "__fish_loopctl_using_subcommand info" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -s p -l partition -d 'Mount this partition of the image' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -s t -l type -d 'The type of the file system, if udev has not recognized it' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -l options -d 'Further mount options, separated by commas. loopd has a list of the options that are allowed for each file system' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -l throwaway-dir -d 'Create the throwaway copy in this directory, instead of that of the file' -r -F
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -l encryption-type -d 'The type of an encrypted volume that is not recognized: VeraCrypt, or a header in another file' -r -f -a "luks\t''
bitlocker\t''
veracrypt\t''
truecrypt\t''"
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -l passphrase-file -d 'Read the passphrase from this file; - is standard input. One newline at its end is dropped' -r -F
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -l key-file -d 'Use the bytes of this file as the key; - is standard input' -r -F
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -l key-offset -d 'Skip this many bytes of the key file' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -l key-size -d 'Use this many bytes of the key file, at most 8M, instead of all' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -l header -d 'The LUKS header, if it is in a file of its own' -r -F
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -l pim -d 'The personal iterations multiplier of a VeraCrypt volume' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -s r -l read-only -d 'Mount read-only; a file that is not attached is attached read-only, too'
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -l json -d 'Print the device\'s properties as a JSON object instead of the mount point'
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -l throwaway -d 'Attach a writable copy of the file that is deleted with the device'
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -l yes -d 'Copy more than 1 GiB without a prompt. Without this option and without a terminal, such a copy fails'
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -l hidden -d 'Unlock the hidden volume within a VeraCrypt or TrueCrypt volume'
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -l system -d 'Unlock a system that VeraCrypt or TrueCrypt has encrypted'
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -l discard -d 'Pass discarded blocks on to the image, which frees space and shows which blocks are unused'
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -l open -d 'Show the mount point in the file manager'
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -l notify -d 'Also show errors as notifications'
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -l no-ask-password -d 'Never prompt for authorization'
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -l no-color -d 'Disable colours and bold text'
complete -c loopctl -n "__fish_loopctl_using_subcommand mount" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopctl -n "__fish_loopctl_using_subcommand unmount" -l lazy -d 'Remove a file system that is in use from the tree now; it is unmounted, and the device is detached, when its last user is done'
complete -c loopctl -n "__fish_loopctl_using_subcommand unmount" -l notify -d 'Also show errors as desktop notifications'
complete -c loopctl -n "__fish_loopctl_using_subcommand unmount" -l no-ask-password -d 'Never prompt for authorization'
complete -c loopctl -n "__fish_loopctl_using_subcommand unmount" -l no-color -d 'Disable colours and bold text'
complete -c loopctl -n "__fish_loopctl_using_subcommand unmount" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopctl -n "__fish_loopctl_using_subcommand unlock" -s p -l partition -d 'Unlock this partition. By default the whole image is unlocked, or its only encrypted partition' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand unlock" -l type -d 'The type, if it is not recognized: VeraCrypt, or a header in another file' -r -f -a "luks\t''
bitlocker\t''
veracrypt\t''
truecrypt\t''"
complete -c loopctl -n "__fish_loopctl_using_subcommand unlock" -l passphrase-file -d 'Read the passphrase from this file; - is standard input. One newline at its end is dropped' -r -F
complete -c loopctl -n "__fish_loopctl_using_subcommand unlock" -l key-file -d 'Use the bytes of this file as the key; - is standard input' -r -F
complete -c loopctl -n "__fish_loopctl_using_subcommand unlock" -l key-offset -d 'Skip this many bytes of the key file' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand unlock" -l key-size -d 'Use this many bytes of the key file, at most 8M, instead of all' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand unlock" -l header -d 'The LUKS header, if it is in a file of its own' -r -F
complete -c loopctl -n "__fish_loopctl_using_subcommand unlock" -l pim -d 'The personal iterations multiplier of a VeraCrypt volume' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand unlock" -s r -l read-only -d 'Make the cleartext read-only'
complete -c loopctl -n "__fish_loopctl_using_subcommand unlock" -l hidden -d 'Unlock the hidden volume within a VeraCrypt or TrueCrypt volume'
complete -c loopctl -n "__fish_loopctl_using_subcommand unlock" -l system -d 'Unlock a system that VeraCrypt or TrueCrypt has encrypted'
complete -c loopctl -n "__fish_loopctl_using_subcommand unlock" -l discard -d 'Pass discarded blocks on to the image, which frees space and shows which blocks are unused'
complete -c loopctl -n "__fish_loopctl_using_subcommand unlock" -l json -d 'Print the device\'s properties as a JSON object instead of the device with the cleartext'
complete -c loopctl -n "__fish_loopctl_using_subcommand unlock" -l no-ask-password -d 'Never prompt for authorization'
complete -c loopctl -n "__fish_loopctl_using_subcommand unlock" -l no-color -d 'Disable colours and bold text'
complete -c loopctl -n "__fish_loopctl_using_subcommand unlock" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopctl -n "__fish_loopctl_using_subcommand lock" -s p -l partition -d 'Lock this partition' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand lock" -l lazy -d 'If the cleartext is in use, remove it when its last user is done, and do not wait for that'
complete -c loopctl -n "__fish_loopctl_using_subcommand lock" -l no-ask-password -d 'Never prompt for authorization'
complete -c loopctl -n "__fish_loopctl_using_subcommand lock" -l no-color -d 'Disable colours and bold text'
complete -c loopctl -n "__fish_loopctl_using_subcommand lock" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopctl -n "__fish_loopctl_using_subcommand create" -l size -d 'The size of the image: a multiple of 512' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand create" -l filesystem -d 'The file system; ext4 by default. Not with --encrypt' -r -f -a "ext4\t'The usual one of Linux'
xfs\t'For large files'
btrfs\t'With checksums and snapshots'
vfat\t'FAT, for every system; files of less than 4 GiB'
exfat\t'For every system that is not old'
ntfs\t'For Windows'"
complete -c loopctl -n "__fish_loopctl_using_subcommand create" -l label -d 'The label of the file system, after which the mount point is named; with --encrypt, of the LUKS volume' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand create" -l passphrase-file -d 'Read the passphrase from this file; - is standard input. One newline at its end is dropped' -r -F
complete -c loopctl -n "__fish_loopctl_using_subcommand create" -l key-file -d 'Use the bytes of this file as the key; - is standard input' -r -F
complete -c loopctl -n "__fish_loopctl_using_subcommand create" -l key-offset -d 'Skip this many bytes of the key file' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand create" -l key-size -d 'Use this many bytes of the key file, at most 8M, instead of all' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand create" -l encrypt -d 'Make an encrypted image with LUKS2, of at least 32M. loopctl asks for the new passphrase'
complete -c loopctl -n "__fish_loopctl_using_subcommand create" -l no-ask-password -d 'Never prompt for authorization'
complete -c loopctl -n "__fish_loopctl_using_subcommand create" -l no-color -d 'Disable colours and bold text'
complete -c loopctl -n "__fish_loopctl_using_subcommand create" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopctl -n "__fish_loopctl_using_subcommand resize" -l no-ask-password -d 'Never prompt for authorization'
complete -c loopctl -n "__fish_loopctl_using_subcommand resize" -l no-color -d 'Disable colours and bold text'
complete -c loopctl -n "__fish_loopctl_using_subcommand resize" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopctl -n "__fish_loopctl_using_subcommand set" -l direct-io -d 'Turn direct I/O on or off; on fails if the backing file does not support it' -r -f -a "on\t'On'
off\t'Off'"
complete -c loopctl -n "__fish_loopctl_using_subcommand set" -s b -l block-size -d 'The logical block size: a power of two from 512 to 64K' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand set" -l lifetime -d 'When the device is detached automatically' -r -f -a "persistent\t''
mount\t''"
complete -c loopctl -n "__fish_loopctl_using_subcommand set" -l no-ask-password -d 'Never prompt for authorization'
complete -c loopctl -n "__fish_loopctl_using_subcommand set" -l no-color -d 'Disable colours and bold text'
complete -c loopctl -n "__fish_loopctl_using_subcommand set" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopctl -n "__fish_loopctl_using_subcommand rescan" -l no-ask-password -d 'Never prompt for authorization'
complete -c loopctl -n "__fish_loopctl_using_subcommand rescan" -l no-color -d 'Disable colours and bold text'
complete -c loopctl -n "__fish_loopctl_using_subcommand rescan" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -s o -l offset -d 'Start at this offset in the file' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l size-limit -d 'Use at most this many bytes of the file; 0 is up to its end' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -s b -l block-size -d 'The logical block size: a power of two from 512 to 64K; 0 lets loopd choose' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l reference -d 'A name of at most 63 bytes for the device, which losetup shows as REF' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l device -d 'Use this device: /dev/loop3, loop3 or 3. By default a free one is chosen' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l overlap -d 'What to do if the file is already attached' -r -f -a "allow\t''
refuse\t''
reuse\t''"
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l throwaway-dir -d 'Create the throwaway copy in this directory, instead of that of the file' -r -F
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -s p -l partition -d 'Unlock this partition; by default the whole image, or the only encrypted partition' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l encryption-type -d 'The type of an encrypted volume that is not recognized: VeraCrypt, or a header in another file' -r -f -a "luks\t''
bitlocker\t''
veracrypt\t''
truecrypt\t''"
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l passphrase-file -d 'Read the passphrase from this file; - is standard input. One newline at its end is dropped' -r -F
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l key-file -d 'Use the bytes of this file as the key; - is standard input' -r -F
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l key-offset -d 'Skip this many bytes of the key file' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l key-size -d 'Use this many bytes of the key file, at most 8M, instead of all' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l header -d 'The LUKS header, if it is in a file of its own' -r -F
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l pim -d 'The personal iterations multiplier of a VeraCrypt volume' -r
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -s r -l read-only -d 'Make the device read-only'
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l direct-io -d 'Bypass the page cache of the backing file; fails if the file does not support it'
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l no-partitions -d 'Do not create partition nodes'
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l no-wait -d 'Do not wait until udev has processed the device'
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l throwaway -d 'Attach a writable copy of the file that is deleted with the device'
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l yes -d 'Copy more than 1 GiB without a prompt. Without this option and without a terminal, such a copy fails'
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l unlock -d 'Unlock the encrypted volume, and run COMMAND with its cleartext'
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l hidden -d 'Unlock the hidden volume within a VeraCrypt or TrueCrypt volume'
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l system -d 'Unlock a system that VeraCrypt or TrueCrypt has encrypted'
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l discard -d 'Pass discarded blocks on to the image, which frees space and shows which blocks are unused'
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l no-ask-password -d 'Never prompt for authorization'
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -l no-color -d 'Disable colours and bold text'
complete -c loopctl -n "__fish_loopctl_using_subcommand run" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopctl -n "__fish_loopctl_using_subcommand monitor" -l json -d 'Print each event as a JSON object on a line, with event, time_us (microseconds since 1970), device, path (of the bus object) and changed (the properties with their new values; all of them for attached, partition-added and unlocked); for a partition and its cleartext also partition, its number'
complete -c loopctl -n "__fish_loopctl_using_subcommand monitor" -l no-ask-password -d 'Never prompt for authorization'
complete -c loopctl -n "__fish_loopctl_using_subcommand monitor" -l no-color -d 'Disable colours and bold text'
complete -c loopctl -n "__fish_loopctl_using_subcommand monitor" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopctl -n "__fish_loopctl_using_subcommand losetup" -l no-ask-password -d 'Never prompt for authorization'
complete -c loopctl -n "__fish_loopctl_using_subcommand losetup" -l no-color -d 'Disable colours and bold text'
complete -c loopctl -n "__fish_loopctl_using_subcommand completion" -l no-ask-password -d 'Never prompt for authorization'
complete -c loopctl -n "__fish_loopctl_using_subcommand completion" -l no-color -d 'Disable colours and bold text'
complete -c loopctl -n "__fish_loopctl_using_subcommand completion" -s h -l help -d 'Print help (see more with \'--help\')'
complete -c loopctl -n "__fish_loopctl_using_subcommand help; and not __fish_seen_subcommand_from attach detach list info mount unmount unlock lock create resize set rescan run monitor losetup completion help" -f -a "attach" -d 'Attach a file to a free loop device and print the device node'
complete -c loopctl -n "__fish_loopctl_using_subcommand help; and not __fish_seen_subcommand_from attach detach list info mount unmount unlock lock create resize set rescan run monitor losetup completion help" -f -a "detach" -d 'Detach loop devices'
complete -c loopctl -n "__fish_loopctl_using_subcommand help; and not __fish_seen_subcommand_from attach detach list info mount unmount unlock lock create resize set rescan run monitor losetup completion help" -f -a "list" -d 'List the loop devices and their partitions'
complete -c loopctl -n "__fish_loopctl_using_subcommand help; and not __fish_seen_subcommand_from attach detach list info mount unmount unlock lock create resize set rescan run monitor losetup completion help" -f -a "info" -d 'Show every property of a loop device'
complete -c loopctl -n "__fish_loopctl_using_subcommand help; and not __fish_seen_subcommand_from attach detach list info mount unmount unlock lock create resize set rescan run monitor losetup completion help" -f -a "mount" -d 'Mount the file system in an image and print the mount point'
complete -c loopctl -n "__fish_loopctl_using_subcommand help; and not __fish_seen_subcommand_from attach detach list info mount unmount unlock lock create resize set rescan run monitor losetup completion help" -f -a "unmount" -d 'Unmount an image, a device, a partition or a directory'
complete -c loopctl -n "__fish_loopctl_using_subcommand help; and not __fish_seen_subcommand_from attach detach list info mount unmount unlock lock create resize set rescan run monitor losetup completion help" -f -a "unlock" -d 'Unlock an encrypted volume and print the device with its cleartext'
complete -c loopctl -n "__fish_loopctl_using_subcommand help; and not __fish_seen_subcommand_from attach detach list info mount unmount unlock lock create resize set rescan run monitor losetup completion help" -f -a "lock" -d 'Lock an encrypted volume: remove the device with its cleartext'
complete -c loopctl -n "__fish_loopctl_using_subcommand help; and not __fish_seen_subcommand_from attach detach list info mount unmount unlock lock create resize set rescan run monitor losetup completion help" -f -a "create" -d 'Create an image with a file system, or an encrypted one'
complete -c loopctl -n "__fish_loopctl_using_subcommand help; and not __fish_seen_subcommand_from attach detach list info mount unmount unlock lock create resize set rescan run monitor losetup completion help" -f -a "resize" -d 'Set the size of a loop device to the current size of its backing file'
complete -c loopctl -n "__fish_loopctl_using_subcommand help; and not __fish_seen_subcommand_from attach detach list info mount unmount unlock lock create resize set rescan run monitor losetup completion help" -f -a "set" -d 'Change the settings of a loop device'
complete -c loopctl -n "__fish_loopctl_using_subcommand help; and not __fish_seen_subcommand_from attach detach list info mount unmount unlock lock create resize set rescan run monitor losetup completion help" -f -a "rescan" -d 'Re-read the partition table of a loop device'
complete -c loopctl -n "__fish_loopctl_using_subcommand help; and not __fish_seen_subcommand_from attach detach list info mount unmount unlock lock create resize set rescan run monitor losetup completion help" -f -a "run" -d 'Attach a file while a command runs'
complete -c loopctl -n "__fish_loopctl_using_subcommand help; and not __fish_seen_subcommand_from attach detach list info mount unmount unlock lock create resize set rescan run monitor losetup completion help" -f -a "monitor" -d 'Print a line for each loop device and partition that is added, changed or removed'
complete -c loopctl -n "__fish_loopctl_using_subcommand help; and not __fish_seen_subcommand_from attach detach list info mount unmount unlock lock create resize set rescan run monitor losetup completion help" -f -a "losetup" -d 'Accept the arguments of losetup, and print what losetup prints'
complete -c loopctl -n "__fish_loopctl_using_subcommand help; and not __fish_seen_subcommand_from attach detach list info mount unmount unlock lock create resize set rescan run monitor losetup completion help" -f -a "completion" -d 'Print the completion script for a shell'
complete -c loopctl -n "__fish_loopctl_using_subcommand help; and not __fish_seen_subcommand_from attach detach list info mount unmount unlock lock create resize set rescan run monitor losetup completion help" -f -a "help" -d 'Print this message or the help of the given subcommand(s)'
