"""How large is each kind of checkpoint, and how long does it take to write and to open?

    python -m bench.export                                 # medium; 2 minutes on 2 cores
    python -m bench.export --preset small
    python -m bench.export --ways RUN --text FILE.txt      # a trained run, and unseen text

Checkpoints are those of a preset, with AdamW's moments: 1.3 GB of disk for `medium`. A size is the
total of all files of a directory. The weights are random and the optimizer has taken two steps: for
zstd this is noise, as trained weights are. "memory" is the peak of the process that exports, minus
what it has after the imports; the largest tensor of `medium` (the embedding) is 49 MiB. --ways
compares methods of 4-bit quantization: the matrices of a trained model are rounded to 4 bits, with
and without a search for the scale of least squared error, and the loss is evaluated in nats per
token. "symmetric" is -7 to 7, "signed" is -8 to 7 with the weight of largest magnitude at -8 (the
method of minigpt.model), "zero point" is from the smallest to the largest weight of the group.
"""

import argparse
import itertools
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
KINDS = {p: dict(precision=p) for p in ("fp32", "fp16", "bf16", "int8", "int4")} | {
    **{
        f"{p}, compressed": dict(precision=p, compress=True)
        for p in ("fp32", "bf16", "int8", "int4")
    },
    "best": dict(metrics=True),
    "full": dict(weights_only=False),
    "full, compressed": dict(weights_only=False, compress=True),
}


def peak():
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def checkpoint(preset, folder):
    "Write a full checkpoint of a model that has taken two steps."
    import torch

    from minigpt.checkpoint.store import State, pack_optimizer, pack_rng, write_checkpoint
    from minigpt.model.gpt import GPT, GPTConfig
    from minigpt.tokenizer.bpe import train_tokenizer

    torch.manual_seed(0)
    model = GPT(GPTConfig.preset(preset))
    opt = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        ids = torch.randint(0, model.config.vocab_size, (2, 129))
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        opt.step()
        opt.zero_grad()
    tok = train_tokenizer(["Small files. 小文件。"] * 9, vocab_size=300)
    write_checkpoint(
        folder / "checkpoint-2",
        State(
            model.config,
            model.weights(),
            tok,
            dict(global_step=2, loss=9.9),
            {},
            pack_optimizer(opt, model),
            pack_rng(),
        ),
    )


def export_one(folder, kind):
    "Export one kind in this process."
    from minigpt.checkpoint.exporter import export
    from minigpt.checkpoint.store import load_model
    from minigpt.core.files import dir_size

    before, began = peak(), time.perf_counter()
    out = export(
        folder / "checkpoint-2",
        folder / "out",
        replace=True,
        progress=lambda done, total: None,
        **KINDS[kind],
    )
    seconds, memory = time.perf_counter() - began, peak() - before
    began = time.perf_counter()
    if not kind.startswith("full, "):
        load_model(out)
    print(
        f"{kind:18} {dir_size(out) / 2**20:8.1f} MiB   written in {seconds:5.1f} s, memory"
        f" {memory / 2**20:4.0f} MiB   opened in {time.perf_counter() - began:4.1f} s"
    )


def compare_quantization(run, text, group_sizes=(32, 64, 128)):
    import torch
    import torch.nn.functional as F

    from minigpt.model.quantization import dequantize, group_shape, quantize
    from minigpt.run.folder import open_run

    run = open_run(run)
    model = run.model()
    n = 128
    ids = torch.tensor(run.tokenizer.encode(Path(text).read_text(encoding="utf-8")))[
        : 256 * (n + 1)
    ].view(-1, n + 1)
    originals = {k: v.clone() for k, v in model.weights().items() if v.dim() == 2}

    @torch.no_grad()
    def loss(change):
        for k, v in model.weights().items():
            if k in originals:
                v.copy_(change(originals[k]))
        return sum(
            model.loss(x[:, :-1].contiguous(), x[:, 1:].contiguous()).item() for x in ids.split(8)
        ) / len(ids.split(8))

    def quantize_matrix(w, group, method, search):
        rows, width = w.shape
        count, size = group_shape(width, group)
        x = F.pad(w, (0, count * size - width)).view(rows, count, size)
        best = None
        for shrink in (1, 0.95, 0.9, 0.85, 0.8) if search else (1,):
            if method == "symmetric":
                step, zero, low = x.abs().amax(-1, True) / 7, 0, -7
            elif method == "signed":
                step, zero, low = x.gather(-1, x.abs().argmax(-1, True)) / -8, 0, -8
            else:
                step, low = (x.amax(-1, True) - x.amin(-1, True)) / 15, -8
                zero = ((x.amax(-1, True) + x.amin(-1, True) + step) / 2).bfloat16().float()
            step = (step * shrink).bfloat16().float()
            y = ((x - zero) / torch.where(step == 0, 1.0, step)).round().clamp(low, 7) * step + zero
            error = (y - x).square().sum(-1, True)
            best = (
                (y, error)
                if best is None
                else (torch.where(error < best[1], y, best[0]), torch.minimum(error, best[1]))
            )
        return best[0].flatten(1)[:, :width]

    base = loss(lambda w: w)
    print(f"{run.path.name}: loss {base:.4f} on {ids[:, 1:].numel():,} tokens")
    for bits in (8, 4):
        print(
            f"minigpt.model.quantize, {bits} bits:"
            f" {loss(lambda w: dequantize(*quantize(w, bits), w.shape[1])) - base:+.4f}"
        )  # noqa: B023
    for method, group, search in itertools.product(
        ("symmetric", "signed", "zero point"), group_sizes, (False, True)
    ):
        bits = 4 + 16 / group * (1 + (method == "zero point"))
        print(
            f"{method:10} groups of {group:3} {'searched' if search else '        '} {bits:.2f}"
            " bits per weight:"
            f" {loss(lambda w: quantize_matrix(w, group, method, search)) - base:+.4f}",
            flush=True,
        )


def main():
    a = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    a.add_argument("--preset", default="medium")
    a.add_argument("--ways")
    a.add_argument("--text")
    a.add_argument("--one", nargs=2)
    a = a.parse_args()
    if a.one:
        return export_one(Path(a.one[0]), a.one[1])
    if a.ways:
        return compare_quantization(a.ways, a.text)
    with tempfile.TemporaryDirectory() as folder:
        checkpoint(a.preset, Path(folder))
        for kind in KINDS:
            subprocess.run([sys.executable, __file__, "--one", folder, kind], check=True)
    return None


if __name__ == "__main__":
    main()
