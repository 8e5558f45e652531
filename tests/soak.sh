#!/bin/bash
# Runs the long tests at full length and records each result in tests/results: soak.md, and messages.md for the
# random messages. A part that has passed often enough on this commit is not run again, so an interrupted run can be
# continued.
# usage: soak.sh [PART…]    as root; without PART all of them
set -euo pipefail
cd "$(dirname "$0")/.."

# A part: the test, its rounds, how often it runs with another seed each time (once), and its results where they
# have a file of their own. After so many seconds it counts as hung.
readonly -A rounds=(
    [restart::daemon_killed_at_any_moment_keeps_its_replies]=300
    [clients::client_killed_at_any_moment_leaves_nothing]=1000
    [soak::fifty_clients_beside_losetup]=20000
    [soak::memory_stays_level_over_many_rounds]=100000
    [messages::random_messages_do_not_harm_loopd]=500000
)
readonly -A times=([messages::random_messages_do_not_harm_loopd]=20)
readonly -A file_of=([messages::random_messages_do_not_harm_loopd]=messages)
readonly order=(
    restart::daemon_killed_at_any_moment_keeps_its_replies
    clients::client_killed_at_any_moment_leaves_nothing
    soak::fifty_clients_beside_losetup
    soak::memory_stays_level_over_many_rounds
    messages::random_messages_do_not_harm_loopd
)
readonly limit=3600

commit=$(git rev-parse --short HEAD)
[[ -z $(git status --porcelain --untracked-files=no -- . ":!tests/results") ]] || commit+=+
log=$(mktemp)
trap 'rm -f "$log"' EXIT

# passed PART RESULTS: how often it has on this commit.
passed() {
    [[ $commit == *+ ]] && echo 0 && return
    grep -csF "| $commit | $1 | ${rounds[$1]} | passed |" "$2" || true
}

# run PART RESULTS
run() {
    local part=$1 results=$2 start=$SECONDS outcome=passed figures
    LOOPD_TEST_LIMIT=$limit LOOPD_TEST_ROUNDS=${rounds[$part]} LOOPD_LOG=info \
        cargo test -p loopd-tests --test host -- --exact "$part" >"$log" 2>&1 || outcome=failed
    # The seed and the figures that the test prints.
    figures=$(grep -E '^test .*LOOPD_TEST_SEED=|resident KiB|calls of' "$log" | sed 's/.*LOOPD_TEST_SEED/LOOPD_TEST_SEED/' |
        paste -sd ';' | tr -d '|')
    grep -q '^test result: ok. 1 passed' "$log" || outcome=failed
    printf '| %s | %s | %s | %s | %s | %s s | %s |\n' \
        "$(date +%F)" "$commit" "$part" "${rounds[$part]}" "$outcome" $((SECONDS - start)) "$figures" >>"$results"
    tail -n 1 "$results"
    if [[ $outcome == failed ]]; then
        tail -n 100 "$log" >&2
        return 1
    fi
}

parts=("$@")
((${#parts[@]})) || parts=("${order[@]}")
for part in "${parts[@]}"; do
    [[ ${rounds[$part]:-} ]] || { echo "soak: no part is called $part; there are: ${order[*]}" >&2; exit 2; }
    results=tests/results/${file_of[$part]:-soak}.md
    for ((done = $(passed "$part" "$results"); done < ${times[$part]:-1}; done++)); do
        echo "soak: $part, ${rounds[$part]} rounds, $((done + 1)) of ${times[$part]:-1}"
        run "$part" "$results"
    done
    echo "soak: $part has passed on $commit"
done
