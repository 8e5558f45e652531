# Common images with the partition scan of a distribution's kernel.
# shellcheck shell=bash

readonly MIB=$((1024 * 1024))

# two_partitions TABLE SECTOR: nodes, links and properties exist as soon as the attach returns.
two_partitions() {
    partitioned_image /home/alice/disk.img "$1" "$2" alice
    local output device
    output=$(active alice loopctl attach --read-only --json disk.img)
    device=$(jq -r .device <<<"$output")
    equal "partitions" "$(partitions <<<"$output")" \
        "1 $MIB $((4 * MIB)) $1 ext4 one"$'\n'"2 $((6 * MIB)) $((4 * MIB)) $1 vfat TWO"
    equal "block size" "$(jq .block_size <<<"$output")" "$2"
    [[ -b ${device}p1 && -b ${device}p2 ]] || fail "no nodes"
    equal "link" "$(realpath /dev/disk/by-label/TWO)" "${device}p2"
    # The kernel created them: the daemon cannot.
    equal "capabilities" "$(sed -n 's/^CapEff:\t//p' "/proc/$(daemon_pid)/status")" 0000000000000000
    loopctl detach "$device"
    [[ ! -e ${device}p1 ]] || fail "${device}p1 is still there"
}

test_a_gpt_image() {
    two_partitions gpt 512
}

test_a_dos_image() {
    two_partitions dos 512
}

test_a_gpt_image_with_sectors_of_4096() {
    two_partitions gpt 4096
}

test_a_hybrid_iso_image() {
    local output
    mkdir -p iso
    cp lib.sh iso/
    image efi.img 4M
    mkfs.vfat -n EFI efi.img >/dev/null
    xorriso -as mkisofs -quiet -R -V HYBRID -partition_offset 16 -append_partition 2 0xef efi.img -o /home/alice/hybrid.iso iso
    output=$(active alice loopctl attach --json hybrid.iso)
    equal "file system" "$(jq -r '.filesystem | "\(.type) \(.label)"' <<<"$output")" "iso9660 HYBRID"
    contains "$(partitions <<<"$output")" '^2 .* dos vfat EFI$' '^1 .* dos iso9660 HYBRID$'
    loopctl detach /home/alice/hybrid.iso
}

# The kernel makes a node of the entry, which starts at sector 0 and covers the disk.
test_a_fat_superfloppy_with_a_table_is_one_volume() {
    local options output device
    image /home/alice/floppy.img 16M
    mkfs.vfat --mbr=y -n FLOPPY /home/alice/floppy.img >/dev/null
    chown alice: /home/alice/floppy.img
    for options in --read-only ""; do
        # shellcheck disable=SC2086
        output=$(active alice loopctl attach $options --json floppy.img)
        device=$(jq -r .device <<<"$output")
        equal "partitions" "$(jq -c .partitions <<<"$output")" '[]'
        equal "file system" "$(jq -r '.filesystem | "\(.type) \(.label)"' <<<"$output")" "vfat FLOPPY"
        udevadm settle
        active alice loopctl rescan "$device"
        equal "partitions" "$(loopctl info --json "$device" | jq -c .partitions)" '[]'
        loopctl detach "$device"
        [[ ! -e ${device}p1 ]] || fail "${device}p1 is still there"
    done
}

# complete [OPTION]: the labels known when the attach returns, twelve times.
complete() {
    active alice bash -eu -o pipefail -s -- "$@" <<'END'
        for round in $(seq 12); do
            loopctl attach "$@" --json disk.img
            loopctl detach disk.img
        done | jq -c '[.partitions[].filesystem.label]'
END
}

# all_complete [OPTION]
all_complete() {
    partitioned_image /home/alice/disk.img gpt 512 alice
    local output
    output=$(complete "$@")
    note "$(grep -c '"one","TWO"' <<<"$output" || true) of 12 complete"
    equal "answers" "$(sort -u <<<"$output")" '["one","TWO"]'
}

test_a_read_only_attach_returns_with_known_file_systems() {
    all_complete --read-only
}

test_a_writable_attach_returns_with_known_file_systems() {
    all_complete
}

test_a_rescan_finds_that_a_partition_is_gone() {
    partitioned_image /home/alice/disk.img gpt 512 alice
    local device
    device=$(active alice loopctl attach disk.img)
    sfdisk --quiet --delete /home/alice/disk.img 2
    active alice loopctl rescan "$device"
    equal "partitions" "$(loopctl info --json "$device" | jq -c '[.partitions[].number]')" '[1]'
    loopctl detach "$device"
}

test_a_rescan_is_refused_while_a_partition_is_mounted() {
    partitioned_image /home/alice/disk.img gpt 512 alice
    local device output
    device=$(active alice loopctl attach disk.img)
    mount "${device}p2" /mnt
    sfdisk --quiet --delete /home/alice/disk.img 2
    output=$(refused 1 active alice loopctl rescan "$device")
    contains "$output" "mounted on /mnt"
    equal "partitions" "$(loopctl info --json "$device" | jq -c '[.partitions[].number]')" '[1,2]'
    umount /mnt
    loopctl detach "$device"
}
