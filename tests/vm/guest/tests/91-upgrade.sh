# An upgrade while clients are connected.
# shellcheck shell=bash disable=SC2154 # of lib.sh
# shellcheck source=tests/vm/guest/lib/restart.sh
source ./lib/restart.sh

test_everything_survives_an_upgrade() {
    all_survive dpkg -i loopd-2.deb
}

# The package as it was before its state files could have other keys.
test_everything_survives_an_upgrade_from_an_earlier_version() {
    [[ $(dpkg --print-architecture) == amd64 ]] || skip "the earlier package is for amd64"
    dpkg -i --force-downgrade packages/loopd_0.1.0_amd64.deb
    systemctl restart loopd.service
    all_survive dpkg -i loopd-2.deb
}
