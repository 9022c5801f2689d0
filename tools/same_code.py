"""Is the code equal to that of another revision except for layout? `python tools/same_code.py REV`.

Formatting, split cells and moved files change no syntax tree: every statement of a notebook or
module is compared with REV by its tree. `--moved FILE` is a JSON object of renamed files
("nbs/old.ipynb": "nbs/new.ipynb") and modules ("minigpt.old": "minigpt.new"); `--docstrings`
ignores docstrings. Differences are listed for review.
"""

import argparse
import ast
import inspect
import json
import subprocess
import sys
from collections import Counter
from pathlib import PurePosixPath

from project import ROOT, joined

FOLDERS = ("nbs", "tests", "tools", "bench", "examples")


class Layout(ast.NodeTransformer):
    "Normalize what a formatter may change, and rename moved modules."

    def __init__(self, moved, docstrings):
        self.moved, self.docstrings = moved, docstrings

    def visit_ImportFrom(self, node):
        node.module = self.moved.get(node.module, node.module)
        return node

    def visit_Expr(self, node):
        value = node.value
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            value.value = "" if self.docstrings else inspect.cleandoc(value.value)
        return self.generic_visit(node)

    def visit_JoinedStr(self, node):
        "Adjacent literals of an f-string stay separate parts in some versions of Python."
        self.generic_visit(node)
        parts = []
        for part in node.values:
            if isinstance(part, ast.Constant) and parts and isinstance(parts[-1], ast.Constant):
                part = ast.Constant(parts.pop().value + part.value)
            parts.append(part)
        node.values = parts
        return node


def without_magics(source):
    "Return the Python code of a cell: lines for IPython (`%time`, `!pip`) become comments."
    lines = source.splitlines()
    if lines and lines[0].startswith("%%"):
        return ""
    return "\n".join("pass" if o.lstrip().startswith(("%", "!")) else o for o in lines)


def sources(path, text):
    "Return the pieces of Python in a file: the cells of a notebook, or the complete module."
    if not path.endswith(".ipynb"):
        return [text]
    cells = json.loads(text)["cells"]
    return [without_magics(joined(o["source"])) for o in cells if o["cell_type"] == "code"]


def statements(path, text, layout):
    "Count the top-level statements of a file by path, name and tree."
    found = Counter()
    for source in sources(path, text):
        for node in ast.parse(source).body:
            node = layout.visit(node)
            name = getattr(node, "name", None) or ast.unparse(node).splitlines()[0][:60]
            found[name, ast.dump(node)] += 1
    return {(path, name, tree, n) for (name, tree), n in found.items()}


def git(*args):
    return subprocess.run(
        ["git", *args], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout


def is_compared(path):
    return path.endswith((".py", ".ipynb")) and PurePosixPath(path).parts[0] in FOLDERS


def working_tree():
    "Yield path and text of every file of the working tree."
    for path in git("ls-files", "--cached", "--others", "--exclude-standard").splitlines():
        if is_compared(path) and (ROOT / path).exists():
            yield path, (ROOT / path).read_text(encoding="utf-8")


def files_of(revision):
    "Yield path and text of every file of `revision`."
    for path in git("ls-tree", "-r", "--name-only", revision).splitlines():
        if is_compared(path):
            yield path, git("show", f"{revision}:{path}")


def differences(revision, layout):
    "Return one line for each statement that is in one tree only."
    moved = layout.moved
    old = {o for p, text in files_of(revision) for o in statements(moved.get(p, p), text, layout)}
    new = {o for p, text in working_tree() for o in statements(p, text, layout)}
    for sign, found in ("-", old - new), ("+", new - old):
        for path, name, _, n in sorted(found):
            yield f"{sign} {path}: {name}" + (f" ({n} times)" if n > 1 else "")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", help="git revision to compare with")
    parser.add_argument("--moved", help="JSON file: old → new names of files and modules")
    parser.add_argument("--docstrings", action="store_true", help="ignore docstrings")
    return parser.parse_args()


if __name__ == "__main__":
    args = arguments()
    moved = {}
    if args.moved:
        with open(args.moved, encoding="utf-8") as f:
            moved = json.load(f)
    found = list(differences(args.revision, Layout(moved, args.docstrings)))
    print(*found, sep="\n")
    print(f"{len(found)} statements differ" if found else f"the same code as {args.revision}")
    sys.exit(bool(found))
