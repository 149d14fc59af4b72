"""Writes what pyproject.toml asks for as requirement files, so that an image can install that before the package itself.

`run.txt` is what every run needs, `NAME.txt` what the extra NAME adds.
"""

import sys
import tomllib
from pathlib import Path


def main(pyproject: Path, folder: Path) -> None:
    project = tomllib.loads(pyproject.read_text(encoding="utf-8"))["project"]
    for name, needed in ({"run": project["dependencies"]} | project["optional-dependencies"]).items():
        (folder / f"{name}.txt").write_text("".join(f"{line}\n" for line in needed), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
