"""Try minigpt in a few minutes: train, get killed, resume, and look at the results.

python examples/demo.py [--steps N]
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

RUN = Path("runs/demo")


def train(steps: int):
    "Train in this process; it does not know whether it starts or resumes."
    from minigpt.model.gpt import GPTConfig
    from minigpt.train.trainer import fit

    model = GPTConfig(vocab_size=4000, dim=128, n_layer=4, n_head=4, n_kv_head=2, ffn_dim=352)
    fit(
        model,
        "stories",
        output_dir=RUN,
        tokenizer_vocab_size=4000,
        max_steps=steps,
        batch_size=8,
        max_seq_len=256,
        learning_rate=3e-3,
        lr_schedule="linear",
        min_lr_ratio=0.0,
        save_steps=steps // 8,
        eval_steps=steps // 4,
        eval_sequences=0,
    )


def start(steps: int) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, __file__, "--train", "--steps", str(steps)])


def train_until_killed(steps: int):
    "Start training and kill it with SIGKILL after its third checkpoint: no handler runs."
    from minigpt.run.folder import Run

    child, run = start(steps), Run(RUN)
    while child.poll() is None and not any(
        c.step >= 3 * (steps // 8) and not c.problem for c in run.checkpoints
    ):
        time.sleep(0.2)
    time.sleep(2)
    if child.poll() is not None:
        sys.exit(f"training exited with code {child.returncode} before the kill")
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    steps_logged = [r["step"] for r in run.history]
    print(
        f"\n\n*** killed with SIGKILL after step {steps_logged[-1]}; newest checkpoint:"
        f" {run.store.newest().path.name} ***\n"
    )


def report(seconds: float):
    "Print what a user would look at afterwards."
    import numpy as np

    from minigpt.core.files import human_size, human_time
    from minigpt.data.corpus import trigram_loss
    from minigpt.data.tokensets import open_tokenset
    from minigpt.run.folder import open_run, runs_table

    run = open_run(RUN)
    train, valid = open_tokenset(RUN / "data")
    trigram = trigram_loss(
        np.asarray(train.tokens), np.asarray(valid.tokens), run.tokenizer.vocab_size
    )
    loss = [r["eval_loss"] for r in run.history if "eval_loss" in r][-1]
    print(
        f"\nAttempts started at steps {[a['step'] for a in run.facts['attempts']]}: the second"
        " resumed from the checkpoint of the first."
    )
    print(
        f"Validation loss {loss:.3f} nats per token; a trigram model of the same tokens reaches"
        f" {trigram:.3f}; guessing, {np.log(run.tokenizer.vocab_size):.3f}.\n"
    )
    for prompt in ("One morning,", "从前，"):
        print(run.generate(prompt, max_new_tokens=120, temperature=0.6, seed=1), "\n")
    print(runs_table([run]), "\n")
    size = lambda p: sum(
        f.stat().st_size for f in (p.rglob("*") if p.is_dir() else [p]) if f.is_file()
    )
    print(
        "\n".join(
            f"{human_size(size(p)):>10}  {p}"
            for p in sorted(RUN.iterdir())
            if not p.name.startswith(".")
        )
    )
    print(
        f"\nLoss curve: {RUN / 'plots' / 'loss_curve_latest.png'}   Total time:"
        f" {human_time(seconds)}."
    )
    if loss >= trigram:
        print("The model is not better than a trigram model yet: train it for more steps.")


def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument(
        "--steps", type=int, default=640, help="optimizer steps; fewer for a quick try"
    )
    args.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    args = args.parse_args()
    if args.train:
        return train(args.steps)
    from minigpt.core.files import set_aside

    if RUN.exists():
        print(f"an earlier demo is kept as {set_aside(RUN, 'old')}")
    began = time.time()
    train_until_killed(args.steps)
    if start(args.steps).wait():
        sys.exit("the resumed training failed")
    report(time.time() - began)
    return None


if __name__ == "__main__":
    main()
