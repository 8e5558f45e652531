# What survives which death.
# shellcheck shell=bash disable=SC2154 # of lib.sh

# The session of the unit.
session_of() {
    sed 's,.*/session-\(.*\)\.scope$,\1,' "/proc/$(systemctl show -P MainPID "$1")/cgroup"
}

# end_login SIGNAL: to every process of alice's login.
end_login() {
    loginctl kill-session --signal="$1" "$(session_of login.service)"
}

test_a_killed_client_takes_its_device_along() {
    image /home/alice/disk.img 1M alice
    login loopctl run disk.img -- sleep 600
    local device
    device=$(device_of /home/alice/disk.img)
    equal "lifetime" "$(loopctl info --json "$device" | jq -r .lifetime)" client
    end_login KILL
    eventually is_free "$device"
}

test_a_logout_takes_the_devices_of_the_session_along() {
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

test_a_killed_client_leaves_what_is_mounted() {
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

test_persistent_attachments_survive_a_kill_of_the_daemon() {
    survives kill_daemon
}

test_a_stopped_daemon_ends_well() {
    image /home/alice/disk.img 1M alice
    image /home/alice/other.img 1M alice
    active alice loopctl attach disk.img
    login loopctl run other.img -- sleep 600
    local client
    client=$(device_of /home/alice/other.img)
    systemctl stop loopd.service
    equal "result" "$(systemctl show -P Result loopd.service)" success
    equal "status" "$(systemctl show -P ExecMainStatus loopd.service)" 0
    # Nobody restarts it: what hangs on it ends; what was to stay stays.
    eventually is_free "$client"
    attached "$(losetup -n -O NAME -j /home/alice/disk.img)"
    end_login KILL
    loopctl detach /home/alice/disk.img
}

# slow_attach: alice's call waits for udev, which is told to do nothing. Says where its answer will be.
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
    # What the call had made is undone; left_nothing looks.
}
