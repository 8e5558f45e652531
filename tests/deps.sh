#!/bin/bash
# Checks for the tools that building and testing need, and installs them on a Debian.
# usage: deps.sh [look | set-up | install] [GROUP…]
#   install   installs what is missing (the default); Debian only
#   look      only reports missing tools and their packages; fails if a required one is missing
#   set-up    installs on a Debian, reports elsewhere
# GROUP: base (the default), bench (what the benchmark compares with), packages (our .deb and .rpm), vm (the virtual machines)
set -euo pipefail

# group | needed: nothing works without it, wanted: a check or a test is SKIPPED | tool | package in Debian | Fedora | Arch
# tool: a command, a path, NAME.pc, or python:MODULE. - : no such package.
readonly table='
base     | needed | cargo                 | -                      | cargo               | rust
base     | needed | cc                    | gcc libc6-dev          | gcc                 | gcc
base     | needed | make                  | make                   | make                | make
base     | needed | pkg-config            | pkg-config             | pkgconf-pkg-config  | pkgconf
base     | needed | libudev.pc            | libudev-dev            | systemd-devel       | systemd-libs
base     | needed | dbus-daemon           | dbus                   | dbus-daemon         | dbus
base     | needed | udevadm               | udev                   | systemd-udev        | systemd
base     | needed | mkfs.ext4             | e2fsprogs              | e2fsprogs           | e2fsprogs
base     | needed | losetup               | mount                  | util-linux          | util-linux
base     | needed | setpriv               | util-linux             | util-linux          | util-linux
base     | wanted | polkitd               | polkitd                | polkit              | polkit
base     | wanted | sfdisk                | fdisk                  | util-linux          | util-linux
base     | wanted | sgdisk                | gdisk                  | gdisk               | gptfdisk
base     | wanted | parted                | parted                 | parted              | parted
base     | wanted | xorriso               | xorriso                | xorriso             | libisoburn
base     | wanted | mkfs.vfat             | dosfstools             | dosfstools          | dosfstools
base     | wanted | mkfs.xfs              | xfsprogs               | xfsprogs            | xfsprogs
base     | wanted | mkfs.btrfs            | btrfs-progs            | btrfs-progs         | btrfs-progs
base     | wanted | cryptsetup            | cryptsetup-bin         | cryptsetup          | cryptsetup
base     | wanted | isohdpfx.bin          | isolinux               | syslinux-nonlinux   | syslinux
base     | wanted | strace                | strace                 | strace              | strace
base     | wanted | busctl                | systemd                | systemd             | systemd
base     | wanted | gdbus                 | libglib2.0-bin         | glib2               | glib2
base     | wanted | python:dbus           | python3-dbus           | python3-dbus        | python-dbus
base     | wanted | xmllint               | libxml2-utils          | libxml2             | libxml2
base     | wanted | shellcheck            | shellcheck             | ShellCheck          | shellcheck
base     | wanted | desktop-file-validate | desktop-file-utils     | desktop-file-utils  | desktop-file-utils
bench    | wanted | udisksctl             | udisks2                | udisks2             | udisks2
packages | needed | dh                    | debhelper              | debhelper           | -
packages | needed | lintian               | lintian                | lintian             | -
packages | needed | rpmbuild              | rpm                    | rpm-build           | rpm-tools
vm       | needed | apt-get               | apt                    | -                   | -
vm       | needed | mmdebstrap            | mmdebstrap             | mmdebstrap          | -
vm       | needed | qemu-system-x86_64    | qemu-system-x86        | qemu-system-x86     | qemu-system-x86
vm       | needed | mkfs.ext4             | e2fsprogs              | e2fsprogs           | e2fsprogs
vm       | needed | /usr/share/keyrings/debian-archive-keyring.gpg | debian-archive-keyring | debian-keyring | -
'

# The paths of programs that are not in PATH.
readonly polkitd=(/usr/lib/polkit-1/polkitd /usr/libexec/polkitd)
readonly isohdpfx=(/usr/lib/ISOLINUX/isohdpfx.bin /usr/share/syslinux/isohdpfx.bin /usr/lib/syslinux/bios/isohdpfx.bin)

is_debian() {
    [[ -e /etc/debian_version ]]
}

any_exists() {
    local path
    for path in "$@"; do
        [[ -e $path ]] && return
    done
    return 1
}

has() {
    case $1 in
        /*) [[ -e $1 ]] ;;
        *.pc) pkg-config --exists "${1%.pc}" 2>/dev/null ;;
        python:*) /usr/bin/python3 -c "import ${1#python:}" 2>/dev/null ;;
        polkitd) any_exists "${polkitd[@]}" ;;
        isohdpfx.bin) any_exists "${isohdpfx[@]}" ;;
        *) PATH=$PATH:/usr/sbin:/sbin command -v "$1" >/dev/null ;;
    esac
}

# rows: the table's rows of the chosen groups, with one | between the cells.
rows() {
    local group
    for group in "${groups[@]}"; do
        sed -n "/^$group /s/ *| */|/gp" <<<"$table"
    done
}

look() {
    local need tool debian fedora arch failed=0
    while IFS='|' read -r _ need tool debian fedora arch; do
        has "$tool" && continue
        echo "deps: $need: $tool (Debian: $debian; Fedora: $fedora; Arch: $arch)" >&2
        [[ $need != needed ]] || failed=1
    done < <(rows)
    if ((failed)); then
        if is_debian; then
            echo "deps: run 'make deps' (with packages: 'make deps-packages'; virtual machines: 'make deps-vm')" >&2
        else
            echo "deps: install what is needed with your distribution's package manager; checks whose tools are missing are SKIPPED" >&2
        fi
    fi
    return "$failed"
}

install() {
    if ! is_debian; then
        look && return
        echo "deps: this is not a Debian: nothing was installed" >&2
        return 1
    fi
    local debian package status missing=()
    while IFS='|' read -r _ _ _ debian _; do
        for package in ${debian/#-/}; do
            status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
            [[ $status == installed || " ${missing[*]} " == *" $package "* ]] || missing+=("$package")
        done
    done < <(rows)
    if ((${#missing[@]})); then
        local as_root=()
        ((EUID == 0)) || as_root=(sudo)
        echo "deps: installing ${missing[*]}"
        "${as_root[@]}" apt-get update -q
        "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
            apt-get install -q -y --no-install-recommends "${missing[@]}" </dev/null
    fi
    has cargo || echo "deps: cargo is missing: Debian's is too old; see rust-version in Cargo.toml" >&2
}

action=install
case ${1-} in
    look | set-up | install)
        action=$1
        shift
        ;;
esac
groups=(base)
for group in "$@"; do
    case $group in
        base) ;;
        bench | packages | vm) groups+=("$group") ;;
        *)
            sed -n 's/^# usage: /usage: /p' "$0" >&2
            exit 2
            ;;
    esac
done
if [[ $action == set-up ]]; then
    if is_debian; then action=install; else action=look; fi
fi
"$action"
