#!/bin/bash
# Checks both packages: lintian finds no error in the Debian one, and each contains exactly the files that
# `make install` installs.
set -euo pipefail
cd "$(dirname "$0")/.."
source packaging/version.sh

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# The paths of a package as `make install` has them: without the suffix of compressed files, and without changelogs and
# licences, which each package has in other files.
normalized() {
    sed -E 's,^\.?/*,/,; s,\.gz$,,' |
        grep -vE '/$|^/usr/share/doc/loopd(/(changelog(\.Debian)?|copyright|LICENSE-.*|third-party\.txt))?$' | sort
}

deb=$(packaging/deb.sh)
lintian --fail-on error "$deb"
echo "lintian: no error in ${deb##*/}"

rpm=$(packaging/rpm.sh)
make -s install PREFIX=/usr DESTDIR="$work/stage"
(cd "$work/stage" && find . ! -type d) | normalized >"$work/installed"
dpkg-deb --fsys-tarfile "$deb" | tar -t | normalized >"$work/deb"
rpm -qp --queryformat '[%{FILEMODES:perms} %{FILENAMES}\n]' "$rpm" | sed -n '/^d/!s,^[^ ]* ,,p' | normalized >"$work/rpm"
for package in deb rpm; do
    diff -u "$work/installed" "$work/$package" || { echo "the $package is not what make install installs" >&2; exit 1; }
done
# has WORD COMMAND…: checks that the command prints the word. All of its output is read: `grep -q` would close the pipe,
# and the command would fail.
has() {
    "${@:2}" | grep "$1" >/dev/null || { echo "no $1 in what '${*:2}' prints" >&2; exit 1; }
}
has LICENSE-MIT rpm -qp --licensefiles "$rpm"
has third-party.txt rpm -qp --licensefiles "$rpm"
has '^libudev' rpm -qp --requires "$rpm"
crates=$(dpkg-deb --fsys-tarfile "$deb" | tar -xO ./usr/share/doc/loopd/third-party.txt.gz | zcat)
for crate in zbus tokio serde; do
    grep -q "^$crate [0-9.]*: " <<<"$crates" || { echo "the deb has no licence of $crate" >&2; exit 1; }
done
echo "files: the $(wc -l <"$work/installed") that make install installs, in ${deb##*/} and ${rpm##*/}"
# A package contains no path of the machine that built it.
dpkg-deb -x "$deb" "$work/unpacked"
if grep -rlaF -e "$PWD/" -e "${CARGO_HOME:-$HOME/.cargo}/" "$work/unpacked"; then
    echo "the deb has paths of this machine in these files" >&2
    exit 1
fi
