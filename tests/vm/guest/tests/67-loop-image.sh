# loop-image@.service.
# shellcheck shell=bash disable=SC2154 # of lib.sh

# The path has a dollar sign, which must not be expanded.
# shellcheck disable=SC2016
readonly path='/srv/a disk-$HOME.img'
readonly mount_unit=/run/systemd/system/mnt.mount

test_an_image_is_a_unit() {
    ext4_image "$path" as-a-unit
    local unit device
    unit=$(systemd-escape --path --template=loop-image@.service "$path")
    systemctl start "$unit"
    device=$(losetup -n -O NAME -j "$path")
    attached "$device"
    contains "$(systemctl status --no-pager "$unit")" "Status: \"attached to $device\""
    systemctl restart loopd.service
    systemctl -q is-active "$unit"
    attached "$device"
    systemctl stop "$unit"
    detached "$device"
    # An attachment that has ended is no failure, and another one on the same number is not detached.
    systemctl start "$unit"
    loopctl detach "$device"
    losetup "$device" "$path"
    systemctl stop "$unit"
    equal "result" "$(systemctl show -P Result "$unit")" success
    attached "$device"
    losetup -d "$device"
    rm "$path"
    refused 1 systemctl start "$unit"
    systemctl reset-failed "$unit"
}

test_a_mount_depends_on_an_image() {
    ext4_image "$path" as-a-mount
    local unit device
    unit=$(systemd-escape --path --template=loop-image@.service "$path")
    cat >"$mount_unit" <<END
[Unit]
Requires=$unit
After=$unit
[Mount]
What=/dev/disk/by-label/as-a-mount
Where=/mnt
Type=ext4
END
    trap 'rm -f "$mount_unit" "$path"; systemctl daemon-reload' EXIT
    systemctl daemon-reload
    systemctl start mnt.mount
    device=$(losetup -n -O NAME -j "$path")
    equal "mounted" "$(findmnt -n -o SOURCE /mnt)" "$device"
    systemctl restart loopd.service
    echo kept >/mnt/file
    # The mount ends first.
    systemctl stop "$unit"
    detached "$device"
    equal "mount" "$(systemctl is-active mnt.mount || true)" inactive
}
