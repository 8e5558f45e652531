#!/bin/bash
# Prints the directory of a Debian image for `make test-vm`: a disk, its kernel and its initrd. An image
# that this version of the script has built is reused.
# usage: image.sh SUITE
set -euo pipefail

suite=${1:?usage: image.sh SUITE}
cache=${LOOPD_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/loopd-vm}
packages=(
    linux-image-cloud-amd64 initramfs-tools zstd        # a distribution's kernel
    systemd systemd-sysv udev libpam-systemd dbus polkitd # services that loopd uses
    passwd util-linux mount expect jq                   # users and their commands
    e2fsprogs fdisk dosfstools xorriso                  # image tools
    squashfs-tools erofs-utils xfsprogs cryptsetup-bin  # more image tools
    btrfs-progs                                         # file systems over several devices
    lvm2 mdadm bcache-tools multipath-tools             # what udev activates from an image's content
    dbus-broker                                         # the other message bus
    acl                                                 # access control lists
    udisks2 gvfs libglib2.0-bin                         # for comparisons
    tcplay                                              # makes TrueCrypt volumes
)

# dmraid is not in Debian 13. UDisks2 unlocks with the library.
case $suite in
    bookworm) packages+=(dmraid libblockdev-crypto2) ;;
    *) packages+=(libblockdev-crypto3) ;;
esac

as_root=()
((EUID == 0)) || as_root=(sudo)

say() {
    echo "image: $*" >&2
}

# The package sources of the machine's apt, for another suite.
sources() {
    local label uri
    # shellcheck disable=SC2016 # apt expands these
    apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' 'Created-By: Packages' |
        sed -n 's/^Debian //p' | sort -u |
        while read -r label uri; do
            case $label in
                Debian) printf 'deb %s %s main\n' "$uri" "$suite" "$uri" "$suite-updates" ;;
                Debian-Security) printf 'deb %s %s main\n' "$uri" "$suite-security" ;;
            esac
        done
}

# The machine's apt options for downloads: proxies, time-outs, clocks.
apt_options() {
    echo 'Acquire::Retries "5";'
    apt-config dump | grep -E '^Acquire::(http|https|Retries|Check-[A-Za-z-]+)\b' || true
}

# mmdebstrap calls this for the new root, with its privileges there.
customize() {
    local root=$1 user
    for user in alice bob carol admin; do
        chroot "$root" useradd --create-home --shell /bin/bash "$user"
        echo "$user:$user" | chroot "$root" chpasswd
    done
    # User service managers are not tested and slow under emulation, but sessions need the unit.
    mkdir -p "$root/var/lib/systemd/linger" "$root/etc/systemd/system/user@.service.d"
    touch "$root"/var/lib/systemd/linger/{alice,bob}
    printf '[Service]\nType=simple\nExecStart=\nExecStart=/bin/sleep infinity\n' \
        >"$root/etc/systemd/system/user@.service.d/none.conf"
    # Debian's polkit treats this group as administrators.
    chroot "$root" usermod --append --groups sudo admin
    echo debian >"$root/etc/hostname"
    # The tests use the virtual terminals; nothing else should run during the tests.
    chroot "$root" systemctl -q mask getty@tty1.service getty@tty2.service autovt@.service \
        serial-getty@ttyS0.service e2scrub_all.timer fstrim.timer apt-daily.timer apt-daily-upgrade.timer \
        dpkg-db-backup.timer
    chroot "$root" systemctl -q disable e2scrub_reap.service
    # The tests need their udev rules, not their services; a test starts dbus-broker itself.
    chroot "$root" systemctl -q disable dbus-broker.service
    chroot "$root" systemctl -q mask multipathd.service multipathd.socket mdmonitor.service \
        mdcheck_start.timer mdcheck_continue.timer mdmonitor-oneshot.timer lvm2-monitor.service \
        lvm2-lvmpolld.socket blk-availability.service
    # Bus activation starts it for the tests that use it.
    chroot "$root" systemctl -q disable udisks2.service
    cat >"$root/etc/systemd/system/system-tests.service" <<'UNIT'
[Unit]
Description=System tests of the payload
After=multi-user.target
FailureAction=poweroff

[Service]
ExecStart=/bin/sh -c 'mkdir /srv/vm && tar -xf /dev/disk/by-id/virtio-tests -C /srv/vm && exec /srv/vm/run'
StandardError=journal+console

[Install]
WantedBy=multi-user.target
UNIT
    chroot "$root" systemctl -q enable system-tests.service
    # Packages installed later are installed completely.
    rm "$root/etc/dpkg/dpkg.cfg.d/99mmdebstrap"
}

make_root() {
    local sources
    sources=$(sources)
    if [[ -z $sources ]]; then
        "${as_root[@]}" apt-get update -q >&2
        sources=$(sources)
    fi
    [[ $sources ]] || { say "apt knows no source of Debian packages (see apt-get indextargets)"; return 1; }
    apt_options >"$work/apt.conf"
    "${as_root[@]}" mmdebstrap --quiet --variant=essential --include="${packages[*]}" --aptopt="$work/apt.conf" \
        --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
        --dpkgopt='path-exclude=/usr/share/locale/*' \
        --customize-hook="'$0' --customize \"\$1\"" "$suite" "$work/root" - <<<"$sources" >&2
}

make_image() {
    work=$(mktemp -d "$cache/.$suite.XXXXXX")
    trap '"${as_root[@]}" rm -rf --one-file-system "$work"' EXIT
    say "building $suite in $work"
    make_root
    mkdir "$work/image"
    # Through the links in /, which do not depend on the version.
    "${as_root[@]}" install -m 644 "$work/root/vmlinuz" "$work/root/initrd.img" "$work/image/"
    # The disk is never written to, so it needs no journal.
    truncate -s 2G "$work/image/disk"
    "${as_root[@]}" mkfs.ext4 -q -O ^has_journal -E lazy_itable_init=0 -L debian -d "$work/root" "$work/image/disk"
    # Remove the images of earlier versions of this script.
    rm -rf "$cache/$suite"-*
    mv "$work/image" "$image"
}

if [[ $suite == --customize ]]; then
    customize "$2"
    exit
fi

image=$cache/$suite-$(sha256sum <"$0" | cut -c -16)
mkdir -p "$cache"
exec 9>"$cache/$suite.lock"
flock 9
[[ -e $image ]] || make_image
echo "$image"
