"""Input that follows the documentation of other programs.

It is accepted as intended, or the error names what to write instead.
"""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

from minigpt import cli
from minigpt.checkpoint.store import CheckpointError
from minigpt.config.options import TrainConfig
from minigpt.core.files import human_size
from minigpt.model.gpt import GPTConfig
from minigpt.run.backup import BackupError, check_backup_folder, drive_mount
from minigpt.run.folder import open_run
from minigpt.run.guard import Guard
from minigpt.run.metrics import read_log
from minigpt.train.inputs import ResumeError
from minigpt.train.trainer import Callback, fit, resume
from tests.harness import kill_child as child

OPTIONS = dict(child.OPTIONS, max_steps=4, save_steps=2, eval_steps=4, eval_sequences=4)
SHAPE = dict(dim=16, n_layer=1, n_head=2, n_kv_head=1, ffn_dim=32)
MODEL = GPTConfig(vocab_size=300, **SHAPE)
QUICK = [
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


def minigpt(*words):
    return CliRunner().invoke(cli.app, [str(w) for w in words])


def run_log(folder):
    return (folder / "run.log").read_text("utf-8")


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    child.write_text(tmp_path / "text.jsonl")
    return tmp_path


# --- the shape of a model in a configuration file -------------------------------------------------
def test_shape_takes_the_vocabulary_of_the_tokenizer(work):
    (work / "c.json").write_text(
        json.dumps(dict(OPTIONS, model=SHAPE, data_files="text.jsonl", output_dir="run"))
    )
    assert minigpt("train", "--config-file", "c.json").exception is None
    run = open_run("run")
    assert (
        run.facts["model"]["vocab_size"] == run.tokenizer.vocab_size == 300
        and run.history[0]["loss"] < 6.5
    )
    (work / "wrong.json").write_text(
        json.dumps(
            dict(OPTIONS, model=dict(SHAPE, depth=3), data_files="text.jsonl", output_dir="none")
        )
    )
    assert "GPTConfig has no field 'depth'" in str(
        minigpt("train", "--config-file", "wrong.json").exception
    )


def test_shape_with_a_vocabulary_keeps_it(work):
    """Older versions gave a shape without a size 20,000 tokens:

    such a run resumes with the same file.
    """
    fit({**SHAPE, "vocab_size": 320}, "text.jsonl", output_dir="run", **OPTIONS)
    assert open_run("run").facts["model"]["vocab_size"] == 320
    assert (
        fit(SHAPE, "text.jsonl", output_dir="run", **{**OPTIONS, "max_steps": 5}).step == 5
        and open_run("run").facts["model"]["vocab_size"] == 320
    )


# --- resuming -------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    "A run of four steps."
    folder = tmp_path_factory.mktemp("words")
    child.write_text(folder / "text.jsonl")
    with pytest.MonkeyPatch.context() as m:
        m.chdir(folder)
        fit(MODEL, "text.jsonl", output_dir="outputs", **OPTIONS)
    return folder


@pytest.fixture
def copy(outputs, tmp_path, monkeypatch):
    shutil.copytree(outputs, tmp_path / "w")
    monkeypatch.chdir(tmp_path / "w")
    return tmp_path / "w"


@pytest.mark.parametrize(
    "words",
    [
        ["--resume", "outputs/checkpoint-2", "-y"],
        ["--resume_from_checkpoint", "outputs/checkpoints/checkpoint-2", "--yes"],
    ],
)
def test_resume_accepts_the_path_of_a_checkpoint(copy, words):
    "The path alone names the run, its data and its options."
    r = minigpt("train", *words, "--max-steps", "5", "--no-progress")
    assert r.exception is None and "going back to step 2 once" in run_log(copy / "outputs")
    run = open_run("outputs")
    assert (
        run.step == 5
        and [a["step"] for a in run.facts["attempts"]] == [0, 2]
        and not (copy / "runs").exists()
    )


def test_resume_accepts_a_run(copy):
    assert (
        minigpt("train", "--resume", "outputs", "--max-steps", "5", "--no-progress").exception
        is None
    )
    assert [a["step"] for a in open_run("outputs").facts["attempts"]] == [0, 4]


def test_fit_accepts_the_path_of_a_checkpoint(copy):
    run = fit(
        MODEL,
        "text.jsonl",
        output_dir="outputs",
        resume_from_checkpoint="outputs/checkpoint-2",
        **{**OPTIONS, "max_steps": 5},
    )
    assert [a["step"] for a in run.facts["attempts"]] == [0, 2]
    with pytest.raises(CheckpointError, match="is not a checkpoint of this run"):
        fit(
            MODEL, "text.jsonl", output_dir="outputs", resume="elsewhere/checkpoint-2", **OPTIONS
        )  # the name alone would match


def test_resume_without_a_run_is_refused(work):
    (work / "theirs/checkpoint-5").mkdir(parents=True)
    (work / "theirs/checkpoint-5/config.json").write_text("{}")
    e = str(minigpt("train", "--resume", "theirs/checkpoint-5", "-y").exception)
    assert (
        "theirs is not a run of this library" in e
        and "minigpt train DATA --config theirs/checkpoint-5" in e
    )
    assert (
        "none is not a run" in str(minigpt("train", "--resume", "none/checkpoint-5").exception)
        and not (work / "none").exists()
    )
    assert "no data to train on" in str(minigpt("train", "--resume", "checkpoint-5").exception)


# --- names of other programs ----------------------------------------------------------------------
def test_early_stopping_without_a_patience(work):
    (work / "c.yaml").write_text("early_stopping: True\n")
    assert (
        minigpt(
            "train",
            "text.jsonl",
            *QUICK,
            "--config-file",
            "c.yaml",
            "--output-dir",
            "run",
            "--max-steps",
            "1",
        ).exception
        is None
    )
    assert open_run("run").facts["train"]["early_stopping"] == 3 and (
        "early stopping: training ends after 3 evaluations in a row without"
        " a better validation loss"
    ) in run_log(work / "run")
    assert (
        TrainConfig.make(early_stopping_patience=5, early_stopping=True).early_stopping
        == TrainConfig.make(early_stopping=True, early_stopping_patience=5).early_stopping
        == 5
    )


def test_unknown_options_are_explained(monkeypatch, capsys):
    for words, answer in {
        "--no-unsloth": "Unsloth is not used",
        "--run_name=x": "a run has the name of its directory, output_dir",
        "--mode sft": "use stage",
        "--early-stopping --no-unsloth": "Unsloth is not used",
    }.items():
        monkeypatch.setattr("sys.argv", ["minigpt", "train", "text.txt", *words.split()])
        with pytest.raises(SystemExit) as e:
            cli.main()
        assert answer in str(e.value)
    with pytest.raises(
        TypeError, match="unknown option 'run_name': a run has the name of its directory"
    ):
        TrainConfig.make(run_name="x")


def test_file_name_is_found_in_the_data_folders(work):
    (work / "data/dataset/minimind_dataset").mkdir(parents=True)
    (work / "text.jsonl").rename(work / "data/dataset/minimind_dataset/sft_mini_512.jsonl")
    (work / "data/dataset/custom").mkdir()
    child.write_text(work / "data/dataset/custom/own.jsonl", seed=1)
    assert (
        minigpt(
            "train",
            "--data-files",
            "sft_mini_512.jsonl",
            *QUICK,
            "--output-dir",
            "a",
            "--max-steps",
            "1",
        ).exception
        is None
    )
    assert (
        "training data: sft_mini_512.jsonl = data/dataset/minimind_dataset/sft_mini_512.jsonl"
        in run_log(work / "a")
    )
    assert (
        minigpt(
            "train",
            "--data-files",
            "sft_mini_512.jsonl",
            "--data-files",
            "own.jsonl",
            *QUICK,
            "--output-dir",
            "b",
            "--max-steps",
            "1",
        ).exception
        is None
    )
    files = ["data/dataset/minimind_dataset/sft_mini_512.jsonl", "data/dataset/custom/own.jsonl"]
    assert [
        s["path"] for s in json.loads((work / "b/data/train/meta.json").read_text())["sources"]
    ] == files and all(f"{f.split('/')[-1]} = {f}" in run_log(work / "b") for f in files)
    assert "there is no file sft_maxi.jsonl" in str(
        minigpt("train", "--data-files", "sft_maxi.jsonl", *QUICK).exception
    )


# --- calls that are refused -----------------------------------------------------------------------
def file_hashes(folder):
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: fit(MODEL, "none.txt", output_dir="runs/x", **OPTIONS), FileNotFoundError),
        (lambda: fit("medum", "text.jsonl", output_dir="runs/x", **OPTIONS), ValueError),
        (lambda: fit("org/model", "text.jsonl", output_dir="runs/x", **OPTIONS), FileNotFoundError),
        (
            lambda: fit(MODEL, "text.jsonl", output_dir="runs/x", **OPTIONS, resume="checkpoint-5"),
            CheckpointError,
        ),
        (lambda: fit(MODEL, "none.txt", output_dir="mine", **OPTIONS), FileNotFoundError),
        (lambda: fit(MODEL, "none.txt", output_dir="theirs", **OPTIONS), FileExistsError),
        (
            lambda: fit(
                MODEL,
                "text.jsonl",
                output_dir="theirs",
                **OPTIONS,
                overwrite=True,
                tokenizer="none",
            ),
            FileNotFoundError,
        ),
        (lambda: resume("runs/x", gdrive_backup_dir="drive"), FileNotFoundError),
    ],
    ids=[
        "no data",
        "no preset",
        "a hub's name",
        "no checkpoint",
        "a folder with notes",
        "a folder with a model",
        "moved aside",
        "no backup",
    ],
)
def test_refused_call_changes_no_files(work, call, error):
    for name in ("mine/notes.txt", "theirs/model.safetensors", "drive/other/x"):
        (work / name).parent.mkdir(parents=True)
        (work / name).write_text("x")
    before = file_hashes(work)
    with pytest.raises(error):
        call()
    assert file_hashes(work) == before


def test_refused_call_does_not_end_a_run(copy):
    before = run_log(copy / "outputs")
    with pytest.raises(ResumeError):
        fit(MODEL, "text.jsonl", output_dir="outputs", **OPTIONS, seed=7)
    assert (
        "FileNotFoundError" not in run_log(copy / "outputs")
        and "ENDED" not in run_log(copy / "outputs")
        and run_log(copy / "outputs").startswith(before)
    )

    class Fail(Callback):
        def on_step(self, t):
            raise OSError("unplugged")

    with pytest.raises(OSError, match="unplugged"):
        fit(
            MODEL,
            "text.jsonl",
            output_dir="outputs",
            callbacks=[Fail()],
            **{**OPTIONS, "max_steps": 6},
        )
    assert "ENDED by OSError: unplugged" in run_log(copy / "outputs")


def test_tokens_of_a_refused_call_are_reused(work):
    with pytest.raises(ValueError, match="one step takes 4000"):
        fit(MODEL, "text.jsonl", output_dir="run", **{**OPTIONS, "batch_size": 2000})
    assert sorted(p.name for p in (work / "run").iterdir()) == ["data", "tokenizer"]
    modified = (work / "run/data/train/tokens.bin").stat().st_mtime_ns
    assert (
        fit(MODEL, "text.jsonl", output_dir="run", **{**OPTIONS, "max_steps": 1}).step == 1
        and (work / "run/data/train/tokens.bin").stat().st_mtime_ns == modified
    )


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["chat", "runs/boats"], ["runs/boats is not a run", "minigpt train DATA --config DIR"]),
        (
            ["chat", "jingyaogong/MiniMind2"],
            ["download it first", "snapshot_download('jingyaogong/MiniMind2', local_dir='DIR')"],
        ),
        (
            ["train", "text.jsonl", "--config", "Qwen/Qwen3-0.6B"],
            ["download it first", "snapshot_download('Qwen/Qwen3-0.6B', local_dir='DIR')"],
        ),
        (
            ["train", "text.jsonl", "--config", "Qwen/Qwen3-0.6B", "--lora-r", "4"],
            ["must be its directory", "download it first"],
        ),
        (
            ["plot", "model"],
            [
                "model is not a run: it is a model without run.json",
                "minigpt train DATA --config model",
            ],
        ),
        (
            ["monitor", "outputs/checkpoints/checkpoint-2", "--once"],
            [
                "is part of a run: pass the run",
                "outputs",
                "minigpt resume",
                "--resume checkpoint-2",
            ],
        ),
        (
            ["plot", "outputs/checkpoint-4"],
            ["is part of a run: pass the run", "--resume checkpoint-4"],
        ),
    ],
    ids=lambda x: " ".join(x[:3]) if x[0] in ("chat", "train", "plot", "monitor") else "",
)
def test_paths_without_a_run_are_explained(copy, words, parts):
    (copy / "runs").mkdir()
    (copy / "model").mkdir()
    (copy / "model/config.json").write_text("{}")
    e = str(minigpt(*words).exception)
    assert all(p in e for p in parts), e


# --- a folder named MyDrive -----------------------------------------------------------------------
def test_folder_named_mydrive(tmp_path, monkeypatch):
    "On a laptop it is a folder; on Colab, at Colab's mount; without a mount, it is not Drive."
    (tmp_path / "stuff/MyDrive").mkdir(parents=True)
    (tmp_path / "empty").mkdir()
    check_backup_folder(tmp_path / "stuff/MyDrive/x")
    assert (tmp_path / "stuff/MyDrive/x").is_dir() and drive_mount(
        tmp_path / "stuff/MyDrive/x"
    ) is None
    with pytest.raises(BackupError, match="nothing is mounted at .*empty"):
        check_backup_folder(tmp_path / "empty/MyDrive/x")
    real = os.path.isdir
    with monkeypatch.context() as m:  # an earlier program created the folder at Colab's mount point
        m.setattr("os.path.isdir", lambda p: str(p).startswith("/content/drive") or real(p))
        with pytest.raises(BackupError, match="nothing is mounted at /content/drive"):
            check_backup_folder("/content/drive/MyDrive/x")
    monkeypatch.setenv("COLAB_RELEASE_TAG", "release")
    with pytest.raises(BackupError, match="nothing is mounted at .*stuff"):
        check_backup_folder(tmp_path / "stuff/MyDrive/x")
    assert drive_mount(tmp_path / "stuff/MyDrive/x") == tmp_path / "stuff"


# --- the log and status of a run ------------------------------------------------------------------
def test_losses_are_logged(work):
    "The first, the last, and one per minute between them; every evaluation."
    run = fit(MODEL, "text.jsonl", output_dir="run", **{**OPTIONS, "max_steps": 9, "eval_steps": 4})
    lines = [l[20:] for l in run_log(run.path).splitlines() if l[20:].startswith("step ")]
    assert [l.partition(",")[0] for l in lines] == [
        f"step {h['step']} of 9: {k}"
        for h in run.history
        for k in [
            *([f"loss {h['loss']:.4f}"] if h["step"] in (1, 9) else []),
            *([f"validation loss {h['eval_loss']:.4f}"] if "eval_loss" in h else []),
        ]
    ]
    assert (
        len(lines) == 5
        and all("learning rate" in l and "tokens/s" in l for l in lines if "validation" not in l)
        and not read_log(run.path / "run.log", troubles=True)
    )


def test_losses_are_logged_every_minute(monkeypatch):
    from minigpt.train.callbacks import LogLosses

    lines, now = [], 0.0
    monkeypatch.setattr("minigpt.train.callbacks.time.monotonic", lambda: now)
    log, t = LogLosses(SimpleNamespace(write=lines.append)), SimpleNamespace(max_steps=10**6)
    for step in range(1, 1801):
        now = step * 0.1
        log.on_log(t, dict(step=step, loss=1.0, lr=0.1, tokens_per_second=9.0))
    assert [l.split(" of ")[0] for l in lines] == ["step 1", "step 601", "step 1,201"]


def test_monitor_shows_memory_of_model_and_optimizer(copy):
    from minigpt.run.status import numbers, run_status, status_text

    s, at = run_status("outputs"), copy / "outputs/checkpoints/checkpoint-4"
    assert (s["model_size"], s["optimizer_size"]) == tuple(
        (at / f"{n}.safetensors").stat().st_size for n in ("model", "optimizer")
    ) and s["optimizer_size"] > 1.9 * s["model_size"]
    assert (
        f"model {human_size(s['model_size'])} · optimizer {human_size(s['optimizer_size'])}"
        in status_text(s)
        and "model" in dict(numbers(s))
    )
    shutil.rmtree("outputs/checkpoints")
    s = run_status("outputs")
    assert (s["model_size"], s["optimizer_size"]) == (
        4 * open_run("outputs").facts["saved_params"],
        None,
    )


def test_throttled_training_is_reported(work, monkeypatch, capsys):
    from minigpt.run.status import run_status, status_text

    monkeypatch.setattr(
        "minigpt.train.callbacks.Guard",
        lambda *limits: Guard(*limits, every=0.001, cpu=lambda: 100.0),
    )
    run = fit(MODEL, "text.jsonl", output_dir="run", **{**OPTIONS, "max_steps": 5, "max_cpu": 70.0})
    message = (
        "the processors are 100% busy, more than max_cpu=70, so training pauses between steps"
        " and is SLOWER"
    )
    assert (
        capsys.readouterr().out.count(message) == run_log(run.path).count(message) == 1
    )  # printed although progress=False
    rested = [h["resting"] for h in run.history]
    assert all(0 <= r <= 1 for r in rested) and rested[-1] > 0.3
    s = run_status("run")
    assert any(
        message in t for t in s["troubles"]
    ) and f"paused {rested[-1]:.0%} of the time (max_cpu)" in status_text(s)
    free = fit(MODEL, "text.jsonl", output_dir="free", **{**OPTIONS, "max_steps": 2})
    assert "resting" not in free.history[-1] and "SLOWER" not in run_log(free.path)
