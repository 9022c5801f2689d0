"""Runs of the other stages are killed with SIGKILL and resume bit for bit.

The stages are SFT, an adapter (with dropout), DPO, and simplex diffusion (packed, and one sequence
per line). Faults around a kill are tested in test_faults.py.
"""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from tests.harness import kill_child as child

# packed rows of up to 128 positions, with an epoch boundary in between
STAGES = {
    stage: dict(
        stage=stage,
        max_seq_len=128,
        batch_size=2,
        gradient_accumulation=1,
        eval_steps=13,
        eval_sequences=4,
        pause=0.01,
    )
    for stage in ("sft", "lora", "dpo")
}
STAGES |= {
    stage: dict(stage=stage, pause=0.01, line_by_line=stage == "tess_lines")
    for stage in ("tess", "tess_lines")
}


def drop_half(work):
    "Drop half of the reference's numbers, as a kill during its computation would."
    for f in (work / "run").glob("data/*/reference-*.bin"):
        bits = np.fromfile(f, np.int32).reshape(2, -1)
        half = bits.shape[1] // 2
        bits[1, half:] = bits[0, half:]  # the two copies of a number disagree
        bits.tofile(f)


@pytest.fixture(scope="module")
def works(tmp_path_factory):
    "The uninterrupted run and a run killed twice, for each stage; two at a time."
    folder = tmp_path_factory.mktemp("stages")
    with ThreadPoolExecutor(2) as pool:
        refs = {
            s: pool.submit(child.reference, folder / f"{s}-reference", **o)
            for s, o in STAGES.items()
        }
        jobs = {
            s: pool.submit(child.trial, folder / s, 12, kills=2, inspect=drop_half, **o)
            for s, o in STAGES.items()
        }
        yield {s: (refs[s].result, jobs[s].result) for s in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_resume_is_bit_identical(works, stage):
    reference, work = (f() for f in works[stage])
    outcome = child.compare(work, reference)
    assert outcome.identical, outcome.differ
    assert outcome.resumed and outcome.killed_at > 12 and not outcome.leftovers
    if stage.startswith("tess"):
        assert {"accuracy", "eval_accuracy"} <= {k for _, _, k, _ in child.losses(work)}
    if stage == "dpo":
        assert any(k == "rewards/margins" for _, _, k, _ in child.losses(work))
        files = sorted(
            (reference / "run").glob("data/*/reference-*.bin")
        )  # of the training and of the validation pairs
        assert len(files) == 2 and all(
            f.read_bytes() == (work / f.relative_to(reference)).read_bytes() for f in files
        )
