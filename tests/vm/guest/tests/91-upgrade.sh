# An upgrade under living clients.
# shellcheck shell=bash disable=SC2154 # of lib.sh
# shellcheck source=tests/vm/guest/tests/65-restart.sh
source ./tests/65-restart.sh

test_everything_survives_an_upgrade() {
    all_survive dpkg -i loopd-2.deb
}
