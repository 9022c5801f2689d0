"""The backup, and local saves, under every fault that can be made here.

An error at each write in turn, short writes, a folder that vanishes and returns or was never there,
one that is slow, a server to which files arrive late or never. Training ends with the same losses,
the status tells the truth, and what is restored verifies.
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
from tests.harness.faulty import Disk, Server, keeps_attributes, put
from tests.recovery.test_faults import (  # noqa: F401 (the last two are fixtures: an undisturbed run, and a folder for another)
    SHORT,
    STEPS,
    At,
    PowerCut,
    go,
    log,
    power_cut,
    weights,
    whole,
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
    "A run's folder with three checkpoints and a best one"
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


def drive(b, saves, look=lambda: None):
    "Three saves, a round of the worker after each"
    b.run_id = ID
    for step in (100, 200, 300):
        b.submit(saves / "checkpoints" / f"checkpoint-{step}")
        if step == 200:
            b.submit(saves / "best" / "checkpoint-200")
        b.step()
        look()


def repeat(b, rounds=8):
    "The worker goes on trying"
    for _ in range(rounds):
        b.step()
        if b.done():
            return
    raise AssertionError(b.status())


# --- an error at every write in turn --------------------------------------------------------------
@pytest.mark.parametrize("times", [1, 4])
@pytest.mark.parametrize("error", ERRORS)
def test_every_write_of_a_backup_may_fail(error, times, saves, tmp_path):
    with Disk(tmp_path / "count").at_work() as disk:
        (tmp_path / "count").mkdir()
        disk.count = 0
        drive(Backup(tmp_path / "count", saves, keep=2, beat=1e9), saves)
    assert disk.count > 100
    for at in range(0, disk.count, 1 if error == "EIO" and times == 1 else 6):
        folder = tmp_path / f"{at}"
        folder.mkdir()
        b, before = Backup(folder, saves, keep=2, beat=1e9), []

        def look():
            "What is there verifies and is no older than before; the status does not promise more"
            whole = steps_saved(b)
            assert not before or whole and whole[-1] >= before[-1], (at, before, whole)
            before[:] = whole
            s = b.status()
            assert bool(s["failed"]) == (s["doing"] == "failing")
            if s["copied"]:
                assert s["copied"]["step"] in whole, (at, s)
            if not s["failed"] and not s["pending"]:
                assert s["copied"]["step"] == max(whole)

        with Disk(folder, ERRORS[error], at, times).at_work() as disk:
            drive(b, saves, look)
            repeat(b)
            look()
        assert disk.struck or times > 1
        assert steps_saved(b)[-2:] == steps_saved(b) and steps_saved(b)[-1] == 300, at
        assert not problem(b.path / "best" / "checkpoint-200")
        c = newest(b.state_stores())
        assert c.step == 300 and not problem(c.path)
        shutil.rmtree(folder)


def test_every_write_of_a_save_may_fail(parts, tmp_path):
    "A save that fails leaves what was there; the next one works"
    made = [state(parts, s) for s in (100, 200, 300)]

    def save(store, s):
        try:
            store.save(s)
            return True
        except (CheckpointError, OSError):
            return False

    with Disk(tmp_path / "count").at_work() as disk:
        store = CheckpointStore(tmp_path / "count", keep=2)
        for s in made:
            assert save(store, s)
    for at in range(disk.count):
        folder = tmp_path / f"{at}"
        store = CheckpointStore(folder, keep=2)
        with Disk(folder, [errno.EIO, errno.ENOSPC][at % 2], at).at_work() as faulty:
            good, last = 0, None
            for s in made:
                if save(store, s):
                    last = s.trainer["global_step"]
                c = store.newest()
                assert (c.step if c else 0) >= (last or 0) and (c.step if c else 0) >= good, (
                    at,
                    faulty.struck,
                )
                good = c.step if c else 0
        assert faulty.struck and save(store, made[-1]) and store.newest().step == 300
        shutil.rmtree(folder)


def test_short_writes(saves, tmp_path):
    (tmp_path / "disk").mkdir()
    b = Backup(tmp_path / "disk", saves)
    with Disk(tmp_path / "disk", short=True).at_work():
        drive(b, saves)
    assert steps_saved(b) == [100, 200, 300]
    assert (b.path / "metrics.jsonl").read_bytes() == (saves / "metrics.jsonl").read_bytes()


def test_a_file_that_reads_back_empty_for_a_while(saves, tmp_path, monkeypatch):
    "Nothing is copied again because of it, and nothing older is deleted before it reads back"
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
    repeat(b)
    assert (
        b.path / "checkpoints" / "checkpoint-300" / "model.safetensors"
    ).stat().st_ino == made and [c.step for c in b.copies()] == [300]


def test_only_its_own_folder_is_touched(saves, tmp_path):
    "Another run beside it keeps its copies, whatever keep-last-N says"
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
    drive(b, saves)
    assert [c.step for c in b.copies()] == [300] and [c.step for c in other.copies()] == [100, 200]
    b = Backup(disk, saves.with_name("other"))
    b.run_id = ID
    b.submit(saves / "checkpoints" / "checkpoint-300")
    b.step()
    assert "belongs to another run" in b.lost and [c.step for c in other.copies()] == [100, 200]


def test_deleted_copies_leave_no_bytes_in_the_trash(saves, tmp_path):
    "Each file is cut to nothing before it is deleted, the manifest first"
    disk = tmp_path / "disk"
    disk.mkdir()
    b, seen = Backup(disk, saves, keep=1), []
    real = os.unlink

    def unlink(path, *a, **k):
        whole = (
            os.path.join(os.readlink(f"/proc/self/fd/{k['dir_fd']}"), path)
            if k.get("dir_fd")
            else str(path)
        )
        if whole.startswith(str(disk)):
            seen.append((os.path.basename(path), os.path.getsize(whole)))
        return real(path, *a, **k)

    put(os, "unlink", unlink)
    try:
        drive(b, saves)
    finally:
        put(os, "unlink", real)
    assert len(seen) > 10 and not any(size for _, size in seen) and seen[0][0] == "MANIFEST.json"


# --- what has arrived -----------------------------------------------------------------------------
@pytest.fixture
def google(tmp_path):
    "A mounted Drive and its server"
    if not keeps_attributes(tmp_path):
        pytest.skip("this disk keeps no extended attributes")
    (tmp_path / "drive").mkdir()
    disk = Disk(tmp_path / "drive")
    disk.server = Server(tmp_path / "drive", tmp_path / "server", seed=1)
    return disk


def test_copied_is_not_confirmed(saves, google, tmp_path):
    "Old copies stay until a newer one has arrived; the status tells copied and confirmed apart"
    b = Backup(tmp_path / "drive", saves, keep=1)
    with google.at_work():
        drive(b, saves)
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
        ], "nothing may be deleted before something has arrived"
        while not b.done():
            google.server.deliver(3)
            b.step()
            there = [
                c.step
                for c in CheckpointStore(google.server.there / "demo" / "checkpoints").all()
                if not problem(c.path)
            ]
            if c := b.status()["confirmed"]:
                assert c["step"] in there, "confirmed, and not on the server"
            assert not there or max(there) >= (c["step"] if c else 0)
    assert b.status()["confirmed"]["step"] == 300 and [c.step for c in b.copies()] == [300]


def test_a_newer_copy_that_is_still_arriving_is_kept(saves, google, tmp_path):
    "Only what is older than the newest that has arrived may go"
    b = Backup(tmp_path / "drive", saves, keep=1)
    with google.at_work():
        drive(b, saves)
        google.server.waiting = {p for p in google.server.waiting if "checkpoint-100" in str(p)}
        google.server.deliver(999)
        b.step()
    assert (
        b.status()["confirmed"]["step"] == 100
        and [c.step for c in b.copies()] == [100, 200, 300]
        and not b.done()
    )


def test_the_server_has_something_else(saves, google, tmp_path):
    b = Backup(tmp_path / "drive", saves)
    with google.at_work():
        drive(b, saves)
        google.server.deliver(999)
        f = b.path / "checkpoints" / "checkpoint-300" / "model.safetensors"
        os.setxattr(f, "user.drive.md5", b"0" * 32)
        b.step()
    assert b.status()["confirmed"]["step"] == 200 and b.status()["waiting"] == ["checkpoint-300"]


@pytest.mark.parametrize("seed", range(12))
def test_the_machine_dies_while_files_arrive(seed, saves, google, tmp_path):
    "In random order, some never: what is restored verifies, no older than what was confirmed"
    google.server.rng = rng = random.Random(seed)
    b, confirmed = Backup(tmp_path / "drive", saves, keep=1, beat=60), 0
    with google.at_work():

        def look():
            nonlocal confirmed
            google.server.deliver(rng.randrange(25))
            b.step()
            confirmed = max(confirmed, (b.status()["confirmed"] or {}).get("step", 0))

        drive(b, saves, look)
        for _ in range(rng.randrange(3)):
            look()
    google.server.machine_dies(tmp_path / "other")
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


# --- whole trainings ------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def quick(monkeypatch):
    for k, v in dict(BEAT=0.2, RETRY=0.02, POLL=0.02).items():
        monkeypatch.setattr(backup_module, k, v)


class Wait(Callback):
    "After each save, until the backup has done what it can"

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


def same(work, losses, whole):
    assert losses == whole[1] and weights(work) == weights(whole[0])


def state_of(work):
    return json.loads((work / "run" / "backup.json").read_text())


def test_a_run_is_mirrored_and_comes_back(work, whole, tmp_path):
    "The machine is lost in mid-run; the same call on an empty one goes on, bit for bit"
    backup = dict(gdrive_backup_dir=str(tmp_path / "disk"), backup_keep_last=2)
    with pytest.raises(PowerCut):
        go(work, Wait(), At(12, power_cut), **backup)
    shutil.rmtree(work / "run")
    (work / "text.jsonl").unlink()  # nothing is left, not even the text
    run, losses = go(work, Wait(), **backup)
    assert dict(losses.items()) == {
        k: v for k, v in whole[1].items() if k[0] > 10 or k == (10, "eval_loss")
    }
    assert weights(work) == weights(whole[0])
    assert [a["step"] for a in run.facts["attempts"]] == [0, 10]
    history = lambda w: [
        (r["step"], r.get("loss"), r.get("eval_loss")) for r in open_run(w / "run").history
    ]
    assert history(work) == history(whole[0])
    s = state_of(work)
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
    shutil.rmtree(work / "run")  # lost again, after the end: it is not trained again
    run, losses = go(work, **backup)
    assert not losses and run.finished and weights(work) == weights(whole[0])


def test_a_tokenizer_that_did_not_arrive(work, whole, tmp_path):
    "It is in every checkpoint; the token set is built again from the text"
    backup = dict(gdrive_backup_dir=str(tmp_path / "disk"))
    with pytest.raises(PowerCut):
        go(work, Wait(), At(12, power_cut), **backup)
    shutil.rmtree(work / "run")
    (tmp_path / "disk" / "run" / "tokenizer" / "tokenizer.json").write_bytes(b"")
    (tmp_path / "disk" / "run" / "data" / "train" / "tokens.bin").write_bytes(b"")
    run, losses = go(work, **backup)
    assert weights(work) == weights(whole[0]) and [a["step"] for a in run.facts["attempts"]] == [
        0,
        10,
    ]


def test_a_training_beside_a_folder_that_is_full(work, whole, tmp_path):
    "Every write fails from the second checkpoint on"
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk", errno.EDQUOT)

    def full(t):
        disk.at, disk.times = 0, 10**9

    with disk.at_work():
        run, losses = go(
            work,
            Wait(),
            At(7, full),
            gdrive_backup_dir=str(tmp_path / "disk"),
            backup_wait_seconds=1,
        )
    same(work, losses, whole)
    s = state_of(work)
    assert "quota" in s["failed"]["reason"] and s["copied"]["step"] == 5 and s["pending"]
    said = log(work)
    assert (
        said.count("NOT BACKED UP: [Errno 122]") == 1 and "run this cell again to copy it" in said
    )
    run, losses = go(
        work, gdrive_backup_dir=str(tmp_path / "disk")
    )  # there is room again: the same cell only copies
    assert (
        not losses
        and not state_of(work)["failed"]
        and not problem(tmp_path / "disk" / "run" / "final")
    )


def test_a_mount_that_vanishes_and_returns(work, whole, tmp_path):
    (tmp_path / "disk").mkdir()
    disk = Disk(tmp_path / "disk")

    def vanish(t):
        disk.gone = True

    def back(t):
        disk.gone = False

    with disk.at_work():
        run, losses = go(
            work, Wait(), At(7, vanish), At(13, back), gdrive_backup_dir=str(tmp_path / "disk")
        )
    same(work, losses, whole)
    assert "NOT BACKED UP" in log(work) and "works again" in log(work)
    assert state_of(work)["copied"]["step"] == 20 and not state_of(work)["failed"]


def test_a_copy_a_hundred_times_slower_than_training(work, whole, tmp_path):
    """Saves in between are passed over; the newest arrives.

    The checkpoint that is being copied is not deleted meanwhile."""
    (tmp_path / "disk").mkdir()
    with Disk(tmp_path / "disk", delay=0.02).at_work():
        run, losses = go(
            work, gdrive_backup_dir=str(tmp_path / "disk"), save_steps=1, save_total_limit=1
        )
    assert weights(work) == weights(whole[0])
    s = state_of(work)
    assert s["copied"]["step"] == 20 and s["passed_over"] > 5 and not s["failed"]


def test_a_mount_that_was_never_made(work, tmp_path):
    with pytest.raises(BackupError, match="nothing is mounted at .*train without a backup"):
        go(work, gdrive_backup_dir=str(tmp_path / "drive" / "MyDrive" / "runs"))
    with pytest.raises(BackupError, match="does not exist"):
        go(work, gdrive_backup_dir=str(tmp_path / "no" / "such"))
    assert not (tmp_path / "drive").exists() and not (tmp_path / "no").exists()


def test_a_server_to_which_files_arrive_late(work, whole, google, tmp_path):
    "The end waits for them; a machine that dies before goes on from what had arrived"
    backup = dict(gdrive_backup_dir=str(tmp_path / "drive"), backup_keep_last=1)
    stop = threading.Event()

    def serve():
        while not stop.wait(0.03):
            google.server.deliver(4)

    thread = threading.Thread(target=serve)
    with google.at_work():
        thread.start()
        try:
            with pytest.raises(PowerCut):
                go(work, Wait(), At(17, power_cut), **backup)
            stop.set()
            thread.join()
            google.server.machine_dies(tmp_path / "other")
        finally:
            stop.set()
            thread.join()
    shutil.rmtree(work / "run")
    run, losses = go(work, gdrive_backup_dir=str(tmp_path / "other"))
    assert weights(work) == weights(whole[0]) and all(whole[1][k] == v for k, v in losses.items())


def test_what_has_not_arrived_at_the_end_is_said(work, whole, google, tmp_path):
    with google.at_work():
        run, losses = go(work, gdrive_backup_dir=str(tmp_path / "drive"), backup_wait_seconds=1)
        for thread in threading.enumerate():  # what it still writes must be seen by the server
            if thread.name == "minigpt-backup":
                thread.join()
    same(work, losses, whole)
    s = state_of(work)
    assert s["copied"]["step"] == 20 and s["confirmed"] is None and "checkpoint-20" in s["waiting"]
    assert "COPIED, NOT YET UPLOADED" in log(work) and "flush_and_unmount" in log(work)
    google.server.deliver(999)
    with google.at_work():
        stop = threading.Event()
        threading.Thread(
            target=lambda: [google.server.deliver(9) for _ in iter(lambda: stop.wait(0.05), True)]
        ).start()
        try:
            go(work, gdrive_backup_dir=str(tmp_path / "drive"))
        finally:
            stop.set()
    assert state_of(work)["confirmed"]["step"] == 20 and "Google has it" in log(work)


def test_old_tokens_go_although_the_first_try_failed(tmp_path, monkeypatch):
    "A mirror that cannot write its list keeps what it was to forget, and forgets it later"
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


def test_two_machines_on_one_backup(work, whole, tmp_path):
    """The second one is refused while the first is alive, and takes over when it is dead.

    The first notices if it was not."""
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

    run, losses = go(work, Wait(), At(8, second), **backup)
    same(work, losses, whole)
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
        callbacks=[Wait(), At(8, taken)],
        **{**SHORT, **backup, "backup_wait_seconds": 1},
    )
    assert (
        "another process has taken over"
        in json.loads((work / "run2" / "backup.json").read_text())["stopped"]
    )
    assert [p.name for p in (tmp_path / "disk" / "run2" / "checkpoints").iterdir()] == [
        "checkpoint-5"
    ]


def test_a_foreign_run_in_the_backup(work, tmp_path):
    go(work, gdrive_backup_dir=str(tmp_path / "disk"))
    shutil.rmtree(work / "run")
    go(work)  # another run under the same name
    with pytest.raises(BackupError, match="the backup of another run .* nothing is overwritten"):
        go(work, gdrive_backup_dir=str(tmp_path / "disk"), max_steps=21)
    shutil.rmtree(work / "run")
    with pytest.raises(FileExistsError, match="resume=False"):
        go(work, gdrive_backup_dir=str(tmp_path / "disk"), resume=False)
    go(work, gdrive_backup_dir=str(tmp_path / "disk"), overwrite=True)
    assert (tmp_path / "disk" / "run.old-1" / "final").exists() and not problem(
        tmp_path / "disk" / "run" / "final"
    )


def test_going_back_gives_up_the_later_course_in_the_backup_too(work, whole, tmp_path, monkeypatch):
    """On a folder where renaming means copying.

    What was given up is kept aside there, and never restored."""
    backup = dict(gdrive_backup_dir=str(tmp_path / "disk"))
    with pytest.raises(PowerCut):
        go(work, Wait(), At(12, power_cut), **backup)
    real = os.rename

    def rename(a, b):
        if not str(a).startswith(str(tmp_path / "disk")):
            return real(a, b)
        shutil.copytree(a, b)
        shutil.rmtree(a)
        return None

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(PowerCut):
        go(work, Wait(), At(8, power_cut), resume="checkpoint-5", learning_rate=1e-3, **backup)
    there = tmp_path / "disk" / "run" / "checkpoints"
    assert sorted(p.name for p in there.iterdir()) == ["checkpoint-10.superseded-1", "checkpoint-5"]
    shutil.rmtree(work / "run")
    run, _ = go(work, Wait(), learning_rate=1e-3, **backup)
    assert [a["step"] for a in run.facts["attempts"]] == [0, 5, 5] and run.finished
    assert not problem(there / "checkpoint-10") and not problem(
        there / "checkpoint-10.superseded-1"
    )


def light(parts, saves, step):
    "A snapshot of the weights only"
    s = state(parts, step)
    s.optimizer = s.rng = None
    return CheckpointStore(saves / "snapshots", name="snapshot", kind="light").save(s)


def test_light_snapshots_do_not_displace_states(parts, saves, tmp_path):
    "Training cannot go on from them, so they are counted, and kept, apart"
    (tmp_path / "disk").mkdir()
    b = Backup(tmp_path / "disk", saves, keep=2)
    b.run_id = ID
    b.submit(saves / "checkpoints" / "checkpoint-100")
    b.submit(light(parts, saves, 110))
    b.step()
    for n in range(120, 160, 10):
        b.submit(light(parts, saves, n))
        b.step()
    assert b.done() and newest(b.state_stores()).step == 100 and b.status()["copied"]["step"] == 100
    assert [(c.step, c.kind) for c in b.copies()] == [(100, "step"), (140, "light"), (150, "light")]
    shutil.rmtree(saves / "snapshots")


def test_a_backup_whose_run_json_has_not_arrived(work, whole, tmp_path):
    "It is not taken for nobody's: nothing is trained anew into it"
    backup = dict(gdrive_backup_dir=str(tmp_path / "disk"))
    with pytest.raises(PowerCut):
        go(work, Wait(), At(12, power_cut), **backup)
    shutil.rmtree(work / "run")
    there = tmp_path / "disk" / "run"
    for damage in (lambda f: f.write_bytes(b""), os.remove):
        whole_one = (there / "run.json").read_bytes()
        damage(there / "run.json")
        with pytest.raises(BackupError, match="run.json has not arrived: wait"):
            go(work, **backup)
        (there / "run.json").write_bytes(whole_one)
    assert (
        [p.name for p in (there / "checkpoints").iterdir()]
        and go(work, **backup)[0].finished
        and weights(work) == weights(whole[0])
    )


@pytest.mark.parametrize("lost", [False, True])
def test_killed_before_anything_was_copied(lost, work, whole, tmp_path):
    """There is a sign of life in the backup, and no run.json: the same call goes on.

    Where the machine is lost too, it begins again."""
    there = tmp_path / "disk" / "run"
    with pytest.raises(PowerCut):
        go(work, At(7, power_cut))
    there.mkdir(parents=True)
    (there / "heartbeat.json").write_text(
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
    run, _ = go(work, gdrive_backup_dir=str(tmp_path / "disk"))
    assert [a["step"] for a in run.facts["attempts"]] == ([0] if lost else [0, 5]) and weights(
        work
    ) == weights(whole[0])
    assert state_of(work)["copied"]["step"] == 20 and not problem(there / "final")


def beating(folder, stop, clock, start=1, every=0.05):
    "Another machine's sign of life, by its own clock; a torn file now and then"
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
def watched(tmp_path):
    "A backup that another machine has written to, and what is said of it"
    (tmp_path / "disk" / "run").mkdir(parents=True)
    (tmp_path / "run").mkdir()
    said, handler = [], logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    with log_to(handler):
        yield Backup(tmp_path / "disk", tmp_path / "run"), said


@pytest.mark.parametrize("clock", [-5000, -1000, 0, 5000])
def test_another_machine_is_seen_whatever_its_clock(watched, clock):
    b, said = watched
    stop = threading.Event()
    other = threading.Thread(target=beating, args=(b.path, stop, clock))
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
def test_a_machine_that_is_gone_is_waited_for_as_long_as_it_must_be(watched, clock, change, waits):
    b, said = watched
    write_json(b.run_path / "backup.json", dict(session="mine"))
    heart = dict(
        run_id=ID, session="other", beat=7, time=time.time() + clock, seconds=0.1, ended=False
    )
    write_json(b.path / "heartbeat.json", heart | change)
    began = time.monotonic()
    backup_module.check_no_other_process(b)
    took = time.monotonic() - began
    assert (0.25 <= took < 2 and len(said) == 1) if waits else (took < 0.2 and not said)


@pytest.mark.parametrize("text", ["{", "[]", '{"seconds": 1e9}', '{"seconds": "x", "time": null}'])
def test_a_heart_that_says_nonsense_is_watched_as_usual(watched, text, monkeypatch):
    "No wait without end, and no error of Python's"
    b, said = watched
    monkeypatch.setattr(backup_module, "BEAT", 0.05)
    (b.path / "heartbeat.json").write_text(text)
    backup_module.check_no_other_process(b)
    assert len(said) == 1


def test_a_best_model_that_fits_where_a_state_does_not(work, whole, monkeypatch):
    "The trouble is said once, and not taken back because of it"
    real = CheckpointStore.save

    def save(self, s):
        if self.kind == "step" and s.trainer["global_step"] in (5, 10):
            raise CheckpointError("no room")
        return real(self, s)

    monkeypatch.setattr(CheckpointStore, "save", save)
    run, losses = go(work)
    same(work, losses, whole)
    assert (
        log(work).count("NOT SAVED") == 1
        and [l[20:] for l in log(work).splitlines() if "saved again" in l]
        == ["saved again: checkpoint-15"]
        and run.best
    )


def test_a_checkpoint_is_not_deleted_while_it_is_copied(parts, tmp_path, monkeypatch):
    "Though newer saves wait already"
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
    repeat(b)
    store.prune()
    assert [c.step for c in store.all()] == [4] and b.status()["copied"]["step"] == 4


def test_one_copy_that_cannot_be_fetched(work, whole, tmp_path, monkeypatch):
    """A mount that stutters is asked again; a damaged copy is passed over.

    While a copy cannot be read nothing is trained, and no older state takes its place."""
    backup = dict(gdrive_backup_dir=str(tmp_path / "disk"))
    monkeypatch.setattr("minigpt.train.setup.RETRY_DELAYS", (0.01, 0.01))
    with pytest.raises(PowerCut):
        go(work, Wait(), At(17, power_cut), **backup)
    shutil.rmtree(work / "run")
    real = backup_module.copy_checkpoint

    def stutters(source, target):
        if source.name == "checkpoint-15" and source.parent.name == "checkpoints" and errors.pop():
            raise OSError(errno.EIO, "Input/output error")
        return real(source, target)

    monkeypatch.setattr("minigpt.run.backup.copy_checkpoint", stutters)
    errors = [True] * 9
    for _ in range(2):
        with pytest.raises(
            BackupError,
            match=(
                "checkpoint-15 may be complete, and it could not be copied.*Nothing was trained"
            ),
        ):
            go(work, **backup)
    assert (
        len(errors) == 3
        and not any((work / "run/checkpoints").iterdir())
        and len(open_run(work / "run").facts["attempts"]) == 1
    )
    errors = [False, True]
    run, losses = go(work, **backup)
    assert [a["step"] for a in run.facts["attempts"]] == [0, 15] and weights(work) == weights(
        whole[0]
    )


def test_one_copy_that_is_damaged(work, whole, tmp_path):
    "The one before it is taken"
    backup = dict(gdrive_backup_dir=str(tmp_path / "disk"))
    with pytest.raises(PowerCut):
        go(work, Wait(), At(17, power_cut), **backup)
    shutil.rmtree(work / "run")
    (f := tmp_path / "disk/run/checkpoints/checkpoint-15/optimizer.safetensors").write_bytes(
        f.read_bytes()[:-1]
    )
    run, losses = go(work, **backup)
    assert (
        run.facts["attempts"][-1]["step"] == 10
        and weights(work) == weights(whole[0])
        and "checkpoint-15 of the backup is skipped" in log(work)
    )


def test_a_course_that_was_given_up_is_not_restored(work, tmp_path):
    "Though the backup was not there when training went back, and still has it"
    backup = dict(gdrive_backup_dir=str(tmp_path / "disk"))
    go(work, **backup)
    (tmp_path / "disk").rename(tmp_path / "away")
    with pytest.raises(PowerCut):
        go(work, At(12, power_cut), resume="checkpoint-10", max_steps=30)
    (tmp_path / "away").rename(tmp_path / "disk")
    run, _ = go(work, max_steps=30, **backup)
    assert [a["step"] for a in run.facts["attempts"]] == [
        0,
        10,
        10,
    ] and "so this checkpoint was abandoned" in log(work)


def test_going_back_counts_from_its_first_moment(work, tmp_path, monkeypatch):
    "Though it fails before the first step, and the later states are still in the backup"
    backup = dict(gdrive_backup_dir=str(tmp_path / "disk"), max_steps=30)
    go(work, **dict(backup, max_steps=STEPS))

    def is_out_of_memory(*_):
        raise TrainingError("memory ran out")

    with monkeypatch.context() as m:
        m.setattr("minigpt.train.trainer._tune", is_out_of_memory)
        with pytest.raises(TrainingError):
            go(work, resume="checkpoint-10", **backup)
    run, _ = go(work, **backup)
    assert [a["step"] for a in run.facts["attempts"]] == [
        0,
        10,
        10,
    ] and "so this checkpoint was abandoned" in log(work)


def test_the_newest_best_is_kept_in_the_backup(parts, saves, tmp_path, monkeypatch):
    """That of the later attempt.

    Not the one with the highest step, which a course that was given up may have had, nor that of
    the machine whose clock is ahead.
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


def test_a_backup_folder_that_is_a_mount_itself(saves, tmp_path):
    "Where nothing is mounted any more, nothing is made"
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


def test_stopped_where_a_light_snapshot_fell(work, whole):
    "A stop saves what training can go on from"

    class Stop(Callback):
        def on_step(self, t):
            if t.step == 7:
                t.stop = 15

    with pytest.raises(SystemExit):
        go(
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
    go(work)
    assert json.loads((work / "run" / "run.json").read_text())["attempts"][-1]["step"] == 7


def test_done_only_when_the_server_was_asked(saves, google, tmp_path):
    b = Backup(tmp_path / "drive", saves)
    b.run_id = ID
    assert not b.done(), "nothing is known before the first round"
    with google.at_work():
        b.submit(saves / "checkpoints" / "checkpoint-100")
        b.step()
        google.server.deliver(999)
        b.step()
        assert b.done()
        b.submit(saves / "checkpoints" / "checkpoint-200")
        ask, b._query_server = b._query_server, lambda: None
        b.step()
        assert not b.pending and not b.done(), "copied, and nobody has asked"
        ask()
    assert not b.done() and b.done(confirm=False)


# --- the writer -----------------------------------------------------------------------------------
def test_no_memory_for_a_copy(work, whole, monkeypatch):
    "Then training waits while a checkpoint is written; said once"
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: type("", (), dict(available=0, total=1 << 40))
    )
    run, losses = go(work)
    same(work, losses, whole)
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
    "A minute passes with each step"

    def __init__(self):
        self.now = 0.0

    def on_start(self, t):
        t.schedule.clock = lambda: self.now
        t.schedule.saved()

    def on_step(self, t):
        self.now += 60
        t.writer.wait()


def test_snapshots_by_time(work, whole):
    "Every 180 s without a save; a power cut costs no more than that"
    with pytest.raises(PowerCut):
        go(
            work,
            Clock(),
            At(19, power_cut),
            save_steps=50,
            time_save_interval_seconds=180,
            evaluation_strategy="no",
        )
    run = open_run(work / "run")
    assert [c.step for c in run.checkpoints] == [] and [c.step for c in run.snapshots] == [
        16,
        19,
    ], [c.step for c in run.snapshots]
    run, losses = go(work, save_steps=50)
    assert min(k[0] for k in losses) == 20 and weights(work) == weights(whole[0])


def test_light_snapshots_do_not_push_out_full_ones(parts, tmp_path):
    full, light = (CheckpointStore(tmp_path, 2, "snapshot", kind) for kind in ("snapshot", "light"))
    for step in (1, 2):
        full.save(state(parts, step))
    for step in (3, 4, 5):
        light.save(state(parts, step))
    assert [c.step for c in full.all()] == [1, 2, 4, 5] and newest([light]).step == 2


def test_light_snapshots_only_on_demand(work, whole):
    with pytest.raises(PowerCut):
        go(work, Clock(), At(9, power_cut), time_save_interval_seconds=120, snapshot_kind="light")
    run = open_run(work / "run")
    assert [(c.step, c.kind) for c in run.snapshots] == [(7, "light"), (9, "light")]
    name = run.snapshots[-1].path
    assert (
        not (name / "optimizer.safetensors").exists()
        and sum(f.stat().st_size for f in name.iterdir()) < run.checkpoints[0].size
    )
    with pytest.raises(PowerCut):
        go(work, At(6, power_cut))
    assert json.loads((work / "run" / "run.json").read_text())["attempts"][-1]["step"] == 5
    go(work, resume="snapshot-9")
    assert json.loads((work / "run" / "run.json").read_text())["attempts"][-1][
        "step"
    ] == 9 and "weights only" in log(work)


def test_early_stopping_and_going_on(work, whole):
    class Worse(Callback):
        "From step 10 on the model forgets, and the validation loss rises"

        def on_step(self, t):
            if t.step > 10:
                [p.data.mul_(0.7) for p in t.model.parameters()]

    run, losses = go(work, Worse(), max_steps=60, eval_steps=5, early_stopping=2)
    assert (
        run.finished
        and run.step == 20
        and run.best.step == 10
        and "stopped early at step 20" in log(work)
    )
    again, more = go(work, Worse(), max_steps=60, eval_steps=5, early_stopping=2)
    assert not more and again.finished
    (
        work / "run" / "MANIFEST.json"
    ).unlink()  # as if it had been killed before the final model was written
    again, more = go(work, Worse(), max_steps=60, eval_steps=5, early_stopping=2)
    assert again.finished and again.step == 20 and not [k for k in more if k[1] == "loss"]
    again, more = go(work, Worse(), max_steps=60, eval_steps=5, early_stopping=4)
    assert min(k[0] for k in more if k[1] == "loss") == 21 and again.step == 30


def test_save_best_only_keeps_the_newest_state(work, whole):
    run, losses = go(work, save_best_only=True)
    assert [c.step for c in run.checkpoints] == [20] and run.best
    same(work, losses, whole)
