# The kernel after all other tests.
# shellcheck shell=bash

test_the_kernel_is_not_tainted() {
    local taint
    taint=$(cat /proc/sys/kernel/tainted)
    if ((taint)); then
        dmesg | grep -E -B 2 -A 40 'BUG:|Oops|WARNING:|general protection' || true
        fail "the kernel is tainted ($taint)"
    fi
}
