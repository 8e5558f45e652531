#!/bin/bash
# Installs the Debian packages that building and testing need; asks apt only for what is missing.
# usage: deps.sh [packages] [vm]    with what our packages, or the virtual machine, need besides
set -euo pipefail

packages=(
    gcc libc6-dev make                            # what rustc and this Makefile stand on
    pkg-config libudev-dev                        # build
    dbus polkitd udev e2fsprogs util-linux mount  # tests and demo: bus, polkit, udev, images, losetup
    fdisk gdisk parted xorriso dosfstools isolinux # tests: partition tables by many hands
    systemd libglib2.0-bin python3-dbus           # tests: busctl, gdbus and python as foreign clients
    libxml2-utils shellcheck desktop-file-utils   # make check
)

for further in "$@"; do
    case $further in
        packages) packages+=(debhelper lintian rpm) ;;
        vm) packages+=(mmdebstrap qemu-system-x86 e2fsprogs debian-archive-keyring) ;;
        *) echo "usage: deps.sh [packages] [vm]" >&2; exit 2 ;;
    esac
done

missing=()
for package in "${packages[@]}"; do
    status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
    [[ $status == installed ]] || missing+=("$package")
done
if ((${#missing[@]} == 0)); then
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "deps: no apt-get here; please install what corresponds to: ${missing[*]}" >&2
    exit 1
fi

as_root=()
((EUID == 0)) || as_root=(sudo)
echo "deps: installing ${missing[*]}"
"${as_root[@]}" apt-get update -q
"${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -q -y --no-install-recommends "${missing[@]}" </dev/null
