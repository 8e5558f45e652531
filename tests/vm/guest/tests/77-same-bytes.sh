# No two file systems are mounted on the same bytes, not even if another program mounted the first one.
# shellcheck shell=bash disable=SC2154,SC2164 # of lib.sh; what fails ends the test

readonly image=/home/alice/disk.img

# make KIND: creates an image with this file system that alice owns.
make() {
    case $1 in
        ext4) image $image 16M && mkfs.ext4 -q -L data $image ;;
        xfs) image $image 320M && mkfs.xfs -q -L data $image ;;
        btrfs) image $image 128M && mkfs.btrfs -q -L data $image ;;
        vfat) image $image 16M && mkfs.vfat -n DATA $image >/dev/null ;;
    esac
    chown alice: $image
}

# sound KIND: the file system check finds no error.
sound() {
    local -A command=([ext4]='e2fsck -fn' [xfs]='xfs_repair -n' [btrfs]='btrfs check' [vfat]='fsck.vfat -n')
    local output
    # shellcheck disable=SC2086 # a command and its option
    output=$(${command[$1]} $image 2>&1) || fail "the file system check: $output"
}

# not_mounted_again ARGUMENT…: the mount by alice is refused; prints the message.
not_mounted_again() {
    local output
    output=$(refused 1 active alice loopctl mount "$@")
    contains "$output" 'shows the same bytes'
    echo "$output"
}

# refused_for DEVICE PATTERN…
refused_for() {
    local output option
    for option in '' --read-only; do
        # shellcheck disable=SC2086 # an option or nothing
        output=$(not_mounted_again $option disk.img)
        contains "$output" "$1 " "${@:2}"
    done
    equal "devices that are left" "$(losetup -n -O NAME -j $image | grep -vc "^$1\$")" 0
}

# scenarios KIND: mounts by other programs.
scenarios() {
    local device holder
    make "$1"
    # By losetup and mount.
    device=$(losetup --find --show $image)
    mount "$device" /mnt
    refused_for "$device" 'mounted on /mnt'
    echo data >/mnt/file
    # Unmounted lazily, and still in use.
    exec 7>>/mnt/file
    umount --lazy /mnt
    refused_for "$device" 'unmounted lazily or mounted in another mount namespace'
    echo more >&7
    exec 7>&-
    eventually mount "$device" /mnt
    umount /mnt
    # In another mount namespace.
    unshare --mount sh -c "mount $device /mnt && : >ready && exec sleep infinity" &
    holder=$!
    eventually test -e ready
    refused_for "$device" 'mounted in another mount namespace'
    kill $holder
    wait $holder || true
    rm ready
    losetup --detach "$device"
    eventually is_free "$device"
    # By mount -o loop.
    mount -o loop $image /mnt
    refused_for "$(findmnt -no SOURCE /mnt)" 'mounted on /mnt'
    umount /mnt
    sound "$1"
    # It is not in use any more.
    local place
    place=$(active alice loopctl mount disk.img)
    equal "file" "$(cat "$place/file")" "$(printf 'data\nmore')"
    active alice loopctl unmount disk.img
    sound "$1"
}

test_an_ext4_image_is_not_mounted_twice() {
    scenarios ext4
}

test_an_xfs_image_is_not_mounted_twice() {
    scenarios xfs
}

test_a_btrfs_image_is_not_mounted_twice() {
    scenarios btrfs
}

test_a_vfat_image_is_not_mounted_twice() {
    scenarios vfat
}

test_mounts_of_stacked_devices_are_found() {
    local below above
    make ext4
    below=$(losetup --find --show $image)
    above=$(losetup --find --show "$below")
    mount "$above" /mnt
    contains "$(not_mounted_again disk.img)" "$above " 'mounted on /mnt'
    umount /mnt
    losetup --detach "$above"
    eventually is_free "$above"
    dmsetup create same-bytes --table "0 $(blockdev --getsz "$below") linear $below 0"
    mount /dev/mapper/same-bytes /mnt
    contains "$(not_mounted_again disk.img)" "$below " 'held by /dev/dm-' 'mounted on /mnt'
    umount /mnt
    dmsetup remove same-bytes
    losetup --detach "$below"
    eventually is_free "$below"
    sound ext4
}

test_a_mount_at_another_offset_is_found() {
    local part
    partitioned_image $image dos 512 alice
    part=$(losetup --find --show --offset 1M --sizelimit 4M $image)
    mount "$part" /mnt
    contains "$(not_mounted_again disk.img -p 1)" "$part " 'mounted on /mnt'
    # The other partition consists of other bytes.
    active alice loopctl mount disk.img -p 2
    active alice loopctl unmount disk.img
    umount /mnt
    losetup --detach "$part"
    eventually is_free "$part"
}

test_a_mount_by_udisks_is_found() {
    local device
    make ext4
    active alice udisksctl loop-setup --no-user-interaction -f $image
    device=$(device_of $image)
    active alice udisksctl mount --no-user-interaction -b "$device"
    contains "$(not_mounted_again disk.img)" "$device " 'mounted on /(run/)?media/alice/data'
    active alice udisksctl unmount --no-user-interaction -b "$device"
    active alice udisksctl loop-delete --no-user-interaction -b "$device"
    eventually is_free "$device"
    systemctl stop udisks2.service
    sound ext4
}

test_a_mount_by_another_user_is_found() {
    make ext4
    chmod 755 /home/alice
    chmod 644 $image
    active bob loopctl mount $image
    contains "$(not_mounted_again disk.img)" 'mounted on /run/media/bob/data'
    active bob loopctl unmount $image
    chmod 750 /home/alice
    sound ext4
}
