#!/bin/bash
# Demonstrates loopd with real loop devices on a private bus. It installs nothing and leaves nothing
# behind. Prints each command and its output as a shell session. `make demo` builds the programs and
# passes their directory.
set -euo pipefail

if ((EUID != 0)); then
    exec sudo -- "$0" "$@"
fi

programs=$(realpath "${1:?usage: demo.sh DIRECTORY-OF-THE-PROGRAMS}")
here=$(realpath "$(dirname "$0")/..")
# All users of the private bus must be able to enter it.
work=$(mktemp -d /var/tmp/loopd-demo.XXXXXX)
chmod 755 "$work"
owns_run_udev=
[[ -e /run/udev ]] || owns_run_udev=yes
owns_run_loopd=
[[ -e /run/loopd ]] || owns_run_loopd=yes
# Process ids of the started programs, by name.
declare -A started=()

stop() {
    local name=$1 pid=${started[$1]-}
    [[ $pid ]] || return 0
    unset "started[$name]"
    kill "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
}

cleanup() {
    local status=$?
    trap - EXIT
    set +e
    # Attachments with the lifetime of a client end with loopd.
    for name in client command loopd bus; do
        stop "$name"
    done
    # After a failure a persistent attachment may be left.
    losetup -l -n -O NAME,BACK-FILE | while read -r device file; do
        [[ $file == "$work"/* ]] && losetup -d "$device"
    done
    if [[ ${started[udev]-} ]]; then
        udevadm settle --timeout=5
        stop udev
        [[ $owns_run_udev ]] && rm -rf /run/udev
    fi
    [[ $owns_run_loopd ]] && rm -rf /run/loopd
    rm -rf "$work"
    exit "$status"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# until_true WHAT COMMAND…: waits at most ten seconds.
until_true() {
    local what=$1 tries
    shift
    for ((tries = 0; tries < 500; tries++)); do
        if "$@"; then
            return 0
        fi
        sleep 0.02
    done
    echo "demo: $what: not after ten seconds" >&2
    [[ -e $work/loopd.log ]] && cat "$work/loopd.log" >&2
    exit 1
}

# Prints a command as a user would type it, and runs it.
show() {
    printf '# %s\n' "$*"
    "$@"
}

say() {
    printf '\n## %s\n' "$*"
}

start_udev() {
    udev_is_there && return
    /lib/systemd/systemd-udevd >/dev/null 2>&1 &
    started[udev]=$!
    until_true "udev is there" udev_is_there
}

udev_is_there() {
    [[ -e /run/udev/control ]] && udevadm control --ping --timeout=2 2>/dev/null
}

start_bus() {
    cat >"$work/bus.conf" <<END
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <listen>unix:path=$work/bus</listen>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus"/>
  </policy>
  <include>$here/dbus/org.loopd1.conf</include>
</busconfig>
END
    dbus-daemon --nofork --nopidfile --nosyslog --config-file="$work/bus.conf" 2>"$work/bus.log" &
    started[bus]=$!
    until_true "the bus is there" test -S "$work/bus"
    export DBUS_SYSTEM_BUS_ADDRESS=unix:path=$work/bus
}

start_loopd() {
    mkdir "$work/run"
    RUNTIME_DIRECTORY=$work/run "$programs/loopd" 2>"$work/loopd.log" &
    started[loopd]=$!
    until_true "loopd is there" loopctl list >/dev/null 2>&1
}

is_free() {
    [[ ! -e /sys/block/${1#/dev/}/loop/backing_file ]]
}

PATH=$programs:/usr/sbin:/sbin:$PATH
start_udev
start_bus
start_loopd
cd "$work"

say "An image with a file system, attached until it is detached"
show truncate -s 64M disk.img
show mkfs.ext4 -q -L holiday disk.img
printf '# loopctl attach disk.img\n'
device=$(loopctl attach disk.img)
echo "$device"
show loopctl list
show loopctl info "$device"

say "Another one, for as long as a command runs; both are killed, and the device goes too"
show truncate -s 16M scratch.img
# shellcheck disable=SC2016 # as one would type it
printf '# %s\n' 'loopctl run scratch.img -- sleep 600 &'
# shellcheck disable=SC2016 # the inner shell's
loopctl run scratch.img -- sh -c 'echo "$$ $LOOPCTL_DEVICE" >started; exec sleep 600' &
started[client]=$!
until_true "the command runs" test -s started
read -r command scratch <started
started[command]=$command
show loopctl list
printf '# kill -KILL %s %s\n' "${started[client]}" "$command"
kill -KILL "${started[client]}" "$command"
wait "${started[client]}" 2>/dev/null || true
unset 'started[client]' 'started[command]'
until_true "$scratch is free" is_free "$scratch"
show loopctl list

say "The first one was asked to stay"
show loopctl detach "$device"
show loopctl list
is_free "$device"
