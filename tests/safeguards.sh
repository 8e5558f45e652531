#!/bin/bash
# Removes the safeguards of the engine, one at a time; the simulation must find each removal within a minute. Records
# the results in tests/results/safeguards.md. A safeguard is a patch in tests/safeguards, named after what the engine
# does.
# usage: safeguards.sh [NAME…]    without NAME all of them
set -euo pipefail
cd "$(dirname "$0")/.."

readonly results=$PWD/tests/results/safeguards.md
# Seconds, without building.
readonly limit=60

commit=$(git rev-parse --short HEAD)
[[ -z $(git status --porcelain --untracked-files=no -- . ":!$results") ]] || commit+=+

# In a separate copy, so an interrupted run changes nothing here.
readonly copy=${CARGO_TARGET_DIR:-$PWD/target}/safeguards
rm -rf "$copy/tree"
mkdir -p "$copy/tree"
export CARGO_TARGET_DIR=$copy/target
git ls-files -z | tar --null --files-from=- --create | tar --extract --directory="$copy/tree"
patches=$PWD/tests/safeguards
cd "$copy/tree"
log=$copy/log

# found: prints the test that has failed first; fails if none does in time.
found() {
    local binary=$1 runner test=
    timeout --kill-after=1 "$limit" "$binary" random_actions every_pair any_step >"$log" 2>&1 &
    runner=$!
    while kill -0 "$runner" 2>/dev/null; do
        test=$(grep -m1 -oP '^test \K\S+(?= .*FAILED)' "$log") && break
        read -rt 0.2 <> <(:) || true
    done
    [[ $test ]] || test=$(grep -m1 -oP '^test \K\S+(?= .*FAILED)' "$log") || true
    kill "$runner" 2>/dev/null || true
    wait "$runner" 2>/dev/null || true
    [[ $test ]] && echo "$test"
}

names=("$@")
if ((!${#names[@]})); then
    for patch in "$patches"/*.patch; do
        names+=("$(basename "$patch" .patch)")
    done
fi
missed=0
for name in "${names[@]}"; do
    patch -p1 --silent --forward <"$patches/$name.patch"
    binary=$(cargo test -q --release -p loopd-engine --lib --no-run --message-format=json 2>/dev/null |
        grep -oP '"executable":"\K[^"]+' | tail -n 1)
    start=$SECONDS
    test=$(found "$binary") || test=
    took=$((SECONDS - start))
    patch -p1 --silent --reverse <"$patches/$name.patch"
    if [[ $test ]]; then
        how=$(grep -m1 -oP 'LOOPD_SEED=\S+ LOOPD_STEPS=\S+' "$log" || true)
        printf '| %s | %s | %s | %s | %s s | %s |\n' "$(date +%F)" "$commit" "$name" "$test" "$took" "$how" >>"$results"
    else
        printf '| %s | %s | %s | **not found** | %s s | |\n' "$(date +%F)" "$commit" "$name" "$took" >>"$results"
        missed=1
    fi
    tail -n 1 "$results"
done
exit "$missed"
