#!/bin/bash
# Checks the syntax of the shipped files. A missing tool is a SKIPPED line, not a failure.
set -euo pipefail
cd "$(dirname "$0")/.."

# The highest exposure that `systemd-analyze security` may find, in tenths.
readonly exposure=15

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

have() {
    command -v "$1" >/dev/null && return
    echo "SKIPPED $2: $1 is not installed"
    return 1
}

if have xmllint "XML files"; then
    xmllint --nonet --noout dbus/*.xml dbus/*.conf client/desktop/*.xml
    dtd=/usr/share/polkit-1/policyconfig-1.dtd
    if [[ -e $dtd ]]; then
        xmllint --nonet --noout --dtdvalid "$dtd" polkit/*.policy
    else
        xmllint --nonet --noout polkit/*.policy
        echo "SKIPPED DTD of polkit's actions: $dtd is not installed"
    fi
    echo "XML files: ok"
fi

if have desktop-file-validate "desktop files"; then
    # The validator does not know KDE's service menus, which have the format of applications.
    sed 's/^Type=Service$/Type=Application\nName=Disk Image\nExec=loopctl/' \
        client/desktop/org.loopd1.servicemenu.desktop >"$work/servicemenu.desktop"
    desktop-file-validate client/desktop/org.loopd1.open.desktop "$work/servicemenu.desktop"
    echo "desktop files: ok"
fi

if have systemd-analyze "systemd units"; then
    # Programs that exist stand in for the installed ones.
    for program in loopd loop-image; do
        printf '#!/bin/sh\n' >"$work/$program"
        chmod +x "$work/$program"
    done
    for unit in systemd/*.service.in; do
        sed "s#@LIBEXECDIR@#$work#g" "$unit" >"$work/$(basename "$unit" .in)"
    done
    # Our manual pages are not installed yet.
    systemd-analyze verify --man=no "$work"/*.service
    systemd-analyze security --offline=true --threshold="$exposure" --no-pager "$work/loopd.service" | tail -n 1
    # The drop-in adds one capability, and a little more exposure.
    mkdir "$work/loopd.service.d"
    cp systemd/partitions.conf "$work/loopd.service.d/"
    systemd-analyze verify --man=no "$work"/*.service
    echo "systemd units: ok"
fi

# Only newer versions can verify rules.
if have udevadm "udev rules" && udevadm verify --help >/dev/null 2>&1; then
    for rules in systemd/*.rules systemd/*.rules.in; do
        sed "s#@LIBEXECDIR@#$work#g" "$rules" >"$work/$(basename "$rules" .in)"
    done
    udevadm verify --no-summary "$work"/*.rules
    echo "udev rules: ok"
fi

cargo run --quiet --package loopd -- --check-config docs/loopd.toml

if have python3 "licences"; then
    cargo metadata --format-version 1 --locked | python3 tests/check-licences.py
fi

if have shellcheck "scripts"; then
    shellcheck -x systemd/loop-image systemd/untrusted-loop client/desktop/nautilus-scripts/* .ci/run tests/*.sh packaging/*.sh tests/vm/*.sh tests/vm/guest/{run,*.sh,lib/*.sh,tests/*.sh}
    echo "scripts: ok"
fi

if grep -n '@[A-Z]*@' -- */*.in | grep -v '@LIBEXECDIR@'; then
    echo "a placeholder that make install does not know" >&2
    exit 1
fi
