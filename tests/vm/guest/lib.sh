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
    [[ $2 == "$3" ]] || fail "$1: '$2' instead of '$3'"
}

# contains TEXT PATTERN…: all of the extended regular expressions.
contains() {
    local text=$1 pattern
    shift
    for pattern in "$@"; do
        grep -qE -e "$pattern" <<<"$text" || fail "no '$pattern' in: $text"
    done
}

# eventually COMMAND…: it succeeds within ten seconds.
eventually() {
    local end=$((SECONDS + 10))
    until "$@"; do
        ((SECONDS < end)) || fail "not after ten seconds: $*"
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

# session USER VT COMMAND…: at the seat; VT 1 is the one in front.
session() {
    local user=$1 vt=$2
    shift 2
    systemd-run --quiet --wait --pipe --collect --working-directory="/home/$user" \
        -p User="$user" -p PAMName=login -p TTYPath="/dev/tty$vt" \
        --setenv=XDG_SEAT=seat0 --setenv=XDG_VTNR="$vt" --setenv=HOME="/home/$user" -- "$@"
}

# active USER COMMAND…: whoever sits at the machine.
active() {
    session "$1" 1 "${@:2}"
}

# inactive USER COMMAND…: at the seat, but somebody else is in front.
inactive() {
    session "$1" 2 "${@:2}"
}

# remote USER COMMAND…: a session at no seat, as over the network.
remote() {
    local user=$1
    shift
    systemd-run --quiet --wait --pipe --collect --working-directory="/home/$user" \
        -p User="$user" -p PAMName=login --setenv=HOME="/home/$user" -- "$@"
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

is_free() {
    [[ ! -e /sys/block/${1#/dev/}/loop/backing_file ]]
}

is_attached() {
    ! is_free "$1"
}

daemon_pid() {
    systemctl show -P MainPID loopd.service
}
