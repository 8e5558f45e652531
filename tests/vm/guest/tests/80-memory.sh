# Memory compared with UDisks2 on the same machine.
# shellcheck shell=bash

# memory PID: RSS and PSS in KiB.
memory() {
    awk '/^Rss:/{rss = $2} /^Pss:/{pss = $2} END{print rss, pss}' "/proc/$1/smaps_rollup"
}

test_the_idle_daemon_is_smaller_than_its_peer() {
    systemctl restart loopd.service
    busctl call org.freedesktop.UDisks2 /org/freedesktop/UDisks2 org.freedesktop.DBus.Peer Ping
    loopctl list
    local ours peers
    ours=$(memory "$(daemon_pid)")
    peers=$(memory "$(systemctl show -P MainPID udisks2.service)")
    systemctl stop udisks2.service
    note "RSS and PSS in KiB: loopd $ours, udisksd $peers"
    ((${ours#* } < ${peers#* }))
}
