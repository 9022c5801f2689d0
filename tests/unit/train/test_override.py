"""A call that does not describe the run in its folder.

A refused call changes nothing, and what `override` permits resumes with it.
"""

import hashlib
import json
import random
import shutil

import pytest

from minigpt.checkpoint.store import CheckpointError, load_model
from minigpt.data.registry import mix
from minigpt.data.tokensets import TokenSet, build_tokenset
from minigpt.model.gpt import GPTConfig
from minigpt.run.backup import BackupError, _SmallFiles
from minigpt.run.folder import open_run
from minigpt.train.inputs import ResumeError
from minigpt.train.trainer import Callback, fit, resume

SHAPE = GPTConfig(vocab_size=300, dim=16, n_layer=1, n_head=2, n_kv_head=1, ffn_dim=32)
OPTIONS = dict(
    validation_split=0.2,
    tokenizer_vocab_size=300,
    max_seq_len=16,
    batch_size=4,
    max_steps=10,
    save_steps=5,
    eval_steps=5,
    num_threads=1,
    learning_rate=1e-3,
    progress=False,
    plot_loss=False,
)


def write_text(path, words, seed):
    rng = random.Random(seed)
    path.write_text("\n\n".join(" ".join(rng.choices(words, k=12)) for _ in range(120)))
    return path


@pytest.fixture
def work(tmp_path):
    write_text(tmp_path / "a.txt", ["mill", "wheel", "river", "stone", "night"], 1)
    write_text(tmp_path / "b.txt", ["lamp", "street", "window", "rain", "night"], 2)
    return tmp_path


def run_fit(work, name="a.txt", to="run", *callbacks, **options):
    override = options.pop("override", ())
    return fit(
        SHAPE,
        options.pop("train", work / name),
        options.pop("valid", None),
        output_dir=work / to,
        override=override,
        callbacks=callbacks,
        **{**OPTIONS, **options},
    )


def contents(folder, of="**/*"):
    "Return the hashes of all files except logs."
    return {
        p.relative_to(folder).as_posix(): hashlib.md5(p.read_bytes()).hexdigest()
        for p in sorted(folder.glob(of))
        if p.is_file() and p.name not in ("run.log", ".lock")
    }


def run_log(run):
    return (run.path / "run.log").read_text("utf-8")


class Stop(Callback):
    "Stop without saving."

    def __init__(self, at):
        self.at = at

    def on_step(self, t):
        if t.step == self.at:
            t.writer.wait()
            raise RuntimeError("unplugged")


# --- checkpoints without a run, or of another run -------------------------------------------------
@pytest.mark.parametrize("left", ["checkpoints", "snapshots", "best", "final"])
def test_checkpoints_without_run_json_are_not_overwritten(work, left):
    """Without run.json the owner of the checkpoints is unknown.

    A new training would prune and overwrite them.
    """
    a = run_fit(work, max_steps=10)
    lone = work / "lone"
    lone.mkdir()
    if left == "final":
        for f in [*json.loads((a.path / "MANIFEST.json").read_text())["files"], "MANIFEST.json"]:
            shutil.copy(a.path / f, lone / f)
    elif left == "snapshots":
        shutil.copytree(a.path / "checkpoints/checkpoint-5", lone / "snapshots/snapshot-5")
    else:
        shutil.copytree(a.path / left, lone / left)
    before = contents(lone)
    with pytest.raises(FileExistsError) as e:
        run_fit(work, to="lone", max_steps=20)
    assert all(
        part in str(e.value)
        for part in (
            "lone holds",
            "no run.json",
            "overwrite=True",
            "output_dir",
            "pass one of them as the model",
        )
    )
    assert contents(lone) == before
    fresh = run_fit(
        work, to="lone", max_steps=5, overwrite=True
    )  # the option that the message names
    assert fresh.step == 5 and contents(work / "lone.old-1") == before
    if left in ("checkpoints", "final"):
        saved = (
            work / "lone.old-1" / ("checkpoints/checkpoint-10" if left == "checkpoints" else ".")
        )
        assert fit(load_model(saved), work / "a.txt", output_dir=work / "next", **OPTIONS).finished


def test_checkpoint_of_another_run_is_set_aside(work):
    "A folder copied into another one: its checkpoints are neither resumed from nor overwritten."
    with pytest.raises(RuntimeError):
        run_fit(work, "a.txt", "run", Stop(6), max_steps=20)
    a, b = open_run(work / "run"), run_fit(work, "a.txt", "other", max_steps=20, seed=3)
    shutil.copytree(b.path / "checkpoints/checkpoint-20", a.path / "checkpoints/checkpoint-20")
    shutil.copytree(b.path / "checkpoints/checkpoint-15", a.path / "checkpoints/checkpoint-10")
    theirs = contents(b.path / "checkpoints/checkpoint-20")
    a = run_fit(work, max_steps=20)
    assert "resuming from checkpoint-5" in run_log(
        a
    ) and "belongs to another run and is set aside" in run_log(a)
    assert contents(a.path / "checkpoints/checkpoint-20.other-run-1") == theirs
    assert run_fit(work, to="straight", max_steps=20).history[-1]["loss"] == a.history[-1]["loss"]


# --- the tokens ---
@pytest.mark.parametrize(
    "change",
    [
        dict(batch_size=2),
        dict(max_seq_len=32),
        dict(seed=1),
        dict(max_seq_len=1000),
        dict(valid="missing.txt"),
    ],
)
@pytest.mark.parametrize("override", ["data", "validation_split"])
def test_refused_override_keeps_the_tokens(work, change, override):
    """One change is intended, another is not: the call is refused.

    The run resumes as if the call had not been made.
    """
    run = run_fit(work)
    before = contents(run.path)
    name = "b.txt" if override == "data" else "a.txt"
    with pytest.raises((ValueError, FileNotFoundError)):
        run_fit(
            work,
            name,
            override=override,
            **{
                **dict(max_steps=20),
                **({"validation_split": 0.3} if override == "validation_split" else {}),
                **change,
            },
        )
    after = contents(run.path)
    assert {k: after.get(k) for k in before} == before and all(
        k.startswith("data-2/") for k in {*after} - {*before}
    )
    assert run_fit(work, max_steps=12).step == 12 and open_run(run.path).facts["data"]["places"][
        "train"
    ] == ["data"]
    assert ("does not read the tokens in data-2; delete them" in run_log(run)) == (
        run.path / "data-2"
    ).exists()


def test_override_data_twice(work):
    """The tokens change once, and are found again by the same call.

    The earlier tokens stay until the user deletes them.
    """
    run = run_fit(work)
    a = contents(run.path / "data")
    run = run_fit(work, "b.txt", max_steps=15, override="data")
    assert run.facts["data"]["places"] == dict(train=["data-2"], valid=None)
    assert (
        "does not read the tokens in data; delete them" in run_log(run)
        and contents(run.path / "data") == a
    )
    kept = (run.path / "data-2/train/tokens.bin").stat().st_mtime_ns
    assert resume(run.path, max_steps=16).step == 16
    assert run_fit(work, "b.txt", max_steps=17, override="data").step == 17
    assert (
        run_fit(work, "b.txt", max_steps=18).step == 18
        and (run.path / "data-2/train/tokens.bin").stat().st_mtime_ns == kept
    )
    with pytest.raises(ResumeError, match="the content has changed"):
        run_fit(work, max_steps=20)
    run = run_fit(work, max_steps=20, override="data")
    assert run.facts["data"]["places"]["train"] == ["data"] and contents(run.path / "data") == a


def test_override_data_between_a_file_and_a_mixture(work):
    run = run_fit(work)
    both = mix([(str(work / "a.txt"), 2), (str(work / "b.txt"), 1)])
    with pytest.raises(ResumeError, match="data sets"):
        run_fit(work, train=both, max_steps=15)
    run = run_fit(work, train=both, max_steps=15, override="data")
    assert run.facts["data"]["places"]["train"] == ["data/0", "data/1"]
    assert run_fit(work, train=both, max_steps=16).step == 16 and "delete them" not in run_log(
        run
    ), "they surround those that are read"
    run = run_fit(work, "b.txt", max_steps=18, override="data")
    assert (
        run.facts["data"]["places"]["train"] == ["data-2"]
        and run_fit(work, "b.txt", max_steps=19).step == 19
    )


@pytest.mark.parametrize("old,new", [(0.1, 0.3), (0.0, 0.2), (0.2, 0.0)])
def test_override_validation_split(work, old, new):
    "The option that the error names."
    run = run_fit(work, validation_split=old)
    if old:
        with pytest.raises(ResumeError, match="override='validation_split'"):
            run_fit(work, validation_split=new, max_steps=15)
    n = run.facts["data"]["tokens"]
    with pytest.raises(ResumeError, match="the content has changed"):
        run_fit(work, "b.txt", validation_split=new, max_steps=15, override="validation_split")
    run = run_fit(work, validation_split=new, max_steps=15, override="validation_split")
    assert run.step == 15 and (run.facts["data"]["tokens"] < n) == (new > old)
    assert ("eval_loss" in run.history[-1]) == (new > 0)
    assert run_fit(work, validation_split=new, max_steps=17).step == 17


def test_token_set_in_the_run_folder_is_kept(work):
    "The caller may name the run's own tokens by another path."
    from minigpt.data.tokensets import open_set

    run = run_fit(work)
    tokens = open_set((work / "run").resolve() / "data/train")
    assert run_fit(work, train=tokens, tokenizer=run.tokenizer, max_steps=12).step == 12
    assert (run.path / "data/train/tokens.bin").exists()
    mine, _ = build_tokenset(work / "b.txt", run.tokenizer, run.path / "data-mine", 0.0)
    assert (
        run_fit(work, train=mine, tokenizer=run.tokenizer, max_steps=14, override="data").step == 14
    )
    assert (mine.path / "tokens.bin").exists()


# --- what the validation loss is evaluated on -----------------------------------------------------
@pytest.mark.parametrize(
    "change,override",
    [
        (dict(name="b.txt"), "data"),
        (dict(valid="b.txt"), ()),
        (dict(validation_split=0.3), "validation_split"),
        (dict(max_seq_len=8), "max_seq_len"),
        (dict(eval_sequences=3), ()),
    ],
)
def test_best_loss_belongs_to_one_validation_set(work, change, override):
    "A lower loss on another set is not comparable: the best counts from the first evaluation on."
    run = run_fit(work, learning_rate=1e-2, early_stopping=2)
    old = run.best
    assert old.step == 10
    if "valid" in change:
        change = dict(change, valid=work / change["valid"])
    run = run_fit(
        work, **change, learning_rate=1e-9, max_steps=15, early_stopping=2, override=override
    )
    assert "no longer counts" in run_log(run)
    losses = {
        h["step"]: h["eval_loss"] for h in run.history if "eval_loss" in h
    }  # step 10 has two: it was saved before and after its evaluation
    assert (
        run.best.step
        == json.loads((run.path / "trainer_state.json").read_text())["best_step"]
        == min((10, 15), key=losses.get)
    )
    again = run_fit(work, **change, learning_rate=1e-9, max_steps=20, early_stopping=2)
    assert (
        run_log(again).count("no longer counts") == 1
    )  # the same call evaluates the same set again


def test_early_stopped_run_resumes_with_another_validation_set(work):
    run = run_fit(work, learning_rate=3.0, grad_clip=0.0, max_steps=100, early_stopping=1)
    assert run.step < 100 and run.finished
    stopped = run.step
    assert (
        run_fit(work, learning_rate=3.0, grad_clip=0.0, max_steps=100, early_stopping=1).step
        == stopped
    )
    assert (
        run_fit(
            work, valid=work / "b.txt", learning_rate=1e-3, max_steps=stopped + 5, early_stopping=1
        ).step
        == stopped + 5
    )


def test_open_run_reads_a_run_without_recorded_folders(work):
    "A run.json of an older version: the tokens are in data/."
    run = run_fit(work)
    facts = run.facts
    del facts["data"]["places"]
    (run.path / "run.json").write_text(json.dumps(facts))
    for c in run.checkpoints:
        s = json.loads((c.path / "trainer_state.json").read_text())
        assert s["run"] == facts["id"]
    assert run_fit(work, max_steps=12).step == 12 and open_run(run.path).facts["data"]["places"][
        "train"
    ] == ["data"]


def test_backup_has_the_current_tokens(work):
    """On another machine the run resumes with its new data.

    Neither the texts nor the run are there.
    """
    drive = work / "drive"
    drive.mkdir()
    run_fit(work, gdrive_backup_dir=str(drive))
    run = run_fit(work, "b.txt", max_steps=15, override="data", gdrive_backup_dir=str(drive))
    tokens = contents(run.path / "data-2")
    names = {p.relative_to(drive / "run").parts[0] for p in (drive / "run").rglob("*.bin")}
    assert "data-2" in names and "data" not in names
    shutil.rmtree(run.path)
    (work / "a.txt").unlink()
    (work / "b.txt").unlink()
    run = resume(work / "run", max_steps=20, gdrive_backup_dir=str(drive))
    assert run.step == 20 and contents(run.path / "data-2") == tokens


def test_command_line_override(work, monkeypatch):
    "`--override`, which the error suggests, for both ways to resume."
    from minigpt import cli

    run_fit(work)
    monkeypatch.chdir(work)

    def command(*words):
        monkeypatch.setattr(
            "sys.argv", ["minigpt", *words, "--num-threads", "1", "--no-progress", "--no-plot-loss"]
        )
        try:
            cli.main()
        except SystemExit as e:
            return e.code

    (work / "shape.json").write_text(
        json.dumps(
            dict(config=SHAPE.to_dict(), **{k: v for k, v in OPTIONS.items() if k != "max_steps"})
        )
    )
    call = [
        "train",
        "b.txt",
        "--config-file",
        "shape.json",
        "--output-dir",
        "run",
        "--max-steps",
        "12",
    ]
    assert "--override data" in command(*call)
    assert not command(*call, "--override", "data") and open_run("run").step == 12
    assert "--override effective_batch" in command(
        "resume", "run", "--max-steps", "14", "--batch-size", "2"
    )
    assert (
        not command(
            "resume",
            "run",
            "--max-steps",
            "14",
            "--batch-size",
            "2",
            "--override",
            "effective_batch",
        )
        and open_run("run").step == 14
    )


# --- files that are not the run's -----------------------------------------------------------------
@pytest.mark.parametrize(
    "path",
    [
        "data/a.txt",
        "data/train/a.txt",
        "data/train/meta.json",
        "data-valid/a.txt",
        "data-2/a.txt",
        "data/.git/HEAD",
        "tokenizer/tokenizer.json",
    ],
)
def test_other_files_in_the_folder_are_kept(work, path):
    "A run in a folder with files of the user, such as `output_dir='.'` beside `data/`."
    home = work / "home"
    (home / path).parent.mkdir(parents=True)
    mine = home / path
    shutil.copy(work / "a.txt", mine)
    if mine.name == "tokenizer.json":
        build_tokenizer(work).save(mine.parent)
    before = mine.read_bytes()
    kept = lambda: (
        before
        in [p.read_bytes() for p in (mine, home / "tokenizer.old-1/tokenizer.json") if p.exists()]
    )
    with pytest.raises(ValueError):
        run_fit(work, to="home", max_seq_len=10**6)
    assert kept()
    run = run_fit(work, to="home", valid=work / "b.txt")
    assert kept() and run_fit(work, to="home", valid=work / "b.txt", max_steps=12).step == 12
    run = run_fit(work, "b.txt", "home", valid=work / "b.txt", max_steps=14, override="data")
    assert kept() and run.step == 14
    if path == "data/a.txt":
        assert run.facts["data"]["places"]["train"][0].startswith("data-")
        with pytest.raises(FileExistsError, match="holds a.txt, which is not part of a token set"):
            build_tokenset(work / "b.txt", run.tokenizer, home / "data")


def test_tokens_of_the_run_are_not_reported_as_unread(work, monkeypatch):
    "Nor is a validation set that a call leaves out."
    run = run_fit(work, valid=work / "b.txt")
    assert run_fit(work, max_steps=12).step == 12 and "does not read" not in run_log(run)
    monkeypatch.chdir(work)
    own = TokenSet(build_tokenset("a.txt", run.tokenizer, work / "own/data", 0.0)[0].path.resolve())
    own = fit(SHAPE, own, tokenizer=run.tokenizer, output_dir="own", **OPTIONS) and fit(
        SHAPE, own, tokenizer=run.tokenizer, output_dir="own", **{**OPTIONS, "max_steps": 12}
    )
    assert own.step == 12 and "does not read" not in run_log(own)


def test_files_of_a_file_manager_are_ignored(work):
    run = run_fit(work)
    for name in (".DS_Store", "Thumbs.db"):
        (run.path / "data" / name).write_bytes(b"x")
    assert run_fit(work, max_steps=12).step == 12 and run_fit(work, to="again").step == 10
    train, _ = build_tokenset(
        work / "b.txt", run.tokenizer, run.path / "data", 0.0
    )  # replaces the set
    assert train.path == run.path / "data/train" and not (run.path / "data/.DS_Store").exists()


def test_file_in_place_of_the_token_folder_is_refused(work):
    (work / "home").mkdir()
    (work / "home/data").write_text("mine")
    both = mix([(str(work / "a.txt"), 2), (str(work / "b.txt"), 1)])
    with pytest.raises(FileExistsError, match="data is not a folder, so the tokens cannot"):
        run_fit(work, to="home", train=both)
    (work / "home/data").unlink()
    (work / "home/data").symlink_to(work / "nowhere")
    for train in both, work / "a.txt":
        with pytest.raises(
            CheckpointError,
            match=(
                "data is a link to .*nowhere, and a run writes and deletes only in its own folder"
            ),
        ):
            run_fit(work, to="home", train=train)
    assert (work / "home/data").is_symlink() and not (work / "nowhere").exists()


def build_tokenizer(work):
    from minigpt.tokenizer.bpe import train_tokenizer

    return train_tokenizer([(work / "b.txt").read_text()], 280)


def test_token_sets_of_the_caller_are_kept(work):
    tok = build_tokenizer(work)
    one, two = (
        build_tokenset(work / f"{n}.txt", tok, work / "home" / d, 0.3)[0]
        for n, d in (("a", "data"), ("b", "data-2"))
    )
    before = contents(work / "home")
    run_fit(work, to="home", train=one, tokenizer=tok)
    run_fit(work, to="home", train=two, tokenizer=tok, max_steps=12, override="data")
    run_fit(work, to="home", max_steps=14, override="data")
    assert {k: v for k, v in contents(work / "home").items() if k in before} == before


def test_mixture_with_a_token_set_of_the_caller(work):
    "Its other part is found again, even without its text."
    tok = build_tokenizer(work)
    one, _ = build_tokenset(work / "a.txt", tok, work / "sets", 0.0)
    both = lambda: mix([(one, 1), (str(work / "b.txt"), 1)])
    run = run_fit(work, train=both(), tokenizer=tok)
    assert run.facts["data"]["places"]["train"] == [None, "data/1"]
    built = (run.path / "data/1/train/tokens.bin").stat().st_mtime_ns
    (work / "b.txt").unlink()
    assert (
        run_fit(work, train=both(), tokenizer=tok, max_steps=12).step == 12
        and (run.path / "data/1/train/tokens.bin").stat().st_mtime_ns == built
    )


def test_built_in_corpus_does_not_replace_other_data(work):
    "stories would have replaced any data of the run."
    with pytest.raises(RuntimeError):
        run_fit(work, "a.txt", "run", Stop(7), max_steps=20)
    with pytest.raises(ResumeError, match="the content has changed"):
        run_fit(work, train="stories", max_steps=20)
    assert run_fit(work, max_steps=20).step == 20


def test_call_without_an_evaluation_keeps_the_best_model(work):
    "The call has another validation set and stops before an evaluation."
    run = run_fit(work, learning_rate=1e-2)
    best = contents(run.path / "best")

    class Never(Callback):
        def on_start(self, t):
            raise RuntimeError("unplugged")

    with pytest.raises(RuntimeError):
        run_fit(work, "a.txt", "run", Never(), valid=work / "b.txt", max_steps=20)
    assert contents(run.path / "best") == best and run.best


def test_working_folder_is_not_moved(work, monkeypatch):
    run_fit(work, to=".")
    monkeypatch.chdir(work)
    with pytest.raises(ValueError, match="is the working directory"):
        fit(SHAPE, "a.txt", output_dir=".", overwrite=True, **OPTIONS)


@pytest.mark.parametrize(
    "content,words",
    [
        ("[1]", "was not written by fit"),
        ('{"train": {}, "max_steps": 5}', "lacks attempts, choices"),
    ],
)
def test_run_json_of_another_program_is_refused(work, content, words):
    (work / "drive").mkdir()
    (work / "run").mkdir()
    (work / "run/run.json").write_text(content)
    with pytest.raises(ValueError, match=words):
        run_fit(work, gdrive_backup_dir=str(work / "drive"))


# --- the backup ---
def two_machines(work):
    drive = work / "drive"
    drive.mkdir()
    for m in "one", "two":
        (work / m).mkdir()
        shutil.copy(work / "a.txt", work / m)
        shutil.copy(work / "b.txt", work / m)
    return lambda m, name, steps, drive=str(drive), **o: fit(
        SHAPE,
        work / m / name,
        output_dir=work / m / "run",
        gdrive_backup_dir=drive,
        **{**OPTIONS, "logging_steps": 1, "max_steps": steps, **o},
    )


def test_restored_run_has_its_best_model(work):
    drive = work / "drive"
    drive.mkdir()
    run = run_fit(work, gdrive_backup_dir=str(drive))
    best = contents(run.best.path)
    shutil.rmtree(run.path)
    run = run_fit(work, gdrive_backup_dir=str(drive))
    assert contents(run.best.path) == best and run.model("best")


def test_run_resumed_on_another_machine(work):
    """Two machines in turn: the first takes over what the second has done.

    Its history and its data too.
    """
    on = two_machines(work)
    on("one", "a.txt", 5)
    on("two", "a.txt", 8)
    on("two", "b.txt", 11, override="data")
    with pytest.raises(ResumeError, match="the content has changed"):
        on("one", "a.txt", 14)
    run = on("one", "b.txt", 14)
    assert [h["step"] for h in run.history if "loss" in h] == [*range(1, 15)] and len(
        run.facts["attempts"]
    ) == 4


def test_newer_history_is_not_replaced(work):
    "run.json is lost, and the one in the backup is older."
    drive = work / "drive"
    drive.mkdir()
    run_fit(work, gdrive_backup_dir=str(drive), logging_steps=1, max_steps=5)
    run = run_fit(work, logging_steps=1, max_steps=10)
    (run.path / "run.json").unlink()
    run = run_fit(work, gdrive_backup_dir=str(drive), logging_steps=1, max_steps=12)
    assert [h["step"] for h in run.history if "loss" in h] == [*range(1, 13)]


def test_interrupted_backup_has_the_previous_tokens(work, monkeypatch):
    "Its run.json is still the old one: the tokens that it names are there."
    drive = work / "drive"
    drive.mkdir()
    run = run_fit(work, gdrive_backup_dir=str(drive))
    old, real = contents(run.path / "data"), _SmallFiles._replace

    def interrupt(self, name, data):
        if name == "run.json":
            raise OSError(5, "unplugged")
        real(self, name, data)

    monkeypatch.setattr(_SmallFiles, "_replace", interrupt)
    run = run_fit(
        work,
        "b.txt",
        max_steps=12,
        override="data",
        gdrive_backup_dir=str(drive),
        backup_wait_seconds=3,
    )
    monkeypatch.undo()
    assert {"data", "data-2"} <= {p.name for p in (drive / "run").iterdir()}
    shutil.rmtree(run.path)
    (work / "b.txt").unlink()
    (drive / "run/heartbeat.json").unlink(
        missing_ok=True
    )  # otherwise the call would wait for the other machine
    (work / "a.txt").unlink()
    run = resume(work / "run", max_steps=14, gdrive_backup_dir=str(drive))
    assert run.step == 14 and contents(run.path / "data") == old


@pytest.mark.parametrize("name", ["tokenizer.json", "trainer_state.json", "generation_config.json"])
def test_files_of_another_model_are_kept(work, name):
    "The final model would replace them."
    (work / "home").mkdir()
    (work / "home" / name).write_text("{}")
    with pytest.raises(FileExistsError, match=f"holds {name} but no run.json"):
        run_fit(work, to="home")
    assert (work / "home" / name).read_text() == "{}"


def test_restore_keeps_existing_files(work):
    drive = work / "drive"
    drive.mkdir()
    run = run_fit(work, gdrive_backup_dir=str(drive))
    shutil.rmtree(run.path)
    run.path.mkdir()
    (run.path / "model.safetensors").write_text("mine")
    (run.path / "tokenizer").mkdir()
    (run.path / "tokenizer/notes.txt").write_text("mine")
    run = run_fit(work, gdrive_backup_dir=str(drive))
    assert (
        run.finished
        and (run.path / "model.safetensors.old-1").read_text()
        == (run.path / "tokenizer.old-1/notes.txt").read_text()
        == "mine"
    )


def test_backup_into_its_own_run_is_refused(work):
    run = run_fit(work)
    before = contents(run.path)
    for folder in work, run.path:
        with pytest.raises(BackupError, match="choose a folder somewhere else"):
            run_fit(work, gdrive_backup_dir=str(folder), max_steps=20)
    assert contents(run.path) == before


def test_messages_never_advise_to_delete_used_files(work):
    run_fit(work)
    run = run_fit(
        work,
        train=mix([(str(work / "a.txt"), 2), (str(work / "b.txt"), 1)]),
        max_steps=15,
        override="data",
    )
    assert run.facts["data"]["places"]["train"] == [
        "data/0",
        "data/1",
    ] and "stay in data;" not in run_log(run)


def test_course_abandoned_on_another_machine_is_ignored(work):
    on = two_machines(work)
    on("one", "a.txt", 20, backup_keep_last=9)
    for p in [*(work / "drive/run").glob("*/checkpoint-[12]*"), work / "drive/run/final"]:
        shutil.rmtree(p)  # had not arrived
    on("two", "a.txt", 8)
    run = on("one", "a.txt", 11)
    assert (
        run.step == 11
        and [c.step for c in run.checkpoints if not c.problem][-1] == 11
        and (run.path / "checkpoints/checkpoint-20.superseded-1").exists()
    )
    assert all(c.step <= 11 for c in run.best_store.all()) and run.finished


def test_diverged_runs_are_not_joined(work):
    on = two_machines(work)
    on("one", "a.txt", 5)
    on("two", "a.txt", 8)
    on("one", "a.txt", 7, drive="")
    before = contents(work / "drive")
    with pytest.raises(BackupError, match="cannot be joined"):
        on("one", "a.txt", 11)
    assert {k: v for k, v in contents(work / "drive").items() if "heartbeat" not in k} == {
        k: v for k, v in before.items() if "heartbeat" not in k
    }
    assert on("one", "a.txt", 11, drive="").step == 11


def test_call_without_a_save_does_not_diverge(work):
    """Machine one is interrupted before its backup knows of the call; machine two resumes.

    Machine one has not saved a step by then.
    """
    on = two_machines(work)

    class Interrupt(Callback):
        def on_step(self, t):
            raise RuntimeError("cut off")

    on("one", "a.txt", 5)
    with pytest.raises(RuntimeError, match="cut off"):
        on("one", "a.txt", 20, drive="", callbacks=[Interrupt()], save_steps=50)
    on("two", "a.txt", 8)
    run = on("one", "a.txt", 11)
    assert run.step == 11 and [h["step"] for h in run.history if "loss" in h] == [*range(1, 12)]
    assert on("two", "a.txt", 13).step == 13


def test_backup_may_miss_saved_steps(work):
    """Machine two has resumed, and only its run.json has arrived.

    What machine one has done since is not joined to it.
    """
    on = two_machines(work)
    on("one", "a.txt", 5)
    on("two", "a.txt", 8)
    on("one", "a.txt", 7, drive="")
    for p in [*(work / "drive/run").glob("*/checkpoint-8"), work / "drive/run/final"]:
        shutil.rmtree(p)
    with pytest.raises(BackupError, match="cannot be joined"):
        on("one", "a.txt", 11)


def test_log_does_not_grow_with_hand_offs(work):
    on = two_machines(work)
    sizes = [len(run_log(on(m, "a.txt", n))) for n, m in enumerate(("one", "two") * 4, 5)]
    assert sizes[-1] < 6 * sizes[1]  # one share each, not everything again each time
    history = open_run(work / "two/run").history
    assert [h["step"] for h in history if "loss" in h] == [*range(1, 13)]


def test_resume_detects_progress_on_another_machine(work):
    on = two_machines(work)
    on("one", "a.txt", 5)
    on("two", "a.txt", 8)
    on("two", "b.txt", 11, override="data")
    assert resume(work / "one/run", max_steps=13).step == 13


def test_damaged_backup_does_not_replace_files(work):
    "An incomplete copy never replaces local files."
    drive = work / "drive"
    drive.mkdir()
    run = run_fit(work, gdrive_backup_dir=str(drive))
    tokens = drive / "run/data/train/tokens.bin"
    tokens.write_bytes(bytes(tokens.stat().st_size))
    (run.path / "run.json").unlink()
    (run.path / "data/valid/docs.npy").unlink()
    before = contents(run.path / "data")
    run = run_fit(work, gdrive_backup_dir=str(drive), max_steps=12)
    assert (
        "data/ is not restored" in run_log(run)
        and run.step == 12
        and before.items() <= contents(run.path / "data").items()
    )


def test_backup_of_a_mixture_without_recorded_folders(work):
    "An older version's run.json names no folders: none of its tokens are treated as unused."
    drive = work / "drive"
    drive.mkdir()
    both = mix([(str(work / "a.txt"), 2), (str(work / "b.txt"), 1)])
    run = run_fit(work, train=both, gdrive_backup_dir=str(drive))
    facts = run.facts
    del facts["data"]["places"]
    (run.path / "run.json").write_text(json.dumps(facts))
    tokens = contents(drive / "run/data", "*/*/*.bin")
    assert len(tokens) >= 4
    run_fit(work, train=both, gdrive_backup_dir=str(drive))
    assert contents(drive / "run/data", "*/*/*.bin") == tokens
