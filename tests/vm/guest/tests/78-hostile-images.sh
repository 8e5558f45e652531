# Images whose superblock requests a panic or another block device.
# shellcheck shell=bash disable=SC2154,SC2164 # of lib.sh; what fails ends the test
# shellcheck source=tests/vm/guest/lib/mount.sh
source ./lib/mount.sh

# A directory entry without its inode: reading it is a file system error.
damaged_image() {
    image "$1" 16M alice
    mkdir -p tree
    echo victim >tree/victim
    mke2fs -q -t "$2" -e panic -L "panic-$2" -d tree "$1"
    debugfs -w -R 'clri /victim' "$1" 2>/dev/null
    contains "$(dumpe2fs -h "$1" 2>/dev/null)" '^Errors behavior: +Panic'
}

test_an_image_that_asks_for_a_panic_gets_none() {
    loopctl list
    cd /home/alice
    local type disk place
    for type in ext2 ext3 ext4; do
        damaged_image panic.img "$type"
        disk=$(attach_for_mount panic.img)
        place=$(mount_volume "$disk")
        contains "$(findmnt -n -o OPTIONS "$place")" 'errors=remount-ro'
        refused 2 active alice ls -l "$place/victim"
        # After the error it is read-only.
        contains "$(journalctl -k -b --no-pager | grep "EXT4-fs.*${disk#/dev/}")" 'error' 'Remounting filesystem read-only'
        refused 1 active alice touch "$place/new"
        unmount_volume "$disk"
        expect_nothing_left
    done
}

# not_mounted_by_alice FILE ERROR PATTERN [OPTION…]: the mount is refused; notes the reply.
not_mounted_by_alice() {
    local disk answer
    disk=$(active alice loopctl attach "$1")
    answer=$(call_volume active alice mount "$disk" "${@:4}")
    refusal "$answer" "$2" "$3"
    note "$1 ${*:4}: $(message "$answer")"
    active alice loopctl detach "$disk"
}

test_a_journal_on_a_device_of_the_machine_is_not_opened() {
    loopctl list
    cd /home/alice
    local host disk
    image /root/journal.img 16M
    host=$(losetup --find --show /root/journal.img)
    mke2fs -q -O journal_dev -b 4096 "$host"
    image external.img 16M alice
    mke2fs -q -t ext4 -b 4096 -J "device=$host" external.img
    not_mounted_by_alice external.img "$not_supported" "its journal is on another block device .7:${host#/dev/loop}."
    not_mounted_by_alice external.img "$not_supported" 'its journal is on another block device' filesystem=s:ext3
    # The same for a device without a journal.
    image named.img 16M alice
    mke2fs -q -t ext4 -b 4096 -E "mount_opts=journal_path=$host" named.img ||
        { mke2fs -q -t ext4 -b 4096 named.img; tune2fs -E "mount_opts=journal_path=$host" named.img; }
    not_mounted_by_alice named.img "$not_supported" "sets the mount option \"journal_path=$host\""
    # The image is valid: root may mount it.
    disk=$(losetup --find --show external.img)
    mount "$disk" /mnt
    umount /mnt
    losetup --detach "$disk" "$host"
}

# little_endian NUMBER BYTES OFFSET FILE
little_endian() {
    local number=$1 bytes=$2 escaped=
    while ((bytes--)); do
        escaped+=$(printf '\\x%02x' $((number & 255)))
        number=$((number >> 8))
    done
    # shellcheck disable=SC2059 # these are the bytes
    printf "$escaped" | dd of="$4" bs=1 seek="$3" conv=notrunc status=none
}

test_data_on_a_device_of_the_machine_is_not_opened() {
    loopctl list
    cd /home/alice
    local host slot
    image /root/data.img 8M
    host=$(losetup --find --show /root/data.img)
    mkdir -p tree
    echo data >tree/file
    mkfs.erofs --quiet devices.img tree
    chown alice: devices.img
    slot=$(stat -c %s devices.img)
    # A device table with one entry after the end, and no checksum.
    truncate --size=+4096 devices.img
    little_endian 0 4 $((1024 + 0x08)) devices.img
    little_endian 8 4 $((1024 + 0x50)) devices.img
    little_endian 1 2 $((1024 + 0x56)) devices.img
    little_endian $((slot / 128)) 2 $((1024 + 0x58)) devices.img
    printf '%s' "$host" | dd of=devices.img bs=1 seek="$slot" conv=notrunc status=none
    little_endian 16 4 $((slot + 64)) devices.img
    not_mounted_by_alice devices.img "$not_supported" 'its data is on another block device .by a name in its device table.'
    if mount -t erofs -o loop,ro devices.img /mnt; then
        note "the kernel mounts it, and $host is: $(mount -t ext4 "$host" tree 2>&1 | grep -o busy || echo closed)"
        umount /mnt
    fi
    losetup --detach "$host"
}

readonly Uuid=8ee44eb2-2b1c-4b3c-8f19-6a1c6d3c0b11

test_a_btrfs_with_the_uuid_of_the_machines_is_refused() {
    loopctl list
    cd /home/alice
    local host
    image /root/host.img 128M
    mkfs.btrfs -q -U $Uuid /root/host.img
    cp /root/host.img copy.img
    chown alice: copy.img
    host=$(losetup --find --show /root/host.img)
    mount "$host" /mnt
    not_mounted_by_alice copy.img org.loopd1.Error.Busy "a mounted file system has the same UUID $Uuid .$host."
    umount /mnt
    not_mounted_by_alice copy.img org.loopd1.Error.Busy "another device has the same UUID $Uuid .$host."
    losetup --detach "$host"
    eventually is_free "$host"
    # Without that conflict it is mounted.
    local disk
    disk=$(attach_for_mount copy.img)
    mount_volume "$disk"
    unmount_volume "$disk"
    expect_nothing_left
}

test_a_btrfs_over_two_images_of_a_user() {
    loopctl list
    cd /home/alice
    local one other devices place
    image one.img 128M alice
    image two.img 128M alice
    devices=("$(losetup --find --show one.img)")
    devices+=("$(losetup --find --show two.img)")
    mkfs.btrfs -q -f -L pair "${devices[@]}"
    losetup --detach "${devices[@]}"
    eventually is_free "${devices[0]}"
    eventually is_free "${devices[1]}"
    btrfs device scan --forget
    one=$(active alice loopctl attach one.img)
    refusal "$(call_volume active alice mount "$one")" $not_supported 'a btrfs over 2 devices, and 1 of them can be found'
    other=$(active alice loopctl attach two.img)
    place=$(mount_volume "$one")
    contains "$(btrfs filesystem show "$place")" "path $one" "path $other"
    unmount_volume "$one"
    active alice loopctl detach "$one" "$other"
    expect_nothing_left
    btrfs device scan --forget
}
