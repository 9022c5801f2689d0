"""Speed and memory of `minigpt.train.fit` on a GPU, beside Hugging Face Trainer and a bare loop.

    python -m bench.train_gpu                        # everything: about half an hour
    python -m bench.train_gpu --sizes 124M --precisions bf16 --rounds 1    # 5 minutes
    python -m bench.train_gpu --only fit Trainer     # programs with one of these in their name
    python -m bench.train_gpu --smoke                # a tiny model on the CPU: does everything run?

It prints tokens/s, model FLOPs utilization, memory and seconds to the first step; with --smoke the
figures are meaningless.

Measured so far, on an H200 with torch 2.11, 124M in bf16, 64 sequences per step, one round: `fit`
521,000 tokens/s, an MFU of 45.0%; Trainer compiled 429,000 (37.1%), so the ratio was 1.22. Both
were correct, and losses were equal to 0.2%. Since then the loss in bf16 takes one more pass over
the logits, which has not been timed. The other programs, fp16 and `medium` have not been measured.

124M      the shape of GPT-2: 12 layers, 12 heads, width 768, vocabulary 50,304. Ours is a Llama
          with FFN 2,048: 123,587,328 parameters, as many as GPT-2 has without biases and positions.
medium    our preset: 20 layers, 16 heads (4 for keys and values), width 640, FFN 2,048, vocabulary
          20,000: 111,949,440 parameters.
Sequences of 1,024 tokens of the built-in corpus, as many per step as fit into memory (--batch),
AdamW, gradients clipped at 1, constant learning rate.

minigpt   `fit` with its defaults, eager, compiled, and compiled with max-autotune; no progress bar,
          plot and validation. It is configured as a run of 10,000 steps and stopped early, so that
          it makes the choices of a long run.
Trainer   Hugging Face's, on its own Llama with our weights and batches, eager and compiled: sdpa
          attention (which takes the flash kernel), fused AdamW, TF32 for products that stay in
          fp32, no saving, evaluation or logging, tokens prepared in pinned memory.
bare      a loop and a model like nanoGPT's, written here: GPT-2 blocks without biases, with an
          inner width that gives as many parameters as ours, flash attention, fused AdamW, autocast,
          the next batch transferred during a step; eager and compiled.

First, the results are checked: the loss and the gradients of a batch, in each precision, eager and
compiled, against plain cross-entropy in fp32; and a tiny run with dropout and `deterministic` that
is interrupted and resumed must have, bit for bit, the losses of an uninterrupted one (not yet run
on a GPU). In the timed runs every loss must fall, and the Trainer's must equal ours to 5%. Each
measurement runs in its own process, and the order changes every round. Time is measured from the
10th step to the last, with the GPU synchronized at both ends. "first" is the time from the call,
after the imports, to the end of the first step, in the first round, when nothing has been compiled
yet. MFU is (6N + 12·layers·heads·head width·length) operations per token, as in nanoGPT and PaLM
(arxiv.org/abs/2204.02311), N without positions, divided by the peak of dense products in the data
sheet (PEAKS), or, for other GPUs and the CPU, by what a product of large matrices reaches. The last
line is the median over the rounds of ours in its defaults / the fastest Trainer, for the first size
and precision.
"""

import argparse
import contextlib
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

SIZES = {
    "124M": dict(
        vocab_size=50_304, dim=768, n_layer=12, n_head=12, n_kv_head=12, ffn_dim=2048
    ),  # rows of the embedding: GPT-2's, rounded up
    "medium": dict(vocab_size=20_000, dim=640, n_layer=20, n_head=16, n_kv_head=4, ffn_dim=2048),
    "smoke": dict(vocab_size=600, dim=32, n_layer=2, n_head=2, n_kv_head=1, ffn_dim=64),
}
ANNOUNCED = 10_000  # steps of the run that `fit` plans
LR, DECAY, BETAS = 6e-4, 0.1, (0.9, 0.95)
OURS = {
    "minigpt fit": {},
    "minigpt eager": dict(enable_compile="no"),
    "minigpt compiled": dict(enable_compile="yes"),
    "minigpt max-autotune": dict(enable_compile="max-autotune"),
}
PROGRAMS = [*OURS, "Trainer eager", "Trainer compiled", "bare eager", "bare compiled"]
SMOKE = [
    "minigpt fit",
    "minigpt eager",
    "Trainer eager",
    "bare eager",
]  # compiling takes longer than the test suite allows
# Dense operations per second, fp16 or bf16 with fp32 sums, from NVIDIA's data sheets: H100 and H200
# SXM (half of the figure "with sparsity"), H100 PCIe, A100, L4 (also half), T4; RTX 4090: Ada white
# paper, appendix A.
PEAKS = {
    r"H100 PCIe": 756e12,
    r"H[12]00": 989e12,
    r"A100": 312e12,
    r"\bL4\b": 121e12,
    r"\bT4\b": 65e12,
    r"4090$": 165e12,
}


def gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def peak(
    precision: str,
) -> tuple[float, str]:  # operations per second, and the source of the figure
    "Return the peak of the machine."
    import torch

    from minigpt.train.speed import machine_flops

    name = torch.cuda.get_device_name() if gpu() else "CPU"
    known = next((v for k, v in PEAKS.items() if re.search(k, name)), None)
    return (
        (known, f"{name}, data sheet")
        if known
        else (
            machine_flops("cuda", precision) if gpu() else machine_flops("cpu", "fp32", 1024),
            f"{name}, measured",
        )
    )


def flops_per_token(params: int, shape: dict, length: int) -> int:
    "Return the operations of forward and backward."
    return 6 * params + 12 * shape["n_layer"] * shape["dim"] * length  # heads × their width = dim


# --- what the processes share ---------------------------------------------------------------------
def prepare(folder: Path, megabytes: float):
    """Write the token set of the built-in corpus and its tokenizer, the same for every size.

    The embeddings have spare rows.
    """
    from minigpt.data.corpus import write_corpus
    from minigpt.data.tokensets import build_tokenset, data_files, sample_texts
    from minigpt.tokenizer.bpe import train_tokenizer

    write_corpus(folder / "stories.jsonl", megabytes)
    tok = train_tokenizer(
        sample_texts(data_files(folder / "stories.jsonl")),
        min(s["vocab_size"] for s in SIZES.values()),
    )
    tok.save(folder / "tokenizer")
    build_tokenset(folder / "stories.jsonl", tok, folder / "data", 0.0, progress=False)


@dataclass
class Case:
    "The input of every program."

    folder: Path  # of `prepare`
    size: str  # key of SIZES
    precision: str  # bf16 or fp16
    batch: int  # sequences per step
    length: int  # tokens per sequence
    steps: int  # all steps
    warm: int  # the first of them, which are not measured

    def __post_init__(self):
        self.folder = Path(self.folder)  # a string if it comes from another process

    @property
    def shape(self) -> dict:
        return SIZES[self.size]

    @property
    def device(self) -> str:
        return "cuda" if gpu() else "cpu"

    def model(self):
        import torch

        from minigpt.model.gpt import GPT, GPTConfig

        torch.manual_seed(0)
        return GPT(GPTConfig(**self.shape, max_len=self.length))

    def data(self):
        from minigpt.data.tokensets import TokenSet

        return TokenSet(self.folder / "data" / "train")

    def batches(self) -> list[dict]:  # ids and labels, (batch, length) int64
        "Return the batches that `fit` will use."
        from minigpt.data.tokensets import loader

        return list(
            loader(self.data(), range(self.steps), self.batch, self.length, 0, pin_memory=gpu())
        )


class Clock:
    "The end of the first step, and the steps between which time is measured."

    def __init__(self, case: Case):
        self.case, self.at, self.began = case, {}, time.perf_counter()

    def tick(self, step: int):
        import torch

        if step not in (1, self.case.warm, self.case.steps):
            return
        if gpu():
            torch.cuda.synchronize()
        self.at[step] = time.perf_counter()

    def facts(self, params: int, losses: list[float]) -> dict:
        "Return what one process reports; `losses` are means over ten steps."
        import psutil
        import torch

        c = self.case
        memory = torch.cuda.max_memory_allocated() if gpu() else psutil.Process().memory_info().rss
        return dict(
            tokens_per_second=(c.steps - c.warm)
            * c.batch
            * c.length
            / (self.at[c.steps] - self.at[c.warm]),
            first=self.at[1] - self.began,
            memory=memory,
            params=params,
            losses=losses,
        )


def tens(losses: list) -> list[float]:
    "Return means over ten steps of losses that are still on the device."
    import torch

    return torch.stack(losses).view(-1, 10).mean(1).tolist()


# --- correctness ----------------------------------------------------------------------------------
def check(case: Case, modes: list[str]) -> list[str]:  # one line per mode
    "Compare loss and gradients of ours with plain cross-entropy in fp32, on the same weights."
    import torch
    import torch.nn.functional as F

    from minigpt.train.speed import autocast, decide_compile

    torch.backends.cuda.matmul.allow_tf32 = False
    model = case.model().to(case.device).train()
    batch = {k: t[:2].to(case.device) for k, t in case.batches()[0].items()}

    def gradient():
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    plain = F.cross_entropy(model(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())
    plain.backward()
    right = gradient()
    lines, scale = (
        [],
        1024.0 if case.precision == "fp16" else 1.0,
    )  # a small gradient would vanish in fp16; `fit` has a scaler for it
    near = dict(fp32=(1e-4, 1e-3), bf16=(0.01, 0.1), fp16=(0.002, 0.02))[case.precision]
    for mode in modes:
        if (
            not decide_compile(
                model, batch, 1, case.precision, dict(eager="no", compiled="yes")[mode], print
            )
            and mode == "compiled"
        ):
            raise SystemExit("torch.compile failed")
        model.zero_grad()
        with autocast(case.device, case.precision):
            loss = model.loss(**batch)
        (loss * scale).backward()
        off = (
            abs(loss - plain).item() / plain.item(),
            ((gradient() / scale - right).norm() / right.norm()).item(),
        )
        assert off[0] < near[0] and off[1] < near[1], (
            f"{case.precision} {mode}: loss {loss.item()} against {plain.item()}, gradients"
            f" {off[1]:.2%} off; must be below {near[0]:.2%} and {near[1]:.2%}"
        )
        lines.append(
            f"{case.precision} {mode}: loss {loss.item():.5f} (plain fp32: {plain.item():.5f}),"
            f" gradients {off[1]:.3%} off; an interrupted run {check_resume(case, mode)}"
        )
    return lines


def check_resume(case: Case, mode: str) -> str:
    """Check that a run of 12 steps, interrupted after step 7 and resumed, equals an uninterrupted
    one.
    """
    import torch

    from minigpt.model.gpt import GPT, GPTConfig
    from minigpt.run.folder import open_run
    from minigpt.tokenizer.bpe import load_tokenizer
    from minigpt.train.trainer import Callback, fit

    class Interrupted(Exception):
        "The run is interrupted."

    class InterruptAt7(Callback):
        def on_step(self, t):
            if t.step == 7:
                raise Interrupted

    length = 1024 if gpu() else 32  # long enough to sum attention's gradient in several parts

    def losses(out, *callbacks):
        torch.manual_seed(0)
        model = GPT(GPTConfig(**SIZES["smoke"], max_len=length, dropout=0.1))
        with contextlib.suppress(Interrupted):
            fit(
                model,
                case.data(),
                tokenizer=load_tokenizer(case.folder / "tokenizer"),
                output_dir=out,
                callbacks=callbacks,
                max_steps=12,
                save_steps=5,
                logging_steps=1,
                batch_size=2,
                gradient_accumulation=2,
                max_seq_len=length,
                deterministic=True,
                device=case.device,
                precision=case.precision,
                enable_compile=dict(eager="no", compiled="yes")[mode],
                progress=False,
                plot_loss=False,
            )
        return [r["loss"] for r in open_run(out).history if "loss" in r]

    with tempfile.TemporaryDirectory() as out:
        uninterrupted = losses(Path(out) / "alone")
        losses(Path(out) / "cut", InterruptAt7())
        after = losses(Path(out) / "cut")
    assert len(uninterrupted) == 12 and uninterrupted == after, (
        f"{case.precision} {mode}: {uninterrupted} without an interruption, {after} with one"
    )
    return "resumes bit for bit"


# --- the programs ---------------------------------------------------------------------------------
def run_ours(case: Case, settings: dict) -> dict:
    "`fit`."
    from minigpt.run.folder import open_run
    from minigpt.tokenizer.bpe import load_tokenizer
    from minigpt.train.trainer import Callback, fit

    clock = Clock(case)

    class StopAfterMeasurement(Exception):
        "All steps are measured."

    class Tick(Callback):
        def on_step(self, t):
            clock.tick(t.step)
            if t.step == case.steps:
                raise StopAfterMeasurement

    model = case.model()
    with tempfile.TemporaryDirectory() as out:
        with contextlib.suppress(StopAfterMeasurement):
            fit(
                model,
                case.data(),
                tokenizer=load_tokenizer(case.folder / "tokenizer"),
                output_dir=out,
                callbacks=[Tick()],
                max_steps=ANNOUNCED if gpu() else case.steps,
                batch_size=case.batch,
                max_seq_len=case.length,
                device=case.device,
                precision=case.precision,
                learning_rate=LR,
                weight_decay=DECAY,
                adam_beta1=BETAS[0],
                adam_beta2=BETAS[1],
                lr_schedule="constant",
                warmup_steps=0,
                progress=False,
                plot_loss=False,
                **settings,
            )
        run = open_run(out)
        return dict(
            clock.facts(model.config.n_params, [r["loss"] for r in run.history if "loss" in r]),
            note=f"compile: {run.facts['choices']['compile']}",
        )


def run_trainer(case: Case, compiled: bool) -> dict:
    "Hugging Face Trainer."
    import torch
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from minigpt.model.gpt import to_hf

    clock, losses = Clock(case), []

    class Tick(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.tick(state.global_step)

    class Batches(torch.utils.data.Dataset):
        "A batch is a slice of the tensors; nothing to collate."

        def __init__(self):
            self.ids, self.labels = (
                torch.cat([b[k] for b in case.batches()]) for k in ("input_ids", "labels")
            )

        def __len__(self):
            return len(self.ids)

        def __getitems__(self, index):
            cut = slice(index[0], index[-1] + 1)
            return dict(
                input_ids=self.ids[cut], labels=self.labels[cut], shift_labels=self.labels[cut]
            )

    class OurTrainer(Trainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            losses.append(super().training_step(*args, **kwargs))
            return losses[-1]

    ours = case.model()
    model = LlamaForCausalLM(
        LlamaConfig(**{**to_hf(ours.config), "use_cache": False}, attn_implementation="sdpa")
    )
    wrong = model.load_state_dict(ours.weights(), strict=False)
    assert not wrong.unexpected_keys and wrong.missing_keys == ["lm_head.weight"], wrong
    with tempfile.TemporaryDirectory() as out:
        args = TrainingArguments(
            output_dir=out,
            max_steps=case.steps,
            per_device_train_batch_size=case.batch,
            use_cpu=not gpu(),
            optim="adamw_torch_fused",
            torch_compile=compiled,
            bf16=case.precision == "bf16",
            fp16=case.precision == "fp16",
            tf32=True if gpu() and torch.cuda.get_device_capability() >= (8, 0) else None,
            learning_rate=LR,
            weight_decay=DECAY,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            lr_scheduler_type="constant",
            warmup_steps=0,
            max_grad_norm=1.0,
            logging_strategy="no",
            save_strategy="no",
            eval_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_nan_inf_filter=False,
            remove_unused_columns=False,
            dataloader_pin_memory=gpu(),
            accelerator_config=dict(non_blocking=gpu()),
        )
        trainer = OurTrainer(
            model=model,
            args=args,
            train_dataset=Batches(),
            data_collator=lambda batch: batch,
            callbacks=[Tick()],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return clock.facts(ours.config.n_params, tens(losses))


def bare_model(shape: dict, length: int):
    "Return a GPT-2 without biases, with as many parameters as ours apart from positions."
    import torch.nn.functional as F
    from torch import nn

    C, H, L = shape["dim"], shape["n_head"], shape["n_layer"]
    inner = (2 * C * C // H * (H + shape["n_kv_head"]) + 3 * C * shape["ffn_dim"] - 4 * C * C) // (
        2 * C
    )
    norm, linear = lambda: nn.LayerNorm(C, bias=False), lambda a, b: nn.Linear(a, b, bias=False)

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm1, self.qkv, self.out, self.norm2, self.up, self.down = (
                norm(),
                linear(C, 3 * C),
                linear(C, C),
                norm(),
                linear(C, inner),
                linear(inner, C),
            )

        def forward(self, x):  # (B, T, C)
            q, k, v = (
                t.unflatten(-1, (H, -1)).transpose(1, 2)
                for t in self.qkv(self.norm1(x)).chunk(3, -1)
            )  # (B, H, T, D)
            x = x + self.out(
                F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            )
            return x + self.down(F.gelu(self.up(self.norm2(x))))

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions, self.blocks, self.norm = (
                nn.Embedding(shape["vocab_size"], C),
                nn.Embedding(length, C),
                nn.Sequential(*(Block() for _ in range(L))),
                norm(),
            )
            for name, p in self.named_parameters():
                if p.dim() > 1:
                    nn.init.normal_(
                        p,
                        std=(
                            0.02 / math.sqrt(2 * L)
                            if name.endswith(("out.weight", "down.weight"))
                            else 0.02
                        ),
                    )

        def forward(self, ids, labels):  # (B, T) both
            x = self.blocks(self.tokens(ids) + self.positions.weight[: ids.shape[1]])
            return F.cross_entropy(
                F.linear(self.norm(x), self.tokens.weight).flatten(0, 1), labels.flatten()
            )

    return Model()


def run_bare(case: Case, compiled: bool) -> dict:
    "A minimal training loop."
    import torch

    clock, losses = Clock(case), []
    torch.manual_seed(0)
    torch.backends.cuda.matmul.allow_tf32 = True
    net = bare_model(case.shape, case.length).to(case.device)
    params = list(net.parameters())
    optimizer = torch.optim.AdamW(
        [
            dict(params=[p for p in params if p.dim() > 1], weight_decay=DECAY),
            dict(params=[p for p in params if p.dim() < 2], weight_decay=0.0),
        ],
        lr=LR,
        betas=BETAS,
        fused=True,
    )
    scaler = torch.amp.GradScaler(case.device, enabled=case.precision == "fp16")
    model = torch.compile(net) if compiled else net
    to_device = lambda b: [b[k].to(case.device, non_blocking=True) for k in ("input_ids", "labels")]
    batches = case.batches()
    following = to_device(batches[0])
    for step in range(1, case.steps + 1):
        ids, labels = following
        with torch.autocast(
            case.device, dict(bf16=torch.bfloat16, fp16=torch.float16)[case.precision]
        ):
            loss = model(ids, labels)
        if step < case.steps:
            following = to_device(batches[step])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.detach())
        clock.tick(step)
    return clock.facts(sum(p.numel() for p in params) - net.positions.weight.numel(), tens(losses))


def run(program: str, case: Case) -> dict:
    "Run a program in this process."
    kind, how = program.split()
    return (
        run_ours(case, OURS[program])
        if kind == "minigpt"
        else dict(Trainer=run_trainer, bare=run_bare)[kind](case, how == "compiled")
    )


# --- measurement ----------------------------------------------------------------------------------
def child(task: str, case: Case) -> dict | list:
    "Run a program, or `check eager compiled`, in this process."
    return check(case, task.split()[1:]) if task.startswith("check") else run(task, case)


def in_process(task: str, case: Case) -> dict | list:
    "Run it in its own process; compiled code is cached for the next round."
    cache = case.folder / f"cache of {task} {case.size} {case.precision}"
    env = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "inductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
    }
    done = subprocess.run(
        [sys.executable, __file__, "--child", task, json.dumps(asdict(case), default=str)],
        env=env,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"{task} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(
    names: list[str], case: Case, rounds: int, smoke: bool
) -> dict[str, list[dict]]:  # program → its measurements
    "Alternate the programs; one that fails (out of memory, for example) is reported and left out."
    results = {n: [] for n in names}
    for r in range(rounds):
        for name in list(results)[:: -1 if r % 2 else 1]:
            try:
                m = (
                    child(name, case)
                    if smoke and not name.startswith("bare")
                    else in_process(name, case)
                )
            except RuntimeError as e:
                print(e, flush=True)
                del results[name]
                continue
            assert m["losses"][-1] < m["losses"][0], (
                f"{name}: the loss does not fall: {m['losses']}"
            )
            results[name].append(m)
            print(
                f"  round {r + 1} {name:<22} {m['tokens_per_second']:11,.0f} tokens/s, loss"
                f" {m['losses'][0]:.3f} → {m['losses'][-1]:.3f}"
                + (f" ({m['note']})" if "note" in m else ""),
                flush=True,
            )
    check_equal_losses(results)
    return results


def check_equal_losses(results: dict[str, list[dict]]):
    "Check that the Trainer's losses equal ours."
    ours = next((v[0] for k, v in results.items() if k.startswith("minigpt")), None)
    for k, v in results.items():
        if ours and k.startswith("Trainer"):
            assert all(abs(x - y) < 0.05 * y for x, y in zip(v[0]["losses"], ours["losses"])), (
                f"{k}: losses are {v[0]['losses']}, ours {ours['losses']}"
            )


def table(
    results: dict[str, list[dict]], case: Case
) -> float | None:  # ours in its defaults / the fastest Trainer
    "Print one line per program."
    limit, whose = peak(case.precision)
    middle = {k: statistics.median(m["tokens_per_second"] for m in v) for k, v in results.items()}
    print(
        f"\n{case.size} {case.precision}: {case.batch} × {case.length} tokens per step,"
        f" {case.steps - case.warm} steps; peak {limit / 1e12:,.3g} TFLOP/s ({whose})"
    )
    print(f"{'program':<24}{'parameters':>12}{'tokens/s':>12}{'MFU':>7}{'memory':>11}{'first':>9}")
    for k, v in results.items():
        use = middle[k] * flops_per_token(v[0]["params"], case.shape, case.length) / limit
        print(
            f"{k:<24}{v[0]['params']:12,}{middle[k]:12,.0f}{use:7.1%}"
            f"{max(m['memory'] for m in v) / 2**30:7.1f}"
            f" GiB{v[0]['first']:7.1f} s"
        )
    trainers = [k for k in results if k.startswith("Trainer")]
    if "minigpt fit" not in results or not trainers:
        return None
    best = max(trainers, key=middle.get)
    ratio = statistics.median(
        a["tokens_per_second"] / b["tokens_per_second"]
        for a, b in zip(results["minigpt fit"], results[best])
    )
    print(f"{case.size} {case.precision}: minigpt fit / {best} {ratio:.2f}\n", flush=True)
    return ratio


def default_batch() -> int:
    "Return how many sequences of 1,024 tokens fit into memory with every program."
    import torch

    gib = torch.cuda.get_device_properties(0).total_memory / 2**30
    return 64 if gib > 100 else 32 if gib > 70 else 12 if gib > 35 else 8 if gib > 20 else 4


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--sizes", nargs="+", default=["124M", "medium"], choices=SIZES)
    p.add_argument(
        "--precisions",
        nargs="+",
        choices=["bf16", "fp16"],
        help="default: both, but only fp16 before Ampere, which has no bf16",
    )
    p.add_argument(
        "--only",
        nargs="+",
        default=[""],
        metavar="WORD",
        help="programs with one of these words in their name",
    )
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument(
        "--steps",
        type=int,
        default=50,
        help="steps to measure, a multiple of 10; 10 more are run",
    )
    p.add_argument(
        "--batch", type=int, help="sequences per step; default: depends on the memory of the GPU"
    )
    p.add_argument(
        "--smoke",
        action="store_true",
        help="a tiny model on the CPU, in one round, mostly in one process",
    )
    p.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.smoke:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    if a.child:
        print(json.dumps(child(a.child[0], Case(**json.loads(a.child[1])))))
        return
    if a.steps < 10 or a.steps % 10 or a.rounds < 1:
        p.error("--steps must be a multiple of 10, --rounds at least 1")
    if not gpu() and not a.smoke:
        print(
            "torch finds no CUDA device: nothing is measured (--smoke runs a tiny model on the CPU)"
        )
        return

    import importlib.util

    import torch

    names = [n for n in (SMOKE if a.smoke else PROGRAMS) if any(w in n for w in a.only)]
    if not importlib.util.find_spec("transformers") or not importlib.util.find_spec("accelerate"):
        print("transformers or accelerate is not installed: no Trainer")
        names = [n for n in names if not n.startswith("Trainer")]
    sizes, length, batch = (
        (["smoke"], 32, 4) if a.smoke else (a.sizes, 1024, a.batch or default_batch())
    )
    precisions = (
        ["bf16"]
        if a.smoke
        else a.precisions
        or (["bf16", "fp16"] if torch.cuda.get_device_capability() >= (8, 0) else ["fp16"])
    )
    if a.smoke:
        a.rounds, a.steps = 1, 10
        torch.set_num_threads(1)
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if gpu() else 'CPU'}")
    ratios = []
    with tempfile.TemporaryDirectory() as folder:
        prepare(folder := Path(folder), 0.2 if a.smoke else 4)
        for size in sizes:
            for precision in precisions:
                case = Case(folder, size, precision, batch, length, 10 + a.steps, 10)
                lines = (
                    child("check eager", case)
                    if a.smoke
                    else in_process("check eager compiled", case)
                )
                print(f"{size}, correctness", *lines, sep="\n  ", flush=True)
                ratios.append(table(measure(names, case, a.rounds, a.smoke), case))
    if ratios[0]:
        print(f"ratio {ratios[0]:.2f}")


if __name__ == "__main__":
    main()
