#!/usr/bin/env python3
"""Prints the licences of the crates that are linked into the programs: most require that their text is distributed."""

import collections
import json
import os
import pathlib
import re
import subprocess
import sys

PROGRAMS = ("loopd", "loopctl")


def metadata() -> dict:
    """The metadata of the workspace, for this platform."""
    about = subprocess.run(["rustc", "-vV"], check=True, capture_output=True, text=True).stdout
    platform = re.search(r"^host: (.*)$", about, re.MULTILINE)[1]
    command = [os.environ.get("CARGO", "cargo"), "metadata", "--format-version=1", "--locked"]
    command.append(f"--filter-platform={platform}")
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def linked(metadata: dict) -> list[dict]:
    """The third-party crates, by name and version."""
    packages = {package["id"]: package for package in metadata["packages"]}
    nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}
    found = {package["id"] for package in packages.values() if package["name"] in PROGRAMS}
    waiting = list(found)
    while waiting:
        for dependency in nodes[waiting.pop()]["deps"]:
            is_linked = any(kind["kind"] is None for kind in dependency["dep_kinds"])
            if is_linked and dependency["pkg"] not in found:
                found.add(dependency["pkg"])
                waiting.append(dependency["pkg"])
    others = (packages[name] for name in found if packages[name]["source"])
    return sorted(others, key=lambda package: (package["name"], package["version"]))


def texts(package: dict) -> list[str]:
    """The licence texts next to the crate's manifest."""
    directory = pathlib.Path(package["manifest_path"]).parent
    names = ("license", "licence", "copying", "copyright", "notice", "unlicense")
    files = sorted(path for path in directory.iterdir() if path.name.lower().startswith(names) and path.is_file())
    return [path.read_text(errors="replace").strip() for path in files]


crates = linked(metadata())
if not crates:
    sys.exit("third-party.py: no third-party crates found")
users = collections.defaultdict(list)
print(f"{' and '.join(PROGRAMS)} contain these crates:\n")
for crate in crates:
    name = f"{crate['name']} {crate['version']}"
    found = texts(crate)
    for text in found:
        users[text].append(name)
    print(f"{name}: {crate['license']}" + ("" if found else " (the crate has no licence text)"))
    print("\n".join(f"    {author}" for author in crate["authors"]) or f"    {crate['repository']}")
for text, names in users.items():
    print("\n" + "-" * 78 + "\n" + ", ".join(names) + "\n\n" + text)
