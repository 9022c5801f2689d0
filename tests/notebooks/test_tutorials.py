"What every tutorial must have: a first screen with its purpose, and no test code."

import json
import re

import pytest
from project import ROOT, directives, joined

FOLDER = ROOT / "nbs" / "tutorials"
NAMES = sorted(p.stem for p in FOLDER.glob("*.ipynb"))
PROMISES = "You get", "It takes", "It runs", "You learn"
NO_GPU = {"inspect_checkpoints", "prepare_and_inspect_data"}
every = pytest.mark.parametrize("name", NAMES)


def load(name):
    return json.loads((FOLDER / f"{name}.ipynb").read_text(encoding="utf-8"))


def cells(name, kind):
    "Return the sources of the cells that the site shows."
    found = [directives(joined(c["source"])) for c in load(name)["cells"] if c["cell_type"] == kind]
    return [source for flags, source in found if "hide" not in flags]


@every
def test_first_cell_states_the_purpose(name):
    first = cells(name, "markdown")[0]
    for part in ("# ", "> ", "[![Open In Colab]", *(f"- **{o}** " for o in PROMISES)):
        assert any(line.startswith(part) for line in first.splitlines()), part


@every
def test_terms_are_explained(name):
    text = "\n".join(cells(name, "markdown"))
    for term in ("*nats*", "*effective batch*"):
        assert term in text, term
    kinds = ("*checkpoint", "*snapshot*", "*best*", "*final*")
    assert name == "resume_after_disconnect" or all(kind in text.lower() for kind in kinds)


@every
def test_test_only_code_is_folded(name):
    for source in cells(name, "code"):
        assert not re.search(r"^\s*assert |IN_TEST", source, re.M), source
    for c in load(name)["cells"]:
        if "# @title" in joined(c["source"]):
            assert c["metadata"] == {"cellView": "form", "jupyter": {"source_hidden": True}}


@every
def test_tutorial_ends_with_next_steps(name):
    *_, last = cells(name, "markdown")
    links = re.findall(r"\]\((\w+\.ipynb)\)", last)
    assert last.startswith("## Next steps") and len(set(links)) >= 2
    assert all((FOLDER / o).exists() for o in links)


@every
def test_colab_opens_on_a_gpu_where_one_helps(name):
    metadata = load(name)["metadata"]
    assert (metadata.get("accelerator") == "GPU") == (name not in NO_GPU)
    assert name in NO_GPU or metadata["colab"]["gpuType"] == "T4"


def test_tutorials_write_to_different_runs():
    runs = {}
    for name in NAMES:
        for source in cells(name, "code"):
            for run in re.findall(r"output_dir\"?[=:] ?f?\"([^\"]+)\"", source):
                runs.setdefault(run, set()).add(name)
    shared = {run: names for run, names in runs.items() if len(names) > 1}
    assert shared == {"runs/my-gpt": {"resume_after_disconnect", "train_with_drive"}}
