"""How often is a run that is killed at a random moment bit-identical to an uninterrupted one?

    python -m bench.kill --trials 20

Each trial trains in its own process, kills it with SIGKILL at a moment drawn uniformly from the
duration of the run (start-up and saves included), and repeats the same call until the run is
finished. It then compares every loss as `float.hex`, the final weights, the optimizer and the
random states. Half of the trials write snapshots all the time and copy them to a backup. In a fifth
of the trials the machine is lost with the kill: only the backup is left, and a second kill comes
during the restore. "repeated" is how many steps were trained twice: at most one save interval, plus
the steps that were trained while a checkpoint was being written; if the machine was lost, the
backup may also be one save behind at each of the two kills.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.harness import kill_child as child

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

# Seconds added to each step of 10 ms, so that a save takes one or two steps, as in a real run.
PAUSE = 0.02


def main():
    ap = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    ap.add_argument("--trials", type=int, default=20, help="number of trials")
    ap.add_argument("--kills", type=int, default=1, help="kills per trial")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--jobs", type=int, default=1, help="trials that run in parallel")
    ap.add_argument("--keep", action="store_true", help="keep the folders of trials that differ")
    a = ap.parse_args()
    rng, folder = random.Random(a.seed), Path(tempfile.mkdtemp(prefix="minigpt-kill-"))
    began = time.perf_counter()
    ref = child.reference(folder / "reference", pause=PAUSE)
    total = time.perf_counter() - began
    training = child.training_seconds(ref)
    print(
        f"{child.STEPS} steps, a save every {child.OPTIONS['save_steps']}; the uninterrupted run"
        f" took {total:.1f} s, {training:.1f} s of them in training"
    )
    print(
        f"{'trial':>5}  {'killed':>8}  {'at step':>10}  {'inside':>11}  {'machine':>7} "
        f" {'resumed':>7}  {'identical':>9}  {'repeated':>8}  leftovers"
    )
    outcomes, interval = [], child.OPTIONS["save_steps"]

    def trial(n, early, delay):
        work, moments, lost = folder / f"trial-{n}", Counter(), n % 5 == 4
        inspect = lambda w: moments.update(
            [
                what
                for what, f in {
                    "save": child.killed_in_save,
                    "backup": child.killed_in_backup,
                }.items()
                if f(w)
            ]
        )
        child.trial(
            work,
            0 if early else 1,
            delay,
            kills=2 if lost else a.kills,
            dataloader_workers=n % 3 % 2,
            backup=n % 2 == 1,
            lost=lost,
            inspect=inspect,
            pause=PAUSE,
        )
        o = child.compare(work, ref, same_saves=not (lost or n % 2))
        o.lost, o.inside = lost, "+".join(sorted(moments))
        o.limit = interval * (
            1 + ("save" in o.inside) + 3 * lost
        )  # a checkpoint that is being written does not count yet; the next save waits for it
        if o.identical or not a.keep:
            child.remove(work)
        return n, delay, o

    drawn = []
    for n in range(a.trials):
        # Most kills fall into training, counted from its first step, so that a slow start of Python
        # does not use them up.
        early = rng.random() < 0.1
        drawn.append(
            (n, early, rng.uniform(0.2, total - training) if early else rng.uniform(0, training))
        )
    with ThreadPoolExecutor(a.jobs) as pool:
        for n, delay, o in pool.map(lambda d: trial(*d), drawn):
            outcomes.append(o)
            print(
                f"{n + 1:>5}  {f'+{delay:.2f} s':>8}  {o.killed_at:>10}  {o.inside:>11} "
                f" {'lost' if o.lost else '':>7}  {'yes' if o.resumed else 'fresh':>7} "
                f" {'yes' if o.identical else 'NO':>9}  {o.repeated:>8} "
                f" {', '.join(o.leftovers) or '–'}",
                flush=True,
            )
            for d in o.differ[:5]:
                print(f"         {d}")
    same, late = sum(o.identical for o in outcomes), [o for o in outcomes if o.repeated > o.limit]
    rows = dict(
        trials=len(outcomes),
        **{
            "killed inside a save": sum("save" in o.inside for o in outcomes),
            "killed inside a backup": sum("backup" in o.inside for o in outcomes),
            "machine lost": sum(o.lost for o in outcomes),
            "resumed from a checkpoint": sum(o.resumed for o in outcomes),
            "bit-identical": same,
            "most steps repeated": max((o.repeated for o in outcomes if not o.lost), default=0),
            "the same, machine lost": max((o.repeated for o in outcomes if o.lost), default=0),
            "leftovers": sum(len(o.leftovers) for o in outcomes),
        },
    )
    print()
    [print(f"{k:<27}{v:>5}") for k, v in rows.items()]
    if not a.keep or same == len(outcomes):
        shutil.rmtree(folder, ignore_errors=True)
    else:
        print(f"kept: {folder}")
    print(f"identical {same} of {len(outcomes)}")
    sys.exit(same != len(outcomes) or rows["leftovers"] > 0 or bool(late))


if __name__ == "__main__":
    main()
