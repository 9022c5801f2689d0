"""The Colab notebooks in a real kernel, with a stub of Colab.

They train until the machine is killed, and resume on an empty machine that has only Drive.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import pytest
from project import ROOT

STUB = {
    "google/colab/__init__.py": "",
    # Emulates what minigpt uses of Colab's module: a mount point with MyDrive in it.
    "google/colab/drive.py": (
        """
import os
def mount(where, force_remount=False, timeout_ms=120000):
    if os.environ.get('STUB_REFUSES'): raise ValueError('mount failed')
    os.makedirs(os.path.join(where, 'MyDrive'), exist_ok=True)
    open(os.path.join(where, '.mounted-'+os.environ['STUB_MACHINE']), 'w').close()
"""
    ),
    # Colab imports its package before the first cell, and mounts Drive at a path that only root
    # could create here.
    "sitecustomize.py": (
        """
import os, sys
if any('ipykernel_launcher' in a for a in sys.orig_argv):
    import google.colab, minigpt.run.backup, minigpt.colab
    minigpt.colab.MOUNT = os.environ['STUB_DRIVE']
    minigpt.run.backup.BEAT = 1.
    real = os.path.ismount
    def ismount(p):
        if str(p) != minigpt.colab.MOUNT: return real(p)
        return os.path.exists(os.path.join(p, '.mounted-'+os.environ['STUB_MACHINE']))
    os.path.ismount = ismount
"""
    ),
}


@pytest.fixture(scope="module")
def stub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stub")
    for name, text in STUB.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def execute(name, machine, stub, drive, **env):
    "Start `jupyter execute` in a directory that simulates a machine."
    machine.mkdir(exist_ok=True)
    shutil.copy(ROOT / "nbs" / "tutorials" / f"{name}.ipynb", machine)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(stub), str(ROOT)]),
        "STUB_DRIVE": str(drive),
        "STUB_MACHINE": machine.name,
        "OMP_WAIT_POLICY": "PASSIVE",
        "MPLBACKEND": "agg",
        **env,
    }
    return subprocess.Popen(
        [
            str(Path(sys.executable).parent / "jupyter-execute"),
            f"{name}.ipynb",
            "--output",
            f"{name}.out.ipynb",
            "--timeout",
            "300",
        ],
        cwd=machine,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def printed_output(machine, name):
    "Return what the cells printed."
    nb = nbformat.read(machine / f"{name}.out.ipynb", 4)
    return "\n".join(
        o.get("text", "") for c in nb.cells if c.cell_type == "code" for o in c.outputs
    )


def test_run_resumes_after_a_disconnect(stub, tmp_path):
    drive, first, second = tmp_path / "drive", tmp_path / "first", tmp_path / "second"
    drive.mkdir()
    p = execute("train_with_drive", first, stub, drive)
    complete = (
        lambda: [  # checkpoints on Drive, from step 100
            m
            for m in (drive / "MyDrive" / "minigpt" / "my-gpt" / "checkpoints").glob(
                "checkpoint-*/MANIFEST.json"
            )
            if int(m.parent.name[11:]) >= 100
        ]
    )
    end = time.time() + 200
    while p.poll() is None and not complete() and time.time() < end:
        time.sleep(0.05)
    for child in (
        psutil.Process(p.pid).children(recursive=True) + [psutil.Process(p.pid)]
        if p.poll() is None
        else []
    ):
        child.kill()  # the runtime is reset
    out = p.communicate()[0]
    assert complete(), out
    assert not (first / "train_with_drive.out.ipynb").exists(), "the run finished before the kill"
    shutil.rmtree(first)
    p = execute("resume_after_disconnect", second, stub, drive)
    out = p.communicate(timeout=300)[0]
    assert p.returncode == 0, out
    run = json.loads((second / "runs" / "my-gpt" / "run.json").read_text())
    assert [a["step"] for a in run["attempts"]][0] == 0 and run["attempts"][-1]["step"] >= 100
    text = printed_output(second, "resume_after_disconnect")
    assert (
        "restoring my-gpt from" in text
        and "was copied from the backup" in text
        and "backed up in" in text
    )
    assert "training a tokenizer" not in text, "a finished run was trained again"
    assert (drive / "MyDrive" / "minigpt" / "my-gpt" / "final" / "MANIFEST.json").exists()


def test_refused_mount_is_explained(stub, tmp_path):
    "The notebook explains the consequences and continues; nothing is written at the mount point."
    code = (
        "import sys; sys.orig_argv.append('ipykernel_launcher'); exec(open(sys.argv[1]).read());"
        " from minigpt.colab import setup; print(repr(setup('x', model='tiny')))"
    )
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(stub), str(ROOT)]),
        "STUB_DRIVE": str(tmp_path / "drive"),
        "STUB_MACHINE": "m",
        "STUB_REFUSES": "1",
    }
    r = subprocess.run(
        [sys.executable, "-c", code, str(stub / "sitecustomize.py")],
        env=env,
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stderr
    assert (
        "Drive was not mounted: ValueError: mount failed" in r.stdout
        and "WITHOUT BACKUP" in r.stdout
        and r.stdout.splitlines()[-1] == "''"
    )
    assert not (tmp_path / "drive").exists()


def test_colab_is_detected_in_a_subprocess(stub, tmp_path):
    code = "from minigpt.colab import in_colab, setup; assert in_colab(); print(repr(setup('x')))"
    r = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLAB_RELEASE_TAG": "release-colab"},
        capture_output=True,
        text=True,
    )
    assert "in a cell of the notebook first" in r.stdout and r.stdout.splitlines()[-1] == "''", (
        r.stderr
    )
