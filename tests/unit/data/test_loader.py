"""The loader as a pure function of (token set, seed, step).

Each epoch has every token once, any step takes constant time, and the batches are the same for any
number of workers.
"""

import json
import os
import tracemalloc
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from minigpt.data.tokensets import DataError, TokenSet, check_size, loader, shuffled


def token_set(folder, n, dtype="uint32"):
    "A set of tokens 0…n-1: each token is its own position."
    folder.mkdir(parents=True, exist_ok=True)
    np.arange(n, dtype=dtype).tofile(folder / "tokens.bin")
    return make_set(folder, n, dtype)


def make_set(folder, n, dtype):
    meta = dict(
        format="minigpt token set",
        version=1,
        n_tokens=n,
        n_docs=1,
        dtype=dtype,
        fingerprint="0" * 32,
        sources=[],
        tokenizer="",
        options={},
        refused={},
    )
    (folder / "meta.json").write_text(json.dumps(meta))
    return TokenSet(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("tokens")


# --- the order ------------------------------------------------------------------------------------
@given(st.integers(1, 5000), st.integers(0, 2**40), st.integers(0, 2**20))
def test_shuffled_is_a_bijection(n, seed, epoch):
    out = shuffled(np.arange(n), n, (seed, epoch))
    assert out.dtype == np.int64 and np.array_equal(np.sort(out), np.arange(n))


def test_shuffled_is_a_bijection_of_every_small_length():
    for n in range(1, 130):
        assert np.array_equal(np.sort(shuffled(np.arange(n), n, (0, 0))), np.arange(n)), n


@given(
    st.integers(1, 10**12),
    st.lists(st.integers(0, 10**12 - 1), min_size=1, max_size=50),
    st.integers(0, 9),
)
def test_shuffled_computes_only_requested_entries(n, places, epoch):
    i = np.array(places) % n
    out = shuffled(i, n, (7, epoch))
    assert ((out >= 0) & (out < n)).all() and np.array_equal(
        out, [shuffled(np.array([x]), n, (7, epoch))[0] for x in i]
    )
    assert len(set(out)) == len(set(i))


def test_shuffled_mixes():
    "Neighbours are separated; positions vary with seed and epoch, and are uniform."
    n = 1000
    orders = [shuffled(np.arange(n), n, (seed, epoch)) for seed in range(20) for epoch in range(20)]
    assert len({o.tobytes() for o in orders}) == len(orders)
    fixed = np.mean([(o == np.arange(n)).sum() for o in orders])  # 1 in a random permutation
    follow = np.mean([(np.diff(o) == 1).sum() for o in orders])  # about 1
    assert 0.7 < fixed < 1.3 and 0.7 < follow < 1.3
    first = np.bincount(
        np.array([o[0] for o in orders]) * 10 // n, minlength=10
    )  # 40 per decile, standard deviation 6
    assert first.min() > 12 and first.max() < 75


# --- an epoch -------------------------------------------------------------------------------------
def count_labels(data, steps, size, seq_len, seed):
    "Count how often each token is a label, over some steps."
    seen = Counter()
    for step in steps:
        b = data.batch(step, size, seq_len, seed)
        assert (
            b["input_ids"].shape == b["labels"].shape == (size, seq_len)
            and b["input_ids"].dtype == np.int64
        )
        ids, labels = b["input_ids"], b["labels"]
        assert ((labels == ids + 1) | (labels == -100)).all()
        seen.update(labels[labels != -100].tolist())
    return seen


@settings(max_examples=60)
@given(st.integers(2, 700), st.integers(1, 40), st.integers(1, 9), st.integers(0, 10**6))
def test_every_token_once_per_epoch(folder, n, seq_len, size, seed):
    seq_len = min(seq_len, n - 1)
    data = token_set(folder / "once", n)
    windows = data.n_windows(seq_len)
    size = min(size, windows)
    # `size` epochs are an integer number of steps
    seen = count_labels(data, range(windows), size, seq_len, seed)
    assert set(seen) == set(range(1, n)) and set(seen.values()) == {size}
    # no token is repeated within the full steps of the first epoch
    assert max(count_labels(data, range(windows // size), size, seq_len, seed).values()) == 1


@settings(max_examples=30)
@given(
    st.integers(50, 400),
    st.integers(1, 30),
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(0, 5),
)
def test_order_of_sequences_is_independent_of_the_batch(folder, n, seq_len, a, b, seed):
    "So a run can resume at the same position with another micro-batch."
    data = token_set(folder / "stream", n)
    one, two = (
        np.concatenate(
            [data.batch(s, size, seq_len, seed)["input_ids"] for s in range(-(-60 // size))]
        )[:60]
        for size in (a, b)
    )
    assert np.array_equal(one, two)


def test_epochs_and_seeds_differ(folder):
    data = token_set(folder / "differ", 1001)
    epochs = [
        np.concatenate(
            [data.batch(s, 10, 10, seed)["input_ids"] for s in range(e * 10, e * 10 + 10)]
        )
        for e, seed in ((0, 0), (1, 0), (0, 1))
    ]
    assert len({e.tobytes() for e in epochs}) == 3
    begins = [set(e[:, 0].tolist()) for e in epochs]
    assert begins[0] == begins[2] and not begins[0] & begins[1], (
        "every epoch but the first is cut at another offset"
    )


def test_too_small_token_set_is_refused(folder):
    data = token_set(folder / "small", 101)
    check_size(data, 10, 10)
    for batch, seq_len in ((11, 10), (1, 101), (1, 1000)):
        with pytest.raises(DataError, match="101 tokens.*batch_size × gradient_accumulation"):
            check_size(data, batch, seq_len)


def test_truncated_token_set_is_refused(folder):
    data = token_set(folder / "torn", 1000)
    os.truncate(data.path / "tokens.bin", 3996)
    meta = json.loads((data.path / "meta.json").read_text())
    meta["sources"] = [dict(path="my.txt")]
    (data.path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(DataError, match="3,996 bytes and must have 4,000.*built again from my.txt"):
        TokenSet(data.path)


# --- workers --------------------------------------------------------------------------------------
def test_batches_are_independent_of_workers(folder):
    import torch

    data = token_set(folder / "workers", 5000)
    wanted = [data.batch(s, 6, 32, 3) for s in range(17, 60)]
    for workers in (0, 1, 2):
        state = torch.get_rng_state()
        got = list(loader(data, range(17, 60), 6, 32, 3, workers))
        assert torch.equal(state, torch.get_rng_state()), (
            "the loader drew from torch's generator: a resume would not be exact"
        )
        assert len(got) == len(wanted)
        for g, w in zip(got, wanted):
            for k in ("input_ids", "labels"):
                assert g[k].dtype == torch.int64 and np.array_equal(g[k].numpy(), w[k])


# --- a distant step -------------------------------------------------------------------------------
def test_distant_step_takes_constant_time(tmp_path):
    n, size, seq_len, seed, step = 200_000_000, 8, 64, 5, 1_000_000
    with open(tmp_path / "tokens.bin", "wb") as f:
        f.truncate(2 * n)  # a sparse file
    data = make_set(tmp_path, n, "uint16")
    position = step * size % data.n_windows(seq_len)
    assert position + size < data.n_windows(seq_len), "the step must be within one epoch"
    epoch = step * size // data.n_windows(seq_len)
    index, shift = (
        shuffled(np.arange(position, position + size), data.n_windows(seq_len), (seed, epoch)),
        data.shift(np.array([epoch]), seq_len, seed)[0],
    )
    assert epoch and shift
    rng, wanted = np.random.default_rng(0), []
    with open(tmp_path / "tokens.bin", "r+b") as f:
        for i in index:
            wanted.append(rng.integers(1, 2**16, seq_len + 1, dtype=np.uint16))
            f.seek(2 * (i * seq_len + shift))
            f.write(wanted[-1].tobytes())
    data.batch(0, size, seq_len, seed)  # warm up: exclude the imports of the first call
    tracemalloc.start()
    try:
        data = TokenSet(tmp_path)
        batch = data.batch(step, size, seq_len, seed)
        first = next(iter(loader(data, range(step, step + 10**9), size, seq_len, seed)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    wanted = np.array(wanted).astype(np.int64)
    assert np.array_equal(batch["input_ids"], wanted[:, :-1]) and np.array_equal(
        batch["labels"], wanted[:, 1:]
    )
    assert np.array_equal(first["input_ids"].numpy(), batch["input_ids"])
    assert peak < 3e6, f"{peak / 1e6:.1f} MB for one batch"
