# Upgrade, removal and purge of the package while devices are attached.
# shellcheck shell=bash

test_an_upgrade_keeps_what_is_attached() {
    ext4_image /home/alice/disk.img kept alice
    local device before
    device=$(active alice loopctl attach disk.img)
    mount "$device" /mnt
    before=$(daemon_pid)
    dpkg -i loopd-2.deb
    systemctl -q is-active loopd.service
    [[ $(daemon_pid) != "$before" ]] || fail "the old daemon still runs"
    contains "$(dpkg-query -W loopd)" '-2$'
    echo kept >/mnt/file
    umount /mnt
    contains "$(loopctl list --all)" "^$device .*/home/alice/disk.img"
    loopctl detach "$device"
}

test_an_upgrade_does_not_start_a_stopped_daemon() {
    systemctl stop loopd.service
    dpkg -i loopd-2.deb
    equal "state" "$(systemctl is-active loopd.service || true)" inactive
}

test_a_removed_package_leaves_devices_but_no_daemon() {
    image /home/alice/disk.img 1M alice
    local device output
    device=$(active alice loopctl attach disk.img)
    dpkg --remove loopd
    equal "state" "$(systemctl is-active loopd.service || true)" inactive
    attached "$device"
    output=$(refused 1 busctl call org.loopd1 /org/loopd1 org.freedesktop.DBus.Peer Ping)
    contains "$output" 'not provided|not activatable'
    losetup -d "$device"
}

test_a_purge_leaves_nothing() {
    mkdir -p /etc/loopd /run/loopd
    dpkg --purge loopd
    equal "left" "$(find / /run -xdev -path /srv -prune -o -iname '*loopd*' -print)" ""
    dpkg -i loopd-1.deb
    loopctl list
}
