"""A file that cannot be read at the moment is neither missing nor damaged.

Training stops with the reason instead of giving up a state that may be complete, and resumes when
it can be read. A flaky or hanging mount, or one without some function, does not stop training. The
files of a data set are verified.
"""

import errno
import fcntl
import os
import shutil
import threading
from dataclasses import replace

import numpy as np
import pytest

from minigpt.checkpoint.store import CheckpointError, CheckpointStore, problem
from minigpt.config.options import lr_at
from minigpt.data.tokensets import DataError, open_tokenset
from minigpt.run import backup as backup_module
from minigpt.run.backup import Backup
from minigpt.run.folder import Run, list_runs, open_run, run_table, runs_table
from minigpt.train.trainer import fit
from tests.harness import kill_child as child
from tests.harness.faulty import Disk, Server, keeps_attributes
from tests.recovery.test_backup import (  # noqa: F401 (fixtures among them)
    ID,
    parts,
    run_until_done,
    saves,
    state,
    steps_saved,
    submit_saves,
)
from tests.recovery.test_faults import (  # noqa: F401
    AtStep,
    PowerCut,
    assert_same_run,
    copy_to,
    interrupted,
    log,
    power_cut,
    run_fit,
    steps,
    uninterrupted,
    weights,
    work,
)


@pytest.fixture(autouse=True)
def no_delays(monkeypatch):
    monkeypatch.setattr("minigpt.train.setup.RETRY_DELAYS", (0.01, 0.01))


# --- a run's own states ---------------------------------------------------------------------------
NEWEST = "run/checkpoints/checkpoint-10"


@pytest.mark.parametrize(
    "place, error, words",
    [
        (
            f"{NEWEST}/optimizer.safetensors",
            errno.EIO,
            "checkpoint-10 may be complete, and it cannot be read.*Input/output error",
        ),
        (
            f"{NEWEST}/MANIFEST.json",
            errno.EACCES,
            "checkpoint-10 may be complete, and it cannot be read.*Permission denied",
        ),
        (
            NEWEST,
            errno.EACCES,
            "checkpoint-10 may be complete, and it cannot be read.*Permission denied",
        ),
        (
            "run/checkpoints",
            errno.EIO,
            "checkpoints cannot be used: Input/output error.*Nothing was trained",
        ),
        ("run/checkpoints", errno.EACCES, "checkpoints cannot be used: Permission denied"),
        (
            "run/run.json",
            errno.EIO,
            "run.json cannot be read: Input/output error.*nothing was trained",
        ),
    ],
)
def test_unreadable_state_stops_the_run(interrupted, uninterrupted, tmp_path, place, error, words):
    """Nothing is recorded or superseded.

    Once the state can be read, the result equals the uninterrupted run bit for bit.
    """
    work = copy_to(interrupted, tmp_path / "work")
    with Disk(tmp_path).active() as disk:
        disk.unreadable = {str(work / place): error}
        with pytest.raises(CheckpointError, match=words):
            run_fit(work)
    assert len(open_run(work / "run").facts["attempts"]) == 1 and steps(work) == [5, 10]
    if place == NEWEST:
        assert_same_run(uninterrupted, work, run_fit(work)[1], since=10)


def test_flaky_mount_is_retried(interrupted, uninterrupted, tmp_path, monkeypatch):
    work, waited = copy_to(interrupted, tmp_path / "work"), []
    with Disk(tmp_path).active() as disk:
        disk.unreadable = {str(work / NEWEST / "optimizer.safetensors"): errno.EIO}

        def sleep(seconds):
            waited.append(seconds)
            disk.unreadable = {}

        monkeypatch.setattr("minigpt.train.setup.time.sleep", sleep)
        assert_same_run(uninterrupted, work, run_fit(work)[1], since=10)
    assert waited[0] == 0.01


def test_going_back_to_a_named_state(interrupted, tmp_path):
    "The error names an older state, and that one is used when it is requested."
    work = copy_to(interrupted, tmp_path / "work")
    with Disk(tmp_path).active() as disk:
        disk.unreadable = {str(work / NEWEST): errno.EACCES}
        with pytest.raises(
            CheckpointError, match="to go back to an older one, pass resume='checkpoint-5'"
        ):
            run_fit(work)


@pytest.mark.parametrize("name", ["checkpoint-5", "checkpoint-10"])
def test_manifest_that_is_a_folder_is_damaged(interrupted, uninterrupted, tmp_path, name):
    "It is damaged permanently: it is skipped and reported."
    work = copy_to(interrupted, tmp_path / "work")
    (m := work / "run/checkpoints" / name / "MANIFEST.json").unlink()
    m.mkdir()
    assert "is a folder, not a file" in run_table(open_run(work / "run"))
    assert_same_run(
        uninterrupted, work, run_fit(work)[1], since=10 if name == "checkpoint-5" else 5
    )
    assert ("checkpoint-10 is skipped: " in log(work)) == (name == "checkpoint-10")


def test_deleted_run_json_is_written_again(uninterrupted, work):
    "It is written again under the lock that is held; the next call resumes the run."

    def delete_run_json(t):
        (t.run_path / "run.json").unlink()

    with pytest.raises(PowerCut):
        run_fit(work, AtStep(6, delete_run_json), AtStep(12, power_cut))
    assert "run.json was deleted during training and has been written again" in log(work) and steps(
        work
    ) == [5, 10]
    assert_same_run(uninterrupted, work, run_fit(work)[1], since=10)


# --- file systems without some functions ----------------------------------------------------------
def test_training_without_locks_fsync_or_free_space(uninterrupted, work, tmp_path, monkeypatch):
    """As on some network shares and FUSE mounts:

    training continues, and what is unknown is reported.
    """

    def no_lock(*_):
        raise OSError(errno.ENOTSUP, "Operation not supported")

    real, usage = os.fsync, shutil.disk_usage

    def fsync(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        return real(fd)

    def space(path):
        if str(path).startswith(str(tmp_path / "disk")):
            raise OSError(errno.ENOSYS, "Function not implemented")
        return usage(path)

    monkeypatch.setattr(fcntl, "flock", no_lock)
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(shutil, "disk_usage", space)
    run, losses = run_fit(work, gdrive_backup_dir=str(tmp_path / "disk"))
    assert_same_run(uninterrupted, work, losses)
    assert (
        "WARNING: the file system of" in log(work)
        and "does not support locks" in log(work)
        and "free space unknown" in log(work)
        and "disk is unknown (Function not implemented)" in log(work)
    )


def test_hanging_mount_is_reported(interrupted, tmp_path, monkeypatch):
    "`minigpt runs RUN` reports it after a while and shows the rest."
    work, hangs = copy_to(interrupted, tmp_path / "work"), threading.Event()
    facts = open_run(work / "run").facts
    facts["train"]["gdrive_backup_dir"] = str(tmp_path / "disk")
    backup_module.write_json(work / "run/run.json", facts)
    monkeypatch.setattr("minigpt.run.folder.ANSWER", 0.05)
    monkeypatch.setattr("minigpt.run.folder.check_backup_folder", lambda folder: hangs.wait(30))
    said = run_table(open_run(work / "run"))
    hangs.set()
    assert "checkpoint-10" in said and "disk has not answered for 0 s: the mount hangs" in said


def test_list_of_runs_shows_unreadable_ones(interrupted, tmp_path, monkeypatch):
    "It shows the others, and names a run that is unreadable, does not answer, or has no numbers."
    for name in "good", "hangs", "locked", "odd":
        shutil.copytree(interrupted / "run", tmp_path / "runs" / name)
    with open(tmp_path / "runs/odd/metrics.jsonl", "a") as f:
        f.write('{"step": 13, "loss": [1], "eval_loss": "x"}\n')
    monkeypatch.setattr("minigpt.run.folder.ANSWER", 0.3)
    real, wait = Run.history.fget, threading.Event()
    monkeypatch.setattr(
        Run,
        "history",
        property(lambda self: wait.wait(30) if self.path.name == "hangs" else real(self)),
    )
    with Disk(tmp_path).active() as disk:
        disk.unreadable = {str(tmp_path / "runs/locked"): errno.EACCES}
        said = runs_table(list_runs(tmp_path / "runs"))
    wait.set()
    table, below = said.splitlines()[:3], said.splitlines()[3:]
    assert [line.split()[0] for line in table] == ["run", "good", "odd"] and table[1].split()[
        1:5
    ] == table[2].split()[1:5]
    assert (
        len(below) == 2
        and "hangs has not answered" in below[0]
        and "locked cannot be read: [Errno 13] Permission denied" in below[1]
    )


# --- the backup -----------------------------------------------------------------------------------
def test_interrupted_copy_continues(saves, tmp_path, monkeypatch):
    """With an error after every piece, each round completes one more file and copies nothing twice.

    The user is told once.
    """
    (tmp_path / "disk").mkdir()
    b = Backup(tmp_path / "disk", saves, beat=99)
    b.run_id = ID
    b.step()
    read, real, armed = [], backup_module.copy_file, [True]

    def counted(source, target, progress=None):
        read.append(source.name)
        return real(source, target, progress)

    def fail_each_piece():
        armed[0] = not armed[0]
        if not armed[0]:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(backup_module, "copy_file", counted)
    monkeypatch.setattr(backup_module, "rest", fail_each_piece)
    b.submit(saves / "checkpoints" / "checkpoint-300")
    for rounds in range(1, 40):  # noqa: B007
        b.step()
        if b.done():
            break
    files = len(list((saves / "checkpoints" / "checkpoint-300").iterdir()))
    assert (
        b.done()
        and not problem(b.path / "checkpoints" / "checkpoint-300")
        and rounds <= files + 1
        and len(read) <= 2 * files
    )
    assert sum("NOT BACKED UP" in text for _, text in b.messages) == 1 and b.failures == 0


def test_complete_piece_is_not_copied_twice(tmp_path, monkeypatch):
    "Also within a file."
    (tmp_path / "a").write_bytes(data := os.urandom(9 << 20))
    progress, written = backup_module.Progress(), []

    class Slow:
        def __init__(self, f):
            self.f = f

        def write(self, b):
            if len(b) == 4 << 20 and len(written) == 1:
                written.append(0)
                raise OSError(errno.EIO, "Input/output error")
            written.append(len(b))
            return self.f.write(b)

        def __enter__(self):
            return self

        def __exit__(self, *e):
            self.f.close()

    real = backup_module._reopen
    monkeypatch.setattr(backup_module, "_reopen", lambda *a: Slow(real(*a)))
    with pytest.raises(OSError):
        backup_module.copy_file(tmp_path / "a", tmp_path / "b", progress)
    backup_module.copy_file(tmp_path / "a", tmp_path / "b", progress)
    assert (tmp_path / "b").read_bytes() == data and written == [4 << 20, 0, 4 << 20, 1 << 20]


def test_incomplete_copies_are_deleted_from_the_backup(parts, saves, tmp_path):
    "They are deleted once a state is safe; an unreadable copy stays and is reported as incomplete."
    (tmp_path / "disk").mkdir()
    b = Backup(tmp_path / "disk", saves, keep=1, beat=99)
    b.run_id = ID
    b.submit(saves / "checkpoints" / "checkpoint-100")
    b.step()
    for name in (
        "checkpoints/checkpoint-90",
        "checkpoints/checkpoint-90.damaged-1",
        "snapshots/snapshot-80.damaged-2",
        "best/checkpoint-60",
        "checkpoints/checkpoint-70",
    ):
        (d := b.path / name).mkdir(parents=True)
        (d / "config.json").write_text("{}")
    shutil.copytree(
        saves / "checkpoints" / "checkpoint-200", old := b.path / "checkpoints" / "checkpoint-50"
    )
    b.submit(saves / "best" / "checkpoint-200")
    b.submit(saves / "checkpoints" / "checkpoint-300")
    with Disk(tmp_path / "disk").active() as disk:
        disk.unreadable = {str(old / "MANIFEST.json"): errno.EIO}
        b.step()
        assert not b.failed and b.status()["copied"] == dict(name="checkpoint-300", step=300)
        assert [(c.step, getattr(c.problem, "kind", None)) for c in b.copies()] == [
            (50, "unreadable"),
            (300, None),
        ]
    assert sorted(
        p.name for d in ("checkpoints", "snapshots", "best") for p in (b.path / d).iterdir()
    ) == ["checkpoint-200", "checkpoint-300", "checkpoint-50"]
    b.step()
    assert steps_saved(b) == [300]  # it can be read again and is pruned like the others


def test_status_does_not_wait_for_arrived_files(saves, tmp_path):
    if not keeps_attributes(tmp_path):
        return  # the server confirms nothing
    (tmp_path / "drive").mkdir()
    disk = Disk(tmp_path / "drive")
    disk.server = Server(tmp_path / "drive", tmp_path / "there")
    with disk.active():
        b = Backup(tmp_path / "drive", saves, beat=0.05, retry=0.02, poll=0.02)
        b.start(ID)
        b.submit(saves / "checkpoints" / "checkpoint-300")
        stop = threading.Event()
        arriving = threading.Thread(
            target=lambda: [disk.server.deliver(99) for _ in iter(lambda: stop.wait(0.01), True)]
        )
        arriving.start()
        try:
            assert b.finish(20)
        finally:
            stop.set()
            arriving.join()
    s = backup_module.read_json(saves / "backup.json")
    assert (
        s["doing"] == "idle"
        and s["waiting"] == []
        and s["confirmed"] == dict(name="checkpoint-300", step=300)
    )


# --- more steps than were planned -----------------------------------------------------------------
def test_learning_rate_with_more_steps(uninterrupted, tmp_path):
    """A jump of the learning rate is reported before it happens.

    With lr_extend it continues from its current value, only downwards, also after another
    interruption.
    """
    rates = lambda run: [r["lr"] for r in run.history if "loss" in r]
    work = copy_to(uninterrupted[0], tmp_path / "jump")
    run, _ = run_fit(work, max_steps=30)
    old = rates(run)[:20]
    assert (
        f"WARNING: the learning rate of step 20 was {old[-1]:.3g} in a run of 20 steps and is"
        f" {rates(run)[20]:.3g} in one of 30"
        in log(work)
        and "pass lr_extend='continue'" in log(work)
        and rates(run)[20] > 2 * old[-1]
    )
    work = copy_to(uninterrupted[0], tmp_path / "down")
    more = dict(max_steps=30, lr_extend="continue")
    with pytest.raises(PowerCut):
        run_fit(work, AtStep(26, power_cut), **more)
    run, _ = run_fit(work, **more)
    assert (
        rates(run)[:20] == old
        and rates(run)[20] == old[-1]
        and rates(run)[20:] == sorted(rates(run)[20:], reverse=True)
    )
    assert (
        abs(rates(run)[-1] - 0.1 * old[-1]) < 1e-12
        and len(run.facts["attempts"]) == 3
        and "WARNING: the learning rate" not in log(work)
    )
    uncut, _ = run_fit(copy_to(uninterrupted[0], tmp_path / "uncut"), **more)
    assert rates(uncut) == rates(run) and weights(tmp_path / "uncut") == weights(work)
    assert lr_at(25, run_config(run), 30, (20, old[-1])) == rates(run)[25]


def run_config(run):
    from minigpt.config.options import TrainConfig

    return TrainConfig.make(run.facts["train"])


# --- a data set's files ---------------------------------------------------------------------------
PAIRS = dict(
    child.OPTIONS,
    max_steps=6,
    save_steps=3,
    eval_steps=6,
    max_seq_len=128,
    batch_size=2,
    gradient_accumulation=1,
    seed=3,
)


def fit_pairs(work, *callbacks, **options):
    model, data = child.model_and_data("dpo", work)
    return fit(model, data, output_dir=work / "run", callbacks=callbacks, **{**PAIRS, **options})


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    "A preference training that was interrupted at step 4, and an uninterrupted one."
    work = child.new_work(tmp_path_factory.mktemp("pairs") / "work")
    with pytest.raises(PowerCut):
        fit_pairs(work, AtStep(4, power_cut))
    done = copy_to(work, work.with_name("done"))
    return work, [r["loss"].hex() for r in fit_pairs(done).history if "loss" in r]


def flip(f, at=0.6):
    data = bytearray(f.read_bytes())
    data[int(at * len(data))] ^= 16
    f.write_bytes(data)


@pytest.mark.parametrize("name", ["docs.npy", "packs-128.npy", "reference-*.bin"])
@pytest.mark.parametrize("harm", ["flipped", "cut", "emptied"])
def test_damaged_data_files_are_rebuilt(pairs, tmp_path, name, harm):
    "Damaged files are rebuilt, and the losses equal those of the undamaged run."
    work = copy_to(pairs[0], tmp_path / "work")
    (f,) = (work / "run/data/train").glob(name)
    if harm == "flipped":
        flip(f)
    else:
        os.truncate(f, f.stat().st_size // 2 if harm == "cut" else 0)
    run = fit_pairs(work)
    assert [r["loss"].hex() for r in run.history if "loss" in r] == pairs[1]
    if name == "docs.npy":
        assert "damaged tokens" in (work / "run/run.log").read_text() and list(
            (work / "run").glob("data.damaged-*")
        )


def test_foreign_token_set_is_verified(pairs, tmp_path):
    work = copy_to(pairs[0], tmp_path / "work")
    data, _ = open_tokenset(work / "run/data")
    tok = open_run(work / "run").tokenizer
    flip(work / "run/data/train/mask.bin")
    with pytest.raises(
        DataError, match="train is damaged: a file does not match its recorded hash"
    ):
        fit(child.shape(), data, tokenizer=tok, output_dir=tmp_path / "run", **PAIRS)
    os.truncate(work / "run/data/train/docs.npy", 90)
    with pytest.raises(
        DataError, match="docs.npy is damaged: it must hold the offsets of .* rows"
    ) as e:
        open_tokenset(work / "run/data")
    assert "pickle" not in str(e.value)


def test_reference_of_the_previous_version_is_reused(pairs, tmp_path):
    "Its file holds only the numbers; they are reused."
    work = copy_to(pairs[0], tmp_path / "work")
    for f in (work / "run/data").glob("*/reference-*.bin"):
        np.save(f.with_suffix(".npy"), np.fromfile(f, np.float32).reshape(2, -1)[0])
        f.unlink()
    assert [r["loss"].hex() for r in fit_pairs(work).history if "loss" in r] == pairs[
        1
    ] and "computing reference log-probabilities" not in (work / "run/run.log").read_text().split(
        "resuming"
    )[-1]


def test_unreadable_checkpoint_is_kept_by_the_store(parts, tmp_path):
    "An unreadable one is renamed when its step is saved again, and not pruned."
    store = CheckpointStore(tmp_path / "checkpoints", keep=1)
    store.save(state(parts, 1))
    with Disk(tmp_path).active() as disk:
        disk.unreadable = {str(tmp_path / "checkpoints/checkpoint-1" / "config.json"): errno.EIO}
        store.save(replace(state(parts, 1), arguments={"a": 1}))
    assert sorted(p.name for p in store.folder.iterdir()) == [
        "checkpoint-1",
        "checkpoint-1.unreadable-1",
    ] and not problem(tmp_path / "checkpoints/checkpoint-1.unreadable-1")
