# An ordinary user opens images: attach, mount, look, unmount.
# shellcheck shell=bash disable=SC2154,SC2164 # of lib.sh; what fails ends the test
# shellcheck source=tests/vm/guest/tests/60-deaths.sh
source ./tests/60-deaths.sh

# ---- what the tests have in common

# object DEVICE: of a disk or a partition.
object() {
    [[ $1 =~ ^/dev/(loop[0-9]+)(p[0-9]+)?$ ]]
    echo "/org/loopd1/attachment/$(cat "/sys/block/${BASH_REMATCH[1]}/diskseq")${BASH_REMATCH[2]:+/${BASH_REMATCH[2]}}"
}

# answer_of KIND-OF-SESSION USER CALL DEVICE [OPTION…]: what Mount or Unmount answers.
answer_of() {
    $1 "$2" "$probe" "$3" "$(object "$4")" "${@:5}"
}

# mounted DEVICE [OPTION…]: alice mounts it; prints where.
mounted() {
    local answer
    answer=$(answer_of active alice mount "$@")
    [[ $answer == ok* ]] || fail "$answer"
    message "$answer"
}

# unmounted DEVICE [OPTION…]
unmounted() {
    local answer
    answer=$(answer_of active alice unmount "$@")
    [[ $answer == ok* ]] || fail "$answer"
}

# opened FILE: alice's, attached until its last mount goes; prints the device.
opened() {
    active alice loopctl attach --lifetime mount "$1"
}

no_units() {
    [[ -z $(systemctl list-units --all --plain --no-legend 'run-media-*' 'loopd-unmount-*') ]]
}

no_devices() {
    [[ -z $(losetup -n -O NAME) ]]
}

not_mounted() {
    ! findmnt "$1"
}

# Neither mount, unit, folder, state nor device is left.
nothing_left() {
    eventually no_units
    ! grep -q /run/media/ /proc/self/mounts
    equal "folders" "$(ls /run/media)" ""
    equal "state" "$(find /run/loopd/mounts /run/loopd/attachments -name '*.toml')" ""
    eventually no_devices
}

readonly Mib=$((1024 * 1024))

# ---- whose it is

test_what_is_mounted_is_the_users_alone() {
    partitioned_image /home/alice/disk.img gpt 512 alice
    local disk place
    disk=$(opened disk.img)
    place=$(mounted "${disk}p2")
    equal "place" "$place" /run/media/alice/TWO
    equal "owner of a FAT's root" "$(stat -c '%U %G' "$place")" "alice alice"
    contains "$(getfacl -p /run/media/alice)" '^# owner: root$' '^user::rwx$' '^user:alice:r-x$' '^group::---$' '^other::---$'
    active alice touch "$place/written"
    refused 2 active bob ls /run/media/alice
    refused 2 active bob ls "$place"
    contains "$(systemctl show -P Options run-media-alice-TWO.mount)" uhelper=loopd
    contains "$(cat /run/mount/utab)" 'uhelper=loopd'
    # In the daemon's own name space it is seen once.
    equal "seen" "$(busctl get-property org.loopd1 "$(object "${disk}p2")" org.loopd1.Volume MountPoints | awk '{print $2}')" 1
    unmounted "${disk}p2"
    nothing_left
}

# ---- bad input

# no_way FILE PARTITION ERROR PATTERN [OPTION…]: the mount is refused, nothing is left, and the answer noted.
no_way() {
    local disk answer
    disk=$(active alice loopctl attach "$1")
    answer=$(answer_of active alice mount "$disk${2:+p$2}" "${@:5}")
    refusal "$answer" "$3" "$4"
    note "$1${2:+ p$2} ${*:5}: ${3##*.}: $(message "$answer")"
    active alice loopctl detach "$disk"
    nothing_left
}

readonly not_supported=org.loopd1.Error.NotSupported
readonly invalid=org.freedesktop.DBus.Error.InvalidArgs
readonly failing=org.loopd1.Error.Kernel

test_what_cannot_be_mounted_is_named() {
    loopctl list
    cd /home/alice
    image empty.img 8M alice
    no_way empty.img '' $not_supported 'no file system'
    image luks.img 20M alice
    echo secret | cryptsetup luksFormat -q --type luks1 --pbkdf-force-iterations 1000 luks.img -
    no_way luks.img '' $not_supported 'it is encrypted; unlock it first'
    no_way luks.img '' $not_supported 'it is encrypted' filesystem=s:ext4
    image swap.img 8M alice
    mkswap -q swap.img
    no_way swap.img '' $not_supported 'it is swap space'
    partitioned_image table.img gpt 512 alice
    no_way table.img '' $not_supported 'has a partition table; mount one of its partitions: /dev/loop[0-9]+p1, /dev/loop[0-9]+p2'
    mkfs.ext4 -q -F -O ^has_journal -L one -E offset=$Mib table.img 4M
    dd if=/dev/zero of=table.img bs=1M seek=1 count=4 conv=notrunc status=none
    no_way table.img 1 $not_supported 'no file system'
    # It lies about itself: the superblock is there, and nothing else is as it says.
    ext4_image damaged.img lies alice
    dd if=/dev/urandom of=damaged.img bs=4k seek=1 count=200 conv=notrunc status=none
    no_way damaged.img '' $failing "the unit run-media-alice-lies.mount ended with .failed.*journalctl -u"
    ext4_image good.img good alice
    no_way good.img '' $failing 'the unit .* ended with .failed' filesystem=s:vfat
    no_way good.img '' $not_supported 'the file system nfs is not among' filesystem=s:nfs
    mkdir -p /etc/loopd
    trap 'rm -rf /etc/loopd; systemctl reload loopd.service' EXIT
    printf '[mount]\nfilesystems = ["vfat"]\n' >/etc/loopd/loopd.toml
    systemctl reload loopd.service
    no_way good.img '' $not_supported 'the file system ext4 is not among those that may be mounted here .vfat.'
    rm -rf /etc/loopd
    systemctl reload loopd.service
    # The journal's flag without its replay; a read-only device.
    image journal.img 16M alice
    mkfs.ext4 -q -L journal journal.img
    debugfs -w -R 'feature needs_recovery' journal.img 2>/dev/null
    local disk answer
    disk=$(active alice loopctl attach -r journal.img)
    answer=$(answer_of active alice mount "$disk")
    refusal "$answer" $not_supported 'its journal has to be replayed first, and the device is read-only' 'noload'
    note "journal.img, read-only: $(message "$answer")"
    mounted "$disk" options=s:noload
    unmounted "$disk"
    active alice loopctl detach "$disk"
    nothing_left
}

# not_so DEVICE OPTION: it is refused.
not_so() {
    local answer
    answer=$(answer_of active alice mount "$1" "options=s:$2")
    refusal "$answer" $invalid 'the mount option'
    note "${2@Q}: $(message "$answer" | cut -c 1-200)"
}

test_options_that_are_not_allowed_are_named() {
    loopctl list
    cd /home/alice
    ext4_image disk.img options alice
    image fat.img 8M alice
    mkfs.vfat -n FAT fat.img >/dev/null
    local option disk fat place
    disk=$(active alice loopctl attach disk.img)
    fat=$(active alice loopctl attach fat.img)
    for option in suid dev x,suid noatime,suid 'noatime"' "'" 'a\,suid' uid=1000 loop offset=512 uhelper=x context=x noload ','; do
        not_so "$disk" "$option"
    done
    for option in uid=0 gid=0 fmask=9 'iocharset="utf8"' 'codepage=1;2'; do
        not_so "$fat" "$option"
    done
    mkdir -p /etc/loopd
    trap 'rm -rf /etc/loopd; systemctl reload loopd.service' EXIT
    printf '[mount]\nexec = false\n' >/etc/loopd/loopd.toml
    systemctl reload loopd.service
    not_so "$disk" exec
    place=$(mounted "$disk" options=s:noatime)
    contains "$(findmnt -n -o OPTIONS "$place")" noexec noatime nosuid nodev
    unmounted "$disk"
    active alice loopctl detach "$disk" "$fat"
    nothing_left
}

# named FILE EXPECTED: where it is mounted.
named() {
    local disk place
    disk=$(opened "$1")
    place=$(mounted "$disk")
    equal "place" "$place" "/run/media/alice/$2"
    equal "mounted" "$(findmnt -n -o SOURCE "$place")" "$disk"
    equal "unit" "$(systemctl show -P Where "$(systemd-escape --path --suffix=mount "$place")")" "$place"
    unmounted "$disk"
    nothing_left
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
        disk=$(opened disk.img)
        place=$(mounted "$disk")
        note "label ${labels[number]@Q}: ${place@Q}"
        [[ $place == /run/media/alice/* && $place != /run/media/alice/*/* ]] || fail "$place"
        case ${names[number]} in
            UUID) equal "place" "$place" /run/media/alice/11111111-2222-3333-4444-555555555555 ;;
            ?*) equal "place" "$place" "/run/media/alice/${names[number]}" ;;
        esac
        equal "mounted" "$(findmnt -n -o SOURCE "$place")" "$disk"
        equal "unit" "$(systemctl show -P Where "$(systemd-escape --path --suffix=mount "$place")")" "$place"
        # Where the name is one word of a command.
        unmounted "$disk" lazy=b:true
    done
    nothing_left
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
    named .hidden.sqfs _hidden.sqfs
    named $'new\nline.sqfs' new_line.sqfs
    named "$long" "$(printf 'ä%.0s' {1..20})"
}

test_names_that_are_taken_get_numbers() {
    local number disks=() place
    for number in 0 1 2; do
        ext4_image "/home/alice/disk$number.img" same alice
        disks+=("$(opened "disk$number.img")")
        place=$(mounted "${disks[number]}")
        equal "place" "$place" "/run/media/alice/same${number#0}"
    done
    for number in 0 1 2; do
        unmounted "${disks[number]}"
    done
    nothing_left
}

test_mounting_twice_is_refused() {
    partitioned_image /home/alice/disk.img gpt 512 alice
    local disk place answer
    disk=$(opened disk.img)
    place=$(mounted "${disk}p1")
    answer=$(answer_of active alice mount "${disk}p1")
    refusal "$answer" org.loopd1.Error.Busy "is mounted on $place already"
    note "twice: $(message "$answer")"
    answer=$(answer_of active alice mount "$disk" filesystem=s:ext4)
    refusal "$answer" org.loopd1.Error.Busy "its partition ${disk}p1 is mounted on $place"
    note "the disk with its partition: $(message "$answer")"
    # The last mount counts, not the first to go.
    mounted "${disk}p2"
    unmounted "${disk}p1"
    attached "$disk"
    answer=$(answer_of active alice unmount "${disk}p1")
    refusal "$answer" org.loopd1.Error.NotFound 'it is not mounted'
    unmounted "${disk}p2"
    detached "$disk"
    nothing_left
}

# ---- who may

test_others_are_asked_for_an_administrator() {
    ext4_image /home/alice/disk.img shared alice
    local disk kind place
    disk=$(active alice loopctl attach disk.img)
    for kind in inactive remote; do
        refusal "$(answer_of $kind alice mount "$disk")" org.freedesktop.DBus.Error.InteractiveAuthorizationRequired org.loopd1.mount
    done
    refusal "$(answer_of active bob mount "$disk")" org.freedesktop.DBus.Error.InteractiveAuthorizationRequired org.loopd1.manage-others
    place=$(mounted "$disk")
    refusal "$(answer_of active bob unmount "$disk")" org.freedesktop.DBus.Error.InteractiveAuthorizationRequired org.loopd1.manage-others
    # What loopd has mounted for her, alice unmounts from wherever she is.
    [[ $(answer_of remote alice unmount "$disk") == ok* ]]
    [[ ! -e $place ]]
    # What root has mounted is not hers, though the device is.
    mount "$disk" /mnt
    refusal "$(answer_of active alice unmount "$disk")" org.freedesktop.DBus.Error.InteractiveAuthorizationRequired org.loopd1.manage-others
    "$probe" unmount "$(object "$disk")"
    not_mounted /mnt
    # Root's own.
    equal "root's" "$(message "$("$probe" mount "$(object "$disk")")")" /run/media/root/shared
    "$probe" unmount "$(object "$disk")"
    active alice loopctl detach "$disk"
    nothing_left
}

# ---- in use

# sits_in FOLDER PID
sits_in() {
    [[ $(readlink "/proc/$2/cwd") == "$1" ]]
}

test_what_is_in_use_stays_unless_lazily() {
    ext4_image /home/alice/disk.img used alice
    local disk place answer
    disk=$(opened disk.img)
    place=$(mounted "$disk")
    (cd "$place" && exec sleep 600) &
    local sitting=$!
    eventually sits_in "$place" "$sitting"
    answer=$(answer_of active alice unmount "$disk")
    refusal "$answer" org.loopd1.Error.Busy "$place"
    note "a shell sits in it: $(message "$answer")"
    mountpoint -q "$place"
    equal "unit" "$(systemctl is-active run-media-alice-used.mount)" active
    attached "$disk"
    unmounted "$disk" lazy=b:true
    not_mounted "$place"
    [[ ! -e $place ]]
    attached "$disk"
    kill "$sitting"
    eventually is_free "$disk"
    nothing_left
}

# ---- by whomever, whatever happens

# open_image: sets disk and place.
open_image() {
    ext4_image /home/alice/disk.img kept alice
    disk=$(opened disk.img)
    place=$(mounted "$disk")
}

test_root_unmounts_and_everything_goes() {
    local disk place
    open_image
    umount "$place"
    eventually is_free "$disk"
    eventually test ! -e "$place"
    open_image
    systemctl stop run-media-alice-kept.mount
    eventually is_free "$disk"
    nothing_left
}

# A helper is for those who may not unmount themselves: root's own umount, and the service manager's, do not
# ask us who would ask them.
test_the_helper_is_not_called_by_root() {
    local disk place helper=/sbin/umount.loopd before=
    [[ ! -e $helper ]] || { before=$helper.before; mv $helper $before; }
    printf '#!/bin/sh\nid -un >>/tmp/helped\nexit 1\n' >$helper
    chmod 755 $helper
    rm -f /tmp/helped
    open_image
    unmounted "$disk"
    open_image
    umount "$place"
    eventually is_free "$disk"
    [[ ! -e /tmp/helped ]] || fail "called by root"
    open_image
    install -m 666 /dev/null /tmp/helped
    refused 1 active alice umount "$place"
    equal "called by" "$(cat /tmp/helped)" alice
    unmounted "$disk"
    rm -f $helper /tmp/helped
    [[ ! $before ]] || mv "$before" $helper
    nothing_left
}

stays_mounted() {
    local disk place before
    open_image
    active alice sh -c "test -r '$place'"
    before=$(said_of_mount "$disk")
    "$@"
    eventually systemctl -q is-active loopd.service
    equal "after it" "$(said_of_mount "$disk")" "$before"
    mountpoint -q "$place"
    unmounted "$disk"
    eventually is_free "$disk"
    nothing_left
}

said_of_mount() {
    loopctl info --json "$1" | jq -c '[.disk_sequence, .lifetime, .owner, .state, .mount_points]'
}

test_a_mount_outlives_a_restart_and_a_kill() {
    stays_mounted systemctl restart loopd.service
    stays_mounted kill_daemon
}

test_what_was_unmounted_while_no_daemon_ran_is_seen() {
    local disk place
    open_image
    systemctl stop loopd.service
    umount "$place"
    systemctl start loopd.service
    eventually is_free "$disk"
    nothing_left
}

test_a_logout_leaves_what_is_mounted() {
    ext4_image /home/alice/disk.img kept alice
    local disk place
    # In a file, since systemd-run takes dollars for its own.
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
    sleep 2
    mountpoint -q "$place"
    [[ $(answer_of remote alice unmount "$disk") == ok* ]]
    detached "$disk"
    nothing_left
}

test_a_deleted_image_can_be_closed() {
    local disk place
    open_image
    rm /home/alice/disk.img
    active alice ls "$place"
    unmounted "$disk"
    detached "$disk"
    nothing_left
}

test_nobody_mounts_it_and_it_goes() {
    mkdir -p /etc/loopd
    trap 'rm -rf /etc/loopd; systemctl reload loopd.service' EXIT
    printf '[times]\nmount-grace = 5\n' >/etc/loopd/loopd.toml
    loopctl list
    systemctl reload loopd.service
    ext4_image /home/alice/disk.img kept alice
    local disk
    disk=$(opened disk.img)
    equal "lifetime" "$(loopctl info --json "$disk" | jq -r .lifetime)" mount
    systemctl restart loopd.service
    attached "$disk"
    eventually is_free "$disk"
    # Root's mount by hand counts.
    disk=$(opened disk.img)
    mount "$disk" /mnt
    sleep 7
    attached "$disk"
    umount /mnt
    eventually is_free "$disk"
    nothing_left
}

test_a_service_manager_that_is_asked_in_vain_leaves_nothing() {
    mkdir -p /etc/loopd
    trap 'rm -rf /etc/loopd; systemctl reload loopd.service' EXIT
    printf '[times]\nwait-for-mount = 2\n' >/etc/loopd/loopd.toml
    loopctl list
    systemctl reload loopd.service
    ext4_image /home/alice/disk.img late alice
    # udev says nothing of the device, and the service manager waits for it to say so.
    udevadm control --stop-exec-queue
    local disk answer
    disk=$(active alice loopctl attach --no-wait disk.img)
    answer=$(answer_of active alice mount "$disk" filesystem=s:ext4)
    udevadm control --start-exec-queue
    refusal "$answer" org.loopd1.Error.Timeout 'did not end in time'
    note "a late mount: $(message "$answer")"
    active alice loopctl detach "$disk"
    nothing_left
}

test_the_journal_tells_of_mounts() {
    local cursor disk place
    cursor=$(journalctl -n 0 --show-cursor | sed -n 's/^-- cursor: //p')
    open_image
    unmounted "$disk"
    journalctl --sync
    contains "$(journalctl --after-cursor="$cursor" -u loopd.service -o cat)" "^mounted: $disk \(/home/alice/disk.img\)" \
        "^unmounted: $disk " "detached with its last mount"
    journalctl --after-cursor="$cursor" -u loopd.service -o json | jq -s -e 'any(.[]; .MOUNT_POINT == "/run/media/alice/kept" and .UID == "1000")'
}
