"DPO compared with TRL, and how `fit` trains on preferences."

import math

import numpy as np
import pytest
import torch

from minigpt.checkpoint.store import CheckpointError, load_model
from minigpt.config.options import TrainConfig
from minigpt.data.corpus import write_conversations, write_preferences
from minigpt.data.tokensets import build_tokenset, data_files, sample_texts
from minigpt.model.adapters import lora
from minigpt.model.gpt import GPT, GPTConfig
from minigpt.tokenizer.bpe import train_tokenizer
from minigpt.train.preference import Preference, add_reference
from minigpt.train.trainer import fit, resume

SHORT = dict(
    max_seq_len=128,
    batch_size=2,
    max_steps=8,
    save_steps=4,
    validation_split=0.1,
    eval_steps=4,
    eval_sequences=4,
    logging_steps=1,
    num_threads=1,
    progress=False,
    plot_loss=False,
    tensorboard=False,
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    return write_preferences(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 120)


@pytest.fixture(scope="module")
def tok(pairs):
    return train_tokenizer(sample_texts(data_files(pairs)), 400)


def gpt(tok, seed=0):
    torch.manual_seed(seed)
    model = GPT(
        GPTConfig(
            vocab_size=tok.vocab_size,
            dim=32,
            n_layer=2,
            n_head=4,
            n_kv_head=2,
            ffn_dim=64,
            max_len=256,
        )
    )
    for p in model.parameters():
        p.data += 0.05 * torch.randn_like(p)
    return model


@pytest.mark.parametrize("kind", ["sigmoid", "sigmoid_norm"])
def test_loss_equals_trl(kind, pairs, tok, tmp_path):
    "On the same pairs, from the same two models; rows are packed here, one pair per row in TRL."
    trl, transformers, datasets = (
        pytest.importorskip(m, reason=f"pip install {m}, to compare with TRL")
        for m in ("trl", "transformers", "datasets")
    )
    from minigpt.checkpoint.exporter import export

    data, _ = build_tokenset(pairs, tok, tmp_path / "data", 0.0, progress=False)
    start, now = gpt(tok), gpt(tok, 1)
    add_reference(data, 256, "start", start, progress=False)
    index = np.arange(4)
    batch = {k: torch.from_numpy(v) for k, v in data.windows(index, 256).items()}
    ours = Preference(TrainConfig(dpo_loss=kind, dpo_beta=0.3))
    loss, facts = ours(now, batch, ours.count(batch))
    loss.backward()

    rows = [2 * int(p) + side for side in (0, 1) for i in index for p in data.rows_of(int(i), 256)]
    whole = [data.tokens[data.starts[r] : data.starts[r + 1]].astype(np.int64) for r in rows]
    masks = [data.mask[data.starts[r] : data.starts[r + 1]] for r in rows]
    n = max(map(len, whole))
    pad = lambda arrays, value: torch.tensor(
        np.stack(
            [np.pad(a.astype(np.int64), (0, n - len(a)), constant_values=value) for a in arrays]
        )
    )
    theirs, ref = (
        transformers.AutoModelForCausalLM.from_pretrained(export(m, tmp_path / name, tokenizer=tok))
        for name, m in (("now", now), ("start", start))
    )
    hf = transformers.AutoTokenizer.from_pretrained(tmp_path / "now")
    hf.pad_token_id = tok.eos_id
    some = datasets.Dataset.from_list([dict(prompt="a", chosen="b", rejected="c")])
    trainer = trl.DPOTrainer(
        theirs,
        ref,
        args=trl.DPOConfig(
            output_dir=str(tmp_path / "trl"),
            beta=0.3,
            loss_type=[kind],
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
        ),
        train_dataset=some,
        processing_class=hf,
    )
    want = trainer._compute_loss(
        theirs,
        dict(
            input_ids=pad(whole, tok.eos_id),
            attention_mask=pad([np.ones(len(w)) for w in whole], 0),
            completion_mask=pad(masks, 0),
        ),
        False,
    )
    assert abs(loss.item() - want.item()) < 1e-5
    want.backward()
    mine = dict(now.named_parameters())
    for k, p in theirs.named_parameters():
        torch.testing.assert_close(mine[k].grad, p.grad, atol=1e-5, rtol=1e-3, msg=k)
    assert (
        abs(facts["rewards/margins"] - (facts["rewards/chosen"] - facts["rewards/rejected"])) < 1e-5
    )


def test_loss_starts_at_ln_2_and_margins_grow(pairs, tok, tmp_path):
    run = fit(
        gpt(tok),
        pairs,
        tokenizer=tok,
        output_dir=tmp_path / "run",
        **{**SHORT, "max_steps": 60, "eval_steps": 20, "learning_rate": 3e-3},
    )
    rows = [r for r in run.history if "loss" in r]
    assert abs(rows[0]["loss"] - math.log(2)) < 1e-6 and rows[0]["rewards/margins"] == 0
    assert (
        np.mean([r["rewards/accuracies"] for r in rows[-10:]]) > 0.7
        and rows[-1]["rewards/margins"] > 0.1
    )
    assert {"eval_loss", "eval_rewards/accuracies", "eval_rewards/margins"} <= {
        k for r in run.history for k in r
    }


def test_reference_of_another_model_or_precision_is_separate(pairs, tok, tmp_path):
    "The file belongs to a model: another model or another precision gets its own."
    data, _ = build_tokenset(pairs, tok, tmp_path / "data", 0.0, progress=False)
    for _name, out, more in (
        ("a", "one", {}),
        ("b", "two", dict(seed=3)),
        ("c", "three", dict(precision="bf16")),
    ):
        fit(
            gpt(tok, seed=more.pop("seed", 0)),
            data,
            tokenizer=tok,
            output_dir=tmp_path / out,
            **{**SHORT, **more, "max_steps": 2},
        )
    assert (
        len([*data.path.glob("reference-128-fp32-*.bin")]) == 2
        and len([*data.path.glob("reference-128-bf16-*.bin")]) == 1
    )


def test_adapter_trains_on_preferences(pairs, tok, tmp_path):
    "The reference is the base model; only the adapter is trained."
    run = fit(
        lora(gpt(tok), r=4),
        pairs,
        tokenizer=tok,
        output_dir=tmp_path / "run",
        **{**SHORT, "max_steps": 40, "learning_rate": 1e-2},
    )
    assert (
        run.history[0]["rewards/margins"] == 0
        and [r for r in run.history if "loss" in r][-1]["rewards/margins"] > 0.05
    )


def test_lost_reference_is_recomputed(pairs, tok, tmp_path):
    "It is computed again from the model that the run started with, and from no other."
    from minigpt.checkpoint.exporter import export

    export(gpt(tok), tmp_path / "base", tokenizer=tok)
    run = fit(tmp_path / "base", pairs, output_dir=tmp_path / "run", **SHORT)
    lose = lambda: [f.unlink() for f in (tmp_path / "run" / "data").glob("*/reference-*.bin")]
    lose()
    with pytest.raises(
        CheckpointError,
        match=(
            "has lost the reference log-probabilities, and the model of this call .*Pass"
            " that model, .*base"
        ),
    ):
        fit(run.model(), pairs, output_dir=tmp_path / "run", **{**SHORT, "max_steps": 10})
    assert resume(tmp_path / "run", max_steps=10).step == 10 and lose()


def test_resume_without_a_checkpoint_keeps_the_weights(tok, tmp_path):
    "A run from a model that was killed before its first save must not start with random weights."
    from minigpt.checkpoint.exporter import export

    talks = write_conversations(tmp_path / "talks.jsonl", 100)
    export(gpt(tok), tmp_path / "base", tokenizer=tok)
    fit(load_model(tmp_path / "base"), talks, tokenizer=tok, output_dir=tmp_path / "run", **SHORT)
    want = load_model(tmp_path / "run").weights()
    for d in ("checkpoints", "best"):
        for p in (tmp_path / "run" / d).iterdir():
            p.rename(tmp_path / f"{d}-{p.name}")
    for n in ("MANIFEST.json", "config.json", "model.safetensors"):
        (tmp_path / "run" / n).unlink()
    with pytest.raises(
        CheckpointError,
        match=("started from a model that this call does not pass: pass that model, .*base"),
    ):
        fit(gpt(tok).config, talks, tokenizer=tok, output_dir=tmp_path / "run", **SHORT)
    resume(tmp_path / "run")
    got = load_model(tmp_path / "run").weights()
    assert all(torch.equal(want[k], got[k]) for k in want)


def test_model_directory_by_name(tok, tmp_path):
    "Its tokenizer is used with it; a folder without a model is refused."
    from minigpt.checkpoint.exporter import export

    talks = write_conversations(tmp_path / "talks.jsonl", 100)
    export(gpt(tok), tmp_path / "base", tokenizer=tok)
    run = fit(
        str(tmp_path / "base"), talks, output_dir=tmp_path / "run", **{**SHORT, "max_steps": 2}
    )
    assert run.tokenizer.hash == tok.hash and run.facts["began"]["path"] == str(tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="there is no config.json in it"):
        fit(str(tmp_path), talks, output_dir=tmp_path / "other", **SHORT)
    with pytest.raises(ValueError, match="there is no preset 'smal'"):
        fit("smal", talks, output_dir=tmp_path / "other", **SHORT)
