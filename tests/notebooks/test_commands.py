"""Every row of docs/commands.md runs, in the order of the page.

They run in one folder with small data; the output must contain what the last column names.
"""

import contextlib
import io
import json
import re
import shlex
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from project import ROOT
from typer.main import get_command

from minigpt import cli
from minigpt.data.registry import get_dataset_config
from minigpt.model import gpt as model
from minigpt.model.gpt import GPTConfig
from minigpt.run.folder import list_runs
from minigpt.tokenizer.bpe import load_tokenizer
from minigpt.train.presets import hardware
from minigpt.train.trainer import fit
from tests.harness import kill_child as child

PAGE = ROOT / "docs" / "commands.md"
ROWS = [
    [cell.strip().replace("\\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    for line in PAGE.read_text(encoding="utf-8").splitlines()
    if line.startswith("| `")
]
TINY = dict(
    n_layer=1, dim=16, n_head=2, n_kv_head=1, ffn_dim=32
)  # replaces every preset: the rows are not about sizes
MEDIUM = model.PRESETS["medium"]
QUICK = {
    "--max-steps": "1",
    "--max-seq-len": "32",
    "--batch-size": "4",
    "--tokenizer-vocab-size": "300",
    "--num-threads": "1",
    "--eval-sequences": "4",
    "--time-save-interval-seconds": "0",
    "--no-tensorboard": "",
    "--no-plot-loss": "",
    "--no-progress": "",
}


def code(cell):
    return re.findall(r"`([^`]+)`", cell)


def conversation(question, answer, **more):
    return dict(
        conversations=[
            dict(role="user", content=question),
            dict(role="assistant", content=answer, **more),
        ]
    )


def write_files():
    "Write the files that the rows name."
    data = Path("data/dataset/minimind_dataset")
    data.mkdir(parents=True)
    lines = lambda path, rows: Path(path).write_text("".join(json.dumps(r) + "\n" for r in rows))
    child.write_text(data / "pretrain_hq.jsonl")
    for i, name in enumerate(
        (
            "sft_mini_512",
            "sft_512",
            "sft_1024",
            "r1_mix_1024",
            "tool_calling_basic",
            "tool_calling_advanced",
            "agent_ultra_think",
        )
    ):
        lines(data / f"{name}.jsonl", [conversation(f"{n}+{i}?", str(n + i)) for n in range(150)])
    lines(
        data / "dpo.jsonl",
        [
            dict(
                chosen=conversation(f"{n}?", "a")["conversations"],
                rejected=conversation(f"{n}?", "b")["conversations"],
            )
            for n in range(150)
        ],
    )
    text = [
        json.loads(line)["text"]
        for line in Path(child.write_text("text.jsonl", rows=150)).read_text().splitlines()
    ]
    Path("my.txt").write_text("\n\n".join(text))
    Path("tess.txt").write_text("\n".join(text))
    Path("tess.json").write_text(
        json.dumps(
            dict(
                model_name_or_path="tiny",
                train_file="tess.txt",
                line_by_line=True,
                max_seq_length=32,
                output_dir="runs/tess",
                simplex_value=5,
                num_diffusion_steps=500,
                beta_schedule="squaredcos_improved_ddpm",
                self_condition="logits_mean",
                do_train=True,
                report_to="none",
                num_warmup_steps=1,
                checkpointing_steps=1,
                max_train_steps=2,
                per_device_train_batch_size=4,
                max_eval_samples=4,
                tokenizer_vocab_size=300,
                num_threads=1,
                progress=False,
                tensorboard=False,
                plot_loss=False,
            )
        )
    )
    Path("MyDrive").mkdir()
    Path("theirs/checkpoint-5").mkdir(parents=True)
    Path("theirs/checkpoint-5/config.json").write_text("{}")
    Path("theirs/tokenizer.pkl").write_bytes(b"\x80\x04.")
    for step, name in (
        (1, "checkpoint_step_1.pt"),
        (2, "checkpoint_step_2.pt"),
        (3, "final_model.pt"),
    ):
        torch.save(
            dict(model_state_dict={"a.weight": torch.full((3, 4), float(step))}, step=step),
            f"theirs/{name}",
        )


def with_short_training(line):
    "Return the words of a command with options that keep training short."
    words = shlex.split(line)[1:]
    if words[0] != "train":
        return words
    if "--config-file" in words:
        return words + [
            "--no-progress",
            "--num-threads",
            "1",
            "--tokenizer-vocab-size",
            "300",
            "--no-plot-loss",
            "--no-tensorboard",
        ]
    given = {cli._canonical_name(w[2:].split("=")[0]) for w in words if w.startswith("--")} | (
        {"max-steps"} if "--resume" in line else set()
    )
    return words + [
        w
        for k, v in QUICK.items()
        if cli._canonical_name(k[2:]).removeprefix("no-") not in given
        for w in (k, v)
        if w
    ]


def run_command(line, monkeypatch):
    "Run a command in this process and return its output."
    out = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["minigpt", *with_short_training(line)])
    monkeypatch.setattr(sys, "stdin", io.StringIO("/help\n"))
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            cli.main()
        except SystemExit as e:
            print(e.code)
    return out.getvalue()


def trained(since):
    "Return the log and the options of the newest run."
    runs = [
        r
        for r in [*list_runs("."), *list_runs("runs")]
        if (r.path / "run.log").stat().st_mtime_ns > since
    ]
    return "".join(
        (r.path / "run.log").read_text("utf-8")
        + "".join(f"\n{k}={v}" for k, v in {**r.facts["model"], **r.facts["train"]}.items())
        for r in runs
    )


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    "Row → all output of its command."
    found, keys = {}, {}
    with pytest.MonkeyPatch.context() as m:
        m.chdir(tmp_path_factory.mktemp("commands"))
        write_files()
        for name in model.PRESETS:
            m.setitem(model.PRESETS, name, model.PRESETS[name] if name == "medium" else TINY)
        m.setattr(cli, "app", get_command(cli.app))  # built once
        options = dict(
            max_steps=1,
            max_seq_len=32,
            batch_size=4,
            tokenizer_vocab_size=300,
            num_threads=1,
            eval_sequences=4,
            progress=False,
            plot_loss=False,
            tensorboard=False,
        )
        python = dict(
            fit=partial(fit, **options),
            get_dataset_config=get_dataset_config,
            hardware=hardware,
            load_tokenizer=load_tokenizer,
            GPTConfig=GPTConfig,
        )
        for i, (write, *_) in enumerate(ROWS):
            (line,) = code(write)
            since = time.time_ns()
            if re.match(r"[a-z_]+: ", line):
                keys[i] = yaml.safe_load(line)
                continue
            if line.startswith("minigpt "):
                m.setitem(model.PRESETS, "medium", TINY)
                found[i] = run_command(line, m)
                m.setitem(model.PRESETS, "medium", MEDIUM)
            else:
                try:
                    found[i] = repr(eval(line, python))
                except ValueError as e:
                    found[i] = str(e)
            found[i] += "\n" + trained(since)
        since = time.time_ns()
        Path("keys.yaml").write_text(
            yaml.safe_dump({k: v for d in keys.values() for k, v in d.items()})
        )
        all = run_command(
            "minigpt train my.txt --config-file keys.yaml --valid tess.txt --output-dir runs/keys",
            m,
        )
        return found | dict.fromkeys(keys, all + trained(since))


def test_page_has_rows():
    assert len(ROWS) >= 70 and all(
        len(row) == 3 and len(code(row[0])) == 1 and code(row[2]) for row in ROWS
    )


@pytest.mark.parametrize("i", range(len(ROWS)), ids=[code(write)[0] for write, *_ in ROWS])
def test_row(i, outputs):
    for part in code(ROWS[i][2]):
        assert part in outputs[i], outputs[i]
