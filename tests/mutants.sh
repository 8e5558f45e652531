#!/bin/bash
# Makes many small changes to the code of a module, one at a time; a test must fail for each. Records the counts in
# tests/results/mutants.md and prints the changes that no test has found. Changes that were found are not tried again,
# so an interrupted run can be continued.
# usage: mutants.sh [MODULE…]    without MODULE the first six; TIMEOUT in seconds and JOBS for a slow or shared machine
set -euo pipefail
cd "$(dirname "$0")/.."

readonly version=27.1.0
readonly results=tests/results/mutants.md target=${CARGO_TARGET_DIR:-target}
# A module: its package and its files.
readonly -A package=([authority]=loopd) files=(
    [authority]="daemon/loopd/src/bus/authority.rs"
    [quota]="daemon/engine/src/quota.rs daemon/engine/src/ownership.rs"
    [lifetime]="daemon/engine/src/lifetime.rs"
    [overlap]="daemon/engine/src/overlap.rs daemon/engine/src/other_devices.rs"
    [detach]="daemon/engine/src/detach.rs daemon/engine/src/operation.rs"
    [restore]="daemon/engine/src/restore.rs daemon/engine/src/saved.rs daemon/engine/src/state_writer.rs"
    [attach]="daemon/engine/src/attach.rs daemon/engine/src/request.rs"
    [change]="daemon/engine/src/change.rs daemon/engine/src/replace.rs"
    [mount]="daemon/engine/src/mount.rs daemon/engine/src/mount_directory.rs daemon/engine/src/mount_plan.rs daemon/engine/src/volume_check.rs"
    [observe]="daemon/engine/src/observe.rs daemon/engine/src/scan.rs daemon/engine/src/scan_queue.rs"
    [partition]="daemon/engine/src/partition.rs"
)
readonly first=(authority quota lifetime overlap detach restore)
# Without the long random runs: the other tests should find the same changes.
readonly skipped=(--skip random --skip every_pair)

# Only a development tool (MIT): not needed to build or test.
tool=$(command -v cargo-mutants || true)
if [[ ! $tool || $("$tool" mutants --version) != "cargo-mutants $version" ]]; then
    tool=$target/tools/bin/cargo-mutants
    [[ -x $tool ]] || cargo install cargo-mutants --version "$version" --locked --root "$target/tools"
fi

commit=$(git rev-parse --short HEAD)
[[ -z $(git status --porcelain --untracked-files=no -- . ":!$results") ]] || commit+=+

count() {
    if [[ -e $1 ]]; then wc -l <"$1"; else echo 0; fi
}

modules=("$@")
((${#modules[@]})) || modules=("${first[@]}")
for module in "${modules[@]}"; do
    [[ ${files[$module]:-} ]] || { echo "mutants: no module is called $module; there are: ${!files[*]}" >&2; exit 2; }
    arguments=()
    for file in ${files[$module]}; do
        arguments+=(--file "$file")
    done
    output=$target/mutants/$module
    mkdir -p "$output"
    # 2: some were not found; 3: some took too long.
    "$tool" mutants --package "${package[$module]:-loopd-engine}" "${arguments[@]}" --output "$output" --iterate \
        --profile mutants --baseline skip --timeout "${TIMEOUT:-40}" --jobs "${JOBS:-2}" --no-shuffle --colors never \
        -- -- "${skipped[@]}" || (($? == 2 || $? == 3))
    out=$output/mutants.out
    caught=$(cat "$out/caught.txt" "$out/previously_caught.txt" 2>/dev/null | sort -u | wc -l)
    printf '| %s | %s | %s | %s | %s | %s | %s |\n' "$(date +%F)" "$commit" "$module" "$caught" \
        "$(count "$out/timeout.txt")" "$(count "$out/unviable.txt")" "$(count "$out/missed.txt")" >>"$results"
    tail -n 1 "$results"
    [[ ! -s $out/missed.txt ]] || cat "$out/missed.txt"
done
