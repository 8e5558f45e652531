# Images of alice with a file system, and what opening them may leave.
# shellcheck shell=bash disable=SC2154 # of lib.sh

# tree DIRECTORY: creates files and their checksums.
tree() {
    rm -rf "$1"
    mkdir -p "$1/sub"
    head -c 300000 /dev/urandom >"$1/large"
    echo small >"$1/sub/small"
    (cd "$1" && sha256sum large sub/small >SUMS)
}

# iso_image PATH LABEL: creates an ISO image that alice owns.
iso_image() {
    tree content
    xorriso -as mkisofs -quiet -J -R -V "$2" -o "$1" content
    chown alice: "$1"
}

# nothing_is_left: no mount, unit, directory or device.
nothing_is_left() {
    local left
    left=$(findmnt --noheadings --raw -o TARGET | grep '^/run/media/' || true)
    equal "mounts" "$left" ""
    left=$(systemctl list-units --all --plain --no-legend 'run-media-*' | cut -d ' ' -f 1)
    equal "units" "$left" ""
    left=$(find /run/media -mindepth 2 2>/dev/null || true)
    equal "directories" "$left" ""
    equal "devices" "$(losetup -n -O NAME)" ""
}

is_nothing_left() {
    (nothing_is_left) 2>/dev/null
}
