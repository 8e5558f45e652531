# Restarts of the daemon, and exit on idle.
# shellcheck shell=bash disable=SC2154 # of lib.sh
# shellcheck source=tests/vm/guest/lib/restart.sh
source ./lib/restart.sh

# configure TEXT: until the end of the test.
configure() {
    trap 'rm -rf /etc/loopd /run/systemd/system/loopd.service.d; systemctl daemon-reload; systemctl stop loopd.service' EXIT
    mkdir -p /etc/loopd
    echo "$1" >/etc/loopd/loopd.toml
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
    # A daemon that answers is not restarted.
    local pid
    loopctl list
    pid=$(daemon_pid)
    # Longer than the watchdog waits.
    sleep 5
    equal "pid" "$(daemon_pid)" "$pid"
}

test_a_stop_ends_client_attachments_and_owners_are_restored() {
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

test_the_daemon_runs_only_when_needed() {
    configure $'[times]\nidle-exit = 0.5'
    systemctl restart loopd.service
    eventually is_inactive
    equal "result" "$(systemctl show -P Result loopd.service)" success
    loopctl list
    image /home/alice/disk.img 1M alice
    local device
    device=$(loopctl attach /home/alice/disk.img)
    # Longer than it stays without an attachment.
    sleep 3
    systemctl -q is-active loopd.service
    loopctl detach "$device"
    eventually is_inactive
}

# A hundred calls at a time, around the exit of the daemon.
test_no_call_during_the_exit_is_lost() {
    configure $'[times]\nidle-exit = 0.3'
    systemctl restart loopd.service
    local starts answer
    starts=$(starts)
    answer=$("$probe" storm 10 100 280 420)
    starts=$(($(starts) - starts))
    note "1000 calls, $starts starts"
    equal "calls lost" "$(message "$answer")" 0
    ((starts > 3)) || fail "the daemon exited too rarely"
}

starts() {
    journalctl --no-pager -u loopd.service --grep '^ready' | wc -l
}

test_a_broken_configuration_is_refused_and_the_old_one_stays() {
    configure $'[limits]\nattachments = 1'
    image /home/alice/disk.img 1M alice
    image /home/alice/other.img 1M alice
    systemctl restart loopd.service
    local device output
    device=$(active alice loopctl attach disk.img)
    output=$(refused 1 active alice loopctl attach other.img)
    contains "$output" 'uid 1000 has 1 attachments already, and may have 1'
    configure $'[limits]\nattachments = 2\ncals = 1'
    refused 1 systemctl reload loopd.service
    contains "$(journalctl --no-pager -u loopd.service -n 20)" '/etc/loopd/loopd.toml:3:1: unknown field .cals.'
    refused 1 active alice loopctl attach other.img
    configure $'[limits]\nattachments = 2'
    systemctl reload loopd.service
    active alice bash -eux <<<'loopctl attach other.img; loopctl detach other.img'
    loopctl detach "$device"
}
