# Files in directories that the daemon's sandbox hides: it receives open descriptors.
# shellcheck shell=bash

# attaches_in DIRECTORY: writes to the device reach the file, and BackingFile has its path.
attaches_in() {
    image "$1/disk.img" 1M alice
    local device
    device=$(active alice loopctl attach "$1/disk.img")
    equal "file" "$(loopctl info --json "$device" | jq -r .backing_file)" "$1/disk.img"
    head -c 1M /dev/urandom >random
    dd if=random of="$device" bs=64K oflag=direct status=none
    loopctl detach "$1/disk.img"
    cmp random "$1/disk.img"
    rm "$1/disk.img"
}

test_an_image_below_home() {
    attaches_in /home/alice
}

test_an_image_below_tmp() {
    attaches_in /tmp
}

test_an_image_on_a_tmpfs() {
    mkdir -p /srv/ram
    mount -t tmpfs -o mode=1777 ram /srv/ram
    attaches_in /srv/ram
    umount /srv/ram
}

test_an_image_in_the_runtime_directory_of_a_user() {
    active alice bash -eux <<'END'
        truncate -s 1M "$XDG_RUNTIME_DIR/disk.img"
        loopctl attach "$XDG_RUNTIME_DIR/disk.img"
        loopctl detach "$XDG_RUNTIME_DIR/disk.img"
END
}

test_a_node_with_another_owner_is_named_and_skipped() {
    image /home/alice/disk.img 1M alice
    local taken device output
    taken=$(losetup --find)
    chown alice: "$taken"
    chmod 600 "$taken"
    device=$(active alice loopctl attach disk.img)
    [[ $device != "$taken" ]] || fail "$taken was used"
    loopctl detach "$device"
    output=$(active alice loopctl attach --device "$taken" disk.img 2>&1) && fail "attached to $taken"
    contains "$output" "$taken may not be opened by root .*chown root:disk $taken"
    chown root:disk "$taken"
    chmod 660 "$taken"
    equal "device" "$(active alice loopctl attach disk.img)" "$taken"
    loopctl detach "$taken"
}
