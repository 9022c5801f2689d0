"""What does saving cost? The time that it blocks training, compared with other ways to save.

    python -m bench.checkpoint                    # small and medium, 3 rounds; 4 minutes on 2 cores
    python -m bench.checkpoint --presets small

The others are a blocking `torch.save` and `torch.distributed.checkpoint.async_save`. The benchmark
needs 8 GB of memory and of disk.

The state is a model with AdamW's moments, fp32, on the CPU. "copy" is the minimum that any save
must do between two steps: copy the state into existing buffers. A stall is the time that the call
blocks training; the file is complete later. The first save of a run also allocates the buffers and
is listed separately. "beside a save": the same training steps (batch 2 of 256 tokens, 2 threads)
with and without a running save. "the disk": write and flush as many bytes in one file. "resume":
read and verify the checkpoint, restore model, optimizer and random states, and train one step.
Methods alternate; the figures are medians over the rounds. The last line is the highest ratio of
our stall to the copy.
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def setup(preset):
    import torch

    from minigpt.checkpoint.store import State, pack_optimizer, pack_rng
    from minigpt.model.gpt import GPT, GPTConfig
    from minigpt.tokenizer.bpe import train_tokenizer

    torch.manual_seed(0)
    tok = train_tokenizer(["Saving costs time. 保存需要时间。"] * 9, vocab_size=300)
    model = GPT(GPTConfig.preset(preset))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(0, 20_000, (2, 257))

    def step():
        model.loss(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    def state(n):
        return State(
            model.config,
            model.weights(),
            tok,
            dict(global_step=n),
            {},
            pack_optimizer(optimizer, model),
            pack_rng(),
        )

    step()
    return model, optimizer, step, state


def timed(f):
    began = time.perf_counter()
    f()
    return time.perf_counter() - began


def measure(preset, rounds, folder, threads):
    import psutil
    import torch
    import torch.distributed.checkpoint as dcp

    from minigpt.checkpoint.store import (
        CheckpointStore,
        Writer,
        read_checkpoint,
        state_size,
        unpack_optimizer,
        unpack_rng,
    )

    torch.set_num_threads(threads)
    rss = psutil.Process().memory_info
    model, optimizer, step, state = setup(preset)
    size = state_size(state(0))
    store, writer = CheckpointStore(folder / "ours", keep=1), Writer()
    before, peak = rss().rss, 0
    first = timed(lambda: writer.save(store, state(1)))
    while writer.busy:
        peak = max(peak, rss().rss)
        time.sleep(0.02)
    extra = (max(peak, rss().rss) - before) / size
    assert not writer.results()[0].error

    buffers = [
        (t, torch.empty_like(t))
        for part in (model.weights(), state(0).optimizer[0])
        for t in part.values()
    ]
    for t, b in buffers:
        b.copy_(t)

    def copy():
        [b.copy_(t) for t, b in buffers]

    everything = lambda: dict(model=model.state_dict(), optimizer=optimizer.state_dict())
    futures, ours_seconds, times = (
        [],
        [],
        {k: [] for k in ("copy", "minigpt", "torch.save", "dcp.async_save", "the disk")},
    )
    ballast = os.urandom(1 << 24)

    def disk():
        with open(folder / "ballast", "wb", buffering=0) as f:
            for _ in range(size // len(ballast)):
                f.write(ballast)
            os.fsync(f.fileno())

    def async_save():
        futures.append(
            dcp.async_save(everything(), checkpoint_id=str(folder / "dcp"), no_dist=True)
        )

    def blocking():
        torch.save(everything(), folder / "torch.pt")
        fd = os.open(folder / "torch.pt", os.O_RDONLY)
        os.fsync(fd)
        os.close(fd)

    for r in range(rounds):

        def ours():
            writer.save(store, state(10 + r))

        for name, f in list(dict(zip(times, (copy, ours, blocking, async_save, disk))).items())[
            :: -1 if r % 2 else 1
        ]:
            os.sync()
            times[name].append(timed(f))
            writer.wait()
            ours_seconds += [s.seconds for s in writer.results()]
            while futures:
                futures.pop().result()
    shutil.rmtree(folder / "dcp", ignore_errors=True)
    (folder / "torch.pt").unlink()
    (folder / "ballast").unlink()
    t = {k: statistics.median(v) for k, v in times.items()}
    del buffers

    # training during a save, alternating with training alone
    alone, beside = [], []
    for r in range(rounds):
        writer.save(store, state(100 + r))
        steps = []
        while writer.busy:
            steps.append(timed(step))
        beside += steps
        writer.results()
        alone += [timed(step) for _ in range(max(3, len(steps)))]
    under = statistics.mean(beside) / statistics.mean(alone) - 1

    def resume():
        s = read_checkpoint(store.all()[-1].path)
        model.load_weights(s.weights)
        unpack_optimizer(optimizer, model, s.optimizer)
        unpack_rng(s.rng)
        step()

    resumes = statistics.median(timed(resume) for _ in range(rounds))
    writer.close()

    print(f"\n{preset}: {model.config.n_params:,} parameters, state of {size / 1e6:,.0f} MB")
    rows = [
        ("copy into buffers that exist", f"{t['copy']:.3f} s", ""),
        ("stall: minigpt", f"{t['minigpt']:.3f} s", f"{t['minigpt'] / t['copy']:.2f} × the copy"),
        ("stall: minigpt, first save", f"{first:.3f} s", f"{first / t['copy']:.2f}"),
        (
            "stall: dcp.async_save",
            f"{t['dcp.async_save']:.3f} s",
            f"{t['dcp.async_save'] / t['copy']:.2f}",
        ),
        (
            "stall: torch.save, flushed",
            f"{t['torch.save']:.3f} s",
            f"{t['torch.save'] / t['copy']:.2f}",
        ),
        (
            "written and verified in",
            f"{statistics.median(ours_seconds):.2f} s",
            (
                f"{size / 1e6 / statistics.median(ours_seconds):,.0f} MB/s; the disk"
                f" {size / 1e6 / t['the disk']:,.0f}"
            ),
        ),
        (
            "training beside a save",
            f"{100 * under:+.0f}%",
            f"{len(beside)} steps of {statistics.mean(alone):.2f} s",
        ),
        ("resume to the first step", f"{resumes:.2f} s", ""),
        ("memory for a save", f"{extra:.2f} ×", "the state"),
    ]
    for name, value, note in rows:
        print(f"  {name:<30}{value:>10}   {note}")
    return t["minigpt"] / t["copy"]


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--presets", nargs="+", default=["small", "medium"])
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument("--folder", help="where to write; default: the temporary folder")
    a = p.parse_args()
    import torch

    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, {a.threads} threads, torch"
        f" {torch.__version__}"
    )
    ratios = []
    for preset in a.presets:
        with tempfile.TemporaryDirectory(dir=a.folder) as d:
            ratios.append(measure(preset, a.rounds, Path(d), a.threads))
    print(f"\nratio {max(ratios):.2f}")


if __name__ == "__main__":
    main()
