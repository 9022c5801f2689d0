"""Check the tree with the installed nbdev (`make compat-nbdev`: 2.4), on a copy.

    python tools/compat_nbdev.py [notebook ...]

The export must give the same code, and the notebooks must pass. nbdev 2.4 writes only the first `>`
line as the docstring of a module, nbdev 3 also the exported Markdown cells. So the docstrings of
modules are not compared; the rest must be equal.
"""

import ast
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from project import ROOT, copy_tree, export, lessons, settings


def code(text):
    "Return a module as a syntax tree, without its docstring."
    tree = ast.parse(text)
    if ast.get_docstring(tree) is not None:
        tree.body.pop(0)
    return ast.dump(tree)


if __name__ == "__main__":
    chosen = sys.argv[1:] or [p.relative_to(ROOT).as_posix() for p in lessons()[:3]]
    with tempfile.TemporaryDirectory() as d:
        tree = Path(d) / settings()["repo"]
        copy_tree(tree)
        for p in tree.glob("minigpt/**/*.py"):
            if not p.name.startswith("_"):
                p.unlink()
        export(tree, "nbdev_export")
        modules = [
            p.relative_to(ROOT)
            for p in sorted((ROOT / "minigpt").rglob("*.py"))
            if p.name != "_modidx.py"
        ]
        wrong = [
            str(m)
            for m in modules
            if not (tree / m).exists()
            or code((tree / m).read_text()) != code((ROOT / m).read_text())
        ]
        if wrong:
            sys.exit("nbdev 2.4 exports different code: " + ", ".join(wrong))
        print(f"nbdev 2.4 exports the same code: {len(modules)} modules")
        env = {**os.environ, "PYTHONPATH": str(tree)}
        for nb in chosen:
            r = subprocess.run(
                [
                    Path(sys.executable).parent / "nbdev_test",
                    "--path",
                    nb,
                    "--do_print",
                    "--timing",
                ],
                cwd=tree,
                env=env,
                stdin=subprocess.DEVNULL,
            )
            if r.returncode:
                sys.exit(r.returncode)
