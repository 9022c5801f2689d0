"""A run that the version before packages started resumes with this version.

old_run.zip holds a run of 24 steps that was stopped after 12, as version 0.1.0 of 2026-11-28 wrote
it; losses.json holds the losses of the same run without a stop.
"""

import json
import zipfile
from pathlib import Path

import pytest

from minigpt.checkpoint import problem
from minigpt.run import read_metrics
from minigpt.train import resume


@pytest.fixture
def old_run(tmp_path, monkeypatch):
    with zipfile.ZipFile(Path(__file__).with_name("old_run.zip")) as z:
        z.extractall(tmp_path)
    monkeypatch.chdir(tmp_path)
    return dict(json.loads((tmp_path / "losses.json").read_text()))


def test_old_run_resumes_with_uninterrupted_losses(old_run):
    assert not problem("run/checkpoints/checkpoint-12")
    resume("run")
    rows = [r for r in read_metrics("run/metrics.jsonl") if r.get("loss") is not None]
    assert [r["step"] for r in rows] == [*old_run]
    # Another processor rounds differently; on the same one the bits are equal.
    assert [r["loss"] for r in rows] == pytest.approx([*old_run.values()], rel=1e-4)
