"""What a notebook shows for a refused call, a stopped cell and a bug, in a real kernel."""

import re
import threading
import time

import pytest
from jupyter_client.manager import start_new_kernel

SHORT = (
    'batch_size=1, max_seq_len=16, tokenizer_vocab_size=300, enable_compile="no", progress=False'
)


class Kernel:
    "A kernel in a folder of its own, with a text to train on."

    def __init__(self, folder):
        self.manager, self.client = start_new_kernel(kernel_name="python3", cwd=str(folder))
        (folder / "boat.txt").write_text("The boat came home late.\n\n" * 400)
        self.folder = folder
        self.run("from minigpt.train import Callback, fit")

    def run(self, code, while_it_runs=None):
        "Run a cell; return its reply, the lines of its error, and what it printed."
        errors, printed = [], []

        def collect(message):
            kind, content = message["msg_type"], message["content"]
            if kind == "error":
                errors.append("\n".join(content["traceback"]))
            elif kind == "stream":
                printed.append(content["text"])

        if while_it_runs:
            threading.Thread(target=while_it_runs, daemon=True).start()
        reply = self.client.execute_interactive(code, timeout=120, output_hook=collect)
        text = re.sub(r"\x1b\[[\d;]*m", "", "".join(errors))
        return reply["content"], text.splitlines(), "".join(printed)

    def interrupt_when(self, condition):
        end = time.time() + 60
        while not condition() and time.time() < end:
            time.sleep(0.05)
        self.manager.interrupt_kernel()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    k = Kernel(tmp_path_factory.mktemp("kernel"))
    yield k
    k.client.stop_channels()
    k.manager.shutdown_kernel(now=True)


@pytest.mark.parametrize(
    "code, kind, words, where",
    [
        (
            'fit("tiny", "boat.txt", lerning_rate=1)',
            "TypeError",
            "did you mean 'learning_rate'",
            ["line 1: fit("],
        ),
        (
            'def train_it():\n    fit("tiny", "ship.txt")\n\ntrain_it()',
            "FileNotFoundError",
            "no file ship.txt",
            ["line 4: train_it()", "line 2 in train_it: fit("],
        ),
        (
            'fit("tiny", "boat.txt", device="cuda")',
            "ValueError",
            "finds no CUDA device",
            ["line 1: fit("],
        ),
        (
            'open("bad.jsonl", "w").write(\'{"text": "a"}\\n{"text": 3}\\n\')\n'
            'fit("tiny", "bad.jsonl", on_bad_row="error")',
            "DataError",
            "bad.jsonl line 2",
            ["line 2: fit("],
        ),
        (
            'from minigpt.chat import Chat\nChat("runs/no")',
            "CheckpointError",
            "runs/no does not exist",
            ["line 2: Chat("],
        ),
    ],
)
def test_a_refused_call_is_short(kernel, code, kind, words, where):
    reply, lines, _ = kernel.run(code)
    assert (reply["status"], reply["ename"]) == ("error", kind)
    assert lines[0].startswith(f"{kind}: ") and words in lines[0]
    assert len(lines) == 2 + len(where) and "%tb" in lines[-1]
    assert all(line.startswith(w) for line, w in zip(lines[1:], where)), lines


def test_the_traceback_is_kept(kernel):
    "`%tb` and `%xmode Verbose` show it; `except` catches the same type."
    kernel.run('fit("tiny", "boat.txt", lerning_rate=1)')
    _, lines, printed = kernel.run("%tb")
    assert len(lines or printed.splitlines()) > 20
    kernel.run("%xmode Verbose")
    try:
        assert len(kernel.run('fit("tiny", "boat.txt", lerning_rate=1)')[1]) > 20
    finally:
        kernel.run("%xmode Context")
    code = """
try:
    fit("tiny", "ship.txt")
except FileNotFoundError as e:
    print(type(e) is FileNotFoundError, e.__cause__)"""
    assert kernel.run(code)[2] == "True None\n"


BUGS = {
    "a bug of the user": '{}["x"]',
    "a refused call of the user, inside a callback": 'fit("tiny", "boat.txt", output_dir="b")',
    "torch": "import torch; torch.zeros(2) @ torch.zeros(3)",
}


@pytest.mark.parametrize("bug", BUGS.values(), ids=BUGS)
def test_a_bug_keeps_its_traceback(kernel, bug):
    code = f"""
class Mine(Callback):
    def on_step(self, t):
        {bug}


fit("tiny", "boat.txt", max_steps=2, output_dir="runs/bug", callbacks=[Mine()], {SHORT})"""
    reply, lines, _ = kernel.run(code)
    assert reply["status"] == "error" and len(lines) > 20
    assert any(bug.split("; ")[-1] in line for line in lines), lines


def test_a_stopped_cell(kernel):
    "It names what was saved and how to resume; the same call does."
    code = f'fit("tiny", "boat.txt", max_steps=4000, output_dir="runs/stop", {SHORT})'
    metrics = kernel.folder / "runs" / "stop" / "metrics.jsonl"
    trains = lambda: metrics.exists() and metrics.read_text().count("\n") > 3
    reply, lines, _ = kernel.run(code, lambda: kernel.interrupt_when(trains))
    assert reply["ename"] == "KeyboardInterrupt" and len(lines) == 3, lines
    assert "saved runs/stop/checkpoints/checkpoint-" in lines[0]
    assert "the same call resumes" in lines[0]
    code = code.replace("max_steps=4000", "max_steps=int(run.step) + 1")
    reply, *_ = kernel.run(f'from minigpt.run import open_run\nrun = open_run("runs/stop")\n{code}')
    assert reply["status"] == "ok"


def test_a_cell_stopped_before_training(kernel):
    "The first line names the function that was interrupted; no half-made run is left."
    code = f"""
import time
from minigpt.train import trainer

def read_slowly(job):
    open("reading", "w").close()
    time.sleep(60)

real, trainer._open_inputs = trainer._open_inputs, read_slowly
try:
    fit("tiny", "boat.txt", output_dir="runs/early", {SHORT})
finally:
    trainer._open_inputs = real"""
    reading = kernel.folder / "reading"
    reply, lines, _ = kernel.run(code, lambda: kernel.interrupt_when(reading.exists))
    assert reply["ename"] == "KeyboardInterrupt" and len(lines) == 3, lines
    assert "stopped in _run_fit" in lines[0]
    assert not (kernel.folder / "runs" / "early").exists()
