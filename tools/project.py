"Shared by the tools and tests/unit/project: paths, and the contents of settings.ini."

import os
import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INIT = ROOT / "minigpt" / "__init__.py"
# Folders of nbs/ and minigpt/ in reading order: a package imports only those before it, and the
# modules at the root come last.
PACKAGES = ("core", "tokenizer", "config", "data", "model", "checkpoint", "run", "train", "")
exported = ["minigpt/**/*.py", "nbs/llms.txt"]  # written by nbdev-export


def settings(root=ROOT):
    "Return settings.ini as a mapping."
    ini = ConfigParser(delimiters=["="])
    ini.read(root / "settings.ini", encoding="utf-8")
    return ini["DEFAULT"]


def notebooks(root=ROOT):
    "Return every notebook of the project, in reading order."
    return sorted(
        p
        for p in (root / "nbs").rglob("*.ipynb")
        if not any(part.startswith((".", "_")) for part in p.relative_to(root).parts)
    )


def lessons(root=ROOT):
    "Return the notebooks that are exported, in reading order."
    return [p for o in PACKAGES for p in sorted((root / "nbs" / o).glob("[0-9]*.ipynb"))]


def joined(o):
    "Return the text of a notebook, which is stored as a string or a list of lines."
    return o if isinstance(o, str) else "".join(o)


def directives(source):
    "Return a code cell's `#| name value` lines as a dict, and the source without them."
    found, lines = {}, source.splitlines()
    while lines and (m := re.match(r"#\s*\|\s*([\w-]+)\s*:?\s*(.*)", lines[0])):
        found[m[1]] = m[2].strip()
        lines.pop(0)
    return found, "\n".join(lines).strip("\n")


def copy_tree(dest, root=ROOT):
    "Copy what the export needs to `dest`: configuration, notebooks, modules."
    names = ["settings.ini", "pyproject.toml", "setup.py"]
    files = (
        [root / o for o in names] + notebooks(root) + [p for o in exported for p in root.glob(o)]
    )
    for f in files:
        to = dest / f.relative_to(root)
        to.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(f, to)


def export(root, command="nbdev-export"):
    "Run `command` of this Python's environment in `root`."
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    r = subprocess.run(
        [Path(sys.executable).parent / command],
        cwd=root,
        env=env,
        stdin=subprocess.DEVNULL,
        text=True,
        capture_output=True,
    )
    if r.returncode:
        sys.exit(f"{command} failed:\n{r.stdout}{r.stderr}")
