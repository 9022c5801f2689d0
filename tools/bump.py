"""Raise the version in settings.ini and in minigpt/__init__.py.

python tools/bump.py [major|minor|patch|1.2.3]
"""

import re
import sys

from project import INIT, ROOT, settings


def next_version(version, part):
    "Return `now` with one part raised, or `how` itself if it is a version."
    if re.fullmatch(r"\d+\.\d+\.\d+", part):
        return part
    parts = ["major", "minor", "patch"]
    if part not in parts:
        sys.exit(f"Expected major, minor, patch or a version such as 1.2.3, not {part!r}.")
    n = [int(o) for o in version.split(".")]
    i = parts.index(part)
    return ".".join(str(o) for o in n[:i] + [n[i] + 1] + [0] * (2 - i))


def replace(path, pattern, text):
    "Replace the only match of `pattern` by `text`."
    new, n = re.subn(pattern, text, path.read_text(encoding="utf-8"), flags=re.M)
    if n != 1:
        sys.exit(f"{path.name}: expected one version line, found {n}; the file is unchanged.")
    path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    old = settings()["version"]
    new = next_version(old, sys.argv[1] if len(sys.argv) > 1 else "patch")
    replace(INIT, r"^__version__\s*=.*$", f'__version__ = "{new}"')
    replace(ROOT / "settings.ini", r"^version\s*=.*$", f"version = {new}")
    print(f"{old} -> {new}. Now add an entry to CHANGELOG.md.")
