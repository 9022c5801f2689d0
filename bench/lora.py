"""Full fine-tuning, our LoRA and PEFT's: trained parameters, sizes, and speed.

    python -m bench.lora                     # `small`, 3 rounds of 8 steps on the CPU
    python -m bench.lora --device cuda --batch 16 --seq 512 --steps 40

All three start from the same weights, adapters included, and train on the same batches with AdamW
in fp32, gradients clipped at 1, one learning rate; both adapters have rank 8 on every matrix of the
blocks. Each measurement runs in its own process, and the order changes every round.

full         `minigpt.train.fit` on the model
LoRA         `fit` on `lora(model)`
PEFT         Hugging Face Trainer on `get_peft_model`, set up as in bench/train_cpu.py: no logging,
             no evaluation, batches prepared as tensors

step         median over the steps after the first three
memory       peak of the process in these steps, minus what it had after the imports; on a GPU, the
             peak that was allocated
weights      size of the file with the model or the adapter
checkpoint   size of the directory that a resume needs, with optimizer and random states
The losses of LoRA and PEFT must be equal to 0.5% in every step. As in bench/train_cpu.py, a
measurement waits for a quiet machine and is repeated if other programs used more than a fifth of a
core.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from train_cpu import Clock, quiet

from bench import train_cpu

WARM, VOCAB, RANK, LR = 3, 6400, 8, 1e-3


class Peak:
    "The peak memory between `start` and `end`, in MiB."

    def __init__(self, device: str):
        import psutil
        import torch

        self.torch, self.cuda, self.rss = torch, device == "cuda", psutil.Process().memory_info
        if self.cuda:
            torch.cuda.init()
        self.before, self.most, self.on = self.rss().rss, 0, False

    def start(self):
        if self.cuda:
            self.torch.cuda.reset_peak_memory_stats()
        self.on = True
        threading.Thread(target=self.watch, daemon=True).start()

    def watch(self):
        while self.on:
            self.most = max(self.most, self.rss().rss - self.before)
            time.sleep(0.005)

    def end(self) -> float:
        self.on = False
        return (self.torch.cuda.max_memory_allocated() if self.cuda else self.most) / 2**20


def size(path: Path) -> float:
    "Return the MiB of a file or a directory."
    return (
        sum(
            f.stat().st_size for f in ([path] if path.is_file() else path.rglob("*")) if f.is_file()
        )
        / 2**20
    )


def prepare(folder: Path, a):
    "As bench/train_cpu.py; also write an adapter's initial weights under PEFT's names."
    from safetensors.torch import save_file

    train_cpu.prepare(folder, a.steps)
    save_file(adapted(folder).weights(), folder / "adapter.safetensors")


def plain(folder: Path):
    from safetensors.torch import load_file

    from minigpt.model.gpt import GPT, GPTConfig

    return (
        GPT(GPTConfig(**train_cpu.SHAPE))
        .requires_grad_(False)
        .load_weights(load_file(folder / "weights.safetensors"))
        .requires_grad_(True)
    )


def adapted(folder: Path):
    from minigpt.model.adapters import lora

    return lora(plain(folder), RANK, 2 * RANK)


def run_ours(folder: Path, out: Path, a, adapter: bool) -> dict:
    from minigpt.data.tokensets import TokenSet
    from minigpt.run.folder import open_run
    from minigpt.tokenizer.bpe import load_tokenizer
    from minigpt.train.trainer import Callback, fit

    peak, clock, found = Peak(a.device), Clock(), {}

    class Tick(Callback):
        def on_step(self, t):
            if a.device == "cuda":
                peak.torch.cuda.synchronize()
            clock.tick(t.step)
            if t.step == WARM:
                peak.start()
            if t.step == a.steps - 1:
                found["memory"] = peak.end()

    model = (adapted if adapter else plain)(folder)
    fit(
        model,
        TokenSet(folder / "data" / "train"),
        tokenizer=load_tokenizer(folder / "tokenizer"),
        output_dir=out,
        callbacks=[Tick()],
        max_steps=a.steps,
        batch_size=a.batch,
        max_seq_len=a.seq,
        device=a.device,
        precision="fp32",
        enable_compile=a.compile,
        learning_rate=LR,
        lr_schedule="constant",
        warmup_steps=0,
        weight_decay=0.0,
        logging_steps=1,
        num_threads=a.threads,
        progress=False,
        plot_loss=False,
        tensorboard=False,
    )
    saved = out / "checkpoints" / f"checkpoint-{a.steps}"
    weights = next(
        f for n in ("adapter_model.safetensors", "model.safetensors") if (f := saved / n).exists()
    )
    return dict(
        clock.facts(WARM, a.steps - 1),
        **found,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        weights=size(weights),
        checkpoint=size(saved),
        losses=[r["loss"] for r in open_run(out).history if "loss" in r],
    )


def run_peft(folder: Path, out: Path, a) -> dict:
    import torch
    from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
    from safetensors.torch import load_file
    from transformers import TrainerCallback, TrainingArguments

    torch.set_num_threads(a.threads)
    peak, clock, found, losses = Peak(a.device), Clock(), {}, []

    class Tick(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if a.device == "cuda":
                torch.cuda.synchronize()
            clock.tick(state.global_step)
            if state.global_step == WARM:
                peak.start()
            if state.global_step == a.steps - 1:
                found["memory"] = peak.end()

    OurTrainer, batches = train_cpu.hf_trainer(folder, losses)
    model = get_peft_model(
        train_cpu.hf_llama(folder, "sdpa"),
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    assert not set_peft_model_state_dict(
        model, load_file(folder / "adapter.safetensors")
    ).unexpected_keys
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=a.steps,
        per_device_train_batch_size=a.batch,
        use_cpu=a.device == "cpu",
        optim="adamw_torch_fused",
        learning_rate=LR,
        weight_decay=0.0,
        adam_beta2=0.99,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="steps",
        save_steps=a.steps,
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
    )
    OurTrainer(
        model=model,
        args=args,
        train_dataset=batches,
        data_collator=lambda batch: batch,
        callbacks=[Tick()],
    ).train()
    saved = out / f"checkpoint-{a.steps}"
    return dict(
        clock.facts(WARM, a.steps - 1),
        **found,
        trained=sum(p.numel() for p in model.parameters() if p.requires_grad),
        weights=size(saved / "adapter_model.safetensors"),
        checkpoint=size(saved),
        losses=torch.stack(losses).tolist(),
    )


PROGRAMS = dict(
    full=lambda *x: run_ours(*x, adapter=False),
    LoRA=lambda *x: run_ours(*x, adapter=True),
    PEFT=run_peft,
)


def measure(program: str, folder: Path, a) -> dict:
    "Run one program in its own process; repeat if another program used processor time."
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(a.threads),
        "MKL_NUM_THREADS": str(a.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    } | ({"CUDA_VISIBLE_DEVICES": ""} if a.device == "cpu" else {})
    options = [
        f"--{k}={getattr(a, k)}"
        for k in ("preset", "steps", "batch", "seq", "threads", "device", "compile")
    ]
    for tries_left in reversed(range(1 + a.retries)):
        quiet(a.wait)
        with tempfile.TemporaryDirectory() as out:
            done = subprocess.run(
                [
                    sys.executable,
                    "-m",
                    "bench.lora",
                    *options,
                    "--child",
                    program,
                    str(folder),
                    out,
                ],
                env=env,
                capture_output=True,
                text=True,
            )
        if done.returncode:
            sys.exit(f"{program} failed:\n{done.stderr[-4000:]}")
        m = json.loads(done.stdout.splitlines()[-1])
        disturbed = m["others"] > 0.2
        print(
            f"{program:<6}{m['step_ms']:8,.0f} ms per step, {m['memory']:,.0f} MiB, others"
            f" {m['others']:.2f} cores, loss {m['losses'][0]:.4f} → {m['losses'][-1]:.4f}"
            + (", again" if disturbed and tries_left else ""),
            flush=True,
        )
        if not disturbed:
            break
    return m


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--preset", default="small", help="tiny, small, medium or large")
    p.add_argument("--steps", type=int, default=8, help="steps to measure; 4 more are run")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--batch", type=int, default=4)
    p.add_argument("--seq", type=int, default=256)
    p.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    p.add_argument("--compile", default="no", help="torch.compile in ours: no, yes or auto")
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument(
        "--wait",
        type=float,
        default=30,
        help="maximum seconds to wait before each measurement until other programs are idle",
    )
    p.add_argument(
        "--retries",
        type=int,
        default=2,
        help=(
            "how often to repeat a measurement if other programs used more than a fifth of a core"
        ),
    )
    p.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    from minigpt.model.gpt import PRESETS

    train_cpu.SHAPE, train_cpu.BATCH, train_cpu.SEQ = (
        dict(PRESETS[a.preset], vocab_size=VOCAB, max_len=a.seq),
        a.batch,
        a.seq,
    )
    if a.child:
        print(json.dumps(PROGRAMS[a.child[0]](Path(a.child[1]), Path(a.child[2]) / "run", a)))
        return
    a.steps += WARM + 1
    import peft
    import torch
    import transformers

    print(
        f"{os.cpu_count()} cores ({platform.machine()}, load"
        f" {', '.join(f'{l:.1f}' for l in os.getloadavg())}), {a.threads} threads, {a.device},"
        f" torch {torch.__version__}, transformers {transformers.__version__}, peft"
        f" {peft.__version__}"
    )
    results = {name: [] for name in PROGRAMS}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), a)
        for r in range(a.rounds):
            print(f"round {r + 1}")
            for name in list(results)[:: -1 if r % 2 else 1]:
                results[name].append(measure(name, Path(folder), a))
            ours, theirs = (results[k][-1]["losses"] for k in ("LoRA", "PEFT"))
            assert all(abs(x - y) < 0.005 * y for x, y in zip(ours, theirs)), (
                f"the losses of LoRA and PEFT differ: {ours} and {theirs}"
            )
    middle = {
        k: {
            f: statistics.median(m[f] for m in v)
            for f in ("trained", "step_ms", "memory", "weights", "checkpoint")
        }
        for k, v in results.items()
    }
    total = middle["full"]["trained"]
    print(
        f"\n{a.preset}, {total:,.0f} parameters; {a.batch} × {a.seq} tokens per step, fp32; medians"
        f" of {a.rounds}\n\n{'':6}{'trained':>12}{'share':>8}{'step':>10}{'memory':>12}"
        f"{'weights':>11}{'checkpoint':>13}"
    )
    for k, m in middle.items():
        print(
            f"{k:6}{m['trained']:12,.0f}{m['trained'] / total:8.2%}{m['step_ms']:7,.0f}"
            f" ms{m['memory']:8,.0f} MiB{m['weights']:7,.1f} MiB{m['checkpoint']:9,.1f} MiB"
        )
    if noisy := sum(m["others"] > 0.2 for v in results.values() for m in v):
        print(
            f"{noisy} of {sum(map(len, results.values()))} measurements were disturbed by other"
            " programs: measure again on a quiet machine"
        )
    print(
        f"PEFT / LoRA: step {middle['PEFT']['step_ms'] / middle['LoRA']['step_ms']:.2f}, memory"
        f" {middle['PEFT']['memory'] / middle['LoRA']['memory']:.2f}"
    )


if __name__ == "__main__":
    main()
