# No two file systems are mounted on the same bytes, whoever has mounted the other one.
# shellcheck shell=bash disable=SC2154,SC2164 # of lib.sh; what fails ends the test

readonly image=/home/alice/disk.img

# make KIND: an image of alice's with this file system.
make() {
    case $1 in
        ext4) image $image 16M && mkfs.ext4 -q -L data $image ;;
        xfs) image $image 320M && mkfs.xfs -q -L data $image ;;
        btrfs) image $image 128M && mkfs.btrfs -q -L data $image ;;
        vfat) image $image 16M && mkfs.vfat -n DATA $image >/dev/null ;;
    esac
    chown alice: $image
}

# sound KIND: the file system is what it should be.
sound() {
    local -A command=([ext4]='e2fsck -fn' [xfs]='xfs_repair -n' [btrfs]='btrfs check' [vfat]='fsck.vfat -n')
    local said
    # shellcheck disable=SC2086 # a command and its option
    said=$(${command[$1]} $image 2>&1) || fail "the file system check: $said"
}

# not_mounted_again DEVICE PATTERN…: alice is refused, with the other device and what it is used by.
not_mounted_again() {
    local said
    said=$(refused 1 active alice loopctl mount "$@")
    contains "$said" 'shows the same bytes'
    echo "$said"
}

# refused_for DEVICE PATTERN…
refused_for() {
    local said option
    for option in '' --read-only; do
        # shellcheck disable=SC2086 # an option or nothing
        said=$(not_mounted_again $option disk.img)
        contains "$said" "$1 " "${@:2}"
    done
    equal "devices that are left" "$(losetup -n -O NAME -j $image | grep -vc "^$1\$")" 0
}

# scenarios KIND: those that any root's tool can bring about.
scenarios() {
    local device holder
    make "$1"
    # By losetup and mount.
    device=$(losetup --find --show $image)
    mount "$device" /mnt
    refused_for "$device" 'mounted on /mnt'
    echo data >/mnt/file
    # Lazily unmounted, and still in use.
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
    # By mount alone.
    mount -o loop $image /mnt
    refused_for "$(findmnt -no SOURCE /mnt)" 'mounted on /mnt'
    umount /mnt
    sound "$1"
    # Nobody has it now.
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

test_what_is_stacked_on_a_device_counts() {
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

test_another_offset_of_the_file_counts() {
    local part
    partitioned_image $image dos 512 alice
    part=$(losetup --find --show --offset 1M --sizelimit 4M $image)
    mount "$part" /mnt
    contains "$(not_mounted_again disk.img -p 1)" "$part " 'mounted on /mnt'
    # The other partition has other bytes.
    active alice loopctl mount disk.img -p 2
    active alice loopctl unmount disk.img
    umount /mnt
    losetup --detach "$part"
    eventually is_free "$part"
}

test_what_the_peer_has_mounted_counts() {
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

test_what_another_user_has_mounted_counts() {
    make ext4
    chmod 755 /home/alice
    chmod 644 $image
    active bob loopctl mount $image
    contains "$(not_mounted_again disk.img)" 'mounted on /run/media/bob/data'
    active bob loopctl unmount $image
    chmod 750 /home/alice
    sound ext4
}
