# What one user can change is not given to another.
# shellcheck shell=bash disable=SC2154 # of lib.sh

# UDisks2 lets the user that it has set a loop device up for detach it, and somebody could set it up again.
test_a_device_of_udisks_is_not_given_to_root() {
    image /srv/disk.img 8M
    chmod 644 /srv/disk.img
    local device said command
    active alice udisksctl loop-setup --no-user-interaction -r -f /srv/disk.img
    device=$(losetup -n -O NAME -j /srv/disk.img)
    for command in "true" "systemctl stop udisks2.service"; do
        $command
        said=$(refused 1 loopctl attach -r --overlap reuse /srv/disk.img)
        contains "$said" "$device" "UDisks2 has set it up for user $(id -u alice)"
        refused 1 loopctl losetup -L -r -f --show /srv/disk.img
    done
    # Nor after loopd has taken it over: UDisks2 still does what alice wants.
    loopctl set "$device" --lifetime persistent
    refused 1 loopctl attach -r --overlap reuse /srv/disk.img
    active alice udisksctl loop-delete --no-user-interaction -b "$device"
    eventually detached "$device"

    # One of root's is given back.
    losetup -r "$device" /srv/disk.img
    equal "device" "$(loopctl attach -r --overlap reuse /srv/disk.img)" "$device"
    # A record that makes no sense may be about any device.
    cp /run/udisks2/loop record
    echo nonsense >/run/udisks2/loop
    said=$(refused 1 loopctl attach -r --overlap reuse /srv/disk.img)
    cp record /run/udisks2/loop
    contains "$said" "is not understood"
    loopctl detach "$device"
    systemctl stop udisks2.service
}
