"""List exported cells that are too large: `python tools/cells.py`.

A cell has one idea: at most 60 lines and 3 definitions. A class whose methods belong together may
have 150 lines if CLASSES names it. tools/cells.json holds the number of larger cells of each
notebook; the numbers only fall: `--write` lowers them.
"""

import ast
import json
import sys
from collections import Counter

from project import ROOT, directives, joined, lessons

LINES, DEFINITIONS, CLASS = 60, 3, 150
CLASSES = (
    "Backup",
    "CheckpointStore",
    "ChatBox",
    "ChatSet",
    "DecodeStep",
    "EventWriter",
    "GPT",
    "GPTConfig",
    "Guard",
    "LiveLoss",
    "Mixture",
    "TokenSet",
    "Trainer",
    "Writer",
    "RunTrainer",
)
COUNTS = ROOT / "tools" / "cells.json"


def excess(source):
    "Return why an exported cell is too large, or an empty string."
    body = ast.parse(source).body
    defined = [o for o in body if isinstance(o, (ast.FunctionDef, ast.ClassDef))]
    lines = len(source.splitlines())
    if len(defined) == 1 and defined[0].name in CLASSES and lines <= CLASS:
        return ""
    if lines > LINES:
        return f"{lines} lines"
    return f"{len(defined)} definitions" if len(defined) > DEFINITIONS else ""


def large_cells():
    "Return (notebook, first name, reason) of each exported cell that is too large."
    for path in lessons():
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            flags, source = directives(joined(cell["source"]))
            if cell["cell_type"] != "code" or not flags.keys() & {"export", "exporti"}:
                continue
            if why := excess(source):
                body = ast.parse(source).body
                name = next((o.name for o in body if hasattr(o, "name")), ast.unparse(body[0])[:40])
                yield path.relative_to(ROOT / "nbs").as_posix(), name, why


def problems():
    "Return notebooks whose number of large cells differs from tools/cells.json."
    before = json.loads(COUNTS.read_text(encoding="utf-8"))
    now = Counter(path for path, *_ in large_cells())
    for path in sorted({*before, *now}):
        had, has = before.get(path, 0), now[path]
        if has > had:
            yield f"nbs/{path} has {has} cells that say too much, {had} before: cut them in two"
        elif has < had:
            yield f"nbs/{path} has {has} such cells, {had} before: `python tools/cells.py --write`"


if __name__ == "__main__":
    found = list(large_cells())
    if "--write" in sys.argv:
        counts = Counter(path for path, *_ in found)
        COUNTS.write_text(json.dumps(counts, indent=1) + "\n", encoding="utf-8")
    for path, name, why in found:
        print(f"{path}: {name}, {why}")
    print(len(found), "cells")
