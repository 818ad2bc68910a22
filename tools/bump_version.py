"""Sets the version of all four packages: pyproject versions, `==` pins between the layers, `__version__`.

python tools/bump_version.py 0.2.0
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from packaging.version import InvalidVersion, Version
from repository import ROOT, packages, version


def bumped_files(root: Path, new: str) -> dict[Path, str]:
    """New contents by file. ValueError when a file does not state the version exactly where it should."""
    try:
        normalised = str(Version(new)) == new
    except InvalidVersion:
        normalised = False
    if not normalised:
        raise ValueError(f"version: got {new!r}, expected a normalised PEP 440 version such as 0.2.0")
    old = re.escape(version(root))
    contents: dict[Path, str] = {}
    for package in packages(root):
        edits = [(package.pyproject, rf'^(version = "){old}(")$')]
        if package.below:
            edits.append((package.pyproject, rf'^(  "{package.below.distribution}==){old}(",)$'))
        edits.append((package.init_file, rf'^(__version__ = "){old}(")$'))
        for path, pattern in edits:
            text = contents.get(path) or path.read_text()
            text, count = re.subn(pattern, rf"\g<1>{new}\g<2>", text, flags=re.MULTILINE)
            if count != 1:
                raise ValueError(f"{path}: expected exactly one line matching {pattern}, found {count}")
            contents[path] = text
    return contents


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("version", help="the new version, such as 0.2.0")
    new = parser.parse_args(arguments).version
    try:
        contents = bumped_files(ROOT, new)
    except ValueError as error:
        print(f"error: {error}; nothing was changed", file=sys.stderr)
        return 1
    for path, text in contents.items():
        path.write_text(text)
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
