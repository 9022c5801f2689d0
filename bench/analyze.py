"""How long does it take to inspect a 1.5 GB checkpoint, and how much memory?

    python -m bench.analyze                # medium, 1.3 GB each; half a minute on 2 cores
    python -m bench.analyze --preset small

    sudo python -m bench.analyze --cold    # also once with an empty file cache

The files, one .pt file and our directory, contain AdamW's moments. The moments are zeros; names,
shapes and records are those that the programs write. Each file is analyzed in fresh processes; the
figures are medians over the rounds. The imports are timed separately, before `analyze`. Memory is
the peak of the process minus what it had after the imports. The goal is under 1 s and under 100 MB,
without importing torch or transformers. --cold slows down everything else on the machine for a
while.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

CHILD = """
import re, resource, sys, time
def peak():
    # ru_maxrss would be the parent's, if that was larger
    try: return int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])/1024
    except OSError: return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
t = time.perf_counter()
from minigpt.checkpoint.analysis import analyze
imports, before = time.perf_counter()-t, peak()
t = time.perf_counter()
a = analyze(sys.argv[1])
seconds = time.perf_counter()-t
memory = peak()-before
t = time.perf_counter(); str(a); shown = time.perf_counter()-t
import json
heavy = [m for m in ('torch', 'transformers', 'matplotlib', 'ipywidgets') if m in sys.modules]
print(json.dumps(dict(
    imports=imports, base=before, seconds=seconds, memory=memory, shown=shown, size=a.size,
    params=a.params, tensors=len(a.tensors), sum=sum(a.components.values()), heavy=heavy)))
"""


def write_checkpoints(folder, preset):
    "Write the same state as one .pt file and as our directory."
    import torch

    from minigpt.checkpoint.store import State, pack_rng, write_checkpoint
    from minigpt.model.gpt import GPT, GPTConfig, to_hf
    from minigpt.tokenizer.bpe import train_tokenizer

    config = GPTConfig.preset(preset)
    with torch.device("meta"):
        model = GPT(config)
    zeros = {
        k: torch.zeros(1).expand(p.shape) for k, p in model.named_parameters()
    }  # the moments share one number each in memory
    names = list(zeros)
    moments = {f"{m}/{k}": z for m in ("exp_avg", "exp_avg_sq") for k, z in zeros.items()} | {
        f"step/{k}": torch.tensor(9.0) for k in zeros
    }
    groups = [dict(lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1, params=names)]
    ours = write_checkpoint(
        folder / "checkpoint-500",
        State(
            config,
            zeros,
            train_tokenizer(["zeros"] * 9, vocab_size=300),
            dict(global_step=500, epoch=0.5),
            {},
            (moments, dict(optimizer="AdamW", numbers={}, groups=groups)),
            pack_rng(),
        ),
    )
    whole = {k: torch.zeros(p.shape) for k, p in model.named_parameters()}
    state = {
        i: dict(
            step=torch.tensor(9.0), exp_avg=torch.zeros(z.shape), exp_avg_sq=torch.zeros(z.shape)
        )
        for i, z in enumerate(whole.values())
    }
    torch.save(
        dict(
            model_state_dict=whole,
            optimizer_state_dict=dict(
                state=state, param_groups=[{**groups[0], "params": [*range(len(names))]}]
            ),
            scheduler_state_dict=dict(last_epoch=500),
            epoch=1,
            step=500,
            loss=2.5,
            best_loss=2.4,
            config=to_hf(config),
            model_info=dict(total_params=config.n_params, trainable_params=config.n_params),
        ),
        folder / "checkpoint_step_500.pt",
    )
    return [folder / "checkpoint_step_500.pt", ours], config.n_params


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--preset", default="medium")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument(
        "--cold", action="store_true", help="drop the file cache first; needs root on Linux"
    )
    p.add_argument("--folder", help="where to write; default: the temporary folder")
    a = p.parse_args()
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = lambda path: json.loads(
        subprocess.run(
            [sys.executable, "-c", CHILD, str(path)],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    )
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    worst = []
    with tempfile.TemporaryDirectory(dir=a.folder) as d:
        paths, params = write_checkpoints(Path(d), a.preset)
        for path in paths:
            if a.cold:
                os.sync()
                Path("/proc/sys/vm/drop_caches").write_text("3")
                cold = run(path)
            warm = [run(path) for _ in range(a.rounds)]
            r = {
                k: statistics.median(w[k] for w in warm)
                for k in ("imports", "base", "seconds", "memory", "shown")
            }
            assert all(
                w["params"] == params
                and not w["heavy"]
                and abs(w["sum"] - w["size"]) <= 0.01 * w["size"]
                for w in warm
            ), warm[0]
            print(
                f"\n{path.name}: {warm[0]['size'] / 1e6:,.0f} MB, {warm[0]['tensors']} tensors,"
                f" {params:,} parameters"
            )
            print(
                f"  analyze   {r['seconds'] * 1000:7.0f} ms   {r['memory']:5.0f} MB above the"
                " imports" + (f"   (cold {cold['seconds'] * 1000:.0f} ms)" if a.cold else "")
            )
            print(f"  as text   {r['shown'] * 1000:7.0f} ms")
            print(
                f"  imports   {r['imports'] * 1000:7.0f} ms   {r['base']:5.0f} MB in all"
                + (f"   (cold {cold['imports'] * 1000:.0f} ms)" if a.cold else "")
            )
            worst.append((r["seconds"], r["memory"]))
    print(
        f"\nworst {max(s for s, _ in worst):.2f} s, {max(m for _, m in worst):.0f} MB (goal: 1 s,"
        " 100 MB)"
    )


if __name__ == "__main__":
    main()
