# Mounting over the bus, as alice.
# shellcheck shell=bash disable=SC2154 # of lib.sh

# shellcheck disable=SC2034 # for the tests
readonly not_supported=org.loopd1.Error.NotSupported
# shellcheck disable=SC2034 # for the tests
readonly invalid=org.freedesktop.DBus.Error.InvalidArgs
# shellcheck disable=SC2034 # for the tests
readonly failing=org.loopd1.Error.Kernel

# object_path DEVICE: of a disk or a partition.
object_path() {
    [[ $1 =~ ^/dev/(loop[0-9]+)(p[0-9]+)?$ ]]
    echo "/org/loopd1/attachment/$(cat "/sys/block/${BASH_REMATCH[1]}/diskseq")${BASH_REMATCH[2]:+/${BASH_REMATCH[2]}}"
}

# call_volume KIND-OF-SESSION USER CALL DEVICE [OPTION…]: calls Mount or Unmount; prints the reply.
call_volume() {
    $1 "$2" "$probe" "$3" "$(object_path "$4")" "${@:5}"
}

# mount_volume DEVICE [OPTION…]: mounts as alice; prints the mount point.
mount_volume() {
    local answer
    answer=$(call_volume active alice mount "$@")
    [[ $answer == ok* ]] || fail "$answer"
    message "$answer"
}

# unmount_volume DEVICE [OPTION…]: unmounts as alice.
unmount_volume() {
    local answer
    answer=$(call_volume active alice unmount "$@")
    [[ $answer == ok* ]] || fail "$answer"
}

# attach_for_mount FILE: attaches alice's file with the lifetime "mount"; prints the device.
attach_for_mount() {
    active alice loopctl attach --lifetime mount "$1"
}

no_units() {
    [[ -z $(systemctl list-units --all --plain --no-legend 'run-media-*' 'loopd-unmount-*') ]]
}

no_devices() {
    [[ -z $(losetup -n -O NAME) ]]
}

not_mounted() {
    ! findmnt "$1"
}

# No mount, unit, directory, state file or device is left.
expect_nothing_left() {
    eventually no_units
    ! grep -q /run/media/ /proc/self/mounts
    equal "directories" "$(ls /run/media)" ""
    equal "state" "$(find /run/loopd/mounts /run/loopd/attachments -name '*.toml')" ""
    eventually no_devices
}
