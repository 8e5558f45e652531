#!/usr/bin/env python3
"""Checks that the licence of every linked crate is in the list of deny.toml.

Reads `cargo metadata` from standard input.
"""

import json
import sys
import tomllib

with open("deny.toml", "rb") as rules:
    ALLOWED = set(tomllib.load(rules)["licenses"]["allow"])


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
    sys.exit("licences that deny.toml does not allow:\n  " + "\n  ".join(refused))
print(f"licences of {len(packages)} crates: ok")
