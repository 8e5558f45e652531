# The bus goes, and comes back: late, since much of the machine goes with it.
# shellcheck shell=bash

test_persistent_attachments_survive_a_restart_of_the_bus() {
    survives systemctl restart dbus.service
}
