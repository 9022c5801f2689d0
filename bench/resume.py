"""How long does a resume take to its first batch, at step 10 and at step 1,000,000 of a large set?

    python -m bench.resume

It writes a token set (1 GB of real bytes by default; `--sparse` takes no disk space), and starts a
fresh process for each measurement, alternating between near and far steps. The time is that of a
resume: open the set, create the loader of the remaining steps, get the first batch. `import torch`
is not included. The pages of the set are in memory before the first measurement as far as they fit,
so both steps read from the same source.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CHILD = """
import sys, time
import torch
from torch.utils.data import DataLoader
from minigpt.data.tokensets import TokenSet, loader
path, step, batch, seq_len, workers = sys.argv[1], *map(int, sys.argv[2:])
t = time.perf_counter()
first = next(iter(loader(TokenSet(path), range(step, step+1_000_000), batch, seq_len, 0, workers)))
print(time.perf_counter()-t, int(first["input_ids"].sum()))
"""


def write_token_set(folder, gigabytes, sparse):
    "Write a token set without a text."
    import numpy as np

    n = int(gigabytes * 1e9) // 2
    with open(folder / "tokens.bin", "wb") as f:
        if sparse:
            f.truncate(2 * n)
        else:
            rng = np.random.default_rng(0)
            for at in range(0, n, 1 << 24):
                rng.integers(0, 20_000, min(1 << 24, n - at), dtype=np.uint16).tofile(f)
    (folder / "meta.json").write_text(
        json.dumps(
            dict(
                format="minigpt token set",
                version=1,
                n_tokens=n,
                n_docs=1,
                dtype="uint16",
                fingerprint="0" * 32,
                sources=[],
                tokenizer="",
                options={},
                refused={},
            )
        )
    )
    return n


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--gigabytes", type=float, default=1.0, help="size of tokens.bin")
    ap.add_argument("--sparse", action="store_true", help="a file of holes instead of real bytes")
    ap.add_argument("--near", type=int, default=10)
    ap.add_argument("--far", type=int, default=1_000_000)
    ap.add_argument("--batch", type=int, default=16)
    ap.add_argument("--seq-len", type=int, default=512)
    ap.add_argument("--workers", type=int, default=0)
    ap.add_argument("--repeats", type=int, default=9)
    a = ap.parse_args()
    with tempfile.TemporaryDirectory(prefix="minigpt-resume-") as folder:
        n = write_token_set(Path(folder), a.gigabytes, a.sparse)
        steps = n // a.seq_len // a.batch
        print(
            f"{n:,} tokens, {'sparse' if a.sparse else 'real'}; {a.batch} × {a.seq_len}: {steps:,}"
            f" steps per epoch, step {a.far:,} is in epoch {a.far // steps}; {a.repeats} fresh"
            " processes each, alternating"
        )
        times = {a.near: [], a.far: []}
        for r in range(a.repeats + 1):  # the first round is a warm-up
            for step in times if r % 2 else reversed(times):
                out = subprocess.run(
                    [
                        sys.executable,
                        "-c",
                        CHILD,
                        folder,
                        *map(str, (step, a.batch, a.seq_len, a.workers)),
                    ],
                    capture_output=True,
                    text=True,
                    check=True,
                    cwd=ROOT,
                ).stdout.split()
                if r:
                    times[step].append(float(out[0]) * 1000)
    print(f"\n{'step':>12}  {'median ms':>9}  {'least ms':>9}  {'most ms':>9}")
    for step, ms in times.items():
        print(f"{step:>12,}  {statistics.median(ms):>9.2f}  {min(ms):>9.2f}  {max(ms):>9.2f}")
    print(f"ratio {statistics.median(times[a.far]) / statistics.median(times[a.near]):.2f}")


if __name__ == "__main__":
    main()
