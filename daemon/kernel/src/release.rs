//! The release of the running kernel.

use loopd_engine::Error;

use crate::error::failed;

/// The first release with disk sequence numbers.
const OLDEST: (u32, u32) = (5, 15);

fn too_old(release: &str) -> Error {
    let reason = "it has no disk sequence numbers; loopd needs Linux 5.15 or newer".to_owned();
    Error::NotSupported { operation: format!("run on Linux {release}"), reason }
}

/// Checks that the kernel has disk sequence numbers.
///
/// # Errors
/// `NotSupported` on an older kernel; `Kernel`.
pub fn check() -> Result<(), Error> {
    let name = nix::sys::utsname::uname()
        .map_err(|errno| failed("determine the release of the kernel", "uname", errno))?;
    check_release(&name.release().to_string_lossy())
}

fn check_release(release: &str) -> Result<(), Error> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(|part| part.parse().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version < OLDEST { Err(too_old(release)) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn releases_from_5_15_on_are_accepted() {
        for release in ["5.15.0", "5.15", "5.15.0-91-generic", "6.1.0-18-amd64", "10.0.1"] {
            assert!(check_release(release).is_ok(), "{release}");
        }
    }

    #[test]
    fn older_and_unknown_releases_are_rejected() {
        for release in ["5.14.21", "5.9.0", "4.19.0-27-amd64", "5", "", "unknown"] {
            let message = check_release(release).unwrap_err().to_string();
            assert!(message.contains("needs Linux 5.15 or newer"), "{message}");
        }
    }
}
