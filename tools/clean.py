"""Clean notebooks for a commit: the given ones, or all of nbs/.

    python tools/clean.py [--check] [notebook ...]

It does what nbdev-clean does (it removes execution counts and stray metadata; `accelerator` and
`colab` stay, so that a GPU notebook opens on a GPU, and so do `cellView` and `jupyter`, which fold
a cell), and removes the state of widgets, which is large and useless once the kernel is gone.
"""

import json
import sys
from pathlib import Path

from fastcore.nbio import nb2str
from nbdev.clean import clean_nb
from nbdev.config import get_config
from project import ROOT, notebooks

view = "application/vnd.jupyter.widget-view+json"


def without_widgets(outputs):
    "Return `outputs` without widget views; an output with nothing else is dropped."
    res = []
    for o in outputs:
        data = o.get("data", {})
        if view in data and not set(data) - {view, "text/plain"}:
            continue
        data.pop(view, None)
        res.append(o)
    return res


def clean_text(text):
    "Return the cleaned text of a notebook."
    nb, cfg = json.loads(text), get_config(ROOT)
    kept = ("allowed_metadata_keys", "allowed_cell_metadata_keys")
    clean_nb(nb, **{k: cfg.get(k) for k in kept}, clean_ids=cfg.clean_ids)
    nb["metadata"].pop("widgets", None)
    for cell in nb["cells"]:
        if "outputs" in cell:
            cell["outputs"] = without_widgets(cell["outputs"])
    return nb2str(nb)


def unclean(paths):
    "Return those of `paths` that cleaning would change: path → new text."
    texts = {p: p.read_text(encoding="utf-8") for p in paths}
    return {p: new for p, text in texts.items() if (new := clean_text(text)) != text}


if __name__ == "__main__":
    paths = [Path(o) for o in sys.argv[1:] if o != "--check"] or notebooks()
    found = unclean(paths)
    for path, text in found.items():
        if "--check" in sys.argv:
            print(f"{path} is not clean: run `make clean-notebooks`")
        else:
            path.write_text(text, encoding="utf-8")
            print(f"cleaned {path}")
    if "--check" in sys.argv:
        sys.exit(bool(found))
