# A restart of the bus. Among the last tests, since it affects many services.
# shellcheck shell=bash

restart_bus() {
    image /home/alice/client.img 1M alice
    login loopctl run client.img -- sleep 600
    local client
    client=$(device_of /home/alice/client.img)
    systemctl restart dbus.service
    # Some of Debian's services do not survive it.
    systemctl restart systemd-logind.service polkit.service
    # Its client was disconnected, so it has ended.
    eventually is_free "$client"
    # If loopctl is still running.
    systemctl stop login.service || true
}

test_what_survives_a_restart_of_the_bus() {
    survives restart_bus
}
