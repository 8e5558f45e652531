# What both packages are named and dated after; sourced from the top of the tree.
# shellcheck shell=bash disable=SC2034

packages=$(realpath -m "${CARGO_TARGET_DIR:-target}/package")
version=$(sed -n '/^\[workspace.package\]/,/^\[/s/^version = "\(.*\)"/\1/p' Cargo.toml)
# The last change's time, so that the same source gives the same package.
date=${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct 2>/dev/null || stat -c %Y CHANGELOG.md)}
