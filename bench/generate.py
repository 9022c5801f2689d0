"""New tokens per second of `minigpt.model.generation` and of transformers' `generate`, on the CPU.

    python -m bench.generate        # `small`, 128 tokens, 5 rounds; 3 minutes on 2 quiet cores
    python -m bench.generate --model tiny --rounds 1 --tokens 16

Both use the same random weights, read from the same folder, in fp32. The prompts are random ids, 32
in each row, so all rows have the same length, and nothing ends early. Both programs run in one
process and alternate, so that other load on the machine affects both; the figures are medians over
the rounds. transformers' generate has its defaults (dynamic cache, sdpa attention); its logits and
greedy tokens are compared with ours. Sampling uses temperature 0.8, top_k 50, top_p 0.95. The last
line is the lowest of the ratios ours / transformers.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("HF_HUB_OFFLINE", "1")
PROMPT = 32


def prepare(folder: Path, name: str):
    "Write a checkpoint with random weights."
    import torch

    from minigpt.checkpoint.store import State, write_checkpoint
    from minigpt.model.gpt import GPT, GPTConfig
    from minigpt.tokenizer.bpe import train_tokenizer

    torch.manual_seed(0)
    model = GPT(GPTConfig.preset(name))
    write_checkpoint(
        folder,
        State(
            model.config,
            model.weights(),
            train_tokenizer(["nothing to say"], 300),
            dict(global_step=0),
        ),
        "best",
    )


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--model", default="small", help="name of a preset")
    p.add_argument("--tokens", type=int, default=128, help="new tokens in each row")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    p.add_argument("--threads", type=int, default=os.cpu_count())
    a = p.parse_args()
    import torch
    import transformers

    from minigpt.checkpoint.store import load_model
    from minigpt.model.generation import generate_batch

    torch.set_num_threads(a.threads)
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder) / "m", a.model)
        model = load_model(Path(folder) / "m").eval()
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            Path(folder) / "m", dtype=torch.float32
        ).eval()
    print(
        f"{os.cpu_count()} cores ({platform.machine()}, load"
        f" {', '.join(f'{l:.1f}' for l in os.getloadavg())}), {a.threads} threads, torch"
        f" {torch.__version__}, transformers {transformers.__version__}; {model.config.n_params:,}"
        f" parameters, {a.tokens} new tokens per row after {PROMPT}"
    )
    theirs.generation_config.eos_token_id = None
    settings = dict(
        greedy=(dict(temperature=0), dict(do_sample=False)),
        sampled=(
            dict(temperature=0.8, top_k=50, top_p=0.95, seed=0),
            dict(do_sample=True, temperature=0.8, top_k=50, top_p=0.95),
        ),
    )
    ratios = []
    for B in a.batch:
        ids = torch.randint(
            model.config.vocab_size, (B, PROMPT), generator=torch.Generator().manual_seed(B)
        )
        with torch.inference_mode():
            assert torch.allclose(model(ids), theirs(ids).logits, atol=1e-4), (
                "the two models give different logits"
            )
        for setting, (ours_kw, theirs_kw) in settings.items():
            run = dict(
                minigpt=lambda n: generate_batch(model, ids.tolist(), max_new_tokens=n, **ours_kw),
                transformers=lambda n: theirs.generate(
                    ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=n,
                    pad_token_id=0,
                    **theirs_kw,
                )[:, PROMPT:].tolist(),
            )
            speed, made = {k: [] for k in run}, {}
            for r in range(a.rounds):
                for k in [*run][:: -1 if r % 2 else 1]:
                    if not r:
                        run[k](4)
                    began = time.perf_counter()
                    made[k] = run[k](a.tokens)
                    speed[k].append(sum(map(len, made[k])) / (time.perf_counter() - began))
            same = sum(x == y for u, v in zip(*made.values()) for x, y in zip(u, v)) / (
                B * a.tokens
            )
            if setting == "greedy":
                assert all(u[:4] == v[:4] for u, v in zip(*made.values())), (
                    "the two programs generate different texts"
                )
            ratios.append(statistics.median(x / y for x, y in zip(*speed.values())))
            print(
                f"batch {B}, {setting:7}: {statistics.median(speed['minigpt']):6.0f} tokens/s,"
                f" transformers {statistics.median(speed['transformers']):6.0f}, ratio"
                f" {ratios[-1]:.2f}" + f", {same:.1%} of the tokens equal" * (setting == "greedy"),
                flush=True,
            )
    print(f"ratio {min(ratios):.2f}")


if __name__ == "__main__":
    main()
