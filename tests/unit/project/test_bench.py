"""The GPU benchmark in a tiny size on the CPU.

It checks the computation and prints one line per program.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest

from tests.conftest import ROOT

NUMBER = r"([\d,.]+)"
ROW = re.compile(
    rf"^(\S+ \S+) +{NUMBER} +{NUMBER} +{NUMBER}% +{NUMBER} GiB +{NUMBER} s$", re.M
)  # parameters, tokens/s, MFU, memory, seconds


@pytest.fixture(scope="module")
def benchmark_output(tmp_path_factory):
    env = {
        **os.environ,
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": "1",
        "TMPDIR": str(tmp_path_factory.mktemp("bench")),
    }
    script = str(ROOT / "bench" / "train_gpu.py")
    done = subprocess.run(
        [sys.executable, script, "--smoke"], env=env, capture_output=True, text=True, timeout=300
    )
    assert not done.returncode, done.stderr[-3000:]
    return done.stdout


def test_each_program_has_a_row(benchmark_output):
    rows = {
        name: [float(n.replace(",", "")) for n in numbers]
        for name, *numbers in ROW.findall(benchmark_output)
    }
    trainer = find_spec("transformers") and find_spec("accelerate")
    assert list(rows) == [
        "minigpt fit",
        "minigpt eager",
        *(["Trainer eager"] if trainer else []),
        "bare eager",
    ], benchmark_output
    for name, (params, speed, _, memory, first) in rows.items():
        assert min(params, speed, memory) > 0 and first >= 0, name
    assert rows["bare eager"][0] == rows["minigpt fit"][0]
    if trainer:
        assert float(re.fullmatch("ratio (.*)", benchmark_output.splitlines()[-1])[1]) > 0


def test_results_are_checked_before_timing(benchmark_output):
    assert (
        benchmark_output.index("is it right?")
        < benchmark_output.index("bf16 eager: loss")
        < benchmark_output.index("round 1")
    )
