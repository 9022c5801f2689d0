"""What users write as the documents of other programs have it: taken as it is meant, or answered with what to write instead."""
import json

import kill_child as child
import pytest
from minigpt import cli
from minigpt.run import open_run
from minigpt.train import fit
from typer.testing import CliRunner

OPTIONS = dict(child.OPTIONS, max_steps=4, save_steps=2, eval_steps=4, eval_sequences=4)
SHAPE = dict(dim=16, n_layer=1, n_head=2, n_kv_head=1, ffn_dim=32)
QUICK = ["--max-seq-len", "32", "--batch-size", "4", "--tokenizer-vocab-size", "300", "--num-threads", "1", "--eval-sequences", "4", "--no-progress", "--no-plot-loss", "--no-tensorboard"]


def minigpt(*words): return CliRunner().invoke(cli.app, [str(w) for w in words])


def said(folder): return (folder/"run.log").read_text("utf-8")


@pytest.fixture
def work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    child.write_text(tmp_path/"text.jsonl")
    return tmp_path


# --- the shape of a model in a configuration file -----------------------------------------------------------------------------------
def test_a_shape_has_the_vocabulary_of_the_tokenizer(work):
    (work/"c.json").write_text(json.dumps(dict(OPTIONS, model=SHAPE, data_files="text.jsonl", output_dir="run")))
    assert minigpt("train", "--config-file", "c.json").exception is None
    run = open_run("run")
    assert run.facts["model"]["vocab_size"] == run.tokenizer.vocab_size == 300 and run.history[0]["loss"] < 6.5
    (work/"wrong.json").write_text(json.dumps(dict(OPTIONS, model=dict(SHAPE, depth=3), data_files="text.jsonl", output_dir="none")))
    assert "GPTConfig has no field 'depth'" in str(minigpt("train", "--config-file", "wrong.json").exception)


def test_a_shape_that_names_its_vocabulary_keeps_it_and_so_does_a_run_from_before(work):
    "Older versions gave a shape without one 20,000 tokens: such a run goes on with the same file"
    fit({**SHAPE, "vocab_size": 320}, "text.jsonl", output_dir="run", **OPTIONS)
    assert open_run("run").facts["model"]["vocab_size"] == 320
    assert fit(SHAPE, "text.jsonl", output_dir="run", **{**OPTIONS, "max_steps": 5}).step == 5 and open_run("run").facts["model"]["vocab_size"] == 320
