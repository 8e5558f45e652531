# Encrypted images with loopctl, as a user who has nothing else.
# shellcheck shell=bash disable=SC2154,SC2164 # of lib.sh; what fails ends the test
# shellcheck source=tests/vm/guest/lib/unlock.sh
source ./lib/unlock.sh

# passphrase_file PATH: makes a file of alice with a new passphrase; prints the passphrase.
passphrase_file() {
    local passphrase
    passphrase=$(head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \n')
    printf '%s\n' "$passphrase" >"$1"
    chown alice: "$1"
    chmod 600 "$1"
    echo "$passphrase"
}

# make_file_system DEVICE LABEL: one whose top directory is alice's.
make_file_system() {
    mkfs.ext4 -q -O ^has_journal -L "$2" -E "root_owner=$(id -u alice):$(id -g alice)" "$1"
}

# vault PATH: an encrypted image of alice with a file system. Its passphrase is in the file `key`, and its key costs little.
vault() {
    local device
    image "$1" 48M alice
    printf '%s' "$(<key)" >exact
    chown alice: exact
    cryptsetup luksFormat --batch-mode --type luks2 --pbkdf pbkdf2 --pbkdf-force-iterations 1000 --key-file exact "$1"
    device=$(losetup --find --show "$1")
    cryptsetup open --type luks --key-file exact "$device" filling
    make_file_system /dev/mapper/filling vault
    cryptsetup close filling
    losetup --detach "$device"
    eventually is_free "$device"
}

# encryption FILE: what loopctl's JSON has about the file's device.
encryption() {
    loopctl list --json | jq -c --arg file "$1" '.[] | select(.backing_file == $file) | .encrypted'
}

test_a_user_makes_opens_and_closes_an_encrypted_image() {
    loopctl list
    cd /home/alice
    local disk cleartext point shown
    passphrase_file key >/dev/null
    rm -f x.img
    active alice loopctl create x.img --size 64M --encrypt --passphrase-file key
    equal "the image" "$(stat -c '%U %s' x.img) $(blkid -p -o value -s TYPE x.img)" "alice $((64 << 20)) crypto_LUKS"
    disk=$(active alice loopctl attach x.img)
    equal "locked" "$(encryption /home/alice/x.img)" '{"type":"luks","version":"2","cleartext":null}'
    cleartext=$(active alice loopctl unlock x.img --passphrase-file key)
    is_mapped "$(mapping_of "$disk")"
    make_file_system "$cleartext" vault
    active alice loopctl lock x.img
    no_mappings
    attached "$disk"
    active alice loopctl detach x.img
    expect_all_locked
    # One command opens it, and one closes it.
    point=$(active alice loopctl mount x.img --passphrase-file key)
    equal "the mount point" "$point" /run/media/alice/vault
    active alice bash -c "echo data >'$point/file'"
    cleartext=$(encryption /home/alice/x.img | jq -r .cleartext.device)
    shown=$(encryption /home/alice/x.img | jq -c '.cleartext | [.filesystem.type, .filesystem.label, .mount_points]')
    equal "the cleartext in JSON" "$shown" '["ext4","vault",["/run/media/alice/vault"]]'
    shown=$(loopctl list)
    contains "$shown" "$cleartext .*vault"
    contains "$(loopctl info x.img)" "$cleartext" "$point"
    active alice loopctl unmount x.img
    expect_all_locked
    point=$(active alice loopctl mount x.img --passphrase-file key)
    equal "what was written" "$(active alice cat "$point/file")" data
    active alice loopctl unmount x.img
    expect_all_locked
}

test_a_wrong_passphrase_leaves_nothing_of_a_mount() {
    loopctl list
    cd /home/alice
    local disk shown
    passphrase_file key >/dev/null
    passphrase_file other >/dev/null
    vault x.img
    shown=$(refused 1 active alice loopctl mount x.img --passphrase-file other)
    # The trace of the shell is in it, too.
    contains "$shown" '^loopctl: .*the secret does not unlock /dev/loop'
    note "$(grep '^loopctl: ' <<<"$shown")"
    expect_all_locked
    disk=$(active alice loopctl attach x.img)
    refused 1 active alice loopctl unlock "$disk" --passphrase-file other
    eventually no_unlock_units
    no_mappings
    attached "$disk"
    active alice loopctl detach "$disk"
    expect_all_locked
}

test_a_person_types_the_passphrase() {
    loopctl list
    cd /home/alice
    local passphrase
    passphrase=$(passphrase_file key)
    vault x.img
    active alice "$ask" "$passphrase" loopctl mount x.img
    mountpoint /run/media/alice/vault
    active alice loopctl unmount x.img
    expect_all_locked
}

# has_in_memory PID TEXT: the process has the text in memory that it can write to.
has_in_memory() {
    perl -e '
        my ($pid, $text) = @ARGV;
        open(my $maps, "<", "/proc/$pid/maps") or die "$!";
        open(my $memory, "<:raw", "/proc/$pid/mem") or die "$!";
        my $is_in = 0;
        while (<$maps>) {
            /^([0-9a-f]+)-([0-9a-f]+) rw/ or next;
            my ($start, $end) = (hex $1, hex $2);
            sysseek($memory, $start, 0);
            my ($bytes, $part) = ("");
            while (length $bytes < $end - $start) {
                sysread($memory, $part, $end - $start - length $bytes) or last;
                $bytes .= $part;
            }
            $is_in = 1 if index($bytes, $text) >= 0;
        }
        exit($is_in ? 0 : 1);
    ' "$1" "$2"
}

main_pid() {
    systemctl show -P MainPID "$1.service"
}

# is_captured FILE: it has messages of the bus.
is_captured() {
    loopctl list
    [[ -s $1 ]]
}

test_the_passphrase_is_nowhere() {
    loopctl list
    cd /home/alice
    local passphrase monitor process capture=/tmp/bus.pcap
    passphrase=$(passphrase_file key)
    vault x.img
    busctl capture >$capture &
    monitor=$!
    eventually is_captured $capture
    active alice loopctl mount x.img --passphrase-file key
    # What is looked through contains what it should.
    has_in_memory "$(daemon_pid)" /home/alice/x.img
    for process in "$(daemon_pid)" 1 "$(main_pid dbus)" "$(main_pid systemd-udevd)"; do
        ! has_in_memory "$process" "$passphrase" || fail "$(cat "/proc/$process/comm") has the passphrase"
    done
    active alice loopctl unmount x.img
    expect_all_locked
    ! has_in_memory "$(daemon_pid)" "$passphrase" || fail "loopd has the passphrase"
    kill $monitor
    wait || true
    journalctl --sync
    grep -qaF org.loopd1.Encrypted $capture
    ! grep -qaF "$passphrase" $capture || fail "the bus has the passphrase"
    journalctl --all -o export >journal
    grep -qaF /home/alice/x.img journal
    ! grep -qaF "$passphrase" journal || fail "the journal has the passphrase"
    ! grep -rqaF "$passphrase" /run/loopd /run/systemd /run/udev || fail "a file in /run has the passphrase"
    rm $capture journal
}

# truecrypt DEVICE: makes a TrueCrypt volume with the passphrase `right`.
truecrypt() {
    cat >truecrypt.exp <<'END'
set timeout 200
spawn -noecho tcplay -c -d [lindex $argv 0] -z -w -a whirlpool -b AES-256-XTS
expect {
    -re {assphrase: *$} { after 500; send "right\r"; exp_continue }
    -re {\(y/n\) *$} { send "y\r"; exp_continue }
    eof {}
    timeout { exit 97 }
}
exit [lindex [wait] 3]
END
    modprobe -a algif_skcipher algif_hash
    expect truecrypt.exp "$1"
}

test_a_truecrypt_volume_is_mounted() {
    command -v tcplay >/dev/null || skip "there is no tcplay"
    loopctl list
    cd /home/alice
    local disk point
    image t.img 16M alice
    printf 'right\n' >key
    chown alice: key
    disk=$(loopctl attach t.img)
    truecrypt "$disk"
    loopctl detach "$disk"
    disk=$(active alice loopctl attach t.img)
    make_file_system "$(active alice loopctl unlock t.img --type truecrypt --passphrase-file key)" old
    active alice loopctl lock t.img
    active alice loopctl detach t.img
    expect_all_locked
    point=$(active alice loopctl mount t.img --encryption-type truecrypt --passphrase-file key)
    active alice bash -c "echo data >'$point/file'"
    # The type is not compared: loopd shows "veracrypt", since the device mapper does not tell the two apart.
    contains "$(encryption /home/alice/t.img)" '"label":"old"'
    active alice loopctl unmount t.img
    expect_all_locked
}

# encrypted_ways: shell functions of alice that open and close x.img, and print the microseconds of both.
encrypted_ways() {
    cat <<'END'
open_loopctl() {
    loopctl mount x.img --key-file exact
}
close_loopctl() {
    loopctl unmount x.img
}
# UDisks2 may not know a device yet when udisksctl returns; a script has to retry.
retry() {
    for try in $(seq 100); do
        "$@" 2>/dev/null && return
    done
    return 1
}
open_udisksctl() {
    udisksctl loop-setup --no-user-interaction -f x.img | sed -n 's/.* as \(.*\)\.$/\1/p' >device
    retry udisksctl unlock --no-user-interaction -b "$(cat device)" --key-file exact | sed -n 's/.* as \(.*\)\.$/\1/p' >cleartext
    retry udisksctl mount --no-user-interaction -b "$(cat cleartext)" >printed
    sed -n 's/.* at \([^ ]*[^. ]\)\.*$/\1/p' printed
}
close_udisksctl() {
    udisksctl unmount --no-user-interaction -b "$(cat cleartext)" >printed
    udisksctl lock --no-user-interaction -b "$(cat device)" >printed
    udisksctl loop-delete --no-user-interaction -b "$(cat device)"
    while [ -e "/sys/block/$(basename "$(cat device)")/loop" ]; do sleep 0.01; done
}
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

# The key costs little, so that the figures are about the programs.
test_opening_an_encrypted_image_beside_udisks2() {
    compgen -G '/usr/lib/*/libbd_crypto.so.*' >/dev/null || skip "UDisks2 has no library for encrypted volumes"
    loopctl list
    cd /home/alice
    local line
    passphrase_file key >/dev/null
    vault x.img
    encrypted_ways >ways
    systemctl start udisks2.service
    active alice bash -euo pipefail <<'END' >/tmp/times
        . ./ways
        for round in 1 2 3; do
            measure loopctl
            measure udisksctl
        done
END
    systemctl stop udisks2.service
    while read -r line; do
        note "way, microseconds of opening and closing: $line"
    done </tmp/times
    expect_all_locked
}
