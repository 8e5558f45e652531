#!/bin/bash
# Prints the folder of a Debian image for `make test-vm`: a disk, its kernel and its initrd. What is
# there already, made by this very script, is taken again.
# usage: image.sh SUITE
set -euo pipefail

suite=${1:?usage: image.sh SUITE}
cache=${LOOPD_VM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/loopd-vm}
packages=(
    linux-image-cloud-amd64 initramfs-tools zstd        # a distribution's kernel
    systemd systemd-sysv udev libpam-systemd dbus polkitd # what loopd is at home with
    passwd util-linux mount expect jq                   # users, what they type and what they read
    e2fsprogs fdisk dosfstools xorriso                  # images
    squashfs-tools erofs-utils xfsprogs cryptsetup-bin  # more of them
    btrfs-progs                                         # file systems over several devices
    lvm2 mdadm bcache-tools multipath-tools             # what udev activates from an image's content
    dbus-broker                                         # the other message bus
    acl                                                 # who may look into a folder
    udisks2                                             # memory beside its peer's
)

# Debian 13 has it no more.
[[ $suite != bookworm ]] || packages+=(dmraid)

as_root=()
((EUID == 0)) || as_root=(sudo)

say() {
    echo "image: $*" >&2
}

# The sources of the machine's own apt, for another suite.
sources() {
    local label uri
    # shellcheck disable=SC2016 # apt's own words
    apt-get indextargets --format '$(ORIGIN) $(LABEL) $(REPO_URI)' 'Created-By: Packages' |
        sed -n 's/^Debian //p' | sort -u |
        while read -r label uri; do
            case $label in
                Debian) printf 'deb %s %s main\n' "$uri" "$suite" "$uri" "$suite-updates" ;;
                Debian-Security) printf 'deb %s %s main\n' "$uri" "$suite-security" ;;
            esac
        done
}

# Whatever the machine needs to get there: proxies, time-outs, clocks.
apt_options() {
    echo 'Acquire::Retries "5";'
    apt-config dump | grep -E '^Acquire::(http|https|Retries|Check-[A-Za-z-]+)\b' || true
}

# mmdebstrap calls this for the new root, with the privileges that it has there.
customize() {
    local root=$1 user
    for user in alice bob carol admin; do
        chroot "$root" useradd --create-home --shell /bin/bash "$user"
        echo "$user:$user" | chroot "$root" chpasswd
    done
    # Their service managers have no part in this, and are slow under emulation; sessions want that there is one.
    mkdir -p "$root/var/lib/systemd/linger" "$root/etc/systemd/system/user@.service.d"
    touch "$root"/var/lib/systemd/linger/{alice,bob}
    printf '[Service]\nType=simple\nExecStart=\nExecStart=/bin/sleep infinity\n' \
        >"$root/etc/systemd/system/user@.service.d/none.conf"
    # Whom Debian's polkit takes for administrators.
    chroot "$root" usermod --append --groups sudo admin
    echo debian >"$root/etc/hostname"
    # The tests own the virtual terminals; nothing else should run meanwhile.
    chroot "$root" systemctl -q mask getty@tty1.service getty@tty2.service autovt@.service \
        serial-getty@ttyS0.service e2scrub_all.timer fstrim.timer apt-daily.timer apt-daily-upgrade.timer \
        dpkg-db-backup.timer
    chroot "$root" systemctl -q disable e2scrub_reap.service
    # Their udev rules are under test, their services are not; dbus-broker is started by its own test.
    chroot "$root" systemctl -q disable dbus-broker.service
    chroot "$root" systemctl -q mask multipathd.service multipathd.socket mdmonitor.service \
        mdcheck_start.timer mdcheck_continue.timer mdmonitor-oneshot.timer lvm2-monitor.service \
        lvm2-lvmpolld.socket blk-availability.service
    # The bus starts it for the tests that want it.
    chroot "$root" systemctl -q disable udisks2.service
    cat >"$root/etc/systemd/system/system-tests.service" <<'UNIT'
[Unit]
Description=What the payload wants to be run
After=multi-user.target
FailureAction=poweroff

[Service]
ExecStart=/bin/sh -c 'mkdir /srv/vm && tar -xf /dev/disk/by-id/virtio-tests -C /srv/vm && exec /srv/vm/run'
StandardError=journal+console

[Install]
WantedBy=multi-user.target
UNIT
    chroot "$root" systemctl -q enable system-tests.service
    # What is installed later is installed whole.
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
    # By the links that Debian keeps in /, whatever the version.
    "${as_root[@]}" install -m 644 "$work/root/vmlinuz" "$work/root/initrd.img" "$work/image/"
    # It is never written to, and thrown away after each run: a journal would be for nothing.
    truncate -s 2G "$work/image/disk"
    "${as_root[@]}" mkfs.ext4 -q -O ^has_journal -E lazy_itable_init=0 -L debian -d "$work/root" "$work/image/disk"
    # Images of earlier versions of this script go.
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
