//! The unit of `loopd-unlock`: a sandbox for the program that parses headers which users have chosen.

use std::os::fd::BorrowedFd;
use std::path::Path;

use zbus::Variant;
use zbus::wire::Fd;

use crate::systemd::UnitProperties;

/// How much memory the derivation of a key may use, in bytes. cryptsetup asks for at most 1 GiB when it makes a key.
/// A drop-in for `loopd-unlock-.service` can change this.
const MOST_MEMORY: u64 = 1536 << 20;
/// The device mapper's ioctls need it.
const CAP_SYS_ADMIN: u64 = 1 << 21;
const INFINITY: u64 = u64::MAX;
/// How long the program may take to end once it is stopped, in microseconds.
const STOP_TIMEOUT: u64 = 10_000_000;

/// The properties of the unit, as the service manager's bus interface has them. `volume` is the node that the program
/// may open.
pub fn properties<'a>(
    program: &Path,
    volume: Option<&str>,
    socket: BorrowedFd<'a>,
    operation: &str,
) -> UnitProperties<'a> {
    let program = program.to_string_lossy().into_owned();
    let command = vec![(program.clone(), vec![program], vec!["no-env-expand".to_owned()])];
    let mut properties = vec![
        ("Description", format!("loopd: {operation}").into()),
        // The job ends when the program runs.
        ("Type", "exec".into()),
        ("ExecStartEx", Variant::new(command)),
        // The only descriptor that the service manager gets. Its other end is loopd's.
        ("StandardInputFileDescriptor", Fd::from(socket).into()),
        ("StandardOutput", "null".into()),
        ("StandardError", "journal".into()),
        ("CollectMode", "inactive-or-failed".into()),
        ("TimeoutStopUSec", STOP_TIMEOUT.into()),
        // Memory that is missing ends cryptsetup, and loopd-unlock reports it.
        ("OOMPolicy", "continue".into()),
        ("MemoryMax", MOST_MEMORY.into()),
        ("MemorySwapMax", 0_u64.into()),
        ("TasksMax", 32_u64.into()),
        ("LimitCORE", 0_u64.into()),
        ("LimitMEMLOCK", INFINITY.into()),
        // cryptsetup's locks.
        ("RuntimeDirectory", Variant::new(vec!["cryptsetup".to_owned()])),
        ("RuntimeDirectoryMode", 0o700_u32.into()),
        ("RuntimeDirectoryPreserve", "yes".into()),
    ];
    properties.extend(devices(volume));
    properties.extend(restrictions());
    properties
}

/// The device mapper's control, and the volume. The nodes of mappings are not opened.
fn devices<'a>(volume: Option<&str>) -> UnitProperties<'a> {
    let mut allowed = vec![("/dev/mapper/control".to_owned(), "rw".to_owned())];
    // cryptsetup opens it for writing even if the mapping is read-only.
    allowed.extend(volume.map(|node| (node.to_owned(), "rw".to_owned())));
    vec![("DevicePolicy", "closed".into()), ("DeviceAllow", Variant::new(allowed))]
}

fn restrictions<'a>() -> UnitProperties<'a> {
    let list = |is_allowed: bool, names: &[&'static str]| {
        Variant::new((is_allowed, names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>()))
    };
    let mut properties: UnitProperties<'a> = vec![
        ("CapabilityBoundingSet", CAP_SYS_ADMIN.into()),
        ("AmbientCapabilities", 0_u64.into()),
        ("ProtectSystem", "strict".into()),
        ("ProtectHome", "yes".into()),
        ("ProtectProc", "invisible".into()),
        ("KeyringMode", "private".into()),
        ("UMask", 0o077_u32.into()),
        // No namespace may be made.
        ("RestrictNamespaces", 0_u64.into()),
        // AF_ALG: the kernel's ciphers, for the keys in the header.
        ("RestrictAddressFamilies", list(true, &["AF_UNIX", "AF_ALG"])),
        ("SystemCallArchitectures", Variant::new(vec!["native".to_owned()])),
        ("SystemCallFilter", list(true, &["@system-service"])),
        ("SystemCallFilter", list(false, &["@privileged", "@resources"])),
        ("SystemCallErrorNumber", (nix::errno::Errno::EPERM as i32).into()),
    ];
    // Not PrivateIPC=: cryptsetup and udev wait for each other with a semaphore of System V.
    let switches = [
        "NoNewPrivileges",
        "PrivateTmp",
        "PrivateMounts",
        "PrivateNetwork",
        "ProtectKernelTunables",
        "ProtectKernelModules",
        "ProtectKernelLogs",
        "ProtectControlGroups",
        "ProtectClock",
        "ProtectHostname",
        "RestrictRealtime",
        "RestrictSUIDSGID",
        "LockPersonality",
        "MemoryDenyWriteExecute",
    ];
    properties.extend(switches.map(|name| (name, true.into())));
    properties
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;

    use super::*;

    #[test]
    fn only_the_volume_is_allowed() {
        let allowed = |volume| {
            let (_, value) = devices(volume).into_iter().find(|(name, _)| *name == "DeviceAllow").unwrap();
            Vec::<(String, String)>::try_from(value).unwrap()
        };
        let pair = |node: &str, access: &str| (node.to_owned(), access.to_owned());
        assert_eq!(allowed(None), [pair("/dev/mapper/control", "rw")]);
        assert_eq!(allowed(Some("/dev/loop0p1"))[1..], [pair("/dev/loop0p1", "rw")]);
    }

    #[test]
    fn the_types_are_those_of_the_service_manager() {
        let stdin = std::io::stdin();
        let properties = properties(Path::new("/usr/libexec/loopd-unlock"), None, stdin.as_fd(), "unlock x");
        for (name, signature) in [
            ("ExecStartEx", "a(sasas)"),
            ("StandardInputFileDescriptor", "h"),
            ("MemoryMax", "t"),
            ("RuntimeDirectory", "as"),
            ("RuntimeDirectoryMode", "u"),
            ("DeviceAllow", "a(ss)"),
            ("RestrictNamespaces", "t"),
            ("SystemCallFilter", "(bas)"),
            ("SystemCallErrorNumber", "i"),
            ("RestrictAddressFamilies", "(bas)"),
            ("NoNewPrivileges", "b"),
        ] {
            let (_, value) = properties.iter().find(|(property, _)| *property == name).unwrap();
            assert_eq!(value.value_signature().to_string(), signature, "{name}");
        }
    }
}
