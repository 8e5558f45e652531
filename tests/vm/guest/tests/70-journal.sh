# The journal.
# shellcheck shell=bash

test_the_journal_has_fields() {
    image /home/alice/disk.img 1M alice
    local cursor device sequence
    cursor=$(journalctl -n 0 --show-cursor | sed -n 's/^-- cursor: //p')
    device=$(active alice loopctl attach disk.img)
    sequence=$(cat "/sys/block/${device#/dev/}/diskseq")
    active alice loopctl detach "$device"
    journalctl --sync
    journalctl --after-cursor="$cursor" -u loopd.service -o json |
        jq -e --arg device "$device" --arg sequence "$sequence" 'select(.DEVICE == $device
            and .DISK_SEQUENCE == $sequence and .UID == "1000" and .FILE == "/home/alice/disk.img")'
}
