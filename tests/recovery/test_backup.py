"""Backups, and local saves, under every fault that can be simulated.

The faults are an error at each write, short writes, a folder that vanishes and returns or never
existed, a slow folder, and a server that files reach late or never. Training ends with the same
losses, the status is correct, and the restored files are verified.
"""

import contextlib
import errno
import json
import logging
import os
import random
import shutil
import subprocess
import sys
import threading
import time

import pytest
import torch

from minigpt.checkpoint.store import (
    CheckpointError,
    CheckpointStore,
    Defect,
    State,
    newest,
    pack_rng,
    problem,
)
from minigpt.core.files import write_json
from minigpt.model.gpt import GPT, GPTConfig
from minigpt.run import backup as backup_module
from minigpt.run.backup import Backup, BackupError, restore_run
from minigpt.run.folder import open_run
from minigpt.run.metrics import log_to
from minigpt.tokenizer.bpe import train_tokenizer
from minigpt.train.trainer import Callback, TrainingError, fit
from tests.harness import kill_child as child
from tests.harness.faulty import Disk, Server, keeps_attributes, patch
from tests.recovery.test_faults import (  # noqa: F401 (the last two are fixtures: an uninterrupted run and a folder)
    SHORT,
    STEPS,
    AtStep,
    PowerCut,
    log,
    power_cut,
    run_fit,
    uninterrupted,
    weights,
    work,
)

ERRORS = {
    "EIO": errno.EIO,
    "ENOTCONN": errno.ENOTCONN,
    "ENOSPC": errno.ENOSPC,
    "EDQUOT": errno.EDQUOT,
}
ID = "a" * 32


@pytest.fixture(scope="module")
def parts():
    tok = train_tokenizer(["A small tokenizer. 小。"] * 9, vocab_size=270)
    return tok, GPTConfig(
        vocab_size=tok.vocab_size, dim=8, n_layer=1, n_head=2, n_kv_head=1, ffn_dim=16, max_len=16
    )


def state(parts, step):
    tok, config = parts
    torch.manual_seed(step)
    return State(
        config,
        GPT(config).weights(),
        tok,
        dict(global_step=step),
        {},
        ({}, dict(optimizer="none", numbers={}, groups=[])),
        pack_rng(),
    )


@pytest.fixture(scope="module")
def saves(parts, tmp_path_factory):
    "The folder of a run with three checkpoints and a best one."
    run = tmp_path_factory.mktemp("saves") / "demo"
    run.mkdir()
    write_json(run / "run.json", dict(id=ID))
    (run / "metrics.jsonl").write_text('{"step": 1}\n')
    parts[0].save(run / "tokenizer")
    for step in (100, 200, 300):
        CheckpointStore(run / "checkpoints").save(state(parts, step))
    CheckpointStore(run / "best", kind="best").save(state(parts, 200))
    return run


def steps_saved(b):
    return [c.step for c in b.copies() if not problem(c.path)]


def submit_saves(b, saves, look=lambda: None):
    "Submit three saves, with a round of the worker after each."
    b.run_id = ID
    for step in (100, 200, 300):
        b.submit(saves / "checkpoints" / f"checkpoint-{step}")
        if step == 200:
            b.submit(saves / "best" / "checkpoint-200")
        b.step()
        look()


def run_until_done(b, rounds=8):
    "Let the worker retry until it is done."
    for _ in range(rounds):
        b.step()
        if b.done():
            return
    raise AssertionError(b.status())


# --- an error at every write in turn --------------------------------------------------------------
@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("error", ERRORS)
def test_backup_survives_an_error_at_every_write(error, times, saves, tmp_path):
    with Disk(tmp_path / "count").active() as disk:
        (tmp_path / "count").mkdir()
        disk.count = 0
        submit_saves(Backup(tmp_path / "count", saves, keep=2, beat=1e9), saves)
    assert disk.count > 100
    for at in range(0, disk.count, 1 if error == "EIO" and times == 1 else 6):
        folder = tmp_path / f"{at}"
        folder.mkdir()
        b, before = Backup(folder, saves, keep=2, beat=1e9), []

        def check():
            "The files are verified and no older than before; the status claims no more."
            verified = steps_saved(b)
            assert not before or verified and verified[-1] >= before[-1], (at, before, verified)
            before[:] = verified
            s = b.status()
            assert bool(s["failed"]) == (s["doing"] == "failing")
            if s["copied"]:
                assert s["copied"]["step"] in verified, (at, s)
            if not s["failed"] and not s["pending"]:
                assert s["copied"]["step"] == max(verified)

        with Disk(folder, ERRORS[error], at, times).active() as disk:
            submit_saves(b, saves, check)
            run_until_done(b)
            check()
        assert disk.failed or times > 1
        assert steps_saved(b)[-2:] == steps_saved(b) and steps_saved(b)[-1] == 300, at
        assert not problem(b.path / "best" / "checkpoint-200")
        c = newest(b.state_stores())
        assert c.step == 300 and not problem(c.path)
        shutil.rmtree(folder)


def test_save_survives_an_error_at_every_write(parts, tmp_path):
    "A failed save keeps the previous checkpoint; the next save succeeds."
    made = [state(parts, s) for s in (100, 200, 300)]

    def save(store, s):
        try:
            store.save(s)
            return True
        except (CheckpointError, OSError):
            return False

    with Disk(tmp_path / "count").active() as disk:
        store = CheckpointStore(tmp_path / "count", keep=2)
        for s in made:
            assert save(store, s)
    for at in range(disk.count):
        folder = tmp_path / f"{at}"
        store = CheckpointStore(folder, keep=2)
        with Disk(folder, [errno.EIO, errno.ENOSPC][at % 2], at).active() as faulty:
            good, last = 0, None
            for s in made:
                if save(store, s):
                    last = s.trainer["global_step"]
                c = store.newest()
                assert (c.step if c else 0) >= (last or 0) and (c.step if c else 0) >= good, (
                    at,
                    faulty.failed,
                )
                good = c.step if c else 0
        assert faulty.failed and save(store, made[-1]) and store.newest().step == 300
        shutil.rmtree(folder)


def test_short_writes_are_completed(saves, tmp_path):
    (tmp_path / "disk").mkdir()
    b = Backup(tmp_path / "disk", saves)
    with Disk(tmp_path / "disk", short=True).active():
        submit_saves(b, saves)
    assert steps_saved(b) == [100, 200, 300]
    assert (b.path / "metrics.jsonl").read_bytes() == (saves / "metrics.jsonl").read_bytes()


def test_file_that_reads_back_empty_is_retried(saves, tmp_path, monkeypatch):
    "It causes no second copy, and older copies are deleted only once it reads back."
    (tmp_path / "disk").mkdir()
    b = Backup(tmp_path / "disk", saves, keep=1)
    b.run_id = ID
    b.submit(saves / "checkpoints" / "checkpoint-100")
    b.step()
    real, late = (
        backup_module.problem,
        iter([Defect("damaged", "model.safetensors has 0 bytes instead of 9,999")] * 3),
    )
    monkeypatch.setattr(
        backup_module,
        "problem",
        lambda p, *a, **k: (
            next(late, None) or real(p, *a, **k) if p.name == "checkpoint-300" else real(p, *a, **k)
        ),
    )
    b.submit(saves / "checkpoints" / "checkpoint-300")
    b.step()
    assert (
        "failed verification" in b.status()["failed"]["reason"]
        and b.status()["copied"]["step"] == 100
        and (b.path / "checkpoints" / "checkpoint-100").exists()
    )
    made = (b.path / "checkpoints" / "checkpoint-300" / "model.safetensors").stat().st_ino
    run_until_done(b)
    assert (
        b.path / "checkpoints" / "checkpoint-300" / "model.safetensors"
    ).stat().st_ino == made and [c.step for c in b.copies()] == [300]


def test_backup_changes_only_its_own_folder(saves, tmp_path):
    "The copies of another run beside it are kept, whatever the retention."
    disk = tmp_path / "disk"
    disk.mkdir()
    other = Backup(disk, saves.with_name("other"), keep=1)
    other.path.mkdir()
    write_json(other.path / "run.json", dict(id="b" * 32))
    for step in (100, 200):
        shutil.copytree(
            saves / "checkpoints" / f"checkpoint-{step}",
            other.path / "checkpoints" / f"checkpoint-{step}",
        )
    b = Backup(disk, saves, keep=1)
    submit_saves(b, saves)
    assert [c.step for c in b.copies()] == [300] and [c.step for c in other.copies()] == [100, 200]
    b = Backup(disk, saves.with_name("other"))
    b.run_id = ID
    b.submit(saves / "checkpoints" / "checkpoint-300")
    b.step()
    assert "belongs to another run" in b.lost and [c.step for c in other.copies()] == [100, 200]


def test_deleted_copies_leave_no_bytes_in_the_trash(saves, tmp_path):
    "Each file is truncated before it is deleted, the manifest first."
    disk = tmp_path / "disk"
    disk.mkdir()
    b, seen = Backup(disk, saves, keep=1), []
    real = os.unlink

    def unlink(path, *a, **k):
        full_path = (
            os.path.join(os.readlink(f"/proc/self/fd/{k['dir_fd']}"), path)
            if k.get("dir_fd")
            else str(path)
        )
        if full_path.startswith(str(disk)):
            seen.append((os.path.basename(path), os.path.getsize(full_path)))
        return real(path, *a, **k)

    patch(os, "unlink", unlink)
    try:
        submit_saves(b, saves)
    finally:
        patch(os, "unlink", real)
    assert len(seen) > 10 and not any(size for _, size in seen) and seen[0][0] == "MANIFEST.json"


# --- what has arrived -----------------------------------------------------------------------------
@pytest.fixture
def drive(tmp_path):
    "A mounted Drive and its server."
    if not keeps_attributes(tmp_path):
        pytest.skip("this disk has no extended attributes")
    (tmp_path / "drive").mkdir()
    disk = Disk(tmp_path / "drive")
    disk.server = Server(tmp_path / "drive", tmp_path / "server", seed=1)
    return disk


def test_copied_is_not_confirmed(saves, drive, tmp_path):
    """Old copies are kept until a newer one has arrived; the status distinguishes copied from
    confirmed.
    """
    b = Backup(tmp_path / "drive", saves, keep=1)
    with drive.active():
        submit_saves(b, saves)
        s = b.status()
        assert (
            s["server_tells"]
            and s["copied"]["step"] == 300
            and s["confirmed"] is None
            and not b.done()
            and b.done(confirm=False)
        )
        assert [c.step for c in b.copies()] == [
            100,
            200,
            300,
        ], "a copy was deleted before a newer one arrived"
        while not b.done():
            drive.server.deliver(3)
            b.step()
            arrived = [
                c.step
                for c in CheckpointStore(drive.server.arrived / "demo" / "checkpoints").all()
                if not problem(c.path)
            ]
            if c := b.status()["confirmed"]:
                assert c["step"] in arrived, "confirmed, but not on the server"
            assert not arrived or max(arrived) >= (c["step"] if c else 0)
    assert b.status()["confirmed"]["step"] == 300 and [c.step for c in b.copies()] == [300]


def test_newer_copy_that_is_still_arriving_is_kept(saves, drive, tmp_path):
    "Only copies older than the newest that has arrived may be deleted."
    b = Backup(tmp_path / "drive", saves, keep=1)
    with drive.active():
        submit_saves(b, saves)
        drive.server.waiting = {p for p in drive.server.waiting if "checkpoint-100" in str(p)}
        drive.server.deliver(999)
        b.step()
    assert (
        b.status()["confirmed"]["step"] == 100
        and [c.step for c in b.copies()] == [100, 200, 300]
        and not b.done()
    )


def test_different_content_on_the_server_is_not_confirmed(saves, drive, tmp_path):
    b = Backup(tmp_path / "drive", saves)
    with drive.active():
        submit_saves(b, saves)
        drive.server.deliver(999)
        f = b.path / "checkpoints" / "checkpoint-300" / "model.safetensors"
        os.setxattr(f, "user.drive.md5", b"0" * 32)
        b.step()
    assert b.status()["confirmed"]["step"] == 200 and b.status()["waiting"] == ["checkpoint-300"]


@pytest.mark.parametrize("seed", range(12))
def test_machine_lost_while_files_arrive(seed, saves, drive, tmp_path):
    """Files arrive in random order, some never:

    the restored files are verified and no older than the confirmed ones.
    """
    drive.server.rng = rng = random.Random(seed)
    b, confirmed = Backup(tmp_path / "drive", saves, keep=1, beat=60), 0
    with drive.active():

        def check():
            nonlocal confirmed
            drive.server.deliver(rng.randrange(25))
            b.step()
            confirmed = max(confirmed, (b.status()["confirmed"] or {}).get("step", 0))

        submit_saves(b, saves, check)
        for _ in range(rng.randrange(3)):
            check()
    drive.server.copy_to(tmp_path / "other")
    late = Backup(tmp_path / "other", tmp_path / "new" / "demo")
    c = newest(late.state_stores())
    assert (c.step if c else 0) >= confirmed
    if c:
        assert not problem(c.path)
    with (
        contextlib.nullcontext()
        if c or not (late.path / "run.json").exists()
        else pytest.raises(BackupError, match="neither its tokenizer nor a checkpoint")
    ):
        assert restore_run(late) == (late.path / "run.json").exists()


# --- complete runs --------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def short_intervals(monkeypatch):
    for k, v in dict(BEAT=0.2, RETRY=0.02, POLL=0.02).items():
        monkeypatch.setattr(backup_module, k, v)


class Wait(Callback):
    "Wait after each save until the backup has done what it can."

    def on_step(self, t):
        b = next(c.backup for c in t.callbacks if hasattr(c, "backup"))
        t.writer.wait()
        time.sleep(0.1 if b.failed else 0.02)
        end = time.monotonic() + 20
        while (
            (b.pending or b.doing.startswith("copying"))
            and not b.failed
            and not b.lost
            and time.monotonic() < end
        ):
            time.sleep(0.01)


def assert_uninterrupted(work, losses, uninterrupted):
    assert losses == uninterrupted[1] and weights(work) == weights(uninterrupted[0])


def backup_state(work):
    return json.loads((work / "run" / "backup.json").read_text())


def test_run_is_restored_from_its_backup(work, uninterrupted, tmp_path):
    "The machine is lost during training; the same call on an empty one resumes bit for bit."
    backup = dict(gdrive_backup_dir=str(tmp_path / "disk"), backup_keep_last=2)
    with pytest.raises(PowerCut):
        run_fit(work, Wait(), AtStep(12, power_cut), **backup)
    shutil.rmtree(work / "run")
    (work / "text.jsonl").unlink()  # nothing is left, not even the text
    run, losses = run_fit(work, Wait(), **backup)
    assert dict(losses.items()) == {
        k: v for k, v in uninterrupted[1].items() if k[0] > 10 or k == (10, "eval_loss")
    }
    assert weights(work) == weights(uninterrupted[0])
    assert [a["step"] for a in run.facts["attempts"]] == [0, 10]
    history = lambda w: [
        (r["step"], r.get("loss"), r.get("eval_loss")) for r in open_run(w / "run").history
    ]
    assert history(work) == history(uninterrupted[0])
    s = backup_state(work)
    assert (
        s["copied"]["step"] == 20
        and not s["failed"]
        and not s["pending"]
        and s["server_tells"] is False
    )
    assert sorted(p.name for p in (tmp_path / "disk" / "run" / "checkpoints").iterdir()) == [
        "checkpoint-15",
        "checkpoint-20",
    ]
    assert not problem(tmp_path / "disk" / "run" / "final") and "backed up in" in log(work)
    shutil.rmtree(work / "run")  # lost again after the end: the run is not trained again
    run, losses = run_fit(work, **backup)
    assert not losses and run.finished and weights(work) == weights(uninterrupted[0])


def test_missing_tokenizer_is_taken_from_a_checkpoint(work, uninterrupted, tmp_path):
    "It is in every checkpoint; the token set is rebuilt from the text."
    backup = dict(gdrive_backup_dir=str(tmp_path / "disk"))
    with pytest.raises(PowerCut):
        run_fit(work, Wait(), AtStep(12, power_cut), **backup)
    shutil.rmtree(work / "run")
    (tmp_path / "disk" / "run" / "tokenizer" / "tokenizer.json").write_bytes(b"")
    (tmp_path / "disk" / "run" / "data" / "train" / "tokens.bin").write_bytes(b"")
    run, losses = run_fit(work, **backup)
    assert weights(work) == weights(uninterrupted[0]) and [
        a["step"] for a in run.facts["attempts"]
    ] == [
        0,
        10,
    ]


def test_training_continues_when_the_backup_is_full(work, uninterrupted, tmp_path):
    "Every write from the second checkpoint on fails."
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk", errno.EDQUOT)

    def full(t):
        disk.at, disk.times = 0, 10**9

    with disk.active():
        run, losses = run_fit(
            work,
            Wait(),
            AtStep(7, full),
            gdrive_backup_dir=str(tmp_path / "disk"),
            backup_wait_seconds=1,
        )
    assert_uninterrupted(work, losses, uninterrupted)
    s = backup_state(work)
    assert "quota" in s["failed"]["reason"] and s["copied"]["step"] == 5 and s["pending"]
    said = log(work)
    assert (
        said.count("NOT BACKED UP: [Errno 122]") == 1 and "run this cell again to copy it" in said
    )
    run, losses = run_fit(
        work, gdrive_backup_dir=str(tmp_path / "disk")
    )  # there is space again: the same call only copies
    assert (
        not losses
        and not backup_state(work)["failed"]
        and not problem(tmp_path / "disk" / "run" / "final")
    )


def test_backup_continues_after_a_mount_returns(work, uninterrupted, tmp_path):
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk")

    def vanish(t):
        disk.gone = True

    def back(t):
        disk.gone = False

    with disk.active():
        run, losses = run_fit(
            work,
            Wait(),
            AtStep(7, vanish),
            AtStep(13, back),
            gdrive_backup_dir=str(tmp_path / "disk"),
        )
    assert_uninterrupted(work, losses, uninterrupted)
    assert "NOT BACKED UP" in log(work) and "works again" in log(work)
    assert backup_state(work)["copied"]["step"] == 20 and not backup_state(work)["failed"]


def test_slow_copies_skip_intermediate_saves(work, uninterrupted, tmp_path):
    """Intermediate saves are skipped; the newest is copied.

    The checkpoint that is being copied is not deleted meanwhile.
    """
    (tmp_path / "disk").mkdir()
    with Disk(tmp_path / "disk", delay=0.02).active():
        run, losses = run_fit(
            work, gdrive_backup_dir=str(tmp_path / "disk"), save_steps=1, save_total_limit=1
        )
    assert weights(work) == weights(uninterrupted[0])
    s = backup_state(work)
    assert s["copied"]["step"] == 20 and s["passed_over"] > 5 and not s["failed"]


def test_missing_mount_is_reported(work, tmp_path):
    with pytest.raises(BackupError, match="nothing is mounted at .*train without a backup"):
        run_fit(work, gdrive_backup_dir=str(tmp_path / "drive" / "MyDrive" / "runs"))
    with pytest.raises(BackupError, match="does not exist"):
        run_fit(work, gdrive_backup_dir=str(tmp_path / "no" / "such"))
    assert not (tmp_path / "drive").exists() and not (tmp_path / "no").exists()


def test_end_waits_until_late_files_are_confirmed(work, uninterrupted, drive, tmp_path):
    "The end waits for them; a machine that is lost earlier resumes from what has arrived."
    backup = dict(gdrive_backup_dir=str(tmp_path / "drive"), backup_keep_last=1)
    stop = threading.Event()

    def serve():
        while not stop.wait(0.03):
            drive.server.deliver(4)

    thread = threading.Thread(target=serve)
    with drive.active():
        thread.start()
        try:
            with pytest.raises(PowerCut):
                run_fit(work, Wait(), AtStep(17, power_cut), **backup)
            stop.set()
            thread.join()
            drive.server.copy_to(tmp_path / "other")
        finally:
            stop.set()
            thread.join()
    shutil.rmtree(work / "run")
    run, losses = run_fit(work, gdrive_backup_dir=str(tmp_path / "other"))
    assert weights(work) == weights(uninterrupted[0]) and all(
        uninterrupted[1][k] == v for k, v in losses.items()
    )


def test_unconfirmed_files_are_reported_at_the_end(work, uninterrupted, drive, tmp_path):
    with drive.active():
        run, losses = run_fit(
            work, gdrive_backup_dir=str(tmp_path / "drive"), backup_wait_seconds=1
        )
        for thread in threading.enumerate():  # the server must see their writes
            if thread.name == "minigpt-backup":
                thread.join()
    assert_uninterrupted(work, losses, uninterrupted)
    s = backup_state(work)
    assert s["copied"]["step"] == 20 and s["confirmed"] is None and "checkpoint-20" in s["waiting"]
    assert "COPIED, NOT YET UPLOADED" in log(work) and "flush_and_unmount" in log(work)
    drive.server.deliver(999)
    with drive.active():
        stop = threading.Event()
        threading.Thread(
            target=lambda: [drive.server.deliver(9) for _ in iter(lambda: stop.wait(0.05), True)]
        ).start()
        try:
            run_fit(work, gdrive_backup_dir=str(tmp_path / "drive"))
        finally:
            stop.set()
    assert backup_state(work)["confirmed"]["step"] == 20 and "Google has it" in log(work)


def test_old_tokens_are_deleted_after_a_failed_attempt(tmp_path, monkeypatch):
    "A backup that cannot write its list keeps the old token files, and deletes them later."
    (tmp_path / "disk" / "data").mkdir(parents=True)
    old = tmp_path / "disk" / "data" / "tokens.bin"
    old.write_bytes(b"old")
    mirror = backup_module._SmallFiles(tmp_path / "run", tmp_path / "disk", set())
    mirror.files = {"data/tokens.bin": dict(size=3)}

    def fails(run_id, files):
        raise OSError(28, "full")

    with monkeypatch.context() as m:
        m.setattr(mirror, "_list", fails)
        with pytest.raises(OSError):
            mirror.forget("id", ["data-2"])
    assert old.exists() and mirror.files
    mirror.forget("id", ["data-2"])
    assert not old.exists() and not mirror.files


def test_second_machine_on_a_backup_is_refused(work, uninterrupted, tmp_path):
    """The second one is refused while the first runs, and takes over once it has stopped.

    The first notices that it was replaced.
    """
    other = child.new_work(tmp_path / "other")
    backup = dict(gdrive_backup_dir=str(tmp_path / "disk"))

    def second(t):
        time.sleep(0.3)
        said = subprocess.run(
            [sys.executable, child.__file__, str(other), json.dumps(dict(SHORT, **backup))],
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": str(child.ROOT)},
        ).stderr
        assert "BackupError: another process is training this run" in said

    run, losses = run_fit(work, Wait(), AtStep(8, second), **backup)
    assert_uninterrupted(work, losses, uninterrupted)
    assert not (other / "run" / "run.json").exists()

    def taken(t):
        (tmp_path / "disk" / "run2" / "heartbeat.json").write_text(
            json.dumps(dict(session="x", beat=1, time=time.time()))
        )
        time.sleep(0.5)

    fit(
        child.shape(),
        work / "text.jsonl",
        output_dir=work / "run2",
        callbacks=[Wait(), AtStep(8, taken)],
        **{**SHORT, **backup, "backup_wait_seconds": 1},
    )
    assert (
        "another process has taken over"
        in json.loads((work / "run2" / "backup.json").read_text())["stopped"]
    )
    assert [p.name for p in (tmp_path / "disk" / "run2" / "checkpoints").iterdir()] == [
        "checkpoint-5"
    ]


def test_another_run_in_the_backup_is_refused(work, tmp_path):
    run_fit(work, gdrive_backup_dir=str(tmp_path / "disk"))
    shutil.rmtree(work / "run")
    run_fit(work)  # another run with the same name
    with pytest.raises(BackupError, match="the backup of another run .* nothing is overwritten"):
        run_fit(work, gdrive_backup_dir=str(tmp_path / "disk"), max_steps=21)
    shutil.rmtree(work / "run")
    with pytest.raises(FileExistsError, match="resume=False"):
        run_fit(work, gdrive_backup_dir=str(tmp_path / "disk"), resume=False)
    run_fit(work, gdrive_backup_dir=str(tmp_path / "disk"), overwrite=True)
    assert (tmp_path / "disk" / "run.old-1" / "final").exists() and not problem(
        tmp_path / "disk" / "run" / "final"
    )


def test_going_back_sets_the_later_course_of_the_backup_aside(
    work, uninterrupted, tmp_path, monkeypatch
):
    """On a file system where a rename is a copy.

    The abandoned course is kept aside in the backup and never restored.
    """
    backup = dict(gdrive_backup_dir=str(tmp_path / "disk"))
    with pytest.raises(PowerCut):
        run_fit(work, Wait(), AtStep(12, power_cut), **backup)
    real = os.rename

    def rename(a, b):
        if not str(a).startswith(str(tmp_path / "disk")):
            return real(a, b)
        shutil.copytree(a, b)
        shutil.rmtree(a)
        return None

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(PowerCut):
        run_fit(
            work, Wait(), AtStep(8, power_cut), resume="checkpoint-5", learning_rate=1e-3, **backup
        )
    backup_folder = tmp_path / "disk" / "run" / "checkpoints"
    assert sorted(p.name for p in backup_folder.iterdir()) == [
        "checkpoint-10.superseded-1",
        "checkpoint-5",
    ]
    shutil.rmtree(work / "run")
    run, _ = run_fit(work, Wait(), learning_rate=1e-3, **backup)
    assert [a["step"] for a in run.facts["attempts"]] == [0, 5, 5] and run.finished
    assert not problem(backup_folder / "checkpoint-10") and not problem(
        backup_folder / "checkpoint-10.superseded-1"
    )


def save_light_snapshot(parts, saves, step):
    "Save a snapshot with weights only."
    s = state(parts, step)
    s.optimizer = s.rng = None
    return CheckpointStore(saves / "snapshots", name="snapshot", kind="light").save(s)


def test_light_snapshots_do_not_displace_states(parts, saves, tmp_path):
    "Training cannot resume from them, so they are counted and kept separately."
    (tmp_path / "disk").mkdir()
    b = Backup(tmp_path / "disk", saves, keep=2)
    b.run_id = ID
    b.submit(saves / "checkpoints" / "checkpoint-100")
    b.submit(save_light_snapshot(parts, saves, 110))
    b.step()
    for n in range(120, 160, 10):
        b.submit(save_light_snapshot(parts, saves, n))
        b.step()
    assert b.done() and newest(b.state_stores()).step == 100 and b.status()["copied"]["step"] == 100
    assert [(c.step, c.kind) for c in b.copies()] == [(100, "step"), (140, "light"), (150, "light")]
    shutil.rmtree(saves / "snapshots")


def test_missing_run_json_in_the_backup_is_waited_for(work, uninterrupted, tmp_path):
    "The backup is not treated as empty: no new run is trained into it."
    backup = dict(gdrive_backup_dir=str(tmp_path / "disk"))
    with pytest.raises(PowerCut):
        run_fit(work, Wait(), AtStep(12, power_cut), **backup)
    shutil.rmtree(work / "run")
    backup_folder = tmp_path / "disk" / "run"
    for damage in (lambda f: f.write_bytes(b""), os.remove):
        content = (backup_folder / "run.json").read_bytes()
        damage(backup_folder / "run.json")
        with pytest.raises(BackupError, match="run.json has not arrived: wait"):
            run_fit(work, **backup)
        (backup_folder / "run.json").write_bytes(content)
    assert (
        [p.name for p in (backup_folder / "checkpoints").iterdir()]
        and run_fit(work, **backup)[0].finished
        and weights(work) == weights(uninterrupted[0])
    )


@pytest.mark.parametrize("lost", [False, True])
def test_run_killed_before_its_first_copy_resumes(lost, work, uninterrupted, tmp_path):
    """The backup has a heartbeat but no run.json: the same call resumes.

    If the machine is lost too, training restarts.
    """
    backup_folder = tmp_path / "disk" / "run"
    with pytest.raises(PowerCut):
        run_fit(work, AtStep(7, power_cut))
    backup_folder.mkdir(parents=True)
    (backup_folder / "heartbeat.json").write_text(
        json.dumps(
            dict(
                run_id=json.loads((work / "run" / "run.json").read_text())["id"],
                session="x",
                beat=1,
                time=time.time(),
                seconds=0.1,
            )
        )
    )
    if lost:
        shutil.rmtree(work / "run")
    run, _ = run_fit(work, gdrive_backup_dir=str(tmp_path / "disk"))
    assert [a["step"] for a in run.facts["attempts"]] == ([0] if lost else [0, 5]) and weights(
        work
    ) == weights(uninterrupted[0])
    assert backup_state(work)["copied"]["step"] == 20 and not problem(backup_folder / "final")


def write_heartbeats(folder, stop, clock, start=1, every=0.05):
    "Write the heartbeat of another machine with its own clock, and now and then a torn file."
    for n in range(start, start + 10_000):
        (folder / "heartbeat.json").write_text(
            json.dumps(
                dict(
                    run_id=ID,
                    session="other",
                    beat=n,
                    time=time.time() + clock,
                    seconds=every,
                    ended=False,
                )
            )
        )
        if stop.wait(every):
            return
        (folder / "heartbeat.json").write_text("{")


@pytest.fixture
def foreign_backup(tmp_path):
    "A backup that another machine has written to, and the messages about it."
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    messages, handler = [], logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    with log_to(handler):
        yield Backup(tmp_path / "disk", tmp_path / "run"), messages


@pytest.mark.parametrize("clock", [-5000, -1000, 0, 5000])
def test_another_machine_is_detected_whatever_its_clock(foreign_backup, clock):
    b, messages = foreign_backup
    stop = threading.Event()
    other = threading.Thread(target=write_heartbeats, args=(b.path, stop, clock))
    other.start()
    try:
        while not (b.path / "heartbeat.json").exists():
            time.sleep(0.01)
        with pytest.raises(BackupError, match="another process is training this run"):
            backup_module.check_no_other_process(b)
    finally:
        stop.set()
        other.join()


@pytest.mark.parametrize("clock", [-5000, 5000])
@pytest.mark.parametrize(
    "change, waits",
    [({}, True), (dict(ended=True), False), (dict(session="mine"), False)],
    ids=["died", "ended", "own"],
)
def test_stopped_machine_is_waited_for_no_longer_than_necessary(
    foreign_backup, clock, change, waits
):
    b, messages = foreign_backup
    write_json(b.run_path / "backup.json", dict(session="mine"))
    heartbeat = dict(
        run_id=ID, session="other", beat=7, time=time.time() + clock, seconds=0.1, ended=False
    )
    write_json(b.path / "heartbeat.json", heartbeat | change)
    began = time.monotonic()
    backup_module.check_no_other_process(b)
    took = time.monotonic() - began
    assert (0.25 <= took < 2 and len(messages) == 1) if waits else (took < 0.2 and not messages)


@pytest.mark.parametrize("text", ["{", "[]", '{"seconds": 1e9}', '{"seconds": "x", "time": null}'])
def test_invalid_heartbeat_is_watched_as_usual(foreign_backup, text, monkeypatch):
    "The wait ends, and no Python error is raised."
    b, messages = foreign_backup
    monkeypatch.setattr(backup_module, "BEAT", 0.05)
    (b.path / "heartbeat.json").write_text(text)
    backup_module.check_no_other_process(b)
    assert len(messages) == 1


def test_saved_best_model_does_not_clear_a_failed_save(work, uninterrupted, monkeypatch):
    "The failure is reported once, and the best model does not clear it."
    real = CheckpointStore.save

    def save(self, s):
        if self.kind == "step" and s.trainer["global_step"] in (5, 10):
            raise CheckpointError("no room")
        return real(self, s)

    monkeypatch.setattr(CheckpointStore, "save", save)
    run, losses = run_fit(work)
    assert_uninterrupted(work, losses, uninterrupted)
    assert (
        log(work).count("NOT SAVED") == 1
        and [l[20:] for l in log(work).splitlines() if "saved again" in l]
        == ["saved again: checkpoint-15"]
        and run.best
    )


def test_checkpoint_is_not_deleted_while_it_is_copied(parts, tmp_path, monkeypatch):
    "Even if newer saves are waiting."
    (tmp_path / "disk").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    write_json(run / "run.json", dict(id=ID))
    store = CheckpointStore(run / "checkpoints", keep=1)
    first = store.save(state(parts, 1))
    b = Backup(tmp_path / "disk", run)
    b.run_id = ID
    b.submit(first, store)
    real = backup_module.CheckpointCopy.run

    def slow(self):
        if self.source == first:
            for n in (2, 3, 4):
                b.submit(store.save(state(parts, n)), store)
        return real(self)

    monkeypatch.setattr(backup_module.CheckpointCopy, "run", slow)
    b.step()
    assert not b.failed and not problem(b.path / "checkpoints" / "checkpoint-1")
    run_until_done(b)
    store.prune()
    assert [c.step for c in store.all()] == [4] and b.status()["copied"]["step"] == 4


def test_unreadable_copy_is_retried(work, uninterrupted, tmp_path, monkeypatch):
    """A flaky mount is retried; a damaged copy is skipped.

    While a copy cannot be read, no training starts and no older state replaces it.
    """
    backup = dict(gdrive_backup_dir=str(tmp_path / "disk"))
    monkeypatch.setattr("minigpt.train.setup.RETRY_DELAYS", (0.01, 0.01))
    with pytest.raises(PowerCut):
        run_fit(work, Wait(), AtStep(17, power_cut), **backup)
    shutil.rmtree(work / "run")
    real = backup_module.copy_checkpoint

    def flaky_copy(source, target):
        if source.name == "checkpoint-15" and source.parent.name == "checkpoints" and errors.pop():
            raise OSError(errno.EIO, "Input/output error")
        return real(source, target)

    monkeypatch.setattr("minigpt.run.backup.copy_checkpoint", flaky_copy)
    errors = [True] * 9
    for _ in range(2):
        with pytest.raises(
            BackupError,
            match=(
                "checkpoint-15 may be complete, and it could not be copied.*Nothing was trained"
            ),
        ):
            run_fit(work, **backup)
    assert (
        len(errors) == 3
        and not any((work / "run/checkpoints").iterdir())
        and len(open_run(work / "run").facts["attempts"]) == 1
    )
    errors = [False, True]
    run, losses = run_fit(work, **backup)
    assert [a["step"] for a in run.facts["attempts"]] == [0, 15] and weights(work) == weights(
        uninterrupted[0]
    )


def test_damaged_copy_is_skipped(work, uninterrupted, tmp_path):
    "The previous copy is restored."
    backup = dict(gdrive_backup_dir=str(tmp_path / "disk"))
    with pytest.raises(PowerCut):
        run_fit(work, Wait(), AtStep(17, power_cut), **backup)
    shutil.rmtree(work / "run")
    (f := tmp_path / "disk/run/checkpoints/checkpoint-15/optimizer.safetensors").write_bytes(
        f.read_bytes()[:-1]
    )
    run, losses = run_fit(work, **backup)
    assert (
        run.facts["attempts"][-1]["step"] == 10
        and weights(work) == weights(uninterrupted[0])
        and "checkpoint-15 of the backup is skipped" in log(work)
    )


def test_abandoned_course_is_not_restored(work, tmp_path):
    "Even if the backup was not mounted when the run went back, and still has that course."
    backup = dict(gdrive_backup_dir=str(tmp_path / "disk"))
    run_fit(work, **backup)
    (tmp_path / "disk").rename(tmp_path / "away")
    with pytest.raises(PowerCut):
        run_fit(work, AtStep(12, power_cut), resume="checkpoint-10", max_steps=30)
    (tmp_path / "away").rename(tmp_path / "disk")
    run, _ = run_fit(work, max_steps=30, **backup)
    assert [a["step"] for a in run.facts["attempts"]] == [
        0,
        10,
        10,
    ] and "so this checkpoint was abandoned" in log(work)


def test_going_back_takes_effect_before_the_first_step(work, tmp_path, monkeypatch):
    "Even if it fails before the first step while the later states are still in the backup."
    backup = dict(gdrive_backup_dir=str(tmp_path / "disk"), max_steps=30)
    run_fit(work, **dict(backup, max_steps=STEPS))

    def is_out_of_memory(*_):
        raise TrainingError("memory ran out")

    with monkeypatch.context() as m:
        m.setattr("minigpt.train.trainer._tune", is_out_of_memory)
        with pytest.raises(TrainingError):
            run_fit(work, resume="checkpoint-10", **backup)
    run, _ = run_fit(work, **backup)
    assert [a["step"] for a in run.facts["attempts"]] == [
        0,
        10,
        10,
    ] and "so this checkpoint was abandoned" in log(work)


def test_the_newest_best_is_kept_in_the_backup(parts, saves, tmp_path, monkeypatch):
    """It is the best of the latest attempt.

    It is neither the one with the highest step, which an abandoned course may have reached, nor the
    one of a machine whose clock is ahead.
    """
    b = Backup(tmp_path / "disk", saves)
    b.run_id = ID
    store = CheckpointStore(tmp_path / "best", kind="best")
    for attempt, (step, clock) in enumerate([(60, 2e9), (52, 1e9)], 1):
        monkeypatch.setattr("minigpt.checkpoint.store.time.time", lambda: clock)
        (made := state(parts, step)).trainer["attempt"] = attempt
        b.submit(store.save(made), store)
        b.step()
    assert [p.name for p in (b.path / "best").iterdir()] == ["checkpoint-52"]


def test_unmounted_backup_folder_is_not_written(saves, tmp_path):
    "If nothing is mounted any more, no folder is created."
    b = Backup(tmp_path / "disk", saves, beat=99)
    b.run_id = ID
    b.submit(saves / "checkpoints" / "checkpoint-100")
    b.step()
    (tmp_path / "disk").rename(tmp_path / "gone")
    (tmp_path / "disk").mkdir()
    b.submit(saves / "checkpoints" / "checkpoint-200")
    b.step()
    assert b.failed and not [*(tmp_path / "disk").iterdir()]
    (tmp_path / "disk").rmdir()
    (tmp_path / "gone").rename(tmp_path / "disk")
    b.step()
    assert not b.failed and steps_saved(b) == [100, 200]


def test_stop_at_a_light_snapshot_saves_a_full_state(work, uninterrupted):
    "A stop saves a state that training can resume from."

    class Stop(Callback):
        def on_step(self, t):
            if t.step == 7:
                t.stop = 15

    with pytest.raises(SystemExit):
        run_fit(
            work,
            Clock(),
            Stop(),
            time_save_interval_seconds=120,
            snapshot_kind="light",
            evaluation_strategy="no",
        )
    assert [c.step for c in open_run(work / "run").snapshots][-1] == 7 and [
        c.step for c in open_run(work / "run").checkpoints
    ] == [5, 7]
    run_fit(work)
    assert json.loads((work / "run" / "run.json").read_text())["attempts"][-1]["step"] == 7


def test_done_requires_an_answer_of_the_server(saves, drive, tmp_path):
    b = Backup(tmp_path / "drive", saves)
    b.run_id = ID
    assert not b.done(), "nothing may be confirmed before the first round"
    with drive.active():
        b.submit(saves / "checkpoints" / "checkpoint-100")
        b.step()
        drive.server.deliver(999)
        b.step()
        assert b.done()
        b.submit(saves / "checkpoints" / "checkpoint-200")
        ask, b._query_server = b._query_server, lambda: None
        b.step()
        assert not b.pending and not b.done(), "copied, but the server was not asked"
        ask()
    assert not b.done() and b.done(confirm=False)


# --- the writer -----------------------------------------------------------------------------------
def test_save_blocks_without_memory_for_a_copy(work, uninterrupted, monkeypatch):
    "Training then waits while a checkpoint is written; it is reported once."
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: type("", (), dict(available=0, total=1 << 40))
    )
    run, losses = run_fit(work)
    assert_uninterrupted(work, losses, uninterrupted)
    assert log(work).count("there is no memory for a second copy") == 1 and [
        c.step for c in run.checkpoints
    ] == [10, 15, 20]


def test_python_finishes_a_save_before_it_exits(tmp_path):
    script = """
import sys; sys.path[:0] = [{!r}, {!r}]
import tests.recovery.test_backup as t
from minigpt.tokenizer.bpe import train_tokenizer
from minigpt.checkpoint.store import CheckpointStore, GPTConfig, Writer
tok = train_tokenizer(["A small tokenizer."]*9, vocab_size=270)
parts = tok, GPTConfig(
    vocab_size=tok.vocab_size, dim=256, n_layer=8, n_head=4, n_kv_head=2, ffn_dim=700)
Writer().save(CheckpointStore({!r}), t.state(parts, 7))
raise SystemExit("an error")""".format(
        str(child.ROOT),
        str(child.ROOT),
        str(tmp_path / "out"),
    )
    r = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert r.returncode == 1 and r.stderr.strip() == "an error", r.stderr
    assert CheckpointStore(tmp_path / "out").newest().step == 7


# --- schedule: snapshots, early stopping, best only -----------------------------------------------
class Clock(Callback):
    "A minute passes with each step."

    def __init__(self):
        self.now = 0.0

    def on_start(self, t):
        t.schedule.clock = lambda: self.now
        t.schedule.saved()

    def on_step(self, t):
        self.now += 60
        t.writer.wait()


def test_snapshots_by_time(work, uninterrupted):
    "One every 180 s without a save; a power cut costs no more than that."
    with pytest.raises(PowerCut):
        run_fit(
            work,
            Clock(),
            AtStep(19, power_cut),
            save_steps=50,
            time_save_interval_seconds=180,
            evaluation_strategy="no",
        )
    run = open_run(work / "run")
    assert [c.step for c in run.checkpoints] == [] and [c.step for c in run.snapshots] == [
        16,
        19,
    ], [c.step for c in run.snapshots]
    run, losses = run_fit(work, save_steps=50)
    assert min(k[0] for k in losses) == 20 and weights(work) == weights(uninterrupted[0])


def test_light_snapshots_do_not_replace_full_ones(parts, tmp_path):
    full, light = (CheckpointStore(tmp_path, 2, "snapshot", kind) for kind in ("snapshot", "light"))
    for step in (1, 2):
        full.save(state(parts, step))
    for step in (3, 4, 5):
        light.save(state(parts, step))
    assert [c.step for c in full.all()] == [1, 2, 4, 5] and newest([light]).step == 2


def test_light_snapshots_only_on_demand(work, uninterrupted):
    with pytest.raises(PowerCut):
        run_fit(
            work,
            Clock(),
            AtStep(9, power_cut),
            time_save_interval_seconds=120,
            snapshot_kind="light",
        )
    run = open_run(work / "run")
    assert [(c.step, c.kind) for c in run.snapshots] == [(7, "light"), (9, "light")]
    name = run.snapshots[-1].path
    assert (
        not (name / "optimizer.safetensors").exists()
        and sum(f.stat().st_size for f in name.iterdir()) < run.checkpoints[0].size
    )
    with pytest.raises(PowerCut):
        run_fit(work, AtStep(6, power_cut))
    assert json.loads((work / "run" / "run.json").read_text())["attempts"][-1]["step"] == 5
    run_fit(work, resume="snapshot-9")
    assert json.loads((work / "run" / "run.json").read_text())["attempts"][-1][
        "step"
    ] == 9 and "weights only" in log(work)


def test_early_stopping_then_more_steps(work, uninterrupted):
    class DamageWeights(Callback):
        "From step 10 on the weights are damaged and the validation loss rises."

        def on_step(self, t):
            if t.step > 10:
                [p.data.mul_(0.7) for p in t.model.parameters()]

    run, losses = run_fit(work, DamageWeights(), max_steps=60, eval_steps=5, early_stopping=2)
    assert (
        run.finished
        and run.step == 20
        and run.best.step == 10
        and "stopped early at step 20" in log(work)
    )
    again, more = run_fit(work, DamageWeights(), max_steps=60, eval_steps=5, early_stopping=2)
    assert not more and again.finished
    (
        work / "run" / "MANIFEST.json"
    ).unlink()  # as if the process had been killed before it wrote the final model
    again, more = run_fit(work, DamageWeights(), max_steps=60, eval_steps=5, early_stopping=2)
    assert again.finished and again.step == 20 and not [k for k in more if k[1] == "loss"]
    again, more = run_fit(work, DamageWeights(), max_steps=60, eval_steps=5, early_stopping=4)
    assert min(k[0] for k in more if k[1] == "loss") == 21 and again.step == 30


def test_save_best_only_keeps_the_newest_state(work, uninterrupted):
    run, losses = run_fit(work, save_best_only=True)
    assert [c.step for c in run.checkpoints] == [20] and run.best
    assert_uninterrupted(work, losses, uninterrupted)
