"The documentation site builds in strict mode and contains what it should."

import re
import subprocess
import sys

import pytest
from project import ROOT

pytest.importorskip("material", reason="pip install mkdocs-material, to build the documentation")


@pytest.fixture(scope="module")
def site():
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "docs.py"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-1500:] + done.stderr[-1500:]
    return ROOT / "_docs" / "site"


def read_text(path):
    return re.sub(r"<[^>]+>", "", path.read_text(encoding="utf-8"))


def test_pages_have_their_contents(site):
    from docs import MODULES, TUTORIALS, WRITTEN, reference

    for page in [
        *(reference(m).removesuffix(".md") for m in MODULES),
        *(f"tutorials/{t}" for t in TUTORIALS),
        *(p.removesuffix("index") for p in WRITTEN),
        "",
    ]:
        assert (site / page / "index.html").exists(), page
    assert {p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")} <= {
        *WRITTEN.values()
    }
    assert {p.stem for p in (ROOT / "nbs" / "tutorials").glob("*.ipynb")} == {*TUTORIALS}
    assert (site / "search" / "search_index.json").stat().st_size > 100_000


def test_symbol_has_signature_comments_and_source(site):
    text = read_text(site / "reference" / "model" / "adapters" / "index.html")
    assert (
        re.search(r"\nr\s+int\s+8\s+Rank", text)  # a row of the parameter table
        and "Return a model with frozen base weights and a trainable adapter." in text
    )
    assert (
        "Choose device, precision, compilation and micro-batch size, where possible by measuring"
        in read_text(site / "reference" / "train" / "speed" / "index.html")
    )
    assert re.search(
        r'href="[^"]+/blob/main/minigpt/model/adapters.py#L\d+"',
        (site / "reference" / "model" / "adapters" / "index.html").read_text(encoding="utf-8"),
    )
    picture = re.search(
        r'<img[^>]* src="([^"]*dpo-1\.png)"',
        (site / "tutorials" / "dpo" / "index.html").read_text(encoding="utf-8"),
    )[1]
    assert (site / "tutorials" / "dpo" / picture).exists()
