"""Adapters compared with PEFT and transformers: each opens what the other wrote.

A model from elsewhere is adapted, merged and written back.
"""

import json
import shutil

import pytest
import torch

from minigpt.checkpoint.exporter import export
from minigpt.checkpoint.store import CheckpointError, load_model
from minigpt.data.corpus import write_conversations
from minigpt.data.tokensets import data_files, sample_texts
from minigpt.model.adapters import LoRAConfig, lora, weights_hash
from minigpt.tokenizer.bpe import train_tokenizer
from minigpt.train.inputs import ResumeError
from minigpt.train.trainer import fit, resume

transformers = pytest.importorskip(
    "transformers", reason="pip install transformers, to compare with it"
)
SHORT = dict(
    max_seq_len=128,
    batch_size=2,
    max_steps=6,
    save_steps=3,
    validation_split=0.1,
    eval_sequences=4,
    num_threads=1,
    progress=False,
    plot_loss=False,
    tensorboard=False,
)


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    return write_conversations(tmp_path_factory.mktemp("talks") / "talks.jsonl", 200)


@pytest.fixture(scope="module", params=["Llama", "Qwen3"])
def hf_model(request, conversations, tmp_path_factory):
    "A model directory of transformers, with a tokenizer."
    tok, path = (
        train_tokenizer(sample_texts(data_files(conversations)), 400),
        tmp_path_factory.mktemp(request.param) / "base",
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{request.param}Config")(
        vocab_size=tok.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=request.param == "Qwen3",
        bos_token_id=None,
        eos_token_id=tok.eos_id,
        pad_token_id=None,
    )
    model = getattr(transformers, f"{request.param}ForCausalLM")(config)
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(
            p
        )  # at initialization the output depends on almost nothing
    model.save_pretrained(path)
    tok.save(path)
    return path


def ids(n=40):
    return torch.randint(10, 400, (2, n), generator=torch.Generator().manual_seed(3))


def logits(model, x=None):
    with torch.no_grad():
        out = model(ids() if x is None else x)
    return getattr(out, "logits", out)


def random_adapter(model):
    "Return a model with an adapter that changes its output."
    for k, t in model.weights().items():
        if "lora_B" in k:
            t.copy_(0.1 * torch.randn_like(t))
    return model


def test_hf_model_is_adapted_merged_and_exported(hf_model, conversations, tmp_path):
    "Loaded from disk, fine-tuned, interrupted, merged, and opened by transformers and by PEFT."
    before = weights_hash(load_model(hf_model))
    call = lambda **o: fit(
        lora(load_model(hf_model), r=4),
        conversations,
        output_dir=tmp_path / "run",
        **{**SHORT, **o},
    )
    call(max_steps=3)
    run = call()
    assert [a["step"] for a in run.facts["attempts"]] == [0, 3] and weights_hash(
        load_model(hf_model)
    ) == before
    assert (
        run.tokenizer.hash
        == json.loads((tmp_path / "run" / "run.json").read_text())["identity"]["tokenizer"]
    )  # the model's own tokenizer
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        export(tmp_path / "run", tmp_path / "merged")
    ).eval()
    torch.testing.assert_close(logits(merged), logits(run.model()), atol=1e-4, rtol=1e-4)
    assert (logits(run.model()) - logits(load_model(hf_model))).abs().max() > 1e-3
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "merged").encode(
        "A small cat. 小"
    ) == run.tokenizer.encode("A small cat. 小")
    with pytest.raises(ResumeError, match=r"lora.r = 4, and this call has lora.r = 8"):
        fit(lora(load_model(hf_model)), conversations, output_dir=tmp_path / "run", **SHORT)
    other = load_model(hf_model)
    other.model.norm.weight.data += 1
    with pytest.raises(
        ResumeError, match=r"lora.base = \w+, and this call has lora.base = \w+ .*another model"
    ):
        fit(lora(other, r=4), conversations, output_dir=tmp_path / "run", **SHORT)
    assert resume(tmp_path / "run", max_steps=8).step == 8  # the folder names the base model
    shutil.move(hf_model, tmp_path / "away")
    try:
        with pytest.raises(CheckpointError, match="which is not found; restore it"):
            resume(tmp_path / "run", max_steps=9)
        with pytest.raises(CheckpointError, match="which is not found. Copy that model"):
            run.model()
    finally:
        shutil.move(tmp_path / "away", hf_model)


def test_our_adapter_opens_in_peft(hf_model, conversations, tmp_path):
    peft = pytest.importorskip("peft", reason="pip install peft, to compare with it")
    model = random_adapter(
        lora(load_model(hf_model), r=3, alpha=5, targets=["q_proj", "down_proj"], root_scale=True)
    )
    fit(model, conversations, output_dir=tmp_path / "run", **SHORT)
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(hf_model),
        tmp_path / "run" / "checkpoints" / "checkpoint-6",
    ).eval()
    torch.testing.assert_close(logits(theirs), logits(model.eval()), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        dict(r=4, target_modules="all-linear"),
        dict(r=2, lora_alpha=7, use_rslora=True, target_modules=["q_proj", "v_proj"]),
    ],
    ids=["all", "some"],
)
def test_peft_adapter_opens_here(hf_model, options, tmp_path):
    peft = pytest.importorskip("peft", reason="pip install peft, to compare with it")
    theirs = peft.get_peft_model(
        transformers.AutoModelForCausalLM.from_pretrained(hf_model),
        peft.LoraConfig(task_type="CAUSAL_LM", **options),
    ).eval()
    for k, p in theirs.named_parameters():
        if "lora_B" in k:
            p.data = 0.1 * torch.randn_like(p)
    for name, kind in (("safe", True), ("bin", False)):
        if kind:
            theirs.save_pretrained(tmp_path / name)
        else:
            shutil.copytree(tmp_path / "safe", tmp_path / name)
            (tmp_path / name / "adapter_model.safetensors").unlink()
            torch.save(
                peft.get_peft_model_state_dict(theirs), tmp_path / name / "adapter_model.bin"
            )
        torch.testing.assert_close(
            logits(load_model(tmp_path / name)), logits(theirs), atol=1e-4, rtol=1e-4
        )
    facts = json.loads((tmp_path / "safe" / "adapter_config.json").read_text())
    for change, why in (
        (dict(use_dora=True), "use_dora True"),
        (dict(peft_type="IA3"), "'IA3'"),
        (dict(target_modules=["nothing"]), "'nothing' is no matrix"),
        (dict(r=9), "do not fit"),
        (dict(r=None), "r=None"),
    ):
        (tmp_path / "safe" / "adapter_config.json").write_text(json.dumps({**facts, **change}))
        with pytest.raises(CheckpointError, match=why):
            load_model(tmp_path / "safe")


# Options of PEFT → the name in the error; None: supported.
SETTINGS = [
    (dict(init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
    (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights 'pissa_niter_4'"),
    (dict(init_lora_weights="olora"), "init_lora_weights 'olora'"),
    (dict(init_lora_weights="gaussian"), None),
    (dict(init_lora_weights="orthogonal"), None),
    (dict(init_lora_weights=False), None),
    (dict(target_modules=r".*\.1\..*q_proj"), "a pattern"),
    (
        dict(
            target_modules=[
                "self_attn.q_proj",
                "model.layers.0.mlp.up_proj",
                "model.layers.1.mlp.up_proj",
            ]
        ),
        None,
    ),
    (dict(target_modules=["layers.0.self_attn.q_proj"]), "q_proj in 1 of 2 blocks"),
    (dict(rank_pattern={"q_proj": 2}), "rank_pattern"),
    (dict(alpha_pattern={"v_proj": 3}), "alpha_pattern"),
    (dict(layers_to_transform=0), "layers_to_transform 0"),
    (dict(layers_to_transform=[1], layers_pattern="layers"), "layers_pattern 'layers'"),
    (dict(exclude_modules=["k_proj"]), "exclude_modules"),
    (dict(bias="all"), "bias 'all'"),
    (dict(use_dora=True), "use_dora True"),
    (dict(modules_to_save=["lm_head"]), "modules_to_save"),
    (dict(lora_bias=True), "lora_bias True"),
    (dict(layer_replication=[[0, 2], [1, 2]]), "layer_replication"),
    (dict(trainable_token_indices=[3]), "trainable_token_indices"),
    (dict(target_modules=["q_proj", "lm_head"]), "'lm_head' is no matrix of a block"),
]


@pytest.mark.parametrize("hf_model", ["Llama"], indirect=True)
def test_peft_options_are_supported_or_refused(hf_model, tmp_path):
    "Adapters of PEFT: there is no third case."
    peft = pytest.importorskip("peft", reason="pip install peft, to compare with it")
    torch.manual_seed(1)
    for i, (setting, refused) in enumerate(SETTINGS):
        options = dict(r=4, target_modules=["q_proj", "k_proj", "v_proj", "up_proj"]) | setting
        theirs = peft.get_peft_model(
            transformers.AutoModelForCausalLM.from_pretrained(hf_model),
            peft.LoraConfig(task_type="CAUSAL_LM", **options),
        ).eval()
        for k, p in theirs.named_parameters():
            if "lora_B" in k:
                p.data = p.data + 0.1 * torch.randn_like(p)
        theirs.save_pretrained(tmp_path / str(i), save_embedding_layers=False)
        if refused:
            with pytest.raises(CheckpointError) as e:
                load_model(tmp_path / str(i))
            assert refused in str(e.value) and "peft" in str(e.value) or refused == "a pattern", (
                e.value
            )
        else:
            torch.testing.assert_close(
                logits(load_model(tmp_path / str(i))), logits(theirs), atol=1e-4, rtol=1e-4
            )


@pytest.mark.parametrize(
    "change, why",
    [
        (dict(not_yet_invented=3), "not_yet_invented 3"),
        (dict(not_yet_invented=0), "not_yet_invented 0"),
        (dict(use_rslora="false"), "use_rslora 'false'"),
        (dict(lora_alpha="16"), "lora_alpha '16'"),
        (dict(lora_alpha=None), "lora_alpha None"),
        (dict(lora_dropout=True), "lora_dropout True"),
        (dict(target_modules=None), "target_modules None"),
        (dict(target_modules="q_proj"), "a pattern"),
        (dict(target_modules=["mlp.q_proj"]), "'mlp.q_proj' is no matrix"),
        (dict(fan_in_fan_out=True), "fan_in_fan_out True"),
        (dict(target_parameters=["w"]), "target_parameters"),
        (dict(init_lora_weights="loftq"), "'loftq'"),
        (dict(init_lora_weights=None), None),
        (dict(layers_to_transform=[]), None),
    ],
)
def test_unsupported_settings_are_refused(change, why):
    "Settings of hand-written and of future files."
    config = LoRAConfig(r=3, targets=["q_proj"]).to_peft() | change
    if why is None:
        assert LoRAConfig.from_peft(config) == LoRAConfig(r=3, targets=["q_proj"])
    else:
        with pytest.raises(ValueError, match=why):
            LoRAConfig.from_peft(config)


def test_adapters_share_a_base(hf_model, tmp_path, conversations):
    "Two of them in memory share one base; each gives its own answers."
    base = load_model(hf_model)
    for seed in (1, 2):
        torch.manual_seed(seed)
        fit(
            random_adapter(lora(load_model(hf_model), r=2, seed=seed)),
            conversations,
            output_dir=tmp_path / f"run-{seed}",
            **SHORT,
        )
    one, two = (load_model(tmp_path / f"run-{seed}", base=base) for seed in (1, 2))
    assert one.head.data_ptr() == two.head.data_ptr() == base.head.data_ptr()
    assert (
        torch.equal(logits(one), logits(load_model(tmp_path / "run-1")))
        and not torch.allclose(logits(one), logits(two))
        and not torch.allclose(logits(one), logits(base))
    )
    with pytest.raises(CheckpointError, match="is an adapter of another model"):
        load_model(tmp_path / "run-1", base=one.merged())
    half = load_model(tmp_path / "run-1", dtype=torch.bfloat16)
    assert (
        half.head.dtype == torch.bfloat16
        and (logits(half) - logits(one)).abs().max() < 0.2 * logits(one).abs().max()
    )


def test_adapter_is_trained_further(hf_model, conversations, tmp_path):
    """In a run of its own, which starts with its weights.

    It uses no other weights if it has no checkpoint yet.
    """
    fit(
        random_adapter(lora(load_model(hf_model), r=2)),
        conversations,
        output_dir=tmp_path / "one",
        **SHORT,
    )
    fit(tmp_path / "one", conversations, output_dir=tmp_path / "two", **SHORT)
    want = load_model(tmp_path / "two").weights()
    for d in ("checkpoints", "best"):
        shutil.rmtree(tmp_path / "two" / d)
    for n in ("MANIFEST.json", "adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "two" / n).unlink()
    with pytest.raises(
        CheckpointError,
        match=("started from a model that this call does not pass: pass that model, .*one"),
    ):
        fit(lora(load_model(hf_model), r=2), conversations, output_dir=tmp_path / "two", **SHORT)
    resume(tmp_path / "two")
    got = load_model(tmp_path / "two").weights()
    assert all(torch.equal(want[k], got[k]) for k in want)


def test_damaged_adapter_is_not_used(hf_model, conversations, tmp_path):
    run = fit(lora(load_model(hf_model), r=2), conversations, output_dir=tmp_path / "run", **SHORT)
    newest = tmp_path / "run" / "checkpoints" / "checkpoint-6" / "adapter_model.safetensors"
    data = bytearray(newest.read_bytes())
    data[-3] ^= 1
    newest.write_bytes(data)
    with pytest.raises(CheckpointError, match="adapter_model.safetensors is damaged"):
        load_model(newest.parent)
    fit(
        lora(load_model(hf_model), r=2),
        conversations,
        output_dir=tmp_path / "run",
        **{**SHORT, "max_steps": 7},
    )
    assert run.facts["attempts"][-1]["step"] == 3  # the previous checkpoint


def test_targets_missing_from_the_file(hf_model):
    "Names that the adapter lists and its file lacks."
    model = lora(load_model(hf_model), r=2, targets="q_proj")
    assert {k.split(".")[-3] for k in model.weights()} == {"q_proj"}
    with pytest.raises(ValueError, match="k_proj.lora_A.weight is missing in the weights"):
        lora(load_model(hf_model), r=2, targets=["q_proj", "k_proj"]).load_weights(model.weights())
    assert LoRAConfig.from_peft(model.lora.to_peft()) == model.lora
