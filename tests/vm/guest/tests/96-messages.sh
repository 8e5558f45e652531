# Malformed messages over dbus-broker, which forwards header fields that dbus-daemon drops.
# shellcheck shell=bash disable=SC2154 # of lib.sh

readonly broker=/run/test-broker

broker_configuration() {
    cat <<'XML'
<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN"
 "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>system</type>
  <policy context="default">
    <allow user="*"/>
    <deny own="*"/>
    <deny send_type="method_call"/>
    <allow send_type="signal"/>
    <allow send_requested_reply="true" send_type="method_return"/>
    <allow send_requested_reply="true" send_type="error"/>
    <allow receive_type="method_call"/>
    <allow receive_type="method_return"/>
    <allow receive_type="error"/>
    <allow receive_type="signal"/>
    <allow send_destination="org.freedesktop.DBus" send_interface="org.freedesktop.DBus"/>
  </policy>
  <include>/usr/share/dbus-1/system.d/org.loopd1.conf</include>
</busconfig>
XML
}

# A second bus, with the policy as shipped. It starts with its first client.
start_broker() {
    broker_configuration >"$broker.conf"
    systemd-run --quiet --collect --unit=test-broker --socket-property=ListenStream="$broker" \
        --setenv=DBUS_SYSTEM_BUS_ADDRESS="unix:path=$broker" \
        dbus-broker-launch --scope system --config-file "$broker.conf"
}

# The shipped unit, on that bus.
start_loopd_there() {
    mkdir -p /run/systemd/system/loopd.service.d
    printf '[Service]\nEnvironment=DBUS_SYSTEM_BUS_ADDRESS=unix:path=%s LOOPD_LOG=warn\n' "$broker" \
        >/run/systemd/system/loopd.service.d/test-broker.conf
    systemctl daemon-reload
    systemctl restart loopd.service
}

leave_broker() {
    rm -rf /run/systemd/system/loopd.service.d/test-broker.conf "$broker.conf"
    systemctl daemon-reload
    systemctl stop loopd.service test-broker.socket test-broker.service
}

test_messages_over_dbus_broker() {
    trap leave_broker EXIT
    start_broker
    start_loopd_there
    local pid output
    pid=$(daemon_pid)
    export DBUS_SYSTEM_BUS_ADDRESS=unix:path=$broker
    output=$("$probe" attack "$pid" 5000 "$((SRANDOM))")
    note "${output//$'\n'/; }"
    # Otherwise the test does not cover unknown fields.
    contains "$output" 'passes_unknown_fields: true' 'bounds_descriptors: true'
    equal "daemon" "$(daemon_pid)" "$pid"
    image /home/alice/disk.img 1M
    loopctl detach "$(loopctl attach /home/alice/disk.img)"
    systemctl stop loopd.service
    equal "result" "$(systemctl show -P Result loopd.service)" success
}
