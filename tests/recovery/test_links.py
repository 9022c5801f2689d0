"""Nothing outside the folder of a run is ever changed.

Links to files, to folders, to each other, broken links and cycles replace files of a run, a backup,
a model or a data set. Every operation of the package leaves their targets unchanged. All of it
happens in temporary folders.
"""

import contextlib
import json
import os
import random
import re
import shutil
from pathlib import Path

import pytest

from minigpt.checkpoint.analysis import analyze
from minigpt.checkpoint.exporter import export
from minigpt.checkpoint.store import CheckpointError, CheckpointStore, problem, stores_in
from minigpt.core.files import delete, new_dir, remove_dir, run_lock, set_aside, sweep, write_file
from minigpt.data.download import get
from minigpt.data.preparation import prepare
from minigpt.data.tokensets import build_tokenset
from minigpt.run.backup import Backup, BackupError, discard, restore_run
from minigpt.run.folder import open_run, run_table, runs_table
from minigpt.tokenizer.bpe import load_tokenizer
from minigpt.train.trainer import fit
from tests.harness import kill_child as child

OPTIONS = dict(
    child.OPTIONS,
    max_steps=6,
    save_steps=2,
    eval_steps=3,
    save_total_limit=2,
    backup_wait_seconds=0.5,
)
REFUSALS = OSError, ValueError, RuntimeError


def snapshot(folder):
    "Return everything in a folder: names, contents, links, times."
    found = {}
    for d, folders, files in os.walk(folder):
        for n in folders + files:
            p = Path(d) / n
            s = p.lstat()
            found[str(p.relative_to(folder))] = (
                os.readlink(p)
                if p.is_symlink()
                else (s.st_mode, s.st_mtime_ns, p.read_bytes() if p.is_file() else None)
            )
    return found


@pytest.fixture
def outside(tmp_path):
    "Files that do not belong to the run."
    folder = tmp_path / "outside"
    (folder / "etc" / "deep").mkdir(parents=True)
    for name in "passwd", "etc/shadow", "etc/deep/key", "MANIFEST.json", "checkpoint-4.txt":
        (folder / name).write_text(f"the content of {name}")
    return folder


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    "A finished run with its backup."
    work = child.new_work(tmp_path_factory.mktemp("links") / "work")
    fit(
        child.shape(),
        work / "text.jsonl",
        output_dir=work / "run",
        gdrive_backup_dir=str(work / "disk"),
        **OPTIONS,
    )
    return work


def plant(folder, outside, rng, n):
    "Replace some files and folders by links, and add links beside them."
    there = sorted(p for p in folder.rglob("*") if not p.is_symlink())
    for p in rng.sample(there, min(n, len(there))):
        if not os.path.lexists(p) or not p.parent.is_dir() or p.parent.is_symlink():
            continue
        target = rng.choice(
            [outside / "passwd", outside / "etc", outside, outside / "nowhere", p, folder]
        )
        if rng.random() < 0.5:
            if p.is_dir():
                shutil.rmtree(p)
            else:
                p.unlink()
        else:
            p = p.with_name(
                rng.choice(
                    [
                        p.name + ".damaged-1",
                        f".{p.name}.tmp-77",
                        f".{p.name}.old-77",
                        f".{p.name}.gone-77",
                        "checkpoint-99",
                        p.name + ".new",
                    ]
                )
            )
        if not os.path.lexists(p):
            p.symlink_to(target)


def run_all_operations(work, source):
    "Call every operation on a run, a backup, a model and data; each may be refused."
    run, disk = work / "run", work / "disk"
    backup = Backup(disk, run, keep=1, beat=0.1)  # default: half a minute

    def run_backup():
        backup.run_id = json.loads((run / "run.json").read_text())["id"]
        for s in stores_in(run):
            for c in s.all():
                backup.submit(c.path, s)
                backup.step()
        backup.submit(run)
        backup.rejected |= {c.path for c in backup.copies()[:1]}
        backup.superseded = 4
        backup.step()
        backup.step()

    def retrain(**options):
        fit(child.shape(), source, output_dir=run, **{**OPTIONS, **options})

    def prune():
        for s in stores_in(run):
            s.keep = 1
            s.prune()
            s.supersede(3)

    for do in (
        lambda: run_table(open_run(run), verify=True),
        lambda: runs_table([open_run(run)]),
        lambda: analyze(run),
        lambda: export(run, run / "exports" / "fp32", replace=True),
        run_backup,
        lambda: sweep(run),
        lambda: sweep(run / "checkpoints"),
        lambda: retrain(max_steps=8, gdrive_backup_dir=str(disk)),
        lambda: retrain(max_steps=8, resume="checkpoint-4"),
        prune,
        lambda: retrain(max_steps=8),
        lambda: build_tokenset(
            source, load_tokenizer(run / "tokenizer"), run / "data", progress=False
        ),
        lambda: prepare(
            source, run / "prepared.jsonl", max_seq_len=0, overwrite=True, progress=False
        ),
        lambda: restore_run(Backup(disk, work / "again" / "run")),
        lambda: retrain(overwrite=True, max_steps=2),
        *(lambda p=p: discard(p) for p in sorted(disk.rglob("*"))[::3]),
        lambda: remove_dir(run),
        lambda: delete(disk),
    ):
        with contextlib.suppress(*REFUSALS):
            do()


@pytest.mark.parametrize("seed", range(5))
def test_operations_change_nothing_outside(finished_run, outside, tmp_path, seed, monkeypatch):
    monkeypatch.setattr("minigpt.train.setup.RETRY_DELAYS", (0.01,))
    shutil.copytree(finished_run, tmp_path / "work")
    work, rng = tmp_path / "work", random.Random(seed)
    shutil.copyfile(work / "text.jsonl", tmp_path / "text.jsonl")
    for folder in (work / "run", work / "disk"):
        plant(folder, outside, rng, 6)
    before = snapshot(outside)
    run_all_operations(work, tmp_path / "text.jsonl")
    assert snapshot(outside) == before


def test_link_to_a_folder_in_a_run_is_refused(finished_run, outside, tmp_path):
    "It is named before anything is written."
    for name in (
        "checkpoints",
        "snapshots",
        "best",
        "tokenizer",
        "data",
        "plots",
        "tensorboard",
        "run.log",
        "metrics.jsonl",
        ".lock",
    ):
        run = tmp_path / name.strip(".")
        run.mkdir()
        (run / name).symlink_to(outside)
        before = snapshot(outside), snapshot(run)
        with pytest.raises(
            CheckpointError,
            match=(
                rf"{re.escape(name)} is a link to .*outside, and a run writes and deletes only in"
                r" its own folder"
            ),
        ):
            fit(child.shape(), finished_run / "text.jsonl", output_dir=run, **OPTIONS)
        assert (snapshot(outside), snapshot(run)) == before
    (run := tmp_path / "deep").mkdir()
    (run / "data").mkdir()
    (run / "data" / "train").symlink_to(outside)
    with pytest.raises(CheckpointError, match="data/train is a link to .*outside"):
        fit(child.shape(), finished_run / "text.jsonl", output_dir=run, **OPTIONS)
    home = tmp_path / "elsewhere"
    home.mkdir()
    (tmp_path / "linked").symlink_to(home)  # the run folder itself may be a link
    assert (
        fit(
            child.shape(),
            finished_run / "text.jsonl",
            output_dir=tmp_path / "linked",
            **{**OPTIONS, "max_steps": 1},
        ).finished
        and (home / "checkpoints" / "checkpoint-1").is_dir()
    )


def test_linked_checkpoint_in_a_backup_is_only_unlinked(finished_run, outside, tmp_path):
    shutil.copytree(finished_run, tmp_path / "work")
    disk = tmp_path / "work" / "disk" / "run"
    for name, target in ("checkpoint-4", outside), ("checkpoint-2", outside / "etc"):
        shutil.rmtree(disk / "checkpoints" / name, ignore_errors=True)
        (disk / "checkpoints" / name).symlink_to(target)
    shutil.rmtree(disk / "final")
    (disk / "final").symlink_to(outside)
    f = disk / "checkpoints" / "checkpoint-6" / "config.json"
    f.unlink()
    f.symlink_to(outside / "passwd")
    os.link(outside / "etc" / "shadow", disk / "checkpoints" / "checkpoint-6" / "second-name")
    before = snapshot(outside)
    for p in (
        disk / "checkpoints" / "checkpoint-4",
        disk / "checkpoints" / "checkpoint-2",
        disk / "final",
        disk / "checkpoints" / "checkpoint-6",
    ):
        discard(p, disk)
        assert not os.path.lexists(p)
    assert snapshot(outside) == before


def test_backup_that_is_a_link_is_refused(finished_run, outside, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "run").symlink_to(outside)
    before = snapshot(outside)
    b = Backup(tmp_path / "disk", finished_run / "run")
    b.run_id = "a" * 32
    b.step()
    assert "is a link" in b.status()["failed"]["reason"]
    with pytest.raises(BackupError, match="is a link to .*a backup is a folder of its own"):
        restore_run(b)
    assert snapshot(outside) == before


def test_paths_in_an_untrusted_run_json_are_not_followed(finished_run, outside, tmp_path):
    "Its paths are not followed out of the run, neither for renaming nor for copying."
    run = shutil.copytree(finished_run / "run", tmp_path / "home" / "run")
    (tmp_path / "disk").mkdir()
    for place in "../..", "/etc", "data/../../..", "checkpoints":
        facts = json.loads((finished_run / "run" / "run.json").read_text())
        facts["data"]["places"]["train"] = [place]
        (run / "run.json").write_text(json.dumps(facts))
        before = sorted(os.listdir(tmp_path)), snapshot(outside)
        with pytest.raises(
            ValueError,
            match=rf"names '{re.escape(place)}' as the directory of the tokens; it must be",
        ):
            fit(child.shape(), finished_run / "text.jsonl", output_dir=run, **OPTIONS)
        b = Backup(tmp_path / "disk", run)
        b.run_id = facts["id"]
        b.step()
        assert not b.failed and (sorted(os.listdir(tmp_path)), snapshot(outside)) == before
    assert {
        p.parts[0]
        for p in (
            p.relative_to(tmp_path / "disk" / "run") for p in (tmp_path / "disk" / "run").rglob("*")
        )
    } <= {
        "run.json",
        "metrics.jsonl",
        "run.log",
        "tokenizer",
        "heartbeat.json",
        "mirror.json",
        "checkpoints",
    }


def test_an_export_copies_nothing_from_outside(finished_run, outside, tmp_path):
    """A link in a model directory may point to any of the user's files.

    Links of the hub's cache point to its own blobs.
    """
    model = export(finished_run / "run", tmp_path / "model")
    (model / "MANIFEST.json").unlink()
    (model / "special_tokens_map.json").symlink_to(outside / "passwd")
    with pytest.raises(
        CheckpointError,
        match=(
            "special_tokens_map.json is a link to .*passwd, outside the directory, and is not"
            " copied"
        ),
    ):
        export(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    cache = tmp_path / "models--org--name"
    (cache / "blobs").mkdir(parents=True)
    (cache / "snapshots").mkdir()
    (model / "special_tokens_map.json").unlink()
    snapshot = cache / "snapshots" / "0123"
    snapshot.mkdir()
    for i, p in enumerate(sorted(model.iterdir())):
        p.rename(cache / "blobs" / str(i))
        (snapshot / p.name).symlink_to(f"../../blobs/{i}")
    assert (
        load_tokenizer(export(snapshot, tmp_path / "out")).hash
        == load_tokenizer(finished_run / "run" / "tokenizer").hash
    )


def test_links_as_lock_and_leftovers(outside, tmp_path, monkeypatch):
    monkeypatch.setattr("minigpt.data.download._RETRY_DELAYS", ())
    before, run = snapshot(outside), tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(outside / "passwd")
    with pytest.raises(OSError, match="a lock must be a file of its own"), run_lock(run):
        pass
    (run / f".a.tmp-{os.getpid()}").symlink_to(outside / "passwd")
    write_file(run / "a", "mine")
    (run / "box").symlink_to(outside / "etc")
    with new_dir(run / "box", replace=True) as d:
        (d / "x").write_text("new")
    assert (run / "box" / "x").read_text() == "new" and not (run / "box").is_symlink()
    (run / "other").symlink_to(outside / "nowhere")
    (run / "other.old-1").symlink_to(outside / "nowhere")
    assert set_aside(run / "other", "old").name == "other.old-2"
    (run / "file").symlink_to(outside / "passwd")
    (run / "file.part").symlink_to(outside / "passwd")
    with pytest.raises(REFUSALS):
        get("http://127.0.0.1:9/nothing", run / "file", progress=False)
    assert snapshot(outside) == before


def test_checkpoints_folder_that_is_a_link(finished_run, outside, tmp_path):
    "A store saves, prunes and sets aside only in the folder around it."
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(outside)
    shutil.copytree(finished_run / "run" / "checkpoints" / "checkpoint-4", outside / "checkpoint-4")
    shutil.copytree(finished_run / "run" / "checkpoints" / "checkpoint-6", outside / "checkpoint-6")
    before, store = snapshot(outside), CheckpointStore(tmp_path / "run" / "checkpoints", keep=1)
    assert [problem(c.path) for c in store.all()] == [None, None]  # reading is harmless
    for do in store.prune, lambda: store.supersede(5):
        with pytest.raises(OSError, match="this folder is a link"):
            do()
    assert snapshot(outside) == before


def test_modules_delete_folders_only_through_core_files(root):
    "Only `minigpt.core.files.delete` deletes folders."
    found = [
        f"{f.name}: {line.strip()}"
        for f in (root / "minigpt").rglob("*.py")
        if f.name != "files.py"
        for line in f.read_text(encoding="utf-8").splitlines()
        if re.search(r"rmtree|os\.(remove|rmdir|unlink|removedirs)\b", line)
    ]
    assert not found
