# What the next daemon makes of what the last one has left, and when there is none.
# shellcheck shell=bash disable=SC2154 # of lib.sh
# shellcheck source=tests/vm/guest/tests/60-deaths.sh
source ./tests/60-deaths.sh

# configure TEXT: until the end of the test.
configure() {
    trap 'rm -rf /etc/loopd /run/systemd/system/loopd.service.d; systemctl daemon-reload; systemctl stop loopd.service' EXIT
    mkdir -p /etc/loopd
    echo "$1" >/etc/loopd/loopd.toml
}

# What a restart must not change.
what_is_said() {
    loopctl list --json | jq -c '.[] | [.device, .disk_sequence, .lifetime, .owner, .state, .managed]'
    busctl tree --list org.loopd1
}

# A client's device and a mounted one of the same client outlive the daemon's death; what another
# client held, who died meanwhile, does not.
all_survive() {
    image /home/alice/disk.img 1M alice
    ext4_image /home/alice/used.img used alice
    image /home/alice/stay.img 1M alice
    local device used stay before
    stay=$(active alice loopctl attach stay.img)
    login bash -c 'loopctl run disk.img -- loopctl run used.img -- sleep 600'
    device=$(device_of /home/alice/disk.img)
    used=$(device_of /home/alice/used.img)
    mount "$used" /mnt
    before=$(what_is_said)
    contains "$before" "^.\"$device\",[0-9]+,\"client\",1000,\"attached\",true" \
        "^.\"$used\",[0-9]+,\"client\",1000,\"attached\",true" \
        "^.\"$stay\",[0-9]+,\"persistent\",1000,\"attached\",true" \
        "^/org/loopd1/attachment/$(cat "/sys/block/${device#/dev/}/diskseq")$"
    "$@"
    eventually systemctl -q is-active loopd.service
    equal "after it" "$(what_is_said)" "$before"
    end_login KILL
    eventually is_free "$device"
    active alice loopctl detach "$stay"
    echo kept >/mnt/file
    umount /mnt
    eventually is_free "$used"
    equal "descriptors kept" "$(systemctl show -P NFileDescriptorStore loopd.service)" 0
    equal "files left" "$(ls /run/loopd/attachments)" ""
}

test_everything_survives_a_restart() {
    all_survive systemctl restart loopd.service
}

test_everything_survives_a_kill() {
    all_survive kill_daemon
}

freeze() {
    local pid
    pid=$(daemon_pid)
    kill -STOP "$pid"
    eventually is_another "$pid"
}

test_everything_survives_a_daemon_that_hangs() {
    configure ''
    mkdir -p /run/systemd/system/loopd.service.d
    printf '[Service]\nWatchdogSec=2s\n' >/run/systemd/system/loopd.service.d/watchdog.conf
    systemctl daemon-reload
    systemctl restart loopd.service
    all_survive freeze
    # One that answers is left alone.
    local pid
    loopctl list
    pid=$(daemon_pid)
    sleep 5
    equal "pid" "$(daemon_pid)" "$pid"
}

test_a_stop_ends_what_clients_have_and_owners_come_back() {
    image /home/alice/disk.img 1M alice
    image /home/alice/stay.img 1M alice
    local device stay
    stay=$(active alice loopctl attach stay.img)
    login loopctl run disk.img -- sleep 600
    device=$(device_of /home/alice/disk.img)
    systemctl stop loopd.service
    eventually is_free "$device"
    end_login KILL
    equal "owner" "$(loopctl info --json "$stay" | jq .owner)" 1000
    active alice loopctl detach "$stay"
}

test_it_is_not_there_when_it_is_not_needed() {
    configure $'[times]\nidle-exit = 0.5'
    systemctl restart loopd.service
    eventually is_inactive
    equal "result" "$(systemctl show -P Result loopd.service)" success
    loopctl list
    image /home/alice/disk.img 1M alice
    local device
    device=$(loopctl attach /home/alice/disk.img)
    sleep 3
    systemctl -q is-active loopd.service
    loopctl detach "$device"
    eventually is_inactive
}

# A hundred at a time, about when the daemon ends.
test_no_call_around_its_end_is_lost() {
    configure $'[times]\nidle-exit = 0.3'
    systemctl restart loopd.service
    local starts answer
    starts=$(starts)
    answer=$("$probe" storm 10 100 280 420)
    starts=$(($(starts) - starts))
    note "1000 calls, $starts starts"
    equal "calls lost" "$(message "$answer")" 0
    ((starts > 3)) || fail "it was timed badly"
}

starts() {
    journalctl --no-pager -u loopd.service --grep '^ready' | wc -l
}

test_a_broken_configuration_is_refused_and_the_old_one_stays() {
    configure $'[limits]\nattachments = 1'
    image /home/alice/disk.img 1M alice
    image /home/alice/other.img 1M alice
    systemctl restart loopd.service
    local device said
    device=$(active alice loopctl attach disk.img)
    said=$(refused 1 active alice loopctl attach other.img)
    contains "$said" 'uid 1000 has 1 attachments already, and may have 1'
    configure $'[limits]\nattachments = 2\ncals = 1'
    refused 1 systemctl reload loopd.service
    contains "$(journalctl --no-pager -u loopd.service -n 20)" '/etc/loopd/loopd.toml:3:1: unknown field .cals.'
    refused 1 active alice loopctl attach other.img
    configure $'[limits]\nattachments = 2'
    systemctl reload loopd.service
    active alice bash -eux <<<'loopctl attach other.img; loopctl detach other.img'
    loopctl detach "$device"
}
