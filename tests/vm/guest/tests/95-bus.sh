# The bus goes, and comes back: late, since much of the machine goes with it.
# shellcheck shell=bash

restart_bus() {
    systemctl restart dbus.service
    # Debian's own services are not all made for that.
    systemctl restart systemd-logind.service polkit.service
}

test_persistent_attachments_survive_a_restart_of_the_bus() {
    survives restart_bus
}
