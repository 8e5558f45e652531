# Which attachments survive the death of clients and of the daemon.
# shellcheck shell=bash disable=SC2154 # of lib.sh

test_a_killed_client_loses_its_device() {
    image /home/alice/disk.img 1M alice
    login loopctl run disk.img -- sleep 600
    local device
    device=$(device_of /home/alice/disk.img)
    equal "lifetime" "$(loopctl info --json "$device" | jq -r .lifetime)" client
    end_login KILL
    eventually is_free "$device"
}

test_a_logout_detaches_the_devices_of_the_session() {
    image /home/alice/disk.img 1M alice
    login loopctl run disk.img -- sleep 600
    local device
    device=$(device_of /home/alice/disk.img)
    loginctl terminate-session "$(session_of login.service)"
    eventually is_free "$device"
}

is_detaching() {
    loopctl list --json | jq -e '.[] | select(.state == "detaching")'
}

test_a_mounted_device_outlives_its_killed_client() {
    ext4_image /home/alice/disk.img used alice
    login loopctl run disk.img -- sleep 600
    local device
    device=$(device_of /home/alice/disk.img)
    mount "$device" /mnt
    end_login KILL
    eventually is_detaching
    echo kept >/mnt/file
    sync /mnt/file
    umount /mnt
    eventually is_free "$device"
}

test_persistent_attachments_survive_a_restart() {
    survives systemctl restart loopd.service
}

test_persistent_attachments_survive_a_kill_of_the_daemon() {
    survives kill_daemon
}

test_a_stopped_daemon_exits_cleanly() {
    image /home/alice/disk.img 1M alice
    image /home/alice/other.img 1M alice
    active alice loopctl attach disk.img
    login loopctl run other.img -- sleep 600
    local client
    client=$(device_of /home/alice/other.img)
    systemctl stop loopd.service
    equal "result" "$(systemctl show -P Result loopd.service)" success
    equal "status" "$(systemctl show -P ExecMainStatus loopd.service)" 0
    # It is not restarted: attachments of clients end, persistent ones stay.
    eventually is_free "$client"
    attached "$(losetup -n -O NAME -j /home/alice/disk.img)"
    end_login KILL
    loopctl detach /home/alice/disk.img
}

# slow_attach: a call of alice that waits for the stopped udev queue; the reply goes to the file `answer`.
slow_attach() {
    image /home/alice/slow.img 1M alice
    loopctl list >&2
    udevadm control --stop-exec-queue
    active alice "$probe" setup regular /home/alice/slow.img lifetime=s:persistent >answer &
    eventually has_device /home/alice/slow.img
}

is_stopping() {
    [[ $(systemctl show -P ActiveState loopd.service) == deactivating ]]
}

test_sigterm_lets_a_call_end() {
    slow_attach
    systemctl stop --no-block loopd.service
    eventually is_stopping
    udevadm control --start-exec-queue
    wait
    contains "$(cat answer)" '"device":"/dev/loop'
    eventually is_inactive
    equal "result" "$(systemctl show -P Result loopd.service)" success
    losetup --detach "$(losetup -n -O NAME -j /home/alice/slow.img)"
}

test_a_second_sigterm_ends_at_once_and_leaves_nothing() {
    slow_attach
    systemctl kill --kill-whom=main --signal=TERM loopd.service
    systemctl kill --kill-whom=main --signal=TERM loopd.service
    wait
    udevadm control --start-exec-queue
    [[ $(cat answer) != ok* ]]
    # The attach is undone, which the runner checks.
}
