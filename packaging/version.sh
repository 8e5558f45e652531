# Version and date of both packages; sourced in the top directory.
# shellcheck shell=bash disable=SC2034

packages=$(realpath -m "${CARGO_TARGET_DIR:-target}/package")
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
# The time of the last commit, so that the same source gives the same package.
date=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)}
