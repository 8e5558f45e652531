#!/bin/bash
# Prints flags for rustc that keep the paths of this machine out of programs: they are built from the same bytes anywhere.
set -euo pipefail
cd "$(dirname "$0")/.."

read -ra flags <<<"${RUSTFLAGS:-}"
flags+=("--remap-path-prefix=$PWD=loopd")
# Only once the crates are unpacked are their directories known.
"${CARGO:-cargo}" fetch --quiet --locked
for crates in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/; do
    flags+=("--remap-path-prefix=${crates%/}=crates")
done
echo "${flags[*]}"
