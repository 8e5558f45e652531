#!/bin/bash
# Builds target/package/loopd_VERSION-REVISION_ARCH.deb from the result of `make`, and prints its path.
# usage: deb.sh [REVISION]
set -euo pipefail
cd "$(dirname "$0")/.."
source packaging/version.sh

revision=${1:-1}
build=$packages/deb-$revision
rm -rf "$build"
mkdir -p "$build"
cp -r packaging/debian "$build/debian"
packaging/third-party.py >"$build/third-party.txt"
cat >"$build/debian/changelog" <<ENTRY
loopd ($version-$revision) unstable; urgency=medium

  * Built from loopd $version; its changes are in changelog.gz.

 -- $(sed -n 's/^Maintainer: //p' packaging/debian/control)  $(date --utc --rfc-email --date="@$date")
ENTRY

log=$build.log
if ! SOURCE=$PWD SOURCE_DATE_EPOCH=$date make -C "$build" -f debian/rules binary >"$log" 2>&1; then
    tail -n 30 "$log" >&2
    echo "deb: the build failed; see $log" >&2
    exit 1
fi
ls "$packages/loopd_$version-${revision}"_*.deb
