"""Check the tree before a commit: `python tools/check.py`.

The modules equal what the notebooks export, notebooks are clean, README.md and the addresses are
up to date, ruff finds nothing, packages import only packages below them, and no more exported cells
than before are too large. It works on a copy and changes nothing.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import address
import cells
import clean
import readme
from project import ROOT, copy_tree, export, exported, notebooks, settings


def files(root):
    return {
        str(p.relative_to(root)): p.read_text(encoding="utf-8")
        for o in exported
        for p in root.glob(o)
    }


def check_export():
    """Return the problems of minigpt/; the copy starts without modules, so one without a notebook
    shows.
    """
    with tempfile.TemporaryDirectory() as d:
        tree = Path(d) / settings()["repo"]
        copy_tree(tree)
        for p in tree.glob("minigpt/**/*.py"):
            if p.name not in ("__init__.py", "__main__.py"):
                p.unlink()  # written by hand
        export(tree)
        here, there = files(ROOT), files(tree)
    return [
        f"{f} differs from what the notebooks export: run `make export`"
        for f in sorted(here.keys() | there.keys())
        if here.get(f) != there.get(f)
    ]


def check_style():
    "Yield what ruff and import-linter find."
    bin_dir = Path(sys.executable).parent
    for command, fix in (
        (["ruff", "format", "--check", "--quiet"], "run `ruff format`"),
        (["ruff", "check", "--quiet", "--output-format", "concise"], "fix it"),
        (["lint-imports", "--no-logo"], "an import must point to a package below"),
    ):
        done = subprocess.run(
            [bin_dir / command[0], *command[1:]], cwd=ROOT, capture_output=True, text=True
        )
        if done.returncode:
            yield f"{' '.join(command[:2])}: {fix}\n{done.stdout}{done.stderr}"


if __name__ == "__main__":
    problems = [*check_style(), *cells.problems(), *check_export()]
    problems += [
        f"{p.relative_to(ROOT)} is not clean: run `make clean-notebooks`"
        for p in clean.unclean(notebooks())
    ]
    problems += [
        f"{p.relative_to(ROOT)} has another address than settings.ini: run `make address`"
        for p in address.changed_files()
    ]
    problems += [f"{p.relative_to(ROOT)} is stale: run `make readme`" for p in readme.stale()]
    for o in problems:
        print(o, file=sys.stderr)
    if problems:
        sys.exit(1)
    print(
        f"{len(notebooks())} notebooks: clean, exported, formatted; README and addresses up to date"
    )
