"""Several sets in one training: shares, a curriculum, preferences, parts of a set, a resume.

Shares hold in every window, any batch is available at any time, preferences come in pairs, and a
resume is bit-identical.
"""

import json
import os
import random
import shutil
from types import SimpleNamespace

import numpy as np
import pytest

from minigpt.data.registry import mix
from minigpt.data.tokensets import (
    DataError,
    Mixture,
    PairSet,
    build_tokenset,
    check_size,
    curriculum,
    loader,
)
from minigpt.tokenizer.bpe import IM_END, train_tokenizer
from minigpt.train.inputs import ResumeError
from minigpt.train.trainer import fit, resume
from tests.harness import kill_child as child
from tests.recovery.test_faults import AtStep, Losses, PowerCut, power_cut
from tests.unit.data.test_chat import write

LEN = 64


@pytest.fixture(scope="module")
def tok():
    return train_tokenizer(
        ["Questions and answers. 问题和答案。 <think> 1 + 1 = 2 </think>"] * 9, vocab_size=300
    )


def message(role, content):
    return dict(role=role, content=content)


def rows_to(path, rows):
    path.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
    )
    return path


def texts(path, n=120, seed=0):
    return rows_to(
        path,
        [
            dict(
                text=" ".join(
                    random.Random(seed * 9999 + i).choices(
                        ["one", "two", "three", "four", "five", "six", "雪", "seven"], k=5 + i % 40
                    )
                )
                + f" {i}"
            )
            for i in range(n)
        ],
    )


@pytest.fixture(scope="module")
def sets(tok, tmp_path_factory):
    "A set of texts, one of conversations, another of texts."
    d = tmp_path_factory.mktemp("sets")
    return [
        build_tokenset(f, tok, d / f.stem, 0.0, progress=False)[0]
        for f in (texts(d / "a.jsonl"), write(d / "talks.jsonl"), texts(d / "b.jsonl", 40, 1))
    ]


def assert_equal_batches(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


# --- shares ---------------------------------------------------------------------------------------
def sequence_counts(weights):
    "The sequences of each set before each position, (3001, n), and the exact shares."
    m = Mixture([(SimpleNamespace(meta=dict(tokenizer="t")), w) for w in weights])
    return np.vstack(
        [np.zeros(len(weights)), np.cumsum(np.eye(len(weights))[np.tile(m.pattern, 3)], 0)]
    ), m.weights


@pytest.mark.parametrize(
    "weights",
    [
        [0.7, 0.2, 0.1],
        [2, 1],
        [1, 1, 1],
        [0.5, 0.25, 0.15, 0.1],
        [0.9, 0.1],
        [94, 1, 1, 1, 1, 1, 1],
        [1] * 7,
        [3, 0.006],
        [1],
    ],
)
def test_shares_hold_in_every_window(weights):
    "300 sequences from any position, also across the end of the pattern: never off by two."
    n, share = sequence_counts(weights)
    assert np.abs(n[300:] - n[:-300] - 300 * share).max() < 1.5
    for size in (8, 32, 100, 1000):
        assert np.abs(n[size:] - n[:-size] - size * share).max() < 2


def test_shares_of_many_sets_are_exact():
    "The start of a mixture is never off by more than one sequence, a window by two."
    rng = np.random.default_rng(0)
    for k in (2, 3, 4, 5, 6, 8, 10, 20):
        for _ in range(20):
            n, share = sequence_counts(
                np.maximum(rng.dirichlet(np.ones(k) * rng.choice([0.3, 1, 5])), 0.002)
            )
            assert np.abs(n[:1001] - np.arange(1001)[:, None] * share).max() <= 1.001, (
                k,
                share.tolist(),
            )
            assert np.abs(n[300:] - n[:-300] - 300 * share).max() <= 2.3


def test_sequences_equal_those_of_the_sets(sets):
    "They are each set's own, in its own order, in the order of the pattern; texts have one row."
    m = Mixture([(sets[0], 0.6), (sets[1], 0.3), (sets[2], 0.1)])
    place = np.arange(2500)
    got, which = m.sequences(place, LEN, 3), m.pattern[place % 1000]
    for s, d in enumerate(sets):
        want = d.sequences(np.arange((which == s).sum()), LEN, 3)
        assert all(
            np.array_equal(got[k][which == s], want.get(k, np.zeros_like(want["input_ids"])))
            for k in got
        )
    assert (
        m.n_windows(LEN) == sum(d.n_windows(LEN) for d in sets)
        and abs(m.passes(LEN)[0] - 0.6 * m.n_windows(LEN) / sets[0].n_windows(LEN)) < 0.01
    )


@pytest.mark.parametrize("by", ["order", "curriculum"])
def test_batch_depends_only_on_its_step(sets, by):
    "Requested in any order, twice, from another object, from a loader, with an offset."
    make = lambda: (curriculum if by == "curriculum" else lambda d: d)(
        Mixture([(type(d)(d.path), w) for d, w in zip(sets, (5, 3, 2))])
    )
    m, steps = make(), [*range(40), 10**6]
    once = {s: m.batch(s, 8, LEN, 3) for s in steps}
    random.Random(0).shuffle(steps)
    again = make()
    assert (
        all(assert_equal_batches(again.batch(s, 8, LEN, 3), once[s]) for s in steps)
        and again.fingerprint == m.fingerprint
        and again.curriculum_id == m.curriculum_id
    )
    assert not assert_equal_batches(m.batch(3, 8, LEN, 4), once[3])
    assert assert_equal_batches(
        m.batch(3, 4, LEN, 3, offset=20), {k: np.concatenate([once[4][k][:4]]) for k in once[4]}
    )
    for s, b in zip(range(5, 9), loader(make(), range(5, 9), 8, LEN, 3)):
        assert assert_equal_batches({k: v.numpy() for k, v in b.items()}, once[s])


def test_invalid_mixtures_are_refused(sets, tok, tmp_path):
    for weights, words in (
        ([1, 0], "must all be above 0"),
        ([1, -1], "must all be above 0"),
        ([1, np.nan], "must all be above 0"),
        ([1, np.inf], "must all be above 0"),
        ([1, 0.0004], "below a thousandth"),
    ):
        with pytest.raises(ValueError, match=words):
            Mixture([*zip(sets, weights)])
    with pytest.raises(ValueError, match="at least one"):
        Mixture([])
    with pytest.raises(ValueError, match="at least one"):
        mix([])
    with pytest.raises(ValueError, match="every data set a weight, or none"):
        mix([("a", 1), "b"])
    with pytest.raises(ValueError, match="above 0"):
        mix([("a", 1), ("b", 0)])
    pairs, _ = build_tokenset(
        rows_to(
            tmp_path / "p.jsonl", [dict(prompt=f"{i}?", chosen="a", rejected="b") for i in range(9)]
        ),
        tok,
        tmp_path / "p",
        0.0,
        progress=False,
    )
    with pytest.raises(DataError, match="preferences do not mix"):
        Mixture([(sets[0], 1), (pairs, 1)])
    other, _ = build_tokenset(
        tmp_path / "p.jsonl",
        train_tokenizer(["x"], vocab_size=280),
        tmp_path / "q",
        0.0,
        progress=False,
    )
    with pytest.raises(DataError, match="different tokenizers"):
        Mixture([(pairs, 1), (other, 1)])


def test_part_with_too_long_rows_is_an_error(sets, tok, tmp_path):
    "If every row is too long, it is an error before training, not an endless wait for a batch."
    long, _ = build_tokenset(
        rows_to(
            tmp_path / "long.jsonl",
            [
                dict(conversations=[message("user", f"{i} " * 200), message("assistant", "y")])
                for i in range(30)
            ],
        ),
        tok,
        tmp_path / "long",
        0.0,
        progress=False,
    )
    assert long.n_windows(LEN) == 0
    m = Mixture([(sets[0], 1), (long, 1)])
    with pytest.raises(DataError, match="long.*max_seq_len"):
        check_size(m, 8, LEN)


def test_held_out_parts_have_the_same_shares(sets):
    "The validation set has the same shares, and each window once."
    m = Mixture([(sets[0], 1), (sets[2], 1)])
    n = m.n_windows(LEN)
    got = m.windows(np.arange(n), LEN)["input_ids"]
    begin = (n + 1) // 2 if np.round(n / 2) != n // 2 else n // 2
    assert np.array_equal(
        got[:20], sets[0].windows(np.arange(20), LEN)["input_ids"]
    ) and np.array_equal(got[begin : begin + 9], sets[2].windows(np.arange(9), LEN)["input_ids"])


# --- from easy to hard ----------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [0, 1], ids=["texts", "talks"])
def test_curriculum_starts_with_easy_sequences(sets, kind):
    "The first epoch has every sequence once and begins with easy ones; the next are shuffled."
    easy, n = curriculum(sets[kind]), curriculum(sets[kind]).n_windows(LEN)
    first, second = (easy.order(np.arange(n), n, LEN, (0, e)) for e in (0, 1))
    assert sorted(first) == sorted(second) == list(range(n)) and first.tolist() != second.tolist()
    hard = easy.window_difficulty(LEN)
    rank = np.argsort(np.argsort(hard, kind="stable"))
    for t in range(0, n, max(1, n // 25)):
        assert (
            rank[first[t]] <= n * np.sqrt(0.01 + 0.99 * t / n / 0.6) + n / 50 + 2
        )  # no harder than the schedule allows
    assert (
        hard[first[: n // 10]].mean() < 0.6 * hard.mean()
        and hard[first[n // 2 :]].mean() > hard.mean()
        and 0.5 < hard[second[: n // 3]].mean() / hard.mean() < 1.5
    )
    assert (
        curriculum(sets[kind], start=1.0, reach=1.0).order(np.arange(n), n, LEN, (0, 0)).tolist()
        != first.tolist()
    )
    labels = np.concatenate([easy.sequences(np.arange(n), LEN)["labels"]])
    assert (
        sorted(labels[labels >= 0])
        == sorted(
            (
                sets[kind].tokens[np.asarray(sets[kind].mask)] if kind else sets[kind].tokens[1:]
            ).tolist()
        )
        or easy.count_too_long(LEN)[0]
    )
    assert (
        sets[kind].difficulty is None and sets[kind].curriculum_id == "" != easy.curriculum_id
    )  # the set itself is unchanged


def test_curriculum_by_a_score(sets):
    "A user's array or function of the ids; anything but one number per row is refused."
    for d in sets[:2]:
        rows = np.append(np.load(d.path / "docs.npy"), len(d))
        score = np.array([int(d.tokens[a:b].sum()) % 97 for a, b in zip(rows, rows[1:])])
        a, b = curriculum(d, score), curriculum(d, lambda ids: int(ids.sum()) % 97)
        n = a.n_windows(LEN)
        assert (
            assert_equal_batches(a.sequences(np.arange(n), LEN), b.sequences(np.arange(n), LEN))
            and a.curriculum_id == b.curriculum_id != curriculum(d).curriculum_id
        )
        order = a.order(np.arange(n), n, LEN, (0, 0))
        assert (
            a.window_difficulty(LEN)[order][: n // 8].mean() < 0.5 * a.window_difficulty(LEN).mean()
        )
        for wrong in (score[:-1], np.append(score, 1), [np.nan] * len(score), score[:, None]):
            with pytest.raises(ValueError, match="one finite number per row"):
                curriculum(d, wrong)
    with pytest.raises(ValueError, match="must be 'length'"):
        curriculum(sets[0], "size")
    for k in ("start", "reach"):
        for v in (0, 1.1, -1):
            with pytest.raises(ValueError, match=f"{k}={v} must be above 0"):
                curriculum(sets[0], **{k: v})


def test_curriculum_of_any_seed(sets):
    n = sets[0].n_windows(LEN)
    assert sorted(curriculum(sets[0]).order(np.arange(n), n, LEN, (-1, 0))) == list(range(n))


# --- preferences ----------------------------------------------------------------------------------
def preferences(n=40):
    return [
        dict(
            prompt=f"{i} and {i}?",
            chosen=f"It is {2 * i}." + "!" * (i % 7),
            rejected="No." * (1 + i % 5),
        )
        for i in range(n)
    ]


def unpacked(w, side=""):
    "The texts of each row of each window, with the tokens that have loss."
    return [
        [
            (w[side + "input_ids"][i][at].tolist(), w[side + "labels"][i][at].tolist())
            for k in range(w[side + "rows"][i].max() + 1)
            for at in [w[side + "rows"][i] == k]
        ]
        for i in range(len(w["input_ids"]))
    ]


def test_pairs_are_side_by_side(tok, tmp_path):
    "Row 3 of one side is paired with row 3 of the other; all pairs once; only answers have loss."
    d, _ = build_tokenset(
        rows_to(tmp_path / "a.jsonl", preferences()), tok, tmp_path / "a", 0.0, progress=False
    )
    assert type(d) is PairSet and d.meta["n_docs"] == 80
    w = d.windows(np.arange(d.n_windows(200)), 200)
    seen = []
    for here, there in zip(unpacked(w), unpacked(w, "rejected_")):
        assert len(here) == len(there)
        for (a, la), (b, lb) in zip(here, there):
            q, q2 = (tok.decode(x).split(IM_END)[0] for x in (a, b))
            assert q == q2
            i = int(
                q.split()[0].rpartition("\n")[2]
                if "\n" in q.split()[0]
                else q.split("\n")[1].split()[0]
            )
            seen.append(i)
            for l, want in (la, preferences()[i]["chosen"]), (lb, preferences()[i]["rejected"]):
                assert tok.decode([x for x in l if x >= 0]) == want + IM_END
    assert sorted(seen) == list(range(40))


def test_pairs_in_every_format_give_the_same_ids(tok, tmp_path):
    "Also with several turns: the same ids, and only what differs has loss."
    plain = dict(
        prompt=[message("user", "a?"), message("assistant", "A."), message("user", "b?")],
        chosen="B.",
        rejected="C.",
    )
    uninterrupted = {
        k: [*plain["prompt"], message("assistant", plain[k])] for k in ("chosen", "rejected")
    }
    other = dict(
        prompt=plain["prompt"], chosen=message("assistant", "B."), rejected=[message("gpt", "C.")]
    )
    both = dict(prompt=plain["prompt"], **uninterrupted)
    made = [
        build_tokenset(
            rows_to(tmp_path / f"{i}.jsonl", [p]), tok, tmp_path / f"{i}", 0.0, progress=False
        )[0]
        for i, p in enumerate((plain, uninterrupted, other, both))
    ]
    assert len({d.fingerprint for d in made}) == 1
    assert [
        tok.decode(d.tokens[d.starts[i] : d.starts[i + 1]][d.mask[d.starts[i] : d.starts[i + 1]]])
        for d in made[:1]
        for i in (0, 1)
    ] == ["B." + IM_END, "C." + IM_END]


def test_pairs_without_loss_on_one_side_are_skipped(tok, tmp_path):
    "An answer beyond max_seq_len, or no difference: the pair is in no sequence."
    u, a = message("user", "x"), message("assistant", "y")
    rows = [
        dict(prompt="q", chosen="a", rejected="b"),
        dict(chosen=[u, a], rejected=[u, a, u, message("assistant", "z")]),
        dict(chosen=[u, a], rejected=[message("user", "x" * 300), a]),
    ]
    d, _ = build_tokenset(
        rows_to(tmp_path / "a.jsonl", rows), tok, tmp_path / "a", 0.0, progress=False
    )
    w = d.windows(np.arange(d.n_windows(LEN)), LEN)
    assert all(
        any(x >= 0 for x in l)
        for side in ("", "rejected_")
        for window in unpacked(w, side)
        for _, l in window
    )


def test_training_on_two_sets_of_preferences(tok, tmp_path):
    "They are mixed, and each has its own reference. Another objective is refused."
    files = [rows_to(tmp_path / f"{i}.jsonl", preferences()[i::2]) for i in (0, 1)]
    run = fit(
        child.shape(),
        mix([(str(f), 1.0) for f in files]),
        output_dir=tmp_path / "run",
        **{
            **child.OPTIONS,
            "max_steps": 2,
            "max_seq_len": 64,
            "validation_split": 0.0,
            "batch_size": 2,
            "gradient_accumulation": 1,
        },
    )
    assert (
        abs(run.history[0]["loss"] - np.log(2)) < 0.1
        and len([*(tmp_path / "run" / "data").glob("*/train/reference-*.bin")]) == 2
    )
    with pytest.raises(
        ValueError,
        match="objective='conversation_modeling' trains on conversation rows",
    ):
        fit(
            child.shape(),
            files[0],
            output_dir=tmp_path / "other",
            objective="conversation_modeling",
            **child.OPTIONS,
        )


def test_answer_that_fits_exactly_is_kept(tok, tmp_path):
    "A row is truncated after the last answer that fits, to the last token."
    d, _ = build_tokenset(
        rows_to(
            tmp_path / "a.jsonl",
            [
                dict(
                    conversations=[
                        m
                        for i in range(6)
                        for m in (message("user", f"{i}?"), message("assistant", f"number {i}"))
                    ]
                )
            ],
        ),
        tok,
        tmp_path / "a",
        0.0,
        progress=False,
    )
    ends = np.flatnonzero(d.mask[:-1] & ~d.mask[1:])
    for seq_len in range(int(ends[0]), len(d) - 1):
        ids, labels = d.row(0, seq_len)
        assert (
            len(ids) == max(e for e in ends if e <= seq_len) and tok.decode([labels[-1]]) == IM_END
        ), seq_len


# --- parts of a set -------------------------------------------------------------------------------
def docs(d, tok):
    return [t for t in tok.decode(d.tokens).split("<|endoftext|>") if t] if d else []


def test_parts_of_a_set(tok, tmp_path):
    """A smaller share is part of a larger one; the first rows are the first.

    The splits are disjoint and stable.
    """
    f, rows = (
        texts(tmp_path / "a.jsonl", 600),
        [json.loads(l)["text"] for l in open(tmp_path / "a.jsonl", encoding="utf-8")],
    )
    make = lambda name, split=0.0, **o: [
        docs(d, tok) for d in build_tokenset(f, tok, tmp_path / name, split, progress=False, **o)
    ]
    tenth, half, uninterrupted = (make(str(s), data_subset=s)[0] for s in (0.1, 0.5, 1.0))
    assert (
        {*tenth} < {*half} < {*uninterrupted} == {*rows}
        and abs(len(half) - 300) < 50
        and abs(len(tenth) - 60) < 30
        and half == [r for r in rows if r in {*half}]
    )
    train, valid = make("split", 0.2)
    assert (
        not {*train} & {*valid}
        and sorted(train + valid) == sorted(rows)
        and abs(len(valid) - 120) < 40
    )
    wider, wide = make("wider", 0.4)
    assert {*valid} < {*wide} and {*wider} < {*train}
    t, v = make("both", 0.2, data_subset=0.5)
    assert {*t} < {*train} and {*v} < {*valid} and {*t + v} == {*half}  # a row keeps its split
    assert make("first", max_data_size=7)[0] == rows[:7]
    t, v = make("few", 0.2, max_data_size=50)
    assert sorted(t + v) == sorted(rows[:50]) and {*v} < {*valid}
    assert (
        make("second", data_subset=0.5, max_data_size=20)[0] == half[:20]
    )  # the first of the share
    assert make("more", max_data_size=10**6)[0] == rows
    twice, _ = build_tokenset([f, f], tok, tmp_path / "twice", 0.2, progress=False)
    assert {*docs(twice, tok)} == {*train} and len(docs(twice, tok)) == 2 * len(train)
    for o, words in (
        (dict(data_subset=0), "data_subset=0 must"),
        (dict(data_subset=1.5), "data_subset=1.5 must"),
        (dict(max_data_size=-1), "max_data_size=-1 must"),
        (dict(validation_split=1), "validation_split=1 must"),
    ):
        with pytest.raises(ValueError, match=words):
            build_tokenset(f, tok, tmp_path / "x", **o)


def test_rows_beyond_max_data_size_do_not_matter(tok, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' * 10 + '{"x": 1}\n')
    d, _ = build_tokenset(
        tmp_path / "a.jsonl",
        tok,
        tmp_path / "a",
        0.0,
        on_bad_row="error",
        max_data_size=5,
        progress=False,
    )
    assert d.meta["n_docs"] == 5 and not d.meta["refused"]


def test_rows_of_one_question_are_in_one_split(tok, tmp_path):
    "Also with other answers, whichever is preferred."
    rows = [
        dict(prompt=f"{i} and what?", chosen=f"answer {i} {j}", rejected=f"no {j}")
        for i in range(200)
        for j in range(3)
    ]
    rows += [
        {
            k: [message("user", f"{i} and what?"), message("assistant", f"{k} {i}")]
            for k in ("chosen", "rejected")
        }
        for i in range(200)
    ]
    random.Random(0).shuffle(rows)
    train, valid = build_tokenset(
        rows_to(tmp_path / "a.jsonl", rows), tok, tmp_path / "a", 0.2, progress=False
    )
    asked = lambda d: [
        t.split("\n")[1].split()[0] for t in tok.decode(d.tokens).split("<|im_start|>user")[1:]
    ]
    a, b = asked(train), asked(valid)
    assert (
        not {*a} & {*b}
        and len({*a} | {*b}) == 200
        and len(a) + len(b) == 1600
        and 15 < len({*b}) < 75
    )
    subset, _ = build_tokenset(
        tmp_path / "a.jsonl", tok, tmp_path / "b", 0.0, data_subset=0.3, progress=False
    )
    assert all(asked(subset).count(q) == 8 for q in {*asked(subset)})


# --- a run ----------------------------------------------------------------------------------------
OPTIONS = dict(
    child.OPTIONS,
    max_steps=24,
    save_steps=5,
    eval_steps=6,
    max_seq_len=LEN,
    validation_split=0.15,
    curriculum_learning=True,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    d = tmp_path_factory.mktemp("files")
    return texts(d / "a.jsonl", 200), write(d / "talks.jsonl", 150), texts(d / "b.jsonl", 60, 1)


def run_once(folder, train, *callbacks, **options):
    losses = Losses()
    return fit(
        child.shape(),
        train,
        output_dir=folder,
        callbacks=[losses, *callbacks],
        **{**OPTIONS, **options},
    ), losses.at


@pytest.fixture(scope="module")
def uninterrupted(files, tmp_path_factory):
    "The uninterrupted run of a mixture with a curriculum, and its losses."
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, run_once(folder, mix([(str(files[0]), 0.7), (str(files[1]), 0.3)]))[1]


@pytest.fixture(scope="module")
def interrupted(files, tmp_path_factory):
    "The same run, interrupted at step 13."
    folder = tmp_path_factory.mktemp("cut") / "run"
    with pytest.raises(PowerCut):
        run_once(folder, mix([(str(files[0]), 0.7), (str(files[1]), 0.3)]), AtStep(13, power_cut))
    return folder


def assert_uninterrupted(folder, rest, uninterrupted):
    assert (
        min(k[0] for k in rest if k[1] == "loss") == 11
        and max(k[0] for k in rest) == 24
        and all(uninterrupted[1][k] == v for k, v in rest.items())
    )
    assert (folder / "model.safetensors").read_bytes() == (
        uninterrupted[0] / "model.safetensors"
    ).read_bytes()


def test_mixture_resume_is_bit_identical(files, uninterrupted, interrupted, tmp_path):
    folder = shutil.copytree(interrupted, tmp_path / "run")
    assert {k[1] for k in uninterrupted[1]} == {"loss", "eval_loss"}
    assert_uninterrupted(
        folder,
        run_once(folder, mix([(str(files[0]), 0.7), (str(files[1]), 0.3)]))[1],
        uninterrupted,
    )


def test_mixture_resumes_from_its_folder_alone(files, uninterrupted, interrupted, tmp_path):
    "With weights in another unit, and without the data; then with another micro-batch."
    folder, losses = shutil.copytree(interrupted, tmp_path / "run"), Losses()
    resume(folder, callbacks=[losses])
    assert_uninterrupted(folder, losses.at, uninterrupted)
    folder, losses = shutil.copytree(interrupted, tmp_path / "again"), Losses()
    resume(folder, callbacks=[losses], batch_size=8, gradient_accumulation=1)
    assert all(
        abs(float.fromhex(uninterrupted[1][k]) - float.fromhex(v)) < 0.02
        for k, v in losses.at.items()
    )


def test_mixture_resumes_without_its_files(interrupted, uninterrupted, tmp_path):
    "The tokens are in the run's folder."
    folder, facts = (
        shutil.copytree(interrupted, tmp_path / "run"),
        json.loads((interrupted / "run.json").read_text()),
    )
    for part in facts["data"]["source"]["mix"]:
        part[0] = str(tmp_path / "gone" / os.path.basename(part[0]))
    (folder / "run.json").write_text(json.dumps(facts))
    losses = Losses()
    resume(folder, callbacks=[losses])
    assert_uninterrupted(folder, losses.at, uninterrupted)


@pytest.mark.parametrize(
    "change,words",
    [
        ("weights", ["weight", "0.7", "0.5"]),
        ("data_subset", ["data_subset = 1.0", "data_subset = 0.5"]),
        ("max_data_size", ["max_data_size = 0", "max_data_size = 9"]),
        ("order", ["data = ", "talks.jsonl"]),
        ("curriculum", ["curriculum_learning = True", "curriculum_learning = False"]),
        ("part", ["data = "]),
        ("fewer", ["data = "]),
    ],
)
def test_changed_mixture_is_refused(change, words, files, interrupted, uninterrupted, tmp_path):
    "The error names the field and both values; the unchanged run resumes, even without the files."
    folder, (a, b, c) = shutil.copytree(interrupted, tmp_path / "run"), map(str, files)
    parts, options = [(a, 0.7), (b, 0.3)], {}
    if change == "weights":
        parts = [(a, 0.5), (b, 0.5)]
    elif change == "order":
        parts = parts[::-1]
    elif change == "part":
        parts = [(a, 0.6), (b, 0.3), (c, 0.1)]
    elif change == "fewer":
        parts = parts[:1]
    else:
        options = {
            "data_subset": dict(data_subset=0.5),
            "max_data_size": dict(max_data_size=9),
            "curriculum": dict(curriculum_learning=False),
        }[change]
    with pytest.raises(ResumeError) as e:
        run_once(folder, mix(parts), **options)
    assert (folder / "data" / "0" / "train" / "meta.json").exists() and (
        folder / "data" / "1" / "train" / "meta.json"
    ).exists()  # no intact file was moved
    assert_uninterrupted(folder, run_once(folder, mix([(a, 0.7), (b, 0.3)]))[1], uninterrupted)
    for w in words:
        assert w in str(e.value), str(e.value)


def test_files_of_equal_size_and_time_are_distinguished(tok, tmp_path):
    "Such files come from an archive."
    a, b = texts(tmp_path / "a.jsonl"), tmp_path / "b.jsonl"
    b.write_bytes(a.read_bytes().replace(b"four", b"nine"))
    for f in (a, b):
        os.utime(f, (1e9, 1e9))
    options = dict(child.OPTIONS, save_steps=3, eval_steps=100)
    fit(child.shape(), [a, b], output_dir=tmp_path / "run", **{**options, "max_steps": 3})
    fit(child.shape(), [a, b], output_dir=tmp_path / "run", **{**options, "max_steps": 4})


def test_mixture_of_token_sets(sets, tok, tmp_path):
    "Built by hand; its folders are recorded in run.json."
    m = Mixture([(sets[0], 2), (sets[1], 1)])
    run = fit(
        child.shape(),
        m,
        tokenizer=tok,
        output_dir=tmp_path / "run",
        **{**child.OPTIONS, "max_steps": 4, "max_seq_len": LEN, "long_rows": "skip"},
    )
    assert resume(tmp_path / "run", max_steps=5).history[-1]["step"] == 5 and run.facts["data"][
        "source"
    ]["mix"][0] == [str(sets[0].path), pytest.approx(2 / 3)]
    with pytest.raises(ValueError, match="as tokenizer="):
        fit(child.shape(), m, output_dir=tmp_path / "run2", **child.OPTIONS)
