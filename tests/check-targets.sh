#!/bin/bash
# Checks that the programs compile for other processors. A target whose standard library is not here is a
# SKIPPED line, not a failure.
# usage: check-targets.sh TARGET…
set -euo pipefail
cd "$(dirname "$0")/.."

# Nothing is linked, so this machine's libudev.pc answers for the target's.
export PKG_CONFIG_ALLOW_CROSS=1
libraries=$(rustc --print sysroot)/lib/rustlib
for target in "$@"; do
    if [[ ! -d $libraries/$target/lib ]]; then
        echo "SKIPPED $target: its standard library is not installed; run 'make deps-targets'"
        continue
    fi
    cargo check --quiet --target "$target" --package loopd --package loopctl
    echo "$target: ok"
done
