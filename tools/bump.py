"""The next version, in settings.ini and in minigpt/__init__.py together.

python tools/bump.py [major|minor|patch|1.2.3]
"""

import re
import sys

from project import INIT, ROOT, settings


def next_version(now, how):
    "`now` with one part raised, or `how` itself when it is a version"
    if re.fullmatch(r"\d+\.\d+\.\d+", how):
        return how
    parts = ["major", "minor", "patch"]
    if how not in parts:
        sys.exit(f"Say major, minor, patch or a version such as 1.2.3, not {how!r}.")
    n = [int(o) for o in now.split(".")]
    i = parts.index(how)
    return ".".join(str(o) for o in n[:i] + [n[i] + 1] + [0] * (2 - i))


def replace(path, pattern, text):
    "Put `text` where `pattern` matches, exactly once"
    new, n = re.subn(pattern, text, path.read_text(encoding="utf-8"), flags=re.M)
    if n != 1:
        sys.exit(f"{path.name}: expected one version line, found {n}; nothing was written to it.")
    path.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    old = settings()["version"]
    new = next_version(old, sys.argv[1] if len(sys.argv) > 1 else "patch")
    replace(INIT, r"^__version__\s*=.*$", f'__version__ = "{new}"')
    replace(ROOT / "settings.ini", r"^version\s*=.*$", f"version = {new}")
    print(f"{old} -> {new}. Now give CHANGELOG.md its entry.")
