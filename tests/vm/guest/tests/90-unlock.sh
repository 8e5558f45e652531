# Encrypted volumes: unlocking, mounting, locking, their ends, the sandbox.
# shellcheck shell=bash disable=SC2154,SC2164 # of lib.sh; what fails ends the test
# shellcheck source=tests/vm/guest/lib/unlock.sh
source ./lib/unlock.sh

test_a_user_unlocks_mounts_and_locks_an_image() {
    loopctl list
    cd /home/alice
    local disk cleartext place answer
    filled_image disk.img
    disk=$(active alice loopctl attach disk.img)
    answer=$(active alice "$probe" unlock "$(object_path "$disk")" rdonly wrong)
    refusal "$answer" $wrong_secret "the secret does not unlock $disk"
    eventually no_mappings
    cleartext=$(unlock "$disk")
    is_mapped "$(mapping_of "$disk")"
    equal "the cleartext" "/dev/$(basename "$(readlink -f "/dev/mapper/$(mapping_of "$disk")")")" "$cleartext"
    # udev has found the file system when the call returns, and UDisks2 does not show it.
    answer=$(udevadm info --query=property "$cleartext")
    contains "$answer" '^ID_FS_LABEL=inside' '^UDISKS_IGNORE=1'
    # A second time.
    refusal "$(active alice "$probe" unlock "$(object_path "$disk")" rdonly secret)" $busy "unlocked as $cleartext already"
    answer=$(active alice "$probe" mount "$(object_path "$disk")/cleartext")
    [[ $answer == ok* ]] || fail "$answer"
    place=$(message "$answer")
    contains "$(findmnt -n -o SOURCE "$place")" "$cleartext|$(mapping_of "$disk")"
    active alice bash -c "echo data >'$place/file'"
    # What is in use is neither locked nor detached.
    refusal "$(active alice "$probe" lock "$(object_path "$disk")")" $busy "mounted on $place"
    contains "$(refused 1 active alice loopctl detach "$disk")" "$cleartext"
    answer=$(active alice "$probe" unmount "$(object_path "$disk")/cleartext")
    [[ $answer == ok* ]] || fail "$answer"
    lock_volume "$disk"
    no_mappings
    active alice loopctl detach "$disk"
    expect_all_locked
}

test_a_cleartext_ends_with_its_client() {
    loopctl list
    cd /home/alice
    local disk name pid
    filled_image disk.img
    active alice "$probe" --hold setup regular disk.img lifetime=s:client < <(sleep infinity) >answer &
    disk=$(device_of /home/alice/disk.img)
    unlock "$disk"
    name=$(mapping_of "$disk")
    contains "$(dmsetup info "$name")" 'DEFERRED REMOVE'
    pid=$(pgrep -f "loopd-probe --hold")
    # In use: it stays until it is unmounted.
    mount "/dev/mapper/$name" /mnt
    kill "$pid"
    wait || true
    sleep 1
    is_mapped "$name"
    attached "$disk"
    umount /mnt
    expect_all_locked
}

test_a_cleartext_survives_the_daemon_as_its_device_does() {
    loopctl list
    cd /home/alice
    local disk name
    filled_image disk.img
    disk=$(active alice loopctl attach --lifetime mount disk.img)
    unlock "$disk"
    name=$(mapping_of "$disk")
    kill_daemon
    loopctl list
    is_mapped "$name"
    contains "$(loopctl info "$disk")" "${disk#/dev/}"
    # A stop ends what is not persistent.
    systemctl stop loopd.service
    expect_all_locked
    # What is persistent stays, and its owner locks it with the next daemon.
    disk=$(active alice loopctl attach disk.img)
    unlock "$disk"
    name=$(mapping_of "$disk")
    systemctl stop loopd.service
    is_mapped "$name"
    loopctl list
    lock_volume "$disk"
    active alice loopctl detach "$disk"
    expect_all_locked
}

test_a_daemon_that_dies_before_the_secret_leaves_nothing() {
    loopctl list
    cd /home/alice
    local disk unit waiting exposure
    filled_image disk.img
    disk=$(active alice loopctl attach disk.img)
    unit="loopd-unlock-$(cat "/sys/block/${disk#/dev/}/diskseq").service"
    mkfifo fifo
    chmod 666 fifo
    # Somebody has the pipe open, and writes nothing.
    sleep infinity >fifo &
    waiting=$!
    active alice "$probe" unlock "$(object_path "$disk")" rdonly fifo >answer &
    eventually systemctl -q is-active "$unit"
    exposure=$(systemd-analyze security --no-pager "$unit" | tail -n 1)
    note "$exposure"
    contains "$exposure" 'Overall exposure level for .*: [01]\.'
    # The daemon and the service manager answer, while the program waits.
    loopctl list
    kill_daemon
    eventually no_unlock_units
    no_mappings
    kill $waiting
    wait || true
    rm fifo
    loopctl list
    active alice loopctl detach "$disk"
    expect_all_locked
}

test_headers_that_cannot_be_used_are_refused() {
    loopctl list
    cd /home/alice
    local disk answer
    luks_image null.img --cipher cipher_null-ecb
    disk=$(active alice loopctl attach null.img)
    refusal "$(active alice "$probe" unlock "$(object_path "$disk")" rdonly secret)" $not_supported 'its header'
    eventually no_mappings
    refusal "$(active alice "$probe" unlock "$(object_path "$disk")" rdonly secret type=s:bitlocker)" $invalid 'not encrypted in the way'
    active alice loopctl detach "$disk"
    # A detached header.
    image data.img 8M alice
    cryptsetup luksFormat --batch-mode --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file secret \
        --header header.img data.img
    chmod 644 header.img
    disk=$(active alice loopctl attach data.img)
    answer=$(active alice "$probe" unlock "$(object_path "$disk")" rdonly secret header=h:/home/alice/header.img)
    [[ $answer == ok* ]] || fail "$answer"
    lock_volume "$disk"
    active alice loopctl detach "$disk"
    expect_all_locked
}

# volume_group DEVICE: a group with a volume, not active.
volume_group() {
    vgcreate -q hidden "$1"
    lvcreate -q -y -n volume -l 1 hidden
    vgchange -q -an hidden
}

test_udev_activates_no_volume_group_in_a_cleartext_of_a_user() {
    loopctl list
    cd /home/alice
    local disk cleartext
    filled_image disk.img volume_group
    disk=$(active alice loopctl attach disk.img)
    cleartext=$(unlock "$disk")
    udevadm settle
    contains "$(udevadm info --query=property "$cleartext")" '^LOOPD_UNTRUSTED=1' '^LOOPD_FS_TYPE=LVM2_member'
    ! ls /dev/hidden/volume
    lock_volume "$disk"
    active alice loopctl detach "$disk"
    expect_all_locked
}

test_no_two_devices_show_the_same_bytes_unlocked_or_mounted() {
    loopctl list
    cd /home/alice
    local disk other
    filled_image disk.img
    disk=$(active alice loopctl attach disk.img)
    other=$(active alice loopctl attach disk.img)
    unlock "$disk"
    refusal "$(active alice "$probe" unlock "$(object_path "$other")" rdonly secret)" $busy "$disk .* shows the same bytes" \
        "$(mapping_of "$disk")"
    lock_volume "$disk"
    # Somebody else's mapping is named.
    cryptsetup open --type luks --key-file secret "$other" elsewhere
    refusal "$(active alice "$probe" unlock "$(object_path "$disk")" rdonly secret)" $busy 'elsewhere'
    refusal "$(active alice "$probe" unlock "$(object_path "$other")" rdonly secret)" $busy 'elsewhere'
    cryptsetup close elsewhere
    active alice loopctl detach "$disk" "$other"
    expect_all_locked
}

test_a_read_only_device_has_a_read_only_cleartext() {
    loopctl list
    cd /home/alice
    local disk cleartext
    filled_image disk.img
    disk=$(active alice loopctl attach --read-only disk.img)
    cleartext=$(unlock "$disk")
    equal "read-only" "$(cat "/sys/block/${cleartext#/dev/}/ro")" 1
    lock_volume "$disk"
    active alice loopctl detach "$disk"
    expect_all_locked
}

test_a_partition_is_unlocked() {
    loopctl list
    cd /home/alice
    local disk cleartext
    luks_image volume.img
    image disk.img 52M alice
    printf 'start=2048, size=98304\n' | sfdisk --quiet --label gpt disk.img
    dd if=volume.img of=disk.img bs=1M seek=1 conv=notrunc status=none
    disk=$(active alice loopctl attach disk.img)
    cleartext=$(unlock "${disk}p1")
    is_mapped "$(mapping_of "$disk")p1"
    equal "the volume" "$(ls "/sys/block/${cleartext#/dev/}/slaves")" "${disk#/dev/}p1"
    lock_volume "${disk}p1"
    active alice loopctl detach "$disk"
    expect_all_locked
}

test_a_key_that_needs_too_much_memory_is_refused() {
    loopctl list
    cd /home/alice
    local disk unit=/run/systemd/system/loopd-unlock-.service.d
    luks_image disk.img --pbkdf argon2id --pbkdf-memory 131072 --pbkdf-parallel 1 --pbkdf-force-iterations 4
    disk=$(active alice loopctl attach disk.img)
    # With the default limit it is unlocked.
    unlock "$disk"
    lock_volume "$disk"
    mkdir -p $unit
    printf '[Service]\nMemoryMax=48M\n' >$unit/memory.conf
    systemctl daemon-reload
    refusal "$(active alice "$probe" unlock "$(object_path "$disk")" rdonly secret)" $not_supported 'needs more memory' \
        'drop-in for loopd-unlock-.service'
    rm -r $unit
    systemctl daemon-reload
    active alice loopctl detach "$disk"
    expect_all_locked
}
