"Settings shared by all tests: the repository root, its tools on the path, reproducible results."

import os
import signal
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test uses the network
# Tests compare with CPU results even if there is a GPU; bench/train_gpu.py checks the GPU.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
# A shell's background job ignores Ctrl-C, and so would every process that a test starts.
signal.signal(signal.SIGINT, signal.default_int_handler)

try:
    import hypothesis
except ImportError:
    pass
else:
    hypothesis.settings.register_profile(
        "minigpt", deadline=None, derandomize=bool(os.environ.get("CI"))
    )
    hypothesis.settings.load_profile("minigpt")


@pytest.fixture
def root():
    return ROOT
