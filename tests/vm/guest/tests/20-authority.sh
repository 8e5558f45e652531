# Authorization with the real polkit and sessions of logind.
# shellcheck shell=bash disable=SC2154 # of lib.sh

readonly needs_prompt=org.freedesktop.DBus.Error.InteractiveAuthorizationRequired
readonly denied=org.freedesktop.DBus.Error.AccessDenied

test_an_active_session_needs_no_prompt() {
    image /home/alice/disk.img 8M alice
    active alice bash -eux <<'END'
        device=$(loopctl --no-ask-password attach disk.img)
        loopctl list | grep -E "^$device .* /home/alice/disk.img$"
        loopctl --no-ask-password detach disk.img
        [ ! -e "/sys/block/${device#/dev/}/loop" ]
END
}

test_without_the_flag_a_remote_or_inactive_call_is_refused() {
    image /home/alice/disk.img 8M alice
    local kind answer
    for kind in inactive remote; do
        answer=$($kind alice "$probe" setup regular /home/alice/disk.img)
        refusal "$answer" "$needs_prompt"
    done
    answer=$(refused 1 remote alice loopctl --no-ask-password attach disk.img)
    contains "$answer" "password"
    equal "devices" "$(losetup -n -O NAME)" ""
}

test_a_text_agent_asks_an_inactive_session() {
    image /home/alice/disk.img 8M alice
    local output
    output=$(inactive alice "$ask" admin loopctl attach disk.img)
    contains "$output" 'attach the file /home/alice/disk.img to a loop device' 'Authenticating as: .*admin'
    loopctl detach /home/alice/disk.img
}

test_a_text_agent_asks_a_remote_session() {
    image /home/alice/disk.img 8M alice
    local output
    output=$(remote alice "$ask" admin loopctl attach disk.img)
    contains "$output" 'attach the file /home/alice/disk.img' '/dev/loop[0-9]+'
    loopctl detach /home/alice/disk.img
}

test_a_text_agent_asks_without_a_session() {
    image /home/carol/disk.img 8M carol
    local output
    output=$(cd /home/carol && runuser -u carol -- "$ask" admin loopctl attach disk.img)
    contains "$output" 'attach the file /home/carol/disk.img' '/dev/loop[0-9]+'
    loopctl detach /home/carol/disk.img
}

test_a_wrong_password_attaches_nothing() {
    image /home/alice/disk.img 8M alice
    local output
    output=$(refused 1 remote alice "$ask" wrong loopctl attach disk.img)
    contains "$output" 'not authorized for org.loopd1.attach'
    equal "devices" "$(losetup -n -O NAME)" ""
}

test_bob_may_not_detach_alices_device() {
    image /home/alice/disk.img 8M alice
    local device answer output
    device=$(active alice loopctl attach disk.img)
    answer=$(inactive bob "$probe" detach "$device")
    refusal "$answer" "$needs_prompt"
    # Nor at the seat.
    answer=$(active bob "$probe" detach "$device")
    refusal "$answer" "$needs_prompt"
    attached "$device"
    output=$(active bob "$ask" admin loopctl detach "$device")
    contains "$output" "change the loop device $device of user 1000, attached to the file /home/alice/disk.img"
    detached "$device"
}

test_an_owner_detaches_from_any_session() {
    image /home/alice/disk.img 8M alice
    local device
    device=$(active alice loopctl attach disk.img)
    remote alice loopctl --no-ask-password detach "$device"
    detached "$device"
}

test_a_block_device_needs_an_administrator() {
    image /home/alice/disk.img 8M
    local device answer output
    device=$(loopctl attach /home/alice/disk.img)
    chmod o+rw "$device"
    answer=$(active alice "$probe" setup block "$device")
    refusal "$answer" "$needs_prompt"
    output=$(active alice "$ask" admin loopctl attach "$device")
    contains "$output" "attach the block device $device to a loop device"
    loopctl detach "$(losetup -n -O NAME -j "$device")"
    chmod o-rw "$device"
    loopctl detach "$device"
}

test_denial_by_a_rule_gives_no_prompt() {
    image /home/alice/disk.img 8M alice
    rule 'polkit.addRule(function(action, subject) { if (action.id == "org.loopd1.attach") return polkit.Result.NO; });'
    local answer
    answer=$(active alice "$probe" setup regular /home/alice/disk.img)
    forget_rules
    refusal "$answer" "$denied"
}

test_calls_are_denied_without_polkit() {
    image /home/alice/disk.img 8M alice
    systemctl mask --quiet --runtime --now polkit.service
    local answer
    answer=$(active alice "$probe" setup regular /home/alice/disk.img)
    systemctl unmask --quiet --runtime polkit.service
    refusal "$answer" "$denied"
}

test_the_example_rule_lets_a_group_attach() {
    image /home/bob/disk.img 8M bob
    local device answer
    install -m 644 /usr/share/doc/loopd/50-loopd-group.rules /etc/polkit-1/rules.d/
    systemctl restart polkit.service
    answer=$(remote bob "$probe" setup regular /home/bob/disk.img)
    refusal "$answer" "$needs_prompt"
    groupadd --system disk-images
    usermod --append --groups disk-images bob
    remote bob loopctl --no-ask-password attach disk.img
    # The rule does not cover attachments of other users.
    image /home/alice/disk.img 8M
    device=$(loopctl attach /home/alice/disk.img)
    answer=$(remote bob "$probe" detach "$device")
    refusal "$answer" "$needs_prompt"
    loopctl detach --all
    gpasswd --delete bob disk-images
    forget_rules
}
