# The bus goes, and comes back: late, since much of the machine goes with it.
# shellcheck shell=bash

restart_bus() {
    image /home/alice/client.img 1M alice
    login loopctl run client.img -- sleep 600
    local client
    client=$(device_of /home/alice/client.img)
    systemctl restart dbus.service
    # Debian's own services are not all made for that.
    systemctl restart systemd-logind.service polkit.service
    # Its client was cut off, and is nobody's any more.
    eventually is_free "$client"
    # Where loopctl has not ended by itself.
    systemctl stop login.service || true
}

test_what_survives_a_restart_of_the_bus() {
    survives restart_bus
}
