"""Several processes that train one model: losses equal those of one process; a resume is exact.

No process waits for one that has exited. On the CPU, over gloo; on GPUs only the transport of the
gradients differs.
"""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import psutil
import pytest
import torch

from minigpt.checkpoint.store import read_checkpoint
from minigpt.model.adapters import lora
from minigpt.model.gpt import GPTConfig
from minigpt.run.folder import Run
from minigpt.train import parallel
from minigpt.train.trainer import Callback, fit

SHAPE = GPTConfig(vocab_size=300, dim=16, n_layer=2, n_head=2, n_kv_head=1, ffn_dim=32)
OPTIONS = dict(
    tokenizer_vocab_size=300,
    max_seq_len=16,
    long_rows="cut",
    batch_size=2,
    gradient_accumulation=4,
    max_steps=10,
    save_steps=4,
    eval_steps=5,
    logging_steps=1,
    num_threads=2,
    learning_rate=3e-3,
    progress=False,
    plot_loss=False,
    tensorboard=False,
)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(
        "\n\n".join(f"The mill stands by the river, and stone {i} lies in it." for i in range(300))
    )
    return path


class AtStep(Callback):
    def __init__(self, step, do):
        self.step, self.do = step, do

    def on_step(self, t):
        if t.step == self.step:
            self.do(t)


def losses(run):
    return [h["loss"] for h in run.history if "loss" in h]


def weights(run):
    return read_checkpoint(run.path).weights


def worker_processes():
    return [p for p in psutil.Process().children() if "run_worker" in " ".join(p.cmdline())]


def have_exited(processes):
    "Wait for the processes; return whether all have exited."
    _, alive = psutil.wait_procs(processes, 20)
    return not alive


def train(text, folder, *callbacks, model=SHAPE, **options):
    return fit(model, text, output_dir=folder, callbacks=callbacks, **{**OPTIONS, **options})


@pytest.fixture(scope="module")
def uninterrupted(text, tmp_path_factory):
    return train(text, tmp_path_factory.mktemp("alone") / "run")


@pytest.mark.parametrize(
    "options",
    [
        {},
        dict(optimizer="muon"),
        dict(batch_size=8, gradient_accumulation=1),
        dict(precision="bf16"),
        dict(enable_compile="yes", max_steps=4),
    ],
    ids=lambda o: next(iter(o), "plain"),
)
def test_two_processes_equal_one(text, uninterrupted, tmp_path, options):
    one = (
        train(text, tmp_path / "one", **options)
        if set(options) - {"batch_size", "gradient_accumulation"}
        else uninterrupted
    )
    seen = []
    two = train(
        text,
        tmp_path / "two",
        AtStep(2, lambda t: seen.extend(worker_processes())),
        devices=2,
        **options,
    )
    assert len(seen) == 1 and have_exited(seen)
    close = dict(rtol=0.02) if options.get("precision") == "bf16" else dict(rtol=1e-4)
    assert torch.allclose(torch.tensor(losses(two)), torch.tensor(losses(one)), **close)
    assert two.facts["choices"]["devices"] == 2 and two.facts["identity"] == one.facts["identity"]
    tokens = [[h["tokens"] for h in r.history if "loss" in h] for r in (one, two)]
    assert tokens[0] == tokens[1]


def test_preferences_and_adapters_in_two_processes(tmp_path):
    "Other objectives, other parameters."
    for name, data, model in ("dpo", "preferences", SHAPE), ("lora", "talks", None):
        runs = []
        for devices in 1, 2:
            torch.manual_seed(0)
            made = model or lora(SHAPE.build(), r=2)
            runs.append(
                fit(
                    made,
                    data,
                    output_dir=tmp_path / f"{name}{devices}",
                    **{
                        **OPTIONS,
                        "max_seq_len": 64,
                        "max_steps": 4,
                        "data_subset": 0.05,
                        "devices": devices,
                    },
                )
            )
        assert torch.allclose(*(torch.tensor(losses(r)) for r in runs), rtol=1e-3), name


def test_resume_is_bit_identical(text, tmp_path):
    """With dropout:

    a run of two processes, interrupted between two saves, equals an uninterrupted one.
    """
    from dataclasses import replace

    model = replace(SHAPE, dropout=0.1)
    whole = train(text, tmp_path / "whole", model=model, devices=2)

    class PowerCut(Exception):
        pass

    def power_cut(t):
        raise PowerCut

    with pytest.raises(PowerCut):
        train(text, tmp_path / "cut", AtStep(6, power_cut), model=model, devices=2)
    cut = train(text, tmp_path / "cut", model=model, devices=2)
    assert losses(cut) == losses(whole) and all(
        torch.equal(v, weights(whole)[k]) for k, v in weights(cut).items()
    )


def test_resume_with_another_number_of_devices(text, uninterrupted, tmp_path, capfd):
    run = train(
        text, tmp_path / "run", max_steps=5, devices=2, lr_schedule="constant", progress=True
    )
    run = train(text, tmp_path / "run", max_steps=10, lr_schedule="constant", progress=True)
    assert (
        run.finished
        and "devices was 2 and is now 1"
        in capfd.readouterr().out + (run.path / "run.log").read_text()
    )


def test_unsupported_options_are_refused(text, tmp_path):
    with pytest.raises(ValueError, match="cannot be shared by 3 devices"):
        train(text, tmp_path / "run", devices=3)
    assert not worker_processes() or have_exited(worker_processes())
    with pytest.raises(ValueError, match="devices=0 must be at least 1"):
        train(text, tmp_path / "run", devices=0)


def test_killed_worker_is_reported(text, uninterrupted, tmp_path):
    "The main process reports it instead of waiting, and the same call resumes."

    def kill_worker(t):
        for p in worker_processes():
            p.kill()

    with pytest.raises(
        RuntimeError,
        match=(
            "stopped: process 1 of 2 exited with code -9. The same call resumes from the last"
            " checkpoint"
        ),
    ):
        train(text, tmp_path / "run", AtStep(6, kill_worker), devices=2)
    assert not worker_processes()
    run = train(text, tmp_path / "run", devices=2)
    assert run.finished and torch.allclose(
        torch.tensor(losses(run)), torch.tensor(losses(uninterrupted)), rtol=1e-4
    )


def test_worker_that_cannot_start_is_reported(monkeypatch):
    "The other worker exits too."
    started, real = [], parallel._start_worker

    def start(rank, size, path):
        if rank == 2:
            raise OSError(12, "Cannot allocate memory")
        started.append((real(rank, size, path), Path(path).parent))
        return started[-1][0]

    monkeypatch.setattr("minigpt.train.parallel._start_worker", start)
    with pytest.raises(OSError, match="allocate"):
        parallel.assemble(3, "cpu")
    helper, path = started[0]
    assert helper.poll() is not None and not path.exists()


def test_ctrl_c_with_a_stuck_worker(text, tmp_path):
    "The second Ctrl-C stops at once."
    stuck = []

    def stop(t):
        stuck.extend(worker_processes())
        for p in stuck:
            p.suspend()
        for after in 1, 2:
            threading.Timer(after, lambda: os.kill(os.getpid(), signal.SIGINT)).start()

    with pytest.raises(KeyboardInterrupt, match="stopped immediately"):
        train(text, tmp_path / "run", AtStep(6, stop), devices=2)
    assert stuck and have_exited(stuck)


@pytest.mark.skipif(
    sys.platform != "linux", reason="the interface that gloo uses is known on Linux only"
)
def test_ports_listen_on_this_machine_only(text, tmp_path):
    seen = []

    def inspect(t):
        seen.extend(
            c.laddr.ip
            for p in (psutil.Process(), *worker_processes())
            for c in p.net_connections("inet")
            if c.status == psutil.CONN_LISTEN and c.laddr.port not in before
        )

    before = {
        c.laddr.port
        for c in psutil.Process().net_connections("inet")
        if c.status == psutil.CONN_LISTEN
    }
    train(text, tmp_path / "run", AtStep(2, inspect), devices=2, max_steps=3)
    assert seen and {*seen} <= {"127.0.0.1", "::1"}, seen


def test_each_worker_gets_only_its_share(text, tmp_path, monkeypatch):
    "And not the complete batch with each."
    sent, real = [], parallel.dist.scatter_object_list

    def count(out, commands, src):
        sent.append([len(pickle.dumps(o)) for o in commands])
        return real(out, commands, src=src)

    monkeypatch.setattr(parallel.dist, "scatter_object_list", count)
    train(
        text,
        tmp_path / "run",
        devices=2,
        batch_size=8,
        gradient_accumulation=8,
        max_seq_len=32,
        max_steps=2,
    )
    assert max(b for _, b in sent) < 2 * (64 * 32 * 8 * 2) // 2, (
        "ids and labels, int64, for half of the batch each"
    )


SCRIPT = textwrap.dedent("""
    import sys
    from minigpt.model.gpt import GPTConfig
    from minigpt.train.trainer import Callback, fit
    class Say(Callback):
        def on_step(self, t): print('step', t.step, flush=True)
    for name in sys.argv[2:]:
        run = fit(
            GPTConfig(**{shape}), sys.argv[1], output_dir=name, callbacks=[Say()], **{options}
        )
    sys.stdout.write(f'finished {run.finished}\\n')
""")


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "train.py"
    path.write_text(
        SCRIPT.replace("{shape}", repr(SHAPE.to_dict())).replace("{options}", repr(OPTIONS))
    )
    return path


def test_torchrun(text, uninterrupted, script, tmp_path):
    """The same script in every process, with two trainings in it, one after the other.

    Then once more, when both are finished.
    """
    for _ in range(2):
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--standalone",
                "--nproc_per_node",
                "2",
                str(script),
                str(text),
                str(tmp_path / "a"),
                str(tmp_path / "b"),
            ],
            capture_output=True,
            text=True,
            timeout=240,
        )
        assert done.returncode == 0 and done.stdout.count("finished True") == 2, (
            done.stdout + done.stderr
        )
    for name in "ab":
        assert torch.allclose(
            torch.tensor(losses(Run(tmp_path / name))),
            torch.tensor(losses(uninterrupted)),
            rtol=1e-4,
        )


def test_model_class_of_the_script_is_refused(text, script, tmp_path):
    "Its class is defined in the script."
    script.write_text(
        script.read_text()
        .replace("class Say", "from minigpt.model.gpt import GPT\nclass Mine(GPT): pass\nclass Say")
        .replace("    GPTConfig(", "    Mine(GPTConfig(")
        .replace("sys.argv[1], output_dir", "sys.argv[1], devices=2, output_dir")
        .replace("}), sys", "})), sys")
    )
    done = subprocess.run(
        [sys.executable, str(script), str(text), str(tmp_path / "a")],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (
        done.returncode
        and "process 1 of 2: AttributeError: Can't get attribute 'Mine'" in done.stderr
    ), done.stderr


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_killed_main_process_leaves_no_workers(text, script, tmp_path):
    "No process is left, and the run resumes."
    script.write_text(
        script.read_text().replace("callbacks=[Say()],", "callbacks=[Say()], devices=2,")
    )
    p = subprocess.Popen(
        [sys.executable, str(script), str(text), str(tmp_path / "a")],
        stdout=subprocess.PIPE,
        text=True,
    )
    for line in p.stdout:
        if line.startswith("step 6"):
            break
    others = psutil.Process(p.pid).children(recursive=True)
    assert others
    p.kill()
    p.wait()
    assert have_exited(others)
    assert train(text, tmp_path / "a", devices=2).finished


@pytest.mark.skipif(
    sys.platform == "win32", reason="Windows cannot send Ctrl-C to one process alone"
)
def test_ctrl_c_stops_between_steps(text, script, tmp_path):
    script.write_text(
        script.read_text()
        .replace("callbacks=[Say()],", "callbacks=[Say()], devices=2,")
        .replace("'max_steps': 10", "'max_steps': 100000")
    )
    p = subprocess.Popen(
        [sys.executable, str(script), str(text), str(tmp_path / "a")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    for line in p.stdout:
        if line.startswith("step 6"):
            break
    others = psutil.Process(p.pid).children(recursive=True)
    os.killpg(p.pid, signal.SIGINT)
    _, output = p.communicate(timeout=60)
    assert "KeyboardInterrupt: stopped after step" in output and have_exited(others)
    assert [c for c in Run(tmp_path / "a").checkpoints if not c.problem]
