# loopctl mount and unmount in a local session.
# shellcheck shell=bash disable=SC2154 # of lib.sh

# shellcheck source=tests/vm/guest/lib/images.sh
source ./lib/images.sh

# opens IMAGE TYPE [OPTION…]: one call makes its files accessible; another call undoes it.
opens() {
    local image=$1 type=$2 shown
    shift 2
    shown=$(active alice bash -euo pipefail -s -- "$image" "$@" <<'END'
        point=$(loopctl --no-ask-password mount "$@")
        (cd "$point" && sha256sum --quiet -c SUMS)
        echo "$(findmnt -n -o FSTYPE "$point") $(stat -c %U "$point") $point"
        findmnt -n -o OPTIONS "$point" | tr , '\n' | grep -c -x -e nosuid -e nodev
        loopctl --no-ask-password unmount "$1"
        [ -z "$(losetup -n -O NAME)" ]
END
    )
    contains "$shown" "^$type [a-z]+ /run/media/alice/" '^2$'
    note "${image##*/}: $(head -n 1 <<<"$shown")"
    nothing_is_left
}

test_an_iso_image_opens() {
    iso_image /home/alice/cd.iso HOLIDAY
    opens cd.iso iso9660
}

test_a_hybrid_iso_image_opens() {
    tree content
    image efi.img 4M
    mkfs.vfat -n EFI efi.img >/dev/null
    xorriso -as mkisofs -quiet -J -R -V HYBRID -partition_offset 16 -append_partition 2 0xef efi.img \
        -o /home/alice/hybrid.iso content
    opens hybrid.iso iso9660
}

# partitioned PATH TABLE MKFS…: one partition, with the tree in it.
partitioned() {
    local path=$1 table=$2 device
    shift 2
    tree content
    image "$path" 64M
    echo 'start=2048' | sfdisk --quiet --no-reread --no-tell-kernel --label "$table" "$path"
    device=$(loopctl attach "$path")
    "$@" "${device}p1" >/dev/null
    mount "${device}p1" /mnt
    cp -r content/. /mnt/
    # FAT stores no owners.
    chown -R alice: /mnt 2>/dev/null || true
    umount /mnt
    loopctl detach "$device"
    chown alice: "$path"
}

test_a_dos_image_with_fat_opens() {
    partitioned /home/alice/stick.img dos mkfs.vfat -n STICK
    opens stick.img vfat
}

test_a_gpt_image_with_ext4_opens() {
    partitioned /home/alice/disk.img gpt mkfs.ext4 -q -L disk
    opens disk.img ext4
    opens disk.img ext4 --read-only
}

test_a_squashfs_image_opens() {
    tree content
    mksquashfs content /home/alice/app.squashfs -quiet -no-progress -noappend
    opens app.squashfs squashfs
}

test_an_erofs_image_opens() {
    tree content
    rm -f /home/alice/app.erofs
    mkfs.erofs /home/alice/app.erofs content >/dev/null
    opens app.erofs erofs
}

test_an_xfs_image_opens() {
    tree content
    image /home/alice/data.xfs 320M alice
    mkfs.xfs -q -L data /home/alice/data.xfs
    mount -o loop /home/alice/data.xfs /mnt
    cp -r content/. /mnt/
    umount /mnt
    opens data.xfs xfs
}

test_one_of_two_partitions_is_chosen() {
    partitioned_image /home/alice/two.img gpt 512 alice
    local output
    output=$(refused 1 active alice loopctl mount two.img)
    contains "$output" '2 file systems; choose one with --partition' '^1 +4M +ext4 +one' \
        '^2 +4M +vfat +TWO'
    nothing_is_left
    output=$(refused 1 active alice loopctl mount -p 3 two.img)
    contains "$output" 'has no partition 3'
    nothing_is_left
    active alice bash -eux <<'END'
        [ "$(loopctl mount -p 2 two.img)" = /run/media/alice/TWO ]
        device=$(losetup -n -O NAME)
        # The other partition uses the same device, and is unmounted separately.
        [ "$(loopctl mount "${device}p1")" = /run/media/alice/one ]
        [ "$(losetup -n -O NAME | wc -l)" = 1 ]
        loopctl unmount "${device}p2"
        findmnt /run/media/alice/one
        loopctl mount -p 2 two.img
        loopctl unmount two.img
END
    nothing_is_left
}

test_a_mounted_image_is_not_mounted_again() {
    iso_image /home/alice/cd.iso AGAIN
    active alice bash -eux <<'END'
        first=$(loopctl mount cd.iso)
        [ "$(loopctl mount cd.iso)" = "$first" ]
        [ "$(loopctl mount --json cd.iso | jq -r '.mount_points[0]')" = "$first" ]
        [ "$(losetup -n -O NAME | wc -l)" = 1 ]
        loopctl unmount cd.iso
END
    nothing_is_left
}

test_a_plain_umount_detaches() {
    iso_image /home/alice/cd.iso PLAIN
    active alice bash -eux <<'END'
        point=$(loopctl mount cd.iso)
        umount "$point"
        [ -z "$(losetup -n -O NAME)" ]
        point=$(loopctl mount cd.iso)
        umount -l "$point"
        # The same by the device.
        point=$(loopctl mount cd.iso)
        umount "$(findmnt -n -o SOURCE "$point")"
END
    eventually is_nothing_left
    # The same by root.
    active alice loopctl mount cd.iso
    umount /run/media/alice/PLAIN
    eventually is_nothing_left
}

test_unmounting_for_another_user_needs_authorization() {
    iso_image /home/alice/cd.iso HERS
    active alice loopctl mount cd.iso
    local device output
    device=$(losetup -n -O NAME)
    output=$(refused 1 active bob loopctl --no-ask-password unmount "$device")
    contains "$output" "password"
    output=$(refused 1 inactive bob umount "$device")
    note "bob's umount: ${output##*$'\n'}"
    output=$(refused 1 inactive bob umount /run/media/alice/HERS)
    [[ -e /run/media/alice/HERS/SUMS ]] || fail "it is not mounted any more"
    output=$(active bob "$ask" admin loopctl unmount "$device")
    contains "$output" "$device of user 1000, attached to the file /home/alice/cd.iso"
    eventually is_nothing_left
}

test_busy_names_the_shell_that_works_there() {
    iso_image /home/alice/cd.iso INUSE
    local output
    output=$(active alice bash -eu 2>&1 <<'END'
        point=$(loopctl mount cd.iso)
        (cd "$point/sub" && exec sleep 600) &
        sitter=$!
        until [ "$(readlink "/proc/$sitter/cwd")" = "$point/sub" ]; do sleep 0.1; done
        exec 7<"$point/large"
        status=0
        loopctl unmount cd.iso || status=$?
        [ "$status" = 1 ]
        status=0
        umount "$point" || status=$?
        [ "$status" = 32 ]
        ls "$point/SUMS"
        echo "the sitter is $sitter, and we are $$"
        exec 7<&-
        kill "$sitter"
        wait "$sitter" || true
        loopctl unmount cd.iso
END
    )
    local sitter shell
    sitter=$(sed -n 's/the sitter is \(.*\), and.*/\1/p' <<<"$output")
    shell=$(sed -n 's/.*and we are //p' <<<"$output")
    contains "$output" "^loopctl: process $sitter \(sleep\) has its working directory at /run/media/alice/INUSE/sub$" \
        "^loopctl: process $shell \(bash\) has open /run/media/alice/INUSE/large$" \
        "^umount.loopd: (process $sitter \(sleep\) has its working directory at|the process is not visible to you;)"
    # If the processes of a session have a capability, the helper of a setuid umount may not examine
    # them.
    note "$(grep '^umount.loopd: ' <<<"$output" | tail -n 1)"
    note "$(grep -m 1 '^loopctl: ' <<<"$output")"
    nothing_is_left
}

test_a_lazy_unmount_removes_it_from_the_tree() {
    iso_image /home/alice/cd.iso LAZY
    active alice bash -eux <<'END'
        point=$(loopctl mount cd.iso)
        exec 7<"$point/large"
        loopctl unmount --lazy cd.iso
        [ ! -e "$point/large" ]
        exec 7<&-
END
    eventually is_nothing_left
}

test_unmount_accepts_every_name() {
    iso_image /home/alice/cd.iso NAMES
    active alice bash -eux <<'END'
        point=/run/media/alice/NAMES
        ln -sf "$point" here
        for word in cd.iso device "$point" "$point/sub" here here/sub ./here/; do
            loopctl mount cd.iso
            if [ "$word" = device ]; then word=$(losetup -n -O NAME); fi
            loopctl unmount "$word"
            [ -z "$(losetup -n -O NAME)" ]
        done
        loopctl mount cd.iso
        # Mounted by another program, or not mounted.
        for word in /home/alice / /run/media/alice nothing; do
            status=0
            loopctl unmount "$word" || status=$?
            [ "$status" = 1 ]
        done
        loopctl unmount cd.iso
        status=0
        loopctl unmount cd.iso || status=$?
        [ "$status" = 1 ]
        rm here
END
    nothing_is_left
}

test_an_existing_attachment_stays() {
    iso_image /home/alice/cd.iso STAYS
    active alice bash -eux <<'END'
        device=$(loopctl attach cd.iso)
        loopctl mount cd.iso
        [ "$(losetup -n -O NAME)" = "$device" ]
        loopctl unmount cd.iso
        [ "$(losetup -n -O NAME)" = "$device" ]
        loopctl detach cd.iso
        # A read-only device is not used for a writable mount.
        device=$(loopctl attach -r cd.iso)
        loopctl mount cd.iso
        [ "$(losetup -n -O NAME | wc -l)" = 2 ]
        loopctl unmount cd.iso
        loopctl detach "$device"
END
    nothing_is_left
}

test_a_failed_mount_leaves_nothing() {
    image /home/alice/empty.img 1M alice
    image /home/alice/swap.img 1M alice
    mkswap /home/alice/swap.img >/dev/null
    iso_image /home/alice/cd.iso FAILS
    local output
    local status words
    while read -r status words; do
        # shellcheck disable=SC2086 # words
        output=$(refused "$status" active alice loopctl mount $words)
        note "$words: ${output##*$'\n'}"
        nothing_is_left
    done <<'END'
1 empty.img
1 swap.img
1 -t ext4 cd.iso
2 --options suid cd.iso
END
    rule 'polkit.addRule(function(action, subject) { if (action.id == "org.loopd1.mount") return polkit.Result.NO; });'
    output=$(refused 1 active alice loopctl mount cd.iso)
    forget_rules
    contains "$output" 'org.loopd1.mount'
    nothing_is_left
}

test_an_interrupted_mount_leaves_nothing() {
    iso_image /home/alice/cd.iso BREAK
    rule 'polkit.addRule(function(action, subject) { if (action.id == "org.loopd1.mount") return polkit.Result.AUTH_ADMIN; });'
    local status=0
    # shellcheck disable=SC2016 # expect's own
    active alice expect -c 'set timeout 60
        spawn -noecho loopctl mount cd.iso
        expect "Password: " { exec losetup -n -O NAME | grep loop; send "\003" } timeout { exit 97 }
        expect eof
        exit [lindex [wait] 3]' || status=$?
    forget_rules
    equal "status" "$status" 130
    eventually is_nothing_left
}

# ---- throwaway views

test_a_throwaway_view_leaves_the_image_as_it_is() {
    partitioned /home/alice/disk.img gpt mkfs.ext4 -q -L throwaway
    before=$(sha256sum /home/alice/disk.img)
    ls -A /home/alice >names
    chmod 444 /home/alice/disk.img
    active alice bash -eux <<'END'
        point=$(loopctl mount --throwaway disk.img)
        (cd "$point" && sha256sum --quiet -c SUMS && echo changed >sub/small && rm large && sync -f .)
        loopctl list --json | jq -e '.[0] | .reference == "disk.img" and .backing_file_state == "deleted"'
        loopctl unmount disk.img
END
    nothing_is_left
    after=$(sha256sum /home/alice/disk.img)
    equal "image" "$after" "$before"
    equal "names" "$(ls -A /home/alice)" "$(<names)"
}

# used DIRECTORY: KiB of its file system.
used() {
    sync -f "$1"
    df --output=used -k "$1" | tail -n 1
}

test_a_throwaway_view_shares_blocks_where_it_can() {
    image xfs.img 400M
    mkfs.xfs -q xfs.img
    mkdir -p /srv/xfs
    mount -o loop xfs.img /srv/xfs
    head -c 64M /dev/urandom >/srv/xfs/disk.img
    mkfs.ext4 -q -F -L shared /srv/xfs/disk.img
    chown -R alice: /srv/xfs
    local before point
    before=$(used /srv/xfs)
    point=$(active alice loopctl mount --throwaway /srv/xfs/disk.img)
    note "$(($(used /srv/xfs) - before)) KiB more for a view of 64 MiB"
    (($(used /srv/xfs) - before < 16384)) || fail "it is a copy"
    echo changed >"$point/file"
    active alice loopctl unmount /srv/xfs/disk.img
    umount /srv/xfs
    nothing_is_left
}

# ---- the desktop

test_the_desktop_shows_the_directory_and_the_failure() {
    iso_image /home/alice/cd.iso DESKTOP
    mkdir -p /home/alice/bin
    # shellcheck disable=SC2016 # the script's own
    printf '#!/bin/sh\necho "$@" >/home/alice/opened\n' >/home/alice/bin/xdg-open
    chmod 755 /home/alice/bin/xdg-open
    local output
    output=$(active alice dbus-run-session -- bash -eu 2>&1 <<'END'
        export PATH=/home/alice/bin:$PATH
        dbus-monitor --session "interface='org.freedesktop.Notifications'" >notified &
        monitor=$!
        until grep -q NameAcquired notified || [ -s notified ]; do sleep 0.1; done
        loopctl mount -r --open --notify cd.iso
        cat opened
        loopctl unmount --notify cd.iso
        loopctl mount --notify nothing.iso || true
        loopctl unmount --notify cd.iso || true
        until [ "$(grep -c member=Notify notified)" = 2 ]; do sleep 0.1; done
        cat notified
        kill "$monitor"
END
    )
    contains "$output" '^/run/media/alice/DESKTOP$' 'string "nothing.iso is not mounted"' \
        'nothing.iso does not exist' 'string "cd.iso is not unmounted"' \
        'string "drive-removable-media"'
    equal "opened" "$(cat /home/alice/opened)" /run/media/alice/DESKTOP
    rm -r /home/alice/{opened,notified,bin}
    nothing_is_left
}

test_the_menu_entries_are_there() {
    desktop=/usr/share/applications/org.loopd1.open.desktop
    iso_image "/home/alice/my cd.iso" MENU
    contains "$(cat "$desktop")" '^Exec=loopctl mount --read-only --open --notify %f$'
    active alice bash -eux <<'END'
        PATH=/home/alice/bin:$PATH
        # As the file manager calls them: in the directory, with the file name.
        '/usr/share/loopd/nautilus-scripts/Open disk image' 'my cd.iso' || true
        findmnt /run/media/alice/MENU
        /usr/share/loopd/nautilus-scripts/Eject 'my cd.iso'
END
    nothing_is_left
}

test_udisks_ejects_as_documented() {
    iso_image /home/alice/cd.iso PEER
    active alice loopctl mount cd.iso
    local device output
    device=$(losetup -n -O NAME)
    output=$(refused 1 active alice udisksctl unmount --no-user-interaction -b "$device")
    systemctl stop udisks2.service
    note "${output##*$'\n'}"
    active alice loopctl unmount cd.iso
    nothing_is_left
}
