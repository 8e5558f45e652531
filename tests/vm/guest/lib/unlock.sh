# Encrypted images of alice, and unlocking them over the bus.
# shellcheck shell=bash disable=SC2154 # of lib.sh
# shellcheck source=tests/vm/guest/lib/mount.sh
source ./lib/mount.sh

# shellcheck disable=SC2034 # for the tests
readonly wrong_secret=org.loopd1.Error.WrongSecret
# shellcheck disable=SC2034 # for the tests
readonly busy=org.loopd1.Error.Busy

# luks_image PATH [OPTION…]: a LUKS image of alice, whose key costs little. The passphrase is in the file `secret`.
luks_image() {
    printf 'right\n' >secret
    printf 'right' >wrong
    chmod 644 secret wrong
    image "$1" 48M alice
    cryptsetup luksFormat --batch-mode --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file secret "${@:2}" "$1"
}

# fill DEVICE [COMMAND…]: opens the LUKS device as root, and makes a file system or runs the command with the cleartext.
fill() {
    cryptsetup open --type luks --key-file secret "$1" filling
    if (($# > 1)); then
        "${@:2}" /dev/mapper/filling
    else
        mkfs.ext4 -q -L inside -E "root_owner=$(id -u alice):$(id -g alice)" /dev/mapper/filling
    fi
    cryptsetup close filling
}

# filled_image PATH [COMMAND…]
filled_image() {
    local device
    luks_image "$1"
    device=$(losetup --find --show "$1")
    fill "$device" "${@:2}"
    losetup --detach "$device"
    eventually is_free "$device"
}

# unlock DEVICE [OPTION…]: unlocks with the right passphrase as alice; prints the device of the cleartext.
unlock() {
    local answer
    answer=$(active alice "$probe" unlock "$(object_path "$1")" rdonly secret "${@:2}")
    [[ $answer == ok* ]] || fail "$answer"
    message "$answer" | jq -r .device
}

# lock_volume DEVICE [OPTION…]
lock_volume() {
    local answer
    answer=$(active alice "$probe" lock "$(object_path "$1")" "${@:2}")
    [[ $answer == ok* ]] || fail "$answer"
}

no_mappings() {
    ! compgen -G '/sys/block/dm-*'
}

no_unlock_units() {
    [[ -z $(systemctl list-units --all --plain --no-legend 'loopd-unlock-*' 'loopd-lock-*') ]]
}

# is_mapped NAME
is_mapped() {
    [[ -e /dev/mapper/$1 ]]
}

# mapping_of DEVICE: the name that loopd gives its mapping.
mapping_of() {
    echo "loopd-$(cat "/sys/block/${1#/dev/}/diskseq")"
}

# expect_all_locked: neither a mapping nor a unit nor anything of a mount is left.
expect_all_locked() {
    eventually no_mappings
    eventually no_unlock_units
    expect_nothing_left
}
