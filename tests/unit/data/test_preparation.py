"""Preparing and naming data.

What must survive a failure, folders, real rows, and runs whose data are missing or changed.
"""

import errno
import json
import os

import numpy as np
import pytest
from typer.testing import CliRunner

from minigpt import cli
from minigpt.data import registry
from minigpt.data.preparation import prepare
from minigpt.data.quality import analyze
from minigpt.data.readers import DataError, parse_block, read_blocks
from minigpt.data.registry import dataset, get_dataset_config, mix, register_dataset
from minigpt.run.folder import open_run
from minigpt.tokenizer.bpe import train_tokenizer
from minigpt.train.inputs import ResumeError
from minigpt.train.trainer import fit, resume
from tests.harness import kill_child as child

SHARED = child.ROOT.parent / "shared" / "data"
OPTIONS = dict(child.OPTIONS, max_steps=6, save_steps=3, eval_steps=6)


@pytest.fixture(scope="module")
def tok():
    return train_tokenizer(["Questions and answers. 问题和答案。 1 + 1 = 2"] * 9, vocab_size=300)


@pytest.fixture
def data(tmp_path, monkeypatch):
    "An empty data folder, and a registry that forgets what a test registers."
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_CONFIGS", dict(registry._CONFIGS))
    (tmp_path / "data/dataset/custom").mkdir(parents=True)
    return tmp_path / "data/dataset/custom"


def rows(path):
    return [json.loads(x) for x in path.read_text("utf-8").splitlines()]


def test_full_disk_keeps_the_previous_output(tmp_path, monkeypatch, tok):
    child.write_text(tmp_path / "in.jsonl")
    (tmp_path / "out.jsonl").write_text("good\n")
    real = os.fsync

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        prepare(tmp_path / "in.jsonl", tmp_path / "out.jsonl", tok, overwrite=True, progress=False)
    assert (
        sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]
        and (tmp_path / "out.jsonl").read_text() == "good\n"
    )
    monkeypatch.setattr(os, "fsync", real)
    assert (
        prepare(tmp_path / "in.jsonl", tmp_path / "out.jsonl", tok, overwrite=True, progress=False)[
            "processed_samples"
        ]
        == len(rows(tmp_path / "out.jsonl"))
        == 120
    )


def test_no_remaining_rows_is_an_error(tmp_path, tok):
    (tmp_path / "in.jsonl").write_text('{"text": " "}\n{"txt": "?"}\n')
    with pytest.raises(
        DataError, match='no rows of .*in.jsonl are left: 1 × empty text .*; 1 × no "text"'
    ):
        prepare(tmp_path / "in.jsonl", tmp_path / "out.jsonl", tok)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.jsonl"]


def test_folder_is_prepared_into_a_folder_or_a_file(tmp_path, tok):
    (tmp_path / "in").mkdir()
    for i, n in enumerate(("a.jsonl", "b.jsonl")):
        child.write_text(tmp_path / "in" / n, rows=10 + i, seed=i)
    r = prepare(tmp_path / "in", tmp_path / "out", tok, max_seq_len=0)
    assert [len(rows(tmp_path / "out" / n)) for n in ("a.jsonl", "b.jsonl")] == [10, 11] and r[
        "original_samples"
    ] == 21
    prepare(tmp_path / "in", tmp_path / "one.jsonl", tok, max_seq_len=0)
    assert rows(tmp_path / "one.jsonl") == rows(tmp_path / "out/a.jsonl") + rows(
        tmp_path / "out/b.jsonl"
    )


@pytest.mark.parametrize(
    "name", ["pretrain_zh", "sft_zh", "tool_calling_minimind_str", "dpo", "reasoning"]
)
def test_real_rows_are_prepared(name, tmp_path, tok):
    """Counts add up; the output has the same number of rows, of the same kind.

    Tools, calls and reasoning are preserved.
    """
    if not (f := SHARED / f"{name}.jsonl").exists():
        pytest.skip(
            "needs real rows, which are not in the repository:"
            f" put {name}.jsonl into ../shared/data"
        )
    some = tmp_path / "some.jsonl"
    with open(f, "rb") as lines:
        some.write_bytes(b"".join(next(lines) for _ in range(250)))
    made = prepare(some, tmp_path / "out.jsonl", tok, max_seq_len=0)
    before, after = (
        [r for b in read_blocks(p) for r in parse_block(b)] for p in (some, tmp_path / "out.jsonl")
    )
    assert (
        made["original_samples"]
        == 250
        == made["processed_samples"] + sum(v["count"] for v in made["rejected"].values())
    )
    assert [r.kind for r in after] == [r.kind for r in before if not r.reason] and not any(
        r.reason or r.mended for r in after
    )
    special = lambda rs: [
        sum(bool(m.get(k)) for r in rs for m in r.messages or ())
        for k in ("tools", "tool_calls", "reasoning_content")
    ]
    assert special(before) == special(after)
    report = analyze(some, near_duplicates=False)
    assert report["total_samples"] == 250 and np.isclose(
        report["average_length"], np.mean([len(r.text) for r in before])
    )


def test_named_mixture_resumes_without_its_files(data, tmp_path):
    "From the folder alone, in a session without the names and the files."
    child.write_text(data / "a.jsonl")
    child.write_text(data / "b.jsonl", seed=1)
    register_dataset("mine", "a.jsonl", format_type="pretrain", max_seq_len=32, batch_size=4)
    run = fit(
        child.shape(),
        mix([("mine", 0.7), (str(data / "b.jsonl"), 0.3)]),
        output_dir="run",
        **OPTIONS,
    )
    assert run.facts["data"]["source"] == dict(mix=[["mine", 0.7], [str(data / "b.jsonl"), 0.3]])
    del registry._CONFIGS["mine"]
    for f in data.iterdir():
        f.unlink()
    assert resume("run", max_steps=9).step == 9


def test_registered_set_sets_length_and_batch(data):
    child.write_text(data / "a.jsonl")
    register_dataset("mine", "a.jsonl", format_type="pretrain", max_seq_len=16, batch_size=2)
    options = {k: v for k, v in OPTIONS.items() if k not in ("max_seq_len", "batch_size")}
    train = fit(child.shape(), dataset("mine"), output_dir="run", **options).facts["train"]
    assert (train["max_seq_len"], train["batch_size"]) == (16, 2)
    train = fit(child.shape(), "mine", output_dir="other", **options, max_seq_length=32).facts[
        "train"
    ]
    assert (train["max_seq_len"], train["batch_size"]) == (32, 2)


@pytest.mark.parametrize(
    "change",
    [dict(data_subset=0.5), dict(max_data_size=50), dict(curriculum_learning=True)],
    ids=lambda c: next(iter(c)),
)
def test_changed_rows_or_order_are_refused_on_resume(change, tmp_path):
    f = child.write_text(tmp_path / "a.jsonl")
    fit(child.shape(), f, output_dir=tmp_path / "run", **OPTIONS)
    with pytest.raises(
        ResumeError, match="curriculum" if "curriculum_learning" in change else next(iter(change))
    ):
        fit(child.shape(), f, output_dir=tmp_path / "run", **{**OPTIONS, "max_steps": 9}, **change)


def test_tokenizer_of_registered_data_is_the_default(data, tmp_path, tok):
    child.write_text(data / "a.jsonl")
    tok.save(tmp_path / "data/tokenizer")
    register_dataset("mine", "a.jsonl", format_type="pretrain", max_seq_len=32, batch_size=4)
    assert fit(child.shape(), "mine", output_dir="run", **OPTIONS).tokenizer.hash == tok.hash
    assert (
        fit(
            child.shape(), "mine", output_dir="new", **OPTIONS, retrain_tokenizer=True
        ).tokenizer.hash
        != tok.hash
    )
    (tmp_path / "data/tokenizer/tokenizer.json").unlink()
    (tmp_path / "data/tokenizer/tokenizer.pkl").write_bytes(b"\x80\x04.")
    with pytest.raises(
        ValueError, match="tokenizer.pkl is a pickle, which can run code.*tokenizer.json"
    ):
        fit(child.shape(), "mine", output_dir="other", **OPTIONS)


def test_objective_without_matching_data_is_refused(tmp_path):
    with pytest.raises(
        ValueError,
        match=("objective='conversation_modeling' trains on conversation rows.*holds text rows"),
    ):
        fit(
            child.shape(),
            child.write_text(tmp_path / "a.jsonl"),
            output_dir=tmp_path / "run",
            **OPTIONS,
            objective="conversation_modeling",
        )


def test_refused_call_keeps_the_tokens(tmp_path):
    """Other parts, other weights, or one file instead of a mixture are refused.

    The run resumes without its sources.
    """
    a, b = child.write_text(tmp_path / "a.jsonl"), child.write_text(tmp_path / "b.jsonl", seed=1)
    go = lambda train, **kw: fit(
        child.shape(), train, output_dir=tmp_path / "run", **{**OPTIONS, **kw}
    )
    go(mix([(str(a), 0.5), (str(b), 0.5)]))
    was = {p: p.read_bytes() for p in sorted((tmp_path / "run/data").rglob("*.bin"))}
    for wrong in (
        str(a),
        mix([(str(a), 0.4), (str(b), 0.3), (str(a), 0.3)]),
        mix([(str(a), 0.9), (str(b), 0.1)]),
    ):
        with pytest.raises(ResumeError, match="data = "):
            go(wrong, max_steps=9)
        assert {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*.bin"))} == was
    a.unlink()
    b.unlink()
    assert resume(tmp_path / "run", max_steps=9).step == 9


def test_run_resumes_without_its_validation_file(tmp_path):
    a, b = child.write_text(tmp_path / "a.jsonl"), child.write_text(tmp_path / "b.jsonl", seed=1)
    fit(child.shape(), a, b, output_dir=tmp_path / "run", **OPTIONS)
    b.unlink()
    assert "eval_loss" in resume(tmp_path / "run", max_steps=12, eval_steps=12).history[-1]


def test_resume_after_a_built_in_corpus_changed(tmp_path, monkeypatch):
    from minigpt.train import inputs as source

    fit(child.shape(), "talks", output_dir=tmp_path / "run", **{**OPTIONS, "max_data_size": 200})
    (tmp_path / "run/data-source/talks.jsonl").unlink()
    monkeypatch.setitem(source.BUILT_IN, "talks", lambda path: path.write_text("another text"))
    assert resume(tmp_path / "run", max_steps=9).step == 9


# --- the meaning of a name ------------------------------------------------------------------------
REASONING = "data/dataset/minimind_dataset/r1_mix_1024.jsonl"


def write_registered(name="r1_mix_1024.jsonl", seed=0):
    "Write a file of the registered sets."
    os.makedirs("data/dataset/minimind_dataset", exist_ok=True)
    path = f"data/dataset/minimind_dataset/{name}"
    if name.startswith("pretrain"):
        return child.write_text(path, seed=seed)
    talk = lambda i: dict(
        conversations=[
            dict(role="user", content=f"{i}+{seed}?"),
            dict(role="assistant", content=str(i + seed)),
        ]
    )
    with open(path, "w") as f:
        f.writelines(json.dumps(talk(i)) + "\n" for i in range(150))
    return None


def run_log(run):
    return (run.path / "run.log").read_text("utf-8")


@pytest.fixture
def corpus(monkeypatch):
    "A built-in corpus `reasoning` that takes no time."
    from minigpt.train import inputs as source

    monkeypatch.setitem(source.BUILT_IN, "reasoning", lambda path: child.write_text(path, seed=5))


def test_registered_set_has_priority_over_a_corpus(data, corpus):
    write_registered()
    run = fit(child.shape(), "reasoning", output_dir="run", **OPTIONS)
    assert f"training data: reasoning = registered data set, {REASONING}" in run_log(run)
    assert json.loads((run.path / "data/train/meta.json").read_text())["sources"][0][
        "path"
    ] == REASONING and run.facts["data"]["named"] == dict(reasoning="registered data set")
    os.unlink(REASONING)
    assert (
        resume("run", max_steps=8).step == 8
        and fit(child.shape(), "reasoning", output_dir="run", **{**OPTIONS, "max_steps": 9}).step
        == 9
    )  # the corpus does not replace it
    assert "reasoning no longer exists" in run_log(run)


def test_run_of_the_previous_version_keeps_the_corpus(data, corpus):
    "It recorded only the name; a set that was registered later is another meaning of it."
    options = {k: v for k, v in OPTIONS.items() if k != "batch_size"} | dict(
        gradient_accumulation=1, max_steps=1, save_steps=1
    )
    run = fit(child.shape(), "reasoning", output_dir="run", **options)
    assert (
        "reasoning = built-in corpus; the registered data set of this name is not here"
        " (minigpt data get reasoning)" in run_log(run)
    )
    facts = json.loads((run.path / "run.json").read_text())
    del facts["data"]["named"]
    (run.path / "run.json").write_text(json.dumps(facts))
    tokens = (run.path / "data/train/tokens.bin").read_bytes()
    write_registered()
    run = fit(child.shape(), "reasoning", output_dir="run", **{**options, "max_steps": 2})
    assert (
        run.step == 2
        and (run.path / "data/train/tokens.bin").read_bytes() == tokens
        and run.facts["data"]["named"] == dict(reasoning="built-in corpus")
    )
    assert "training data: reasoning = built-in corpus, as when the run started" in run_log(run)
    run = fit(
        child.shape(),
        "reasoning",
        output_dir="run",
        override="data",
        **{**options, "max_steps": 3, "batch_size": 8},
    )
    assert run.step == 3 and run.facts["data"] | dict(tokens=0) == dict(
        source="reasoning",
        valid=None,
        named=dict(reasoning="registered data set"),
        tokens=0,
        places=dict(train=["data-2"], valid=None),
    )


def test_ambiguous_name_is_an_error(data, tmp_path):
    write_registered("pretrain_hq.jsonl")
    (tmp_path / "pretrain").mkdir()
    child.write_text("pretrain/mine.jsonl", seed=1)
    for source in ("pretrain", mix(["pretrain", "talks"])):
        with pytest.raises(DataError) as e:
            fit(child.shape(), source, output_dir="run", **OPTIONS)
        assert all(
            part in str(e.value)
            for part in (
                "'pretrain' has two meanings",
                f"the folder pretrain in {tmp_path}",
                (
                    "Write './pretrain' for the first,"
                    " or 'data/dataset/minimind_dataset/pretrain_hq.jsonl' for the second"
                ),
            )
        )
    paths = [
        json.loads(
            (
                fit(child.shape(), s, output_dir=to, **{**OPTIONS, "max_steps": 1}).path
                / "data/train/meta.json"
            ).read_text()
        )["sources"][0]["path"]
        for s, to in (("./pretrain", "a"), (get_dataset_config("pretrain"), "b"))
    ]
    assert paths == ["pretrain/mine.jsonl", "data/dataset/minimind_dataset/pretrain_hq.jsonl"]
    run = resume("a", max_steps=2)  # run.json records the choice
    assert run.step == 2 and run.facts["data"]["named"] == {"./pretrain": "path"}


def test_run_in_a_folder_named_like_its_corpus(data, corpus):
    assert (
        fit(child.shape(), "reasoning", output_dir="reasoning", **{**OPTIONS, "max_steps": 1}).step
        == 1
    )
    assert (
        fit(child.shape(), "reasoning", output_dir="reasoning", **{**OPTIONS, "max_steps": 2}).step
        == 2
    )


def test_data_path_is_never_a_corpus(data, corpus):
    options = [
        "--max-steps",
        "1",
        "--max-seq-len",
        "32",
        "--batch-size",
        "4",
        "--tokenizer-vocab-size",
        "300",
        "--num-threads",
        "1",
        "--eval-sequences",
        "4",
        "--no-progress",
        "--no-plot-loss",
        "--no-tensorboard",
    ]
    train = lambda *more: CliRunner().invoke(cli.app, ["train", "--use-full-data", *options, *more])
    for name in ("pretrain_hq.jsonl", "sft_1024.jsonl", "sft_512.jsonl"):
        write_registered(name)
    e = train().exception
    assert (
        isinstance(e, FileNotFoundError)
        and f"1 of 4 files are not here: {REASONING} (340 MB; minigpt data get reasoning)" in str(e)
        and not os.path.exists("runs")
    )
    write_registered()
    assert train().exception is None
    facts = open_run("runs/pretrain").facts["data"]
    assert facts["source"] == dict(mix=[[n, None] for n in cli.FULL_DATA]) and set(
        facts["named"].values()
    ) == {"registered data set"}
    os.unlink(REASONING)
    assert (
        train("--max-steps", "2").exception is None and open_run("runs/pretrain").step == 2
    )  # with its existing tokens
    assert "use_full_data names all data, and talks names data too" in str(
        train("--dataset", "talks").exception
    )


def test_all_rows_too_long_is_an_error(tmp_path, tok):
    """A part of a mixture, and a validation set, without usable rows.

    It is reported, not waited for or counted as a loss of 0.
    """
    long = [
        dict(
            conversations=[
                dict(role="user", content=" ".join(str(i * j) for j in range(60))),
                dict(role="assistant", content="y"),
            ]
        )
        for i in range(40)
    ]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in long))
    short = child.write_text(tmp_path / "short.jsonl")
    with pytest.raises(DataError, match="data/0.*has no sequence of max_seq_len=32"):
        fit(
            child.shape(),
            mix([(str(tmp_path / "long.jsonl"), 0.5), (str(short), 0.5)]),
            output_dir=tmp_path / "a",
            **OPTIONS,
        )
    run = fit(child.shape(), short, tmp_path / "long.jsonl", output_dir=tmp_path / "b", **OPTIONS)
    assert (
        not any("eval_loss" in r for r in run.history)
        and "no validation" in (run.path / "run.log").read_text()
    )


def test_missing_data_folder(tmp_path, monkeypatch):
    from minigpt.data import download

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(download, "get", lambda source, to, **kw: to.write_text('{"text": "a"}\n'))
    assert dataset("pretrain").data_path == "data/dataset/minimind_dataset/pretrain_hq.jsonl"
    monkeypatch.setenv("MINIGPT_DATA", str(tmp_path / "drive/MyDrive/data"))
    with pytest.raises(FileNotFoundError, match="MINIGPT_DATA=.*mount Drive first"):
        dataset("pretrain")


def test_rows_with_different_calls_are_not_duplicates(tmp_path):
    call = lambda city: dict(
        conversations=[
            dict(role="user", content="Weather?"),
            dict(
                role="assistant",
                content="",
                tool_calls=[dict(name="weather", arguments=dict(city=city))],
            ),
        ]
    )
    (tmp_path / "calls.jsonl").write_text(
        "".join(json.dumps(call(c)) + "\n" for c in ("Berlin", "Paris", "Berlin"))
    )
    assert (
        analyze(tmp_path / "calls.jsonl", near_duplicates=False)["troubles"]["duplicate"]["count"]
        == 1
    )


def test_notes_and_leftovers_in_a_folder_are_ignored(tmp_path, tok):
    (tmp_path / "in").mkdir()
    child.write_text(tmp_path / "in/a.jsonl")
    for n in (".a.jsonl.source.json", "a.jsonl.source.json", "a.jsonl.part.json", "._a.jsonl"):
        (tmp_path / "in" / n).write_text("{}")
    (tmp_path / "in/empty.jsonl").write_text('{"text": ""}\n')
    made = prepare(tmp_path / "in", tmp_path / "out", tok)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["a.jsonl"] and made["output"] == str(
        tmp_path / "out/a.jsonl"
    )


def test_presets_fit_the_machine():
    from minigpt.config.options import TrainConfig
    from minigpt.train.presets import hardware, recipe, stage

    assert hardware("colab_t4", stage("dpo")) | dict(
        train="dpo",
        objective="preference_alignment",
        max_seq_len=512,
        batch_size=4,
        learning_rate=1e-5,
    ) == hardware("colab_t4", stage("dpo"))
    assert hardware("cpu_only", recipe("special_abilities"))["train"] == mix(
        [("sft_mini", 0.7), ("tool_calling", 0.2), ("ultra_think", 0.1)]
    )
    assert (
        TrainConfig.make(dict(max_seq_len=512, max_seq_length=256), max_seq_len=1024).max_seq_len
        == 1024
        and TrainConfig.make(dict(max_seq_len=512, max_seq_length=256)).max_seq_len == 256
    )


@pytest.mark.parametrize(
    "options,words",
    [
        (
            dict(datasets=[dict(name="a", weight="much")]),
            "weight 'much' of a must be a number above 0",
        ),
        (dict(datasets=[dict(nam="a")]), "names no data set"),
        (dict(data_files=5), "data_files=5 must be a path or a name"),
        (dict(data_files=[None]), "data_files: None must be a path or a name"),
        (dict(data_files="a", dataset="b"), "names data twice, as data_files and dataset"),
        (
            dict(dataset="a", mixing_strategy="random"),
            "mixing_strategy='random' must be 'weighted'",
        ),
        ({}, "no data to train on"),
    ],
)
def test_invalid_data_in_a_configuration_file_is_refused(options, words):
    from minigpt.cli import training_data

    with pytest.raises(ValueError) as e:
        training_data(None, dict(options))
    assert words in str(e.value)


def test_data_in_a_configuration_file():
    from minigpt.cli import training_data

    want = mix([("a", 0.7), ("b", 0.3)])
    for d in (
        {"a": 0.7, "b": 0.3},
        [dict(name="a", weight="0.7"), dict(dataset="b", weight=0.3)],
        [["a", 0.7], ["b", 0.3]],
    ):
        assert training_data(None, dict(datasets=d)) == want
    assert (
        training_data(None, dict(data_files=[], dataset="a")) == "a"
        and training_data(["a=0.7", "b=0.3"], dict(data_files="c")) == want
    )


def test_workers_find_near_duplicates_where_the_parent_has_threads():
    "rensa starts threads for many rows; a forked worker that used them would hang."
    import rensa

    from minigpt.core.files import spread
    from minigpt.data.quality import lsh_keys

    many = np.arange(2_000_000, dtype=np.uint64)
    rensa.RMinHash.digest_matrix_from_flat_token_hashes(
        many, np.arange(0, len(many) + 1, 100).astype(np.uint64), 120, 1
    )
    texts = [
        f"The mill on the hill number {i} turns its wheel for {i * 7} sacks of flour a day." * 20
        for i in range(300)
    ]
    ((_, keys),) = spread(lsh_keys, [texts], 1)
    assert np.array_equal(keys, lsh_keys(texts)) and keys.all()


def test_analyze_writes_nothing(data, tmp_path):
    "`--analyze` alone reports on the source, also on a folder; with an output, on the output."
    (tmp_path / "raw").mkdir()
    child.write_text(tmp_path / "raw/a.jsonl", rows=20)
    child.write_text(tmp_path / "raw/b.jsonl", rows=30, seed=1)
    before = sorted(tmp_path.rglob("*"))
    shown = CliRunner().invoke(cli.app, ["data", "prepare", "--input", "raw", "--analyze"])
    assert (
        shown.exception is None
        and "50 rows from 50; nothing was written; to write them, name an output" in shown.output
        and "topics" in shown.output
    )
    assert sorted(tmp_path.rglob("*")) == before
    made = prepare(tmp_path / "raw", "out", analyze=True, max_seq_len=0)
    assert len(made["output"]) == 2 and made["report"]["total_samples"] == 50
    write_registered()
    assert prepare("r1_mix_1024.jsonl", analyze=True)["files"] == [REASONING]
