"""Fast and still exact, and what happens if memory runs out.

Compiled, in bf16, with gradient checkpointing, with Muon.
"""

import json
import shutil
import weakref
from types import SimpleNamespace

import psutil
import pytest
import torch
import torch.nn.functional as F

import minigpt.model.gpt
import minigpt.train.trainer
from minigpt.config.options import TrainConfig
from minigpt.model.gpt import GPT, linear_cross_entropy
from minigpt.run.folder import open_run
from minigpt.run.guard import Guard
from minigpt.train.speed import can_keep, choose_runtime, decide_compile
from minigpt.train.trainer import Callback, TrainingError, fit
from tests.harness import kill_child as child
from tests.recovery.test_faults import AtStep, PowerCut, power_cut, run_fit

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")


@pytest.fixture
def work(tmp_path):
    return child.new_work(tmp_path / "work")


def check_interrupted_run(work, tmp_path, **options):
    """Check that a run interrupted after step 7, two steps after a save, resumes bit for bit.

    Return the losses of the uninterrupted run.
    """
    uninterrupted = run_fit(child.new_work(tmp_path / "alone"), **options)[1]
    with pytest.raises(PowerCut):
        run_fit(work, AtStep(7, power_cut), **options)
    _, after = run_fit(work, **options)
    assert len(after) > 6 and {k: uninterrupted[k] for k in after} == after
    return uninterrupted


@pytest.mark.skipif(
    not COMPILER,
    reason=(
        "torch.compile needs a C++ compiler on a CPU, and there is none: install g++ (Debian:"
        " apt-get install g++; macOS: xcode-select --install)"
    ),
)
def test_compiled_run_resumes_bit_for_bit(work, tmp_path):
    check_interrupted_run(work, tmp_path, enable_compile="yes", max_steps=12)
    run = open_run(work / "run")
    assert run.facts["choices"]["compile"] == "yes"
    model = run.model().train()  # the same files and numbers as without compiling
    model.model.layers.apply(
        lambda m: (
            setattr(m, "p", 0.0) if isinstance(m, torch.nn.Dropout) else setattr(m, "dropout", 0.0)
        )
    )
    model.drop.p = 0.0
    ids = torch.randint(300, (4, 33))
    batch = dict(input_ids=ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous())

    def gradients():
        model.zero_grad()
        model.loss(**batch).backward()
        return [p.grad.clone() for p in model.parameters()]

    plain = gradients()
    assert decide_compile(model, batch, 1, how="yes")
    for a, b in zip(plain, gradients()):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(
    not COMPILER,
    reason=(
        "torch.compile needs a C++ compiler on a CPU, and there is none: install g++ (Debian:"
        " apt-get install g++; macOS: xcode-select --install)"
    ),
)
def test_auto_compiles_a_long_run_and_its_resume(work, monkeypatch, capsys):
    from minigpt.train import speed

    times = iter(
        [1.0, 1.0, 1.0, 1.0, 1.0] + [0.1] * 9
    )  # seconds per micro-batch: eager, then compiled
    monkeypatch.setattr(speed, "micro_step", lambda *a: next(times))
    with pytest.raises(PowerCut):
        run_fit(work, AtStep(7, power_cut), max_steps=200, progress=True)
    out = capsys.readouterr().out
    assert (
        "compiled 100 ms" in out
        and ", compiled," in out
        and open_run(work / "run").facts["choices"]["compile"] == "yes"
    )
    monkeypatch.setattr(speed, "micro_step", lambda *a: 0.1)
    with pytest.raises(PowerCut):
        run_fit(work, AtStep(9, power_cut), max_steps=200, progress=True)
    out = capsys.readouterr().out
    assert ", compiled," in out and "measuring" not in out


def test_failing_compiler_is_reported_once(work, monkeypatch, capsys):
    from minigpt.model.gpt import Block

    def raise_compile_error(self, **how):
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(Block, "compile", raise_compile_error)
    run, _ = run_fit(work, enable_compile=True, progress=True)
    out = capsys.readouterr().out
    assert (
        run.finished
        and out.count("torch.compile failed") == 1
        and "no C++ compiler was found" in out
        and ", not compiled," in out
    )


@pytest.mark.parametrize(
    "options",
    [
        dict(precision="bf16"),
        dict(gradient_checkpointing=True),
        dict(optimizer="muon"),
        dict(disable_optimizations=True),
        dict(deterministic=True),
    ],
    ids=lambda o: next(iter(o)),
)
def test_resume_is_bit_identical(work, tmp_path, options):
    seen = []

    def inspect(t):
        seen.append(torch.are_deterministic_algorithms_enabled())

    run_fit(child.new_work(tmp_path / "look"), AtStep(2, inspect), **options)
    assert seen == [options.get("deterministic", False)]
    check_interrupted_run(work, tmp_path, **options)
    assert not torch.are_deterministic_algorithms_enabled(), "the mode must be restored"


def test_gradient_checkpointing_changes_no_loss(work, tmp_path):
    assert (
        run_fit(work)[1]
        == run_fit(child.new_work(tmp_path / "other"), gradient_checkpointing=True)[1]
    )


def test_run_is_saved_and_resumes_when_memory_runs_out(work, tmp_path, monkeypatch):
    uninterrupted = run_fit(child.new_work(tmp_path / "alone"))[1]
    use = iter([50] * 8 + [97] * 1000)
    monkeypatch.setattr(
        "minigpt.train.callbacks.Guard",
        lambda cpu, memory: Guard(
            cpu, memory, patience=0.0, every=0.0, memory=lambda: (next(use), 100)
        ),
    )
    with pytest.raises(
        TrainingError,
        match=(
            r"97% of the memory is in use .*more than max_memory=95.*batch_size=2,"
            r" gradient_accumulation=4.*stopped after step \d+ and saved"
        ),
    ):
        run_fit(work)
    monkeypatch.undo()
    before = open_run(work / "run").step
    assert 1 < before < 20
    run, after = run_fit(work)
    assert (
        run.finished
        and {k: uninterrupted[k] for k in after} == after
        and min(s for s, k in after if k == "loss") == before + 1
    )


def test_disable_monitoring_creates_no_guard(work, monkeypatch):
    def raise_error(*args):
        raise AssertionError("a memory guard was created")

    monkeypatch.setattr("minigpt.train.callbacks.Guard", raise_error)
    assert run_fit(work, disable_monitoring=True)[0].finished


def test_out_of_memory_names_options_that_a_resume_accepts(work, tmp_path, monkeypatch):
    uninterrupted = run_fit(child.new_work(tmp_path / "alone"))[1]

    def raise_out_of_memory(t):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore of this")

    with pytest.raises(TrainingError) as e:
        run_fit(work, AtStep(7, raise_out_of_memory))
    message = str(e.value)
    assert (
        "checkpoint-5" in message
        and "batch_size=2, gradient_accumulation=4 (instead of 4 and 2" in message
        and "gradient_checkpointing=True" in message
    )
    run, after = run_fit(work, batch_size=2, gradient_accumulation=4)
    assert run.finished and min(s for s, k in after if k == "loss") == 6
    assert all(
        abs(float.fromhex(uninterrupted[k]) - float.fromhex(v)) < 0.05 for k, v in after.items()
    )  # not bit for bit: sums are computed in another order


def test_out_of_memory_before_the_first_step(work, monkeypatch):
    """It happens while the benefit of compiling is measured, before training starts.

    A smaller micro-batch can be tried at once.
    """
    from minigpt.train import speed

    def raise_out_of_memory(*args):
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(speed, "micro_step", raise_out_of_memory)
    with pytest.raises(
        TrainingError,
        match="in step 1 .*No checkpoint had been saved yet.*batch_size=2, gradient_accumulation=4",
    ):
        run_fit(work)
    monkeypatch.undo()
    assert run_fit(work, batch_size=2, gradient_accumulation=4)[0].finished


def test_out_of_memory_frees_the_memory_of_the_step(work):
    "A notebook keeps the error, and the next call needs the memory."

    class Activations:
        pass

    left = []

    def raise_out_of_memory(t):
        held = Activations()
        left.append(weakref.ref(held))
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.raises(TrainingError) as e:
        run_fit(work, AtStep(7, raise_out_of_memory))
    assert e.value.__traceback__ and left[0]() is None


def test_fp16_overflow_at_every_scale_is_an_error(work):
    "Such steps change nothing: the loss would not change, and the run would seem to succeed."

    def set_low_scale(t):
        t.scaler = torch.amp.GradScaler("cpu", init_scale=1e-4)

    with pytest.raises(
        TrainingError,
        match="fp16 overflowed in many steps .*down to 0.0001.*checkpoint-5.*precision='fp32'",
    ):
        run_fit(work, AtStep(6, set_low_scale))


def test_copy_without_pinned_memory(work, monkeypatch, capsys):
    def raise_error(self, state):
        self.buffers["weights", "some"] = None
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(minigpt.train.state.Writer, "copy", raise_error)
    run, after = run_fit(work)
    assert run.finished and "training waits while a checkpoint is written" in (
        run.path / "run.log"
    ).read_text("utf-8")
    monkeypatch.undo()
    assert after == run_fit(child.new_work(work / "other"))[1]


def test_state_is_saved_without_memory_for_a_copy(work, monkeypatch):
    """A stop in a step with an evaluation, whose best model was copied.

    The state is written although no copy of it is possible.
    """
    real = minigpt.train.state.Writer.save

    def full_after(self, store, state):
        real(self, store, state)
        if store.kind == "best":
            monkeypatch.setattr(
                psutil, "virtual_memory", lambda: SimpleNamespace(available=0, total=1 << 40)
            )

    monkeypatch.setattr(minigpt.train.state.Writer, "save", full_after)

    def stop(t):
        t.stop = "enough"

    with pytest.raises(TrainingError, match="enough: stopped after step 4"):
        run_fit(
            work,
            AtStep(4, stop),
            evaluation_strategy="steps",
            eval_steps=4,
            validation_split=0.2,
            disable_monitoring=True,
        )
    assert (
        open_run(work / "run").step == 4
        and (work / "run/checkpoints/checkpoint-4/MANIFEST.json").exists()
    )


@pytest.mark.parametrize(
    "device, says",
    [
        ("meta", "must be auto"),
        ("xpu", "must be auto"),
        ("cuda:7", "CUDA device"),
        ("mps", "Apple GPU"),
    ],
)
def test_missing_device_is_refused(device, says, monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(ValueError, match=says):
        choose_runtime(TrainConfig(device=device))


def test_resume_on_a_machine_without_the_device(monkeypatch):
    "A run that resumes on another machine keeps the options that still apply."
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert (
        can_keep("device", "cuda", "cuda")
        and not can_keep("device", "cuda:1", "cuda")
        and can_keep("threads", 2, "cuda")
        and can_keep("device", "cpu", "cpu")
    )
    assert (
        can_keep("precision", "fp16", "cuda")
        and not can_keep("precision", "bf16", "cuda")
        and can_keep("precision", "bf16", "cpu")
    )
    with pytest.raises(ValueError, match="finds 1 CUDA device here"):
        choose_runtime(TrainConfig(device="cuda:1"))
    assert choose_runtime(TrainConfig(device="cuda")).precision == "fp16"


def test_other_errors_are_not_out_of_memory(work):
    def other(t):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="^mat1"):
        run_fit(work, AtStep(7, other))


def test_choices_are_recorded_in_run_json(work):
    run, _ = run_fit(work, auto_batch_size=True)
    choices = json.loads((run.path / "run.json").read_text())["choices"]
    assert (
        choices["compile"] == "no"
        and choices["batch_size"] == 4
        and choices["device"] == "cpu"
        and choices["threads"] == 1
    )


@pytest.mark.parametrize(
    "dtype, near", [(torch.float32, 1e-6), (torch.bfloat16, 2e-2), (torch.float16, 2e-3)]
)
@pytest.mark.parametrize("rows", [1, 97, 10_000])
def test_blockwise_loss_equals_the_plain_loss(dtype, near, rows, monkeypatch):
    """Also for rows without a label, no rows, and extreme probabilities.

    Probabilities too small for fp16, or so close to 1 that bf16 rounds them.
    """
    monkeypatch.setattr(minigpt.model.gpt, "_chunk_size", lambda *a: rows)
    for n, scale, known in (
        (600, 1.0, False),
        (77, 8.0, False),
        (1, 1.0, False),
        (0, 1.0, False),
        (300, 0.15, True),
        (300, 0.2, True),
        (300, 0.3, True),
    ):
        g = torch.Generator().manual_seed(n)
        w = torch.randn(900, 64, generator=g).requires_grad_()
        y = torch.randint(900, (n,), generator=g)
        h = (
            scale * (w[y].detach() if known else torch.randn(n, 64, generator=g))
        ).requires_grad_()  # confident predictions point at the label
        y[1::5] = -100
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            ours = linear_cross_entropy(h, w, y, 400)
        round_ = lambda t: t.to(dtype).float()  # the same factors
        plain = F.cross_entropy(round_(h) @ round_(w).T, y, reduction="sum") / 400
        assert ours.item() == pytest.approx(plain.item(), rel=5 * near if known else near)
        for a, b in zip(torch.autograd.grad(plain, (h, w)), torch.autograd.grad(ours, (h, w))):
            assert (a - b).norm() <= 5 * near * a.norm(), (n, scale, known)


def test_model_too_large_for_its_device(work, monkeypatch):
    def full(self, device):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")

    monkeypatch.setattr(GPT, "to", full)
    with pytest.raises(
        TrainingError, match=r"the model \(.* does not fit on cpu .*restart its kernel"
    ):
        run_fit(work)


def test_preferences_without_enough_memory(work, monkeypatch):
    def full(data, seq_len, name, model=None, **options):
        if model is not None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB")
        return False

    monkeypatch.setattr("minigpt.train.state.add_reference", full)
    with pytest.raises(TrainingError, match="memory ran out before the first step .*batch_size="):
        fit(
            child.shape(),
            "preferences",
            output_dir=work / "dpo",
            data_subset=0.02,
            batch_size=4,
            max_steps=2,
            max_seq_len=64,
            tokenizer_vocab_size=300,
            progress=False,
        )


def test_library_that_flushes_subnormal_numbers(work):
    "Libraries that torch 2.4 compiles do that: the losses equal those of a run that loads none."
    tiny = lambda: float(torch.tensor([1e-40]) * 1)
    seen = []

    class Inspect(Callback):
        def on_step(self, t):
            seen.append(tiny())
            torch.set_flush_denormal(True)

    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers to zero")
    try:
        run_fit(work, Inspect())
    finally:
        torch.set_flush_denormal(False)
    assert len(seen) > 2 and all(seen)
