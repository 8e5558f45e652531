# A device that one user can change is not returned to another.
# shellcheck shell=bash disable=SC2154 # of lib.sh

# The user for whom UDisks2 set up a loop device can detach it; then anybody could set it up again.
test_a_device_of_udisks_is_not_given_to_root() {
    image /srv/disk.img 8M
    chmod 644 /srv/disk.img
    local device output command
    active alice udisksctl loop-setup --no-user-interaction -r -f /srv/disk.img
    device=$(losetup -n -O NAME -j /srv/disk.img)
    for command in "true" "systemctl stop udisks2.service"; do
        $command
        output=$(refused 1 loopctl attach -r --overlap reuse /srv/disk.img)
        contains "$output" "$device" "UDisks2 has set it up for user $(id -u alice)"
        refused 1 loopctl losetup -L -r -f --show /srv/disk.img
    done
    # The same after loopd has adopted it: UDisks2 still follows alice's requests.
    loopctl set "$device" --lifetime persistent
    refused 1 loopctl attach -r --overlap reuse /srv/disk.img
    active alice udisksctl loop-delete --no-user-interaction -b "$device"
    eventually detached "$device"

    # A device that belongs to root is returned.
    losetup -r "$device" /srv/disk.img
    equal "device" "$(loopctl attach -r --overlap reuse /srv/disk.img)" "$device"
    # An invalid record may be about any device.
    cp /run/udisks2/loop record
    echo nonsense >/run/udisks2/loop
    output=$(refused 1 loopctl attach -r --overlap reuse /srv/disk.img)
    cp record /run/udisks2/loop
    contains "$output" "is not understood"
    loopctl detach "$device"
    systemctl stop udisks2.service
}
