# An ordinary user opens images: attach, mount, look, unmount.
# shellcheck shell=bash disable=SC2154,SC2164 # of lib.sh; what fails ends the test
# shellcheck source=tests/vm/guest/lib/mount.sh
source ./lib/mount.sh

# ---- access

test_a_mount_is_accessible_to_its_user_only() {
    partitioned_image /home/alice/disk.img gpt 512 alice
    local disk place
    disk=$(attach_for_mount disk.img)
    place=$(mount_volume "${disk}p2")
    equal "place" "$place" /run/media/alice/TWO
    equal "owner of a FAT's root" "$(stat -c '%U %G' "$place")" "alice alice"
    contains "$(getfacl -p /run/media/alice)" '^# owner: root$' '^user::rwx$' '^user:alice:r-x$' '^group::---$' '^other::---$'
    active alice touch "$place/written"
    refused 2 active bob ls /run/media/alice
    refused 2 active bob ls "$place"
    contains "$(systemctl show -P Options run-media-alice-TWO.mount)" uhelper=loopd
    contains "$(cat /run/mount/utab)" 'uhelper=loopd'
    # The daemon's mount namespace shows it once.
    equal "seen" "$(busctl get-property org.loopd1 "$(object_path "${disk}p2")" org.loopd1.Volume MountPoints | awk '{print $2}')" 1
    unmount_volume "${disk}p2"
    expect_nothing_left
}

# ---- bad input

# mount_is_refused FILE PARTITION ERROR PATTERN [OPTION…]: the mount is refused and leaves nothing; notes the reply.
mount_is_refused() {
    local disk answer
    disk=$(active alice loopctl attach "$1")
    answer=$(call_volume active alice mount "$disk${2:+p$2}" "${@:5}")
    refusal "$answer" "$3" "$4"
    note "$1${2:+ p$2} ${*:5}: ${3##*.}: $(message "$answer")"
    active alice loopctl detach "$disk"
    expect_nothing_left
}

test_unmountable_volumes_are_refused() {
    loopctl list
    cd /home/alice
    image empty.img 8M alice
    mount_is_refused empty.img '' $not_supported 'no file system'
    image luks.img 20M alice
    echo secret | cryptsetup luksFormat -q --type luks1 --pbkdf-force-iterations 1000 luks.img -
    mount_is_refused luks.img '' $not_supported 'it is encrypted; unlock it first'
    mount_is_refused luks.img '' $not_supported 'it is encrypted' filesystem=s:ext4
    image swap.img 8M alice
    mkswap -q swap.img
    mount_is_refused swap.img '' $not_supported 'it is swap space'
    partitioned_image table.img gpt 512 alice
    mount_is_refused table.img '' $not_supported 'has a partition table; mount one of its partitions: /dev/loop[0-9]+p1, /dev/loop[0-9]+p2'
    mkfs.ext4 -q -F -O ^has_journal -L one -E offset=$((1024 * 1024)) table.img 4M
    dd if=/dev/zero of=table.img bs=1M seek=1 count=4 conv=notrunc status=none
    mount_is_refused table.img 1 $not_supported 'no file system'
    # The superblock is valid, the rest of the file system is damaged.
    ext4_image damaged.img lies alice
    dd if=/dev/urandom of=damaged.img bs=4k seek=1 count=200 conv=notrunc status=none
    mount_is_refused damaged.img '' $failing "the unit run-media-alice-lies.mount ended with .failed.*journalctl -u"
    ext4_image good.img good alice
    mount_is_refused good.img '' $failing 'the unit .* ended with .failed' filesystem=s:vfat
    mount_is_refused good.img '' $not_supported 'the file system nfs is not among' filesystem=s:nfs
    mkdir -p /etc/loopd
    trap 'rm -rf /etc/loopd; systemctl reload loopd.service' EXIT
    printf '[mount]\nfilesystems = ["vfat"]\n' >/etc/loopd/loopd.toml
    systemctl reload loopd.service
    mount_is_refused good.img '' $not_supported 'the file system ext4 is not among those that may be mounted here .vfat.'
    rm -rf /etc/loopd
    systemctl reload loopd.service
    # A journal that needs replay, on a read-only device.
    image journal.img 16M alice
    mkfs.ext4 -q -L journal journal.img
    debugfs -w -R 'feature needs_recovery' journal.img 2>/dev/null
    local disk answer
    disk=$(active alice loopctl attach -r journal.img)
    answer=$(call_volume active alice mount "$disk")
    refusal "$answer" $not_supported 'its journal has to be replayed first, and the device is read-only' 'norecovery'
    note "journal.img, read-only: $(message "$answer")"
    mount_volume "$disk" options=s:noload
    unmount_volume "$disk"
    active alice loopctl detach "$disk"
    expect_nothing_left
}

# option_is_refused DEVICE OPTION
option_is_refused() {
    local answer
    answer=$(call_volume active alice mount "$1" "options=s:$2")
    refusal "$answer" $invalid 'the mount option'
    note "${2@Q}: $(message "$answer" | cut -c 1-200)"
}

test_forbidden_mount_options_are_named() {
    loopctl list
    cd /home/alice
    ext4_image disk.img options alice
    image fat.img 8M alice
    mkfs.vfat -n FAT fat.img >/dev/null
    local option disk fat place
    disk=$(active alice loopctl attach disk.img)
    fat=$(active alice loopctl attach fat.img)
    for option in suid dev x,suid noatime,suid 'noatime"' "'" 'a\,suid' uid=1000 loop offset=512 uhelper=x context=x noload ','; do
        option_is_refused "$disk" "$option"
    done
    for option in uid=0 gid=0 fmask=9 'iocharset="utf8"' 'codepage=1;2'; do
        option_is_refused "$fat" "$option"
    done
    mkdir -p /etc/loopd
    trap 'rm -rf /etc/loopd; systemctl reload loopd.service' EXIT
    printf '[mount]\nexec = false\n' >/etc/loopd/loopd.toml
    systemctl reload loopd.service
    option_is_refused "$disk" exec
    place=$(mount_volume "$disk" options=s:noatime)
    contains "$(findmnt -n -o OPTIONS "$place")" noexec noatime nosuid nodev
    unmount_volume "$disk"
    active alice loopctl detach "$disk" "$fat"
    expect_nothing_left
}

# mounts_as FILE EXPECTED: mounts the file; checks the name of the mount directory.
mounts_as() {
    local disk place
    disk=$(attach_for_mount "$1")
    place=$(mount_volume "$disk")
    equal "place" "$place" "/run/media/alice/$2"
    equal "mounted" "$(findmnt -n -o SOURCE "$place")" "$disk"
    equal "unit" "$(systemctl show -P Where "$(systemd-escape --path --suffix=mount "$place")")" "$place"
    unmount_volume "$disk"
    expect_nothing_left
}

test_hostile_labels_become_harmless_names() {
    loopctl list
    cd /home/alice
    local labels names number
    # shellcheck disable=SC1003,SC2016 # taken as they are
    labels=(../../etc a/b . .. .hidden $'a\nb' $'\xff\xfe' '100%n' "it's" 'a"b' 'a\' ' blank ' ';reboot' '$(id)' '${HOME}' 'ä ö')
    names=(_._.._etc a_b UUID _. _hidden a_b '' '100%n' "it's" 'a"b' a_ blank ';reboot' '_(id)' '_{HOME}' 'ä ö')
    for number in "${!labels[@]}"; do
        image disk.img 8M alice
        mkfs.ext4 -q -O ^has_journal -U 11111111-2222-3333-4444-555555555555 -L "${labels[number]}" disk.img
        local disk place
        disk=$(attach_for_mount disk.img)
        place=$(mount_volume "$disk")
        note "label ${labels[number]@Q}: ${place@Q}"
        [[ $place == /run/media/alice/* && $place != /run/media/alice/*/* ]] || fail "$place"
        case ${names[number]} in
            UUID) equal "place" "$place" /run/media/alice/11111111-2222-3333-4444-555555555555 ;;
            ?*) equal "place" "$place" "/run/media/alice/${names[number]}" ;;
        esac
        equal "mounted" "$(findmnt -n -o SOURCE "$place")" "$disk"
        equal "unit" "$(systemctl show -P Where "$(systemd-escape --path --suffix=mount "$place")")" "$place"
        # The name must stay one argument of a command.
        unmount_volume "$disk" lazy=b:true
    done
    expect_nothing_left
}

# Neither label nor UUID.
test_hostile_file_names_become_harmless_names() {
    loopctl list
    cd /home/alice
    local long name
    long=$(printf 'ä%.0s' {1..120}).sqfs
    mksquashfs "$OLDPWD/lib.sh" plain -quiet -no-progress
    for name in .hidden.sqfs $'new\nline.sqfs' "$long"; do
        cp plain "$name"
        chown alice: "$name"
    done
    mounts_as .hidden.sqfs _hidden.sqfs
    mounts_as $'new\nline.sqfs' new_line.sqfs
    mounts_as "$long" "$(printf 'ä%.0s' {1..20})"
}

test_used_names_get_numbers() {
    local number disks=() place
    for number in 0 1 2; do
        ext4_image "/home/alice/disk$number.img" same alice
        disks+=("$(attach_for_mount "disk$number.img")")
        place=$(mount_volume "${disks[number]}")
        equal "place" "$place" "/run/media/alice/same${number#0}"
    done
    for number in 0 1 2; do
        unmount_volume "${disks[number]}"
    done
    expect_nothing_left
}

test_mounting_twice_is_refused() {
    partitioned_image /home/alice/disk.img gpt 512 alice
    local disk place answer
    disk=$(attach_for_mount disk.img)
    place=$(mount_volume "${disk}p1")
    answer=$(call_volume active alice mount "${disk}p1")
    refusal "$answer" org.loopd1.Error.Busy "is mounted on $place already"
    note "twice: $(message "$answer")"
    answer=$(call_volume active alice mount "$disk" filesystem=s:ext4)
    refusal "$answer" org.loopd1.Error.Busy "its partition ${disk}p1 is mounted on $place"
    note "the disk with its partition: $(message "$answer")"
    # The attachment ends with its last mount.
    mount_volume "${disk}p2"
    unmount_volume "${disk}p1"
    attached "$disk"
    answer=$(call_volume active alice unmount "${disk}p1")
    refusal "$answer" org.loopd1.Error.NotFound 'it is not mounted'
    unmount_volume "${disk}p2"
    detached "$disk"
    expect_nothing_left
}

# ---- authorization

test_other_users_need_an_administrator() {
    ext4_image /home/alice/disk.img shared alice
    local disk kind place
    disk=$(active alice loopctl attach disk.img)
    for kind in inactive remote; do
        refusal "$(call_volume $kind alice mount "$disk")" org.freedesktop.DBus.Error.InteractiveAuthorizationRequired org.loopd1.mount
    done
    refusal "$(call_volume active bob mount "$disk")" org.freedesktop.DBus.Error.InteractiveAuthorizationRequired org.loopd1.manage-others
    place=$(mount_volume "$disk")
    refusal "$(call_volume active bob unmount "$disk")" org.freedesktop.DBus.Error.InteractiveAuthorizationRequired org.loopd1.manage-others
    # Alice may unmount what loopd mounted for her from any session.
    [[ $(call_volume remote alice unmount "$disk") == ok* ]]
    [[ ! -e $place ]]
    # A mount by root is not hers, although the device is.
    mount "$disk" /mnt
    refusal "$(call_volume active alice unmount "$disk")" org.freedesktop.DBus.Error.InteractiveAuthorizationRequired org.loopd1.manage-others
    "$probe" unmount "$(object_path "$disk")"
    not_mounted /mnt
    # A mount for root.
    equal "root's" "$(message "$("$probe" mount "$(object_path "$disk")")")" /run/media/root/shared
    "$probe" unmount "$(object_path "$disk")"
    active alice loopctl detach "$disk"
    expect_nothing_left
}

# ---- in use

# works_in DIRECTORY PID
works_in() {
    [[ $(readlink "/proc/$2/cwd") == "$1" ]]
}

test_a_mount_in_use_stays_unless_lazy() {
    ext4_image /home/alice/disk.img used alice
    local disk place answer
    disk=$(attach_for_mount disk.img)
    place=$(mount_volume "$disk")
    (cd "$place" && exec sleep 600) &
    local sitting=$!
    eventually works_in "$place" "$sitting"
    answer=$(call_volume active alice unmount "$disk")
    refusal "$answer" org.loopd1.Error.Busy "$place"
    note "busy: $(message "$answer")"
    mountpoint -q "$place"
    equal "unit" "$(systemctl is-active run-media-alice-used.mount)" active
    attached "$disk"
    unmount_volume "$disk" lazy=b:true
    not_mounted "$place"
    [[ ! -e $place ]]
    attached "$disk"
    kill "$sitting"
    eventually is_free "$disk"
    expect_nothing_left
}

# ---- unmounts by others, restarts and failures

# open_image: mounts an image; sets disk and place.
open_image() {
    ext4_image /home/alice/disk.img kept alice
    disk=$(attach_for_mount disk.img)
    place=$(mount_volume "$disk")
}

test_unmounting_by_root_detaches() {
    local disk place
    open_image
    umount "$place"
    eventually is_free "$disk"
    eventually test ! -e "$place"
    open_image
    systemctl stop run-media-alice-kept.mount
    eventually is_free "$disk"
    expect_nothing_left
}

# The helper is for users who may not unmount themselves: umount must not call it for root or the service manager,
# or loopd and the service manager would wait for each other.
test_the_helper_is_not_called_by_root() {
    local disk place helper=/sbin/umount.loopd before=
    [[ ! -e $helper ]] || { before=$helper.before; mv $helper $before; }
    printf '#!/bin/sh\nid -un >>/tmp/helped\nexit 1\n' >$helper
    chmod 755 $helper
    rm -f /tmp/helped
    open_image
    unmount_volume "$disk"
    open_image
    umount "$place"
    eventually is_free "$disk"
    [[ ! -e /tmp/helped ]] || fail "called by root"
    open_image
    install -m 666 /dev/null /tmp/helped
    refused 1 active alice umount "$place"
    equal "called by" "$(cat /tmp/helped)" alice
    unmount_volume "$disk"
    rm -f $helper /tmp/helped
    [[ ! $before ]] || mv "$before" $helper
    expect_nothing_left
}

stays_mounted() {
    local disk place before
    open_image
    active alice sh -c "test -r '$place'"
    before=$(mount_state "$disk")
    "$@"
    eventually systemctl -q is-active loopd.service
    equal "after it" "$(mount_state "$disk")" "$before"
    mountpoint -q "$place"
    unmount_volume "$disk"
    eventually is_free "$disk"
    expect_nothing_left
}

mount_state() {
    loopctl info --json "$1" | jq -c '[.disk_sequence, .lifetime, .owner, .state, .mount_points]'
}

test_a_mount_outlives_a_restart_and_a_kill() {
    stays_mounted systemctl restart loopd.service
    stays_mounted kill_daemon
}

test_an_unmount_without_a_daemon_is_noticed() {
    local disk place
    open_image
    systemctl stop loopd.service
    umount "$place"
    systemctl start loopd.service
    eventually is_free "$disk"
    expect_nothing_left
}

test_a_logout_keeps_mounts() {
    ext4_image /home/alice/disk.img kept alice
    local disk place
    # In a file, since systemd-run expands dollar signs.
    cat >/home/alice/open-and-stay <<END
#!/bin/bash
device=\$(loopctl attach --lifetime mount disk.img)
"$probe" mount "/org/loopd1/attachment/\$(cat "/sys/block/\${device#/dev/}/diskseq")"
exec sleep 600
END
    chmod 755 /home/alice/open-and-stay
    trap 'systemctl stop login.service || true' EXIT
    login /home/alice/open-and-stay
    place=/run/media/alice/kept
    eventually mountpoint -q "$place"
    disk=$(device_of /home/alice/disk.img)
    end_login KILL
    # loopd and logind have had time to act on it.
    sleep 2
    mountpoint -q "$place"
    [[ $(call_volume remote alice unmount "$disk") == ok* ]]
    detached "$disk"
    expect_nothing_left
}

test_a_deleted_image_can_be_unmounted() {
    local disk place
    open_image
    rm /home/alice/disk.img
    active alice ls "$place"
    unmount_volume "$disk"
    detached "$disk"
    expect_nothing_left
}

test_an_attachment_that_is_never_mounted_ends() {
    mkdir -p /etc/loopd
    trap 'rm -rf /etc/loopd; systemctl reload loopd.service' EXIT
    printf '[times]\nmount-grace = 5\n' >/etc/loopd/loopd.toml
    loopctl list
    systemctl reload loopd.service
    ext4_image /home/alice/disk.img kept alice
    local disk
    disk=$(attach_for_mount disk.img)
    equal "lifetime" "$(loopctl info --json "$disk" | jq -r .lifetime)" mount
    systemctl restart loopd.service
    attached "$disk"
    eventually is_free "$disk"
    # A manual mount by root counts.
    disk=$(attach_for_mount disk.img)
    mount "$disk" /mnt
    # Longer than the grace time.
    sleep 7
    attached "$disk"
    umount /mnt
    eventually is_free "$disk"
    expect_nothing_left
}

test_a_failing_service_manager_leaves_nothing() {
    mkdir -p /etc/loopd
    trap 'rm -rf /etc/loopd; systemctl reload loopd.service' EXIT
    printf '[times]\nwait-for-mount = 2\n' >/etc/loopd/loopd.toml
    loopctl list
    systemctl reload loopd.service
    ext4_image /home/alice/disk.img late alice
    # udev does not announce the device, and the service manager waits for that.
    udevadm control --stop-exec-queue
    local disk answer
    disk=$(active alice loopctl attach --no-wait disk.img)
    answer=$(call_volume active alice mount "$disk" filesystem=s:ext4)
    udevadm control --start-exec-queue
    refusal "$answer" org.loopd1.Error.Timeout 'did not end in time'
    note "a late mount: $(message "$answer")"
    active alice loopctl detach "$disk"
    expect_nothing_left
}

test_the_journal_records_mounts() {
    local cursor disk place
    cursor=$(journalctl -n 0 --show-cursor | sed -n 's/^-- cursor: //p')
    open_image
    unmount_volume "$disk"
    journalctl --sync
    contains "$(journalctl --after-cursor="$cursor" -u loopd.service -o cat)" "^mounted: $disk \(/home/alice/disk.img\)" \
        "^unmounted: $disk " "detached with its last mount"
    journalctl --after-cursor="$cursor" -u loopd.service -o json | jq -s -e 'any(.[]; .MOUNT_POINT == "/run/media/alice/kept" and .UID == "1000")'
}
