# Helpers for all tests. A test is a function; it fails if a command in it fails.
# shellcheck shell=bash
shopt -s inherit_errexit

# ---- results

# skip REASON: ends a test that cannot run on this machine.
skip() {
    echo "SKIP: $*"
    exit 0
}

# note TEXT: adds a line to the result.
note() {
    echo "NOTE: $*"
}

fail() {
    echo "FAILED: $*" >&2
    exit 1
}

# ---- comparisons

# equal NAME ACTUAL EXPECTED
equal() {
    local -
    set +x
    [[ $2 == "$3" ]] || fail "$1: '$2' instead of '$3'"
}

# contains TEXT PATTERN…: TEXT matches all of the extended regular expressions.
contains() {
    local - text=$1 pattern
    set +x
    shift
    for pattern in "$@"; do
        grep -qE -e "$pattern" <<<"$text" || fail "no '$pattern' in: $text"
    done
}

# eventually COMMAND…: waits until the command succeeds, at most half a minute.
eventually() {
    local - end=$((SECONDS + 30))
    set +x
    until "$@"; do
        ((SECONDS < end)) || fail "not after half a minute: $*"
        sleep 0.1
    done
}

# refused STATUS COMMAND…: the command fails with this status; prints its output.
refused() {
    local expected=$1 status=0 output
    shift
    output=$("$@" 2>&1) || status=$?
    echo "$output"
    ((status == expected)) || fail "status $status instead of $expected: $*"
}

# ---- users, each with a real login session

# session USER VT COMMAND…: a session at the seat; VT 1 is the active terminal. Polkit treats all sessions of a
# user as active if one is, so alice's lasting session has to end first.
session() {
    local user=$1 vt=$2
    shift 2
    end_seat
    systemd-run --quiet --wait --pipe --collect --working-directory="/home/$user" \
        -p User="$user" -p PAMName=login -p TTYPath="/dev/tty$vt" \
        --setenv=XDG_SEAT=seat0 --setenv=XDG_VTNR="$vt" --setenv=HOME="/home/$user" -- "$@"
}

# active USER COMMAND…: in an active local session.
active() {
    if [[ $1 == alice ]]; then
        seated "${@:2}"
    else
        session "$1" 1 "${@:2}"
    fi
}

# seated COMMAND…: in alice's lasting session, which is kept for later tests: a login takes longer than most
# tests.
seated() (
    set +x
    ensure_seated
    local pid environment
    pid=$(<"$seat")
    mapfile -d '' -t environment <"/proc/$pid/environ"
    echo 0 >"/sys/fs/cgroup$(sed 's/^0:://' "/proc/$pid/cgroup")/cgroup.procs"
    cd /home/alice || exit
    exec env --ignore-environment "${environment[@]}" setpriv --reuid=alice --regid=alice --init-groups -- "$@"
)

# The file with the pid of that session's process.
readonly seat=$PWD/seat

ensure_seated() {
    [[ -s $seat && -e /proc/$(<"$seat") ]] && return
    session_unit seat sleep infinity
    eventually is_seated
    systemctl show -P MainPID seat.service >"$seat"
}

# The session's process has started its program.
is_seated() {
    [[ $(readlink "/proc/$(systemctl show -P MainPID seat.service)/exe") == */sleep ]]
}

end_seat() {
    [[ ! -s $seat ]] || systemctl stop seat.service
    rm -f "$seat"
}

# inactive USER COMMAND…: in a session at the seat that is not active.
inactive() {
    session "$1" 2 "${@:2}"
}

# remote USER COMMAND…: in a session without a seat, as over the network.
remote() {
    local user=$1
    shift
    end_seat
    systemd-run --quiet --wait --pipe --collect --working-directory="/home/$user" \
        -p User="$user" -p PAMName=login --setenv=HOME="/home/$user" -- "$@"
}

# login COMMAND…: alice logs in at the seat; the session runs the command.
login() {
    end_seat
    session_unit login "$@"
}

# session_unit UNIT COMMAND…: a session of alice at the seat, as a transient unit.
session_unit() {
    systemd-run --quiet --collect --unit="$1" --working-directory=/home/alice \
        -p User=alice -p PAMName=login -p TTYPath=/dev/tty1 --setenv=HOME=/home/alice \
        --setenv=XDG_SEAT=seat0 --setenv=XDG_VTNR=1 -- "${@:2}"
}

# session_of UNIT: its logind session.
session_of() {
    sed 's,.*/session-\(.*\)\.scope$,\1,' "/proc/$(systemctl show -P MainPID "$1")/cgroup"
}

# end_login SIGNAL: sends it to every process of alice's login.
end_login() {
    loginctl kill-session --signal="$1" "$(session_of login.service)"
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

# refusal ANSWER-OF-PROBE ERROR [PATTERN…]: it is this error, and the message matches.
refusal() {
    equal "error of $1" "${1%%$'\n'*}" "$2"
    contains "$(message "$1")" "${@:3}"
}

# rule TEXT: adds a polkit rule before all others, until forget_rules.
rule() {
    cat >/etc/polkit-1/rules.d/10-test.rules <<<"$1"
    systemctl restart polkit.service
}

forget_rules() {
    rm -f /etc/polkit-1/rules.d/{10-test,50-loopd-group}.rules
    systemctl restart polkit.service
}

# ---- images and devices

# image PATH SIZE [OWNER]: a file without data.
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
    # sfdisk reads the sector size from a device only.
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

# is_another PID: another daemon runs.
is_another() {
    local pid
    pid=$(daemon_pid)
    ((pid != 0 && pid != $1))
}

kill_daemon() {
    local pid
    pid=$(daemon_pid)
    kill -KILL "$pid"
    eventually is_another "$pid"
}

# survives COMMAND…: a persistent attachment and its mount outlive the death of the daemon that the
# command causes; afterwards a daemon serves again.
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
