//! Checks the layers of `CONTRIBUTING.md`: which crate may use which, and where unsafe code may be.

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    use serde_json::Value;

    use crate::bus::repository;

    /// A crate and what it may use.
    struct Layer {
        name: &'static str,
        /// Our crates that it may name in `[dependencies]`.
        below: &'static [&'static str],
        /// Crates that it must not depend on, directly or indirectly.
        free_of: &'static [&'static str],
    }

    /// Crates that access the system outside of the process.
    const INPUT_AND_OUTPUT: &[&str] = &["linux-raw-sys", "nix", "rustix", "tokio", "udev", "zbus"];
    const SYSTEM_CALLS_AND_BUS: &[&str] = &["linux-raw-sys", "nix", "rustix", "udev", "zbus"];

    /// All our crates, the lowest first.
    const LAYERS: &[Layer] = &[
        Layer { name: "loopd-test-support", below: &[], free_of: INPUT_AND_OUTPUT },
        Layer { name: "loopd-common", below: &[], free_of: INPUT_AND_OUTPUT },
        Layer { name: "loopd-partition-table", below: &[], free_of: INPUT_AND_OUTPUT },
        Layer { name: "loopd-engine", below: &["loopd-common"], free_of: SYSTEM_CALLS_AND_BUS },
        Layer {
            name: "loopd-kernel",
            below: &["loopd-common", "loopd-engine", "loopd-partition-table"],
            free_of: &["zbus"],
        },
        Layer { name: "loopd-unlock", below: &["loopd-common"], free_of: &["nix", "tokio", "udev", "zbus"] },
        Layer { name: "loopd-dbus", below: &["loopd-common"], free_of: &["nix", "udev"] },
        Layer { name: "loopctl", below: &["loopd-common", "loopd-dbus"], free_of: &["udev"] },
        Layer {
            name: "loopd",
            below: &["loopd-common", "loopd-dbus", "loopd-engine", "loopd-kernel", "loopd-unlock"],
            free_of: &[],
        },
        Layer { name: "loopd-tests", below: &["loopctl", "loopd-dbus"], free_of: &[] },
    ];

    /// What the tests of any crate may use in addition.
    const SUPPORT: &str = "loopd-test-support";

    /// The only files that may allow unsafe code.
    const UNSAFE: &[&str] = &[
        "daemon/kernel/src/ioctl.rs",
        "daemon/kernel/src/memory.rs",
        "daemon/kernel/src/readiness.rs",
        "tests/src/loop_ioctl.rs",
    ];

    fn cargo(arguments: &[&str]) -> String {
        let output = Command::new(env!("CARGO")).args(arguments).current_dir(repository()).output().unwrap();
        assert!(output.status.success(), "cargo {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// The packages of the workspace, from cargo metadata.
    fn packages() -> Vec<Value> {
        let metadata = cargo(&["metadata", "--offline", "--locked", "--no-deps", "--format-version", "1"]);
        let metadata: Value = serde_json::from_str(&metadata).unwrap();
        metadata["packages"].as_array().unwrap().clone()
    }

    /// The dependencies in the manifest of a package: name, and whether only its tests use it.
    fn dependencies(package: &Value) -> Vec<(&str, bool)> {
        let named = package["dependencies"].as_array().unwrap().iter();
        named.map(|one| (one["name"].as_str().unwrap(), one["kind"] == "dev")).collect()
    }

    fn is_ours(name: &str) -> bool {
        LAYERS.iter().any(|layer| layer.name == name)
    }

    #[test]
    fn every_crate_has_a_layer() {
        let packages = packages();
        let mut members: Vec<&str> = packages.iter().map(|one| one["name"].as_str().unwrap()).collect();
        let mut layers: Vec<&str> = LAYERS.iter().map(|layer| layer.name).collect();
        members.sort_unstable();
        layers.sort_unstable();
        assert_eq!(members, layers, "the table of layers is not the list of the workspace's members");
    }

    #[test]
    fn no_crate_uses_one_above_it() {
        for package in packages() {
            let name = package["name"].as_str().unwrap();
            let layer = LAYERS.iter().find(|layer| layer.name == name).unwrap();
            for (used, is_for_tests) in dependencies(&package) {
                let is_allowed = layer.below.contains(&used) || is_for_tests && used == SUPPORT;
                assert!(
                    !is_ours(used) || is_allowed,
                    "{name} depends on {used}, which is not below it; see CONTRIBUTING.md"
                );
            }
        }
    }

    #[test]
    fn no_crate_reaches_what_its_layer_is_free_of() {
        for layer in LAYERS.iter().filter(|layer| !layer.free_of.is_empty()) {
            let tree = cargo(&[
                "tree",
                "--offline",
                "--locked",
                "--edges",
                "normal",
                "--all-features",
                "--prefix",
                "none",
                "--format",
                "{p}",
                "--package",
                layer.name,
            ]);
            let reached: Vec<&str> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
            assert_eq!(reached.first(), Some(&layer.name));
            for banned in layer.free_of {
                assert!(
                    !reached.contains(banned),
                    "{} reaches {banned}; `cargo tree -p {} -i {banned}` shows how",
                    layer.name,
                    layer.name
                );
            }
        }
    }

    /// The Rust sources below a directory.
    fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(directory).unwrap().map(Result::unwrap) {
            let path = entry.path();
            if path.is_dir() {
                sources(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }

    #[test]
    fn unsafe_code_is_allowed_in_these_files_only() {
        // In two parts: this file would find itself.
        let lifts = concat!("allow(", "unsafe_code)");
        let mut files = Vec::new();
        for directory in ["client", "daemon", "dbus", "tests"] {
            sources(&repository().join(directory), &mut files);
        }
        let mut allowed: Vec<String> = files
            .iter()
            .filter(|file| fs::read_to_string(file).unwrap().contains(lifts))
            .map(|file| file.strip_prefix(repository()).unwrap().to_str().unwrap().to_owned())
            .collect();
        allowed.sort_unstable();
        assert_eq!(allowed, UNSAFE);
    }

    #[test]
    fn a_crate_without_unsafe_code_forbids_it() {
        for package in packages() {
            let manifest = Path::new(package["manifest_path"].as_str().unwrap());
            let crate_directory = manifest.parent().unwrap();
            let has_unsafe_code =
                UNSAFE.iter().any(|file| repository().join(file).starts_with(crate_directory.join("src")));
            let roots = ["src/lib.rs", "src/main.rs"].map(|root| crate_directory.join(root));
            let root = roots.iter().find(|root| root.exists()).unwrap();
            let forbids =
                fs::read_to_string(root).unwrap().lines().any(|line| line == "#![forbid(unsafe_code)]");
            assert_eq!(forbids, !has_unsafe_code, "#![forbid(unsafe_code)] in {}", root.display());
        }
    }

    /// The third-party lines of `[workspace.dependencies]`: name, and the comment in the line before.
    fn shared_dependencies(manifest: &str) -> Vec<(&str, Option<&str>)> {
        let lines = manifest.lines().skip_while(|line| *line != "[workspace.dependencies]").skip(1);
        let lines: Vec<&str> = lines.take_while(|line| !line.starts_with('[')).collect();
        let mut found = Vec::new();
        let mut before = None;
        for line in lines {
            let comment = line.strip_prefix("# ");
            if let Some((name, _)) = line.split_once(" = ")
                && comment.is_none()
                && !is_ours(name)
            {
                found.push((name, before));
            }
            before = comment;
        }
        found
    }

    #[test]
    fn each_shared_dependency_has_a_reason_and_a_user() {
        let manifest = fs::read_to_string(repository().join("Cargo.toml")).unwrap();
        let packages = packages();
        let used: Vec<&str> = packages.iter().flat_map(dependencies).map(|(name, _)| name).collect();
        let shared = shared_dependencies(&manifest);
        assert!(shared.len() > 20, "[workspace.dependencies] was not read");
        for (name, reason) in &shared {
            assert!(reason.is_some(), "Cargo.toml does not say in the line before {name} what it is for");
            assert!(used.contains(name), "no crate uses {name}; take it out of Cargo.toml");
        }
        for name in used.iter().filter(|name| !is_ours(name)) {
            assert!(shared.iter().any(|(one, _)| one == name), "{name} is not in [workspace.dependencies]");
        }
    }
}
