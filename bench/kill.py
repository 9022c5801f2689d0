"""How often is a run that was killed at a random moment bit-identical to an uninterrupted one?

    python bench/kill.py --trials 20

Each trial trains in a process of its own, kills it with SIGKILL at a moment drawn uniformly from the run's time (start-up and saves included),
starts the same call again until it is finished, and compares every loss as `float.hex`, the final weights, the optimizer and the random generators."""
import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/"tests")]
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
import kill_child as child  # noqa: E402


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--trials", type=int, default=20, help="moments to kill at")
    ap.add_argument("--kills", type=int, default=1, help="kills in a trial")
    ap.add_argument("--seed", type=int, default=0)
    ap.add_argument("--keep", action="store_true", help="keep the folders of trials that differ")
    a = ap.parse_args()
    rng, folder = random.Random(a.seed), Path(tempfile.mkdtemp(prefix="minigpt-kill-"))
    began = time.perf_counter(); ref = child.reference(folder/"reference"); whole = time.perf_counter()-began
    training = child.seconds_of_training(ref)
    print(f"{child.STEPS} steps, a save every {child.OPTIONS['save_steps']}; the uninterrupted run took {whole:.1f} s, {training:.1f} s of them in training")
    print(f"{'trial':>5}  {'killed':>8}  {'steps then':>10}  {'in a save':>9}  {'resumed':>7}  {'identical':>9}  {'repeated':>8}  leftovers")
    outcomes, moments = [], Counter()
    for n in range(a.trials):
        work, workers = folder/f"trial-{n}", n % 3 % 2
        # most moments fall into the training itself, counted from its first step, so that a slow start of Python does not use them up
        early = rng.random() < .1
        at, delay = (0, rng.uniform(.2, whole-training)) if early else (1, rng.uniform(0, training))
        child.trial(work, at, delay, kills=a.kills, dataloader_workers=workers, look=lambda w: moments.update(["in a save"] if child.in_save(w) else []))
        in_save = moments.pop("in a save", 0) > 0
        o = child.compare(work, ref); outcomes.append((o, in_save))
        print(f"{n+1:>5}  {f'+{delay:.2f} s':>8}  {o.killed_at:>10}  {'yes' if in_save else '':>9}  {'yes' if o.resumed else 'anew':>7}  {'yes' if o.identical else 'NO':>9}  {o.repeated:>8}  {', '.join(o.leftovers) or '–'}", flush=True)
        for d in o.differ[:5]: print(f"         {d}")
        if o.identical or not a.keep: child.clear(work)
    same = sum(o.identical for o, _ in outcomes)
    rows = dict(trials=len(outcomes), **{"killed inside a save": sum(s for _, s in outcomes), "resumed from a checkpoint": sum(o.resumed for o, _ in outcomes), "bit-identical": same,
                "most steps repeated": max((o.repeated for o, _ in outcomes), default=0), "leftovers": sum(len(o.leftovers) for o, _ in outcomes)})
    print(); [print(f"{k:<27}{v:>5}") for k, v in rows.items()]
    if not a.keep or same == len(outcomes): shutil.rmtree(folder, ignore_errors=True)
    else: print(f"kept: {folder}")
    print(f"identical {same} of {len(outcomes)}")
    sys.exit(same != len(outcomes) or rows["leftovers"] > 0 or rows["most steps repeated"] > child.OPTIONS["save_steps"])


if __name__ == "__main__": main()
