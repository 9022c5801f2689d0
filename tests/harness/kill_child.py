"""A small training run that its parent kills, and the parent: start, kill, resume, compare.

Run as a program, it trains: `kill_child.py WORK_FOLDER OPTIONS_AS_JSON`. The tests and
`bench/kill.py` import the rest. WORK_FOLDER gets the corpus `text.jsonl`, the run `run/` and
`losses.txt` with one line `attempt step kind float.hex` per value.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
STEPS = 52
OPTIONS = dict(
    batch_size=4,
    gradient_accumulation=2,
    max_seq_len=32,
    long_rows="cut",
    max_steps=STEPS,
    save_steps=7,
    eval_steps=5,
    eval_sequences=16,
    save_total_limit=2,
    validation_split=0.1,
    tokenizer_vocab_size=300,
    logging_steps=1,
    learning_rate=3e-3,
    num_threads=1,
    progress=False,
    plot_loss=False,
    tensorboard=False,
)
# `minigpt` keeps these; any other hidden file is a leftover.
OWN = {".lock"}


def write_text(path, rows=120, seed=0):
    "Write a corpus of a little over one and a half epochs for STEPS steps."
    rng = random.Random(seed)
    words = [
        "the",
        "a",
        "small",
        "big",
        "red",
        "old",
        "cat",
        "dog",
        "fox",
        "house",
        "sees",
        "likes",
        "finds",
        "makes",
        "猫",
        "在",
        "花园",
        "里",
        "跑",
        "，",
    ]
    with open(path, "w", encoding="utf-8") as f:
        for _ in range(rows):
            f.write(
                json.dumps(
                    {"text": " ".join(rng.choices(words, k=rng.randint(15, 60)))},
                    ensure_ascii=False,
                )
                + "\n"
            )
    return path


# --- the child ------------------------------------------------------------------------------------
def shape(vocab_size=300):
    from minigpt.model.gpt import GPTConfig

    return GPTConfig(
        vocab_size=vocab_size,
        dim=32,
        n_layer=2,
        n_head=2,
        n_kv_head=1,
        ffn_dim=64,
        max_len=64,
        dropout=0.1,
    )


def model_and_data(stage, work):
    "Return the model and the data of a stage, the same at every call."
    if stage == "text":
        return shape(), work / "text.jsonl"
    if stage.startswith("tess"):  # an encoder draws its coin, noise and dropout in every step
        from minigpt.diffusion import TessConfig

        kwargs = (
            dict(self_condition="logits_addition")
            if stage == "tess"
            else dict(self_condition="logits", pad_to_max_length=False)
        )
        return (
            TessConfig(
                vocab_size=300,
                dim=32,
                n_layer=2,
                n_head=2,
                ffn_dim=64,
                max_len=64,
                dropout=0.1,
                num_diffusion_steps=50,
                num_inference_diffusion_steps=5,
                **kwargs,
            ),
            work / "text.jsonl",
        )
    import torch

    from minigpt.data.corpus import write_conversations, write_preferences
    from minigpt.model.adapters import lora
    from minigpt.model.gpt import GPT

    write, rows = dict(
        sft=(write_conversations, 300),
        lora=(write_conversations, 300),
        dpo=(write_preferences, 150),
    )[stage]
    torch.manual_seed(1)
    base = GPT(shape())
    return (lora(base, r=4, dropout=0.1) if stage == "lora" else base), write(
        work / f"{stage}.jsonl", rows
    )


def train(work, stage="text", **options):
    from minigpt.train.trainer import Callback, fit

    class WriteLosses(Callback):
        "Write each loss exactly, and flush it to disk before the step continues."

        def __init__(self):
            self.file = open(work / "losses.txt", "a")

        def write(self, *words):
            self.file.write(" ".join(map(str, words)) + "\n")
            self.file.flush()
            os.fsync(self.file.fileno())

        def on_start(self, t):
            self.write(t.attempt, t.step, "start", 0)

        def on_log(self, t, row):
            for kind in (
                "loss",
                "eval_loss",
                "rewards/margins",
                "eval_rewards/margins",
                "accuracy",
                "eval_accuracy",
            ):
                if kind in row:
                    self.write(t.attempt, row["step"], kind, float(row[kind]).hex())

        def on_step(self, t):
            if pause:
                time.sleep(pause)  # a slower run can be killed at more moments

    pause = options.pop("pause", 0)
    if options.get("gdrive_backup_dir"):  # half a minute is long for a run of seconds
        from minigpt.run import backup

        backup.BEAT, backup.RETRY, backup.POLL = 0.3, 0.05, 0.05
    model, data = model_and_data(stage, work)
    return fit(
        model, data, output_dir=work / "run", callbacks=[WriteLosses()], **{**OPTIONS, **options}
    )


# --- the parent -----------------------------------------------------------------------------------
def start(work, **options):
    "Start the process; its output is appended to `says.txt`."
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    with open(work / "says.txt", "a") as out:
        return subprocess.Popen(
            [sys.executable, str(Path(__file__).resolve()), str(work), json.dumps(options)],
            env=env,
            stdout=out,
            stderr=out,
        )


def losses(work):
    "Return (attempt, step, kind, hex) per loss."
    return [l for l in read_lines(work) if l[2] != "start"]


def read_lines(work):
    "Return all complete lines of losses.txt; each start has one too."
    p = work / "losses.txt"
    return (
        [
            (int(a), int(s), k, x)
            for a, s, k, x in re.findall(r"^(\d+) (\d+) (\S+) (\S+)\n", p.read_text(), re.M)
        ]
        if p.exists()
        else []
    )


def finish(work, limit=120, **options):
    "Start the process and wait until it succeeds."
    p = start(work, **options)
    try:
        rc = p.wait(limit)
    finally:
        p.kill()
        p.wait()
    assert rc == 0, f"exit status {rc}\n{(work / 'says.txt').read_text()[-3000:]}"


@dataclass
class Outcome:
    "What became of a killed run once it has finished."

    killed_at: int  # steps logged when it was killed
    resumed: bool  # from a checkpoint, not from the beginning
    differ: list  # differences from the uninterrupted run; empty: bit-identical
    repeated: int  # most steps trained twice
    leftovers: list  # hidden files and folders that are left over

    @property
    def identical(self):
        return not self.differ


def new_work(work):
    work.mkdir(parents=True)
    write_text(work / "text.jsonl")
    return work


def reference(work, **options):
    "Train the uninterrupted run to compare with; return its folder."
    finish(new_work(work), **options)
    return work


def with_backup(work, **options):
    "Return the options of a run with snapshots and a backup."
    return dict(options, gdrive_backup_dir=str(work / "drive"), time_save_interval_seconds=0.05)


def trial(
    work,
    at_step=0,
    delay=0.0,
    kills=1,
    inspect=lambda work: None,
    backup=False,
    lost=False,
    **options,
):
    """Kill the run `delay` seconds after `at_step` further steps are logged, and resume it to the
    end.

    It is killed `kills` times; `look` inspects the folder after each kill. `backup` copies the run
    to a backup. With `lost`, only the backup is left after the first kill, and later kills come
    during the restore.
    """
    new_work(work)
    if backup or lost:
        options = with_backup(work, **options)
    for kill in range(kills):
        done, p = len(losses(work)), start(work, **options)
        goal = max((s for _, s, *_ in losses(work)), default=0) + at_step
        try:
            while (
                at_step
                and p.poll() is None
                and max((s for _, s, *_ in losses(work)[done:]), default=0) < goal
            ):
                time.sleep(0.001)
            if lost and kill:
                while p.poll() is None and not (work / "run" / "run.log").exists():
                    time.sleep(0.001)
            time.sleep(delay)
        finally:
            p.send_signal(signal.SIGKILL)
            p.wait()
        inspect(work)
        if lost and not kill:
            remove(work / "run")
            at_step, delay = 0, delay % 0.3
        if p.returncode != -signal.SIGKILL:
            break  # it finished before the kill
    finish(work, **options)
    return work


def same_tensors(a, b):
    "Whether two files hold the same tensors bit for bit; the order of the metadata may differ."
    from safetensors import safe_open

    with safe_open(a, "np") as x, safe_open(b, "np") as y:
        return (
            x.metadata() == y.metadata()
            and set(x.keys()) == set(y.keys())
            and all(x.get_tensor(k).tobytes() == y.get_tensor(k).tobytes() for k in x.keys())
        )


def compare(work, ref, same_saves=True):
    "Return the `Outcome`; with `same_saves`, the names of the remaining checkpoints must be equal."
    last, wanted = ({(s, k): x for _, s, k, x in losses(w)} for w in (work, ref))
    differ = [
        f"{k} of step {s}: {last.get((s, k))} instead of {x}"
        for (s, k), x in wanted.items()
        if last.get((s, k)) != x
    ]
    differ += [
        f"{k} of step {s} is not in the uninterrupted run" for s, k in last.keys() - wanted.keys()
    ]
    model = "model" if (ref / "run/model.safetensors").exists() else "adapter_model"
    if (work / f"run/{model}.safetensors").read_bytes() != (
        ref / f"run/{model}.safetensors"
    ).read_bytes():
        differ.append(f"the final {model}.safetensors has other bytes")
    end = Path(f"run/checkpoints/checkpoint-{STEPS}")
    # if the machine was lost after the run had finished, only the backup has its checkpoints
    saved = work / end if (work / end).exists() else work / "drive" / end
    differ += [
        f"{n} of the last checkpoint differs"
        for n in (model, "optimizer", "rng_state")
        if not same_tensors(saved / f"{n}.safetensors", ref / end / f"{n}.safetensors")
    ]
    from minigpt.run.metrics import read_metrics

    history = lambda w: [
        (r["step"], r.get("loss"), r.get("eval_loss"), r.get("tokens", None))
        for r in read_metrics(w / "run" / "metrics.jsonl")
    ]
    if history(work) != history(ref):
        differ.append("metrics.jsonl has another history")
    names = lambda w: sorted(p.name for p in (w / "run" / "checkpoints").iterdir())
    if same_saves and names(work) != names(ref):
        differ.append(f"checkpoints/ has {names(work)} instead of {names(ref)}")
    repeated, resumed, killed_at = 0, False, 0
    before = 0
    for n, (_, s, k, _) in enumerate(read_lines(work)):
        if k == "start" and n:
            repeated, resumed, killed_at = max(repeated, before - s), resumed or s > 0, before
        if k == "loss":
            before = max(before, s)
    leftovers = [
        str(p.relative_to(work)) for p in sorted((work / "run").rglob(".*")) if p.name not in OWN
    ]
    return Outcome(killed_at, resumed, differ, repeated, leftovers)


def epoch_steps(ref):
    "Return the first step of the second epoch."
    from minigpt.run.metrics import read_metrics

    return next(
        r["step"] for r in read_metrics(ref / "run" / "metrics.jsonl") if r.get("epoch", 0) >= 1
    )


def killed_in_save(work):
    "Whether the run was killed while it wrote a checkpoint or the final model."
    return any(
        p.name not in OWN
        for folder in ("run", "run/checkpoints", "run/snapshots", "run/best")
        for p in (work / folder).glob(".*")
    )


def killed_in_backup(work):
    "Whether the run was killed while it copied to the backup."
    folders = [
        p
        for n in ("checkpoints", "snapshots", "best")
        for p in (work / "drive" / "run" / n).glob("*")
    ] + [p for p in [work / "drive" / "run" / "final"] if p.exists()]
    return any(not (p / "MANIFEST.json").exists() for p in folders)


def training_seconds(ref):
    rows = [json.loads(l) for l in (ref / "run" / "metrics.jsonl").read_text().splitlines()]
    return rows[-1]["time"] - rows[0]["time"]


def remove(work):
    shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    train(Path(sys.argv[1]), **json.loads(sys.argv[2]))
