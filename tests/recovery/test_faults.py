"""What goes wrong on real machines: bad input, full disks, damage, signals, two processes.

Each fault has a clear message, and the next call resumes.
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
    "Record training and validation losses exactly."

    def __init__(self):
        self.at = {}

    def on_log(self, t, row):
        for k in ("loss", "eval_loss"):
            if k in row:
                self.at[row["step"], k] = row[k].hex()


class AtStep(Callback):
    "Run a function after a step was trained and saved."

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


def run_fit(work, *callbacks, **options):
    "Train in this process; return the run and its losses."
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
def uninterrupted(tmp_path_factory):
    "The uninterrupted run: folder and losses."
    work = child.new_work(tmp_path_factory.mktemp("whole") / "work")
    return work, run_fit(work)[1]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    "A run that stopped at step 12, with checkpoints 5 and 10."
    work = child.new_work(tmp_path_factory.mktemp("cut") / "work")
    with pytest.raises(PowerCut):
        run_fit(work, AtStep(12, power_cut))
    assert steps(work) == [5, 10]
    return work


def copy_to(work, to):
    shutil.copytree(work, to)
    return to


def assert_same_run(uninterrupted, work, losses, since=0):
    "Check that a run equals the uninterrupted one bit for bit, from a step on."
    assert weights(work) == weights(uninterrupted[0])
    assert {k: v for k, v in losses.items() if k[0] > since} == {
        k: v for k, v in uninterrupted[1].items() if k[0] > since
    }
    assert all(
        uninterrupted[1][k] == v for k, v in losses.items()
    )  # a save comes before the evaluation of its step, which is repeated
    history = lambda w: [
        (r["step"], r.get("loss"), r.get("eval_loss")) for r in open_run(w / "run").history
    ]
    assert history(work) == history(uninterrupted[0])
    assert not leftovers(work)


# --- bad input ------------------------------------------------------------------------------------
def bad_gzip(f):
    f.write_bytes(gzip.compress(GOOD)[:-200])


GOOD = b"".join(
    json.dumps({"text": f"a good text, number {i} of many"}).encode() + b"\n" for i in range(60)
)
BAD = {  # name → (file name, how to create it, words of the message, options)
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
    "Return the arguments of `minigpt`."
    words = [*map(str, args)]
    for k, v in options.items():
        if v is not None and not isinstance(v, bool):
            words += [f"--{k.replace('_', '-')}", str(v)]
        if isinstance(v, bool):
            words += [f"--{'' if v else 'no-'}{k.replace('_', '-')}"]
    return words


def terminal(monkeypatch, capsys, *args, **options):
    "Return the exit status and all output of a command."
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
def test_bad_input_is_reported(case, tmp_path, work, uninterrupted):
    name, make, words, options = BAD[case]
    make(tmp_path / name)
    with pytest.raises((DataError, FileNotFoundError)) as e:
        fit(child.shape(), tmp_path / name, output_dir=work / "run", **{**SHORT, **options})
    for w in words:
        assert w in str(e.value)
    assert "\n" not in str(e.value).strip() and not leftovers(work)
    # No files are left that would interfere with good input.
    _, losses = run_fit(work)
    assert_same_run(uninterrupted, work, losses)


@pytest.mark.parametrize("case", BAD)
def test_bad_input_in_a_terminal_is_one_line(case, tmp_path, monkeypatch, capsys):
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


def test_terminal_continues_after_bad_input(tmp_path, monkeypatch, capsys, work):
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


def test_command_reports_bad_input(tmp_path):
    "In a process: one line and no traceback."
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
def test_bad_options_are_refused(options, words, work):
    with pytest.raises((TypeError, ValueError)) as e:
        run_fit(work, **options)
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


# Mistakes that a beginner may make → words of the error: the thing, its value, what it must be
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
def test_mistakes_are_explained(case, uninterrupted):
    do, words = MISTAKES[case]
    with pytest.raises((CheckpointError, OSError, TypeError, ValueError)) as e:
        do(uninterrupted[0])
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
def test_unsupported_files_are_refused(name, uninterrupted, tmp_path):
    harm, use, words = FILES_OF_OTHERS[name]
    copy_to(uninterrupted[0], tmp_path / "work")
    harm(tmp_path / "work" / "run" / name)
    with pytest.raises((CheckpointError, OSError, ValueError)) as e:
        use(tmp_path / "work")
    for w in words:
        assert w in str(e.value)


def test_different_tokenizer_is_a_warning(uninterrupted, tmp_path):
    "It may be intended, so it is a warning and not an error."
    new = lambda name, **kw: (
        new_run(
            uninterrupted[0],
            model=uninterrupted[0] / "run",
            output_dir=tmp_path / name,
            max_steps=1,
            **kw,
        ).path
        / "run.log"
    ).read_text(encoding="utf-8")
    assert "was trained with another tokenizer" in new(
        "other", tokenizer=train_tokenizer(["other words"] * 9, vocab_size=280)
    )
    assert "another tokenizer" not in new("own")


def test_damaged_run_does_not_hide_other_runs(uninterrupted, tmp_path):
    copy_to(uninterrupted[0], tmp_path / "runs")
    shutil.copytree(tmp_path / "runs" / "run", tmp_path / "runs" / "other")
    (tmp_path / "runs" / "other" / "run.json").write_text("{")
    said = runs_table(list_runs(tmp_path / "runs"))
    assert "run  " in said and "20/20" in said and "other/run.json is not valid JSON" in said


def test_single_text_is_trained_on(tmp_path):
    "Whether or not its hash assigns it to the validation split."
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


def test_on_bad_row_error_applies_to_an_existing_token_set(work):
    "The token set was built with on_bad_row='skip' first."
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
def test_output_dir_below_a_file_is_refused(work, monkeypatch, capsys):
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
def unprivileged_user():
    "Run as an unprivileged user for a while, because root may write anywhere."
    if not hasattr(os, "geteuid"):
        pytest.skip("requires POSIX permissions")
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("mode", [0o000, 0o555])
def test_output_dir_without_permission_is_refused(mode, work, uninterrupted):
    import tempfile

    with tempfile.TemporaryDirectory(
        prefix="minigpt-test-"
    ) as outside:  # other users cannot enter pytest's own folders
        os.chmod(outside, 0o755)
        text = shutil.copy(work / "text.jsonl", outside)
        locked = Path(outside) / "locked"
        locked.mkdir()
        locked.chmod(mode)
        if os.geteuid() == 0:
            os.chown(locked, 65534, 65534)
        with (
            unprivileged_user(),
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
        assert (run.path / "model.safetensors").read_bytes() == weights(uninterrupted[0])


# --- a full disk ----------------------------------------------------------------------------------
class SmallDisk:
    "A real disk of a few MB that can be filled to the last byte."

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
    "If no disk can be mounted, fsync reports that the disk is full."

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


class LogLargeMetrics(Callback):
    "Log more metrics than the page that the file already occupies can hold."

    def on_step(self, t):
        t.log(dict(step=t.step, note="x" * 1000))


def disk_full(disk, uninterrupted, leave, *callbacks, **options):
    "Fill the disk after the save of step 5; return the log of the failed run."
    work = child.new_work(disk.path / "work")
    with pytest.raises(CheckpointError) as e:
        run_fit(work, AtStep(6, lambda t: disk.fill(leave)), *callbacks, **options)
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
        "the incomplete checkpoint still takes space"
    )
    disk.free()
    messages = log(work)
    _, losses = run_fit(work, **options)
    assert "resuming from checkpoint-5" in log(work)
    assert weights(work) == weights(uninterrupted[0])
    assert {k: v for k, v in losses.items() if k[1] == "loss"} == {
        k: v for k, v in uninterrupted[1].items() if k[0] > 5 and k[1] == "loss"
    }
    assert not leftovers(work)
    return messages


def test_full_disk_during_save(disk, uninterrupted):
    messages = disk_full(disk, uninterrupted, 100_000, evaluation_strategy="no")
    assert "NOT SAVED at step 10" in messages and "Training continues" in messages


def test_full_disk_during_save_of_best(disk, uninterrupted):
    "A better model that cannot be saved does not stop the training."
    disk_full(disk, uninterrupted, 100_000)


def test_no_space_for_the_best_model_at_the_end(uninterrupted, work, monkeypatch):
    "The run finishes all the same."
    real = CheckpointStore.save

    def full(self, state):
        if self.kind == "best" and state.trainer["global_step"] == STEPS:
            raise CheckpointError("No space left on device")
        return real(self, state)

    monkeypatch.setattr(CheckpointStore, "save", full)
    run, _ = run_fit(work)
    assert (
        run.finished
        and weights(work) == weights(uninterrupted[0])
        and "the best model is NOT SAVED" in log(work)
    )


@pytest.mark.parametrize("where", ["run/checkpoints", "run"])
def test_wrong_bytes_on_disk_are_detected(where, uninterrupted, work, monkeypatch):
    "The previous file stays until the new one is verified."
    run_fit(work)
    before = weights(work)
    real = minigpt.checkpoint.store.write_safetensors

    def wrong(path, *how, **more):
        result = real(path, *how, **more)
        data = bytearray(Path(path).read_bytes())
        data[-5] ^= 1
        Path(path).write_bytes(data)
        return result

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


def test_disk_full_to_the_last_byte(disk, uninterrupted):
    "Training continues to its end although no metrics can be written."
    disk_full(disk, uninterrupted, 0, LogLargeMetrics(), evaluation_strategy="no")


def test_full_disk_during_plot(work, uninterrupted, monkeypatch):
    "There is space for the checkpoint, but not for the loss plot."
    import minigpt.run.metrics

    def save_plots(*a, **k):
        raise OSError(errno.ENOSPC, "No space left on device", "loss_curve_step_10.png")

    monkeypatch.setattr(minigpt.run.metrics, "save_plots", save_plots)
    _, losses = run_fit(work, plot_loss=True)
    assert_same_run(uninterrupted, work, losses)
    assert "loss_curve" in log(work) and "No space left" in log(work)


def test_full_disk_at_the_start(disk, uninterrupted):
    work = child.new_work(disk.path / "work")
    disk.fill(40_000)
    with pytest.raises((OSError, CheckpointError, DataError)) as e:
        run_fit(work)
    assert "No space left" in str(e.value) and str(disk.path) in str(e.value), (
        "the message names neither the reason nor the path"
    )
    disk.free()
    _, losses = run_fit(work)
    assert_same_run(uninterrupted, work, losses)


def test_list_of_files(work):
    "A list of texts; a wrong list is refused even if the tokens must be built again."
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
def test_training_continues_when_its_folder_disappears(uninterrupted, work, how):
    """What is saved afterwards can be found and resumed from.

    No other process can take the run; the earlier losses are kept.
    """

    def disappear(t):
        shutil.rmtree(t.run_path) if how == "deleted" else t.run_path.rename(work / "elsewhere")

    def end(t):
        if t.step == 16:
            with pytest.raises(RuntimeError, match="another process"), run_lock(work / "run"):
                pass
            raise PowerCut

    with pytest.raises(PowerCut):
        run_fit(work, AtStep(7, disappear), AtStep(16, end))
    assert steps(work) == [10, 15] and [
        r["step"] for r in open_run(work / "run").history if "loss" in r
    ][:16] == [*range(1, 17)]
    assert log(work).count("was deleted, moved or renamed") == 1
    _, losses = run_fit(work)
    assert (
        weights(work) == weights(uninterrupted[0])
        and all(uninterrupted[1][k] == v for k, v in losses.items())
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


def test_checkpoint_has_these_files(interrupted):
    assert (
        sorted(p.name for p in (interrupted / "run/checkpoints/checkpoint-10").iterdir()) == FILES
    )


@pytest.mark.parametrize("name", FILES)
def test_damaged_checkpoint_is_skipped(name, interrupted, tmp_path):
    for kind, damage in DAMAGE.items():
        store = CheckpointStore(copy_to(interrupted / "run/checkpoints", tmp_path / kind))
        newest = store.folder / "checkpoint-10"
        damage(newest / name)
        reported = []
        assert store.newest(lambda c, why: reported.append((c.step, why))).step == 5
        assert len(reported) == 1 and reported[0][0] == 10 and name in str(reported[0][1]), kind
        with pytest.raises(CheckpointError, match=re.escape(name)):
            read_checkpoint(newest)


def test_file_of_another_checkpoint_is_detected(interrupted, tmp_path):
    "A complete file, but not the one in the manifest."
    for name in FILES:
        store = CheckpointStore(copy_to(interrupted / "run/checkpoints", tmp_path / name))
        old, new = (store.folder / f"checkpoint-{s}" / name for s in (5, 10))
        if old.read_bytes() == new.read_bytes():
            continue  # configuration and tokenizer are equal
        shutil.copy(old, new)
        said = []
        c = store.newest(lambda c, why: said.append((c.step, why)))
        assert (
            (c.step, [s for s, _ in said]) == (5, [10])
            if name != "MANIFEST.json"
            else said[0][0] == 10
        ), name


@pytest.mark.parametrize("name,kind", [(n, random.Random(n).choice(list(DAMAGE))) for n in FILES])
def test_training_resumes_from_the_previous_checkpoint(
    name, kind, interrupted, tmp_path, uninterrupted
):
    work = copy_to(interrupted, tmp_path / "work")
    DAMAGE[kind](work / "run/checkpoints/checkpoint-10" / name)
    _, losses = run_fit(work)
    assert re.search(
        rf"checkpoint-10 is skipped: .*{re.escape(name)}", log(work)
    ) and "resuming from checkpoint-5" in log(work)
    assert_same_run(uninterrupted, work, losses, 5)
    assert [p.name for p in (work / "run/checkpoints").iterdir() if "damaged" in p.name] == [
        "checkpoint-10.damaged-1"
    ], "the damaged checkpoint is kept aside for inspection"


def test_any_damaged_byte_of_a_manifest_is_handled(interrupted, tmp_path):
    "The damage is reported, or it changes nothing; no other exception is raised."
    folder = copy_to(interrupted / "run/checkpoints/checkpoint-10", tmp_path / "checkpoint-10")
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


def test_incomplete_manifest_is_damaged(interrupted, tmp_path):
    folder = copy_to(interrupted / "run/checkpoints/checkpoint-10", tmp_path / "checkpoint-10")
    m = read_json(folder / "MANIFEST.json")
    m["files"] = {}
    (folder / "MANIFEST.json").write_text(json.dumps(m))
    assert problem(folder), "a checkpoint without files counts as complete"


def test_all_checkpoints_damaged_restarts_training(interrupted, tmp_path, uninterrupted):
    "Training restarts from the beginning and reports it."
    work = copy_to(interrupted, tmp_path / "work")
    for n in (5, 10):
        flip(100)(work / f"run/checkpoints/checkpoint-{n}/model.safetensors")
    _, losses = run_fit(work)
    said = log(work)
    assert (
        "checkpoint-5 is skipped: model.safetensors is damaged" in said
        and "starting again with the same seed" in said
    )
    assert losses == uninterrupted[1] and weights(work) == weights(uninterrupted[0])


def test_resume_from_a_named_damaged_checkpoint_is_refused(interrupted, tmp_path):
    work = copy_to(interrupted, tmp_path / "work")
    flip(-1)(work / "run/checkpoints/checkpoint-5/optimizer.safetensors")
    with pytest.raises(
        CheckpointError,
        match="cannot resume from .*checkpoint-5: optimizer.safetensors is damaged",
    ):
        run_fit(work, resume="checkpoint-5")
    with pytest.raises(
        CheckpointError,
        match="'checkpoint-7' is not a checkpoint of this run; it has checkpoint-5, checkpoint-10",
    ):
        run_fit(work, resume="checkpoint-7")
    assert steps(work) == [5, 10], "the refused resume moved checkpoints aside"


# --- signals --------------------------------------------------------------------------------------
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="Windows has no SIGHUP")
def test_sighup_stops_the_run(work, uninterrupted):
    "The run stops, unless nohup has disabled the signal."

    def gone(t):
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)

    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit):
            run_fit(work, AtStep(7, gone))
        assert steps(work) == [5, 7]
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        _, losses = run_fit(work, AtStep(12, gone))
        assert_same_run(uninterrupted, work, losses, 7)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_stops_the_run(workers, work, uninterrupted):
    "What a machine sends before it is shut down."
    p = child.start(work, **{**SHORT, "pause": 0.05, "dataloader_workers": workers})
    wait(lambda: len(child.losses(work)) > 6 + workers, p)
    p.send_signal(signal.SIGTERM)
    assert p.wait(60) == 143, (work / "says.txt").read_text()
    before = {(s, k): x for _, s, k, x in child.losses(work)}
    stopped = max(s for s, k in before if k == "loss")
    assert stopped < STEPS and max(steps(work)) == stopped and not leftovers(work)
    assert f"stopped after step {stopped}" in log(work) and "resumes from there" in log(work)
    _, losses = run_fit(work, dataloader_workers=workers)
    assert min(s for s, k in losses if k == "loss") == stopped + 1
    assert {**before, **losses} == uninterrupted[1]
    assert_same_run(uninterrupted, work, losses, stopped)


def wait(until, process, seconds=90):
    end = time.monotonic() + seconds
    while not until():
        assert process.poll() is None, "the process exited"
        assert time.monotonic() < end, "the condition was not met in time"
        time.sleep(0.005)


class Interrupt(Callback):
    "Ctrl-C during the optimizer step."

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


def test_ctrl_c_waits_for_the_optimizer_step(work, uninterrupted):
    stop = Interrupt(7)
    with pytest.raises(
        KeyboardInterrupt,
        match="stopped after step 7 and saved .*checkpoint-7; the same call resumes",
    ):
        run_fit(work, stop)
    assert stop.came_back, "the interrupt acted inside the step"
    assert steps(work) == [5, 7] and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    _, losses = run_fit(work)
    assert_same_run(uninterrupted, work, losses, 7)


def test_ctrl_c_at_the_last_step_leaves_a_finished_run(work, uninterrupted):
    with contextlib.suppress(KeyboardInterrupt):
        run_fit(work, Interrupt(STEPS))
    assert open_run(work / "run").finished and weights(work) == weights(uninterrupted[0])


def test_ctrl_c_where_a_save_is_due_saves_once(work, uninterrupted):
    with pytest.raises(KeyboardInterrupt):
        run_fit(work, Interrupt(10))
    assert steps(work) == [5, 10]
    _, losses = run_fit(work)
    assert_same_run(uninterrupted, work, losses, 10)


def test_a_second_ctrl_c_stops_at_once(work, uninterrupted):
    stop = Interrupt(8, 2)
    with pytest.raises(KeyboardInterrupt, match="immediately, without saving"):
        run_fit(work, stop)
    assert not stop.came_back and steps(work) == [5]
    _, losses = run_fit(work)
    assert_same_run(uninterrupted, work, losses, 5)


# --- more than one --------------------------------------------------------------------------------
def test_second_process_in_a_folder_is_refused(work, uninterrupted):
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
            run_fit(work)
        assert p.poll() is None, "the first was disturbed"
    finally:
        p.kill()
        p.wait()
    _, losses = run_fit(work)  # the lock was released with the process
    last = {(s, k): x for _, s, k, x in child.losses(work)}
    assert (
        {**last, **losses} == uninterrupted[1]
        and weights(work) == weights(uninterrupted[0])
        and not leftovers(work)
    )


# --- going back -----------------------------------------------------------------------------------
def test_going_back_sets_the_later_course_aside(interrupted, tmp_path, uninterrupted):
    work = copy_to(interrupted, tmp_path / "work")
    _, losses = run_fit(work, resume="checkpoint-5")
    assert (work / "run/checkpoints/checkpoint-10.superseded-1/model.safetensors").exists()
    assert re.search(
        r"training goes back to step 5: checkpoint-10 is set aside as"
        r" \S*checkpoint-10.superseded-1",
        log(work),
    )
    assert_same_run(uninterrupted, work, losses, 5)
    assert steps(work) == [10, 15, 20]


def test_going_back_in_a_finished_run(tmp_path, uninterrupted):
    "The old final model no longer counts: an interrupted new course resumes."
    work = copy_to(uninterrupted[0], tmp_path / "work")
    with pytest.raises(PowerCut):
        run_fit(work, AtStep(12, power_cut), resume="checkpoint-10", learning_rate=1e-3)
    assert steps(work) == [10]
    assert not open_run(work / "run").finished, (
        "the model of the abandoned course counts as the final model"
    )
    _, losses = run_fit(work, learning_rate=1e-3)
    assert max(s for s, _ in losses) == STEPS and weights(work) != weights(uninterrupted[0])


def test_best_of_an_abandoned_course_is_ignored(tmp_path, uninterrupted):
    "It is not the best of this run and does not replace the new one."
    work = copy_to(uninterrupted[0], tmp_path / "work")
    assert open_run(work / "run").best.step == STEPS
    run, losses = run_fit(
        work, resume="checkpoint-10", learning_rate=30
    )  # from here on the loss can only rise
    evals = {r["step"]: r["eval_loss"] for r in run.history if r.get("eval_loss") is not None}
    lowest = min(evals, key=evals.get)
    assert lowest < STEPS, "this test needs a loss that rises"
    assert run.best is not None and run.best.step == lowest, evals


def test_more_steps_keep_the_best_model(tmp_path, uninterrupted):
    "The best model was found in the evaluation after the last save."
    work = copy_to(uninterrupted[0], tmp_path / "work")
    assert open_run(work / "run").best.step == STEPS
    run, losses = run_fit(work, max_steps=STEPS + 5, learning_rate=30)  # the loss can only rise
    assert (
        run.best.step == STEPS
        and losses[STEPS + 5, "eval_loss"] > uninterrupted[1][STEPS, "eval_loss"]
    )


def test_stopped_training_frees_its_memory(work):
    "A notebook keeps the error."
    alive = lambda: sum(type(o) is minigpt.train.state.RunTrainer for o in gc.get_objects())
    gc.collect()
    before = alive()
    with pytest.raises(KeyboardInterrupt) as e:
        run_fit(work, Interrupt(7))
    assert alive() == before and e.value.__traceback__

    def at_once(t):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="stopped immediately") as e:
        run_fit(work, AtStep(9, at_once))
    assert alive() == before and e.value.__traceback__


@pytest.mark.parametrize("harm", ["shuffled", "cut", "no valid"])
def test_damaged_tokens_are_rebuilt(harm, interrupted, tmp_path, uninterrupted):
    work = copy_to(interrupted, tmp_path / "work")
    tokens = work / "run/data/train/tokens.bin"
    if harm == "shuffled":
        ids = np.fromfile(tokens, np.uint16)
        ids.sort()
        ids.tofile(tokens)
    elif harm == "cut":
        os.truncate(tokens.with_name("meta.json"), 100)
    else:
        (work / "run/data/valid/meta.json").unlink()
    _, losses = run_fit(work)
    assert_same_run(uninterrupted, work, losses, 10)
    assert "damaged tokens: " in log(work) and (work / "run/data.damaged-1").exists()


def test_unreadable_tokens_are_not_moved(interrupted, tmp_path, uninterrupted, monkeypatch):
    work = copy_to(interrupted, tmp_path / "work")
    (work / "text.jsonl").rename(work / "away")

    def broken(file):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as m:
        m.setattr("minigpt.data.tokensets.hash_file", broken)
        with pytest.raises(OSError, match="Input/output"):
            run_fit(work)
    _, losses = run_fit(work)
    assert_same_run(uninterrupted, work, losses, 10)


def test_overwrite_refuses_to_move_its_own_inputs(uninterrupted, tmp_path):
    work = copy_to(uninterrupted[0], tmp_path / "work")
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


def test_skipped_rows_are_logged(work, capsys):
    "It is also printed, although nothing else is."
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


def test_closed_terminal_does_not_stop_training(work):
    "It does not stop the training."
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


def test_resume_beyond_the_end(interrupted, tmp_path):
    work = copy_to(interrupted, tmp_path / "work")
    with pytest.raises(ValueError, match="beyond max_steps=8; raise max_steps or epochs"):
        run_fit(work, max_steps=8)
    assert steps(work) == [5, 10]


# --- files from elsewhere -------------------------------------------------------------------------
class Payload:
    "Code that runs when it is unpickled."

    def __init__(self, mark):
        self.mark = str(mark)

    def __reduce__(self):
        return Path(self.mark).touch.__func__, (Path(self.mark),)


def test_pickle_is_never_opened(work, tmp_path, uninterrupted):
    mark, bad = tmp_path / "it ran", pickle.dumps(Payload(tmp_path / "it ran"))
    pickle.loads(bad)
    assert mark.exists()
    mark.unlink()  # the payload works
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    (folder / "tokenizer.pkl").write_bytes(bad)
    with pytest.raises(
        ValueError, match="tokenizer.pkl is a pickle.*not read.*train a tokenizer.json"
    ):
        run_fit(work, tokenizer=folder)
    stranger = tmp_path / "stranger"
    stranger.mkdir()
    shutil.copy(uninterrupted[0] / "run/config.json", stranger)
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
        run_fit(work, tokenizer=stranger)
    assert not mark.exists()
    run_fit(work)


def test_options_of_these_tests_are_in_the_config():
    "The tests above use the options they mean."
    assert set(SHORT) <= set(TrainConfig().to_dict())


def test_kill_during_tokenization_leaves_no_worker_and_no_lock(tmp_path):
    "Worker processes inherit the lock of the run; they must exit with the killed process."
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


def test_second_training_in_a_process_is_refused(work, uninterrupted):
    """A second one, from a callback or a thread, is refused by name and changes nothing.

    Other functions can be used.
    """
    said = []

    def try_second_run(where):
        with pytest.raises(RuntimeError) as e:
            fit("tiny", work / "text.jsonl", output_dir=work / where)
        said.append(str(e.value))

    def others(t):
        try_second_run("nested")
        thread = threading.Thread(target=try_second_run, args=("thread",))
        thread.start()
        thread.join()
        assert (
            open_run(work / "run").history
            and not (work / "nested").exists()
            and not (work / "thread").exists()
        )

    run, losses = run_fit(work, AtStep(7, others))
    assert_same_run(uninterrupted, work, losses)
    assert (
        all(f"this process is already training {work / 'run'}" in s for s in said)
        and "nested" in said[0]
        and "thread" in said[1]
    )
    assert "inside that run" in said[0] and "Wait until it has ended" in said[1]
    with pytest.raises(TypeError, match="must be a Callback"):
        run_fit(work, 3)
    assert run_fit(work)[0].finished  # the refused calls hold no lock


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
def test_options_that_need_a_validation_loss_are_refused_without_one(work, options, why):
    "Refused at the call if there will be none, and no file is created."
    with pytest.raises(ValueError, match=why):
        run_fit(work, validation_split=0, **options)
    assert not (work / "run").exists()


def test_too_few_rows_to_validate_is_refused(work):
    "It is known once the rows are read."
    (work / "text.jsonl").write_text('{"text": "one row, and no second"}\n')
    with pytest.raises(
        ValueError,
        match=("early_stopping=2 needs a validation loss, and no row long enough was held out"),
    ):
        run_fit(work, early_stopping=2)
