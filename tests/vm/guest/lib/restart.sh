# Attachments that outlive the daemon.
# shellcheck shell=bash disable=SC2154 # of lib.sh

# published_state: what a restart must not change.
published_state() {
    loopctl list --json | jq -c '.[] | [.device, .disk_sequence, .lifetime, .owner, .state, .managed]'
    busctl tree --list org.loopd1
}

no_state_is_left() {
    [[ -z $(ls /run/loopd/attachments) ]]
}

# all_survive COMMAND…: the attachments of a client and a mounted file system outlive the death of the daemon
# that the command causes; they end with the client and the unmount.
all_survive() {
    image /home/alice/disk.img 1M alice
    ext4_image /home/alice/used.img used alice
    image /home/alice/stay.img 1M alice
    local device used stay before
    stay=$(active alice loopctl attach stay.img)
    login bash -c 'loopctl run disk.img -- loopctl run used.img -- sleep 600'
    device=$(device_of /home/alice/disk.img)
    used=$(device_of /home/alice/used.img)
    mount "$used" /mnt
    before=$(published_state)
    contains "$before" "^.\"$device\",[0-9]+,\"client\",1000,\"attached\",true" \
        "^.\"$used\",[0-9]+,\"client\",1000,\"attached\",true" \
        "^.\"$stay\",[0-9]+,\"persistent\",1000,\"attached\",true" \
        "^/org/loopd1/attachment/$(cat "/sys/block/${device#/dev/}/diskseq")$"
    "$@"
    eventually systemctl -q is-active loopd.service
    equal "after it" "$(published_state)" "$before"
    end_login KILL
    eventually is_free "$device"
    active alice loopctl detach "$stay"
    echo kept >/mnt/file
    umount /mnt
    eventually is_free "$used"
    equal "descriptors kept" "$(systemctl show -P NFileDescriptorStore loopd.service)" 0
    eventually no_state_is_left
}
