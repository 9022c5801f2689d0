"""A config that ties the output layer to the embedding, and a file with an output layer of its own.

The results must equal those of transformers.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from minigpt.checkpoint.exporter import export
from minigpt.checkpoint.store import CheckpointError, load_model
from minigpt.model.adapters import lora
from minigpt.model.gpt import GPT, from_hf

transformers = pytest.importorskip("transformers")
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
IDS = torch.randint(64, (2, 9), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def tensors(tmp_path_factory):
    "Weights of a small tied model, with a separate output layer."
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    path = tmp_path_factory.mktemp("tied")
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    weights = load_file(path / "model.safetensors")
    return (path / "config.json").read_text(), weights | {
        EMBEDDING: 10 * weights[EMBEDDING],
        HEAD: torch.randn(64, 16),
    }


def write_model(path, tensors, how, **changes):
    "Write a model directory with these tensors: one file, several files, or a torch.save file."
    config, weights = tensors
    path.mkdir()
    (path / "config.json").write_text(config)
    weights = weights | changes
    suffix, first, write = (
        (".bin", "pytorch_model", torch.save)
        if how == "bin"
        else (".safetensors", "model", lambda d, f: save_file(d, f, {"format": "pt"}))
    )
    if how != "sharded":
        write({k: t.clone() for k, t in weights.items()}, path / f"{first}{suffix}")
    else:
        parts = {
            f"model-0000{i + 1}-of-00003.safetensors": names
            for i, names in enumerate(
                ([EMBEDDING], [k for k in weights if k not in (EMBEDDING, HEAD)], [HEAD])
            )
        }
        for f, names in parts.items():
            write({k: weights[k].clone() for k in names}, path / f)
        (path / "model.safetensors.index.json").write_text(
            json.dumps(
                dict(metadata={}, weight_map={k: f for f, names in parts.items() for k in names})
            )
        )
    return path


def logits(model):
    with torch.no_grad():
        out = model.eval()(IDS)
    return getattr(out, "logits", out)


@pytest.mark.parametrize("how", ["one", "sharded", "bin"])
def test_separate_output_layer_is_used(tensors, tmp_path, how):
    "As in transformers; also in an export and under an adapter."
    path = write_model(tmp_path / "m", tensors, how)
    ours, theirs = load_model(path), transformers.AutoModelForCausalLM.from_pretrained(path)
    assert not torch.equal(
        theirs.lm_head.weight, theirs.model.embed_tokens.weight
    )  # otherwise the test would show nothing
    assert not ours.config.tied
    torch.testing.assert_close(logits(ours), logits(theirs), atol=1e-4, rtol=1e-4)
    again = export(path, tmp_path / "out")
    assert json.loads((again / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(logits(load_model(again)), logits(ours)) and torch.equal(
        logits(lora(ours, r=1)), logits(ours)
    )


@pytest.mark.parametrize("how", ["one", "sharded", "bin"])
def test_equal_output_layer_is_tied(tensors, tmp_path, how):
    path = write_model(tmp_path / "m", tensors, how, **{HEAD: tensors[1][EMBEDDING]})
    ours = load_model(path)
    assert ours.config.tied and HEAD not in ours.weights()
    torch.testing.assert_close(
        logits(ours),
        logits(transformers.AutoModelForCausalLM.from_pretrained(path)),
        atol=1e-4,
        rtol=1e-4,
    )


def test_output_layer_of_another_shape_is_refused(tensors, tmp_path):
    with pytest.raises(CheckpointError, match=r"lm_head.weight is \(60, 16\) in the weights"):
        load_model(write_model(tmp_path / "m", tensors, "one", **{HEAD: torch.zeros(60, 16)}))


def test_weights_in_memory_of_a_tied_model(tensors, tmp_path):
    "A tied model ignores them, and an export of a `.pth` file uses them."
    config, weights = tensors
    shape = from_hf(json.loads(config))
    with pytest.raises(ValueError, match="separate output layer"):
        GPT(shape).load_weights(weights)
    GPT(shape).load_weights(weights | {HEAD: weights[EMBEDDING]})
    torch.save(weights, tmp_path / "w.pth")
    assert not load_model(export(tmp_path / "w.pth", tmp_path / "out", config=shape)).config.tied
