"""Every block of code in README and the guides runs, in order, on a stand-in for Colab.

Each page becomes one program in a folder of its own: its python blocks as they are, of its sh
blocks each line. What they need stands in FILES and QWEN3, what is made smaller in SMALLER, what
cannot run here in LEFT_OUT. An entry that no page has any more is an error, and so is a line that
has changed. The Chinese pages have the code and the figures of the English ones.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from project import ROOT, directives, joined

from minigpt.config.options import TrainConfig, other_programs
from tests.notebooks.test_colab import STUB

PAGES = [
    "README.md",
    *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").rglob("*.md")),
]  # the code of README.zh.md is README.md's
TWINS = {
    "docs/zh/quickstart.md": ["quickstart"],
    "docs/zh/drive.md": ["train_with_drive", "resume_after_disconnect"],
}  # page: its notebooks
LEFT_OUT = {  # line: why
    "make demo    # train, be killed with SIGKILL, resume, look at the result": (
        "minutes; test_kill.py kills and resumes smaller ones"
    ),
    "make test    # everything that CI runs": "it would run this test",
    "pip install git+https://github.com/minigpt-notebook/minigpt": (
        "the network; test_package.py builds the wheel and looks into it"
    ),
    "pip install 'minigpt-notebook[data] @ git+https://github.com/minigpt-notebook/minigpt'": (
        "the network"
    ),
}
SMALLER = {  # text: what runs in its place
    "--max-steps 2000": "--max-steps 2 --max-seq-len 64",
    "checkpoint-2000": "checkpoint-2",
    "fit('small', ": "fit('tiny', ",
    "max_steps=5000": "max_steps=2",  # 8 layers of 128
    "--config small --max-steps 5000": "--config tiny --max-steps 5 --max-seq-len 64 --seconds 1",
    "max_steps=500,": "max_steps=12,",
    "save_steps=100,\n    eval_steps=250": "save_steps=5,\n    eval_steps=10",
    "t.step == 120": "t.step == 7",
    "save_steps=50,": "save_steps=5,",
    "max_steps=300,": "max_steps=12,",
    "--dataset stories=0.2": (
        "--dataset my.txt=0.2 --max-steps 2 --max-seq-len 64"
    ),  # the corpus is 4 MB
    "minigpt serve runs/liked ": (  # it never ends
        "minigpt serve runs/liked --port 0 > served & until grep -q http served; do kill -0 $!;"
        " sleep .2; done; kill $!; "
    ),
}
FILES = """
import json, random
from pathlib import Path
from minigpt.data.corpus import stories, write_preferences, write_conversations
from minigpt.tokenizer.bpe import train_tokenizer
lines = [f'{who} has {n} {what}. {who} gives one away. Now {who} has {n-1} {what}.'
         for who in ('Ada','Eva','Finn') for n in range(2, 10)
         for what in ('apples','boats','drums','hats')]
random.Random(0).shuffle(lines)
Path('my.txt').write_text('\\n\\n'.join(lines*5))
def rows(name, texts):
    Path(name).write_text(''.join(json.dumps(dict(text=t))+'\\n' for t in texts))
rows('my.jsonl', lines*3); rows('found.jsonl', [t for t, _ in zip(stories(), range(300))])
write_conversations('talks.jsonl', 60)
write_conversations('held-out.jsonl', 9, seed=1)
write_preferences('pairs.jsonl', 80)
Path('my_functions.py').write_text('def add(a:int, b:int)->int: "The sum"; return a+b')
"""
QWEN3 = """
import transformers
train_tokenizer(lines, 400).save('qwen3')
shape = transformers.Qwen3Config(
    vocab_size=400, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
    num_attention_heads=2, num_key_value_heads=1, head_dim=16)
transformers.Qwen3ForCausalLM(shape).save_pretrained('qwen3')
"""
SH = """
import os, shlex, subprocess, sys
os.cpu_count = lambda: 1      # threads of a training
from minigpt.cli import main
def sh(block):
    for line in block.splitlines():
        print('$', line, flush=True)
        sys.argv = shlex.split(line, comments=True)
        if sys.argv[0] != 'minigpt' or '&' in sys.argv:
            subprocess.run(['bash', '-euxc', line], check=True)
            continue
        try: main()           # here, since a process of its own would import everything again
        except SystemExit as e: assert not e.code, e.code
"""


def blocks(page):
    "Language and text of each block that can run"
    return re.findall(
        r"^```(python|sh)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S
    )


def program(page):
    "What runs in place of a page"
    parts = [SH]
    for language, text in blocks(page):
        text = "".join(line + "\n" for line in text.splitlines() if line not in LEFT_OUT)
        for old, new in SMALLER.items():
            text = text.replace(old, new)
        parts.append(text if language == "python" else f"sh({text!r})")
    return "\n".join(parts)


def run(page, folder):
    "A page in an emptied process: its exit code and what it said"
    (folder / "work").mkdir(parents=True)
    (folder / "bin").mkdir()
    for name, text in STUB.items():
        (folder / "stub" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "stub" / name).write_text(text)
    (folder / "bin" / "minigpt").write_text(
        f"#!/bin/sh\nexec '{sys.executable}' -c 'from minigpt.cli import main; main()' \"$@\"\n"
    )
    (folder / "bin" / "minigpt").chmod(0o755)
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(folder / "stub"), str(ROOT)]),
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "STUB_DRIVE": str(folder / "drive"),
        "STUB_MACHINE": "m",
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": "1",
    }
    text = program(page)
    (folder / "page.py").write_text(FILES + QWEN3 * ("qwen3" in text) + text, encoding="utf-8")
    return subprocess.run(
        [sys.executable, "../page.py", "ipykernel_launcher"],
        cwd=folder / "work",
        env=env,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    "All pages, two at a time"
    with ThreadPoolExecutor(2) as pool:
        yield {p: pool.submit(run, p, tmp_path_factory.mktemp("page")) for p in PAGES if blocks(p)}


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)])
def test_every_block_runs(page, done):
    result = done[page].result()
    assert result.returncode == 0, result.stdout[-4000:]


def test_nothing_is_listed_in_vain():
    assert {
        language for p in PAGES for language, _ in fenced((ROOT / p).read_text(encoding="utf-8"))
    } <= {"python", "sh", "text", ""}, "a block of another language would not run"
    text = "\n".join(t for p in PAGES for _, t in blocks(p))
    assert not [line for line in LEFT_OUT if line not in text.splitlines()] and not [
        old for old in SMALLER if old not in text
    ]


# --- the Chinese pages ----------------------------------------------------------------------------
def bare(code):
    "Code without comments, assertions and empty lines"
    lines = (re.sub(r"\s*#.*", "", line).rstrip() for line in code.splitlines())
    return "\n".join(line for line in lines if line and not re.match(r"(if .*: )?assert ", line))


def fenced(text):
    return [
        (language, bare(code))
        for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    ]


def figures(text):
    "The numbers of a text, its code left out; 26 million and 2600 万 are the same"
    text = re.sub(r"^```.*?^```$|\]\([^)]*\)", "", text, flags=re.M | re.S)
    scale = {"million": 1e6, "万": 1e4, "亿": 1e8}
    return {
        round(float(n.replace(",", "")) * scale.get(unit, 1), 6)
        for n, unit in re.findall(r"(\d+(?:,\d{3})*(?:\.\d+)?)\s*(million|万|亿)?", text)
    }


def test_the_chinese_readme_has_the_code_and_the_figures():
    english, chinese = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh.md")
    )
    assert fenced(chinese) == fenced(english)
    assert figures(chinese) == figures(english)
    assert "(README.zh.md)" in english and "(README.md)" in chinese


def test_the_chinese_table_of_names_has_every_row():
    english, chinese = (
        (ROOT / name).read_text(encoding="utf-8")
        for name in ("docs/coming.md", "docs/zh/coming.md")
    )
    rows = lambda text: [
        set(re.findall(r"`([^`]+)`", line))
        for line in text.splitlines()
        if line.startswith(("| ", "## "))
    ]
    assert rows(chinese) == rows(english)


def test_names_that_are_taken_as_they_are():
    "What the table says is so"
    text = (ROOT / "docs/coming.md").read_text(encoding="utf-8")
    taken = [
        n.lstrip("-")
        for line in text.splitlines()
        if "taken as they are" in line
        for n in re.findall(r"`([^`]+)`", line.split("|")[1])
    ]
    assert len(taken) > 20 and set(taken) <= set(TrainConfig.names())
    same = [
        n
        for line in text.splitlines()
        if line.endswith("| the same |")
        for n in re.findall(r"`([^`]+)`", line.split("|")[1])
        if n not in other_programs().aliases
    ]
    assert same and set(same) <= {f.name for f in dataclasses.fields(TrainConfig)}


@pytest.mark.parametrize("page", TWINS)
def test_a_chinese_guide_has_the_code_of_its_notebooks(page):
    cells = [
        c
        for n in TWINS[page]
        for c in json.loads((ROOT / f"nbs/tutorials/{n}.ipynb").read_text(encoding="utf-8"))[
            "cells"
        ]
    ]
    cells = [
        (c["cell_type"], text)
        for c in cells
        for flags, text in [directives(joined(c["source"]))]
        if "hide" not in flags
    ]
    text = (ROOT / page).read_text(encoding="utf-8")
    english = [
        code
        for kind, source in cells
        for code in ([bare(source)] if kind == "code" else [c for _, c in fenced(source)])
        if code
    ]
    assert list(dict.fromkeys(c for _, c in fenced(text))) == list(
        dict.fromkeys(english)
    )  # what the second notebook repeats need not be there again
    assert figures(text) == figures(
        "\n".join(source for kind, source in cells if kind == "markdown")
    )
