# udev activates nothing on a device that a user other than root attached with loopd. Each test also shows that
# udev does activate it if root attaches the image with losetup.
# shellcheck shell=bash disable=SC2164 # what fails ends the test

# settled: udev and the jobs that it starts are done.
settled() {
    udevadm settle --timeout=60
    while systemctl list-jobs --no-legend | grep -q .; do sleep 0.2; done
}

# LVM would not activate what it remembers from earlier events.
forget_events() {
    systemctl reset-failed 'lvm-activate-*' 2>/dev/null || true
    rm -f /run/lvm/pvs_online/* /run/lvm/vgs_online/* /run/lvm/pvs_lookup/*
}

# property NAME DEVICE
property() {
    udevadm info --query=property --name="$2" | sed -n "s/^$1=//p"
}

# as_alice FILE: attaches as alice, waits for udev; prints the device.
as_alice() {
    local device
    forget_events
    device=$(active alice loopctl attach "$1")
    settled
    equal "untrusted" "$(property LOOPD_UNTRUSTED "$device")" 1
    echo "$device"
}

# as_root FILE: attaches with losetup, waits for udev; prints the device.
as_root() {
    local device
    forget_events
    device=$(losetup --find --show "$1")
    udevadm settle --timeout=60
    equal "untrusted" "$(property LOOPD_UNTRUSTED "$device")" ""
    echo "$device"
}

# freed DEVICE…
freed() {
    local device
    for device; do
        losetup --detach "$device"
        eventually is_free "$device"
    done
    settled
}

# type_of DEVICE: as loopd shows it.
type_of() {
    loopctl info --json "$1" | jq -r .filesystem.type
}

# ---- LVM

# volume_group FILE NAME: creates a volume group with one volume; udev processes it after the detach.
volume_group() {
    local device
    image "$1" 32M
    udevadm control --stop-exec-queue
    device=$(losetup --find --show "$1")
    pvcreate -q -y "$device"
    vgcreate -q "$2" "$device"
    lvcreate -q -y -an -Zn -Wn -n volume -L 4M "$2"
    losetup --detach "$device"
    eventually is_free "$device"
    udevadm control --start-exec-queue
    settled
}

has_volume() {
    dmsetup info "$1-volume" >/dev/null 2>&1
}

has_no_volume() {
    ! has_volume "$1" || fail "$1 was activated"
}

test_udev_activates_no_volume_group_of_a_user() {
    local device
    loopctl list
    cd /home/alice
    volume_group lvm.img group
    chown alice: lvm.img
    device=$(as_alice lvm.img)
    has_no_volume group
    equal "type" "$(type_of "$device")" LVM2_member
    equal "type for the others" "$(property ID_FS_TYPE "$device")" ""
    # Neither later, nor at another event, nor without a daemon.
    forget_events
    systemctl kill --signal=KILL --kill-whom=main loopd.service
    udevadm trigger --action=change "$device"
    udevadm trigger --action=add "$device"
    settled
    has_no_volume group
    loopctl info "$device"
    udevadm trigger --action=change --settle "$device"
    settled
    has_no_volume group
    active alice loopctl detach "$device"
    # It is activated if root attaches it, with losetup or with loopd.
    device=$(as_root lvm.img)
    eventually has_volume group
    vgchange -q -an group
    freed "$device"
    forget_events
    device=$(loopctl attach lvm.img)
    eventually has_volume group
    equal "type" "$(type_of "$device")" LVM2_member
    vgchange -q -an group
    loopctl detach "$device"
}

test_udev_activates_no_volume_group_named_as_the_machines() {
    local host device
    loopctl list
    cd /home/alice
    volume_group /root/host.img group
    volume_group lvm.img group
    chown alice: lvm.img
    host=$(as_root /root/host.img)
    eventually has_volume group
    device=$(as_alice lvm.img)
    contains "$(dmsetup deps group-volume -o devname)" "(${host#/dev/})"
    equal "groups that were asked for" "$(journalctl -b --no-pager -u "lvm-activate-group*" | grep -c "${device#/dev/}" || true)" 0
    active alice loopctl detach "$device"
    vgchange -q -an group
    freed "$host"
}

test_udev_activates_nothing_that_is_built_on_a_device_of_a_user() {
    local device
    loopctl list
    cd /home/alice
    volume_group inner.img inner
    image outer.img 40M
    dd if=inner.img of=outer.img bs=1M seek=4 conv=notrunc status=none
    chown alice: outer.img
    device=$(as_alice outer.img)
    forget_events
    dmsetup create mapped --table "0 65536 linear $device 8192"
    settled
    equal "untrusted" "$(property LOOPD_UNTRUSTED /dev/mapper/mapped)" 1
    equal "type" "$(property LOOPD_FS_TYPE /dev/mapper/mapped)" LVM2_member
    [[ $(property SYSTEMD_READY /dev/mapper/mapped) != 0 ]] || fail "no mount unit could use it"
    has_no_volume inner
    # The same for a device on top of that.
    dmsetup create twice --table "0 65536 linear /dev/mapper/mapped 0"
    settled
    equal "untrusted" "$(property LOOPD_UNTRUSTED /dev/mapper/twice)" 1
    has_no_volume inner
    dmsetup remove twice
    dmsetup remove mapped
    active alice loopctl detach "$device"
    device=$(as_root outer.img)
    forget_events
    dmsetup create mapped --table "0 65536 linear $device 8192"
    eventually has_volume inner
    vgchange -q -an inner
    dmsetup remove mapped
    freed "$device"
}

# ---- MD

has_array() {
    grep -q "${1#/dev/}\[" /proc/mdstat
}

# added DEVICE: mdadm's rule of Debian 13 looks at a bare disk at its "add" only, and attaching is a "change".
added() {
    udevadm trigger --action=add --settle "$1"
    settled
}

test_udev_assembles_no_array_of_a_user() {
    local device
    loopctl list
    cd /home/alice
    modprobe raid1
    image md.img 16M
    device=$(losetup --find --show md.img)
    mdadm --create --quiet --run --force --metadata=1.2 --level=1 --raid-devices=1 /dev/md/alone "$device"
    settled
    eventually mdadm --stop --quiet /dev/md/alone
    freed "$device"
    chown alice: md.img
    device=$(as_alice md.img)
    added "$device"
    ! has_array "$device" || fail "assembled"
    equal "type" "$(type_of "$device")" linux_raid_member
    active alice loopctl detach "$device"
    device=$(as_root md.img)
    added "$device"
    eventually has_array "$device"
    eventually mdadm --stop --scan
    freed "$device"
}

test_udev_adds_nothing_of_a_user_to_an_array_of_the_machine() {
    local one other host device
    loopctl list
    cd /home/alice
    modprobe raid1
    image /root/one.img 16M
    image other.img 16M
    one=$(losetup --find --show /root/one.img)
    other=$(losetup --find --show other.img)
    mdadm --create --quiet --run --metadata=1.2 --bitmap=internal --assume-clean --level=1 --raid-devices=2 /dev/md/pair "$one" "$other"
    settled
    eventually mdadm --stop --quiet /dev/md/pair
    freed "$one" "$other"
    chown alice: other.img
    host=$(as_root /root/one.img)
    # The array waits for its second member.
    added "$host"
    has_array "$host"
    device=$(as_alice other.img)
    added "$device"
    ! has_array "$device" || fail "it writes what the machine writes to alice's file"
    active alice loopctl detach "$device"
    device=$(as_root other.img)
    added "$device"
    eventually has_array "$device"
    eventually mdadm --stop --scan
    freed "$device" "$host"
}

test_udev_assembles_no_array_in_a_partition_of_a_user() {
    local device
    loopctl list
    cd /home/alice
    modprobe raid1
    image disk.img 32M
    printf 'start=2048, size=32768, type=linux-raid\n' | sfdisk --quiet --label gpt disk.img
    device=$(losetup --find --show --partscan disk.img)
    udevadm settle
    mdadm --create --quiet --run --force --metadata=1.2 --level=1 --raid-devices=1 /dev/md/alone "${device}p1"
    settled
    eventually mdadm --stop --quiet /dev/md/alone
    freed "$device"
    chown alice: disk.img
    device=$(as_alice disk.img)
    equal "untrusted" "$(property LOOPD_UNTRUSTED "${device}p1")" 1
    ! has_array "${device}p1" || fail "assembled"
    udevadm trigger --action=add --settle "${device}p1"
    ! has_array "${device}p1" || fail "assembled at a later event"
    active alice loopctl detach "$device"
    device=$(losetup --find --show --partscan disk.img)
    eventually has_array "${device}p1"
    eventually mdadm --stop --scan
    freed "$device"
}

# ---- bcache

is_cached() {
    [[ -e /sys/block/${1#/dev/}/bcache ]]
}

test_udev_registers_no_bcache_of_a_user() {
    local device
    loopctl list
    cd /home/alice
    image bcache.img 16M
    make-bcache -B bcache.img
    # Newer versions of libblkid do not recognise it; the tools of bcache do.
    chown alice: bcache.img
    device=$(as_alice bcache.img)
    ! is_cached "$device" || fail "registered"
    equal "type" "$(type_of "$device")" bcache
    active alice loopctl detach "$device"
    device=$(as_root bcache.img)
    eventually is_cached "$device"
    echo 1 >"/sys/block/${device#/dev/}/bcache/stop"
    freed "$device"
}

test_udev_looks_for_no_bcache_where_it_finds_nothing() {
    local device
    loopctl list
    cd /home/alice
    image bcache.img 16M
    make-bcache -B bcache.img
    # With a second signature libblkid reports nothing, and bcache's rule probes the device itself.
    mkfs.ext4 -q -F -O ^has_journal -b 1024 ext4.img 16M
    dd if=ext4.img of=bcache.img bs=1024 skip=1 seek=1 count=1 conv=notrunc status=none
    chown alice: bcache.img
    device=$(as_alice bcache.img)
    ! is_cached "$device" || fail "registered"
    note "udev finds '$(property LOOPD_FS_TYPE "$device")$(property ID_FS_TYPE "$device")'"
    active alice loopctl detach "$device"
}

# ---- btrfs

# scanned DEVICE: by the kernel, since the cursor.
scanned() {
    journalctl -k -b --no-pager --after-cursor="$cursor" | grep -q "BTRFS: device .*$1 "
}

test_udev_shows_no_btrfs_of_a_user_to_the_kernel() {
    local device cursor
    loopctl list
    cd /home/alice
    # Linux 6.12 remembers only file systems with further devices.
    image btrfs.img 128M
    image other.img 128M
    mkfs.btrfs -q -L ours btrfs.img other.img
    chown alice: btrfs.img
    cursor=$(journalctl -n 0 --show-cursor | sed -n 's/^-- cursor: //p')
    device=$(as_alice btrfs.img)
    ! scanned "$device" || fail "scanned"
    equal "type" "$(type_of "$device")" btrfs
    active alice loopctl detach "$device"
    btrfs device scan --forget
    cursor=$(journalctl -n 0 --show-cursor | sed -n 's/^-- cursor: //p')
    device=$(as_root btrfs.img)
    eventually scanned "$device"
    freed "$device"
    btrfs device scan --forget
}

test_a_btrfs_that_udev_does_not_show_to_the_kernel_can_be_mounted() {
    local device
    cd /home/alice
    image btrfs.img 128M
    mkfs.btrfs -q -L mine btrfs.img
    chown alice: btrfs.img
    device=$(as_alice btrfs.img)
    active alice loopctl mount "$device"
    active alice loopctl unmount "$device"
    active alice loopctl detach "$device"
    btrfs device scan --forget
}

# ---- rules for other kinds of disks

test_udev_runs_nothing_of_dmraid_and_multipath_for_an_image() {
    local device
    loopctl list
    cd /home/alice
    image blank.img 8M alice
    device=$(as_alice blank.img)
    equal "multipath" "$(property DM_MULTIPATH_DEVICE_PATH "$device")" ""
    # Their rules do not match loop devices; this test fails if that changes.
    ! grep -hE 'KERNEL==".*loop' /usr/lib/udev/rules.d/*{multipath,mpath,dmraid}*.rules 2>/dev/null || fail "a rule matches loop devices"
    active alice loopctl detach "$device"
}

# ---- links

# link_is LABEL DEVICE
link_is() {
    equal "link $1" "$(realpath "/dev/disk/by-label/$1")" "$2"
    equal "link to its UUID" "$(realpath "/dev/disk/by-uuid/$Same")" "$2"
}

readonly Same=6f1c0a4e-0d1b-4b6e-9c55-3f0e5b7d2a11

test_no_image_of_a_user_takes_a_link_over() {
    local host device
    loopctl list
    cd /home/alice
    ext4_image /root/host.img same
    tune2fs -U $Same /root/host.img >/dev/null
    cp /root/host.img same.img
    chown alice: same.img
    host=$(as_root /root/host.img)
    link_is same "$host"
    device=$(as_alice same.img)
    link_is same "$host"
    # In the other order it loses the links, and it keeps them while no other device has the label.
    freed "$host"
    link_is same "$device"
    host=$(as_root /root/host.img)
    link_is same "$host"
    active alice loopctl detach "$device"
    link_is same "$host"
    freed "$host"
}

# ---- configuration

test_an_administrator_can_allow_activation() {
    local device
    loopctl list
    cd /home/alice
    trap 'rm -f /etc/udev/rules.d/62-trust.rules; udevadm control --reload' EXIT
    echo 'ENV{ID_FS_TYPE}=="LVM2_member", ENV{LOOPD_TRUSTED}="1"' >/etc/udev/rules.d/62-trust.rules
    udevadm control --reload
    volume_group lvm.img group
    chown alice: lvm.img
    forget_events
    device=$(active alice loopctl attach lvm.img)
    eventually has_volume group
    vgchange -q -an group
    active alice loopctl detach "$device"
}

# ---- the marks

test_every_device_of_a_user_is_marked_for_udev() {
    local device other sequence
    # A daemon without its directory attaches nothing for users.
    trap 'systemctl restart loopd.service' EXIT
    loopctl list
    cd /home/alice
    image one.img 1M alice
    image two.img 1M alice
    device=$(as_alice one.img)
    other=$(loopctl attach two.img)
    [[ -e /run/loopd/untrusted/seq-$(cat "/sys/block/${device#/dev/}/diskseq") ]] || fail "no mark"
    [[ ! -e /run/loopd/untrusted/seq-$(cat "/sys/block/${other#/dev/}/diskseq") ]] || fail "a mark for root's"
    loopctl detach "$other"
    active alice loopctl detach "$device"
    equal "pending marks" "$(find /run/loopd/untrusted -name 'loop*')" ""
    # A file instead of the directory: no attach succeeds without a mark.
    device=$(active alice loopctl attach -r one.img)
    sequence=$(cat "/sys/block/${device#/dev/}/diskseq")
    systemctl stop loopd.service
    rm -rf /run/loopd/untrusted
    loopctl list
    [[ -e /run/loopd/untrusted/seq-$sequence ]] || fail "it is not marked again"
    rm -rf /run/loopd/untrusted
    contains "$(refused 1 active alice loopctl attach two.img)" 'cannot tell udev'
    loopctl detach "$device"
    equal "devices" "$(losetup -n -O NAME)" ""
}
