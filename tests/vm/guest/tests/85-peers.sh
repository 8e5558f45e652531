# Opening an image as a user would, beside the other programs that can. `make bench-vm` runs it with many rounds.
# shellcheck shell=bash disable=SC2154 # of lib.sh

# shellcheck source=tests/vm/guest/lib/images.sh
source ./lib/images.sh

# Each way opens cd.iso in the current directory, prints the mount point, and undoes that again. They run in one session
# of alice, who has started a session bus for gio; `mount -o loop` runs as root.
ways() {
    cat <<'END'
open_loopctl() {
    loopctl mount -r cd.iso
}
close_loopctl() {
    loopctl unmount cd.iso
}

# Prints the device.
udisks_attach() {
    udisksctl loop-setup --no-user-interaction -r -f cd.iso | sed -n 's/.* as \(.*\)\.$/\1/p' >device
}
# UDisks2 may not know the device yet when udisksctl returns; a script has to retry.
retry() {
    for try in $(seq 100); do
        "$@" 2>/dev/null && return
    done
    return 1
}
detached() {
    while [ -e "/sys/block/$(basename "$(cat device)")/loop" ]; do sleep 0.01; done
}
open_udisksctl() {
    udisks_attach
    retry udisksctl mount --no-user-interaction -b "$(cat device)" >printed
    sed -n 's/.* at \([^ ]*[^. ]\)\.*$/\1/p' printed
}
close_udisksctl() {
    udisksctl unmount --no-user-interaction -b "$(cat device)" >printed
    udisksctl loop-delete --no-user-interaction -b "$(cat device)"
    detached
}
open_gio() {
    udisks_attach
    retry gio mount -d "$(cat device)" >printed
    findmnt -n -o TARGET "$(cat device)"
}
close_gio() {
    # It detaches the device, too.
    gio mount -u "$(findmnt -n -o TARGET "$(cat device)")"
    detached
}

# measure WAY: prints the microseconds of opening and of closing.
measure() {
    local start mounted before point
    start=${EPOCHREALTIME/./}
    "open_$1" >point
    mounted=${EPOCHREALTIME/./}
    point=$(cat point)
    [ -n "$(ls "$point")" ]
    before=${EPOCHREALTIME/./}
    "close_$1"
    echo "$1 $((mounted - start)) $((${EPOCHREALTIME/./} - before))"
}
END
}

# measure_root: the same for `mount -o loop`.
measure_root() {
    local start mounted before
    start=${EPOCHREALTIME/./}
    mount -o loop,ro cd.iso /mnt
    mounted=${EPOCHREALTIME/./}
    [[ $(ls /mnt) ]]
    before=${EPOCHREALTIME/./}
    umount /mnt
    echo "mount-o-loop $((mounted - start)) $((${EPOCHREALTIME/./} - before))"
}

# percentile PERCENT: of the numbers in the standard input.
percentile() {
    sort -n | awk -v percent="$1" '{number[NR] = $1} END {place = int((NR * percent + 99) / 100); print number[place]}'
}

# report_way WAY FILE: notes the medians and 95th percentiles in milliseconds.
report_way() {
    awk -v way="$1" '$1 == way {print $2}' "$2" >opened
    awk -v way="$1" '$1 == way {print $3}' "$2" >closed
    note "$(printf '%-14s open %7.1f ms, p95 %7.1f   close %7.1f ms, p95 %7.1f   (%d rounds)' "$1" \
        "$(percentile 50 <opened)e-3" "$(percentile 95 <opened)e-3" \
        "$(percentile 50 <closed)e-3" "$(percentile 95 <closed)e-3" "$(wc -l <opened)")"
}

test_opening_an_image_beside_peers() {
    local rounds way
    rounds=$(cat rounds)
    iso_image /home/alice/cd.iso TIMED
    cp /home/alice/cd.iso .
    ways >/home/alice/ways
    systemctl start udisks2.service
    {
        active alice dbus-run-session -- bash -euo pipefail -s -- "$rounds" <<'END'
            . ./ways
            for round in $(seq "$1"); do
                for way in loopctl udisksctl gio; do
                    measure "$way"
                done
            done
END
        for _ in $(seq "$rounds"); do
            measure_root
        done
    } >"times"
    systemctl stop udisks2.service
    for way in loopctl udisksctl gio mount-o-loop; do
        report_way "$way" times
    done
    # The close of `mount -o loop` does not wait.
    eventually is_nothing_left
}
