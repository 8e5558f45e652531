#!/usr/bin/env python3
"""Checks that every linked crate may be distributed with ours.

Reads `cargo metadata` from standard input.
"""

import json
import sys

ALLOWED = {"MIT", "Apache-2.0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "Unicode-3.0", "Zlib"}


def acceptable(expression: str) -> bool:
    """Whether an SPDX expression has an allowed choice."""
    plain = expression.replace("/", " OR ").replace("(", "").replace(")", "")
    return all(
        any(choice.split(" WITH ")[0].strip() in ALLOWED for choice in part.split(" OR "))
        for part in plain.split(" AND ")
    )


packages = json.load(sys.stdin)["packages"]
refused = [
    f"{package['name']} {package['version']}: {package['license']}"
    for package in packages
    if not acceptable(package["license"] or "none")
]
if refused:
    sys.exit("licences that are not compatible with ours:\n  " + "\n  ".join(refused))
print(f"licences of {len(packages)} crates: ok")
