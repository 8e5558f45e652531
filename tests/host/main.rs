//! The host tests: the built daemon and client, on a private bus, with the machine's loop devices and
//! udev. They need root, which `make test` provides.
//!
//! One test: `make test TESTS=detach::mounted_device_is_busy`, or as root
//! `cargo test -p loopd-tests --test host -- detach::mounted_device_is_busy`.
#![allow(clippy::unwrap_used)]

mod attach;
mod authority;
mod bad_input;
mod change;
mod clients;
mod concurrency;
mod config;
mod cost;
mod detach;
mod foreign;
mod hanging;
mod holders;
mod idle;
mod introspection;
mod isolation;
mod loopctl;
mod loopctl_change;
mod loopctl_mount;
mod losetup;
mod messages;
mod mount;
mod mount_contents;
mod mount_identity;
mod names;
mod numbers;
mod overlap;
mod partitions;
mod present;
mod replies;
mod restart;
mod robustness;
mod same_bytes;
mod signals;
mod soak;
mod throwaway;
mod udev;
mod unlock;
mod warnings;
mod watchdog;

fn main() -> std::process::ExitCode {
    let tests = [
        attach::TESTS,
        signals::TESTS,
        detach::TESTS,
        change::TESTS,
        overlap::TESTS,
        clients::TESTS,
        authority::TESTS,
        bad_input::TESTS,
        loopctl::TESTS,
        loopctl_change::TESTS,
        loopctl_mount::TESTS,
        losetup::TESTS,
        throwaway::TESTS,
        mount::TESTS,
        mount_contents::TESTS,
        mount_identity::TESTS,
        names::TESTS,
        numbers::TESTS,
        same_bytes::TESTS,
        foreign::TESTS,
        hanging::TESTS,
        holders::TESTS,
        messages::TESTS,
        present::TESTS,
        replies::TESTS,
        introspection::TESTS,
        isolation::TESTS,
        udev::TESTS,
        unlock::TESTS,
        partitions::TESTS,
        partitions::damaged::TESTS,
        partitions::superfloppy::TESTS,
        partitions::unprivileged::TESTS,
        restart::TESTS,
        robustness::TESTS,
        concurrency::TESTS,
        soak::TESTS,
        config::TESTS,
        cost::TESTS,
        idle::TESTS,
        warnings::TESTS,
        watchdog::TESTS,
    ];
    loopd_tests::runner::main(tests.concat())
}
