"""Do two checkouts compute the same bits? `python tools/same_bits.py OLD [NEW]`.

Each checkout, in processes of its own, writes the built-in corpora and trains on plain text,
conversations, an adapter, preferences and diffusion. Every loss must be equal as `float.hex`, and
every file of corpora and checkpoints byte for byte (but for the run's name). Then NEW goes on with
runs that OLD left in the middle, and must arrive at the same bits. NEW is this checkout unless
named. Prints a table; exit code 1 where anything differs.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("text", "sft", "lora", "dpo", "tess")
CORPORA = ("stories", "talks", "calls", "reasoning", "preferences")
STEPS, CUT = 24, 17
OF_THE_MOMENT = {"run"}  # keys of trainer_state.json that are another's in another run


# --- in each checkout -----------------------------------------------------------------------------
class Left(Exception):
    "The run is left in the middle"


def corpora(folder):
    from minigpt.train.inputs import BUILT_IN

    for name in CORPORA:
        BUILT_IN[name](folder / f"{name}.jsonl")


def train(work, stage, stop_at):
    "Losses by step and kind; the run is left after `stop_at` steps"
    from minigpt.train import Callback, fit
    from tests.harness import kill_child as child

    losses = {}

    class Losses(Callback):
        def on_log(self, t, row):
            for kind in {"loss", "eval_loss"} & row.keys():
                losses[f"{row['step']} {kind}"] = float(row[kind]).hex()

        def on_step(self, t):
            if t.step == stop_at:
                t.writer.wait()
                raise Left

    if not work.exists():
        child.new_work(work)
    small = {} if stage in ("text", "tess") else dict(max_seq_len=128, batch_size=2)
    options = {**child.OPTIONS, **small, "max_steps": STEPS, "gdrive_backup_dir": ""}
    model, data = child.model_and_data(stage, work)
    with contextlib.suppress(Left):
        fit(model, data, output_dir=work / "run", callbacks=[Losses()], **options)
    return losses


def here(task, folder, stage, stop_at):
    "What one process does: its result is a line of JSON, the last of its output"
    os.chdir(folder)
    result = (
        corpora(folder) if task == "corpora" else train(folder / stage, stage, int(stop_at or 0))
    )
    print(json.dumps(result))


# --- between them ---------------------------------------------------------------------------------
def run(checkout, task, folder, stage="", stop_at=0):
    folder.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, __file__, "--task", task, str(folder), stage, str(stop_at)],
        env={**os.environ, "PYTHONPATH": str(checkout), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{checkout}: {task} {stage} failed\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def content(path):
    "The hash of a file; of a trainer_state.json without the name of its run"
    data = path.read_bytes()
    if path.name == "trainer_state.json":
        state = json.loads(data)
        data = json.dumps({k: v for k, v in state.items() if k not in OF_THE_MOMENT}).encode()
    return hashlib.sha256(data).hexdigest()


def files(folder):
    "Hashes of the files of a run that are the same whenever it is trained"
    kept = ("*.jsonl", "run/checkpoints/**/*", "run/best/**/*", "run/*.safetensors", "run/data*/*")
    there = {p for pattern in kept for p in folder.glob(pattern) if p.is_file()}
    # a manifest holds the hash of trainer_state.json, and the time; its files are compared
    return {
        p.relative_to(folder).as_posix(): content(p) for p in there if p.name != "MANIFEST.json"
    }


def compare(what, old, new):
    "One line of the table; are they equal?"
    differ = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    said = (
        f"{len(old)} equal" if not differ else f"{len(differ)} of {len(old)} differ: {differ[:4]}"
    )
    print(f"{what:28}{said}", flush=True)
    return bool(old) and not differ


def check(old, new, folder):
    same = []
    for name, checkout in (("old", old), ("new", new)):
        run(checkout, "corpora", folder / name / "corpora")
    same.append(compare("corpora", *(files(folder / n / "corpora") for n in ("old", "new"))))
    for stage in STAGES:
        was = run(old, "train", folder / "old", stage)
        now = run(new, "train", folder / "new", stage)
        same.append(compare(f"{stage}: losses", was, now))
        whole = files(folder / "old" / stage)
        same.append(compare(f"{stage}: files", whole, files(folder / "new" / stage)))
        run(old, "train", folder / "cut", stage, CUT)
        rest = run(new, "train", folder / "cut", stage)
        wanted = {k: v for k, v in was.items() if k in rest}
        same.append(bool(rest) and compare(f"{stage}: new goes on", wanted, rest))
    return all(same)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path, help="a checkout of the version before")
    parser.add_argument("new", type=Path, nargs="?", default=ROOT, help="this checkout")
    parser.add_argument("--keep", action="store_true", help="leave the folder with the runs")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="same-bits-"))
    try:
        equal = check(asked.old.resolve(), asked.new.resolve(), folder)
    finally:
        print(f"runs: {folder}") if asked.keep else shutil.rmtree(folder)
    print("ALL EQUAL" if equal else "DIFFERENT")
    return 0 if equal else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--task"]:
        task, folder, stage, stop_at = sys.argv[2:]
        here(task, Path(folder), stage, stop_at)
    else:
        sys.exit(main())
