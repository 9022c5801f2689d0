"""What the notebooks of quantization, checkpoints and export cannot test.

Files and readers of other programs, invalid files, kills, full disks, memory.
"""

import errno
import inspect
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import zipfile

import psutil
import pytest
import torch
import torch.nn.functional as F
import zstandard
from safetensors.torch import load_file, save_file

from minigpt.checkpoint.exporter import BITS, export, export_onnx, export_report
from minigpt.checkpoint.store import (
    CheckpointError,
    CheckpointStore,
    State,
    load_model,
    pack_optimizer,
    pack_rng,
    problem,
    read_checkpoint,
    write_checkpoint,
    write_final,
    write_safetensors,
)
from minigpt.core.files import sweep
from minigpt.model.generation import complete
from minigpt.model.gpt import GPT, GPTConfig
from minigpt.tokenizer.bpe import load_tokenizer, train_tokenizer
from tests.harness.faulty import Disk

TEXT = [
    "The keeper lit the lamp at dusk, and the ships came home.",
    "老人点亮灯火，等待晚归的船只。",
]
SHAPES = dict(
    llama=dict(),
    qwen3=dict(qk_norm=True, head_dim=10),
    untied=dict(tied=False),
    odd=dict(dim=33, n_head=3, n_kv_head=1, head_dim=6, ffn_dim=75, vocab_size=351),
)


def trained(config, ids, steps=25):
    "Train far enough that a wrong rotary base or scale would show."
    torch.manual_seed(0)
    model = GPT(config)
    opt = torch.optim.AdamW(model.parameters(), 5e-3)
    for _ in range(steps):
        model.loss(ids[:, :-1].contiguous(), ids[:, 1:].contiguous()).backward()
        opt.step()
        opt.zero_grad()
    return model.eval(), opt


def make(shape, folder):
    "Return a model, its full checkpoint, and ids to try."
    torch.set_num_threads(1)
    tok = train_tokenizer(TEXT * 20, vocab_size=350)
    config = GPTConfig(
        **{
            **dict(
                vocab_size=tok.vocab_size,
                dim=96,
                n_layer=2,
                n_head=4,
                n_kv_head=2,
                ffn_dim=160,
                max_len=256,
                rope_theta=5e5,
            ),
            **SHAPES[shape],
        }
    )
    ids = torch.randint(0, tok.vocab_size, (4, 80), generator=torch.Generator().manual_seed(1))
    model, opt = trained(config, ids)
    path = folder / "checkpoint-25"
    write_checkpoint(
        path,
        State(
            config,
            model.weights(),
            tok,
            dict(global_step=25, loss=1.5),
            {},
            pack_optimizer(opt, model),
            pack_rng(),
        ),
    )
    return model, path, ids


@pytest.fixture(scope="module", params=SHAPES)
def saved(request, tmp_path_factory):
    return make(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    "For tests where one shape is enough."
    return make("llama", tmp_path_factory.mktemp("plain"))


def logits(model, ids):
    with torch.no_grad():
        return model(ids)


def relative_error(a, b):
    return ((a.float() - b).norm() / b.norm()).item()


# --- every kind opens -----------------------------------------------------------------------------
WITHIN = dict(
    fp32=0, fp16=1e-3, bf16=1e-2, int8=2e-2, int4=0.25
)  # relative to the norm of all logits


@pytest.mark.parametrize("compress", [False, True], ids=["plain", "zst"])
@pytest.mark.parametrize("precision", BITS)
def test_exports_open_with_equal_logits(saved, tmp_path, precision, compress):
    model, path, ids = saved
    steps = []
    out = export(
        path,
        tmp_path / "out",
        precision,
        compress=compress,
        progress=lambda done, total: steps.append((done, total)),
    )
    assert problem(out) is None and [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (
        steps[0][0] == 0
        and steps[-1][0] == steps[-1][1] == 4 * model.config.n_params
        and sorted(steps) == steps
    )
    again = load_model(out)
    assert again.head.dtype == torch.float32 and again.config == model.config
    assert relative_error(logits(again, ids), logits(model, ids)) <= WITHIN[precision]
    assert isinstance(
        complete(again, load_tokenizer(out), "The", max_new_tokens=5, temperature=0), str
    )
    half = load_model(out, dtype=torch.bfloat16)
    assert (
        half.head.dtype == torch.bfloat16
        and relative_error(logits(half, ids), logits(model, ids)) < 0.3
    )
    # An export of an export is the same file at the same precision, and opens at others.
    twice = export(out, tmp_path / "twice", precision)
    tensors = load_file(twice / "model.safetensors")
    first = load_file(export(path, tmp_path / "again", precision) / "model.safetensors")
    assert tensors.keys() == first.keys() and all(torch.equal(tensors[k], first[k]) for k in first)
    assert (
        relative_error(
            logits(load_model(export(out, tmp_path / "bf16", "bf16")), ids), logits(model, ids)
        )
        <= WITHIN[precision] + 0.01
    )
    if compress:
        (tmp_path / "unpacked").write_bytes(
            zstandard.ZstdDecompressor()
            .stream_reader((out / "model.safetensors.zst").read_bytes())
            .read()
        )
        assert (tmp_path / "unpacked").read_bytes() == (
            tmp_path / "again" / "model.safetensors"
        ).read_bytes()


def test_tensor_order_of_another_library(saved, tmp_path):
    "safetensors' own writer stores the tensors in another order: scales before numbers."
    model, path, ids = saved
    out = export(path, tmp_path / "out", "int4")
    want = logits(load_model(out), ids)
    from minigpt.checkpoint.store import SafeTensors

    metadata, tensors = (
        SafeTensors(out / "model.safetensors").metadata,
        {k: t.clone() for k, t in load_file(out / "model.safetensors").items()},
    )
    (out / "MANIFEST.json").unlink()
    save_file(tensors, out / "model.safetensors", metadata)
    assert torch.equal(logits(load_model(out), ids), want)
    assert torch.equal(logits(load_model(export(out, tmp_path / "out2", "fp32")), ids), want)


def test_full_export_resumes_bit_for_bit(saved, tmp_path):
    model, path, _ = saved
    packed = export(path, weights_only=False, compress=True)
    assert packed == path.parent / "checkpoint-25-full-zst"  # next to its source, outside any run
    with pytest.raises(
        CheckpointError,
        match="export of kind 'compressed', and training cannot resume from it.*weights_only=False",
    ):
        read_checkpoint(packed)
    store = CheckpointStore(tmp_path)
    shutil.copytree(packed, tmp_path / "checkpoint-30")
    assert store.newest() is None  # not a state to resume from, even in its folder
    export(packed, tmp_path / "checkpoint-25", weights_only=False)
    assert store.newest().step == 25 and store.newest().kind == "step"
    a, b = read_checkpoint(path), read_checkpoint(tmp_path / "checkpoint-25")
    for x, y in ((a.weights, b.weights), (a.optimizer[0], b.optimizer[0]), (a.rng[0], b.rng[0])):
        assert x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    shutil.rmtree(packed)


def test_destinations_and_sources(plain, tmp_path):
    model, path, ids = plain
    run = tmp_path / "demo"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    with pytest.raises(CheckpointError, match="demo has no complete checkpoint yet"):
        export(run)
    shutil.copytree(path, run / "checkpoints" / "checkpoint-25")
    assert (
        export(run, precision="int8")
        == export(run / "checkpoints" / "checkpoint-25", precision="int8", replace=True)
        == run / "exports" / "checkpoint-25-int8"
    )
    state = read_checkpoint(path)
    for step, what, want in (
        (30, lambda s: write_final(run, s), "demo-fp16"),
        (
            40,
            lambda s: write_checkpoint(run / "checkpoints" / "checkpoint-40", s),
            "checkpoint-40-fp16",
        ),
    ):
        state.trainer["global_step"] = step
        what(state)
        assert (
            export(run, precision="fp16").name == want
            and json.loads((run / "exports" / want / "MANIFEST.json").read_text())["step"] == step
        )
    best = export(run, metrics=True, replace=True)
    assert (
        json.loads((best / "MANIFEST.json").read_text())["kind"] == "best"
        and json.loads((best / "trainer_state.json").read_text())["loss"] == 1.5
    )
    assert torch.equal(
        logits(load_model(export(model, tmp_path / "memory")), ids), logits(model, ids)
    )
    with pytest.raises(ValueError, match="has no default directory; pass one"):
        export(model)
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        export(tmp_path / "nothing")
    with pytest.raises(
        ValueError, match="precision='fp8' must be one of fp32, fp16, bf16, int8, int4"
    ):
        export(path, precision="fp8")
    with pytest.raises(ValueError, match="keeps trainer_state.json, and .* has none"):
        export(export(path, tmp_path / "w"), metrics=True)
    report = export_report(model, precisions=("fp32", "int4"))
    assert (
        "loss" not in report["precisions"]["int4"]
        and report["tokens"] == 0
        and "full" not in report["kinds"]
        and "int4" in str(report)
        and report.figure()
    )


def test_impossible_exports_are_refused(plain, tmp_path):
    model, path, _ = plain
    loud = GPT(model.config).load_weights(model.weights())
    with torch.no_grad():
        loud.model.norm.weight[0] = 1e6
    with pytest.raises(
        CheckpointError,
        match=r"model.norm.weight: it holds .* beyond 65,504, the maximum of fp16; use bf16",
    ):
        export(loud, tmp_path / "x", "fp16")
    export(loud, tmp_path / "bf16", "bf16")
    with torch.no_grad():
        loud.head[3, 3] = math.nan
    for p in BITS:
        with pytest.raises(CheckpointError, match="embed_tokens.weight: .* a NaN"):
            export(loud, tmp_path / "x", p)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bf16"]


# --- transformers ---------------------------------------------------------------------------------
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
def test_export_opens_in_transformers(saved, tmp_path, precision):
    transformers = pytest.importorskip("transformers")
    model, path, ids = saved
    out = export(path, tmp_path / "out", precision)
    dtype = dict(fp32=torch.float32, fp16=torch.float16, bf16=torch.bfloat16)[precision]
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(
        out, dtype="auto", output_loading_info=True
    )
    assert (
        not info["missing_keys"]
        and not info["unexpected_keys"]
        and not info["mismatched_keys"]
        and hf.dtype == dtype
    )
    assert (logits_hf(hf.float().eval(), ids) - logits(load_model(out), ids)).abs().max() < 1e-4
    assert len(transformers.AutoTokenizer.from_pretrained(out)) == load_tokenizer(out).vocab_size


@pytest.mark.parametrize(
    "options",
    [dict(precision="int8"), dict(precision="int4"), dict(compress=True)],
    ids=["int8", "int4", "zst"],
)
def test_transformers_refuses_our_quantized_files(plain, tmp_path, options):
    "It must not load them as numbers of a code, or with random weights."
    transformers = pytest.importorskip("transformers")
    out = export(plain[1], tmp_path / "out", **options)
    assert (
        json.loads((out / "config.json").read_text())["opens_with"]
        == "minigpt.checkpoint.load_model"
    )
    with pytest.raises((RuntimeError, OSError)):
        transformers.AutoModelForCausalLM.from_pretrained(out)


def logits_hf(hf, ids):
    with torch.no_grad():
        return hf(ids).logits


@pytest.mark.parametrize(
    "how", [dict(), dict(max_shard_size="60KB"), "bin"], ids=["whole", "sharded", "pickle"]
)
def test_checkpoints_of_transformers_open(saved, tmp_path, how):
    transformers = pytest.importorskip("transformers")
    model, path, ids = saved
    hf = transformers.AutoModelForCausalLM.from_pretrained(path)
    if how == "bin":
        hf.config.save_pretrained(tmp_path / "hf")
        torch.save(hf.state_dict(), tmp_path / "hf" / "pytorch_model.bin")
    else:
        hf.save_pretrained(tmp_path / "hf", **how)
    assert (tmp_path / "hf" / "model.safetensors.index.json").exists() == ("max_shard_size" in how)
    assert torch.equal(logits(load_model(tmp_path / "hf"), ids), logits(model, ids))
    out = export(tmp_path / "hf", tmp_path / "out", "bf16", tokenizer=path)
    assert (
        logits_hf(transformers.AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), ids)
        - logits(load_model(out), ids)
    ).abs().max() < 1e-4
    assert json.loads((out / "config.json").read_text())["eos_token_id"] == [
        *load_tokenizer(path).stop_ids
    ]


# --- MiniMind, nanoGPT and other state dicts ------------------------------------------------------
def minimind(w, ids, heads, eps, theta=1e6):
    """MiniMind's forward pass, written from its description.

    Rotary halves, RMSNorm per head from version 3 on, SwiGLU."""
    norm = lambda x, g: g * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    w = {k: v.float() for k, v in w.items()}
    x = w["model.embed_tokens.weight"][ids]
    (B, T, _), layers = x.shape, len([k for k in w if k.endswith("q_proj.weight")])
    D = w["model.layers.0.self_attn.q_proj.weight"].shape[0] // heads
    angle = torch.outer(
        torch.arange(T).float(), theta ** -(torch.arange(0, D, 2).float() / D)
    ).repeat(1, 2)

    def rotate(x):
        return (
            x * angle.cos() + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * angle.sin()
        )  # (B, heads, T, D)

    for i in range(layers):
        get = lambda n: w[f"model.layers.{i}.{n}.weight"]
        h = norm(x, get("input_layernorm"))
        q, k, v = (
            (h @ get(f"self_attn.{n}_proj").T).view(B, T, -1, D).transpose(1, 2) for n in "qkv"
        )
        if f"model.layers.{i}.self_attn.q_norm.weight" in w:
            q, k = norm(q, get("self_attn.q_norm")), norm(k, get("self_attn.k_norm"))
        q, k = rotate(q), rotate(k)
        k, v = (t.repeat_interleave(heads // t.shape[1], 1) for t in (k, v))
        a = (
            q @ k.transpose(-2, -1) / math.sqrt(D) + torch.full((T, T), -math.inf).triu(1)
        ).softmax(-1) @ v
        x = x + a.transpose(1, 2).reshape(B, T, -1) @ get("self_attn.o_proj").T
        h = norm(x, get("post_attention_layernorm"))
        x = (
            x
            + (F.silu(h @ get("mlp.gate_proj").T) * (h @ get("mlp.up_proj").T))
            @ get("mlp.down_proj").T
        )
    return norm(x, w["model.norm.weight"]) @ w["lm_head.weight"].T


def minimind_weights(version):
    "Weights as its trainer saves them: fp16, the tied layer twice."
    g = torch.Generator().manual_seed(version)
    r = lambda *s: (torch.randn(*s, generator=g) * 0.1).half()
    w = {"model.embed_tokens.weight": r(90, 64), "model.norm.weight": 1 + r(64)}
    for i in range(2):
        a, m = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        w |= {
            a + "q_proj.weight": r(64, 64),
            a + "k_proj.weight": r(32, 64),
            a + "v_proj.weight": r(32, 64),
            a + "o_proj.weight": r(64, 64),
        }
        if version == 3:
            w |= {a + "q_norm.weight": 1 + r(8), a + "k_norm.weight": 1 + r(8)}
        w |= {
            m + "gate_proj.weight": r(128, 64),
            m + "up_proj.weight": r(128, 64),
            m + "down_proj.weight": r(64, 128),
        }
        w |= {
            f"model.layers.{i}.{n}.weight": 1 + r(64)
            for n in ("input_layernorm", "post_attention_layernorm")
        }
    return w | {"lm_head.weight": w["model.embed_tokens.weight"]}


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "resume"])
def test_minimind_checkpoints_open(tmp_path, version, wrapped):
    w = minimind_weights(version)
    torch.save(
        dict(model={f"_orig_mod.{k}": v for k, v in w.items()}, epoch=1, step=7) if wrapped else w,
        tmp_path / "pretrain_64.pth",
    )
    out = export(tmp_path / "pretrain_64.pth", config="minimind")
    assert out.name == "pretrain_64-fp32"
    ids = torch.randint(90, (2, 60))
    assert (
        logits(load_model(out), ids) - minimind(w, ids, 8, 1e-6 if version == 3 else 1e-5)
    ).abs().max() < 1e-4
    with pytest.raises(ValueError, match="does not contain the number of heads.*config='minimind'"):
        export(tmp_path / "pretrain_64.pth", tmp_path / "x")
    assert export(
        tmp_path / "pretrain_64.pth", tmp_path / "int4", "int4", config=load_model(out).config
    )


def test_real_minimind_and_nanogpt_files_open(root, tmp_path):
    "Files that MiniMind and nanoGPT wrote."
    there = root.parent / "shared" / "checkpoints"
    if not there.exists():
        pytest.skip("needs the files of MiniMind and nanoGPT in ../shared/checkpoints")
    for name in ("pretrain_64", "pretrain_64_resume"):
        f = there / "minimind" / f"{name}.pth"
        w = torch.load(f, weights_only=True)
        w = w.get("model", w)
        ids = torch.randint(6400, (2, 200))
        assert (
            logits(load_model(export(f, tmp_path / name, config="minimind")), ids)
            - minimind(w, ids, 8, 1e-6)
        ).abs().max() < 1e-4
    with pytest.raises(
        CheckpointError,
        match="ckpt.pt is not converted: it is a GPT-2 model",
    ):
        export(there / "nanogpt" / "ckpt.pt", tmp_path / "x")
    with pytest.raises(CheckpointError, match="must be named as in Llama or Qwen3.* are 0.weight"):
        export(there / "checkpoint_dict.pt", tmp_path / "x")
    for d in ("hf_sharded", "hf_trainer/checkpoint-20", "hf_trainer_bin/checkpoint-10"):
        assert load_model(there / d).config.n_params == 510_272


def test_other_state_dicts_open(plain, tmp_path):
    model, _, ids = plain
    torch.save(
        dict(
            model_state_dict={f"module.{k}": v for k, v in model.state_dict().items()},
            epoch=3,
            loss=1.0,
        ),
        tmp_path / "mine.pt",
    )
    assert torch.equal(
        logits(load_model(export(tmp_path / "mine.pt", config=model.config)), ids),
        logits(model, ids),
    )
    for name, d, why in (
        ("gpt2", {"transformer.wpe.weight": torch.ones(2)}, "GPT-2"),
        (
            "moe",
            {"model.layers.0.mlp.experts.0.up_proj.weight": torch.ones(2)},
            "mixture of experts",
        ),
        ("list", [torch.ones(2)], "no weights by name"),
        ("numbers", dict(loss=1.0), "no weights by name"),
        (
            "half",
            {"model.embed_tokens.weight": torch.ones(2, 8)},
            "not have the shapes of a MiniMind",
        ),
    ):
        torch.save(d, tmp_path / f"{name}.pt")
        with pytest.raises(CheckpointError, match=f"{name}.pt is not converted: .*{why}"):
            export(tmp_path / f"{name}.pt", tmp_path / "x", config="minimind")


# --- truncated, changed and invalid files ---------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [dict(precision="fp16"), dict(precision="int4"), dict(compress=True)],
    ids=["fp16", "int4", "zst"],
)
def test_damage_is_named(plain, tmp_path, options):
    out = export(plain[1], tmp_path / "out", **options)
    for f in sorted(out.iterdir()):
        content = f.read_bytes()
        for broken in (
            content[:-1],
            content[: len(content) // 2],
            b"",
            bytes([content[0] ^ 1]) + content[1:],
            content[:-9] + bytes([content[-9] ^ 1]) + content[-8:],
            None,
        ):
            f.unlink() if broken is None else f.write_bytes(broken)
            if f.name == "MANIFEST.json" and broken in (None, content[:-1]):
                continue  # such a directory needs no manifest; a missing line end is not damage
            with pytest.raises((CheckpointError, ValueError), match=f.name.replace(".", r"\.")):
                load_model(out)
            with pytest.raises((CheckpointError, ValueError)):
                export(out, tmp_path / "x")
        f.write_bytes(content)
    assert problem(out) is None and sorted(p.name for p in tmp_path.iterdir()) == ["out"]


def test_damage_in_zstd_is_found_without_a_manifest(plain, tmp_path):
    "By the checksum of the frame."
    out = export(plain[1], tmp_path / "out", compress=True)
    (out / "MANIFEST.json").unlink()
    f = out / "model.safetensors.zst"
    whole = f.read_bytes()
    for at in (4, 20, len(whole) // 2, len(whole) - 200, len(whole) - 1):
        f.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(CheckpointError, match="model.safetensors.zst is not used"):
            load_model(out)
        f.write_bytes(whole[: at - 4])
        with pytest.raises(CheckpointError, match="model.safetensors.zst is not used"):
            load_model(out)


def invalid_headers(valid_file):
    "Yield safetensors files whose header is wrong in one way."
    n = int.from_bytes(valid_file[:8], "little")
    header, data = json.loads(valid_file[8 : 8 + n]), valid_file[8 + n :]

    def build(change, data=data):
        h = json.loads(json.dumps(header))
        change(h, h["model.norm.weight"])
        head = json.dumps(h).encode()
        return len(head).to_bytes(8, "little") + head + data

    yield "length", (1 << 62).to_bytes(8, "little") + valid_file[8:]
    yield "length+1", (n + 1).to_bytes(8, "little") + valid_file[8:]
    yield "no JSON", valid_file[:8] + b"x" * n + data
    yield "list", (2).to_bytes(8, "little") + b"[]" + data
    yield "shape", build(lambda h, t: t.update(shape=[1 << 40]))
    yield "negative", build(lambda h, t: t.update(shape=[-96, -1]))
    yield "text", build(lambda h, t: t.update(shape=["96"]))
    yield "offsets", build(lambda h, t: t.update(data_offsets=[0, 1 << 50]))
    yield (
        "overlap",
        build(lambda h, t: t.update(data_offsets=[0, t["data_offsets"][1] - t["data_offsets"][0]])),
    )
    yield (
        "shared",
        build(
            lambda h, t: h["model.layers.0.input_layernorm.weight"].update(
                data_offsets=h["model.layers.1.input_layernorm.weight"]["data_offsets"]
            )
        ),
    )
    yield "dtype", build(lambda h, t: t.update(dtype="F8_E4M3"))
    yield (
        "huge",
        build(
            lambda h, t: h.update(
                extra=dict(
                    dtype="F32", shape=[1 << 44], data_offsets=[len(data), len(data) + (1 << 46)]
                )
            )
        ),
    )
    yield "more", build(lambda h, t: None, data + b"more")
    yield (
        "zero",
        build(
            lambda h, t: h.update(
                extra=dict(dtype="F32", shape=[1 << 47, 1 << 47, 0], data_offsets=[len(data)] * 2)
            )
        ),
    )
    yield "less", build(lambda h, t: h.pop("model.norm.weight"))
    yield "other name", build(lambda h, t: h.update({"model.other": h.pop("model.norm.weight")}))


@pytest.mark.parametrize("kind", ["plain", "zst", "int4"])
def test_invalid_headers_are_refused_without_memory(plain, tmp_path, kind):
    out = export(plain[1], tmp_path / "out", "int4" if kind == "int4" else "fp32")
    (out / "MANIFEST.json").unlink()
    f = out / "model.safetensors"
    valid_file = f.read_bytes()
    if kind == "zst":
        f.unlink()
        f = out / "model.safetensors.zst"
    before = psutil.Process().memory_info().rss
    for name, lie in invalid_headers(valid_file):
        f.write_bytes(zstandard.ZstdCompressor().compress(lie) if kind == "zst" else lie)
        with pytest.raises(CheckpointError, match="is not used"):
            load_model(out)
            print(name)
    assert psutil.Process().memory_info().rss - before < 50e6
    f.write_bytes(zstandard.ZstdCompressor().compress(valid_file) if kind == "zst" else valid_file)
    load_model(out)


def test_invalid_quantization_is_refused(plain, tmp_path):
    out = export(plain[1], tmp_path / "out", "int4")
    (out / "MANIFEST.json").unlink()
    from minigpt.checkpoint.store import SafeTensors

    tensors, metadata = (
        {k: t.clone() for k, t in load_file(out / "model.safetensors").items()},
        SafeTensors(out / "model.safetensors").metadata,
    )
    facts, k = json.loads(metadata["minigpt"]), "model.embed_tokens.weight"
    for change in (
        lambda t, f: f["widths"].update({k: 1 << 62}),
        lambda t, f: f["widths"].update({k: -96}),
        lambda t, f: f["widths"].update({k: 95}),
        lambda t, f: f["widths"].update({k: None}),
        lambda t, f: f.update(widths=[k]),
        lambda t, f: t.pop(k),
        lambda t, f: t.pop(k + ".scale"),
        lambda t, f: t.update({k: t[k].flatten(1)}),
        lambda t, f: t.update({k: t[k].float()}),
        lambda t, f: t.update({k + ".scale": t[k + ".scale"][:, :1].contiguous()}),
        lambda t, f: f["widths"].pop(k),
        lambda t, f: f["widths"].update({"model.norm.weight": 96}),
    ):
        t, f = dict(tensors), json.loads(json.dumps(facts))
        change(t, f)
        write_safetensors(out / "model.safetensors", t, {"minigpt": json.dumps(f)})
        with pytest.raises(CheckpointError, match="is not used"):
            load_model(out)
    write_safetensors(out / "model.safetensors", tensors, {"minigpt": "[1"})
    with pytest.raises(CheckpointError, match="quantization metadata is invalid"):
        load_model(out)


def test_decompression_bombs_are_refused(plain, tmp_path):
    "Small files that would decompress to large ones."
    out = export(plain[1], tmp_path / "out", compress=True)
    (out / "MANIFEST.json").unlink()
    f = out / "model.safetensors.zst"
    before = psutil.Process().memory_info().rss
    head = json.dumps({"x": dict(dtype="U8", shape=[1 << 28], data_offsets=[0, 1 << 28])}).encode()
    z = zstandard.ZstdCompressor().compressobj()
    with open(f, "wb") as to:
        to.write(z.compress(len(head).to_bytes(8, "little") + head))
        for _ in range(16):
            to.write(z.compress(bytes(1 << 24)))
        to.write(z.flush())
    assert f.stat().st_size < 1 << 20
    with pytest.raises(CheckpointError, match="claims 268,435,456 bytes"):
        load_model(out)
    f.write_bytes(
        zstandard.ZstdCompressor().compress((99_999_999).to_bytes(8, "little") + b" " * 99_999_999)
    )
    with pytest.raises(CheckpointError, match="its header is not JSON"):
        load_model(out)
    f.unlink()
    with zipfile.ZipFile(out / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("archive/data.pkl", b"\x80\x02N.")
        z.writestr("archive/version", "3\n")
        z.writestr("archive/data/0", bytes(50_000_000))
    with pytest.raises(CheckpointError, match="the archive is compressed"):
        load_model(out)
    assert psutil.Process().memory_info().rss - before < 250e6


@pytest.mark.parametrize("zipped", [True, False])
def test_untrusted_pickles_are_not_executed(plain, tmp_path, zipped):
    class Touch:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    d = export(plain[1], tmp_path / "out")
    (d / "MANIFEST.json").unlink()
    (d / "model.safetensors").unlink()
    f = d / "pytorch_model.bin"
    torch.save({"model.norm.weight": Touch()}, f, _use_new_zipfile_serialization=zipped)
    with pytest.raises(
        CheckpointError, match="asks for posix.mkdir, which is not a tensor and could run code"
    ):
        load_model(d)
    with pytest.raises(CheckpointError, match="asks for posix.mkdir"):
        export(f, tmp_path / "x", config="minimind")
    torch.save(plain[0].weights(), f, _use_new_zipfile_serialization=zipped)
    assert torch.equal(logits(load_model(d), plain[2]), logits(plain[0], plain[2]))
    whole = f.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:100], b"", b"hello", whole[:-100]):
        f.write_bytes(broken)
        with pytest.raises(CheckpointError, match="pytorch_model.bin is not used"):
            load_model(d)
    torch.save([1, 2], f)
    with pytest.raises(CheckpointError, match="is not used"):
        load_model(d)
    torch.save({"model.embed_tokens.weight": torch.ones(1).expand(1 << 40)}, f)
    with pytest.raises(CheckpointError, match="is not used"):
        load_model(d)
    assert not (tmp_path / "ran").exists()


def test_index_cannot_leave_its_directory(plain, tmp_path):
    d = export(plain[1], tmp_path / "out")
    (d / "MANIFEST.json").unlink()
    (d / "model.safetensors").rename(d / "a.safetensors")
    index = d / "model.safetensors.index.json"
    index.write_text(json.dumps(dict(weight_map={"x": "a.safetensors"})))
    load_model(d)
    for bad in (
        "../out/a.safetensors",
        str(d / "a.safetensors"),
        "..",
        "a.bin",
        3,
        "a/../a.safetensors",
    ):
        index.write_text(json.dumps(dict(weight_map={"x": bad})))
        with pytest.raises(
            CheckpointError,
            match="is not used: it (names .* which is not a .* beside it|is damaged)",
        ):
            load_model(d)
    index.write_text(json.dumps(dict(weight_map={"x": "a.safetensors", "y": "b.safetensors"})))
    with pytest.raises(CheckpointError, match="names b.safetensors, which is missing"):
        load_model(d)
    shutil.copy(d / "a.safetensors", d / "b.safetensors")
    with pytest.raises(CheckpointError, match="two of its files hold a tensor of the same name"):
        load_model(d)
    for text in ("", "[]", "{}", '{"weight_map": 3}', "{"):
        index.write_text(text)
        with pytest.raises(CheckpointError, match="index.json is not used"):
            load_model(d)


def test_foreign_quantization_is_refused(plain, tmp_path):
    d = export(plain[1], tmp_path / "out")
    (d / "MANIFEST.json").unlink()
    c = json.loads((d / "config.json").read_text())
    c["quantization_config"] = dict(quant_method="gptq")
    (d / "config.json").write_text(json.dumps(c))
    with pytest.raises(CheckpointError, match=r"quantized by another program \(gptq\)"):
        load_model(d)


# --- faults while writing -------------------------------------------------------------------------
@pytest.mark.parametrize(
    "options",
    [
        dict(precision="int4"),
        dict(compress=True),
        dict(weights_only=False),
        dict(weights_only=False, compress=True),
    ],
    ids=["int4", "zst", "full", "full-zst"],
)
def test_failed_export_leaves_no_files(plain, tmp_path, options):
    "The disk is full or vanishes at each write in turn; the previous file stays."
    path, content = (
        plain[1],
        lambda: {
            p.name: p.read_bytes()
            for p in (tmp_path / "to" / "out").iterdir()
            if p.name != "MANIFEST.json"
        },
    )
    old = export(path, tmp_path / "old", "fp16")
    (tmp_path / "to").mkdir()
    shutil.copytree(old, tmp_path / "to" / "out")
    was = content()
    with Disk(tmp_path / "to").active() as disk:
        export(path, tmp_path / "to" / "out", replace=True, **options)
    new, refused = content(), 0
    for at in range(disk.count):
        shutil.rmtree(tmp_path / "to")
        (tmp_path / "to").mkdir()
        shutil.copytree(old, tmp_path / "to" / "out")
        with Disk(tmp_path / "to", errno.ENOSPC if at % 2 else errno.EIO, at).active() as faulty:
            try:
                export(path, tmp_path / "to" / "out", replace=True, **options)
            except CheckpointError as e:
                refused += 1
                assert "could not be written" in str(e)
        assert faulty.failed
        if not (tmp_path / "to" / "out").exists():
            assert "rename" in faulty.failed[0]
            sweep(tmp_path / "to")  # between two renames; the next start of a run deletes it too
        assert problem(tmp_path / "to" / "out") is None and content() in (was, new)
        if faulty.failed[0].startswith(("open", "write")):
            assert content() == was and [p.name for p in (tmp_path / "to").iterdir()] == ["out"], (
                faulty.failed
            )
    assert refused > disk.count / 2


CHILD = """
import sys, time, torch
from minigpt.checkpoint.exporter import export
torch.set_num_threads(1)
def progress(done, total):
    print(done, flush=True)
    time.sleep(.02)
export(sys.argv[1], sys.argv[2], sys.argv[3], progress=progress)
print('done', flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["kill", "ctrl-c"])
def test_killed_export_leaves_no_partial_files(plain, tmp_path, root, how):
    _, path, _ = plain
    p = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(path), str(tmp_path / "out"), "int4"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root), "OMP_WAIT_POLICY": "PASSIVE"},
    )
    for line in p.stdout:
        if line.strip() != "0":
            break
    p.send_signal(how)
    p.wait(20)
    p.stdout.close()
    left = [p.name for p in tmp_path.iterdir()]
    assert left == [] if how == signal.SIGINT else all(n.startswith(".out.tmp-") for n in left)
    assert problem(export(path, tmp_path / "out", "int4")) is None


# --- memory ---------------------------------------------------------------------------------------
MEMORY = r"""
import re, sys, torch
from minigpt.checkpoint.exporter import export
from minigpt.checkpoint.store import load_model
from pathlib import Path
torch.set_num_threads(1)
peak = lambda: int(re.search(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())[1])*1024
small, big, out = map(Path, sys.argv[1:4])
for o in (dict(precision='int4'), dict(precision='fp16'), dict(compress=True)):
    export(small, out/'warm', replace=True, progress=lambda *_: None, **o)
load_model(out/'warm')
base = peak()
for o in (dict(precision='int4'), dict(precision='bf16'), dict(compress=True)):
    export(big, out/o.get('precision', 'zst'), progress=lambda *_: None, **o)
exported = peak()-base
load_model(out/'zst')
print(exported, peak()-base)
"""


def test_export_memory_is_one_tensor(plain, tmp_path, root):
    if sys.platform != "linux":
        pytest.skip("memory is measured on Linux only")
    config = GPTConfig(
        vocab_size=4096, dim=512, n_layer=8, n_head=8, n_kv_head=2, ffn_dim=1024
    )  # 20M parameters; the largest tensor 8 MiB
    big = export(GPT(config), tmp_path / "big")
    env = {
        **os.environ,
        "PYTHONPATH": str(root),
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": "1",
    }
    r = subprocess.run(
        [sys.executable, "-c", MEMORY, str(plain[1]), str(big), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=root,
        env=env,
    )
    assert r.returncode == 0, r.stderr
    print(r.stdout)
    exported, loaded = map(int, r.stdout.split())
    assert exported < 3 * config.n_params, (
        f"{exported / 2**20:.0f} MiB above the start, for weights of"
        f" {4 * config.n_params / 2**20:.0f} MiB"
    )
    assert loaded < 6 * config.n_params


# --- ONNX -----------------------------------------------------------------------------------------
def test_onnx_logits_are_equal(plain, tmp_path):
    pytest.importorskip("onnxscript")
    onnx = pytest.importorskip("onnx")
    if "dynamic_shapes" not in inspect.signature(torch.onnx.export).parameters:
        pytest.skip("needs torch 2.5")
    model, path, ids = plain
    out = export_onnx(path, tmp_path / "onnx")
    onnx.checker.check_model(out / "model.onnx")
    runs = [
        lambda x: (
            __import__("onnx.reference")
            .reference.ReferenceEvaluator(str(out / "model.onnx"))
            .run(None, x)[0]
        )
    ]
    try:
        import onnxruntime
    except ImportError:
        pass
    else:
        runs.append(lambda x: onnxruntime.InferenceSession(out / "model.onnx").run(None, x)[0])
    for run in runs:
        for x in (ids, ids[:1, :1], ids[:3, :50]):
            assert (torch.from_numpy(run({"ids": x.numpy()})) - logits(model, x)).abs().max() < 1e-4
    assert load_tokenizer(out).encode("The keeper") == load_tokenizer(path).encode("The keeper")


def test_only_a_previous_export_is_replaced(plain, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    (run / "run.json").write_text("{}")
    shutil.copytree(plain[1], run / "checkpoints" / "checkpoint-25")
    write_final(run, read_checkpoint(plain[1]))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    (tmp_path / "data.txt").write_text("precious")
    full = export(plain[1], tmp_path / "full", weights_only=False)
    (
        tmp_path / "mine" / "model.onnx"
    ).touch()  # the first is a checkpoint to resume from; the other is not ours
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    for out in (
        run,
        run / "checkpoints",
        next((run / "checkpoints").iterdir()),
        tmp_path / "mine",
        tmp_path / "data.txt",
        tmp_path,
        full,
    ):
        with pytest.raises(FileExistsError, match="and is not replaced"):
            export(run, out, replace=True)
    for name in "m.gguf", "m.pth":
        with pytest.raises(ValueError, match="an export is a directory, such as .*m;"):
            export(run, tmp_path / name)
    assert before == {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    assert (
        export(run, tmp_path / "x")
        == export(run, tmp_path / "x", "int8", replace=True)
        == export(run, tmp_path / "x", compress=True, replace=True)
    )


def test_export_generates_on_the_command_line(tmp_path, monkeypatch, capsys):
    "`minigpt generate` on an export gives the same text as on the run."
    from minigpt import cli
    from minigpt.data.corpus import write_corpus
    from minigpt.model.gpt import GPTConfig
    from minigpt.train.trainer import fit

    shape = GPTConfig(vocab_size=300, dim=16, n_layer=1, n_head=2, n_kv_head=1, ffn_dim=32)
    fit(
        shape,
        write_corpus(tmp_path / "stories.jsonl", 50),
        output_dir=tmp_path / "run",
        tokenizer_vocab_size=300,
        max_seq_len=32,
        batch_size=2,
        max_steps=4,
        num_threads=1,
        progress=False,
        plot_loss=False,
    )

    def command(*words):
        monkeypatch.setattr("sys.argv", ["minigpt", *map(str, words)])
        try:
            cli.main()
        except SystemExit as e:
            assert not e.code, e.code
        return capsys.readouterr().out

    command("export", tmp_path / "run", tmp_path / "made")
    assert command(
        "generate", tmp_path / "made", "The", "--max-new-tokens", 12, "--seed", 1
    ) == command("generate", tmp_path / "run", "The", "--max-new-tokens", 12, "--seed", 1)


def test_onnx_with_an_old_torch_is_explained(plain, tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnx")
    monkeypatch.setattr(torch.onnx, "export", lambda model, args, f, dynamo=False: None)
    with pytest.raises(ImportError, match="needs torch 2.5 or newer"):
        export_onnx(plain[1], tmp_path / "onnx")
    assert not [*tmp_path.iterdir()]
