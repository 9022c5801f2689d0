"""How fast do files become batches? JSONL → token set, `analyze`, the loader, and a restart.

    python -m bench.data                        # all parts on 200 MB, 3 rounds
    python -m bench.data --parts b c            # some of them
    python -m bench.data --parts a --large      # also our memory on a file ten times as large

All parts take 25 minutes on 2 cores, and 9 GB of disk for temporary files.

The files contain rows of ../shared/data (of the built-in corpora if they are missing), one file of
texts and one of conversations. The rows are repeated, each time in another order and with other
noise: a random number in each row, and two adjacent sentences swapped. MB are millions of bytes of
the JSONL file, for every method. The tokenizer has 15,000 tokens and is trained on the same rows.
Each measurement runs in its own process, the order of the methods changes every round, and imports
are not timed. "memory" is the peak of the process tree, sampled every 0.25 s: private pages plus a
share of the shared ones (PSS without mapped files, which the kernel can reclaim at any time); "+
files" includes mapped files. "cores" is processor time per second, over all processes of the
method; "MB/s per core" divides by processor time instead of wall time: it is the reliable figure if
other programs are running.

a   `build_tokenset`, validation_split=0, compared with
    - the encoder alone: texts in memory (conversations already rendered), results discarded; the
      fastest of our `encode_batch`, 500 texts per call, and tiktoken's encode_to_numpy and
      encode_ordinary with the pattern of our tokenizer.json, each in 1 process, 2 threads and 2
      processes, chosen on a quarter of the file (like the settings of nanoGPT). Our ids must be as
      many as the encoder's, plus an end token per text; 1,000 rows are compared with tiktoken's id
      by id.
    - nanoGPT's method, as in its data/openwebtext/prepare.py: `datasets` reads the JSON, `map`
      encodes each row with encode_ordinary of the same tokenizer, and shards of 2 MB are written
      into a memmap. Without its split of the data, which costs more; the fastest of num_proc 1 and
      2, and of `batched` (which it does not use).
    - MiniMind's method: all rows in memory, each tokenized in __getitem__ with a fast tokenizer of
      `transformers`, padded (by it or by hand) and truncated to 512 positions; conversations are
      rendered with apply_chat_template and searched for answers; DataLoader, batch 16, 0 or 2
      workers. The rate is measured for --seconds seconds after the start; each epoch costs this
      again.
b   `analyze`, with and without near-duplicates.
c   `loader` on these token sets: batches/s after the first batch, and the share of a training step
    that waits for `next` (preset tiny, 8 × 256, 30 steps, CPU).
d   A token set of about 10⁹ random tokens (2 GB; the mask of the conversations is 1 GB more) in 3
    million rows, in the file cache: from the import of minigpt.data to
    `open_set(…).batch(12345, 8, 512)`. The first start packs the conversations and stores the
    result; a restart reads it.
Figures of a shared machine vary: the ratios are of medians over the rounds.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

KINDS = dict(
    text=("pretrain_en", "pretrain_zh"), chat=("sft_zh", "sft_en", "reasoning", "tool_calling")
)
NAMES = dict(text="texts", chat="conversations")
SEQ, BATCHES = 512, 1000


# --- the files ------------------------------------------------------------------------------------
def base_rows(kind: str, folder: Path) -> list[dict]:
    "Return valid rows in their original form."
    from minigpt.data.corpus import write_conversations, write_corpus
    from minigpt.data.readers import parse_row

    files = [f for n in KINDS[kind] if (f := SHARED / f"{n}.jsonl").exists()]
    if not files:
        print(f"no {NAMES[kind]} in ../shared/data: rows of the built-in corpus are used instead")
        files = [folder / f"{kind}-base.jsonl"]
        if kind == "text":
            write_corpus(files[0], 8)
        else:
            write_conversations(files[0])
    return [
        json.loads(line)
        for f in files
        for line in f.read_bytes().splitlines()
        if not parse_row(line, 1)[0].reason
    ]


_SENTENCE = re.compile(r"(?<=[.!?。！？；\n])")


def noisy(text: str, r: random.Random) -> str:
    parts = _SENTENCE.split(text, 40) if "<" not in text else [text]
    if len(parts) > 2:
        i = r.randrange(len(parts) - 2)
        parts[i], parts[i + 1] = parts[i + 1], parts[i]
    parts.insert(r.randrange(len(parts)) if len(parts) > 1 else 0, f"{r.getrandbits(34)} ")
    return "".join(parts)


def write_rows(path: Path, rows: list[dict], megabytes: float):
    "Write rows repeatedly, each time in another order and with other noise."
    r, room = random.Random(0), megabytes * 1e6
    part = path.with_suffix(".part")
    with open(part, "wb") as f:
        while room > 0:
            r.shuffle(rows)
            for row in rows:
                if "text" in row:
                    row = {"text": noisy(row["text"], r)}
                else:
                    conversation = list(row["conversations"])
                    which = r.choice(
                        [
                            i
                            for i, m in enumerate(conversation)
                            if m["role"] in ("user", "assistant") and m["content"]
                        ]
                    )
                    conversation[which] = {
                        **conversation[which],
                        "content": noisy(conversation[which]["content"], r),
                    }
                    row = {"conversations": conversation}
                line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
                f.write(line)
                room -= len(line)
                if room <= 0:
                    break
    os.replace(part, path)


def prepare(folder: Path, megabytes: float):
    "Write both files, a tokenizer, and the rendered conversations for the encoder."
    from minigpt.data.readers import parse_row
    from minigpt.data.tokensets import data_files, sample_texts
    from minigpt.tokenizer.bpe import load_tokenizer, train_tokenizer

    for kind in KINDS:
        if not (f := folder / f"{kind}-{megabytes:g}.jsonl").exists():
            write_rows(f, base_rows(kind, folder), megabytes)
    files = {k: folder / f"{k}-{megabytes:g}.jsonl" for k in KINDS}
    if not (folder / "tokenizer" / "tokenizer.json").exists():
        train_tokenizer(sample_texts(data_files(files.values())), 15_000).save(folder / "tokenizer")
    for kind, f in files.items():
        rendered = f.with_suffix(".rendered")
        if kind == "text" or rendered.exists():
            continue
        tok = load_tokenizer(folder / "tokenizer")
        with open(f.with_suffix(".part"), "wb") as out:
            for line in open(f, "rb"):
                out.write(
                    json.dumps(
                        tok.render(parse_row(line, 1)[0].messages), ensure_ascii=False
                    ).encode()
                    + b"\n"
                )
        os.replace(f.with_suffix(".part"), rendered)
    return files


def texts_of(file: Path, limit: float = 1.0) -> tuple[list[str], int]:
    "Return the texts for the encoder, and the number of bytes of the JSONL file that they cover."
    rendered, texts, size, most = file.with_suffix(".rendered"), [], 0, limit * file.stat().st_size
    others = open(rendered, "rb") if rendered.exists() else None
    for line in open(file, "rb"):
        texts.append(json.loads(others.readline()) if others else json.loads(line)["text"])
        size += len(line)
        if size >= most:
            break
    return texts, size


# --- the methods: each in its own process ---------------------------------------------------------
def own(clock, folder, file, out):
    "`build_tokenset`."
    from minigpt.data.tokensets import build_tokenset
    from minigpt.tokenizer.bpe import load_tokenizer

    tok = load_tokenizer(folder / "tokenizer")
    with clock:
        data, _ = build_tokenset(file, tok, out, 0.0, progress=False)
    return dict(
        bytes=file.stat().st_size,
        tokens=len(data),
        rows=data.meta["n_docs"],
        refused=sum(v["count"] for v in data.meta["refused"].values()),
    )


def plain_tiktoken(tok):
    "Return tiktoken with the vocabulary and the complete pattern of our tokenizer."
    import tiktoken

    from minigpt.tokenizer.bpe import PATTERN

    return tiktoken.Encoding(
        "plain",
        pat_str=PATTERN,
        mergeable_ranks=tok.fast._mergeable_ranks,
        special_tokens={t["content"]: t["id"] for t in tok.json["added_tokens"]},
    )


def _how(name: str, special: bool, tok):
    "Return the number of tokens of some texts with one encoder."
    fast, allowed = plain_tiktoken(tok), "all" if special else set()
    if name == "encode_batch":
        return lambda texts: len(tok.encode_batch(texts, special)[0])
    if name == "to_numpy":
        return lambda texts: sum(
            len(fast.encode_to_numpy(t, allowed_special=allowed, disallowed_special=()))
            for t in texts
        )
    if special:
        return lambda texts: sum(
            len(fast.encode(t, allowed_special="all", disallowed_special=())) for t in texts
        )
    return lambda texts: sum(len(fast.encode_ordinary(t)) for t in texts)


_work = None


def _count(part):
    return _work(_texts[part])


def encoder(clock, folder, file, out, name, workers, limit=1.0):
    "Encode texts to ids and discard them."
    global _work, _texts
    from minigpt.tokenizer.bpe import load_tokenizer

    _texts, size = texts_of(file, limit)
    n, _work = (
        len(_texts),
        _how(name, file.with_suffix(".rendered").exists(), load_tokenizer(folder / "tokenizer")),
    )
    at = [slice(i, i + 500) for i in range(0, n, 500)]
    _work(["warm"])
    with clock:
        if workers == "1 process":
            total = sum(map(_count, at))
        elif workers == "2 threads":
            with ThreadPoolExecutor(2) as pool:
                total = sum(pool.map(_count, at))
        else:
            with ProcessPoolExecutor(2, get_context("fork")) as pool:
                total = sum(pool.map(_count, at))
    return dict(bytes=size, tokens=total, rows=n)


def nanogpt(clock, folder, file, out, num_proc, batched):
    "`datasets.map`, then a memmap."
    os.environ.update(
        HF_DATASETS_CACHE=str(out / "cache"), HF_HOME=str(out / "home"), HF_HUB_OFFLINE="1"
    )
    import datasets
    import numpy as np

    from minigpt.tokenizer.bpe import load_tokenizer

    datasets.disable_progress_bars()
    enc = plain_tiktoken(load_tokenizer(folder / "tokenizer"))
    eos = enc.encode_single_token("<|endoftext|>")
    if batched:

        def process(rows):
            ids = [enc.encode_ordinary(t) + [eos] for t in rows["text"]]
            return dict(ids=ids, len=[len(i) for i in ids])

    else:

        def process(row):
            ids = enc.encode_ordinary(row["text"])
            ids.append(eos)
            return dict(ids=ids, len=len(ids))

    with clock:
        data = datasets.load_dataset("json", data_files=str(file), split="train")
        read = time.perf_counter() - clock.began
        data = data.map(
            process,
            remove_columns=["text"],
            num_proc=num_proc if num_proc > 1 else None,
            batched=batched,
        )
        mapped = time.perf_counter() - clock.began
        length = np.sum(data["len"], dtype=np.uint64)
        arr = np.memmap(out / "train.bin", np.uint16, "w+", shape=(int(length),))
        at, shards = (
            0,
            1 + (file.stat().st_size >> 21),
        )  # its 1,024 are for a file 200 times as large, and would cost more here
        for i in range(shards):
            part = np.concatenate(
                data.shard(num_shards=shards, index=i, contiguous=True).with_format("numpy")["ids"][
                    :
                ]
            )
            arr[at : at + len(part)] = part
            at += len(part)
        arr.flush()
    return dict(
        bytes=file.stat().st_size,
        tokens=int(length),
        rows=len(data),
        note=(
            f"reading {read:.0f} s, map {mapped - read:.0f} s, memmap"
            f" {clock.seconds - mapped:.0f} s"
        ),
    )


def minimind(clock, folder, file, out, workers, seconds, by_hand=False):
    "Tokenize in `__getitem__`."
    # Single texts leave nothing to parallelize, and the threads would hang forked workers.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    import torch
    from transformers import PreTrainedTokenizerFast

    from minigpt.tokenizer.bpe import chat_messages

    torch.set_num_threads(1)
    config = json.loads((folder / "tokenizer" / "tokenizer_config.json").read_text())
    tok = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer" / "tokenizer.json"),
        eos_token=config["eos_token"],
        pad_token=config["pad_token"],
        chat_template=config["chat_template"],
    )
    began, ended = (
        tok(t, add_special_tokens=False).input_ids
        for t in ("<|im_start|>assistant\n", "<|im_end|>")
    )

    class Rows(torch.utils.data.Dataset):
        def __init__(self):
            self.rows, self.sizes = zip(
                *((json.loads(line), len(line)) for line in open(file, "rb"))
            )

        def __len__(self):
            return len(self.rows)

        def loss_mask(self, ids):
            mask, i = [0] * len(ids), 0
            while i < len(ids):
                if ids[i : i + len(began)] != began:
                    i += 1
                    continue
                start = end = i + len(began)
                while end < len(ids) and ids[end : end + len(ended)] != ended:
                    end += 1
                for j in range(start, min(end + len(ended), len(ids))):
                    mask[j] = 1
                i = end + len(ended)
            return mask

        def __getitem__(self, i):
            if "text" in self.rows[i] and by_hand:
                ids = tok(
                    self.rows[i]["text"],
                    add_special_tokens=False,
                    max_length=SEQ - 1,
                    truncation=True,
                ).input_ids + [tok.eos_token_id]
                n = len(ids)
                ids = torch.tensor(ids + [tok.pad_token_id] * (SEQ - n))
                labels = ids.clone()
                labels[n:] = -100
            elif "text" in self.rows[i]:
                made = tok(
                    self.rows[i]["text"],
                    max_length=SEQ,
                    padding="max_length",
                    truncation=True,
                    return_tensors="pt",
                )
                ids = made.input_ids.squeeze(0)
                labels = torch.where(made.attention_mask.squeeze(0) == 1, ids, -100)
            else:
                messages, tools = chat_messages(self.rows[i]["conversations"])
                text = tok.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=False
                )
                ids = tok(text).input_ids[:SEQ]
                ids += [tok.pad_token_id] * (SEQ - len(ids))
                mask = torch.tensor(self.loss_mask(ids), dtype=torch.bool)
                ids = torch.tensor(ids)
                labels = torch.where(mask, ids, -100)
            return ids, labels, self.sizes[i]

    start = time.perf_counter()
    rows = Rows()
    start = time.perf_counter() - start
    it = iter(
        torch.utils.data.DataLoader(
            rows,
            batch_size=16,
            shuffle=True,
            num_workers=workers,
            generator=torch.Generator().manual_seed(0),
        )
    )
    for _ in range(20):
        next(it)
    size = n = 0
    with clock:
        while time.perf_counter() - clock.began < seconds and (batch := next(it, None)) is not None:
            size += int(batch[2].sum())
            n += 16
    return dict(
        bytes=size,
        rows=n,
        note=f"reading the rows {start:.0f} s, then {size / 1e6:.0f} MB of the epoch",
    )


def analysis(clock, folder, file, out, near):
    import minigpt.data.quality as q
    from minigpt.data.quality import analyze

    q._ftfy()
    with clock:
        r = analyze(file, near_duplicates=near, progress=False)
    return dict(
        bytes=file.stat().st_size,
        rows=r["total_samples"],
        note=f"{r['duplicate_rate']:.2%} duplicates"
        + (f", {r['near_duplicate_rate']:.0%} more nearly" if near else ""),
    )


def loading(clock, folder, file, out, batch, seq, workers, n):
    import torch

    from minigpt.data.tokensets import loader, open_set

    torch.set_num_threads(2)
    data = open_set(file / "train")
    data.n_windows(seq)
    it = iter(loader(data, range(n + 9), batch, seq, 0, workers))
    for _ in range(9):
        next(it)
    with clock:
        for _ in range(n):
            next(it)
    return dict(batches=n)


def training(clock, folder, file, out, batch, seq, workers, steps):
    "Train in a bare loop: all time except waiting is forward, backward and the optimizer."
    import torch

    from minigpt.data.tokensets import loader, open_set
    from minigpt.model.gpt import GPT, GPTConfig

    torch.set_num_threads(2)
    torch.manual_seed(0)
    data = open_set(file / "train")
    data.n_windows(seq)
    model = GPT(GPTConfig.preset("tiny", vocab_size=15_000)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    it, waits = iter(loader(data, range(steps + 5), batch, seq, 0, workers)), 0.0

    def step(b):
        model.loss(**b).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    for _ in range(4):
        step(next(it))
    with clock:
        for _ in range(steps):
            began = time.perf_counter()
            b = next(it)
            waits += time.perf_counter() - began
            step(b)
    return dict(waits=waits, steps=steps)


def first_batch(clock, folder, file, out):
    began = time.perf_counter()
    import hashlib

    from minigpt.data.tokensets import open_set

    imports = time.perf_counter() - began
    with clock:
        data = open_set(file)
        opened = time.perf_counter() - clock.began
        if hasattr(data, "packs"):
            data.packs(SEQ)
        packed = time.perf_counter() - clock.began
        batch = data.batch(12345, 8, SEQ)
    return dict(
        imports=imports,
        opened=opened,
        packed=packed - opened,
        batch=clock.seconds - packed,
        same=hashlib.sha1(b"".join(v.tobytes() for v in batch.values())).hexdigest(),
        rows=data.meta["n_docs"],
    )


METHODS = dict(
    own=own,
    encoder=encoder,
    nanogpt=nanogpt,
    minimind=minimind,
    analysis=analysis,
    loading=loading,
    training=training,
    first_batch=first_batch,
)


class Clock:
    "Wall and processor time of a block, including child processes."

    def cpu(self):
        import psutil

        used = sum(os.times()[:4])
        for p in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                used += sum(p.cpu_times()[:2])
        return used

    def __enter__(self):
        self.used = self.cpu()
        self.began = time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.began
        self.used = max(1e-6, self.cpu() - self.used)


# --- measurement ----------------------------------------------------------------------------------
def memory_of(p) -> tuple[int, int]:
    "Return the bytes of a process with its share of shared pages: without and with mapped files."
    try:
        found = {
            k: int(v.split()[0]) * 1024
            for k, _, v in (
                l.partition(":")
                for l in Path(f"/proc/{p.pid}/smaps_rollup").read_text().splitlines()[1:]
            )
        }
        return found["Pss_Anon"] + found["Pss_Shmem"], found["Pss"]
    except (OSError, KeyError):
        pass
    try:
        m = p.memory_full_info()
        return m.uss, getattr(m, "pss", m.uss)
    except Exception:
        return 0, 0


def run(method: str, folder: Path, file: Path, **how) -> dict:
    "Run a method in its own process and record its peak memory."
    import psutil

    with tempfile.TemporaryDirectory(dir=folder) as out:
        job = json.dumps(dict(method=method, folder=str(folder), file=str(file), out=out, how=how))
        with tempfile.TemporaryFile() as errors:
            p = subprocess.Popen(
                [sys.executable, __file__, "--child", job],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            )
            peak = [0, 0]

            def watch():
                root, tree, n = psutil.Process(p.pid), [], 0
                while p.poll() is None:
                    try:
                        tree = tree if n % 4 else [root, *root.children(recursive=True)]
                    except psutil.Error:
                        break
                    usage = [memory_of(x) for x in tree]
                    n += 1
                    for i in 0, 1:
                        peak[i] = max(peak[i], sum(m[i] for m in usage))
                    time.sleep(0.25)

            watcher = threading.Thread(target=watch, daemon=True)
            watcher.start()
            text = p.communicate()[0]
            watcher.join()
            if p.returncode:
                errors.seek(0)
                sys.exit(f"{method} {how} failed:\n{errors.read()[-4000:].decode()}")
    m = json.loads(text.splitlines()[-1])
    return dict(
        m,
        memory=peak[0] / 1e6,
        with_files=peak[1] / 1e6,
        rate=m.get("bytes", 0) / 1e6 / m["seconds"],
        cores=m["used"] / m["seconds"],
        per_core=m.get("bytes", 0) / 1e6 / m["used"],
    )


def child(job: dict):
    clock = Clock()
    m = METHODS[job["method"]](
        clock, Path(job["folder"]), Path(job["file"]), Path(job["out"]), **job["how"]
    )
    print(json.dumps(dict(m, seconds=clock.seconds, used=clock.used)))


def run_alternating(methods: dict, rounds: int) -> dict[str, list[dict]]:
    "Return name → measurements; the order changes every round."
    out = {k: [] for k in methods}
    for r in range(rounds):
        for k in list(methods)[:: -1 if r % 2 else 1]:
            out[k].append(methods[k]())
            report(k, out[k][-1])
    return out


def report(name: str, m: dict):
    if VERBOSE:
        print(
            f"    {name}: {m['seconds']:.1f} s, "
            + (f"{m['rate']:.2f} MB/s, " if m["rate"] else "")
            + f"{m['cores']:.2f} cores, {m['memory']:.0f} MB {m.get('note', '')}",
            flush=True,
        )


VERBOSE = False
median = lambda ms, k: statistics.median(m[k] for m in ms)


def best(methods: dict) -> tuple[dict, dict]:
    "Run each of several settings once; return the fastest, and all rates."
    found = {k: f() for k, f in methods.items()}
    for k, m in found.items():
        report(k, m)
    return max(found, key=lambda k: found[k]["rate"]), {k: m["rate"] for k, m in found.items()}


def table(title: str, rows: list[tuple], heads: tuple):
    print(f"\n{title}")
    rows = [tuple(map(str, r)) for r in rows]
    width = [max(len(r[i]) for r in [heads, *rows]) for i in range(len(heads))]
    for r in [heads, *rows]:
        print(
            "  "
            + "  ".join(
                x.ljust(w) if i == 0 or i == len(heads) - 1 and heads[-1] == "" else x.rjust(w)
                for i, (x, w) in enumerate(zip(r, width))
            ).rstrip()
        )
    sys.stdout.flush()


# --- the parts ------------------------------------------------------------------------------------
def have_datasets() -> bool:
    from importlib.util import find_spec

    return find_spec("datasets") is not None


def part_a(folder: Path, files: dict, a):
    for kind in a.kinds:
        file = files[kind]
        runs = lambda method, **how: lambda: run(method, folder, file, **how)
        encoders = {
            f"{n}, {w}": dict(name=n, workers=w)
            for n in ("encode_batch", "to_numpy", "ordinary")
            for w in ("1 process", "2 threads", "2 processes")
        }
        fastest, rates = best(
            {k: runs("encoder", **how, limit=0.25) for k, how in encoders.items()}
        )
        print(
            f"\nencoder, {NAMES[kind]}, MB/s on a quarter of the file: "
            + "; ".join(f"{k}: {r:.2f}" for k, r in rates.items())
        )
        methods, chosen = (
            {"minigpt": runs("own"), "encoder": runs("encoder", **encoders[fastest])},
            dict(encoder=fastest),
        )
        if kind == "text" and have_datasets():
            settings = {
                f"num_proc {n}{', batched' if b else ''}": dict(num_proc=n, batched=b)
                for n, b in ((2, False), (1, False), (2, True))
            }
            with open(file, "rb") as f, open(part := folder / "quarter.jsonl", "wb") as q:
                q.writelines(f.readlines(file.stat().st_size // 4))
            setting, rates = best(
                {
                    k: lambda how=how: run("nanogpt", folder, part, **how)
                    for k, how in settings.items()
                }
            )
            print(
                "nanoGPT, MB/s on a quarter of the file: "
                + "; ".join(f"{k}: {r:.2f}" for k, r in rates.items())
            )
            methods["nanoGPT"], chosen["nanoGPT"] = runs("nanogpt", **settings[setting]), setting
        elif kind == "text":
            print("datasets is not installed, so nanoGPT is not measured: pip install datasets")
        settings = {
            f"{w} workers{', padded by hand' if h else ''}": dict(workers=w, by_hand=h)
            for h in ((False, True) if kind == "text" else (False,))
            for w in (0, 2)
        }
        setting, rates = best(
            {k: runs("minimind", **how, seconds=a.seconds) for k, how in settings.items()}
        )
        print("MiniMind, MB/s: " + "; ".join(f"{k}: {r:.2f}" for k, r in rates.items()))
        methods["MiniMind"], chosen["MiniMind"] = (
            runs("minimind", **settings[setting], seconds=a.seconds),
            setting,
        )
        found = run_alternating(methods, a.rounds)
        ours = median(found["minigpt"], "rate")
        table(
            f"(a) JSONL → ids, {file.stat().st_size / 1e6:,.0f} MB of {NAMES[kind]},"
            f" {found['minigpt'][0]['rows']:,} rows; medians of {a.rounds}",
            [
                (
                    f"{k}" + (f" ({chosen[k]})" if k in chosen else ""),
                    f"{median(m, 'rate'):.2f}",
                    f"{min(x['rate'] for x in m):.2f}–{max(x['rate'] for x in m):.2f}",
                    f"{median(m, 'cores'):.2f}",
                    f"{median(m, 'per_core'):.2f}",
                    f"{ours / median(m, 'rate'):.2f}",
                    f"{max(x['memory'] for x in m):,.0f}",
                    f"{max(x['with_files'] for x in m):,.0f}",
                    m[-1].get("note", ""),
                )
                for k, m in found.items()
            ],
            ("", "MB/s", "of", "cores", "MB/s per core", "ours/this", "memory MB", "+ files", ""),
        )
        core = median(found["minigpt"], "per_core") / median(found["encoder"], "per_core")
        others = max(median(m, "rate") for k, m in found.items() if k not in ("minigpt", "encoder"))
        print(
            f"  {100 * ours / median(found['encoder'], 'rate'):.0f}% of the encoder alone (goal"
            " 85),"
            f" {100 * core:.0f}% per second of processor time; {ours / others:.2f} × the"
            " faster of the others (goal 3)"
        )
        compare_ids(folder, file, found, kind)
    if a.large:
        for kind in a.kinds[:1]:
            big = folder / f"{kind}-{10 * a.megabytes:g}.jsonl"
            if not big.exists():
                write_rows(big, base_rows(kind, folder), 10 * a.megabytes)
            small, large = run("own", folder, files[kind]), run("own", folder, big)
            if not a.keep:
                big.unlink()
            table(
                f"(a) our memory, {NAMES[kind]}",
                [
                    (
                        f"{m['bytes'] / 1e6:,.0f} MB, {m['rows']:,} rows",
                        f"{m['rate']:.2f}",
                        f"{m['memory']:,.0f}",
                        f"{m['with_files']:,.0f}",
                    )
                    for m in (small, large)
                ],
                ("file", "MB/s", "memory MB", "+ files"),
            )


def compare_ids(folder: Path, file: Path, found: dict, kind: str):
    "Compare the ids with the encoder's."
    import numpy as np

    from minigpt.data.tokensets import build_tokenset
    from minigpt.tokenizer.bpe import load_tokenizer

    tok, ours, alone = (
        load_tokenizer(folder / "tokenizer"),
        found["minigpt"][0],
        found["encoder"][0],
    )
    extra = ours["rows"] if kind == "text" else 0
    print(
        f"  ids: ours {ours['tokens']:,} = the encoder's {alone['tokens']:,} + {extra:,} ends:"
        f" {ours['tokens'] == alone['tokens'] + extra}; refused rows: {ours['refused']}",
        end="",
    )
    if "nanoGPT" in found:
        print(f"; nanoGPT's {found['nanoGPT'][0]['tokens']:,}", end="")
    data, _ = build_tokenset(file, tok, tokens_folder(folder, file), 0.0, progress=False)
    starts = np.append(np.load(data.path / "docs.npy"), len(data))
    texts, _ = texts_of(file)
    which = random.Random(1).sample(range(len(texts)), min(1000, len(texts)))
    plain = plain_tiktoken(tok)
    encode = (
        (lambda t: plain.encode(t, allowed_special="all"))
        if kind == "chat"
        else (lambda t: plain.encode_ordinary(t) + [tok.eos_id])
    )
    equal = sum(data.tokens[starts[i] : starts[i + 1]].tolist() == encode(texts[i]) for i in which)
    print(f"; {equal:,} of {len(which):,} rows are equal, id by id")


def tokens_folder(folder: Path, file: Path) -> Path:
    return folder / f"{file.stem}.tokens"


def part_b(folder: Path, files: dict, a):
    found = run_alternating(
        {
            (k, near): lambda k=k, near=near: run("analysis", folder, files[k], near=near)
            for k in a.kinds
            for near in (False, True)
        },
        a.rounds,
    )
    table(
        f"(b) analyze, {a.megabytes:g} MB; medians of {a.rounds}",
        [
            (
                f"{NAMES[k]}, {'with' if near else 'without'} near-duplicates",
                f"{median(m, 'rate'):.2f}",
                f"{min(x['rate'] for x in m):.2f}–{max(x['rate'] for x in m):.2f}",
                8 if near else 20,
                f"{median(m, 'cores'):.2f}",
                f"{median(m, 'per_core'):.2f}",
                f"{max(x['memory'] for x in m):,.0f}",
                m[0]["note"],
            )
            for (k, near), m in found.items()
        ],
        ("", "MB/s", "of", "goal", "cores", "MB/s per core", "memory MB", ""),
    )


def part_c(folder: Path, files: dict, a):
    from minigpt.data.tokensets import build_tokenset
    from minigpt.tokenizer.bpe import load_tokenizer

    sets = {k: tokens_folder(folder, files[k]) for k in a.kinds}
    for k in a.kinds:
        build_tokenset(files[k], load_tokenizer(folder / "tokenizer"), sets[k], 0.0, progress=False)
    cases = [(k, b, s, w) for k in a.kinds for b, s in ((16, 512), (8, 256)) for w in (0, 2)]
    for k in a.kinds:
        for s in 256, 512:
            run("loading", folder, sets[k], batch=8, seq=s, workers=0, n=5)  # packs the rows
    found = run_alternating(
        {
            c: lambda c=c: run(
                "loading", folder, sets[c[0]], batch=c[1], seq=c[2], workers=c[3], n=BATCHES
            )
            for c in cases
        },
        a.rounds,
    )
    table(
        f"(c) loader; medians of {a.rounds}",
        [
            (
                f"{NAMES[k]}, {b} × {s}, {w} workers",
                f"{BATCHES / median(m, 'seconds'):,.0f}",
                f"{BATCHES / median(m, 'seconds') * b * s / 1e6:.1f}",
                f"{1000 * median(m, 'seconds') / BATCHES:.2f}",
            )
            for (k, b, s, w), m in found.items()
        ],
        ("", "batches/s", "million positions/s", "ms per batch"),
    )
    found = run_alternating(
        {
            (k, w): lambda k=k, w=w: run(
                "training", folder, sets[k], batch=8, seq=256, workers=w, steps=30
            )
            for k in a.kinds
            for w in (0, 2)
        },
        a.rounds,
    )
    table(
        "(c) waiting for data: preset tiny, 8 × 256, 30 steps; goal < 1%",
        [
            (
                f"{NAMES[k]}, {w} workers",
                f"{1000 * median(m, 'seconds') / 30:.0f}",
                f"{1000 * median(m, 'waits') / 30:.2f}",
                f"{100 * statistics.median(x['waits'] / x['seconds'] for x in m):.2f}%",
            )
            for (k, w), m in found.items()
        ],
        ("", "ms per step", "of them waiting", "share"),
    )


def synthetic(path: Path, chat: bool, tokens: int = 1_010_000_000, rows: int = 3 * 10**6):
    "Write a token set of random ids in the format of `build_tokenset`."
    import numpy as np

    path.mkdir()
    dice = np.random.Generator(np.random.PCG64(0))
    lengths = np.maximum(8, dice.lognormal(0, 0.8, rows))
    lengths = np.maximum(8, (lengths * tokens / lengths.sum())).astype(np.int64)
    n = int(lengths.sum())
    starts = np.cumsum(lengths) - lengths
    np.save(path / "docs.npy", starts)
    with open(path / "tokens.bin", "wb") as f:
        for i in range(0, n, 1 << 24):
            f.write(dice.integers(0, 15_000, min(1 << 24, n - i), np.uint16).tobytes())
    if chat:
        with open(path / "mask.bin", "wb") as f:  # the second half of each row has loss
            for i in range(0, rows, 100_000):
                l = lengths[i : i + 100_000]
                f.write(
                    (
                        np.arange(l.sum()) - np.repeat(np.cumsum(l) - l, l) > np.repeat(l // 2, l)
                    ).tobytes()
                )
    (path / "meta.json").write_text(
        json.dumps(
            dict(
                format="minigpt token set",
                version=1,
                n_tokens=n,
                n_docs=rows,
                dtype="uint16",
                fingerprint="0" * 32,
                kind="conversation" if chat else "text",
                sources=[],
                tokenizer="",
                options={},
                refused={},
                mended={},
            )
        )
    )


def part_d(folder: Path, files: dict, a):
    rows = []
    for kind in a.kinds:
        path = folder / f"synthetic-{kind}"
        synthetic(path, kind == "chat")
        ms = [run("first_batch", folder, path) for _ in range(1 + a.rounds)]
        size = sum(f.stat().st_size for f in path.iterdir()) / 1e9
        assert len({m["same"] for m in ms}) == 1, "the batch differs after a restart"
        shutil.rmtree(path)
        for what, m in (
            (f"{NAMES[kind]}, {size:.1f} GB, {ms[0]['rows']:,} rows: first start", ms[:1]),
            (f"{NAMES[kind]}: restart", ms[1:]),
        ):
            rows.append(
                (
                    what,
                    *(
                        f"{median(m, k):.3f}"
                        for k in ("opened", "packed", "batch", "seconds", "imports")
                    ),
                    f"{max(x['memory'] for x in m):,.0f}",
                )
            )
    table(
        "(d) seconds to the first batch, 8 × 512; goal < 1 s at a restart",
        rows,
        ("", "open", "packs", "batch", "all", "(import before)", "memory MB"),
    )


def main():
    global VERBOSE
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--parts", nargs="+", choices="abcd", default=list("abcd"))
    p.add_argument(
        "--kinds",
        nargs="+",
        choices=list(KINDS),
        default=list(KINDS),
        help="text: texts; chat: conversations",
    )
    p.add_argument("--megabytes", type=float, default=200, help="size of each data file")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument(
        "--seconds",
        type=float,
        default=10,
        help="seconds per measurement of MiniMind",
    )
    p.add_argument(
        "--large",
        action="store_true",
        help="(a) also measure our memory on a file ten times as large",
    )
    p.add_argument(
        "--keep",
        help="a folder for the files, kept for the next run; default: a temporary one",
    )
    p.add_argument("--verbose", action="store_true", help="print each measurement")
    p.add_argument("--child", help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child:
        return child(json.loads(a.child))
    VERBOSE = a.verbose
    import tiktoken
    import tokenizers

    print(
        f"{os.cpu_count()} cores ({platform.machine()}, load {os.getloadavg()[0]:.1f}), Python"
        f" {platform.python_version()}, tiktoken {tiktoken.__version__}, tokenizers"
        f" {tokenizers.__version__}"
    )
    if a.keep:
        Path(a.keep).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=a.keep) as temporary:
        folder = Path(a.keep or temporary)
        need = 1e6 * a.megabytes * (8 + 20 * a.large) + 4e9 * ("d" in a.parts)
        if (free := shutil.disk_usage(folder).free) < need:
            sys.exit(
                f"{folder} has {free / 1e9:.1f} GB free, and {need / 1e9:.1f} GB are needed; set"
                " TMPDIR to another disk, or pass --keep, or a smaller --megabytes"
            )
        files = prepare(folder, a.megabytes) if set(a.parts) & set("abc") else {}
        for part in a.parts:
            globals()[f"part_{part}"](folder, files, a)
    return None


if __name__ == "__main__":
    main()
