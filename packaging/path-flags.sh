#!/bin/bash
# Prints flags for rustc that keep the paths of this machine out of the programs, so that builds are reproducible.
set -euo pipefail
cd "$(dirname "$0")/.."

read -ra flags <<<"${RUSTFLAGS:-}"
flags+=("--remap-path-prefix=$PWD=loopd")
# The directories of the crates exist only after the crates are unpacked.
"${CARGO:-cargo}" fetch --quiet --locked
for crates in "${CARGO_HOME:-$HOME/.cargo}"/registry/src/*/; do
    flags+=("--remap-path-prefix=${crates%/}=crates")
done
echo "${flags[*]}"
