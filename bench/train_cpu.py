"""Tokens/s of `minigpt.train.fit` and other training loops on the CPU: the same model and data.

    python -m bench.train_cpu            # 3 rounds of 40 steps, 5 minutes on 2 quiet cores
    python -m bench.train_cpu --nanogpt DIR --minimind DIR     # their loops too
    python -m bench.train_cpu --all      # all settings of each program

The folders are copies of github.com/karpathy/nanoGPT and jingyaogong/minimind. With --all the
Trainer's fastest setting counts.

The model: vocabulary 6,400, 4 layers, 4 heads (4 for keys and values), width 256, FFN 1,024, tied,
5,835,008 parameters; 8 sequences of 256 tokens per step, fp32, AdamW, gradients clipped at 1,
constant learning rate (all programs reach it at step 1). Each measurement runs in its own process,
and the order changes every round. Time is measured between steps, in callbacks of the programs:
from the end of the first 5 steps to the last step but one, so that start-up, compiling and the
final save are excluded.

minigpt fit    `fit` with its defaults, without progress bar, plot and validation: it logs and
               checks its losses as always. It is configured as a run of 10,000 steps and stopped
               early, so that it makes the choices of a long run: `enable_compile="auto"` does not
               compile a run of seconds. `--all` measures it eager, compiled and in bf16 too.
Trainer        with the best settings that we found (TRAINER below): no saving, evaluation, logging
               or progress bar, no check for NaN, tokens prepared as tensors and sliced into
               batches, no key/value cache, labels already shifted. `--all` measures its attention
               kernels and AdamWs, and torch.compile. Tokens/s in one or two quiet measurements
               each: sdpa and fused 2,701, sdpa and plain 2,558 and 2,633, eager and fused 2,724,
               eager and plain 2,741; sdpa and fused alone ranged from 2,620 to 2,850 in six more,
               so the differences are noise.
nanoGPT        its unchanged train.py with its own data loader and its model, a GPT-2: learned
               positions (65,536 parameters more), LayerNorm, GELU. The two matrices of its FFN are
               half as wide again (1,536), so that they have as many parameters as the three of a
               Llama. It draws batches at random.
MiniMind       the loop of its train_pretrain.py on its model, a Llama with norms on queries and
               keys (512 parameters more), with the same weights and batches as ours, prepared as
               tensors. Its AdamW has torch's defaults, and it shifts labels itself, so 255 of 256
               positions have loss.
floor          only the matrix products of such a step, in the same precision: forward and backward
               of every linear layer, of the output layer and of attention, for half of the
               positions because of the causal mask. Results are written to existing memory.
If `fit` chooses bf16, because the processor supports it, the Trainer and the floor are measured in
bf16 too.

Each round checks what is comparable: the Trainer has as many parameters as `fit`, and losses equal
to 0.5% (2% in bf16); the final losses of nanoGPT and MiniMind differ by less than 0.1; all losses
fall. "others" is how many cores other programs used meanwhile. On two cores one other busy program
makes the figures useless (each matrix product waits for its slower thread: 2,700 tokens/s can
become 400), so each measurement waits for a quiet machine (at most --wait seconds), and is repeated
(at most --retries times) if others used more than a fifth of a core. The last line is the median
over the rounds of ours in its defaults / Trainer.
"""

import argparse
import contextlib
import io
import json
import os
import pickle
import platform
import re
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

ROOT = Path(__file__).resolve().parents[1]

SHAPE = dict(vocab_size=6400, dim=256, n_layer=4, n_head=4, n_kv_head=4, ffn_dim=1024, max_len=256)
BATCH, SEQ, WARM = 8, 256, 5
ANNOUNCED = 10_000  # steps of the run that `fit` plans
RECIPE = dict(learning_rate=1e-3, weight_decay=0.1, adam_beta1=0.9, adam_beta2=0.99)
OURS = {
    "minigpt fit": {},
    "minigpt eager": dict(enable_compile="no", precision="fp32"),
    "minigpt compiled": dict(enable_compile="yes", precision="fp32"),
    "minigpt bf16": dict(precision="bf16"),
}
TRAINER = "Trainer sdpa adamw_torch_fused"
TRAINERS = [
    *(f"Trainer {a} {o}" for a in ("sdpa", "eager") for o in ("adamw_torch_fused", "adamw_torch")),
    TRAINER + " compiled",
    TRAINER + " bf16",
]


def programs(a) -> list[str]:
    "Return the programs to measure; bf16 in any case if `fit` chooses it."
    from minigpt.config.options import TrainConfig
    from minigpt.train.speed import choose_runtime

    halves = (
        [" bf16"]
        if choose_runtime(TrainConfig(device="cpu", num_threads=a.threads)).precision == "bf16"
        else []
    )
    peers = [n for n, d in (("nanoGPT", a.nanogpt), ("MiniMind", a.minimind)) if d]
    if a.all:
        return [
            *OURS,
            "floor fp32",
            "floor bf16",
            *TRAINERS,
            *(f"{p} {how}" for p in peers for how in ("eager", "compiled")),
        ]
    return [
        "minigpt fit",
        "floor fp32",
        *("floor" + h for h in halves),
        TRAINER,
        *(TRAINER + h for h in halves),
        *(f"{p} eager" for p in peers),
    ]


# --- what the processes share ---------------------------------------------------------------------
def prepare(folder: Path, steps: int):
    """Write the token set of the built-in corpus, its tokenizer, and initial weights.

    Also write the batches of every step as tensors.
    """
    import torch
    from safetensors.torch import save_file

    from minigpt.data.corpus import write_corpus
    from minigpt.data.tokensets import build_tokenset, check_size, data_files, loader, sample_texts
    from minigpt.model.gpt import GPT, GPTConfig
    from minigpt.tokenizer.bpe import train_tokenizer

    write_corpus(folder / "stories.jsonl")
    tok = train_tokenizer(sample_texts(data_files(folder / "stories.jsonl")), SHAPE["vocab_size"])
    tok.save(folder / "tokenizer")
    data, _ = build_tokenset(folder / "stories.jsonl", tok, folder / "data", 0.0, progress=False)
    check_size(data, BATCH, SEQ)
    torch.manual_seed(0)
    save_file(GPT(GPTConfig(**SHAPE)).weights(), folder / "weights.safetensors")
    batches = list(loader(data, range(steps), BATCH, SEQ, 0))
    save_file(
        {k: torch.cat([b[k] for b in batches]).contiguous() for k in ("input_ids", "labels")},
        folder / "batches.safetensors",
    )
    print(f"{len(data):,} tokens of the built-in corpus, {tok.vocab_size:,} in the vocabulary")


class Clock:
    "The end of each step, and the processor time that we and all programs had used by then."

    def __init__(self):
        self.at = {}

    def tick(self, step: int):
        import psutil

        c = psutil.cpu_times()
        self.at[step] = (
            time.perf_counter(),
            time.process_time(),
            sum(c)
            - c.idle
            - getattr(c, "iowait", 0)
            - getattr(c, "guest", 0)
            - getattr(c, "guest_nice", 0),
        )

    def facts(self, first: int, last: int) -> dict:
        wall, own, busy = (b - a for a, b in zip(self.at[first], self.at[last]))
        times = sorted(self.at[i + 1][0] - self.at[i][0] for i in range(first, last))
        return dict(
            tokens_per_second=(last - first) * BATCH * SEQ / wall,
            others=max(0.0, (busy - own) / wall),
            step_ms=1000 * statistics.median(times),
        )


# --- the programs ---------------------------------------------------------------------------------
def run_ours(folder: Path, out: Path, steps: int, threads: int, **settings) -> dict:
    "`fit` with its defaults, or with other settings."
    from safetensors.torch import load_file

    from minigpt.data.tokensets import TokenSet
    from minigpt.model.gpt import GPT, GPTConfig
    from minigpt.run.folder import open_run
    from minigpt.tokenizer.bpe import load_tokenizer
    from minigpt.train.trainer import Callback, fit

    clock = Clock()

    class StopAfterMeasurement(Exception):
        "All steps are measured."

    class Tick(Callback):
        def on_step(self, t):
            clock.tick(t.step)
            if t.step == steps:
                raise StopAfterMeasurement

    model = (
        GPT(GPTConfig(**SHAPE))
        .requires_grad_(False)
        .load_weights(load_file(folder / "weights.safetensors"))
        .requires_grad_(True)
    )
    with contextlib.suppress(StopAfterMeasurement):
        fit(
            model,
            TokenSet(folder / "data" / "train"),
            tokenizer=load_tokenizer(folder / "tokenizer"),
            output_dir=out,
            callbacks=[Tick()],
            max_steps=ANNOUNCED,
            batch_size=BATCH,
            max_seq_len=SEQ,
            lr_schedule="constant",
            warmup_steps=0,
            num_threads=threads,
            progress=False,
            plot_loss=False,
            **RECIPE,
            **settings,
        )
    run = open_run(out)
    chosen = run.facts["choices"]
    return dict(
        clock.facts(WARM, steps - 1),
        params=sum(p.numel() for p in model.parameters()),
        losses=[r["loss"] for r in run.history if "loss" in r and r["step"] % 10 == 0],
        note=(
            f"{chosen['precision']}, {'not compiled' if chosen['compile'] == 'no' else 'compiled'}"
        ),
    )


def hf_llama(folder: Path, attention: str):
    "Return the model in transformers, with our weights."
    from safetensors.torch import load_file
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=SHAPE["vocab_size"],
            hidden_size=SHAPE["dim"],
            num_hidden_layers=SHAPE["n_layer"],
            num_attention_heads=SHAPE["n_head"],
            num_key_value_heads=SHAPE["n_kv_head"],
            intermediate_size=SHAPE["ffn_dim"],
            max_position_embeddings=SHAPE["max_len"],
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            use_cache=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation=attention,
            dtype="float32",
        )
    )
    wrong = model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    assert not wrong.unexpected_keys and wrong.missing_keys == ["lm_head.weight"], wrong
    return model


def hf_trainer(folder: Path, losses: list):
    "Return a Trainer with batches in our order that keeps its losses, and these batches."
    import torch
    from safetensors.torch import load_file
    from transformers import Trainer

    class Batches(torch.utils.data.Dataset):
        "A batch is a slice of the tensors; nothing to collate."

        def __init__(self):
            self.data = load_file(folder / "batches.safetensors")

        def __len__(self):
            return len(self.data["input_ids"])

        def __getitems__(self, index):
            cut = slice(index[0], index[-1] + 1)
            return dict(
                input_ids=self.data["input_ids"][cut],
                labels=self.data["labels"][cut],
                shift_labels=self.data["labels"][cut],
            )

    class OurTrainer(Trainer):
        def _get_train_sampler(self, dataset=None):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            losses.append(super().training_step(*args, **kwargs))
            return losses[-1]

    return OurTrainer, Batches()


def run_trainer(
    folder: Path, out: Path, steps: int, threads: int, attention: str, optim: str, *more: str
) -> dict:
    "Hugging Face Trainer."
    import torch
    from transformers import TrainerCallback, TrainingArguments

    torch.set_num_threads(threads)
    clock, losses = Clock(), []

    class Tick(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock.tick(state.global_step)

    model, OurTrainer, batches = hf_llama(folder, attention), *hf_trainer(folder, losses)
    args = TrainingArguments(
        output_dir=str(out),
        max_steps=steps,
        per_device_train_batch_size=BATCH,
        use_cpu=True,
        optim=optim,
        lr_scheduler_type="constant",
        warmup_steps=0,
        max_grad_norm=1.0,
        logging_strategy="no",
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_nan_inf_filter=False,
        torch_compile="compiled" in more,
        bf16="bf16" in more,
        remove_unused_columns=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=False,
        **RECIPE,
    )
    OurTrainer(
        model=model,
        args=args,
        train_dataset=batches,
        data_collator=lambda batch: batch,
        callbacks=[Tick()],
    ).train()
    losses = torch.stack(losses).tolist()
    return dict(
        clock.facts(WARM, steps - 1),
        params=sum(p.numel() for p in model.parameters()),
        losses=tens(losses),
    )


def tens(losses: list[float]) -> list[float]:
    return [statistics.mean(losses[i : i + 10]) for i in range(0, len(losses) - 9, 10)]


@contextlib.contextmanager
def tick_on_steps(clock: Clock, losses: list[float]):
    """Patch a foreign loop so that each optimizer step is a tick.

    Keep what it prints as `loss` (after a colon or a space).
    """
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda *_: clock.tick(len(clock.at) + 1))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        yield
    losses += [float(l) for l in re.findall(r"\bloss:? ([\d.]+)", printed.getvalue())]


def run_nanogpt(folder: Path, out: Path, steps: int, threads: int, source: str, how: str) -> dict:
    "Run nanoGPT's train.py from its own folder."
    import torch

    out.mkdir()
    os.symlink(folder / "data" / "train" / "tokens.bin", out / "train.bin")
    os.symlink(out / "train.bin", out / "val.bin")  # uint16 in both
    (out / "meta.pkl").write_bytes(pickle.dumps(dict(vocab_size=SHAPE["vocab_size"])))
    os.chdir(source)
    sys.path.insert(0, source)
    import model as nano

    narrow = nano.MLP.__init__

    def wide(self, c):
        narrow(self, c)
        width = 3 * SHAPE["ffn_dim"] // 2
        self.c_fc, self.c_proj = (
            torch.nn.Linear(c.n_embd, width, bias=False),
            torch.nn.Linear(width, c.n_embd, bias=False),
        )

    nano.MLP.__init__ = wide
    options = dict(
        dataset=out,
        out_dir=out,
        device="cpu",
        dtype="float32",
        compile=how == "compiled",
        batch_size=BATCH,
        block_size=SEQ,
        gradient_accumulation_steps=1,
        n_layer=SHAPE["n_layer"],
        n_head=SHAPE["n_head"],
        n_embd=SHAPE["dim"],
        learning_rate=RECIPE["learning_rate"],
        weight_decay=RECIPE["weight_decay"],
        beta1=RECIPE["adam_beta1"],
        beta2=RECIPE["adam_beta2"],
        decay_lr=False,
        max_iters=steps - 1,
        eval_iters=1,
        eval_interval=10**9,
    )
    sys.argv = ["train.py", *(f"--{k}={v}" for k, v in options.items())]
    torch.set_num_threads(threads)
    clock, losses = Clock(), []
    with tick_on_steps(clock, losses):
        model = runpy.run_path("train.py")["raw_model"]
    return dict(
        clock.facts(WARM, steps - 1),
        params=sum(p.numel() for p in model.parameters()),
        losses=tens(losses[-steps:]),
    )


def run_minimind(folder: Path, out: Path, steps: int, threads: int, source: str, how: str) -> dict:
    "The loop of MiniMind's train_pretrain.py."
    import torch
    from safetensors.torch import load_file

    sys.path.insert(0, source)
    try:
        __import__("datasets")
    except ImportError:  # it reads texts with it, and could not be imported without it
        absent = sys.modules["datasets"] = ModuleType("datasets")
        absent.__spec__, absent.__getattr__ = ModuleSpec("datasets", None), lambda name: None
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
    from trainer import train_pretrain as loop

    torch.set_num_threads(threads)
    model = MiniMindForCausalLM(
        MiniMindConfig(
            vocab_size=SHAPE["vocab_size"],
            hidden_size=SHAPE["dim"],
            num_hidden_layers=SHAPE["n_layer"],
            num_attention_heads=SHAPE["n_head"],
            num_key_value_heads=SHAPE["n_kv_head"],
            intermediate_size=SHAPE["ffn_dim"],
            max_position_embeddings=SHAPE["max_len"],
            rms_norm_eps=1e-5,
            rope_theta=1e4,
        )
    )
    wrong = model.load_state_dict(load_file(folder / "weights.safetensors"), strict=False)
    assert not wrong.unexpected_keys, wrong
    lr = RECIPE["learning_rate"]
    loop.args = SimpleNamespace(
        device="cpu",
        epochs=1,
        learning_rate=lr,
        accumulation_steps=1,
        grad_clip=1.0,
        log_interval=1,
        save_interval=10**9,
    )
    loop.model, loop.optimizer = (
        torch.compile(model) if how == "compiled" else model,
        torch.optim.AdamW(model.parameters(), lr=lr),
    )
    loop.scaler, loop.autocast_ctx, loop.get_lr = (
        torch.amp.GradScaler(enabled=False),
        contextlib.nullcontext(),
        lambda *_: lr,
    )
    ids = load_file(folder / "batches.safetensors")["input_ids"].split(BATCH)
    clock, losses = Clock(), []
    model.train()
    with tick_on_steps(clock, losses):
        loop.train_epoch(
            0, zip(ids, ids), 1 + len(ids)
        )  # as if one more were to come: then it does not save
    return dict(
        clock.facts(WARM, steps - 1),
        params=sum(p.numel() for p in model.parameters()),
        losses=tens(losses),
    )


def run_floor(steps: int, threads: int, precision: str) -> dict:
    "Compute only the matrix products of a step."
    import torch

    torch.set_num_threads(threads)
    new = lambda *shape: torch.randn(*shape).to(
        torch.bfloat16 if precision == "bf16" else torch.float32
    )
    C, F, H, K = (SHAPE[k] for k in ("dim", "ffn_dim", "n_head", "n_kv_head"))
    D = C // H
    pairs = []

    def linear(n_in, n_out):
        x, w, g = new(BATCH * SEQ, n_in), new(n_out, n_in), new(BATCH * SEQ, n_out)
        pairs.extend([(x, w.T), (g, w), (g.T, x)])

    def attention():
        q, k, s = new(BATCH * H, SEQ, D), new(BATCH * H, SEQ // 2, D), new(BATCH * H, SEQ, SEQ // 2)
        pairs.extend(
            2 * [(q, k.mT), (s, k), (s.mT, q)]
        )  # scores and their weighted values; the gradients of scores, queries, keys and values

    for _ in range(SHAPE["n_layer"]):
        for shape in (C, H * D), (C, K * D), (C, K * D), (H * D, C), (C, F), (C, F), (F, C):
            linear(*shape)
        attention()
    linear(C, SHAPE["vocab_size"])
    space = {}
    for a, b in pairs:
        space[(*a.shape[:-1], b.shape[-1])] = a @ b
    clock = Clock()
    for step in range(steps):
        for a, b in pairs:
            torch.matmul(a, b, out=space[(*a.shape[:-1], b.shape[-1])])
        clock.tick(step + 1)
    return dict(clock.facts(WARM, steps - 1), losses=[])


def run(program: str, folder: Path, out: Path, a) -> dict:
    "Run a program in this process."
    kind, *how = program.split()
    if kind == "minigpt":
        return run_ours(folder, out, a.steps, a.threads, **OURS[program])
    if kind == "floor":
        return run_floor(a.steps, a.threads, *how)
    if kind == "Trainer":
        return run_trainer(folder, out, a.steps, a.threads, *how)
    return dict(nanoGPT=run_nanogpt, MiniMind=run_minimind)[kind](
        folder, out, a.steps, a.threads, dict(nanoGPT=a.nanogpt, MiniMind=a.minimind)[kind], *how
    )


# --- measurement ----------------------------------------------------------------------------------
def wait_until_quiet(wait: float):
    "Wait until other programs use less than a fifth of a core."
    import psutil

    end = time.monotonic() + wait
    while time.monotonic() < end and psutil.cpu_percent(1) * os.cpu_count() > 20:
        pass


def measure(program: str, folder: Path, steps: int, a) -> dict:
    "Run one program in its own process; repeat if another program used processor time."
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(a.threads),
        "MKL_NUM_THREADS": str(a.threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
    }
    call = [
        sys.executable,
        __file__,
        "--steps",
        str(steps),
        "--threads",
        str(a.threads),
        "--nanogpt",
        a.nanogpt,
        "--minimind",
        a.minimind,
        "--child",
        program,
        str(folder),
    ]
    for tries_left in reversed(range(1 + a.retries)):
        wait_until_quiet(a.wait)
        with tempfile.TemporaryDirectory() as out:
            done = subprocess.run([*call, out], env=env, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{program} failed:\n{done.stderr[-4000:]}")
        m = json.loads(done.stdout.splitlines()[-1])
        disturbed = m["others"] > 0.2
        print(
            f"{program:<{WIDTH}} {m['tokens_per_second']:7,.0f} tokens/s, {m['step_ms']:.0f} ms per"
            f" step, others {m['others']:.2f} cores"
            + (f", loss {m['losses'][0]:.3f} → {m['losses'][-1]:.3f}" if m["losses"] else "")
            + (f" ({m['note']})" if "note" in m else "")
            + (", again" if disturbed and tries_left else ""),
            flush=True,
        )
        if not disturbed:
            break
    return m


def check_equal_work(program: str, m: dict, ours: dict):
    "Check that the loss falls, and equals ours if model and batches are the same."
    if not m["losses"]:
        return
    assert m["losses"][-1] < m["losses"][0], f"{program}: the loss does not fall: {m['losses']}"
    near = (
        0.1
        if program.startswith(("nanoGPT", "MiniMind"))
        else 0.02
        if "bf16" in program + m.get("note", "") + ours["note"]
        else 0.005
    )
    if near < 0.1:
        assert m["params"] == ours["params"], (
            f"{program} has {m['params']:,} parameters, ours {ours['params']:,}"
        )
    pairs = list(zip(m["losses"], ours["losses"]))[-1 if near == 0.1 else 0 :]
    assert all(abs(x - y) < near * y for x, y in pairs), (
        f"{program}: losses are {m['losses']}, ours {ours['losses']}"
    )


WIDTH = 40  # of a program's name


def table(results: dict[str, list[dict]]) -> float:  # ours in its defaults / the fastest Trainer
    "Print tokens/s of every round, medians, shares of the floor; return ours / theirs."
    speed = {k: [m["tokens_per_second"] for m in v] for k, v in results.items()}
    middle = {k: statistics.median(v) for k, v in speed.items()}
    floor = lambda k: middle[
        "floor bf16" if "bf16" in k + results[k][0].get("note", "") else "floor fp32"
    ]
    rounds = "".join(f"{f'round {i + 1}':>10}" for i in range(len(speed["minigpt fit"])))
    print(f"{'tokens/s':<{WIDTH}}{rounds}{'median':>10}{'of floor':>10}")
    for k, v in speed.items():
        print(
            f"{k:<{WIDTH}}"
            + "".join(f"{x:10,.0f}" for x in v)
            + f"{middle[k]:10,.0f}{middle[k] / floor(k):10.0%}"
        )
    print(f"\n{'minigpt fit /':<{WIDTH}}{rounds}{'median':>10}")
    ratios = {
        k: [x / y for x, y in zip(speed["minigpt fit"], v)]
        for k, v in speed.items()
        if not k.startswith("minigpt")
    }
    for k, v in ratios.items():
        print(f"{k:<{WIDTH}}" + "".join(f"{x:10.2f}" for x in v) + f"{statistics.median(v):10.2f}")
    return statistics.median(
        ratios[max((k for k in ratios if k.startswith("Trainer")), key=middle.get)]
    )


def main():
    p = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    p.add_argument("--steps", type=int, default=40, help="steps to measure; 6 more are run")
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--threads", type=int, default=os.cpu_count())
    p.add_argument(
        "--wait",
        type=float,
        default=30,
        help="maximum seconds to wait before each measurement until other programs are idle",
    )
    p.add_argument(
        "--retries",
        type=int,
        default=2,
        help=(
            "how often to repeat a measurement if other programs used more than a fifth of a core"
        ),
    )
    p.add_argument("--all", action="store_true", help="measure all settings of every program")
    p.add_argument(
        "--nanogpt", default="", metavar="DIR", help="measure nanoGPT's train.py in this folder too"
    )
    p.add_argument(
        "--minimind", default="", metavar="DIR", help="measure MiniMind's loop in this folder too"
    )
    p.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.child:
        print(json.dumps(run(a.child[0], Path(a.child[1]), Path(a.child[2]) / "run", a)))
        return
    if a.steps < 15 or a.rounds < 1:
        p.error("--steps must be at least 15 (to see losses fall), --rounds at least 1")
    for name, file in (("nanogpt", "train.py"), ("minimind", "trainer/train_pretrain.py")):
        if (d := getattr(a, name)) and not Path(d, file).exists():
            p.error(f"--{name} {d}: there is no {file} in it")
        if d:
            setattr(a, name, str(Path(d).resolve()))

    import torch
    import transformers

    total = WARM + a.steps + 1
    print(
        f"{os.cpu_count()} cores ({platform.machine()}, load"
        f" {', '.join(f'{l:.1f}' for l in os.getloadavg())}), {a.threads} threads, Python"
        f" {platform.python_version()}, torch {torch.__version__}, transformers"
        f" {transformers.__version__}"
    )
    results = {name: [] for name in programs(a)}
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), total)
        for r in range(a.rounds):
            print(f"round {r + 1}")
            for name in list(results)[:: -1 if r % 2 else 1]:
                results[name].append(measure(name, Path(folder), total, a))
            for name, found in results.items():
                check_equal_work(name, found[-1], results["minigpt fit"][-1])

    print(
        f"\n{results['minigpt fit'][0]['params']:,} parameters; {a.steps} steps of {BATCH} × {SEQ}"
        " tokens\n"
    )
    ratio = table(results)
    if noisy := sum(m["others"] > 0.2 for v in results.values() for m in v):
        print(
            f"{noisy} of {sum(map(len, results.values()))} measurements were disturbed by other"
            " programs: measure again on a quiet machine"
        )
    print(f"ratio {ratio:.2f}")


if __name__ == "__main__":
    main()
