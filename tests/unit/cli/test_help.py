"""What the command line shows of itself: help at any width, colors in a terminal, versions."""

import os
import subprocess
import sys

import pytest

import minigpt
from minigpt import cli
from minigpt.config.options import TrainConfig

COMMAND = [sys.executable, "-m", "minigpt"]


def run(*words, columns=80):
    "Run a command with its output in a pipe; return what it prints."
    env = {**os.environ, "COLUMNS": str(columns), "PYTHONUTF8": "1"}
    r = subprocess.run([*COMMAND, *words], capture_output=True, encoding="utf-8", env=env)
    assert r.returncode == 0, r.stderr
    return r.stdout


def squeeze(lines):
    return "".join("".join(lines).split())


WIDTHS = [("train", 60), ("train", 80), ("train", 120), ("resume", 60), ("bench", 80)]


@pytest.mark.parametrize("command, columns", WIDTHS)
def test_help_is_complete_at_any_width(command, columns):
    "Each option is in its panel, with its values, its help and its default."
    text = run(command, "--help", columns=columns)
    lines = text.splitlines()
    assert max(map(len, lines)) == columns - 2, "click leaves two columns"
    start = next(line.index("sequence length in") for line in lines if "sequence length in" in line)
    for heading, group in TrainConfig.groups().items():
        panel = text.partition(f"─ {heading} ─")[2].partition("╰")[0].splitlines()[1:]
        names = squeeze(line[1:start] + " " for line in panel)
        helps = squeeze(line[start:-1] + " " for line in panel)
        for f in group:
            assert f"--{f.name.replace('_', '-')}" in names, f.name
            assert squeeze(f"{f.metadata['help']} [{f.default}]") in helps, f.name
            if values := TrainConfig.choices().get(f.name):
                assert f"[{'|'.join(filter(None, values))}]" in names, f.name


def test_the_options_of_train_are_grouped():
    "The panels come in the order in which one decides: data, presets, model, run."
    text = run("train", "--help")
    headings = [line.split("─")[1].strip() for line in text.splitlines() if line[:1] == "╭"]
    assert headings[:5] == ["Arguments", "Data", "Presets", "Model", "Run"]
    assert headings[-1] == "Options"  # --help
    for name, heading in dict(
        dataset="Data", stage="Presets", config="Model", resume="Run"
    ).items():
        assert f"--{name} " in text.partition(f"─ {heading} ─")[2].partition("╰")[0]


@pytest.mark.parametrize("words", [[], ["checkpoint"], ["data"], ["tokenizer"]])
def test_every_command_is_listed(words):
    group = cli.app if not words else {**vars(cli)}[f"{words[0]}_app"]
    text = run(*words, "--help")
    for c in group.registered_commands:
        name = c.name or c.callback.__name__
        assert f"│ {name} " in text, name


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
def test_colors_are_for_terminals():
    import pty

    env = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    env |= dict(TERM="xterm-256color", COLUMNS="80")

    def in_terminal(**more):
        main, side = pty.openpty()
        process = subprocess.Popen([*COMMAND, "--help"], stdout=side, env=env | more)
        os.close(side)
        output = b""
        try:
            while part := os.read(main, 4096):
                output += part
        except OSError:
            pass  # the other end is closed
        os.close(main)
        assert process.wait() == 0
        return output.decode()

    piped = subprocess.run([*COMMAND, "--help"], capture_output=True, env=env, text=True).stdout
    assert "\x1b" not in piped and "│ train " in piped
    assert "\x1b[1;36mtrain\x1b[0m" in in_terminal()
    assert "\x1b[1;36m" not in in_terminal(NO_COLOR="1")


def test_version_does_not_import_torch():
    code = (
        "import sys; from minigpt.cli import app; app(['--version'], standalone_mode=False);"
        " assert 'torch' not in sys.modules"
    )
    r = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr
    import torch

    assert r.stdout.startswith(f"minigpt {minigpt.__version__}, torch {torch.__version__}, Python ")
