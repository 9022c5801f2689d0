"""What goes wrong on real machines: bad input, full disks, damage, signals, two processes.

A clear message each time, and the next call goes on.
"""

import contextlib
import errno
import gc
import gzip
import json
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

import minigpt.train.trainer
from minigpt import cli
from minigpt.chat import tools_from_file
from minigpt.checkpoint.analysis import analyze
from minigpt.checkpoint.store import (
    CheckpointError,
    CheckpointStore,
    load_model,
    problem,
    read_checkpoint,
    write_final,
)
from minigpt.config.options import read_options
from minigpt.core.files import run_lock
from minigpt.data.tokensets import DataError, TokenSet, build_tokenset
from minigpt.model.adapters import lora
from minigpt.model.gpt import GPT, GPTConfig
from minigpt.run.folder import list_runs, open_run, runs_table
from minigpt.tokenizer.bpe import train_tokenizer
from minigpt.train.evaluation import evaluate_on
from minigpt.train.trainer import Callback, TrainConfig, fit
from tests.harness import kill_child as child

STEPS = 20
SHORT = dict(child.OPTIONS, max_steps=STEPS, save_steps=5, eval_steps=5, save_total_limit=3)


class Losses(Callback):
    "Training and validation losses, exactly"

    def __init__(self):
        self.at = {}

    def on_log(self, t, row):
        for k in ("loss", "eval_loss"):
            if k in row:
                self.at[row["step"], k] = row[k].hex()


class At(Callback):
    "Do something after a step was trained and saved"

    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step(self, t):
        if t.step == self.step:
            t.writer.wait()
            self.do(t)


class PowerCut(Exception):
    pass


def power_cut(t):
    raise PowerCut


def go(work, *callbacks, **options):
    "Train in this process; the run and its losses"
    losses = Losses()
    run = fit(
        child.shape(),
        work / "text.jsonl",
        output_dir=work / "run",
        callbacks=[losses, *callbacks],
        **{**SHORT, **options},
    )
    return run, losses.at


def log(work):
    return (work / "run" / "run.log").read_text(encoding="utf-8")


def weights(work):
    return (work / "run" / "model.safetensors").read_bytes()


def steps(work):
    return [c.step for c in CheckpointStore(work / "run" / "checkpoints").all()]


def leftovers(work):
    return [str(p) for p in (work / "run").rglob(".*") if p.name not in child.OWN]


@pytest.fixture
def work(tmp_path):
    return child.new_work(tmp_path / "work")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    "The undisturbed run: folder and losses"
    work = child.new_work(tmp_path_factory.mktemp("whole") / "work")
    return work, go(work)[1]


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    "A run that ended at step 12, with checkpoints 5 and 10"
    work = child.new_work(tmp_path_factory.mktemp("cut") / "work")
    with pytest.raises(PowerCut):
        go(work, At(12, power_cut))
    assert steps(work) == [5, 10]
    return work


def copied(work, to):
    shutil.copytree(work, to)
    return to


def same_as(whole, work, losses, since=0):
    "Bit for bit the undisturbed run, from a step on"
    assert weights(work) == weights(whole[0])
    assert {k: v for k, v in losses.items() if k[0] > since} == {
        k: v for k, v in whole[1].items() if k[0] > since
    }
    assert all(
        whole[1][k] == v for k, v in losses.items()
    )  # a save comes before the evaluation of its step, which is done again
    history = lambda w: [
        (r["step"], r.get("loss"), r.get("eval_loss")) for r in open_run(w / "run").history
    ]
    assert history(work) == history(whole[0])
    assert not leftovers(work)


# --- bad input ------------------------------------------------------------------------------------
def bad_gzip(f):
    f.write_bytes(gzip.compress(GOOD)[:-200])


GOOD = b"".join(
    json.dumps({"text": f"a good text, number {i} of many"}).encode() + b"\n" for i in range(60)
)
BAD = {  # name → (name of the file, how to make it, words of the message, options)
    "missing": (
        "none.jsonl",
        lambda f: None,
        ["there is no file", "none.jsonl", "check the name"],
        {},
    ),
    "empty": ("empty.jsonl", lambda f: f.touch(), ["empty.jsonl is empty", "0 bytes"], {}),
    "folder": (
        "folder",
        lambda f: (f.mkdir(), (f / "picture.png").write_bytes(b"x")),
        ["folder without data files", ".jsonl or .txt"],
        {},
    ),
    "zip": (
        "packed.jsonl",
        lambda f: f.write_bytes(b"PK\x03\x04" + GOOD),
        ["packed.jsonl is a zip archive, not text", "unpack it"],
        {},
    ),
    "page": (
        "page.jsonl",
        lambda f: f.write_text("<!DOCTYPE html><p>Too many users have viewed this file"),
        ["page.jsonl is a web page", "download the file again"],
        {},
    ),
    "cut-gzip": ("cut.jsonl.gz", bad_gzip, ["cut.jsonl.gz"], {}),
    "no-text": (
        "rows.jsonl",
        lambda f: f.write_bytes(b'{"note": "x"}\n' * 50),
        ["no text that can be used", '50 × no "text"', "rows.jsonl line 1", "['note']"],
        {},
    ),
    "broken": (
        "broken.jsonl",
        lambda f: f.write_bytes(GOOD + b'{"text": "cut of\n' + GOOD),
        ["broken.jsonl line 61: broken JSON", "on_bad_row='skip'"],
        dict(on_bad_row="error"),
    ),
    "small": (
        "small.txt",
        lambda f: f.write_text("one two three four"),
        ["tokens", "sequences of max_seq_len=32", "one step takes 8", "Add text"],
        {},
    ),
    "not-utf8": (
        "torn.txt",
        lambda f: f.write_bytes("第一行\n从前有一只猫\n".encode() * 50 + b"\xff\xfe\n"),
        ["torn.txt line 101: not UTF-8", "on_bad_row='skip'"],
        dict(on_bad_row="error"),
    ),
}
CLI = dict(SHORT, max_steps=2, plot_loss=None, progress=None)


def command(*args, **options):
    "Arguments of `minigpt`"
    words = [*map(str, args)]
    for k, v in options.items():
        if v is not None and not isinstance(v, bool):
            words += [f"--{k.replace('_', '-')}", str(v)]
        if isinstance(v, bool):
            words += [f"--{'' if v else 'no-'}{k.replace('_', '-')}"]
    return words


def terminal(monkeypatch, capsys, *args, **options):
    "Exit status and everything that was written"
    monkeypatch.setattr(sys, "argv", ["minigpt", *command(*args, **options)])
    code = 0
    try:
        cli.main()
    except SystemExit as e:
        code = e.code
    out = "".join(capsys.readouterr())
    if isinstance(code, str):
        code, out = 1, out + code
    return code or 0, out


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case, tmp_path, work, whole):
    name, make, words, options = BAD[case]
    make(tmp_path / name)
    with pytest.raises((DataError, FileNotFoundError)) as e:
        fit(child.shape(), tmp_path / name, output_dir=work / "run", **{**SHORT, **options})
    for w in words:
        assert w in str(e.value)
    assert "\n" not in str(e.value).strip() and not leftovers(work)
    # nothing is left that stands in the way of good input
    _, losses = go(work)
    same_as(whole, work, losses)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_in_a_terminal(case, tmp_path, monkeypatch, capsys):
    name, make, words, options = BAD[case]
    make(tmp_path / name)
    code, out = terminal(
        monkeypatch,
        capsys,
        "train",
        tmp_path / name,
        output_dir=tmp_path / "run",
        **{**CLI, **options},
    )
    assert code == 1 and "error: " in out and "Traceback" not in out
    for w in words:
        assert w in out


def test_a_terminal_goes_on_after_bad_input(tmp_path, monkeypatch, capsys, work):
    for case in ("missing", "no-text", "small"):
        name, make, _, _ = BAD[case]
        make(tmp_path / name)
        assert (
            terminal(monkeypatch, capsys, "train", tmp_path / name, output_dir=work / "run", **CLI)[
                0
            ]
            == 1
        )
    code, out = terminal(
        monkeypatch, capsys, "train", work / "text.jsonl", output_dir=work / "run", **CLI
    )
    assert code == 0 and "finished 2 steps" in out
    code, out = terminal(
        monkeypatch, capsys, "train", work / "text.jsonl", output_dir=work / "run", **CLI
    )
    assert code == 0 and "is already finished after 2 steps" in out


def test_the_command_itself(tmp_path):
    "As a process: one line and no traceback"
    p = subprocess.run(
        [
            sys.executable,
            "-c",
            "from minigpt.cli import main; main()",
            *command("train", tmp_path / "none.txt", output_dir=tmp_path / "run"),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(child.ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
    )
    assert (
        p.returncode == 1
        and p.stderr.strip().startswith("error: there is no file")
        and "\n" not in p.stderr.strip()
    )


@pytest.mark.parametrize(
    "options,words",
    [
        (dict(batchsize=4), ["unknown option 'batchsize'", "did you mean 'batch_size'"]),
        (dict(batch_size=0), ["batch_size=0 must be at least 1"]),
        (dict(max_steps="many"), ["max_steps='many' must be of type int"]),
        (dict(lr_schedule="cos"), ["lr_schedule='cos' must be one of cosine"]),
    ],
    ids=["name", "zero", "type", "choice"],
)
def test_bad_options(options, words, work):
    with pytest.raises((TypeError, ValueError)) as e:
        go(work, **options)
    for w in words:
        assert w in str(e.value)
    assert not (work / "run").exists()


def new_run(work, **options):
    return fit(
        **{
            "model": child.shape(),
            "train": work / "text.jsonl",
            "output_dir": work / "new",
            **SHORT,
            **options,
        }
    )


def without_tokenizer(work):
    shutil.copytree(work / "run" / "best" / f"checkpoint-{STEPS}", work / "bare")
    for name in ("tokenizer.json", "tokenizer_config.json", "MANIFEST.json"):
        (work / "bare" / name).unlink()
    return work / "bare"


# What a beginner may well write → words of the answer: the thing, its value, what it must be
MISTAKES = {
    "data-None": (lambda w: new_run(w, train=None), ["None is not a data source", "name a file"]),
    "data-none-named": (lambda w: new_run(w, train=[]), ["list of data files is empty"]),
    "data-itself": (
        lambda w: new_run(w, train="Once upon a time there was a cat. " * 50),
        ["'Once upon a time", "is a text", "write it into a .txt file"],
    ),
    "data-mistyped": (
        lambda w: new_run(w, train="storys"),
        ["'storys'", "did you mean", "'stories'"],
    ),
    "data-near": (
        lambda w: new_run(w, train=w / "texts.jsonl"),
        ["no file", "did you mean 'text.jsonl'?"],
    ),
    "data-an-address": (
        lambda w: new_run(w, train="https://example.com/a.txt"),
        ["is a URL, and must be a file", "minigpt.data.get"],
    ),
    "valid-a-share": (lambda w: new_run(w, valid=0.1), ["0.1 is not a data source"]),
    "model-None": (
        lambda w: new_run(w, model=None),
        ["model=None must be a preset's name (tiny, "],
    ),
    "model-mistyped": (lambda w: new_run(w, model="tinny"), ["'tinny'", "did you mean 'tiny'"]),
    "model-of-a-name": (
        lambda w: GPT("tiny"),
        ["config='tiny' must be a GPTConfig", "GPTConfig.preset('tiny')"],
    ),
    "dim": (lambda w: GPTConfig.preset("tiny", dim="64"), ["dim='64' must be a whole number"]),
    "device": (lambda w: new_run(w, device="gpu"), ["device='gpu' must be auto, cpu, cuda"]),
    "objective": (
        lambda w: new_run(w, objective="dpo"),
        ["objective='dpo' must be one of '', next_token_prediction"],
    ),
    "output_dir": (
        lambda w: new_run(w, output_dir=None),
        ["output_dir=None must be the path of a folder"],
    ),
    "tokenizer": (
        lambda w: new_run(w, tokenizer=5),
        [
            "tokenizer=5 must be a minigpt.tokenizer.Tokenizer",
            "directory with a tokenizer.json",
        ],
    ),
    "config": (
        lambda w: new_run(w, config="a.json"),
        ["config='a.json' must be a TrainConfig", "read_options"],
    ),
    "callback": (
        lambda w: new_run(w, callbacks=[print]),
        ["callbacks: <built-in function print> must be a Callback"],
    ),
    "resume": (
        lambda w: new_run(w, resume="checkpoint-5"),
        ["resume='checkpoint-5'", "holds no run", "output_dir"],
    ),
    "which": (
        lambda w: open_run(w / "run").model("checkpoint-7"),
        ["run has no checkpoint-7; it has checkpoint-", "checkpoint-20"],
    ),
    "part-of-a-run": (
        lambda w: open_run(w / "run/checkpoints/checkpoint-20"),
        ["is part of a run: pass the run"],
    ),
    "model-of-a-file": (
        lambda w: load_model(w / "text.jsonl"),
        ["text.jsonl is a file", "must be a model directory", "minigpt export "],
    ),
    "model-of-a-hub": (lambda w: load_model("gpt2"), ["gpt2 does not exist", "downloaded first"]),
    "temperature": (
        lambda w: open_run(w / "run").generate("a", temperature="0.7"),
        ["temperature='0.7' must be a number, without quotes"],
    ),
    "max_new_tokens": (
        lambda w: open_run(w / "run").generate("a", max_new_tokens="5"),
        ["max_new_tokens='5' must be a whole number"],
    ),
    "half a token": (
        lambda w: open_run(w / "run").generate("a", max_new_tokens=2.5),
        ["max_new_tokens=2.5 must be a whole number"],
    ),
    "several prompts": (
        lambda w: open_run(w / "run").generate(["a", "b"]),
        ["prompt=['a', 'b'] must be a text, or a conversation", "generate_batch"],
    ),
    "no prompt": (lambda w: open_run(w / "run").generate(None), ["prompt=None must be a text"]),
    "role of a prompt": (
        lambda w: open_run(w / "run").generate([dict(role="x", content="y")]),
        ["the role 'x' of a message must be user, assistant, system or tool"],
    ),
    "seed of a text": (
        lambda w: open_run(w / "run").generate("a", seed=1 << 70),
        ["must be a 64-bit integer"],
    ),
    "seed": (
        lambda w: fit(child.shape(), w / "a.txt", output_dir=w / "x", seed=1 << 70),
        [f"seed={1 << 70} must be a 64-bit integer"],
    ),
    "threads": (
        lambda w: fit(child.shape(), w / "a.txt", output_dir=w / "x", num_threads=10**6),
        ["num_threads=1000000 must be at most 1024"],
    ),
    "resume nothing": (
        lambda w: fit(child.shape(), w / "a.txt", output_dir=w / "x", resume=None),
        ["resume=None must be 'auto'", "False"],
    ),
    "rows in memory": (
        lambda w: fit(child.shape(), [dict(text="a")], output_dir=w / "x"),
        ["{'text': 'a'} in the list of data is not a path", ".jsonl"],
    ),
    "analyze a text": (
        lambda w: analyze((w / "notes.txt").write_text("hello") and w / "notes.txt"),
        ["notes.txt is not a checkpoint", ".safetensors"],
    ),
    "adapter": (
        lambda w: lora(str(w / "run")),
        ["base='", "must be a model, such as minigpt.checkpoint.load_model"],
    ),
    "tokenizer-of-a-text": (
        lambda w: train_tokenizer("a.txt"),
        ["texts='a.txt' is a string", "a list of texts"],
    ),
    "another library's model": (
        lambda w: new_run(w, model=torch.nn.Linear(2, 2)),
        ["model is a Linear of another library", "save_pretrained"],
    ),
    "no tokenizer": (
        lambda w: new_run(w, model=without_tokenizer(w)),
        ["bare has no tokenizer.json", "tokenizer='DIR'", "retrain_tokenizer=True"],
    ),
    "checkpoints of Trainer": (
        lambda w: (
            (w / "theirs/checkpoint-20").mkdir(parents=True),
            new_run(w, output_dir=w / "theirs"),
        ),
        ["theirs holds checkpoint-20 but no run.json", "choose a new output_dir"],
    ),
    "table": (
        lambda w: (w / "a.csv").write_text("a,b") and new_run(w, train=w / "a.csv"),
        ["a.csv is a table", "read_csv"],
    ),
    "numbers": (
        lambda w: (
            (w / "train.bin").write_bytes(bytes(range(32)) * 99)
            and new_run(w, train=w / "train.bin")
        ),
        ["train.bin is not text", "nanoGPT", "input.txt"],
    ),
    "batch_size": (
        lambda w: evaluate_on(w / "run", w / "text.jsonl", batch_size=0),
        ["batch_size=0 must be at least 1"],
    ),
    "seq_len": (
        lambda w: evaluate_on(w / "run", w / "text.jsonl", seq_len=-1),
        ["seq_len=-1 must be from 2 to 64"],
    ),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes(case, whole):
    do, words = MISTAKES[case]
    with pytest.raises((CheckpointError, OSError, TypeError, ValueError)) as e:
        do(whole[0])
    for w in words:
        assert w in str(e.value)


FILES_OF_OTHERS = {
    "run.json": (
        lambda f: f.write_text("[1]"),
        lambda d: open_run(d / "run").max_steps,
        ["run.json was not written by fit"],
    ),
    "data/train/meta.json": (
        lambda f: f.write_text("{}"),
        lambda d: TokenSet(d / "run/data/train"),
        ["meta.json does not describe a token set", "built again"],
    ),
    "data/train/tokens.bin": (
        lambda f: f.unlink(),
        lambda d: TokenSet(d / "run/data/train"),
        ["tokens.bin has 0 bytes and must have", "built again"],
    ),
    "checkpoints/checkpoint-20/config.json": (
        lambda f: (f.write_text("[]"), (f.parent / "MANIFEST.json").unlink()),
        lambda d: load_model(d / "run/checkpoints/checkpoint-20"),
        ["config.json holds a list", "must be an object"],
    ),
    "tools.py": (
        lambda f: f.write_text("def f(:\n"),
        lambda d: tools_from_file(d / "run/tools.py"),
        ["tools.py failed with SyntaxError", "must run on its own"],
    ),
    "options.json": (
        lambda f: f.write_text('{"batch_size": 8, // rows\n}'),
        lambda d: read_options(d / "run/options.json"),
        ["options.json cannot be read as JSON, which has no comments"],
    ),
}


@pytest.mark.parametrize("name", FILES_OF_OTHERS)
def test_files_of_others(name, whole, tmp_path):
    harm, use, words = FILES_OF_OTHERS[name]
    copied(whole[0], tmp_path / "work")
    harm(tmp_path / "work" / "run" / name)
    with pytest.raises((CheckpointError, OSError, ValueError)) as e:
        use(tmp_path / "work")
    for w in words:
        assert w in str(e.value)


def test_another_tokenizer_for_weights_that_have_one(whole, tmp_path):
    "It may be meant, so it is said and not refused"
    new = lambda name, **kw: (
        new_run(
            whole[0], model=whole[0] / "run", output_dir=tmp_path / name, max_steps=1, **kw
        ).path
        / "run.log"
    ).read_text(encoding="utf-8")
    assert "was trained with another tokenizer" in new(
        "other", tokenizer=train_tokenizer(["other words"] * 9, vocab_size=280)
    )
    assert "another tokenizer" not in new("own")


def test_a_damaged_run_hides_no_other(whole, tmp_path):
    copied(whole[0], tmp_path / "runs")
    shutil.copytree(tmp_path / "runs" / "run", tmp_path / "runs" / "other")
    (tmp_path / "runs" / "other" / "run.json").write_text("{")
    said = runs_table(list_runs(tmp_path / "runs"))
    assert "run  " in said and "20/20" in said and "other/run.json is not valid JSON" in said


def test_a_single_text_is_trained_on(tmp_path):
    "Whether its hash falls on the side of validation or not"
    tok = train_tokenizer(["some text"])
    for i in range(40):
        f = tmp_path / f"{i}.txt"
        f.write_text(f"one long text, number {i}")
        train, valid = build_tokenset(f, tok, tmp_path / str(i), 0.5, progress=False)
        assert len(train) > 1 and valid is None
        assert len(build_tokenset(f, tok, tmp_path / str(i), 0.5, progress=False)[0]) == len(train)


def test_broken_rows_are_skipped_and_counted(work, monkeypatch, capsys):
    good = (work / "text.jsonl").read_bytes().splitlines(True)
    (work / "text.jsonl").write_bytes(
        b"".join(good[:40])
        + b'{"text": "cut of\n\n'
        + b"".join(good[40:60])
        + b'{"note": 1}\n{"text": 5}\n[1]\n{"text": " "}\n'
        + b"".join(good[60:])
    )
    code, out = terminal(
        monkeypatch, capsys, "train", work / "text.jsonl", output_dir=work / "run", **CLI
    )
    assert code == 0
    refused = read_json(work / "run/data/train/meta.json")["refused"]
    assert {k: v["count"] for k, v in refused.items()} == {
        "broken JSON": 1,
        'no "text"': 1,
        "text is not a string": 1,
        "not an object": 1,
        "empty text": 1,
    }
    assert [v["examples"][0].split(":")[0] for v in refused.values()] == [
        f"text.jsonl line {n}" for n in (41, 63, 64, 65, 66)
    ]
    for w in ("1 × broken JSON", "text.jsonl line 41", 'no "text"'):
        assert w in out


def test_error_is_an_error_also_where_the_token_set_is_there_already(work):
    "Built with on_bad_row='skip' first"
    tok = train_tokenizer(["some text"])
    (work / "text.jsonl").write_bytes(GOOD + b"{\n")
    build_tokenset(work / "text.jsonl", tok, work / "tokens", progress=False)
    with pytest.raises(DataError, match=r"1 × broken JSON \(text.jsonl line 61"):
        build_tokenset(
            work / "text.jsonl", tok, work / "tokens", on_bad_row="error", progress=False
        )


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


# --- where nothing can be written -----------------------------------------------------------------
def test_output_dir_below_a_file(work, monkeypatch, capsys):
    (work / "file").touch()
    with pytest.raises(
        OSError, match=r"output_dir='.*file/run' cannot be written: .*choose a folder of your own"
    ):
        fit(child.shape(), work / "text.jsonl", output_dir=work / "file" / "run", **SHORT)
    code, out = terminal(
        monkeypatch, capsys, "train", work / "text.jsonl", output_dir=work / "file" / "run", **CLI
    )
    assert code == 1 and "cannot be written" in out and "Traceback" not in out


@contextlib.contextmanager
def not_root():
    "Root may write anywhere, so it becomes nobody for a while"
    if not hasattr(os, "geteuid"):
        pytest.skip("no permissions to take away on this system")
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_output_dir_without_permission(mode, work, whole):
    import tempfile

    with tempfile.TemporaryDirectory(
        prefix="minigpt-test-"
    ) as outside:  # pytest's own folders are closed to others
        os.chmod(outside, 0o755)
        text = shutil.copy(work / "text.jsonl", outside)
        locked = Path(outside) / "locked"
        locked.mkdir()
        locked.chmod(mode)
        if os.geteuid() == 0:
            os.chown(locked, 65534, 65534)
        with (
            not_root(),
            pytest.raises(
                OSError,
                match=(
                    r"output_dir='.*run' cannot be written: Permission denied; choose a folder of"
                    r" your own"
                ),
            ),
        ):
            fit(child.shape(), text, output_dir=locked / "run", **SHORT)
        locked.chmod(0o755)
        run = fit(child.shape(), text, output_dir=locked / "run", **SHORT)
        assert (run.path / "model.safetensors").read_bytes() == weights(whole[0])


# --- a full disk ----------------------------------------------------------------------------------
class SmallDisk:
    "A real disk of a few MB, which can be filled to the last byte"

    def __init__(self, path, megabytes=8):
        self.path = path
        path.mkdir()
        p = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(path)],
            capture_output=True,
            text=True,
        )
        if p.returncode:
            pytest.skip(f"no small disk could be mounted: {p.stderr.strip()}")

    def fill(self, leave):
        with open(self.path / "filler", "wb", buffering=0) as f, contextlib.suppress(OSError):
            while True:
                f.write(b"x" * 4096)
        with open(self.path / "filler", "r+b") as f:
            f.truncate(max(0, (self.path / "filler").stat().st_size - leave))

    def free(self):
        (self.path / "filler").unlink()

    def close(self):
        subprocess.run(["umount", "-l", str(self.path)], check=True)


class RefusingDisk:
    "Where nothing may be mounted: fsync says that the disk is full"

    def __init__(self, path, monkeypatch):
        self.path, self.full, real = path, False, os.fsync
        path.mkdir()

        def fsync(fd):
            if self.full:
                raise OSError(errno.ENOSPC, "No space left on device")
            return real(fd)

        monkeypatch.setattr(os, "fsync", fsync)

    def fill(self, leave):
        self.full = True

    def free(self):
        self.full = False

    def close(self):
        pass


@pytest.fixture(params=["mounted", "simulated"])
def disk(request, tmp_path, monkeypatch):
    if request.param == "mounted" and not shutil.which("mount"):
        pytest.skip("this system has no mount command")
    d = (
        SmallDisk(tmp_path / "disk")
        if request.param == "mounted"
        else RefusingDisk(tmp_path / "disk", monkeypatch)
    )
    yield d
    d.close()


class Chatty(Callback):
    "More metrics than the page holds that the file has already"

    def on_step(self, t):
        t.log(dict(step=t.step, note="x" * 1000))


def disk_full(disk, whole, leave, *callbacks, **options):
    "The disk fills up after the save of step 5; what the end of training says"
    work = child.new_work(disk.path / "work")
    with pytest.raises(CheckpointError) as e:
        go(work, At(6, lambda t: disk.fill(leave)), *callbacks, **options)
    for w in (
        "checkpoint-20 could not be written",
        "No space left",
        "free there",
        "Make room",
        "untouched",
    ):
        assert w in str(e.value)
    assert steps(work) == [5] and problem(work / "run/checkpoints/checkpoint-5") is None
    assert not list((work / "run/checkpoints").glob(".*")), (
        "the half-written checkpoint still takes room"
    )
    disk.free()
    said = log(work)
    _, losses = go(work, **options)
    assert "resuming from checkpoint-5" in log(work)
    assert weights(work) == weights(whole[0])
    assert {k: v for k, v in losses.items() if k[1] == "loss"} == {
        k: v for k, v in whole[1].items() if k[0] > 5 and k[1] == "loss"
    }
    assert not leftovers(work)
    return said


def test_full_disk_while_saving(disk, whole):
    said = disk_full(disk, whole, 100_000, evaluation_strategy="no")
    assert "NOT SAVED at step 10" in said and "Training continues" in said


def test_full_disk_while_saving_the_best(disk, whole):
    "A better model that cannot be saved does not end the training"
    disk_full(disk, whole, 100_000)


def test_no_room_for_the_best_model_at_the_end(whole, work, monkeypatch):
    "The training is finished all the same"
    real = CheckpointStore.save

    def full(self, state):
        if self.kind == "best" and state.trainer["global_step"] == STEPS:
            raise CheckpointError("No space left on device")
        return real(self, state)

    monkeypatch.setattr(CheckpointStore, "save", full)
    run, _ = go(work)
    assert (
        run.finished
        and weights(work) == weights(whole[0])
        and "the best model is NOT SAVED" in log(work)
    )


@pytest.mark.parametrize("where", ["run/checkpoints", "run"])
def test_a_disk_that_writes_something_else(where, whole, work, monkeypatch):
    "What stood there stays until the new one has verified"
    go(work)
    before = weights(work)
    real = minigpt.checkpoint.store.write_safetensors

    def wrong(path, *how, **more):
        told = real(path, *how, **more)
        data = bytearray(Path(path).read_bytes())
        data[-5] ^= 1
        Path(path).write_bytes(data)
        return told

    state = read_checkpoint(work / f"run/checkpoints/checkpoint-{STEPS}")
    monkeypatch.setattr(minigpt.checkpoint.store, "write_safetensors", wrong)
    with pytest.raises(CheckpointError, match="does not read back: .* is damaged.*untouched"):
        (
            CheckpointStore(work / where).save(state)
            if where != "run"
            else write_final(work / where, state)
        )
    assert (
        problem(work / f"run/checkpoints/checkpoint-{STEPS}") is None
        and problem(work / "run") is None
        and weights(work) == before
    )


def test_full_disk_to_the_last_byte(disk, whole):
    "Not even a line of metrics can be written: training goes on to its end all the same"
    disk_full(disk, whole, 0, Chatty(), evaluation_strategy="no")


def test_full_disk_while_plotting(work, whole, monkeypatch):
    "The checkpoint fitted, the picture of the loss does not"
    import minigpt.run.metrics

    def save_plots(*a, **k):
        raise OSError(errno.ENOSPC, "No space left on device", "loss_curve_step_10.png")

    monkeypatch.setattr(minigpt.run.metrics, "save_plots", save_plots)
    _, losses = go(work, plot_loss=True)
    same_as(whole, work, losses)
    assert "loss_curve" in log(work) and "No space left" in log(work)


def test_full_disk_from_the_beginning(disk, whole):
    work = child.new_work(disk.path / "work")
    disk.fill(40_000)
    with pytest.raises((OSError, CheckpointError, DataError)) as e:
        go(work)
    assert "No space left" in str(e.value) and str(disk.path) in str(e.value), (
        "the message names neither the reason nor the place"
    )
    disk.free()
    _, losses = go(work)
    same_as(whole, work, losses)


def test_several_files(work):
    "A list of texts, and a run that refuses a wrong one even where its tokens must be built again"
    child.write_text(work / "more.jsonl", seed=1)
    from minigpt.train.inputs import ResumeError

    files = [work / "text.jsonl", work / "more.jsonl"]
    options = {**SHORT, "max_steps": 6}
    run = fit(child.shape(), files, output_dir=work / "run", **options)
    assert run.finished
    shutil.rmtree(work / "run" / "data")
    with pytest.raises(ResumeError, match="data ="):
        fit(child.shape(), files[:1], output_dir=work / "run", **{**options, "max_steps": 8})
    assert (
        fit(child.shape(), files, output_dir=work / "run", **{**options, "max_steps": 8}).step == 8
    )
    shutil.rmtree(work / "run" / "data")
    (work / "more.jsonl").unlink()
    with pytest.raises(FileNotFoundError, match="provide the text that it was trained on"):
        fit(child.shape(), files, output_dir=work / "run", **{**options, "max_steps": 9})


@pytest.mark.parametrize("how", ["deleted", "moved"])
def test_the_folder_disappears_while_it_trains(whole, work, how):
    """What is saved afterwards can be found, and gone on from.

    Nobody else gets in; the losses so far are known."""

    def disappear(t):
        shutil.rmtree(t.run_path) if how == "deleted" else t.run_path.rename(work / "elsewhere")

    def end(t):
        if t.step == 16:
            with pytest.raises(RuntimeError, match="another process"), run_lock(work / "run"):
                pass
            raise PowerCut

    with pytest.raises(PowerCut):
        go(work, At(7, disappear), At(16, end))
    assert steps(work) == [10, 15] and [
        r["step"] for r in open_run(work / "run").history if "loss" in r
    ][:16] == [*range(1, 17)]
    assert log(work).count("was deleted, moved or renamed") == 1
    _, losses = go(work)
    assert (
        weights(work) == weights(whole[0])
        and all(whole[1][k] == v for k, v in losses.items())
        and min(losses)[0] in (15, 16)
    )


# --- damage ---------------------------------------------------------------------------------------
def flip(at):
    def damage(f):
        data = bytearray(f.read_bytes())
        data[at] ^= 0xFF
        f.write_bytes(data)

    return damage


DAMAGE = {
    "first byte": flip(0),
    "last byte": flip(-1),
    "cut": lambda f: os.truncate(f, f.stat().st_size // 2),
    "emptied": lambda f: os.truncate(f, 0),
    "missing": lambda f: f.unlink(),
}
FILES = [
    "MANIFEST.json",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "optimizer.json",
    "optimizer.safetensors",
    "rng_state.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "trainer_state.json",
    "training_args.json",
]


def test_every_file_is_listed(cut):
    assert sorted(p.name for p in (cut / "run/checkpoints/checkpoint-10").iterdir()) == FILES


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_checkpoint_is_passed_over(name, cut, tmp_path):
    for kind, damage in DAMAGE.items():
        store = CheckpointStore(copied(cut / "run/checkpoints", tmp_path / kind))
        newest = store.folder / "checkpoint-10"
        damage(newest / name)
        said = []
        assert store.newest(lambda c, why: said.append((c.step, why))).step == 5
        assert len(said) == 1 and said[0][0] == 10 and name in str(said[0][1]), kind
        with pytest.raises(CheckpointError, match=re.escape(name)):
            read_checkpoint(newest)


def test_a_file_of_another_checkpoint_is_found(cut, tmp_path):
    "A whole file, but not the one that the manifest means"
    for name in FILES:
        store = CheckpointStore(copied(cut / "run/checkpoints", tmp_path / name))
        old, new = (store.folder / f"checkpoint-{s}" / name for s in (5, 10))
        if old.read_bytes() == new.read_bytes():
            continue  # configuration and tokenizer are the same
        shutil.copy(old, new)
        said = []
        c = store.newest(lambda c, why: said.append((c.step, why)))
        assert (
            (c.step, [s for s, _ in said]) == (5, [10])
            if name != "MANIFEST.json"
            else said[0][0] == 10
        ), name


@pytest.mark.parametrize("name,kind", [(n, random.Random(n).choice(list(DAMAGE))) for n in FILES])
def test_training_goes_on_from_the_one_before(name, kind, cut, tmp_path, whole):
    work = copied(cut, tmp_path / "work")
    DAMAGE[kind](work / "run/checkpoints/checkpoint-10" / name)
    _, losses = go(work)
    assert re.search(
        rf"checkpoint-10 is skipped: .*{re.escape(name)}", log(work)
    ) and "resuming from checkpoint-5" in log(work)
    same_as(whole, work, losses, 5)
    assert [p.name for p in (work / "run/checkpoints").iterdir() if "damaged" in p.name] == [
        "checkpoint-10.damaged-1"
    ], "what was damaged is kept for a look, out of the way"


def test_any_byte_of_a_manifest_may_be_damaged(cut, tmp_path):
    "It is said what is wrong, or nothing that matters is; never an exception"
    folder = copied(cut / "run/checkpoints/checkpoint-10", tmp_path / "checkpoint-10")
    good = (folder / "MANIFEST.json").read_bytes()
    raised = {}
    for i in range(len(good)):
        (folder / "MANIFEST.json").write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
        try:
            problem(folder)
        except Exception as e:
            raised[i] = repr(e)
    for text in (
        '{"files": []}',
        '{"files": {"config.json": 5}}',
        '{"files": null}',
        "[]",
        "5",
        '{"files": {"config.json": {}}}',
    ):
        (folder / "MANIFEST.json").write_text(text)
        try:
            assert problem(folder), text
        except Exception as e:
            raised[text] = repr(e)
    assert not raised, f"{len(raised)} times, such as {list(raised.items())[:3]}"


def test_a_manifest_that_lists_too_little_is_not_whole(cut, tmp_path):
    folder = copied(cut / "run/checkpoints/checkpoint-10", tmp_path / "checkpoint-10")
    m = read_json(folder / "MANIFEST.json")
    m["files"] = {}
    (folder / "MANIFEST.json").write_text(json.dumps(m))
    assert problem(folder), "a checkpoint of no files counts as whole"


def test_all_checkpoints_damaged(cut, tmp_path, whole):
    "Then it starts again, and says so"
    work = copied(cut, tmp_path / "work")
    for n in (5, 10):
        flip(100)(work / f"run/checkpoints/checkpoint-{n}/model.safetensors")
    _, losses = go(work)
    said = log(work)
    assert (
        "checkpoint-5 is skipped: model.safetensors is damaged" in said
        and "starting again with the same seed" in said
    )
    assert losses == whole[1] and weights(work) == weights(whole[0])


def test_a_named_damaged_checkpoint_is_refused(cut, tmp_path):
    work = copied(cut, tmp_path / "work")
    flip(-1)(work / "run/checkpoints/checkpoint-5/optimizer.safetensors")
    with pytest.raises(
        CheckpointError,
        match="cannot resume from .*checkpoint-5: optimizer.safetensors is damaged",
    ):
        go(work, resume="checkpoint-5")
    with pytest.raises(
        CheckpointError,
        match="'checkpoint-7' is not a checkpoint of this run; it has checkpoint-5, checkpoint-10",
    ):
        go(work, resume="checkpoint-7")
    assert steps(work) == [5, 10], "a refused resume has moved checkpoints aside"


# --- signals --------------------------------------------------------------------------------------
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_a_terminal_that_is_gone(work, whole):
    "The run stops, unless nohup has said that this does not count"

    def gone(t):
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit):
            go(work, At(7, gone))
        assert steps(work) == [5, 7]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _, losses = go(work, At(12, gone))
        same_as(whole, work, losses, 7)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm(workers, work, whole):
    "What a machine sends before it goes away"
    p = child.start(work, **{**SHORT, "pause": 0.05, "dataloader_workers": workers})
    wait(lambda: len(child.losses(work)) > 6 + workers, p)
    p.send_signal(signal.SIGTERM)
    assert p.wait(60) == 143, (work / "says.txt").read_text()
    before = {(s, k): x for _, s, k, x in child.losses(work)}
    stopped = max(s for s, k in before if k == "loss")
    assert stopped < STEPS and max(steps(work)) == stopped and not leftovers(work)
    assert f"stopped after step {stopped}" in log(work) and "resumes from there" in log(work)
    _, losses = go(work, dataloader_workers=workers)
    assert min(s for s, k in losses if k == "loss") == stopped + 1
    assert {**before, **losses} == whole[1]
    same_as(whole, work, losses, stopped)


def wait(until, process, seconds=90):
    end = time.monotonic() + seconds
    while not until():
        assert process.poll() is None, "the process has ended"
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.005)


class Interrupt(Callback):
    "Ctrl-C while the optimizer works"

    def __init__(self, step, times=1):
        self.step, self.times, self.came_back = step, times, False

    def on_start(self, t):
        real = t.optimizer.step

        def step(*args, **kwargs):
            if t.step + 1 == self.step:
                for _ in range(self.times):
                    signal.raise_signal(signal.SIGINT)
                self.came_back = True
            return real(*args, **kwargs)

        t.optimizer.step = step


def test_ctrl_c_inside_the_optimizer(work, whole):
    stop = Interrupt(7)
    with pytest.raises(
        KeyboardInterrupt,
        match="stopped after step 7 and saved .*checkpoint-7; the same call resumes",
    ):
        go(work, stop)
    assert stop.came_back, "it acted inside the step"
    assert steps(work) == [5, 7] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    _, losses = go(work)
    same_as(whole, work, losses, 7)


def test_ctrl_c_at_the_last_step_leaves_a_finished_run(work, whole):
    with contextlib.suppress(KeyboardInterrupt):
        go(work, Interrupt(STEPS))
    assert open_run(work / "run").finished and weights(work) == weights(whole[0])


def test_ctrl_c_where_a_save_is_due_saves_once(work, whole):
    with pytest.raises(KeyboardInterrupt):
        go(work, Interrupt(10))
    assert steps(work) == [5, 10]
    _, losses = go(work)
    same_as(whole, work, losses, 10)


def test_a_second_ctrl_c_stops_at_once(work, whole):
    stop = Interrupt(8, 2)
    with pytest.raises(KeyboardInterrupt, match="immediately, without saving"):
        go(work, stop)
    assert not stop.came_back and steps(work) == [5]
    _, losses = go(work)
    same_as(whole, work, losses, 5)


# --- more than one --------------------------------------------------------------------------------
def test_two_processes_in_one_folder(work, whole):
    p = child.start(work, **{**SHORT, "pause": 0.2})
    try:
        wait(lambda: child.losses(work), p)
        with pytest.raises(
            RuntimeError,
            match=(
                "another process is writing in .*run; wait until it ends or stop it, or choose"
                " another output_dir"
            ),
        ):
            go(work)
        assert p.poll() is None, "the first was disturbed"
    finally:
        p.kill()
        p.wait()
    _, losses = go(work)  # the lock went with the process
    last = {(s, k): x for _, s, k, x in child.losses(work)}
    assert (
        {**last, **losses} == whole[1]
        and weights(work) == weights(whole[0])
        and not leftovers(work)
    )


# --- going back -----------------------------------------------------------------------------------
def test_going_back_sets_the_later_course_aside(cut, tmp_path, whole):
    work = copied(cut, tmp_path / "work")
    _, losses = go(work, resume="checkpoint-5")
    assert (work / "run/checkpoints/checkpoint-10.superseded-1/model.safetensors").exists()
    assert re.search(
        r"training goes back to step 5: checkpoint-10 is set aside as"
        r" \S*checkpoint-10.superseded-1",
        log(work),
    )
    same_as(whole, work, losses, 5)
    assert steps(work) == [10, 15, 20]


def test_going_back_in_a_finished_run(tmp_path, whole):
    "The old end is no end any more: a new course that was cut short goes on"
    work = copied(whole[0], tmp_path / "work")
    with pytest.raises(PowerCut):
        go(work, At(12, power_cut), resume="checkpoint-10", learning_rate=1e-3)
    assert steps(work) == [10]
    assert not open_run(work / "run").finished, (
        "the model of the course that was given up counts as this run's end"
    )
    _, losses = go(work, learning_rate=1e-3)
    assert max(s for s, _ in losses) == STEPS and weights(work) != weights(whole[0])


def test_the_best_of_a_course_that_was_given_up(tmp_path, whole):
    "It is not this run's best, and does not push out the new one"
    work = copied(whole[0], tmp_path / "work")
    assert open_run(work / "run").best.step == STEPS
    run, losses = go(
        work, resume="checkpoint-10", learning_rate=30
    )  # from here on it can only get worse
    evals = {r["step"]: r["eval_loss"] for r in run.history if r.get("eval_loss") is not None}
    lowest = min(evals, key=evals.get)
    assert lowest < STEPS, "this test needs a course that gets worse"
    assert run.best is not None and run.best.step == lowest, evals


def test_training_on_keeps_the_best_model(tmp_path, whole):
    "It was found in the evaluation after the last save"
    work = copied(whole[0], tmp_path / "work")
    assert open_run(work / "run").best.step == STEPS
    run, losses = go(work, max_steps=STEPS + 5, learning_rate=30)  # it can only get worse
    assert run.best.step == STEPS and losses[STEPS + 5, "eval_loss"] > whole[1][STEPS, "eval_loss"]


def test_a_stopped_training_leaves_nothing_in_memory(work):
    "A notebook keeps the error"
    alive = lambda: sum(type(o) is minigpt.train.state.RunTrainer for o in gc.get_objects())
    gc.collect()
    before = alive()
    with pytest.raises(KeyboardInterrupt) as e:
        go(work, Interrupt(7))
    assert alive() == before and e.value.__traceback__

    def at_once(t):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="stopped immediately") as e:
        go(work, At(9, at_once))
    assert alive() == before and e.value.__traceback__


@pytest.mark.parametrize("harm", ["shuffled", "cut", "no valid"])
def test_damaged_tokens_are_built_again(harm, cut, tmp_path, whole):
    work = copied(cut, tmp_path / "work")
    tokens = work / "run/data/train/tokens.bin"
    if harm == "shuffled":
        ids = np.fromfile(tokens, np.uint16)
        ids.sort()
        ids.tofile(tokens)
    elif harm == "cut":
        os.truncate(tokens.with_name("meta.json"), 100)
    else:
        (work / "run/data/valid/meta.json").unlink()
    _, losses = go(work)
    same_as(whole, work, losses, 10)
    assert "damaged tokens: " in log(work) and (work / "run/data.damaged-1").exists()


def test_tokens_that_cannot_be_read_now_stay_where_they_are(cut, tmp_path, whole, monkeypatch):
    work = copied(cut, tmp_path / "work")
    (work / "text.jsonl").rename(work / "away")

    def broken(file):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as m:
        m.setattr("minigpt.data.tokensets.hash_file", broken)
        with pytest.raises(OSError, match="Input/output"):
            go(work)
    _, losses = go(work)
    same_as(whole, work, losses, 10)


def test_nothing_is_moved_aside_with_what_the_call_reads(whole, tmp_path):
    work = copied(whole[0], tmp_path / "work")
    before = sorted(p.relative_to(work) for p in work.rglob("*"))
    tokens, model = TokenSet(work / "run/data/train"), work / "run/best" / f"checkpoint-{STEPS}"
    for change in (
        dict(train=tokens),
        dict(model=model),
        dict(valid=work / "none.txt"),
        dict(train=work / "none.txt"),
        dict(tokenizer=work / "run/tokenizer"),
    ):
        call = (
            dict(
                model=child.shape(),
                train=work / "text.jsonl",
                output_dir=work / "run",
                overwrite=True,
            )
            | change
        )
        with pytest.raises(
            (ValueError, FileNotFoundError), match="overwrite=True moves aside|there is no file"
        ):
            fit(**call, **SHORT)
    assert before == sorted(p.relative_to(work) for p in work.rglob("*"))


def test_rows_left_out_are_in_the_log(work, capsys):
    "And said, though nothing else is"
    (work / "talks.jsonl").write_text(
        '{"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content":'
        ' "Hello"}]}\n' * 9
    )
    fit(
        child.shape(), [work / "text.jsonl", work / "talks.jsonl"], output_dir=work / "run", **SHORT
    )
    assert (
        "rows refused: 9 × another format" in log(work) and capsys.readouterr().out.count("\n") == 1
    )


def test_a_terminal_that_is_closed(work):
    "Not the end of a training"
    words = command(
        "train", work / "text.jsonl", output_dir=work / "run", **{**CLI, "max_steps": 12}
    )
    p = subprocess.Popen(
        [sys.executable, "-c", "from minigpt.cli import main; main()", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=child.ROOT,
    )
    p.stdout.readline()
    p.stdout.close()
    p.wait()
    assert open_run(work / "run").finished


def test_beyond_the_end(cut, tmp_path):
    work = copied(cut, tmp_path / "work")
    with pytest.raises(ValueError, match="beyond max_steps=8; raise max_steps or epochs"):
        go(work, max_steps=8)
    assert steps(work) == [5, 10]


# --- strangers ------------------------------------------------------------------------------------
class Payload:
    "Runs when it is unpickled"

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return Path(self.mark).touch.__func__, (Path(self.mark),)


def test_a_pickle_is_never_opened(work, tmp_path, whole):
    mark, bad = tmp_path / "it ran", pickle.dumps(Payload(tmp_path / "it ran"))
    pickle.loads(bad)
    assert mark.exists()
    mark.unlink()  # it would work
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.pkl").write_bytes(bad)
    with pytest.raises(
        ValueError, match="tokenizer.pkl is a pickle.*not read.*train a tokenizer.json"
    ):
        go(work, tokenizer=folder)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    shutil.copy(whole[0] / "run/config.json", stranger)
    for name in (
        "pytorch_model.bin",
        "optimizer.pt",
        "rng_state.pth",
        "training_args.bin",
        "scheduler.pt",
    ):
        (stranger / name).write_bytes(bad)
    with pytest.raises(CheckpointError, match="pytorch_model.bin is not used"):
        load_model(stranger)
    with pytest.raises(CheckpointError):
        read_checkpoint(stranger)
    for name in ("model.safetensors", "optimizer.safetensors", "tokenizer.json"):
        (stranger / name).write_bytes(bad)
    with pytest.raises(Exception):
        load_model(stranger)
    with pytest.raises(ValueError):
        go(work, tokenizer=stranger)
    assert not mark.exists()
    go(work)


def test_options_are_in_the_config():
    "The tests above mean what they say"
    assert set(SHORT) <= set(TrainConfig().to_dict())


def test_a_kill_while_tokenizing_leaves_no_worker_and_no_lock(tmp_path):
    "Worker processes inherit the run's lock; they must not outlive the killed process"
    (tmp_path / "large.jsonl").write_bytes(GOOD * (17_000_000 // len(GOOD) + 1))
    code = (
        f"import sys; sys.path.insert(0, {str(child.ROOT)!r});"
        " from tests.harness import kill_child as child; from minigpt.train import fit;"
        " fit(child.shape(),"
        f" {str(tmp_path / 'large.jsonl')!r}, output_dir={str(tmp_path / 'run')!r},"
        f" **{dict(SHORT, tokenizer_vocab_size=300)!r})"
    )
    p = subprocess.Popen(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(child.ROOT), "OMP_WAIT_POLICY": "PASSIVE"},
    )
    me, workers, end = psutil.Process(p.pid), [], time.monotonic() + 90
    while len(workers) < 2 and p.poll() is None and time.monotonic() < end:
        workers = me.children()
        time.sleep(0.02)
    assert len(workers) >= 2, "no workers were seen"
    p.kill()
    p.wait()
    assert not psutil.wait_procs(workers, timeout=10)[1]
    with run_lock(tmp_path / "run"):
        pass


def test_one_training_at_a_time_in_a_process(work, whole):
    """A second one, from a callback or a thread, is refused by name and changes nothing.

    Other functions may be used."""
    said = []

    def try_it(where):
        with pytest.raises(RuntimeError) as e:
            fit("tiny", work / "text.jsonl", output_dir=work / where)
        said.append(str(e.value))

    def others(t):
        try_it("nested")
        thread = threading.Thread(target=try_it, args=("thread",))
        thread.start()
        thread.join()
        assert (
            open_run(work / "run").history
            and not (work / "nested").exists()
            and not (work / "thread").exists()
        )

    run, losses = go(work, At(7, others))
    same_as(whole, work, losses)
    assert (
        all(f"this process is already training {work / 'run'}" in s for s in said)
        and "nested" in said[0]
        and "thread" in said[1]
    )
    assert "inside that run" in said[0] and "Wait until it has ended" in said[1]
    with pytest.raises(TypeError, match="must be a Callback"):
        go(work, 3)
    assert go(work)[0].finished  # the refusals hold nothing


@pytest.mark.parametrize(
    "options, why",
    [
        (
            dict(early_stopping=3),
            "early_stopping=3 needs a validation loss, and validation_split=0",
        ),
        (
            dict(save_best_only=True, early_stopping=1),
            "early_stopping=1 and save_best_only=True need a",
        ),
        (dict(save_best_only=True), "save_best_only=True needs"),
    ],
)
def test_options_that_wait_for_a_validation_loss(work, options, why):
    "Refused at the call where none will come, and nothing is made"
    with pytest.raises(ValueError, match=why):
        go(work, validation_split=0, **options)
    assert not (work / "run").exists()


def test_too_few_rows_to_validate(work):
    "That is known once the rows are read"
    (work / "text.jsonl").write_text('{"text": "one row, and no second"}\n')
    with pytest.raises(
        ValueError,
        match=("early_stopping=2 needs a validation loss, and no row long enough was held out"),
    ):
        go(work, early_stopping=2)
