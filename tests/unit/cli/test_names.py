"""Arguments that name a model, a run, a folder or an option.

Run folders as model and tokenizer, `~`, names of runs, options of other programs, any locale.
"""

import os
import subprocess
import sys

import pytest

from minigpt import cli
from minigpt.chat import Chat
from minigpt.checkpoint.analysis import create_demo
from minigpt.checkpoint.exporter import export
from minigpt.checkpoint.store import State, load_model, open_model, write_checkpoint
from minigpt.config.options import TrainConfig
from minigpt.model.generation import generate
from minigpt.model.gpt import GPT, GPTConfig
from minigpt.run.folder import Run, open_run
from minigpt.run.status import Watch
from minigpt.serve import Server
from minigpt.tokenizer.bpe import load_tokenizer
from minigpt.train.evaluation import evaluate_on
from minigpt.train.inputs import open_source
from minigpt.train.trainer import fit

TINY = dict(dim=16, n_layer=1, n_head=2, n_kv_head=1, ffn_dim=32, max_len=64)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "A home folder with a text, a run and a model."
    home = tmp_path_factory.mktemp("home")
    (home / "text.txt").write_text("The boat came home late.\n\nThe lamp was lit at dusk.\n\n" * 20)
    fit(
        lambda tok: GPTConfig(vocab_size=tok.vocab_size, **TINY),
        home / "text.txt",
        output_dir=home / "run",
        max_steps=1,
        max_seq_len=16,
        batch_size=1,
        tokenizer_vocab_size=270,
        progress=False,
        plot_loss=False,
        tensorboard=False,
    )
    tok = load_tokenizer(home / "run" / "tokenizer")
    write_checkpoint(
        home / "model",
        State(
            GPTConfig(vocab_size=tok.vocab_size, **TINY),
            GPT(GPTConfig(vocab_size=tok.vocab_size, **TINY)).weights(),
            tok,
            dict(global_step=0),
        ),
        "best",
    )
    return home


@pytest.fixture
def expand_home(home, monkeypatch, tmp_path):
    "Use the home folder from another directory, where a folder named ~ would show."
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(tmp_path)
    yield home
    assert not os.path.lexists(tmp_path / "~")


@pytest.mark.parametrize("named", ["~/run", "~/model", "run", "memory"])
def test_run_or_directory_names_model_and_tokenizer(expand_home, named):
    source = dict(run=Run(expand_home / "run"), memory=load_model(expand_home / "model")).get(
        named, named
    )
    chat = Chat(source, max_new_tokens=2, seed=0)
    assert (
        isinstance(chat.ask("Hello"), str)
        and chat.tokenizer.hash == load_tokenizer(expand_home / "run" / "tokenizer").hash
    )
    assert Chat(source, "~/model").tokenizer.hash == chat.tokenizer.hash
    if named != "memory":
        with Server(dict(m=source), port=0) as s:
            assert isinstance(s.models["m"][0], GPT)
    evaluate_on(source, "~/text.txt", cache="~/cache", progress=False)
    assert (expand_home / "cache").is_dir()


def test_paths_without_a_model_are_refused(expand_home):
    model = GPT(GPTConfig(vocab_size=9, **TINY))
    with pytest.raises(ValueError, match="tokenizer of a model in memory is not known"):
        Chat(model)
    with pytest.raises(
        TypeError,
        match=("'runs/x' is a str; load one: model, tokenizer = minigpt.checkpoint.open_model"),
    ):
        generate("runs/x", [1])
    with pytest.raises(TypeError, match="must be a dict by name"):
        Server("~/run")
    with pytest.raises(TypeError, match="3 must be the path of a model directory"):
        open_model(3)
    with pytest.raises(Exception, match="runs/no does not exist"):
        Chat("runs/no")


def test_home_folder_is_expanded(expand_home):
    "`~` names it wherever a path is read or written."
    assert (
        export(open_run("~/run"), "~/out/a") == expand_home / "out" / "a"
        and export("~/model", "~/out/b") == expand_home / "out" / "b"
    )
    assert (
        load_tokenizer("~/model").save("~/tok") == expand_home / "tok"
        and (expand_home / "tok" / "tokenizer.json").exists()
    )
    create_demo("~/demo", GPTConfig(vocab_size=50, **TINY), progress=False)
    assert (expand_home / "demo").is_dir() and Watch("~/run").status()["step"] == 1


def test_home_folder_is_expanded_on_the_command_line(expand_home, monkeypatch, capsys):
    for words in (
        ["tokenizer", "train", "~/text.txt", "--output=~/tok2", "--vocab-size=270"],
        ["export", "~/model", "~/out/c"],
        ["plot", "~/run", "--output=~/p.png"],
        ["runs", "~/run"],
    ):
        monkeypatch.setattr(sys, "argv", ["minigpt", *words])
        with pytest.raises(SystemExit) as e:
            cli.main()
        assert not e.value.code, words
    assert (
        (expand_home / "tok2" / "tokenizer.json").exists()
        and (expand_home / "out" / "c" / "config.json").exists()
        and (expand_home / "p.png").exists()
        and "step 1 of 1" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    "data, name",
    [
        ("books/tales.txt", "tales"),
        ("books/*.txt", "books"),
        ("books/part-*.jsonl", "part"),
        (".hidden.txt", "hidden"),
        (".", "here"),
        ("..", "above"),
        ("x/..", "here"),
        ("*", "here"),
        ("stories", "stories"),
        ("a.b.jsonl", "a"),
        ("...", "here"),
        ("real[1].txt", "real[1]"),
        (["one.txt", "two.txt"], "one"),
        ("/", "demo"),
    ],
)
def test_run_is_named_after_its_data(tmp_path, monkeypatch, data, name):
    "It is never `runs` itself, a folder above it, or a pattern."
    (tmp_path / "above" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "above" / "here")
    (tmp_path / "above" / "here" / "real[1].txt").write_text("x")
    assert cli.run_name(data) == name


@pytest.mark.parametrize(
    "option",
    [
        "use_rslora",
        "adam_epsilon",
        "dataset_text_field",
        "assistant_only_loss",
        "hub_model_id",
        "use_dora",
        "completion_only_loss",
        "deepspeed",
        "logging_strategy",
    ],
)
def test_options_of_other_programs_are_explained(option, monkeypatch):
    for word in (f"--{option}", f"--{option.replace('_', '-')}=1"):
        monkeypatch.setattr(sys, "argv", ["minigpt", "train", "stories", word, "1"])
        with pytest.raises(SystemExit, match=f"unknown option {word.partition('=')[0]}: "):
            cli.main()
    with pytest.raises(TypeError, match=f"unknown option '{option}': "):
        TrainConfig.make(**{option: 1})


def test_advice_about_special_tokens_works(home, tmp_path):
    "Advice applies to the tokenizer that is used."
    call = lambda tok, **o: open_source(
        tmp_path / "r",
        None,
        home / "text.txt",
        None,
        tok,
        TrainConfig(special_tokens="<mine>"),
        **o,
    )
    with pytest.raises(ValueError, match="leave tokenizer out to train one that has it"):
        call(load_tokenizer(home / "model"))
    with pytest.raises(
        ValueError, match="that the model was trained with, so leave special_tokens out"
    ):
        call(load_tokenizer(home / "model"), of_model=True)
    with pytest.raises(
        ValueError, match="that the model was trained with, so leave special_tokens out"
    ):
        fit(
            home / "model",
            home / "text.txt",
            output_dir=tmp_path / "run",
            special_tokens="<mine>",
            progress=False,
        )


@pytest.mark.skipif(
    os.name == "nt",
    reason=(
        "a Windows command line is UTF-16 whatever the locale, so no argument arrives in another"
        " encoding"
    ),
)
@pytest.mark.parametrize(
    "locale",
    [dict(LC_ALL="C"), dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")],
    ids=["C", "ascii"],
)
def test_any_locale_works(locale, tmp_path):
    "Chinese paths and prompts are read correctly, whatever the locale is."
    (tmp_path / "中文.jsonl").write_text('{"text": "小船"}\n', encoding="utf-8")
    env = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONUTF8", "PYTHONIOENCODING", "LANG")
    } | locale
    words = ["data", "analyze", "中文.jsonl", "--json=报告.json"]
    p = subprocess.run(
        [sys.executable, "-m", "minigpt", *words], cwd=tmp_path, env=env, capture_output=True
    )
    assert p.returncode == 0 and (tmp_path / "报告.json").exists(), p.stderr
    p = subprocess.run(
        [sys.executable, "-m", "minigpt", "data", "analyze", b"\xd6\xd0.jsonl"],
        cwd=tmp_path,
        env=env,
        capture_output=True,
    )
    assert (
        p.returncode == 1
        and b"is not UTF-8; set the terminal to UTF-8, or rename the file" in p.stderr
    ), p.stderr
