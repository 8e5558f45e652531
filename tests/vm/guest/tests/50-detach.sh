# The end of attachments that are in use, or that other programs end.
# shellcheck shell=bash disable=SC2154 # of lib.sh

test_busy_names_the_mount_points() {
    ext4_image /home/alice/disk.img busy alice
    local device answer
    device=$(active alice loopctl attach disk.img)
    mkdir -p '/mnt/a b'
    mount "$device" '/mnt/a b'
    answer=$(active alice "$probe" detach "$device")
    refusal "$answer" org.loopd1.Error.Busy "$device" '/mnt/a b'
    attached "$device"
    umount '/mnt/a b'
    active alice loopctl detach "$device"
    detached "$device"
}

is_seen_as_swap() {
    udevadm info --query=property --name "$1" | grep -x ID_FS_TYPE=swap >/dev/null
}

# The unit's sandbox hides /proc/swaps from loopd, but not from loopctl.
test_busy_names_swap_and_mapped_devices() {
    image /home/alice/disk.img 32M alice
    local device answer
    device=$(active alice loopctl attach disk.img)
    dmsetup create held --table "0 8192 linear $device 0"
    answer=$(active alice "$probe" detach "$device")
    refusal "$answer" org.loopd1.Error.Busy "$device" 'held by /dev/dm-[0-9]+ \(held\)'
    dmsetup remove held

    mkswap "$device"
    eventually is_seen_as_swap "$device"
    swapon "$device"
    answer=$(active alice "$probe" detach "$device")
    refusal "$answer" org.loopd1.Error.Busy "claimed by swap on $device, by a file system"
    answer=$(refused 1 active alice loopctl detach "$device")
    contains "$answer" "$device is in use as swap"
    swapoff "$device"
    active alice loopctl detach "$device"
    detached "$device"
}

test_a_lazy_detach_ends_with_the_last_user() {
    ext4_image /home/alice/disk.img lazy alice
    local device
    device=$(active alice loopctl attach disk.img)
    mount "$device" /mnt
    active alice loopctl detach --lazy "$device"
    equal "state" "$(loopctl list --json | jq -r '.[].state')" detaching
    echo kept >/mnt/file
    umount /mnt
    eventually is_free "$device"
    equal "file" "$(debugfs -R 'cat file' /home/alice/disk.img 2>/dev/null)" kept
}

is_unlisted() {
    ! loopctl list --all --no-legend | grep "^$1 " >/dev/null
}

test_a_detach_by_losetup_is_noticed() {
    image /home/alice/disk.img 1M alice
    local device
    device=$(active alice loopctl attach disk.img)
    losetup -d "$device"
    eventually is_unlisted "$device"
}

is_listed_as_foreign() {
    loopctl list --all --json | jq -e --arg device "$1" '.[] | select(.device == $device and .managed == false)'
}

test_an_attach_by_losetup_is_listed() {
    image /home/alice/disk.img 1M alice
    local device
    device=$(losetup -f --show /home/alice/disk.img)
    eventually is_listed_as_foreign "$device"
    loopctl detach "$device"
    detached "$device"
}
