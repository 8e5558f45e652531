# The package is installed, and the bus starts the daemon, in its sandbox.
# shellcheck shell=bash

test_the_package_installs() {
    dpkg -i loopd-1.deb
    # Every file is there as it was packed.
    equal "dpkg --verify" "$(dpkg --verify loopd)" ""
    equal "state" "$(systemctl is-active loopd.service || true)" inactive
    equal "client" "$(loopctl --version)" "loopctl $(dpkg-query -W -f '${Version}' loopd | sed 's/-.*//')"
}

test_the_bus_starts_the_daemon() {
    systemctl stop loopd.service
    equal "devices" "$(loopctl list --no-legend)" ""
    equal "state" "$(systemctl is-active loopd.service)" active
    equal "type" "$(systemctl show -P Type loopd.service)" notify
}

test_the_daemon_has_no_capability() {
    loopctl list
    local status
    status=$(cat "/proc/$(daemon_pid)/status")
    contains "$status" $'^CapEff:\t0+$' $'^CapPrm:\t0+$' $'^CapBnd:\t0+$' $'^CapAmb:\t0+$' \
        $'^NoNewPrivs:\t1$' $'^Seccomp:\t2$'
}

test_the_sandbox_scores_at_most_1_5() {
    loopctl list
    local output
    output=$(systemd-analyze security --no-pager --threshold=15 loopd.service)
    note "$(tail -n 1 <<<"$output")"
}
