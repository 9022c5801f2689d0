"""What do views of a run cost: redraws of the live view, logging and plots?

    python -m bench.live
    python -m bench.live --steps 40 --batch 8 --seq 512

The view is redrawn with few and with many points; the other costs are a share of a CPU step of
`small`.
"""

import argparse
import io
import math
import os
import random
import statistics
import tempfile
import time
from pathlib import Path


def rows(n: int):
    rng = random.Random(0)
    for s in range(1, n + 1):
        yield dict(
            step=s,
            loss=3 + 4 * math.exp(-5 * s / n) + rng.gauss(0, 0.1),
            lr=1e-3,
            grad_norm=1 + rng.random(),
            tokens_per_second=9000 + rng.gauss(0, 200),
            memory=1e9,
            time=1e9 + s,
            **(dict(eval_loss=3.1) if s % 500 == 0 else {}),
        )


def milliseconds(f, times: int) -> tuple[float, float]:
    """Return the median wall time and the lowest processor time, in milliseconds.

    Other programs hardly affect the second.
    """
    f()
    seen = []
    for _ in range(times):
        began = time.perf_counter(), time.thread_time()
        f()
        seen.append((time.perf_counter() - began[0], time.thread_time() - began[1]))
    return 1000 * statistics.median(w for w, _ in seen), 1000 * min(c for _, c in seen)


def redraws(times: int):
    from minigpt.run import metrics as monitor

    print(f"{'points':>8}  {'drawn on':34} {'ms':>6} {'cpu ms':>7}")
    downsample = monitor.downsample
    for n in 1_000, 100_000:
        curves = monitor.Curves(rows(n))
        kept = monitor.LossFigure()

        def full():
            monitor.downsample = lambda x, y, width: (x, y)
            try:
                kept.png(curves)
            finally:
                monitor.downsample = downsample

        for name, f in {
            "the same figure, decimated": lambda: kept.png(curves),
            "the same figure, all points": full,
            "a fresh figure, decimated": lambda: monitor.LossFigure().png(curves),
            "plot_losses, fresh (at a save)": (
                lambda: monitor.plot_losses(curves).savefig(io.BytesIO(), format="png")
            ),
        }.items():
            wall, cpu = milliseconds(f, times)
            print(f"{n:8,}  {name:34} {wall:6.0f} {cpu:7.0f}")


def view_share(steps: int, batch: int, seq: int, every: int):
    "Train, and time the views in the training thread."
    from minigpt.run.metrics import EventWriter, PlotWriter
    from minigpt.train.trainer import Callback, fit
    from minigpt.widgets import LiveLoss

    class Views(Callback):
        def __init__(self):
            self.spent, self.redraws = {}, 0

        def timed(self, name, f, *args):
            began = time.perf_counter()
            r = f(*args)
            self.spent[name] = self.spent.get(name, 0) + time.perf_counter() - began
            return r

        def on_start(self, t):
            write = t.metrics.write
            t.metrics.write = lambda **row: self.timed("metrics.jsonl", lambda: write(**row))
            self.live, self.plots = LiveLoss(t.run_path), PlotWriter(t.run_path)
            self.live.widget
            try:
                self.events = EventWriter(t.run_path / "tensorboard")
            except ImportError:
                self.events = None
                print("tensorboard is not installed: its files are not measured")
            self.began, self.first = time.perf_counter(), t.step

        def on_log(self, t, row):
            if self.events:
                self.timed("TensorBoard", self.events.log, row)
            self.redraws += self.timed("live view", self.live.update)

        def on_save(self, t, path):
            self.timed("asking for a picture", self.plots.save, t.step)

        def on_end(self, t):
            self.seconds, self.n = time.perf_counter() - self.began, t.step - self.first
            self.plots.close()

    views = Views()
    with tempfile.TemporaryDirectory() as d:
        fit(
            "small",
            "stories",
            output_dir=Path(d) / "run",
            tokenizer_vocab_size=2000,
            max_steps=steps,
            batch_size=batch,
            max_seq_len=seq,
            logging_steps=every,
            evaluation_strategy="no",
            progress=False,
            plot_loss=False,
            callbacks=[views],
        )
    print(
        f"\n`small`, {views.n} steps of {batch} × {seq} tokens, {views.seconds / views.n:.2f} s per"
        f" step; a line every {every}, {views.redraws} redraws"
    )
    for name, s in views.spent.items():
        print(f"{name:22} {1000 * s / views.n:8.2f} ms per step {100 * s / views.seconds:6.2f}%")
    print(
        f"{'all':22} {1000 * sum(views.spent.values()) / views.n:8.2f} ms per step"
        f" {100 * sum(views.spent.values()) / views.seconds:6.2f}%   (goal: below 2%)"
    )


if __name__ == "__main__":
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--steps", type=int, default=20)
    p.add_argument("--batch", type=int, default=2)
    p.add_argument("--seq", type=int, default=256)
    p.add_argument("--every", type=int, default=1, help="steps between lines of metrics (fit: 10)")
    p.add_argument("--times", type=int, default=15)
    a = p.parse_args()
    print(f"{os.cpu_count()} cores, load {', '.join(f'{l:.1f}' for l in os.getloadavg())}")
    redraws(a.times)
    view_share(a.steps, a.batch, a.seq, a.every)
