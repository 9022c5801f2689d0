"""How well does simplex diffusion fill gaps, and what does self-conditioning add?

The texts are sentences of the built-in corpus; 15 to 50% of the tokens of held-out sentences are
missing. The models are trained with `fit` at the same size, on the same data, for the same number
of steps: a masked language model (one forward pass, as in training), and encoders without and with
self-conditioning. The printed figure is the share of missing tokens that are restored by the most
likely token; the unigram baseline always predicts the most frequent one.
"""

import argparse
import json
import re
import tempfile
import time
from pathlib import Path

KINDS = {
    "masked language model": dict(simplex_value=None),
    "no self-conditioning": dict(self_condition=None),
    "logits_addition": dict(self_condition="logits_addition"),
    "logits_mean": dict(self_condition="logits_mean", self_condition_zeros_after_softmax=True),
    "logits": dict(self_condition="logits"),
}


def write_sentences(folder: Path, megabytes: float = 2.0) -> Path:
    "Write a file of different sentences, one per line."
    from minigpt.data.corpus import write_corpus

    rows = (
        write_corpus(folder / "stories.jsonl", megabytes, language="en")
        .read_text(encoding="utf-8")
        .splitlines()
    )
    found = dict.fromkeys(
        s.strip()
        for r in rows
        for s in re.split(r"(?<=[.!?])\s+", json.loads(r)["text"])
        if len(s.split()) > 4 and "\n" not in s
    )
    (folder / "sentences.txt").write_text("\n".join(found), encoding="utf-8")
    return folder / "sentences.txt"


def restored_share(run, steps, texts, seq_len, **how) -> float:
    "Return the share of restored tokens of held-out sentences."
    import numpy as np
    import torch

    from minigpt.data.tokensets import open_set
    from minigpt.diffusion import fill, mask_spans

    valid, model = open_set(run.path / "data" / "valid"), run.model()
    w = {
        k: torch.from_numpy(v)
        for k, v in valid.windows(np.arange(min(texts, valid.n_windows(seq_len))), seq_len).items()
    }
    blank = mask_spans(w["rows"] >= 0, "spans", torch.Generator().manual_seed(1))
    ids, real = w["input_ids"], w["rows"] >= 0
    if steps:
        made = fill(model, ids, blank, steps=steps, temperature=0, seed=1, real=real, **how)
    else:
        tokens = open_set(run.path / "data" / "train").tokens
        made = ids.masked_fill(blank, int(np.bincount(tokens).argmax()))
    return (made[blank] == ids[blank]).float().mean().item()


def main():
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--steps", type=int, default=2500, help="of each training")
    p.add_argument("--texts", type=int, default=600, help="held-out sentences")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument(
        "--only",
        nargs="*",
        default=[*KINDS],
        choices=[*KINDS],
        metavar="KIND",
        help=f"some of {', '.join(KINDS)}",
    )
    a = p.parse_args()
    from minigpt.diffusion import TessConfig
    from minigpt.train.trainer import fit

    print(f"{'':24}{'1 guess':>9}{'3':>9}{'10':>9}{'30':>9}{'loss':>9}{'time':>9}", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        text = write_sentences(Path(folder))
        for i, kind in enumerate(a.only):
            shape = lambda tok: TessConfig(
                vocab_size=tok.vocab_size,
                mask_id=tok.id("<mask>"),
                dim=128,
                n_layer=3,
                n_head=4,
                ffn_dim=384,
                dropout=0.0,
                blanks="spans",
                **KINDS[kind],
            )
            began = time.perf_counter()
            run = fit(
                shape,
                text,
                output_dir=Path(folder) / str(i),
                line_by_line=True,
                max_seq_len=24,
                batch_size=a.batch,
                max_steps=a.steps,
                tokenizer_vocab_size=600,
                special_tokens="<mask>",
                optimizer="muon",
                learning_rate=3e-3,
                weight_decay=0.01,
                lr_schedule="linear",
                eval_sequences=0,
                eval_steps=a.steps,
                save_steps=a.steps,
                time_save_interval_seconds=0,
                seed=a.seed,
                num_threads=a.threads,
                progress=False,
                plot_loss=False,
                tensorboard=False,
            )
            if not i:
                print(f"{'unigram':24}{restored_share(run, 0, a.texts, 24):9.1%}", flush=True)
            rows, took = run.history, time.perf_counter() - began
            shares = [
                restored_share(run, n, a.texts, 24)
                for n in ((1,) if kind == "masked language model" else (1, 3, 10, 30))
            ]
            print(
                f"{kind:24}"
                + "".join(f"{s:9.1%}" for s in shares)
                + " " * 9 * (4 - len(shares))
                + f"{[r['eval_loss'] for r in rows if 'eval_loss' in r][-1]:9.3f}{took:7.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
