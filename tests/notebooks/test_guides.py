"""Every code block in README and the guides runs, in order, on a simulated Colab.

Each page becomes one program in its own folder: its python blocks unchanged, its sh blocks line by
line. FILES and QWEN3 write the required files, SMALLER shortens long runs, LEFT_OUT names the lines
that cannot run here. An unused entry is an error. The Chinese pages have the code and the figures
of the English ones, so only the English ones run.
"""

import dataclasses
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
from project import ROOT

from minigpt.config.options import TrainConfig, other_programs
from tests.notebooks.test_colab import STUB

PAGES = ["README.md", *sorted(f"docs/{p.name}" for p in (ROOT / "docs").glob("*.md"))]
CHINESE = {
    "README.zh.md": "README.md",
    **{f"docs/zh/{p.name}": f"docs/{p.name}" for p in (ROOT / "docs" / "zh").glob("*.md")},
}  # Chinese page: English page
LEFT_OUT = {  # line: why
    "make demo    # train, get killed with SIGKILL, resume, show the result": (
        "minutes; test_kill.py kills and resumes smaller ones"
    ),
    "make test    # run everything that CI runs": "it would run this test",
    "pip install git+https://github.com/minigpt-notebook/minigpt": (
        "the network; test_package.py builds the wheel and looks into it"
    ),
    "pip install 'minigpt-notebook[data] @ git+https://github.com/minigpt-notebook/minigpt'": (
        "the network"
    ),
}
SMALLER = {  # text: its replacement
    "--max-steps 2000": "--max-steps 2 --max-seq-len 64",
    "checkpoint-2000": "checkpoint-2",
    "fit('small', ": "fit(smaller, ",
    'fit("tiny", ': "fit(smaller, ",
    '"tiny",\n    mix': "smaller,\n    mix",
    "max_steps=5000, max_seq_len=256": "max_steps=2, max_seq_len=64",
    "--config small --max-steps 5000": "--config tiny --max-steps 5 --max-seq-len 64 --seconds 1",
    "max_steps=500,": "max_steps=12,",
    "save_steps=100,\n    eval_steps=250": "save_steps=5,\n    eval_steps=10",
    "t.step == 120": "t.step == 7",
    "save_steps=50,": "save_steps=5,",
    "max_steps=300,": "max_steps=12,",
    "--dataset stories=0.2": (
        "--dataset my.txt=0.2 --max-steps 2 --max-seq-len 64"
    ),  # the corpus is 4 MB
    "minigpt serve runs/chat --port 8000": (  # it never ends
        "minigpt serve runs/chat --port 0 > served & until grep -q http served; do kill -0 $!;"
        " sleep .2; done; kill $!"
    ),
}
FILES = """
import json, random
from pathlib import Path
from minigpt.data.corpus import stories, write_preferences, write_conversations
from minigpt.model.gpt import GPTConfig
from minigpt.tokenizer.bpe import train_tokenizer
lines = [f'{who} has {n} {what}. {who} gives one away. Now {who} has {n-1} {what}.'
         for who in ('Ada','Eva','Finn') for n in range(2, 10)
         for what in ('apples','boats','drums','hats')]
random.Random(0).shuffle(lines)
Path('my.txt').write_text('\\n\\n'.join(lines*5))
def rows(name, texts):
    Path(name).write_text(''.join(json.dumps(dict(text=t))+'\\n' for t in texts))
rows('my.jsonl', lines*3); rows('found.jsonl', [t for t, _ in zip(stories(), range(300))])
write_conversations('conversations.jsonl', 60)
write_conversations('held-out.jsonl', 9, seed=1)
write_preferences('pairs.jsonl', 80)
def smaller(tok):
    heads = dict(n_head=2, n_kv_head=1)
    return GPTConfig(vocab_size=tok.vocab_size, dim=32, n_layer=1, ffn_dim=64, **heads)
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
    "Return the language and text of each block that can run."
    return re.findall(
        r"^```(python|sh)\n(.*?)^```$", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S
    )


def program(page):
    "Return the program that runs a page."
    parts = [SH]
    for language, text in blocks(page):
        text = "".join(line + "\n" for line in text.splitlines() if line not in LEFT_OUT)
        for old, new in SMALLER.items():
            text = text.replace(old, new)
        parts.append(text if language == "python" else f"sh({text!r})")
    return "\n".join(parts)


def run(page, folder):
    "Run a page in a new process; return its exit code and output."
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
    "All pages, two at a time."
    with ThreadPoolExecutor(2) as pool:
        yield {p: pool.submit(run, p, tmp_path_factory.mktemp("page")) for p in PAGES if blocks(p)}


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p)])
def test_every_code_block_runs(page, done):
    result = done[page].result()
    assert result.returncode == 0, result.stdout[-4000:]


def test_every_replacement_is_used():
    assert {
        language for p in PAGES for language, _ in fenced((ROOT / p).read_text(encoding="utf-8"))
    } <= {"python", "sh", "text", ""}, "blocks of other languages would not run"
    text = "\n".join(t for p in PAGES for _, t in blocks(p))
    assert not [line for line in LEFT_OUT if line not in text.splitlines()] and not [
        old for old in SMALLER if old not in text
    ]


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 900


# --- the Chinese pages ----------------------------------------------------------------------------
def bare(code):
    "Return code without comments and empty lines."
    lines = (re.sub(r"\s*#.*", "", line).rstrip() for line in code.splitlines())
    return "\n".join(line for line in lines if line)


def fenced(text):
    return [
        (language, bare(code))
        for language, code in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    ]


def figures(text):
    "Return the numbers of a text without its code; 26 million and 2600 万 are equal."
    text = re.sub(r"^```.*?^```$|\]\([^)]*\)", "", text, flags=re.M | re.S)
    scale = {"million": 1e6, "万": 1e4, "亿": 1e8}
    return {
        round(float(n.replace(",", "")) * scale.get(unit, 1), 6)
        for n, unit in re.findall(r"(\d+(?:,\d{3})*(?:\.\d+)?)\s*(million|万|亿)?", text)
    }


@pytest.mark.parametrize("page", CHINESE)
def test_chinese_page_has_equal_code_and_figures(page):
    chinese, english = ((ROOT / name).read_text(encoding="utf-8") for name in (page, CHINESE[page]))
    assert fenced(chinese) == fenced(english)
    assert figures(chinese) == figures(english)


@pytest.mark.parametrize("page", CHINESE)
def test_both_languages_link_to_each_other(page):
    for here, there in ((page, CHINESE[page]), (CHINESE[page], page)):
        link = os.path.relpath(there, os.path.dirname(here))
        assert f"]({link})" in (ROOT / here).read_text(encoding="utf-8"), f"{here} lacks {link}"


def test_chinese_table_of_names_has_every_row():
    english, chinese = (
        (ROOT / name).read_text(encoding="utf-8")
        for name in ("docs/migrating.md", "docs/zh/migrating.md")
    )
    rows = lambda text: [
        set(re.findall(r"`([^`]+)`", line))
        for line in text.splitlines()
        if line.startswith(("| ", "## "))
    ]
    assert sorted(rows(chinese), key=sorted) == sorted(rows(english), key=sorted)


def test_names_accepted_unchanged():
    "The options that the table calls accepted, and those that it calls equal."
    text = (ROOT / "docs/migrating.md").read_text(encoding="utf-8")
    taken = [
        n.lstrip("-")
        for line in text.splitlines()
        if "| accepted unchanged" in line
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
