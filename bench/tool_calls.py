"""How often does a small model call the right function for phrasings that it has not seen?

    python -m bench.tool_calls               # train first: four minutes on two cores
    python -m bench.tool_calls --run DIR     # test the model of a run or of a checkpoint

The model of --run can be trained on anything. `minigpt.data.tool_prompts` asks for each of its
functions, in English and Chinese, with three functions on offer; no conversation of `call` has the
same phrasings or values. The answer is the most likely one, and it counts as
    parsable    it calls something, and can be parsed
    function    it is one call, of the right function
    arguments   and all arguments are right
"""

import argparse
import json
import time
from pathlib import Path


def train(out: Path, a):
    """Train a small model on the calls of the built-in corpus.

    Short questions without schemas come first, then complete conversations.
    """
    from minigpt.data.corpus import call, write_calls
    from minigpt.model.gpt import GPTConfig
    from minigpt.tokenizer.bpe import train_tokenizer
    from minigpt.train.trainer import fit

    out.mkdir(parents=True, exist_ok=True)
    plain = train_tokenizer(["."])
    tok = train_tokenizer((plain.render(call(i)) for i in range(3000)), a.vocab)
    shape = GPTConfig(
        vocab_size=tok.vocab_size,
        dim=128,
        n_layer=2,
        n_head=4,
        n_kv_head=4,
        ffn_dim=256,
        qk_norm=True,
        max_len=1024,
    )
    usual = dict(
        tokenizer=tok,
        optimizer="muon",
        enable_compile="no",
        eval_sequences=32,
        save_steps=10**6,
        num_threads=a.threads,
        plot_loss=False,
    )
    first = fit(
        shape,
        write_calls(out / "short.jsonl", short=True),
        output_dir=out / "short",
        max_seq_len=256,
        batch_size=8,
        max_steps=a.steps,
        eval_steps=a.steps,
        learning_rate=8e-3,
        **usual,
    )
    return fit(
        first.model(),
        write_calls(out / "whole.jsonl"),
        output_dir=out / "whole",
        max_seq_len=512,
        batch_size=4,
        max_steps=2 * a.steps // 5,
        eval_steps=2 * a.steps // 5,
        learning_rate=3e-3,
        **usual,
    )


def score(text: str, call: dict) -> tuple[bool, bool, bool]:
    "Return whether the answer is parsable, calls the right function, and has the right arguments."
    from minigpt.model.generation import parse_tool_calls

    try:
        calls = parse_tool_calls(text)
    except ValueError:
        calls = []
    right = [c["name"] for c in calls] == [call["name"]]
    return bool(calls), right, right and calls[0]["arguments"] == call["arguments"]


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--run", type=Path, help="a run's folder, or a checkpoint")
    p.add_argument("--out", type=Path, default=Path("runs/tool_calls"), help="where to train")
    p.add_argument(
        "--steps",
        type=int,
        default=1000,
        help="optimizer steps on short questions; the second stage has two fifths of them",
    )
    p.add_argument("--vocab", type=int, default=1200, help="vocabulary size")
    p.add_argument("--threads", type=int, default=0, help="torch threads; 0: one per core")
    p.add_argument("--n", type=int, default=100, help="questions")
    p.add_argument("--seed", type=int, default=0, help="seed of the questions")
    p.add_argument("--show", type=int, default=5, help="number of wrong answers to print")
    a = p.parse_args()
    from minigpt.checkpoint.store import load_model
    from minigpt.data.corpus import TOOLS, tool_prompts
    from minigpt.model.generation import generate_batch
    from minigpt.run.folder import open_run
    from minigpt.tokenizer.bpe import load_tokenizer

    if a.run and not (a.run / "run.json").exists():
        model, tok = load_model(a.run), load_tokenizer(a.run)
    else:
        began = time.perf_counter()
        run = open_run(a.run) if a.run else train(a.out, a)
        model, tok = run.model(), run.tokenizer
        if not a.run:
            print(
                f"trained in {time.perf_counter() - began:.0f} s: {model.config.n_params:,}"
                " parameters"
            )
    prompts, answers = tool_prompts(a.n, a.seed), []
    for i in range(0, a.n, 25):
        prompts = [tok.encode_prompt(messages) for messages, _ in prompts[i : i + 25]]
        answers += map(
            tok.decode,
            generate_batch(
                model, prompts, max_new_tokens=100, temperature=0, stop_ids=tok.stop_ids
            ),
        )
    scores = {k: [] for k in (*TOOLS, "all")}
    for (messages, right), text in zip(prompts, answers):
        s = score(text, right)
        for k in (right["name"], "all"):
            scores[k].append(s)
        if not s[2] and a.show:
            a.show -= 1
            print(
                messages[1]["content"],
                json.dumps(right, ensure_ascii=False),
                text.replace("\n", " "),
                sep="\n  ",
            )
    print(f"{'':14}{'questions':>10}{'parsable':>10}{'function':>10}{'arguments':>11}")
    for k, v in scores.items():
        print(
            f"{k:14}{len(v):>10}"
            + "".join(f"{sum(x) / max(1, len(x)):>{w}.0%}" for x, w in zip(zip(*v), (10, 10, 11)))
        )


if __name__ == "__main__":
    main()
