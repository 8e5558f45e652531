#!/bin/bash
# Judges the results of a run (TAP), and writes a log file for each failed test.
# usage: judge.sh DIRECTORY STATUS-OF-QEMU
set -euo pipefail
cd "${1:?usage: judge.sh DIRECTORY STATUS}"
touch console
status=${2:?usage: judge.sh DIRECTORY STATUS}

verdict=0
fail() {
    echo "vm: $*" >&2
    verdict=1
}

# After `not ok N - NAME` come its output (`#trace `, and `# ` at the end) and its journal (`#journal `).
awk '/^not ok /{file = $5 ".log"; print > file; next}
     /^ok |^1\.\./{file = ""}
     file && /^#/{sub(/^#(trace|journal)? /, ""); print > file}' results

planned=$(sed -n 's/^1\.\.//p' results)
passed=$(grep -c '^ok ' results || true)
skipped=$(grep -c '^ok .*# SKIP' results || true)
failed=$(grep -c '^not ok ' results || true)

[[ -s qemu ]] && sed 's/^/vm: qemu: /' qemu >&2
((status != 124)) || fail "the machine hung and was switched off"
((status == 0)) || fail "the machine did not end by itself (qemu's status $status)"
if grep -qE 'Kernel panic|Attempted to kill init' console; then
    fail "the guest's kernel panicked"
fi
if grep -q 'Failed unmounting' console; then
    fail "the power went off under a mounted file system"
fi
# Seconds; less than systemd's time-out for a unit that does not stop.
readonly power_off_limit=60
asked=$(sed -n 's/^# off with .* at //p' results)
off=$(sed -n 's/.*\[ *\([0-9.]*\)\] reboot: Power down.*/\1/p' console)
if [[ ! $asked || ! $off ]]; then
    fail "the machine did not power off with a mounted attachment"
elif awk "BEGIN {exit !($off - $asked > $power_off_limit)}"; then
    fail "powering off with a mounted attachment took from $asked s to $off s"
fi
if [[ ! $planned ]]; then
    fail "no plan: the tests did not start"
elif ((passed + failed != planned)); then
    fail "$((planned - passed - failed)) of $planned results are missing"
fi
((failed == 0)) || fail "$failed failed: $(sed -n 's/^not ok [0-9]* - \([^ ]*\).*/\1/p' results | tr '\n' ' ')"
if ((verdict)); then
    tail -n 15 console | sed 's/^/vm: console: /' >&2
    echo "vm: see $PWD: results, console, and a .log for each test that failed" >&2
else
    echo "vm: $((passed - skipped)) passed, $skipped skipped"
fi
exit "$verdict"
