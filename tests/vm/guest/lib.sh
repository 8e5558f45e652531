# What the tests have in common. A test is a function; a command that fails in it fails it.
# shellcheck shell=bash
shopt -s inherit_errexit

# ---- saying

# skip WHY: ends the test, which cannot be run here.
skip() {
    echo "SKIP: $*"
    exit 0
}

# note WHAT: a line that comes with the result, passed or not.
note() {
    echo "NOTE: $*"
}

fail() {
    echo "FAILED: $*" >&2
    exit 1
}

# ---- comparing

# equal WHAT IS SHOULD-BE
equal() {
    local -
    set +x
    [[ $2 == "$3" ]] || fail "$1: '$2' instead of '$3'"
}

# contains TEXT PATTERN…: all of the extended regular expressions.
contains() {
    local - text=$1 pattern
    set +x
    shift
    for pattern in "$@"; do
        grep -qE -e "$pattern" <<<"$text" || fail "no '$pattern' in: $text"
    done
}

# eventually COMMAND…: it succeeds within half a minute; a busy host is slow.
eventually() {
    local - end=$((SECONDS + 30))
    set +x
    until "$@"; do
        ((SECONDS < end)) || fail "not after half a minute: $*"
        sleep 0.1
    done
}

# refused STATUS COMMAND…: it fails with that status; prints what it said.
refused() {
    local expected=$1 status=0 said
    shift
    said=$("$@" 2>&1) || status=$?
    echo "$said"
    ((status == expected)) || fail "status $status instead of $expected: $*"
}

# ---- users: each is a session as a real login makes it

# session USER VT COMMAND…: at the seat; VT 1 is the one in front. Polkit takes all of a user's sessions
# for active as long as one is: alice has to stand up.
session() {
    local user=$1 vt=$2
    shift 2
    stand_up
    systemd-run --quiet --wait --pipe --collect --working-directory="/home/$user" \
        -p User="$user" -p PAMName=login -p TTYPath="/dev/tty$vt" \
        --setenv=XDG_SEAT=seat0 --setenv=XDG_VTNR="$vt" --setenv=HOME="/home/$user" -- "$@"
}

# active USER COMMAND…: whoever sits at the machine.
active() {
    if [[ $1 == alice ]]; then
        seated "${@:2}"
    else
        session "$1" 1 "${@:2}"
    fi
}

# seated COMMAND…: alice's, in a session that stays until somebody else comes: a login costs more than
# most of what is tested.
seated() (
    set +x
    sit_down
    local pid environment
    pid=$(<"$seat")
    mapfile -d '' -t environment <"/proc/$pid/environ"
    echo 0 >"/sys/fs/cgroup$(sed 's/^0:://' "/proc/$pid/cgroup")/cgroup.procs"
    cd /home/alice || exit
    exec env --ignore-environment "${environment[@]}" setpriv --reuid=alice --regid=alice --init-groups -- "$@"
)

# Has the process that sits there.
readonly seat=$PWD/seat

sit_down() {
    [[ -s $seat && -e /proc/$(<"$seat") ]] && return
    session_unit seat sleep infinity
    eventually sits
    systemctl show -P MainPID seat.service >"$seat"
}

# Its process is logged in, and what it was to be.
sits() {
    [[ $(readlink "/proc/$(systemctl show -P MainPID seat.service)/exe") == */sleep ]]
}

stand_up() {
    [[ ! -s $seat ]] || systemctl stop seat.service
    rm -f "$seat"
}

# inactive USER COMMAND…: at the seat, but somebody else is in front.
inactive() {
    session "$1" 2 "${@:2}"
}

# remote USER COMMAND…: a session at no seat, as over the network.
remote() {
    local user=$1
    shift
    stand_up
    systemd-run --quiet --wait --pipe --collect --working-directory="/home/$user" \
        -p User="$user" -p PAMName=login --setenv=HOME="/home/$user" -- "$@"
}

# login COMMAND…: alice logs in at the seat, runs it and stays.
login() {
    stand_up
    session_unit login "$@"
}

# session_unit UNIT COMMAND…: alice's, at the seat.
session_unit() {
    systemd-run --quiet --collect --unit="$1" --working-directory=/home/alice \
        -p User=alice -p PAMName=login -p TTYPath=/dev/tty1 --setenv=HOME=/home/alice \
        --setenv=XDG_SEAT=seat0 --setenv=XDG_VTNR=1 -- "${@:2}"
}

# Answers the prompt of a command on a terminal: active alice "$ask" PASSWORD COMMAND…
# shellcheck disable=SC2034 # for the tests
readonly ask=$PWD/ask.exp
# The raw client: prints `ok` or an error's name, and in the next lines the result or the message.
# shellcheck disable=SC2034 # as well
readonly probe=$PWD/loopd-probe

# message ANSWER-OF-PROBE
message() {
    echo "${1#*$'\n'}"
}

# refusal ANSWER-OF-PROBE ERROR [PATTERN…]: it is that error, and says so.
refusal() {
    equal "error of $1" "${1%%$'\n'*}" "$2"
    contains "$(message "$1")" "${@:3}"
}

# rule TEXT: polkit has this rule, before all others, until forget_rules.
rule() {
    cat >/etc/polkit-1/rules.d/10-test.rules <<<"$1"
    systemctl restart polkit.service
}

forget_rules() {
    rm -f /etc/polkit-1/rules.d/{10-test,50-loopd-group}.rules
    systemctl restart polkit.service
}

# ---- images and devices

# image PATH SIZE [OWNER]: an empty file.
image() {
    rm -f "$1"
    truncate -s "$2" "$1"
    [[ -z ${3-} ]] || chown "$3:" "$1"
}

# ext4_image PATH LABEL [OWNER]
ext4_image() {
    image "$1" 16M
    mkfs.ext4 -q -O ^has_journal -L "$2" "$1"
    [[ -z ${3-} ]] || chown "$3:" "$1"
}

# partitioned_image PATH TABLE SECTOR [OWNER]: two partitions of 4 MiB, ext4 (one) and vfat (TWO).
partitioned_image() {
    local mib=$((1024 * 1024 / $3)) device
    image "$1" 12M
    # sfdisk takes the size of the sectors from a device only.
    device=$(losetup --find --show --sector-size "$3" "$1")
    printf 'start=%s, size=%s\n' "$mib" $((4 * mib)) $((6 * mib)) $((4 * mib)) |
        sfdisk --quiet --no-reread --no-tell-kernel --label "$2" "$device"
    losetup --detach "$device"
    eventually is_free "$device"
    mkfs.ext4 -q -O ^has_journal -L one -E offset=$((1024 * 1024)) "$1" 4M
    mkfs.vfat -n TWO -S "$3" --offset=$((6 * mib)) "$1" 4096 >/dev/null
    [[ -z ${4-} ]] || chown "$4:" "$1"
}

# partitions <JSON: a line for each partition.
partitions() {
    jq -r '.partitions[] | "\(.number) \(.offset) \(.size) \(.table) \(.filesystem.type) \(.filesystem.label)"'
}

is_free() {
    [[ ! -e /sys/block/${1#/dev/}/loop/backing_file ]]
}

is_attached() {
    ! is_free "$1"
}

has_device() {
    losetup -n -O NAME -j "$1" | grep . >/dev/null
}

# device_of FILE: waits until it is attached.
device_of() {
    eventually has_device "$1"
    losetup -n -O NAME -j "$1"
}

detached() {
    is_free "$1" || fail "$1 is still attached"
}

attached() {
    is_attached "$1" || fail "$1 is not attached"
}

# ---- the daemon

daemon_pid() {
    systemctl show -P MainPID loopd.service
}

is_inactive() {
    [[ $(systemctl is-active loopd.service) == inactive ]]
}

# survives COMMAND…: a persistent attachment, and what is mounted of it, outlive the death of the
# daemon that the command brings about; afterwards it serves again.
survives() {
    ext4_image /home/alice/disk.img kept alice
    image /home/alice/other.img 1M alice
    local device before
    device=$(active alice loopctl attach disk.img)
    mount "$device" /mnt
    before=$(daemon_pid)
    "$@"
    eventually systemctl -q is-active loopd.service
    [[ $(daemon_pid) != "$before" ]] || fail "it is the same daemon"
    echo kept >/mnt/file
    sync /mnt/file
    umount /mnt
    contains "$(loopctl list --all)" "^$device .*/home/alice/disk.img"
    active alice bash -eux <<<'loopctl attach other.img; loopctl detach other.img'
    loopctl detach "$device"
}
