"""What cells cannot test: files that change, kills, disks, terminals and pipes.

Files are truncated and replaced while they are read, processes are killed, disks are full or slow.
"""

import errno
import itertools
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from minigpt.core.charts import downsample
from minigpt.run.live import LiveLoss
from minigpt.run.metrics import (
    Curves,
    EventWriter,
    Follower,
    Metrics,
    PlotWriter,
    RunLog,
    losses_html,
    read_metrics,
)
from tests.harness.faulty import Disk
from tests.harness.kill_child import ROOT

ENV = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
}


def run_python(code, *args, **kw):
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=ENV, **kw)


def wait_until(condition, seconds=30, p=None):
    "Wait for something that another process does."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end and (p is None or p.poll() is None), (
            "the condition was not met in time"
        )
        time.sleep(0.01)


def assert_same_curves(curves, rows):
    for name in ("loss", "eval_loss", "lr"):
        want = [(r["step"], r[name]) for r in rows if r.get(name) is not None]
        assert list(zip(*(c.tolist() for c in curves(name)))) == want, name


# --- following a file -----------------------------------------------------------------------------
row = st.one_of(
    st.builds(lambda s, l: dict(step=s, loss=l, lr=0.1), st.integers(0, 60), st.floats(0, 9)),
    st.builds(lambda s, l: dict(step=s, eval_loss=l), st.integers(0, 60), st.floats(0, 9)),
    st.builds(lambda s: dict(event="start", step=s), st.integers(0, 60)),
    st.sampled_from([b'{"step":7,"lo', b"[1,2]", b"\xff", b"null", b'{"step":"a"}']),
)


@given(st.lists(row, max_size=40), st.lists(st.integers(1, 90), max_size=30))
@settings(max_examples=60)
def test_follower_equals_reader(tmp_path_factory, rows, cuts):
    "Whatever the order of lines and steps."
    path = tmp_path_factory.mktemp("f") / "metrics.jsonl"
    data = b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)
    f = Follower(path)
    assert not f.read()
    with open(path, "ab", buffering=0) as file:
        for n in [*cuts, len(data)]:
            file.write(data[:n])
            data = data[n:]
            f.read()
    assert_same_curves(f.curves, read_metrics(path))


@pytest.mark.parametrize("replace", ["another inode", "in place", "shorter", "gone for a moment"])
def test_replaced_file_is_followed(tmp_path, replace):
    path, other = tmp_path / "metrics.jsonl", tmp_path / "other"
    for p, loss in (path, 3.0), (other, 2.0):
        m = Metrics(p)
        for step in range(1, 50 if p == path or replace != "shorter" else 20):
            m.write(step=step, loss=loss + step / 100)
        m.close()
    f = Follower(path)
    f.read()
    if replace == "another inode":
        os.replace(other, path)
    elif replace == "gone for a moment":
        path.unlink()
        assert not f.read() and f.problem and f.curves.step == 49  # known values are kept
        os.replace(other, path)
    else:
        path.write_bytes(other.read_bytes())
    assert f.read() and not f.problem
    assert_same_curves(f.curves, read_metrics(path))


WRITE = """
import sys, time
from pathlib import Path
from minigpt.core.files import run_lock
from minigpt.run.metrics import EventWriter, Metrics, read_metrics
folder,attempt,step = Path(sys.argv[1]),int(sys.argv[2]),int(sys.argv[3])
with run_lock(folder):
    m = Metrics(folder/'metrics.jsonl', attempt, step)
    e = None
    if len(sys.argv) > 4:
        e = EventWriter(folder/'tensorboard', step, read_metrics(folder/'metrics.jsonl'))
    while True:
        step += 1
        row = dict(step=step, loss=9/step+attempt, lr=1e-3)
        m.write(**row)
        if e: e.log(row)
        time.sleep(.001)
"""


def test_killed_writer_is_followed(tmp_path):
    """Two processes: the second attempt supersedes what the first wrote beyond its start.

    TensorBoard shows the same history.
    """
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    f = Follower(tmp_path / "metrics.jsonl")
    step = 0
    for attempt in 1, 2, 3:
        p = run_python(WRITE, tmp_path, attempt, step, "events")
        try:
            wait_until(
                lambda: (
                    f.read()
                    and f.curves.start.get("attempt") == attempt
                    and f.curves.step > step + 30
                ),
                p=p,
            )
        finally:
            p.send_signal(signal.SIGKILL)
            p.wait()
        for file in sorted((tmp_path / "tensorboard").iterdir())[-1:]:
            file.write_bytes(file.read_bytes() + b"\x20\0\0")  # torn by the kill
        step = f.curves.step - 20
    f.read()
    rows = read_metrics(tmp_path / "metrics.jsonl")
    assert_same_curves(f.curves, rows)
    assert {r["attempt"] for r in rows} == {1, 2, 3}
    a = accumulator.EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0})
    a.Reload()
    seen = {s.step: s.value for s in a.Scalars("loss/training")}
    known = {r["step"]: r["loss"] for r in rows}
    assert len(seen) == len(a.Scalars("loss/training")), "a step appears twice"
    assert set(known) - set(seen) <= {
        max(known)
    }  # the last ones may not have been written before the kill
    assert all(abs(seen[s] - known[s]) < 1e-5 for s in seen)


# --- pictures -------------------------------------------------------------------------------------
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=400), st.integers(1, 60))
def test_decimation_keeps_the_shape_of_a_curve(values, width):
    y = np.array(values)
    x = np.arange(len(y)) * 10
    u, v = downsample(x, y, width)
    assert len(v) <= max(2 * width + 2, 1) and (v.min(), v.max(), u[0], u[-1]) == (
        y.min(),
        y.max(),
        0,
        x[-1],
    )
    assert (np.diff(u) > 0).all() and (y[u // 10] == v).all()


def run_with_losses(folder, n=50):
    folder.mkdir(exist_ok=True)
    m = Metrics(folder / "metrics.jsonl")
    for step in range(1, n + 1):
        m.write(step=step, loss=5 - step / 100)
    m.close()
    return folder


def test_slow_disk_does_not_block_training(tmp_path):
    run = run_with_losses(tmp_path / "run")
    w = PlotWriter(run, 50)
    with Disk(run / "plots", delay=0.1).active():
        w.save(1)
        wait_until(lambda: w.wanted is None)  # the first one is being written
        began = time.perf_counter()
        for step in range(2, 50):
            w.save(step)
        w.save(50, final=True)
        assert time.perf_counter() - began < 0.1
        assert w.close()
    names = {p.name for p in (run / "plots").iterdir()}
    assert {
        "loss_curve_step_1.png",
        "loss_curve_final_step_50.png",
        "loss_curve_latest.png",
    } <= names and len(names) <= 4
    assert (run / "plots" / "loss_curve_latest.png").read_bytes() == (
        run / "plots" / "loss_curve_final_step_50.png"
    ).read_bytes()


def test_hanging_disk_is_given_up(tmp_path):
    run = run_with_losses(tmp_path / "run")
    w = PlotWriter(run)
    with Disk(run / "plots", delay=0.3).active():
        w.save(1)
        began = time.perf_counter()
        assert not w.close(0.2) and time.perf_counter() - began < 1
        wait_until(lambda: not w.thread)


def test_full_disk_is_reported_until_it_has_space(tmp_path):
    run = run_with_losses(tmp_path / "run")
    (run / "plots").mkdir()
    w = PlotWriter(run)
    with Disk(run / "plots", errno.ENOSPC, at=0, times=99).active():
        w.save(10)
        assert not w.close()
    assert (
        "step 10" in w.problem
        and "No space left" in w.problem
        and not list((run / "plots").iterdir())
    )
    w.save(20)
    assert w.close() and not w.problem


def test_two_threads_can_draw(tmp_path):
    "One thread draws the live view while another one writes plots."
    run = run_with_losses(tmp_path / "run", 300)
    w, c = PlotWriter(run), Curves(read_metrics(run / "metrics.jsonl"))
    alone = losses_html(c), losses_html(c, log=True)
    for i in range(3):
        w.save(i)
        assert (losses_html(c), losses_html(c, log=True)) == alone
    assert w.close()


# --- disks that fill up ---------------------------------------------------------------------------
def test_events_after_a_full_disk_are_readable(tmp_path):
    "A partial record would hide all later ones: it is cut off, and later records count again."
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    with Disk(tmp_path, errno.ENOSPC, at=20, times=20).active():
        e = EventWriter(tmp_path / "tensorboard")
        kept = [s for s in range(1, 60) if e.log(dict(step=s, loss=1 / s))]
    e.close()
    a = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    a.Reload()
    assert [s.step for s in a.Scalars("loss/training")] == kept and 30 < len(kept) < 59
    with Disk(tmp_path / "none", errno.ENOSPC, at=0, times=99).active():
        e = EventWriter(tmp_path / "none" / "tensorboard")
        assert not e.log(dict(step=1, loss=1.0)) and "No space left" in e.problem
        e.close()


LIMITED = """
import resource, signal, sys
from pathlib import Path
from minigpt.run.metrics import EventWriter, Metrics, PlotWriter, RunLog
folder = Path(sys.argv[1])
m,e,log = Metrics(folder/'metrics.jsonl'),EventWriter(folder/'tensorboard'),RunLog(folder/'run.log')
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
# writes are short at first, and then fail
resource.setrlimit(resource.RLIMIT_FSIZE, (1500, resource.RLIM_INFINITY))
for step in range(1, 40):
    m.write(step=step, loss=1/step)
    e.log(dict(step=step, loss=1/step))
    log.write(f'step {step} '+'x'*60)
plots = PlotWriter(folder); plots.save(39); plots.close()
problems = m.problem, e.problem, plots.problem
assert m.problem and e.problem and 'File too large' in plots.problem, problems
# there is space again
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
for step in range(40, 50):
    m.write(step=step, loss=1/step)
    e.log(dict(step=step, loss=1/step))
    log.write(f'step {step}')
plots.save(49); assert plots.close()
m.close(); e.close()
"""


def test_events_with_a_file_size_limit(tmp_path):
    "Real short writes and errors of the system."
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    p = run_python(LIMITED, tmp_path, stderr=subprocess.PIPE, text=True)
    assert p.wait(60) == 0, p.stderr.read()
    a = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    a.Reload()
    steps = [s.step for s in a.Scalars("loss/training")]
    assert steps[:5] == [1, 2, 3, 4, 5] and steps[-10:] == list(range(40, 50)) and len(steps) < 45
    steps = [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")]
    assert steps[:5] == [1, 2, 3, 4, 5] and steps[-10:] == list(range(40, 50)) and len(steps) < 45
    assert (tmp_path / "run.log").read_text().splitlines()[-1].endswith(" step 49")


@pytest.mark.skipif(
    not os.path.exists("/dev/full"),
    reason="/dev/full exists on Linux only",
)
def test_log_on_a_full_disk_does_not_raise():
    with RunLog("/dev/full") as log:
        log.write("a line")


# --- the state of a run ---------------------------------------------------------------------------
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    "A small run with all kinds of files, and its backup."
    from tests.harness.kill_child import train, write_text

    work = tmp_path_factory.mktemp("work")
    write_text(work / "text.jsonl")
    train(
        work,
        gdrive_backup_dir=str(work / "drive"),
        time_save_interval_seconds=0.2,
        max_steps=20,
        plot_loss=True,
    )
    return work


@pytest.fixture
def work(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "w")
    return tmp_path / "w"


def test_status_of_a_finished_run_and_its_backup(work):
    from minigpt.run.status import run_status, status_text

    here, backup_status = run_status(work / "run"), run_status(work / "drive" / "run")
    for s in here, backup_status:
        assert (s["state"], s["step"], s["max_steps"], s["safe_step"], s["problems"]) == (
            "finished",
            20,
            20,
            20,
            [],
        ), s
    assert {c["where"] for c in here["checkpoints"]} == {"run", "backup"} and {
        c["where"] for c in backup_status["checkpoints"]
    } == {"backup"}
    assert (
        here["backup"].startswith("backup, ")
        and "its process ended" in backup_status["sign"]
        and here["seconds_per_step"] > 0
    )
    assert 'open_run("' in status_text(
        here
    ) and f'gdrive_backup_dir="{work / "drive"}"' in status_text(backup_status)


def test_status_of_a_killed_run(tmp_path):
    from minigpt.run.status import Watch, run_status

    run = tmp_path / "run"
    run.mkdir()
    p = run_python(WRITE, run, 1, 0)
    try:
        wait_until((run / "metrics.jsonl").exists, p=p)
        watch = Watch(run)  # a run without run.json yet
        (run / "run.json").write_text(json.dumps(dict(id="1", max_steps=10**6, train={}, model={})))
        wait_until(lambda: watch.status()["step"] > 5, p=p)
        s = watch.status()
        assert s["state"] == "training" and s["seconds_left"] > 0 and not s["finished"]
    finally:
        p.send_signal(signal.SIGKILL)
        p.wait()
    assert watch.status()["state"] == run_status(run)["state"] == "stopped"


def test_status_when_the_mount_vanishes(work):
    from minigpt.run.status import Watch, status_text

    disk, watch = Disk(work / "drive"), Watch(work / "drive" / "run", every=0)
    with disk.active():
        known = watch.status()
        disk.gone = True
        lost = watch.status()
        assert (
            lost["problems"]
            and (lost["step"], lost["loss"]) == (20, known["loss"])
            and "CANNOT BE READ" in status_text(lost)
        )
        disk.gone = False
        assert watch.status()["state"] == known["state"] == "finished"


def test_status_does_not_take_the_lock(tmp_path):
    "After a thousand status calls the lock is free, and no file was created."
    from minigpt.core.files import run_lock
    from minigpt.run.status import is_training

    for _ in range(100):
        assert not is_training(tmp_path)
    assert not list(tmp_path.iterdir())
    with run_lock(tmp_path):
        for _ in range(100):
            assert is_training(tmp_path)
    with run_lock(tmp_path):
        pass


GARBAGE = [
    b"",
    b"{",
    b"[]",
    b"7",
    b'"text"',
    b"null",
    b"{}",
    b"\xff\xfe\0",
    b'{"time":"x","train":3,"model":[],"max_steps":"many","files":5,"run_id":1}',
    "a folder",
    "gone",
]


@pytest.mark.parametrize("where", ["run", "drive/run"])
def test_status_names_damage_and_shows_the_rest(work, where):
    "Each small file of a run is replaced by each kind of garbage."
    from minigpt.run.status import run_status, status_text

    run = work / where
    files = [
        f
        for f in sorted(run.rglob("*"))
        if f.is_file()
        and f.suffix in (".json", ".jsonl", ".log", ".lock", "")
        and "data" not in f.parts
        and "tokenizer" not in f.name
    ]
    assert len(files) > 10
    statuses = {}
    for f, bad in itertools.product(files, GARBAGE):
        good = f.read_bytes()
        f.unlink()
        if bad == "a folder":
            f.mkdir()
        elif bad != "gone":
            f.write_bytes(bad)
        if f.name == "run.json" and bad == "gone" and where == "run":
            with pytest.raises(FileNotFoundError, match="not a run"):
                run_status(run)
        else:
            s = run_status(run)
            statuses[f.relative_to(run).as_posix(), bad] = s
            assert status_text(s)
        f.rmdir() if f.is_dir() else f.unlink(missing_ok=True)
        f.write_bytes(good)
    assert any("run.json is not valid JSON" in p for p in statuses["run.json", b"{"]["problems"])
    state = next(
        k for k, _ in statuses if k.startswith("checkpoints/") and k.endswith("MANIFEST.json")
    )
    assert any(
        c["problem"] and "MANIFEST" in c["problem"] for c in statuses[state, b"{"]["checkpoints"]
    )


def test_escape_sequences_do_not_reach_the_terminal(tmp_path):
    "A sample, log or manifest with escape sequences, in a run or a backup from elsewhere."
    from minigpt.run.status import monitor, status_text

    run = tmp_path / "run"
    (run / "checkpoints" / "checkpoint-5").mkdir(parents=True)
    evil = "\x1b]0;owned\x07\x1b[2J"
    (run / "run.json").write_text(json.dumps(dict(id="1", max_steps=10, train={}, model={})))
    (run / "metrics.jsonl").write_text(json.dumps(dict(step=5, loss=1, sample=evil)) + "\n")
    (run / "run.log").write_text(f"2026-01-01 00:00:00 WARNING: {evil}\n")
    (run / "checkpoints" / "checkpoint-5" / "MANIFEST.json").write_text(
        json.dumps(
            dict(
                kind="light",
                step=5,
                time=1,
                files={
                    n: dict(size=1, xxh3_128="")
                    for n in (evil, "config.json", "model.safetensors", "trainer_state.json")
                },
            )
        )
    )
    text = status_text(run)
    assert "\x1b" not in text and text.count("owned") == 3
    monitor(run)


def test_folders_without_a_run_are_refused(tmp_path):
    from minigpt.run.status import run_status

    (tmp_path / "file").write_text("x")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name in "none", "file", "model", "":
        with pytest.raises(FileNotFoundError, match="is not a run|is a file, and must be"):
            run_status(tmp_path / name)


# --- monitor --------------------------------------------------------------------------------------
MONITOR = "import sys; from minigpt.run.status import monitor; monitor(sys.argv[1], every=.1)"


def test_monitor_in_a_pipe_follows_to_the_end(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps(dict(id="1", max_steps=10**6, train={}, model={})))
    p = run_python(WRITE, run, 1, 0)
    watchers = [
        run_python(MONITOR, run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    plain, interrupted, unread = watchers
    try:
        wait_until(lambda: read_metrics(run / "metrics.jsonl"), p=p)
        first = {w: w.stdout.readline() for w in watchers}
        assert all("training" in l or "starting" in l for l in first.values()), first
        unread.stdout.close()  # as `| head -1` does
        [interrupted.stdout.readline() for _ in range(12)]
        interrupted.send_signal(signal.SIGINT)
        assert interrupted.wait(20) == 0 and not interrupted.stderr.read()
        assert unread.wait(20) == 0 and not unread.stderr.read()
        assert plain.poll() is None
    finally:
        p.send_signal(signal.SIGKILL)
        p.wait()
    out, err = plain.communicate(timeout=20)
    assert plain.returncode == 0 and not err and "\x1b" not in out
    lines = out.splitlines()
    assert (
        any(l.startswith("training, step") for l in lines)
        and any("stopped, step" in l for l in lines[-12:])
        and lines[-1].startswith("to resume: resume(")
    )


def test_monitor_in_a_terminal(tmp_path, monkeypatch):
    pytest.importorskip("rich")
    monkeypatch.chdir(tmp_path)  # a short name: a terminal truncates a long path
    run = Path("run[red]")
    run.mkdir()
    (run / "run.json").write_text(json.dumps(dict(id="1", max_steps=10**6, train={}, model={})))
    p = run_python(WRITE, run, 1, 0)
    main, side = pty.openpty()
    w = None
    try:
        wait_until(lambda: read_metrics(run / "metrics.jsonl"), p=p)
        w = run_python(MONITOR, run, stdout=side, stderr=side, stdin=subprocess.DEVNULL)
        os.close(side)
        seen = b""

        def read():
            nonlocal seen
            seen += os.read(main, 65536)
            return seen.count(b"training, step") >= 3

        wait_until(read, p=w)
        p.send_signal(signal.SIGKILL)
        with pytest.raises(OSError):  # its end closes the terminal
            while True:
                seen += os.read(main, 65536)
        assert w.wait(20) == 0
        text = seen.decode()
        assert "run[red]" in text and "stopped, step" in text and "▁" in text
    finally:
        for q in p, w:
            q and (q.kill(), q.wait())
        os.close(main)


# --- widgets --------------------------------------------------------------------------------------
def test_dashboard_resumes_a_run(work, monkeypatch):
    """A stopped run and its backup: one click resumes it to its end.

    No second run is offered.
    """
    pytest.importorskip("ipywidgets")
    from minigpt.core.files import read_json, write_json
    from minigpt.widgets import RunDashboard

    monkeypatch.chdir(work)
    for where in "run", "drive/run":
        facts = read_json(work / where / "run.json")
        write_json(
            work / where / "run.json",
            dict(
                facts, max_steps=24, train=dict(facts["train"], max_steps=24, gdrive_backup_dir="")
            ),
        )
    shutil.copytree(work / "drive", work / "elsewhere")
    d = RunDashboard("run")
    d.widget
    assert not d.go.disabled and "stopped, step 20 of 24" in d.html.value
    d.go.click()
    assert d.go.disabled and "finished, step 24 of 24" in d.html.value
    d = RunDashboard("elsewhere/run")
    d.widget
    assert not d.go.disabled
    d.go.click()
    assert read_json(work / "runs" / "run" / "trainer_state.json")["global_step"] == 24


# --- without a front end --------------------------------------------------------------------------
def test_views_work_without_a_front_end(tmp_path):
    "No ipywidgets, rich or matplotlib is imported; text and PNG work all the same."
    run = run_with_losses(tmp_path / "run")
    (run / "run.json").write_text(json.dumps(dict(id="1", max_steps=100, train={}, model={})))
    code = """
import sys
sys.modules.update(ipywidgets=None, rich=None)
from minigpt.widgets import LiveLoss, RunDashboard
from minigpt.run.status import monitor
print([m for m in ('matplotlib', 'tensorboard', 'IPython') if m in sys.modules])
live = LiveLoss(sys.argv[1])
print(live); live.finish()
assert 'data:image/png;base64,' in live.charts(ended=True)['text/html']
print(RunDashboard(sys.argv[1])); monitor(sys.argv[1])
"""
    p = run_python(code, run, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 0, err
    assert out.startswith("[]\n") and out.count("stopped, step 50 of 100 (50%)") == 3


class Handle:
    "A display handle that counts its updates."

    def __init__(self):
        self.updates = []

    def update(self, bundle, raw):
        self.updates.append(bundle["text/plain"])


def make_live(folder, **options):
    run = run_with_losses(folder)
    (run / "run.json").write_text(json.dumps(dict(id="1", max_steps=100, train={}, model={})))
    live = LiveLoss(run, **options)
    live.views = [Handle(), Handle()]
    return live


def test_live_view_takes_little_time(tmp_path):
    "Charts take at most a fiftieth of the time, however slow they are and however often asked for."
    now, spent = [0.0], [0.0]
    live = make_live(tmp_path / "run", clock=lambda: now[0])

    def charts():
        now[0] += 0.5
        spent[0] += 0.5
        return {"text/plain": ""}

    live.charts = charts
    while now[0] < 1000:
        live.update()
        now[0] += 0.02
    assert 0.01 < spent[0] / now[0] < 0.021


def test_live_view_moves_during_a_long_step(tmp_path, monkeypatch):
    "A thread updates the numbers every second while the main thread is busy."
    live = make_live(tmp_path / "run")
    monkeypatch.setattr(live, "show", lambda: None)
    live.phase = "evaluating"
    live.start()
    end = time.monotonic() + 60
    while len(live.views[0].updates) < 2 and time.monotonic() < end:
        time.sleep(0.1)  # as a long step
    assert len(live.views[0].updates) >= 2
    assert "evaluating, step 50 of 100" in live.views[0].updates[0]
    live.finish()
    assert not live.thread and "stopped, step 50" in live.views[0].updates[-1]


def test_live_view_that_fails_ends_alone(tmp_path, monkeypatch, caplog):
    live = make_live(tmp_path / "run")
    monkeypatch.setattr(live, "show", lambda: None)
    live.views[0].update = lambda *_, **__: 1 / 0
    live.start()
    live.thread.join(5)
    assert (
        not live.thread.is_alive() and "the live view stops here: ZeroDivisionError" in caplog.text
    )
