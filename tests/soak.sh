#!/bin/bash
# Runs the long tests at full length and notes each result in tests/results/soak.md. A part that has passed on
# this commit is not run again, so that a run which was cut short goes on where it was.
# usage: soak.sh [PART…]    as root; without PART all of them
set -euo pipefail
cd "$(dirname "$0")/.."

readonly results=tests/results/soak.md
# A part: the test, its rounds, and seconds after which it counts as hung.
readonly -A rounds=(
    [restart::killed_at_any_moment]=300
    [clients::killed_at_any_moment]=1000
    [soak::fifty_clients_beside_losetup]=20000
    [soak::many_attaches_and_detaches]=100000
)
readonly order=(
    restart::killed_at_any_moment
    clients::killed_at_any_moment
    soak::fifty_clients_beside_losetup
    soak::many_attaches_and_detaches
)
readonly limit=3600

commit=$(git rev-parse --short HEAD)
[[ -z $(git status --porcelain --untracked-files=no -- . ":!$results") ]] || commit+=+
log=$(mktemp)
trap 'rm -f "$log"' EXIT

parts=("$@")
((${#parts[@]})) || parts=("${order[@]}")
for part in "${parts[@]}"; do
    [[ ${rounds[$part]:-} ]] || { echo "soak: no part is called $part; there are: ${order[*]}" >&2; exit 2; }
    if [[ $commit != *+ ]] && grep -qsF "| $commit | $part | ${rounds[$part]} | passed |" "$results"; then
        echo "soak: $part has passed on $commit"
        continue
    fi
    echo "soak: $part, ${rounds[$part]} rounds"
    start=$SECONDS
    outcome=passed
    LOOPD_TEST_LIMIT=$limit LOOPD_TEST_ROUNDS=${rounds[$part]} LOOPD_LOG=info \
        cargo test -p loopd-tests --test host -- --exact "$part" >"$log" 2>&1 || outcome=failed
    # What the test itself prints: its seed and what it has counted.
    said=$(grep -E '^test .*LOOPD_TEST_SEED=|resident KiB|calls of' "$log" | sed 's/.*LOOPD_TEST_SEED/LOOPD_TEST_SEED/' |
        paste -sd ';' | tr -d '|')
    grep -q '^test result: ok. 1 passed' "$log" || outcome=failed
    printf '| %s | %s | %s | %s | %s | %s s | %s |\n' \
        "$(date +%F)" "$commit" "$part" "${rounds[$part]}" "$outcome" $((SECONDS - start)) "$said" >>"$results"
    tail -n 1 "$results"
    if [[ $outcome == failed ]]; then
        tail -n 100 "$log" >&2
        exit 1
    fi
done
