#!/bin/bash
# Boots a Debian in virtual machines. In each of them tests/vm/guest/run tests our package with a part of the tests;
# then the results are judged. target/vm/SUITE keeps all files of a run.
# usage: run.sh SUITE PROGRAMS [TEXT…]    PROGRAMS: the directory of loopd-probe; TEXT: part of the names of tests to run
# ROUNDS: how often the comparison with other programs repeats each way.
# PARTS=parts-release runs the files whose tests depend on the release: on what systemd, udev, polkit, the bus and the
# kernel do, not only on loopd and loopctl.
set -euo pipefail
cd "$(dirname "$0")/../.."

suite=${1:?usage: run.sh SUITE PROGRAMS [TEXT…]}
programs=$(realpath "${2:?usage: run.sh SUITE PROGRAMS [TEXT…]}")
words=("${@:3}")
plan=tests/vm/guest/${PARTS:-parts}
# Seconds until the machine counts as hung; many times the usual duration under emulation.
readonly limit=${LOOPD_VM_TIMEOUT:-1800}
# Seconds within which a kernel under KVM must reach its root file system.
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

# Whether a kernel boots with this accelerator: /dev/kvm alone is no proof.
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

# The emulator translates code, and can reuse a translation only at the same addresses: with address
# randomization a process takes four times as long to start. The other options avoid zeroing memory byte
# by byte, a mode switch around each copy, and system calls to read the time.
set_up_emulation() {
    cpu=max,-erms,-smap,-smep,-la57,-avx2
    options="norandmaps init_on_alloc=0 transparent_hugepage=never tsc=reliable rcupdate.rcu_expedited=1"
}

# The files for the guest: the package, a later version of it, and the tests.
make_payload() {
    cp "$(packaging/deb.sh 1)" "$out/payload/loopd-1.deb"
    cp "$(packaging/deb.sh 2)" "$out/payload/loopd-2.deb"
    # Earlier versions, to upgrade from.
    cp -r tests/vm/packages "$out/payload/packages"
    strip --strip-debug -o "$out/payload/loopd-probe" "$programs/loopd-probe"
    cp -r tests/vm/guest/. "$out/payload/"
    cp "$plan" "$out/payload/parts"
    printf '%s\n' "${words[@]}" >"$out/payload/words"
    echo "${ROUNDS:-1}" >"$out/payload/rounds"
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

# Checks that `parts` has every file once, and `parts-release` at most once.
check_parts() {
    diff <(tr ' ' '\n' <tests/vm/guest/parts | sort) <(basename -s .sh tests/vm/guest/tests/*.sh | sort) ||
        { echo "vm: tests/vm/guest/parts does not have each file once" >&2; exit 1; }
    local unknown
    unknown=$(comm -23 <(tr ' ' '\n' <tests/vm/guest/parts-release | sort) <(tr ' ' '\n' <tests/vm/guest/parts | sort))
    [[ -z $unknown ]] ||
        { echo "vm: tests/vm/guest/parts-release has unknown or duplicate files: $unknown" >&2; exit 1; }
    [[ -e $plan ]] || { echo "vm: there is no $plan; PARTS is parts or parts-release" >&2; exit 1; }
}

# start_machine PART DIRECTORY
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

# follow MACHINE DIRECTORY: shows the results, without traces and journals, until the machine is off.
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
