#!/bin/bash
# Builds target/package/loopd-VERSION-REVISION.ARCH.rpm from the result of `make`, and prints its path.
# usage: rpm.sh [REVISION]
set -euo pipefail
cd "$(dirname "$0")/.."
source packaging/version.sh

revision=${1:-1}
build=$packages/rpm-$revision
rm -rf "$build"
mkdir -p "$build"
packaging/third-party.py >"$build/third-party.txt"

log=$build.log
if ! SOURCE_DATE_EPOCH=$date rpmbuild -bb --quiet \
    --define "source $PWD" --define "package_version $version" --define "revision $revision" \
    --define "_topdir $build" --define "_rpmdir $packages" \
    --define '_build_name_fmt %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm' \
    packaging/loopd.spec >"$log" 2>&1; then
    tail -n 30 "$log" >&2
    echo "rpm: the build failed; see $log" >&2
    exit 1
fi
ls "$packages/loopd-$version-$revision".*.rpm
