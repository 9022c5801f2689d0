"""What it costs to be watched: redraws of the live view, and all that is logged and shown.

    python -m bench.live
    python -m bench.live --steps 40 --batch 8 --seq 512

The charts are drawn with few and with many points, beside Matplotlib's SVG and PNG of the same
losses; then `small` trains on this CPU, and the shares of all views and the intervals between the
updates of the live view are measured.
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


def ms(f, times: int) -> tuple[float, float]:
    """Median milliseconds on the clock, and lowest milliseconds of processor time.

    The second is little disturbed by other programs."""
    f()
    seen = []
    for _ in range(times):
        began = time.perf_counter(), time.thread_time()
        f()
        seen.append((time.perf_counter() - began[0], time.thread_time() - began[1]))
    return 1000 * statistics.median(w for w, _ in seen), 1000 * min(c for _, c in seen)


def redraws(times: int):
    from minigpt.run.metrics import Curves, losses_html, plot_losses

    def draw(curves, form):
        plot_losses(curves).savefig(io.BytesIO(), format=form)

    print(f"{'points':>8}  {'drawn as':34} {'ms':>6} {'cpu ms':>7} {'kB':>6}")
    for n in 1_000, 100_000:
        curves = Curves(rows(n))
        for name, f in {
            "HTML and SVG, all charts": lambda: losses_html(curves),
            "Matplotlib's PNG, losses only": lambda: draw(curves, "png"),
            "Matplotlib's SVG, losses only": lambda: draw(curves, "svg"),
        }.items():
            wall, cpu = ms(f, times)
            size = f"{len(losses_html(curves)) / 1000:6.1f}" if "HTML" in name else ""
            print(f"{n:8,}  {name:34} {wall:6.0f} {cpu:7.0f} {size}")


class Handle:
    "A display handle that records when it is updated."

    def __init__(self):
        self.times = []

    def update(self, bundle, raw):
        self.times.append(time.perf_counter())


def describe_intervals(times: list[float]) -> str:
    gaps = sorted(b - a for a, b in zip(times, times[1:]))
    if not gaps:
        return "one update"
    return f"{len(times)} updates, median {statistics.median(gaps):.2f} s, longest {gaps[-1]:.2f} s"


def share(steps: int, batch: int, seq: int, every: int):
    "Train, and measure what the views take."
    from minigpt.run.live import LiveLoss
    from minigpt.run.metrics import EventWriter, PlotWriter
    from minigpt.train.trainer import Callback, fit

    class Views(Callback):
        def __init__(self):
            self.spent, self.handles = {}, [Handle(), Handle()]

        def timed(self, name, f, *args):
            "Add the processor time of this thread."
            began = time.thread_time()
            result = f(*args)
            self.spent[name] = self.spent.get(name, 0) + time.thread_time() - began
            return result

        def on_start(self, t):
            write = t.metrics.write
            t.metrics.write = lambda **row: self.timed("metrics.jsonl", lambda: write(**row))
            self.live, self.plots = LiveLoss(t.run_path), PlotWriter(t.run_path)
            update = self.live.update
            self.live.update = lambda: self.timed("live view", update)
            self.live.views, self.live.show = self.handles, lambda: None
            self.live.start()
            try:
                self.events = EventWriter(t.run_path / "tensorboard")
            except ImportError:
                self.events = None
                print("tensorboard is not installed: without its files")
            self.began, self.first = time.perf_counter(), t.step

        def on_step(self, t):
            self.live.step = t.step

        def on_log(self, t, row):
            if self.events:
                self.timed("TensorBoard", self.events.log, row)

        def on_save(self, t, path):
            self.timed("request of a plot", self.plots.save, t.step)

        def on_end(self, t):
            self.seconds, self.n = time.perf_counter() - self.began, t.step - self.first
            self.live.finish()
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
        f" step; a row of metrics every {every}"
    )
    for name, s in views.spent.items():
        print(f"{name:22} {1000 * s / views.n:8.2f} ms per step {100 * s / views.seconds:6.2f}%")
    total = sum(views.spent.values())
    print(
        f"{'all':22} {1000 * total / views.n:8.2f} ms per step"
        f" {100 * total / views.seconds:6.2f}%   (goal: below 2%)"
    )
    for name, h in zip(("numbers", "charts"), views.handles):
        print(f"{name:22} {describe_intervals(h.times)}")


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
    share(a.steps, a.batch, a.seq, a.every)
