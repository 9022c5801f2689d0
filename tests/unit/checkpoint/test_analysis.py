"""`analyze` on files of other programs, written here or in ../shared/checkpoints, and harmful
files.

The results must equal what the program itself reports. Nothing in a file may run, write, or take
more memory or time than its header justifies.
"""

import base64
import io
import json
import os
import pickle
import random
import struct
import subprocess
import sys
import textwrap
import warnings
import zipfile
from dataclasses import replace
from pathlib import Path

import orjson
import pytest
import torch
import zstandard
from safetensors.torch import load_file, save_file

from minigpt.checkpoint.analysis import Analysis, analyze, checkpoints_in, create_demo, treemap
from minigpt.checkpoint.comparison import compare, difference, precision_table, suggestions
from minigpt.checkpoint.exporter import export
from minigpt.checkpoint.store import CheckpointError, load_model
from minigpt.core.files import dir_size
from minigpt.model.gpt import GPT, GPTConfig

torch.set_num_threads(1)
SHARED = Path(__file__).resolve().parents[4] / "shared" / "checkpoints"
shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the sample files of other programs are not here"
)


def assert_sums_match(a):
    assert abs(sum(a.components.values()) - a.size) <= 0.01 * a.size and all(
        n >= 0 for n in a.components.values()
    )


# --- programs that run here -----------------------------------------------------------------------
def tiny_llama(**changes):
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **dict(
                vocab_size=300,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=64,
                tie_word_embeddings=True,
            )
            | changes
        )
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    "A checkpoint of the Hugging Face Trainer and its model."
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    folder, model = tmp_path_factory.mktemp("trainer"), tiny_llama()
    rows = [dict(input_ids=(ids := torch.randint(0, 300, (16,))), labels=ids) for _ in range(8)]
    args = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=2,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=2,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-3,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers.Trainer(model, args, train_dataset=rows).train()
    return folder, model


def test_trainer_checkpoint(trained):
    folder, model = trained
    a = analyze(folder / "checkpoint-2")
    assert_sums_match(a)
    assert a.kind == "Hugging Face checkpoint" and (a.step, a.problems) == (2, [])
    assert a.params == model.num_parameters() == a.trainable
    assert {"model", "optimizer", "scheduler", "rng", "metadata"} <= a.components.keys()
    assert a.components["optimizer"] > 1.9 * a.components["model"]
    last = [
        h["loss"]
        for h in json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())[
            "log_history"
        ]
        if "loss" in h
    ][-1]
    assert a.loss == last and a.config["hidden_size"] == 32
    assert (
        a.metadata["training_args"]["learning_rate"] == 1e-3
    )  # from a pickled TrainingArguments, which was not instantiated
    orjson.dumps(a.summary())
    assert [p.name for p in checkpoints_in(folder)] == ["checkpoint-2"]


def test_pytorch_bin_and_shards_are_equal(tmp_path, trained):
    model = trained[1]
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    model.config.save_pretrained(tmp_path)
    a = analyze(tmp_path)
    assert_sums_match(a)
    assert a.params == model.num_parameters() and a.kind == "Hugging Face model"
    assert [(t.tied, t.bytes) for t in a.tensors if t.name == "lm_head.weight"] == [
        ("model.embed_tokens.weight", 0)
    ] and not a.problems
    model.save_pretrained(tmp_path / "sharded", max_shard_size="30KB")
    b = analyze(tmp_path / "sharded")
    assert_sums_match(b)
    assert (
        len([f for f in b.files if f.endswith(".safetensors")]) > 2
        and b.params == a.params
        and b.layers == a.layers
    )
    model.save_pretrained(
        tmp_path
    )  # the weights twice: the bytes of two, the parameters of one model
    c = analyze(tmp_path)
    assert_sums_match(c)
    assert c.params == a.params and c.size > 1.9 * b.components["model"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_untied_model_in_every_dtype(tmp_path, dtype):
    pytest.importorskip("transformers")
    model = tiny_llama(tie_word_embeddings=False).to(getattr(torch, dtype))
    for save in (
        lambda: model.save_pretrained(tmp_path / "a"),
        lambda: torch.save(model.state_dict(), tmp_path / "a.pt"),
    ):
        save()
    for a in (analyze(tmp_path / "a"), analyze(tmp_path / "a.pt")):
        assert_sums_match(a)
        assert (a.params, a.precision) == (model.num_parameters(), dtype)
        assert {t.name: (t.shape, t.bytes) for t in a.tensors} == {
            k: (tuple(v.shape), v.nbytes) for k, v in model.state_dict().items()
        }


def test_peft_adapter(tmp_path):
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(
        tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    )
    model.save_pretrained(tmp_path)
    a = analyze(tmp_path)
    assert_sums_match(a)
    assert (
        a.kind == "LoRA adapter"
        and a.params == a.trainable == model.get_nb_trainable_parameters()[0]
        and a.config["r"] == 4
    )


def test_pickled_and_wrapped_modules(tmp_path):
    """torch.save(model), which names its classes, and the prefixes of DataParallel and
    torch.compile.
    """
    model = GPT(GPTConfig(vocab_size=50, dim=16, n_layer=2, n_head=2, n_kv_head=1, ffn_dim=32))
    torch.save(model, tmp_path / "module.pt")
    a = analyze(tmp_path / "module.pt")
    assert_sums_match(a)
    assert (
        a.params == model.config.n_params
        and "minigpt.model.gpt.GPT" in a.code
        and "names code" in a.problems[0]
    )
    torch.save(
        {"model": {f"_orig_mod.{k}": v + 1 for k, v in model.weights().items()}},
        tmp_path / "wrapped.pt",
    )
    torch.save(model.weights(), tmp_path / "plain.pt")
    d = difference(tmp_path / "plain.pt", tmp_path / "wrapped.pt")
    assert not d["only_first"] and not d["only_second"] and d["changed"] == len(model.weights())


def test_file_format_before_torch_1_6(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(5, 3), torch.nn.Linear(3, 2, dtype=torch.float16))
    torch.save(
        dict(model=model.state_dict(), step=7, note=("x", {1, 2})),
        tmp_path / "old.pt",
        _use_new_zipfile_serialization=False,
    )
    torch.save(
        dict(model={k: v * 2 for k, v in model.state_dict().items()}, step=8), tmp_path / "new.pt"
    )
    a = analyze(tmp_path / "old.pt")
    assert_sums_match(a)
    assert a.params == sum(p.numel() for p in model.parameters()) and a.step == 7
    d = difference(a, tmp_path / "new.pt")  # the values are found at their offsets
    assert (d["changed"], round(d["distance"], 5), d["steps"]) == (4, 1, 1)


# --- files of other programs ----------------------------------------------------------------------
@shared
@pytest.mark.parametrize(
    "path, kind, params, step",
    [
        ("hf_trainer/checkpoint-20", "Hugging Face checkpoint", 510_272, 20),
        ("hf_trainer_bin/checkpoint-10", "Hugging Face checkpoint", 510_272, 10),
        ("hf_sharded", "Hugging Face model", 510_272, None),
        ("peft_adapter", "LoRA adapter", 4096, None),
        ("nanogpt/ckpt.pt", "nanoGPT checkpoint", 512_320, 10),
        ("minimind/pretrain_64.pth", "state dict", 532_832, None),
        ("minimind/pretrain_64_resume.pth", "training checkpoint (.pt)", 532_832, 1880),
        ("checkpoint_dict.pt", "training checkpoint (.pt)", 133_160, 1000),
    ],
)
def test_shared(path, kind, params, step):
    a = analyze(SHARED / path)
    assert_sums_match(a)
    assert (a.kind, a.params, a.step, a.code) == (kind, params, step, [])
    assert a.trainable in (None, params) and not [p for p in a.problems if "copy" not in p]
    for s in suggestions(a, training_hours=3, target="mobile"):
        assert s["bytes"] or s["hours"]
    assert str(a) and a._repr_html_() and orjson.dumps(a.summary())
    tensors = lambda f: (
        load_file(f)
        if f.suffix == ".safetensors"
        else torch.load(f, weights_only=True, map_location="cpu")
    )
    if (SHARED / path).is_file() and path != "minimind/pretrain_64.pth":
        d = tensors(SHARED / path)
        weights = d.get("model_state_dict", d.get("model"))
        assert {t.name: (t.shape, t.dtype) for t in a.tensors if t.component == "model"} == {
            k: (tuple(v.shape), str(v.dtype)[6:]) for k, v in weights.items()
        }


@shared
def test_shared_facts():
    a = analyze(SHARED / "checkpoint_dict.pt")
    assert (a.epoch, a.loss, a.best_loss, a.config) == (
        10,
        2.5,
        2.3,
        dict(vocab_size=1000, hidden_size=64),
    ) and a.components["scheduler"] > 0
    n = analyze(SHARED / "nanogpt" / "ckpt.pt")
    d = torch.load(SHARED / "nanogpt" / "ckpt.pt", weights_only=True)
    assert n.problems == [] and [t.bytes for t in n.tensors if t.tied] == [0]
    assert (
        n.best_loss == d["best_val_loss"].item() and n.config["n_embd"] == d["model_args"]["n_embd"]
    )
    positions = next(t for t in n.tensors if t.name == "transformer.wpe.weight")
    assert f"{(n.params - positions.numel) / 1e6:.2f}" == "0.51"  # as in nanoGPT's log
    m = analyze(SHARED / "minimind" / "pretrain_64.pth")
    assert m.problems[0].startswith(
        "lm_head.weight is stored as a copy of model.embed_tokens.weight"
    )


# --- our own kinds --------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def run(tmp_path_factory):
    from minigpt.train.trainer import fit

    d = tmp_path_factory.mktemp("run")
    (d / "a.txt").write_text(
        "The tide comes in, the tide goes out. 潮起潮落。\n\n" * 200, encoding="utf-8"
    )
    return fit(
        GPTConfig(vocab_size=300, dim=32, n_layer=2, n_head=2, n_kv_head=1, ffn_dim=64),
        d / "a.txt",
        output_dir=d / "run",
        tokenizer_vocab_size=300,
        max_seq_len=32,
        batch_size=2,
        max_steps=6,
        save_steps=2,
        eval_steps=2,
        validation_split=0.2,
        num_threads=1,
        progress=False,
        plot_loss=False,
    )


def test_a_run(run):
    for c in (*run.checkpoints, run.best):
        a = analyze(c.path)
        assert_sums_match(a)
        assert (
            a.size == dir_size(c.path)
            and a.step == c.step
            and not a.problems
            and a.params == run.model().config.n_params
        )
    assert (
        a.components.get("optimizer") is None and a.best_loss is not None
    )  # the best one has only weights
    whole = analyze(run.path)
    assert_sums_match(whole)
    assert (
        whole.size == dir_size(run.path)
        and whole.kind == "minigpt run"
        and {"checkpoints/", "best/", "model"} <= whole.components.keys()
        and whole.step == 6
    )
    assert [a.step for a in compare(run.path)] == sorted([2, 4, 6, run.best.step, 6])
    with pytest.raises(
        ValueError, match="is not a checkpoint, but holds 3, such as checkpoint-2.*--compare"
    ):
        analyze(run.path / "checkpoints")
    d = compare(run.path / "checkpoints").between()
    assert d["steps"] == 4 and d["changed"] == len(load_file(run.path / "model.safetensors"))
    first, last = (
        load_file(run.path / "checkpoints" / f"checkpoint-{n}" / "model.safetensors")
        for n in (2, 6)
    )
    row = next(r for r in d["tensors"] if r["tensor"] == "model.norm.weight")
    k = row["tensor"]
    assert row["distance"] == pytest.approx(
        ((last[k] - first[k]).norm() / first[k].norm()).item(), rel=1e-4
    )


def test_running_run_and_unfinished_checkpoint(run, tmp_path):
    import shutil

    to = tmp_path / "run"
    shutil.copytree(run.path, to)
    for n in ("MANIFEST.json", "model.safetensors", "config.json"):
        (to / n).unlink()
    assert "is not written" in analyze(to).problems[0]
    c = to / "checkpoints" / "checkpoint-4"
    (c / "tokenizer.json").unlink()
    with open(c / "optimizer.safetensors", "r+b") as f:
        f.truncate(5000)
    a = analyze(c)
    assert_sums_match(a)
    assert a.components["unreadable"] == 5000 and a.step == 4 and a.params
    assert (
        any("tokenizer.json is missing" in p for p in a.problems)
        and any("optimizer.safetensors has 5,000 bytes" in p for p in a.problems)
        and any("optimizer.safetensors: " in p for p in a.problems)
    )
    (c / "MANIFEST.json").unlink()
    assert any("MANIFEST.json is missing" in p for p in analyze(c).problems)
    both = compare([c, to / "checkpoints" / "checkpoint-2", to / "nothing.pt"])
    assert (
        [a.step for a in both] == [2, 4]
        and "does not exist" in both.failed[str(to / "nothing.pt")]
        and "checkpoint-2" in str(both)
        and both._repr_html_()
    )


def test_compressed_and_quantized(run, tmp_path):
    weights = load_file(run.path / "model.safetensors")
    config = json.loads((run.path / "config.json").read_text())
    z = tmp_path / "zst"
    z.mkdir()
    (z / "config.json").write_text(json.dumps(config))
    (z / "model.safetensors.zst").write_bytes(
        zstandard.ZstdCompressor().compress((run.path / "model.safetensors").read_bytes())
    )
    a = analyze(z)
    assert_sums_match(a)
    assert (
        a.params == run.model().config.n_params
        and a.components["model"] == (z / "model.safetensors.zst").stat().st_size
    )
    assert difference(z, run.path)["unread"]
    q = tmp_path / "int4"
    q.mkdir()
    (q / "config.json").write_text(json.dumps(config | dict(quantization=dict(bits=4, group=64))))
    packed, widths = {}, {}
    for k, v in weights.items():
        if v.dim() != 2:
            packed[k] = v
            continue
        widths[k] = v.shape[1]
        packed[k], packed[k + ".scale"] = (
            torch.zeros(v.shape[0], 1, v.shape[1] // 2, dtype=torch.uint8),
            torch.zeros(v.shape[0], 1, dtype=torch.bfloat16),
        )
    save_file(
        packed,
        q / "model.safetensors",
        {"minigpt": json.dumps(dict(bits=4, group=64, widths=widths))},
    )
    b = analyze(q)
    assert_sums_match(b)
    assert (b.params, b.precision) == (a.params, "int4") and not b.problems
    assert not [s for s in suggestions(b) if "quantization" in s["what"]]


# --- numbers that are computed --------------------------------------------------------------------
def test_suggested_sizes_are_exact(tmp_path):
    medium = GPTConfig.preset("medium")
    with torch.device("meta"):
        model = GPT(medium)
    from minigpt.checkpoint.analysis import TensorInfo, layer_of
    from minigpt.model.gpt import to_hf

    tensors = [
        TensorInfo(k, "model", tuple(v.shape), "float32", 4 * v.numel(), v.numel(), layer_of(k))
        for k, v in model.weights().items()
    ]
    P = medium.n_params
    a = Analysis(
        tmp_path,
        "x",
        12 * P,
        dict(model=4 * P, optimizer=8 * P),
        tensors,
        config=to_hf(medium),
        metadata=dict(training_args=dict(batch_size=4, max_seq_len=512)),
    )
    found = {r["what"]: r for r in suggestions(a, training_hours=10)}
    assert (
        found["save weights only"]["bytes"] == 8 * P and found["half precision"]["bytes"] == 2 * P
    )
    assert found["quantization to INT8"]["bytes"] == pytest.approx(3 * P, rel=0.02) and found[
        "quantization to INT4"
    ]["bytes"] == pytest.approx(3.5 * P, rel=0.02)
    small = GPTConfig.preset("small").n_params
    assert found["smaller preset"]["bytes"] == pytest.approx(4 * (P - small), rel=1e-6) and found[
        "smaller preset"
    ]["hours"] == pytest.approx(10 * (1 - small / P))
    block = sum(t.bytes for t in tensors if t.layer == "model.layers.0")
    assert found["pruning"]["bytes"] == 4 * block
    assert {
        "mixed precision",
        "gradient checkpointing",
        "larger batch",
        "distillation",
    } <= found.keys()
    assert all(0 < r["share"] < 1 for r in found.values())
    twice = {r["what"]: r for r in suggestions(a, training_hours=20)}
    assert all(twice[k]["hours"] == pytest.approx(2 * r["hours"]) for k, r in found.items())
    a.metadata["training_args"]["batch_size"] = 64
    assert (
        next(r for r in suggestions(a, 10) if r["what"] == "larger batch")["hours"]
        < found["larger batch"]["hours"] / 5
    )
    mobile = suggestions(a, target="mobile")
    assert (
        mobile[0]["what"] == "quantization to INT4"
        and mobile[0]["fits"]
        and "ONNX" in [r["what"] for r in mobile]
    )  # 57 MiB; INT8 would take 110
    with pytest.raises(ValueError, match="target='phone' must be mobile, edge, server"):
        suggestions(a, target="phone")
    with pytest.raises(ValueError, match="training_hours=-1 must be above 0"):
        suggestions(a, training_hours=-1)


def test_precision_table():
    t = precision_table("medium", measured=dict(fp32=449_000_000, int4=59_500_000))
    assert (
        [f"{r['MiB']:.0f}" for r in t] == ["427", "214", "214", "107", "53"]
        and t[4]["measured_MiB"] == pytest.approx(56.74, abs=0.01)
        and t[1]["measured_MiB"] is None
    )
    assert precision_table(111_949_440) == precision_table(GPTConfig.preset("medium"))
    with pytest.raises(ValueError, match="measured has int2"):
        precision_table(10, dict(int2=3))


def test_treemap_fills_the_plane():
    for sizes in ([5], [6, 6, 4, 3, 2, 2, 1], [100, 1, 1, 0], [1] * 30):
        boxes = treemap(sizes, 6, 4)
        assert len(boxes) == sum(s > 0 for s in sizes)
        for s, (x, y, w, h) in zip(sizes, boxes):
            assert (
                w * h == pytest.approx(24 * s / sum(sizes))
                and x >= -1e-9
                and y >= -1e-9
                and x + w <= 6 + 1e-6
                and y + h <= 4 + 1e-6
            )
    assert treemap([], 1, 1) == []


def test_checkpoints_are_ordered_by_step_then_time(tmp_path):
    w = {"layers.0.w": torch.ones(3)}
    for n, name in enumerate(
        ("final_model.pt", "checkpoint_step_100.pt", "checkpoint_step_20.pt", "b.safetensors")
    ):
        (
            save_file(w, tmp_path / name)
            if name.endswith("safetensors")
            else torch.save(w, tmp_path / name)
        )
        os.utime(tmp_path / name, (1e9 - n, 1e9 - n))
    (tmp_path / "checkpoint-30").mkdir()
    torch.save({"model": w, "step": 30}, tmp_path / "checkpoint-30" / "ckpt.pt")
    torch.save({"state": {}}, tmp_path / "optimizer.pt")  # not a checkpoint by itself
    (tmp_path / ".checkpoint-40.tmp-1").mkdir()
    assert [a.path.name for a in compare(tmp_path)] == [
        "checkpoint_step_20.pt",
        "checkpoint-30",
        "checkpoint_step_100.pt",
        "b.safetensors",
        "final_model.pt",
    ]
    with pytest.raises(ValueError, match="no checkpoint found in"):
        compare(tmp_path / ".checkpoint-40.tmp-1")
    with pytest.raises(FileNotFoundError, match="did you mean 'final_model.pt'"):
        analyze(tmp_path / "final-model.pt")


def test_difference_names_mismatches(tmp_path):
    torch.save(
        {
            "a": torch.ones(2, 3),
            "b": torch.ones(4),
            "c": torch.tensor([0.0, 0.0]),
            "t": torch.arange(6.0).view(2, 3).t(),
        },
        tmp_path / "1.pt",
    )
    torch.save(
        {
            "a": torch.ones(3, 2),
            "b": torch.ones(4, dtype=torch.bfloat16) * 2,
            "d": torch.ones(1),
            "c": torch.tensor([0.0, 0.0]),
            "t": torch.arange(6.0).view(2, 3).t().contiguous(),
        },
        tmp_path / "2.pt",
    )
    d = difference(tmp_path / "1.pt", tmp_path / "2.pt")
    assert (d["only_first"], d["only_second"], d["reshaped"], d["retyped"]) == (
        [],
        ["d"],
        ["a"],
        ["b"],
    )
    assert {r["tensor"]: r["distance"] for r in d["tensors"]} == {
        "b": 1,
        "c": 0,
        "t": 0,
    }  # bfloat16 and transposed tensors are read correctly
    assert "only in the second: d" in str(d)


def test_difference_of_strided_tensors_and_nan(tmp_path):
    "Tensors of several pieces, contiguous or not; a NaN that stays NaN is unchanged."
    x = torch.randn(1500, 2000)
    y = x.clone()
    y[1400, 7] += 1e-3
    x[3, 3] = y[3, 3] = float("nan")
    torch.save({"w": x, "same": x[2:9], "n": torch.tensor([1.0, 2.0])}, tmp_path / "1.pt")
    torch.save(
        {
            "w": y.t().contiguous().t(),
            "same": x[2:9].clone(),
            "n": torch.tensor([1.0, float("nan")]),
        },
        tmp_path / "2.pt",
    )
    rows = {r["tensor"]: r for r in difference(tmp_path / "1.pt", tmp_path / "2.pt")["tensors"]}
    assert {k: r["changed"] for k, r in rows.items()} == dict(w=True, same=False, n=True)
    x[3, 3] = y[3, 3] = 0
    torch.save({"w": x}, tmp_path / "1.pt")
    torch.save({"w": y.t().contiguous().t()}, tmp_path / "2.pt")
    assert difference(tmp_path / "1.pt", tmp_path / "2.pt")["distance"] == pytest.approx(
        ((y - x).norm() / x.norm()).item(), rel=1e-3
    )


def test_contents_of_a_dict_are_recognized_by_names(tmp_path):
    """A state dict with an odd entry is still one.

    An average of the weights is another component; views show the same values.
    """
    w = {"a.weight": torch.ones(3, 4), "b.weight": torch.ones(5)}
    torch.save(w | {"_extra_state": {"scale": torch.ones(2)}}, tmp_path / "extra.pt")
    assert analyze(tmp_path / "extra.pt").components.keys() == {"model", "format"}
    torch.save(
        {
            "model": w,
            "ema": {k: v + 1 for k, v in w.items()},
            "step": torch.tensor(7),
            "rng_state": torch.get_rng_state(),
        },
        tmp_path / "ema.pt",
    )
    a = analyze(tmp_path / "ema.pt")
    assert_sums_match(a)
    assert (a.params, a.step, a.components["rng"] > 5000) == (17, 7, True) and {
        t.name for t in a.tensors if t.component == "ema"
    } == {"ema.a.weight", "ema.b.weight"}
    torch.save({"model": {"a": torch.ones(1_000_000)[:10]}}, tmp_path / "view.pt")
    v = analyze(tmp_path / "view.pt")
    assert_sums_match(v)
    assert v.params == 10 and "3.8 MiB are stored and not used" in v.problems[0]


def test_demo_is_analyzed(tmp_path, capsys):
    config = GPTConfig(vocab_size=50, dim=16, n_layer=2, n_head=2, n_kv_head=1, ffn_dim=32)
    path = create_demo(tmp_path / "demo", config)
    assert [p.name for p in path.parent.iterdir()] == [
        "checkpoint_step_2.pt"
    ] and path.name in capsys.readouterr().err  # with a progress bar
    a, d = analyze(path), torch.load(path, weights_only=True)
    assert set(d) == {
        "model_state_dict",
        "optimizer_state_dict",
        "scheduler_state_dict",
        "epoch",
        "step",
        "loss",
        "config",
        "best_loss",
        "model_info",
    }
    assert a.params == a.trainable == config.n_params and (a.step, a.loss) == (2, d["loss"])
    assert all(s["exp_avg"].abs().sum() > 0 for s in d["optimizer_state_dict"]["state"].values())
    with pytest.raises(ValueError, match="did you mean 'medium'"):
        create_demo(tmp_path, "medum")


def test_demo_exports_have_the_suggested_sizes(tmp_path):
    config = GPTConfig(
        vocab_size=50, dim=16, n_layer=2, n_head=2, n_kv_head=1, ffn_dim=32, rope_theta=5000.0
    )
    path = create_demo(tmp_path / "demo", config, progress=False)
    weights = torch.load(path, weights_only=True)["model_state_dict"]
    for source, out in ((path.parent, "folder"), (path, "file")):
        model = load_model(export(source, tmp_path / out))
        assert model.config == config and {k: t.tolist() for k, t in model.weights().items()} == {
            k: t.tolist() for k, t in weights.items()
        }
    assert export(path, precision="int4") == path.parent / "checkpoint_step_2-int4"
    torch.save(
        {"model_state_dict": weights, "config": {"model_type": "llama", "hidden_size": 16}}, path
    )
    with pytest.raises(CheckpointError, match="is not converted: config.json lacks"):
        export(path, tmp_path / "x")


def test_demo_is_not_overwritten(tmp_path):
    config = GPTConfig(vocab_size=50, dim=16, n_layer=1, n_head=2, n_kv_head=1, ffn_dim=32)
    was = create_demo(tmp_path / "demo", config, progress=False).read_bytes()
    with pytest.raises(
        FileExistsError,
        match="checkpoint_step_2.pt exists already and is not overwritten.*--overwrite",
    ):
        create_demo(tmp_path / "demo", replace(config, n_layer=2), progress=False)
    assert (tmp_path / "demo/checkpoint_step_2.pt").read_bytes() == was
    assert (
        analyze(
            create_demo(
                tmp_path / "demo", replace(config, n_layer=2), progress=False, overwrite=True
            )
        ).params
        > config.n_params
    )


# --- light and fast -------------------------------------------------------------------------------
def test_analysis_loads_neither_torch_nor_values(run, root):
    code = textwrap.dedent(
        """
        import sys
        from pathlib import Path
        from minigpt.checkpoint.analysis import analyze
        from minigpt.checkpoint.comparison import compare
        run = Path(sys.argv[1])
        print(len(compare(run)))
        str(analyze(run))
        analyze(run)._repr_html_()
        compare(run).between()
        heavy = 'torch', 'transformers', 'matplotlib', 'ipywidgets'
        print([m for m in heavy if m in sys.modules])"""
    )
    out = subprocess.run(
        [sys.executable, "-c", code, run.path], cwd=root, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    assert out[1] == "[]", out


# --- files that are meant to do harm --------------------------------------------------------------
class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickles_are_not_executed(tmp_path):
    mark = tmp_path / "owned"
    w = {"layers.0.w": torch.ones(30, 10)}
    torch.save(dict(model=w, step=3, extra=Payload(mark)), tmp_path / "new.pt")
    torch.save(
        dict(model=w, step=3, extra=Payload(mark)),
        tmp_path / "old.pt",
        _use_new_zipfile_serialization=False,
    )
    for protocol in range(6):
        (tmp_path / f"{protocol}.pkl").write_bytes(pickle.dumps(Payload(mark), protocol))
    (tmp_path / "inst.pkl").write_bytes(b"(S'touch " + str(mark).encode() + b"'\nios\nsystem\n.")
    (tmp_path / "after.pkl").write_bytes(
        pickle.dumps(Payload(mark))[:-1] + b"0Nxx"
    )  # the call comes before the point where the pickle breaks
    hf = tmp_path / "checkpoint-1"
    hf.mkdir()
    save_file(w, hf / "model.safetensors")
    (hf / "config.json").write_text("{}")
    for n in ("training_args.bin", "optimizer.pt", "rng_state.pth", "scheduler.pt"):
        torch.save(dict(x=Payload(mark)), hf / n)
    for p in sorted(tmp_path.iterdir()):
        if p.name == "after.pkl":
            with pytest.raises(ValueError, match="after.pkl is refused"):
                analyze(p)
            continue
        a = analyze(p)
        assert_sums_match(a)
        assert any(c.endswith(".system") for c in a.code) and any(
            "names code" in x and "nothing was run" in x for x in a.problems
        ), p
        if p.suffix == ".pt":
            assert (a.params, a.step) == (300, 3)  # its sizes are readable all the same
    assert not mark.exists()
    a = analyze(hf)
    assert len(a.problems) == 4 and a.params == 300
    assert not mark.exists()


def zipped(data, records=(), name="archive", method=zipfile.ZIP_STORED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr(f"{name}/data.pkl", data, method)
        for k, v in records:
            z.writestr(k, v)
    return out.getvalue()


def short(s):
    return b"\x8c" + bytes([len(s)]) + s.encode()  # SHORT_BINUNICODE


def u32(n):
    return struct.pack("<I", n)


def tensor(numel, shape, stride, key="0", offset=0):
    "Return the instructions that unpickle a tensor of torch."
    ints = lambda xs: (
        b"(" + b"".join(b"\x8a\x09" + x.to_bytes(9, "little", signed=True) for x in xs) + b"t"
    )
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(("
        + short("storage")
        + b"ctorch\nFloatStorage\n"
        + short(key)
        + short("cpu")
        + ints([numel])[1:-1]
        + b"tQ"
        + ints([offset])[1:-1]
        + ints(shape)
        + ints(stride)
        + b"\x89}tR"
    )


BIG = 150_000
PICKLES = {
    "memo": b"\x80\x02}r\xff\xff\xff\xff.",  # pickle's C code would allocate 64 GB for this
    "length": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"abc.",
    "length32": b"\x80\x02T" + u32(0x7FFFFFFF) + b"abc.",
    "dicts": b"\x80\x02(" + b"}" * 8_000_000 + b"t.",
    "deep list": b"\x80\x02" + b"]" * BIG + b"a" * (BIG - 1) + b".",
    "deep tuple": b"\x80\x02)" + b"\x85" * BIG + b".",
    "laughs": (
        b"\x80\x02)q\x00"
        + b"".join(
            b"h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(100)
        )
        + b"."
    ),
    "laughing key": (
        b"\x80\x02}"
        + b")q\x00"
        + b"".join(
            b"0h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(100)
        )
        + b"Ns."
    ),
    "laughing name": (
        b"\x80\x04)q\x00"
        + b"".join(
            b"0h" + bytes([i]) + b"h" + bytes([i]) + b"\x86q" + bytes([i + 1]) for i in range(60)
        )
        + short("x")
        + b"\x93."
    ),
    "long names": (
        b"\x80\x04X"
        + u32(4 << 20)
        + b"a" * (4 << 20)
        + b"q\x000"
        + b"h\x00h\x00\x930" * 100_000
        + b"."
    ),
    "same list": (
        b"\x80\x02]("
        + b"K\x01" * BIG
        + b"eq\x000"
        + b"".join([b"c__builtin__\nset\nh\x00\x85R0"] * 10_000)
        + b"]."
    ),
    "same state": (
        b"\x80\x02}("
        + b"".join(b"J" + u32(i) + b"N" for i in range(60_000))
        + b"uq\x000"
        + b"ca\nB\n)\x81h\x00b0" * 40_000
        + b"}."
    ),
    "many entries of one list": (
        b"\x80\x02}]("
        + b"K\x01" * BIG
        + b"eq\x00"
        + b"0("
        + b"".join(b"J" + u32(i) + b"h\x00" for i in range(60_000))
        + b"u."
    ),
    "nested rebuild": (
        b"\x80\x02"
        + b"ctorch._tensor\n_rebuild_from_type_v2\n" * 20_000
        + b"))"
        + b"N\x87R" * 5
        + b"."
    ),
    "huge int": b"\x80\x02\x8b" + u32(1 << 20) + b"\xff" * (1 << 20) + b".",
    "no end": b"\x80\x02" + b"N" * 100,
    "nothing on the stack": b"\x80\x020000R.",
    "negative storage": b"\x80\x02}" + short("w") + tensor(-5, (1,), (1,)) + b"s.",
    "claims more than it stores": (
        b"\x80\x02}" + short("w") + tensor(1 << 40, (1 << 40,), (1,)) + b"s."
    ),
    "repeats a value": b"\x80\x02}" + short("w") + tensor(1, (1 << 40,), (0,)) + b"s.",
    "reaches beyond": b"\x80\x02}" + short("w") + tensor(10, (2, 3), (8, 1)) + b"s.",
    "missing record": (
        b"\x80\x02}" + short("w") + tensor(10, (10,), (1,), key="../../etc/passwd") + b"s."
    ),
    "too many axes": b"\x80\x02}" + short("w") + tensor(1, (1,) * 40, (1,) * 40) + b"s.",
}


def harmful(folder):
    "Write files that must be refused; return name → words of the error."
    says = {}

    def add(name, data, why=""):
        (folder / name).write_bytes(data)
        says[name] = why

    for k, p in PICKLES.items():
        add(f"{k}.pt", zipped(p, [("archive/data/0", b"\0" * 40)]))
        if len(p) < 10_000:
            add(f"{k}.pkl", p)
    bomb = b"\x80\x02]" + b"N0" * 10_000_000 + b"."
    add("deflated.pt", zipped(bomb, method=zipfile.ZIP_DEFLATED), "is compressed")
    add("bz2.pt", zipped(bomb[:1_000_000], method=zipfile.ZIP_BZIP2), "is compressed")
    add("big pickle.pt", zipped(bomb), "")
    good = pickle.dumps({"step": 1}, 2)
    for n, evil in enumerate(
        ("../../evil", "archive/../../evil", "/tmp/evil", "..\\evil", "C:\\evil")
    ):
        add(f"path{n}.pt", zipped(good, [(evil, b"x")]), "points outside the archive")
    whole = zipped(good, [("archive/data/0", b"\0" * 4000)])
    add("cut off.pt", whole[:-30], "truncated")
    add("cut in the middle.pt", whole[:2000], "truncated")
    i = whole.rfind(b"PK\1\2")
    add(
        "overlap.pt",
        whole[: i + 20] + u32(1 << 30) + u32(1 << 30) + whole[i + 28 :],
        "its records overlap",
    )
    two = zipped(good, [("archive/data/0", b"\0" * 4000), ("archive/data/1", b"\0" * 8)])
    j = two.rfind(b"PK\1\2")
    add(
        "moved.pt", two[: j + 42] + u32(500) + two[j + 46 :], "is not at the offset"
    )  # into another record
    end = whole.rfind(b"PK\5\6")
    add(
        "long list of contents.pt",
        whole[:end]
        + b"\0" * (20 << 20)
        + whole[end : end + 12]
        + u32(len(whole[i:end]) + (20 << 20) + 100)
        + whole[end + 16 :],
        "claims a header or a list of contents",
    )
    old = io.BytesIO()
    torch.save({"w": torch.ones(5)}, old, _use_new_zipfile_serialization=False)
    add("old, cut off.pt", old.getvalue()[:-8], "truncated")
    add("nothing.pt", b"", "it is empty")
    add("text.pt", b"<html>not found</html>" * 100, "damaged")
    header = lambda h, n=None, values=b"": (
        (len(h) if n is None else n).to_bytes(8, "little") + h + values
    )
    one = lambda dtype="F32", shape="[2]", at="[0,8]", rest="": (
        f'{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{at}}}{rest}}}'.encode()
    )
    for name, data, why in [
        (
            "length",
            header(one(), 1 << 62, bytes(8)),
            "its header claims 4,611,686,018,427,387,904 bytes",
        ),
        ("length-", header(one(), 100_000, bytes(8)), "truncated"),
        ("shape", header(one(shape="[3]"), None, bytes(8)), "do not match its shape"),
        ("minus", header(one(shape="[-2]"), None, bytes(8)), "impossible"),
        ("type", header(one(dtype="X9"), None, bytes(8)), "type X9"),
        ("beyond", header(one(at="[0,800]", shape="[200]"), None, bytes(8)), "truncated"),
        ("gap", header(one(at="[8,16]"), None, bytes(16)), "gap"),
        (
            "overlap",
            header(
                one(rest=',"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}'), None, bytes(12)
            ),
            "overlaps",
        ),
        ("axes", header(one(shape="[" + "1," * 5000 + "2]"), None, bytes(8)), "impossible"),
        ("deep", header(b"[" * 100_000), "JSON"),
        ("list", header(b"[1]"), "not a JSON object"),
        ("text", b"<html>", "truncated"),
        ("words", header(one(shape='"ab"'), None, bytes(8)), "impossible"),
        ("offsets", header(one(at='["a",{}]'), None, bytes(8)), ""),
        ("number", header(b'{"a":3}'), "damaged"),
        ("more", header(one(), None, bytes(99)), "something was added"),
    ]:
        add(f"{name}.safetensors", data, why)
    with open(folder / "9 MiB.safetensors", "wb") as f:
        f.write((9 << 20).to_bytes(8, "little"))
        f.truncate(20 << 20)
    says["9 MiB.safetensors"] = "more than the limit of 8.0 MiB"
    c = zstandard.ZstdCompressor()
    add(
        "bomb.safetensors.zst",
        c.compress((1 << 33).to_bytes(8, "little") + bytes(50_000_000)),
        "more than the limit of 8.0 MiB",
    )
    add("not.safetensors.zst", b"abc" * 100, "not a zstd file")
    add("broken.safetensors.zst", c.compress(header(one(), None, bytes(8)))[:-9], "")
    return says


WATCH = """
import resource, sys, time
from pathlib import Path
from minigpt.checkpoint.analysis import analyze
now = int(next(l for l in open('/proc/self/status') if l.startswith('VmSize')).split()[1])<<10
resource.setrlimit(resource.RLIMIT_AS, (now+(250<<20),)*2)  # asking for more is a MemoryError
for p in sorted(Path(sys.argv[1]).iterdir()):
    t = time.perf_counter()
    try:
        a = analyze(p)
        said = 'analysed ' + ' '.join(a.problems)
        assert abs(sum(a.components.values())-a.size) <= .01*a.size
        str(a), a._repr_html_(), a.summary()
    except ValueError as e: said = str(e)
    print(f'{time.perf_counter()-t:.1f}', p.name, ascii(said), sep='\\t', flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the memory of a process, on Linux only")
def test_harmful_files_are_refused(tmp_path, root):
    folder = tmp_path / "files"
    folder.mkdir()
    says = harmful(folder)
    before = {p: p.stat().st_mtime for p in tmp_path.rglob("*")}
    r = subprocess.run(
        [sys.executable, "-c", WATCH, folder],
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert r.returncode == 0, r.stdout[-500:] + r.stderr[-2000:]
    rows = [line.split("\t") for line in r.stdout.splitlines()]
    assert {name for _, name, _ in rows} == says.keys()
    for seconds, name, reported in rows:
        assert float(seconds) < 15, name
        if says[name]:
            assert says[name] in reported and "is refused" in reported, (name, reported)
    reported = {name: s for _, name, s in rows}
    for name in ("memo", "deep list", "deep tuple", "laughs"):
        assert "analysed" in reported[f"{name}.pt"], reported[f"{name}.pt"]
    assert (
        "beyond the 40 bytes" in reported["reaches beyond.pt"]
        and "beyond the 40 bytes" in reported["repeats a value.pt"]
        and "beyond the 40 bytes" in reported["claims more than it stores.pt"]
    )
    assert "are missing" in reported["missing record.pt"] and "8.0 MiB" in reported["big pickle.pt"]
    assert {p: p.stat().st_mtime for p in tmp_path.rglob("*")} == before  # no file was written
    assert not Path("/tmp/evil").exists()


def test_random_damage_is_handled(tmp_path):
    "Truncated or modified files give an analysis or a ValueError."
    w = {f"layers.{i}.w": torch.randn(4, 3) for i in range(3)}
    torch.save(
        dict(
            model=w,
            optimizer=dict(state={0: dict(exp_avg=w["layers.0.w"])}),
            step=3,
            config=dict(a=[1, {"b": None}]),
        ),
        tmp_path / "new.pt",
    )
    torch.save(dict(model=w, step=3), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    save_file(w, tmp_path / "a.safetensors")
    rng, answers = random.Random(0), []
    for source in ("new.pt", "old.pt", "a.safetensors"):
        good = (tmp_path / source).read_bytes()
        for _ in range(400):
            bad = bytearray(good)
            for _ in range(rng.choice((1, 1, 3, 20))):
                bad[
                    (
                        rng.randrange(len(bad))
                        if rng.random() < 0.5
                        else rng.randrange(min(600, len(bad)))
                    )
                ] = rng.randrange(256)
            if rng.random() < 0.2:
                del bad[rng.randrange(len(bad)) :]
            p = tmp_path / f"bad{Path(source).suffix}"
            p.write_bytes(bad)
            try:
                a = analyze(p)
                assert_sums_match(a)
                str(a)
                a._repr_html_()
                orjson.dumps(a.summary())
                answers.append("read")
            except ValueError as e:
                assert str(p) in str(e)
                answers.append("refused")
    assert set(answers) == {"read", "refused"}


def test_unusual_directories(tmp_path):
    d = tmp_path / "m"
    d.mkdir()
    save_file({"a": torch.ones(2)}, d / "model.safetensors")
    for n in ("config.json", "trainer_state.json", "MANIFEST.json", "training_args.json"):
        (d / n).write_text("[" * 100_000)
    a = analyze(d)
    assert_sums_match(a)
    assert a.params == 2 and len(a.problems) >= 4
    for text in (
        "[1]",
        '"x"',
        '{"files": 3}',
        '{"files": {"a": 1}, "log_history": [3, {"loss": "<b>"}], "global_step": "x"}',
        "null",
        '{"files": {"../../x": {"size": 1}}, "log_history": 4}',
    ):
        for n in ("config.json", "trainer_state.json", "MANIFEST.json"):
            (d / n).write_text(text)
        assert_sums_match(a := analyze(d))
        str(a)
        orjson.dumps(a.summary())
    with open(d / "trainer_state.json", "wb") as f:
        f.truncate(1 << 30)
    assert any("more than the limit of 32.0 MiB" in p for p in analyze(d).problems)
    (d / "loop").symlink_to("/")
    os.mkfifo(d / "fifo.pt")
    analyze(d)
    with pytest.raises(ValueError, match="neither a file nor a directory"):
        analyze(d / "fifo.pt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="has no weights"):
        analyze(tmp_path / "empty")


def test_names_cannot_send_terminal_sequences(tmp_path):
    evil = "\x1b[2J<script>alert(1)</script>\u202e$x^{$"
    torch.save(
        {
            "model": {evil: torch.ones(3, 2), evil + ".1.w": torch.ones(2)},
            evil: {"w": torch.ones(4)},
            "config": {evil: evil},
        },
        tmp_path / "e.pt",
    )
    a = analyze(tmp_path / "e.pt")
    for text in (
        str(a),
        a._repr_html_(),
        str(compare(tmp_path)),
        compare(tmp_path)._repr_html_(),
        difference(a, a)._repr_html_(),
    ):
        assert "\x1b" not in text and "\u202e" not in text
    assert (
        "<script>"
        not in a._repr_html_() + compare(tmp_path)._repr_html_() + difference(a, a)._repr_html_()
    )
    for figure in (a.figure(), compare(tmp_path).figure()):
        assert base64.b64encode(figure._repr_png_())
