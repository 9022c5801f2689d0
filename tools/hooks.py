"""Set up git in this clone: merge notebooks with nbdev-merge, refuse commits of unclean ones.

nbdev-install-hooks also writes to Jupyter's configuration in the home folder and needs nbdev on
PATH for every git command. Undo: `git config --remove-section merge.jupyternotebook`, and remove
the hook.
"""

import subprocess
import sys
from pathlib import Path

from project import ROOT

hook = """#!/bin/sh
# Written by `make hooks`: refuses a commit with files that ruff would change or complain of, or
# with a notebook that is not clean.
staged() {{ git diff --cached --name-only -z --diff-filter=ACM -- "$@"; }}
staged '*.ipynb' '*.py' | xargs -0 -r "{bin}/ruff" format --check --quiet --force-exclude || exit 1
staged '*.ipynb' '*.py' | xargs -0 -r "{bin}/ruff" check --quiet --force-exclude || exit 1
staged '*.ipynb' | xargs -0 -r "{bin}/python" tools/clean.py --check
"""


def git(*args):
    return subprocess.run(
        ["git", *args], cwd=ROOT, check=True, text=True, capture_output=True
    ).stdout.strip()


if __name__ == "__main__":
    python = Path(sys.executable)
    git("config", "merge.jupyternotebook.name", "merge notebooks by nbdev")
    git("config", "merge.jupyternotebook.driver", f'"{python.parent / "nbdev-merge"}" %O %A %B %P')
    path = ROOT / git("rev-parse", "--git-path", "hooks") / "pre-commit"
    if path.exists() and "make hooks" not in path.read_text():
        sys.exit(
            f"{path} is not our hook and is unchanged. Add to it:\n{hook.format(bin=python.parent)}"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(hook.format(bin=python.parent))
    path.chmod(0o755)
    print("nbdev-merge merges notebooks, and each commit checks them.")
