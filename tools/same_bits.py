"""Do two checkouts compute the same bits? `python tools/same_bits.py OLD [NEW]`.

Each checkout, in its own processes, writes the built-in corpora and trains on plain text,
conversations, an adapter, preferences and diffusion. Every loss must be equal as `float.hex`, and
every file of corpora and checkpoints byte for byte (except for the name of the run). Then NEW
resumes runs that OLD has interrupted, and must get the same bits. NEW defaults to this checkout.
The tool prints a table; its exit code is 1 if anything differs.
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
RUN_KEYS = {"run"}  # keys of trainer_state.json that differ between runs


# --- in each checkout -----------------------------------------------------------------------------
class Interrupted(Exception):
    "The run is interrupted."


def corpora(folder):
    from minigpt.train.inputs import BUILT_IN

    for name in CORPORA:
        BUILT_IN[name](folder / f"{name}.jsonl")


def train(work, stage, stop_at):
    "Return the losses by step and kind; interrupt the run after `stop_at` steps."
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
                raise Interrupted

    if not work.exists():
        child.new_work(work)
    small = {} if stage in ("text", "tess") else dict(max_seq_len=128, batch_size=2)
    options = {**child.OPTIONS, **small, "max_steps": STEPS, "gdrive_backup_dir": ""}
    model, data = child.model_and_data(stage, work)
    with contextlib.suppress(Interrupted):
        fit(model, data, output_dir=work / "run", callbacks=[Losses()], **options)
    return losses


def run_task(task, folder, stage, stop_at):
    "Run one task in this process; print its result as JSON in the last line of the output."
    os.chdir(folder)
    result = (
        corpora(folder) if task == "corpora" else train(folder / stage, stage, int(stop_at or 0))
    )
    print(json.dumps(result))


# --- in the parent process ------------------------------------------------------------------------
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
    "Return the hash of a file, without the run's name in a trainer_state.json."
    data = path.read_bytes()
    if path.name == "trainer_state.json":
        state = json.loads(data)
        data = json.dumps({k: v for k, v in state.items() if k not in RUN_KEYS}).encode()
    return hashlib.sha256(data).hexdigest()


def files(folder):
    "Return the hashes of the files that are equal in equal runs."
    kept = ("*.jsonl", "run/checkpoints/**/*", "run/best/**/*", "run/*.safetensors", "run/data*/*")
    paths = {p for pattern in kept for p in folder.glob(pattern) if p.is_file()}
    # A manifest contains the time and the hash of trainer_state.json; its files are compared.
    return {
        p.relative_to(folder).as_posix(): content(p) for p in paths if p.name != "MANIFEST.json"
    }


def compare(what, old, new):
    "Print one line of the table; return whether all values are equal."
    differ = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
    result = (
        f"{len(old)} equal" if not differ else f"{len(differ)} of {len(old)} differ: {differ[:4]}"
    )
    print(f"{what:28}{result}", flush=True)
    return bool(old) and not differ


def check(old, new, folder):
    same = []
    for name, checkout in (("old", old), ("new", new)):
        run(checkout, "corpora", folder / name / "corpora")
    same.append(compare("corpora", *(files(folder / n / "corpora") for n in ("old", "new"))))
    for stage in STAGES:
        old_losses = run(old, "train", folder / "old", stage)
        new_losses = run(new, "train", folder / "new", stage)
        same.append(compare(f"{stage}: losses", old_losses, new_losses))
        old_files = files(folder / "old" / stage)
        same.append(compare(f"{stage}: files", old_files, files(folder / "new" / stage)))
        run(old, "train", folder / "cut", stage, CUT)
        resumed = run(new, "train", folder / "cut", stage)
        expected = {k: v for k, v in old_losses.items() if k in resumed}
        same.append(bool(resumed) and compare(f"{stage}: resumed by new", expected, resumed))
    return all(same)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("old", type=Path, help="checkout of the previous version")
    parser.add_argument(
        "new", type=Path, nargs="?", default=ROOT, help="another checkout; default: this one"
    )
    parser.add_argument("--keep", action="store_true", help="keep the folder with the runs")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="same-bits-"))
    try:
        equal = check(args.old.resolve(), args.new.resolve(), folder)
    finally:
        print(f"runs: {folder}") if args.keep else shutil.rmtree(folder)
    print("ALL EQUAL" if equal else "DIFFERENT")
    return 0 if equal else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--task"]:
        task, folder, stage, stop_at = sys.argv[2:]
        run_task(task, Path(folder), stage, stop_at)
    else:
        sys.exit(main())
