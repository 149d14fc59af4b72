"""The two npm packages the pair is made from: pictures of emoji, and the names that people give them.

Both are MIT; their notices ship with the weights (`notices/LICENSE.md`). They are fetched with npm, whose settings say from
where, and checked against the digests below before anything is unpacked.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tarfile
from dataclasses import dataclass
from pathlib import Path

from demo.errors import DemoError
from demo.scenes import OBJECTS


@dataclass(frozen=True)
class Package:
    """A package at one version, the SHA-256 of its tarball, and the part of it that is unpacked."""

    name: str
    version: str
    sha256: str
    wanted: str

    @property
    def spec(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def tarball(self) -> str:
        return f"{self.name.removeprefix('@').replace('/', '-')}-{self.version}.tgz"


SPRITES = Package(
    "@lobehub/fluent-emoji-3d", "1.1.0", "c1bb7eee7de090205a232518a9ab4adb3df458bfbe8a1f78232991194c8b2e58", "assets/"
)
NAMES = Package("emojibase-data", "17.0.0", "d01d0e2ca4e22cb402679532155342c71e2e871f25c32223c013b8b166ebdf5a", "en/data.json")


def fetch(work: Path) -> Path:
    """Both packages, unpacked below `work/npm`; returns the folder of the sprites. Does nothing where they are there."""
    sprites = _unpacked(work / "npm", SPRITES) / "assets"
    check_names(_unpacked(work / "npm", NAMES) / "en" / "data.json")
    return sprites


def check_names(data: Path) -> None:
    """Every object must be called by a word that the emoji's label or tags in `emojibase-data` hold."""
    entries = {entry["hexcode"].lower(): entry for entry in json.loads(data.read_text(encoding="utf-8"))}
    for item in OBJECTS:
        entry = entries.get(item.codepoint) or entries.get(item.codepoint.removesuffix("-fe0f")) or {}
        if item.name not in {*entry.get("label", "").split(), *entry.get("tags", ())}:
            raise DemoError(
                f"{NAMES.spec} does not call {item.codepoint} {item.name!r} but {entry.get('label', 'nothing')!r}: "
                "correct OBJECTS in demo/scenes.py"
            )


def _unpacked(npm: Path, package: Package) -> Path:
    target = npm / package.tarball.removesuffix(".tgz")
    if target.is_dir():
        return target
    npm.mkdir(parents=True, exist_ok=True)
    tarball = npm / package.tarball
    if not tarball.is_file():
        _pack(npm, package)
    digest = hashlib.sha256(tarball.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise DemoError(f"{tarball} is not {package.spec} (SHA-256 {digest}, not {package.sha256}): remove it and run again")
    part = target.with_name(f"{target.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(tarball) as archive:
        archive.extractall(part, [m for m in archive if m.name.startswith(f"package/{package.wanted}")], filter="data")
    (part / "package").rename(target)
    part.rmdir()
    return target


def _pack(npm: Path, package: Package) -> None:
    by_hand = f"Put {package.tarball} into {npm} by hand (`npm pack {package.spec}` elsewhere makes it) and run again"
    try:
        done = subprocess.run(["npm", "pack", "--silent", package.spec], cwd=npm, capture_output=True, text=True)
    except FileNotFoundError:
        raise DemoError(f"npm is not installed, which fetches {package.spec}. {by_hand}") from None
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DemoError(f"npm could not fetch {package.spec}: {last}. {by_hand}")
