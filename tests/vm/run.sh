#!/bin/bash
# Boots a Debian in virtual machines, has tests/vm/guest/run test our package in them, each a part, and
# judges what came back. Everything that is left of a run is in target/vm/SUITE.
# usage: run.sh SUITE PROGRAMS [WORD…]    PROGRAMS: the folder of loopd-probe; a WORD selects tests
# PARTS=parts-release runs the files whose tests depend on the release: on what systemd, udev, polkit, the bus and the
# kernel do, not only on loopd and loopctl.
set -euo pipefail
cd "$(dirname "$0")/../.."

suite=${1:?usage: run.sh SUITE PROGRAMS [WORD…]}
programs=$(realpath "${2:?usage: run.sh SUITE PROGRAMS [WORD…]}")
words=("${@:3}")
plan=tests/vm/guest/${PARTS:-parts}
# Seconds until the machine counts as hung; many times what it takes under emulation.
readonly limit=${LOOPD_VM_TIMEOUT:-1800}
# Seconds in which a kernel under KVM must have come as far as its root file system.
readonly probe_limit=10

out=$(realpath -m "${CARGO_TARGET_DIR:-target}/vm/$suite")
rm -rf "$out"
mkdir -p "$out/payload"
work=$(mktemp -d /var/tmp/loopd-vm.XXXXXX)
machines=()
cleanup() {
    set +e
    for machine in "${machines[@]}"; do
        kill "$machine" 2>/dev/null
        wait "$machine"
    done
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

# Whether a kernel boots with this accelerator: a /dev/kvm alone does not tell.
boots_with() {
    timeout --signal=KILL "$probe_limit" qemu-system-x86_64 -accel "$1" -cpu max -m 512 -nodefaults -display none \
        -no-reboot -serial "file:$work/probe" -kernel "$image/vmlinuz" -append 'console=ttyS0 panic=-1' \
        </dev/null >/dev/null 2>&1 || return 1
    grep -q 'Unable to mount root fs' "$work/probe"
}

accelerator() {
    if [[ -w /dev/kvm ]] && boots_with kvm; then
        echo kvm
    else
        echo tcg,thread=multi
    fi
}

# Under emulation code is translated, and what was translated is of use again at the same addresses
# only: with them at random a process takes four times as long to start. The rest spares the zeroing
# of memory byte by byte, a switch of mode around each copy, and system calls to know the time.
set_up_emulation() {
    cpu=max,-erms,-smap,-smep,-la57,-avx2
    options="norandmaps init_on_alloc=0 transparent_hugepage=never tsc=reliable rcupdate.rcu_expedited=1"
}

# What the guest unpacks: the package, a later version of it, and the tests.
make_payload() {
    cp "$(packaging/deb.sh 1)" "$out/payload/loopd-1.deb"
    cp "$(packaging/deb.sh 2)" "$out/payload/loopd-2.deb"
    # Earlier versions, to upgrade from.
    cp -r tests/vm/packages "$out/payload/packages"
    strip --strip-debug -o "$out/payload/loopd-probe" "$programs/loopd-probe"
    cp -r tests/vm/guest/. "$out/payload/"
    cp "$plan" "$out/payload/parts"
    printf '%s\n' "${words[@]}" >"$out/payload/words"
    tar -C "$out/payload" --owner=0 --group=0 -cf "$out/payload.tar" .
    rm -rf "$out/payload"
}

# parts: the numbers of the lines of the plan that have a selected test.
parts() {
    local number=0 line file name
    while read -r line; do
        number=$((number + 1))
        for file in $line; do
            while read -r name; do
                is_selected "$name" && echo "$number" && continue 3
            done < <(sed -n 's/^\(test_[a-z0-9_]*\)().*/\1/p' "tests/vm/guest/tests/$file.sh")
        done
    done <"$plan"
}

is_selected() {
    local word
    for word in "${words[@]}"; do
        [[ $1 == *$word* ]] && return 0
    done
    ((${#words[@]} == 0))
}

# Every file is in one part, and in one at most of those that the release matters to.
check_parts() {
    diff <(tr ' ' '\n' <tests/vm/guest/parts | sort) <(basename -s .sh tests/vm/guest/tests/*.sh | sort) ||
        { echo "vm: tests/vm/guest/parts does not have each file once" >&2; exit 1; }
    local unknown
    unknown=$(comm -23 <(tr ' ' '\n' <tests/vm/guest/parts-release | sort) <(tr ' ' '\n' <tests/vm/guest/parts | sort))
    [[ -z $unknown ]] ||
        { echo "vm: tests/vm/guest/parts-release has what is no file, or twice: $unknown" >&2; exit 1; }
    [[ -e $plan ]] || { echo "vm: there is no $plan; PARTS is parts or parts-release" >&2; exit 1; }
}

# start_machine PART FOLDER
start_machine() {
    mkdir "$2"
    : >"$2/results"
    TMPDIR=$work timeout --kill-after=10 "$limit" qemu-system-x86_64 -accel "$accelerator" -cpu "$cpu" -smp 1 -m 1536 -nodefaults -display none -no-reboot \
        -kernel "$image/vmlinuz" -initrd "$image/initrd.img" \
        -append "root=LABEL=debian rw console=ttyS0 panic=-1 loglevel=4 mitigations=off systemd.show_status=no loopd.part=$1 $options" \
        -drive "file=$image/disk,format=raw,if=virtio,snapshot=on,cache=unsafe" \
        -drive "file=$out/payload.tar,format=raw,if=none,readonly=on,id=tests" -device virtio-blk,drive=tests,serial=tests \
        -device virtio-rng -serial "file:$2/console" \
        -device virtio-serial -chardev "file,id=results,path=$2/results" -device virtserialport,chardev=results,name=results \
        </dev/null 2>"$2/qemu" &
    machines+=($!)
}

# follow MACHINE FOLDER: shows the results as they come, without traces and journals, until the machine
# is off.
follow() {
    tail -n +1 -s 0.5 --pid="$1" -F "$2/results" 2>/dev/null | grep --line-buffered -v '^#[a-z]' |
        sed -u "s/^/${2##*/}: /" || true
}

check_parts
image=$(tests/vm/image.sh "$suite")
make_payload
accelerator=$(accelerator)
cpu=max
options=
[[ $accelerator == kvm ]] || set_up_emulation
echo "vm: $suite, $accelerator"
verdict=0
mapfile -t parts < <(parts)
((${#parts[@]})) || { echo "vm: no test has ${words[*]} in its name" >&2; exit 1; }
started=()
for part in "${parts[@]}"; do
    start_machine "$part" "$out/$part"
    started+=("${machines[-1]}")
    # A machine keeps one processor busy.
    (($(nproc) > 1)) || wait "${machines[-1]}" || true
done
for index in "${!parts[@]}"; do
    follow "${started[index]}" "$out/${parts[index]}" &
done
for index in "${!parts[@]}"; do
    status=0
    wait "${started[index]}" || status=$?
    echo "$status" >"$out/${parts[index]}/status"
done
machines=()
wait
for part in "${parts[@]}"; do
    tests/vm/judge.sh "$out/$part" "$(<"$out/$part/status")" || verdict=1
done
((verdict == 0))
