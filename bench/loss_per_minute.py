"""Validation loss on tiny Shakespeare that `fit` reaches in the time of nanoGPT's CPU recipe.

    python -m bench.loss_per_minute --nanogpt DIR      # about 4 minutes on 2 quiet cores
    python -m bench.loss_per_minute --seconds 85       # ours alone, in a given time
    python -m bench.loss_per_minute --gpu              # ours alone; about a minute on an H200

DIR is a checkout of github.com/karpathy/nanoGPT; --gpu uses the batches of its GPU recipe. A token
is a character.

The text is --text (default ../shared/data/tinyshakespeare.txt, next to the repository); its last
tenth is for validation, as in nanoGPT's prepare.py. nanoGPT runs in a copy of its folder, with the
CPU recipe of its README: 0.8M parameters, 2,000 steps of 12 × 64 characters. Ours is SHAPE and
RECIPE below: a smaller model, more tokens, Muon, a learning rate that decays linearly to zero. They
were found in trials of 65 s each on two cores, on the same validation split: 1.585 with 4 layers at
a rate of .01, 1.576 with 3, 1.558 at .007, 1.554 with norms on queries and keys, 1.549 at .008
after 20 steps of warm-up instead of 50; two equal trainings differ by up to .007. Worse were
windows of 256, 6 sequences per step, a width of 112 or 128, one key/value head, a rate of .005 or
.02, and no weight decay or twice as much. Each program is its own process, with the same number of
threads, and the time is that of the complete process: imports, tokens, training and checkpoints,
and nanoGPT's evaluations, which decide what it keeps. A short run first measures how many steps of
ours fit; 3% fewer are trained. The losses are computed afterwards over the complete validation
split, equally for both: it is cut into pieces of the model's context (64 and 128, or 256), and
every character but the first is predicted once. transformers opens our model and tokenizer for
that.

On a GPU nanoGPT's "baby GPT" reaches at best 1.4697 within 5,000 steps of 64 × 256 characters (its
README). Ours has the same width and depth, and starts to overfit soon: 1,000 steps are enough, and
with more it only memorizes the text. On an H200 (torch 2.11, bf16, `fit`'s own validation) the
trials ended at 1.448 with a dropout of .25 after 1,000 steps, and at 1.453 with .3 after 1,250; a
rate that decays over 2,500 steps reached 1.464 in between (.3), 1.469 (.4) and 1.478 (.2). The last
line is our loss; the one before it nanoGPT's.
"""

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NANOGPT = (
    "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64 --batch_size=12"
    " --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000 --lr_decay_iters=2000 --dropout=0.0"
)
SHAPE = dict(dim=96, n_layer=3, n_head=3, n_kv_head=3, ffn_dim=256, qk_norm=True)
RECIPE = dict(
    max_seq_len=128,
    batch_size=8,
    optimizer="muon",
    learning_rate=0.008,
    lr_schedule="linear",
    min_lr_ratio=0.0,
    warmup_steps=20,
    validation_split=0.0,
    plot_loss=False,
)
GPU_SHAPE = dict(
    dim=384, n_layer=6, n_head=6, n_kv_head=6, ffn_dim=1024, qk_norm=True, dropout=0.25
)
GPU_RECIPE = {
    **RECIPE,
    "max_seq_len": 256,
    "batch_size": 64,
    "learning_rate": 0.005,
    "warmup_steps": 100,
}
GPU_STEPS, GPU_NANOGPT = 1000, 1.4697


# --- ours -----------------------------------------------------------------------------------------
def run_ours(work: Path, out: Path, steps: int, threads: int, gpu: bool):
    "Run `fit` on the text, tokenized by character."
    from minigpt.model.gpt import GPTConfig
    from minigpt.tokenizer.bpe import characters
    from minigpt.train.trainer import Callback, fit

    tok, seen = characters((work / "text.txt").read_text("utf-8")), []

    class Tick(Callback):
        def on_step(self, t):
            seen.append(time.perf_counter())

    shape, recipe = (GPU_SHAPE, GPU_RECIPE) if gpu else (SHAPE, RECIPE)
    fit(
        GPTConfig(vocab_size=tok.vocab_size, **shape),
        work / "train.jsonl",
        tokenizer=tok,
        output_dir=out,
        max_steps=steps,
        num_threads=threads,
        progress=False,
        callbacks=[Tick()],
        **recipe,
    )
    times = [b - a for a, b in zip(seen, seen[1:])]
    return dict(step=statistics.median(times[9:] or times or [0.0]))


def score_ours(work: Path, out: Path, context: int) -> dict:
    "Return the loss of the finished run, opened by transformers."
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tok = (
        AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(out),
    )
    text = (work / "valid.txt").read_text("utf-8")
    ids = torch.tensor(tok(text, add_special_tokens=False)["input_ids"])
    assert len(ids) == len(text) and tok.decode(ids[:500]) == text[:500], (
        "a token must be a character"
    )
    return dict(
        loss=split_loss(lambda x: model(x).logits, ids, context), params=model.num_parameters()
    )


# --- nanoGPT --------------------------------------------------------------------------------------
def run_nanogpt(work: Path, threads: int) -> float:
    "Run its train.py; return the seconds."
    subprocess.run(
        [sys.executable, "data/shakespeare_char/prepare.py"],
        cwd=work / "nanoGPT",
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return timed(
        [sys.executable, "train.py", "config/train_shakespeare_char.py", *NANOGPT.split()],
        work / "nanoGPT",
        threads,
    )[0]


def score_nanogpt(work: Path) -> dict:
    "Return the loss of the checkpoint that it kept."
    import numpy as np
    import torch

    sys.path.insert(0, str(work / "nanoGPT"))
    from model import GPT, GPTConfig

    kept = torch.load(work / "nanoGPT" / "out-shakespeare-char" / "ckpt.pt", weights_only=True)
    model = GPT(GPTConfig(**kept["model_args"])).eval()
    model.load_state_dict(kept["model"])
    ids = torch.from_numpy(
        np.fromfile(work / "nanoGPT" / "data" / "shakespeare_char" / "val.bin", np.uint16).astype(
            np.int64
        )
    )
    return dict(
        loss=split_loss(lambda x: model(x, x)[0], ids, model.config.block_size),
        params=model.get_num_params(),
        step=kept["iter_num"],
    )


# --- measurement ----------------------------------------------------------------------------------
def split_loss(logits, ids, T: int) -> float:
    "Return nats per character over pieces of `T`; each character but the first is predicted once."
    import torch
    import torch.nn.functional as F

    n = (len(ids) - 1) // T
    pieces = [
        *torch.stack([ids[i * T : (i + 1) * T + 1] for i in range(n)]).split(64),
        ids[None, n * T :],
    ]
    with torch.inference_mode():
        return sum(
            F.cross_entropy(
                logits(p[:, :-1].contiguous()).flatten(0, 1), p[:, 1:].flatten(), reduction="sum"
            ).item()
            for p in pieces
            if p.shape[1] > 1
        ) / (len(ids) - 1)


def timed(command: list, cwd: Path, threads: int, gpu: bool = False):
    "Run a process; return its seconds and the last line that it prints."
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        **({} if gpu else {"CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    began = time.perf_counter()
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{command[1]} failed:\n{done.stderr[-4000:]}")
    return time.perf_counter() - began, done.stdout.splitlines()[-1]


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument(
        "--text", type=Path, default=ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
    )
    p.add_argument(
        "--nanogpt",
        type=Path,
        help="folder with the source of nanoGPT; without it, only ours is measured",
    )
    p.add_argument("--seconds", type=float, default=85, help="time for ours if nanoGPT is not run")
    p.add_argument("--steps", type=int, default=0, help="steps of ours; 0: as many as fit")
    p.add_argument(
        "--gpu",
        action="store_true",
        help="use nanoGPT's GPU batches and a fixed number of --steps instead of a time",
    )
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child:
        print(json.dumps(run_ours(Path(a.child[0]), Path(a.child[1]), a.steps, a.threads, a.gpu)))
        return
    if a.gpu:
        a.nanogpt, a.steps = None, a.steps or GPU_STEPS
    if not a.text.exists():
        sys.exit(f"not found: {a.text}; set --text")
    import torch

    if a.gpu:
        print(
            (
                torch.cuda.get_device_name()
                if torch.cuda.is_available()
                else "torch finds no CUDA device: this takes hours"
            ),
            flush=True,
        )
    print(
        f"{os.cpu_count()} cores ({platform.machine()}, load"
        f" {', '.join(f'{l:.1f}' for l in os.getloadavg())}), {a.threads} threads, Python"
        f" {platform.python_version()}, torch {torch.__version__}",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as work:
        work, text = Path(work), a.text.read_text("utf-8")
        cut = int(0.9 * len(text))
        (work / "text.txt").write_text(text, "utf-8")
        (work / "valid.txt").write_text(text[cut:], "utf-8")
        (work / "train.jsonl").write_text(json.dumps(dict(text=text[:cut])), "utf-8")
        ours = lambda out, steps: timed(
            [
                sys.executable,
                __file__,
                "--child",
                str(work),
                str(work / out),
                "--steps",
                str(steps),
                "--threads",
                str(a.threads),
                *["--gpu"] * a.gpu,
            ],
            work,
            a.threads,
            a.gpu,
        )
        results = []
        if a.nanogpt:
            shutil.copytree(
                a.nanogpt, work / "nanoGPT", ignore=shutil.ignore_patterns(".git", "out*")
            )
            shutil.copy(a.text, work / "nanoGPT" / "data" / "shakespeare_char" / "input.txt")
            a.seconds, s = run_nanogpt(work, a.threads), score_nanogpt(work)
            results.append(
                f"nanoGPT {s['loss']:.4f} in {a.seconds:.0f} s: {s['params']:,} parameters, best of"
                f" its 2,000 steps at {s['step']:,}"
            )
            print(results[-1], flush=True)
        if not a.steps:
            seconds, line = ours("short", 60)
            step = json.loads(line)["step"]
            a.steps = int(0.97 * (a.seconds - seconds) / step + 60)
            print(
                f"each step of ours takes {1000 * step:.0f} ms, all else {seconds - 60 * step:.0f}"
                f" s: {a.steps:,} steps",
                flush=True,
            )
        seconds, _ = ours("run", a.steps)
        s = score_ours(work, work / "run", (GPU_RECIPE if a.gpu else RECIPE)["max_seq_len"])
        if a.gpu:
            results.append(f"nanoGPT {GPU_NANOGPT} at best in 5,000 steps, according to its README")
        print(
            *results,
            f"minigpt {s['loss']:.4f} in {seconds:.0f} s: {s['params']:,} parameters, {a.steps:,}"
            " steps"
            + (
                f" (MORE than the {a.seconds:.0f} s available: the machine was busier)"
                if seconds > 1.02 * a.seconds and not a.gpu
                else ""
            ),
            sep="\n",
        )


if __name__ == "__main__":
    main()
