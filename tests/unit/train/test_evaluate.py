"Loss of a model on data: of our own runs, and of models and tokenizers of other programs."

import json
import math

import pytest
import torch

from minigpt.data.corpus import story
from minigpt.model.gpt import GPT, GPTConfig
from minigpt.tokenizer.bpe import Tokenizer, train_tokenizer
from minigpt.train.evaluation import evaluate_on, token_bytes

SHAPE = dict(dim=32, n_layer=2, n_head=2, n_kv_head=1, ffn_dim=64, max_len=128)


@pytest.fixture(scope="module")
def texts():
    return [story(i) for i in range(200)]


@pytest.fixture(scope="module")
def file(texts, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "texts.jsonl"
    path.write_text("".join(json.dumps(dict(text=t)) + "\n" for t in texts), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(file, tmp_path_factory):
    from minigpt.train.trainer import fit

    tok = train_tokenizer([story(i) for i in range(200)], 400)
    return fit(
        GPTConfig(vocab_size=tok.vocab_size, **SHAPE),
        file,
        tokenizer=tok,
        output_dir=tmp_path_factory.mktemp("runs") / "r",
        max_steps=4,
        save_steps=2,
        eval_steps=4,
        eval_sequences=0,
        batch_size=4,
        max_seq_len=64,
        num_threads=1,
        progress=False,
        plot_loss=False,
        validation_split=0.2,
    )


def test_run_folder_and_checkpoint_give_one_loss(run, file):
    got = [
        evaluate_on(m, file, seq_len=64, progress=False)
        for m in (run, run.path, run.path / "checkpoints" / "checkpoint-4")
    ]
    assert got[0] == got[1] == got[2]
    assert (
        evaluate_on(run.path / "checkpoints" / "checkpoint-2", file, seq_len=64, progress=False)[
            "loss"
        ]
        > got[0]["loss"]
    )


def test_held_out_loss_equals_the_reported_one(run):
    got = evaluate_on(run, run.path / "data" / "valid", seq_len=64, progress=False)
    assert math.isclose(got["loss"], run.history[-1]["eval_loss"], rel_tol=1e-5)


def test_loss_of_an_export(run, file):
    from minigpt.checkpoint.exporter import export

    whole = evaluate_on(run, file, progress=False)
    for precision, near in ("bf16", 0.01), ("int8", 0.02):
        made = export(run.path, run.path.parent / precision, precision)
        assert abs(evaluate_on(made, file, progress=False)["loss"] - whole["loss"]) < near


def test_loss_equals_transformers(texts, tmp_path):
    transformers = pytest.importorskip("transformers")
    tok = train_tokenizer(texts, 400)
    torch.manual_seed(0)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=tok.vocab_size,
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=64,
            max_position_embeddings=128,
            tie_word_embeddings=True,
        )
    )
    theirs.save_pretrained(tmp_path / "llama")
    tok.save(tmp_path / "llama")
    text = texts[0][:100]
    (tmp_path / "one.txt").write_text(text, encoding="utf-8")
    got = evaluate_on(tmp_path / "llama", tmp_path / "one.txt", progress=False)
    ids = torch.tensor([[*tok.encode(text), tok.eos_id]])
    assert got["tokens"] == ids.shape[1] - 1
    assert math.isclose(got["loss"], theirs(input_ids=ids, labels=ids).loss.item(), rel_tol=1e-4)
    assert got["bytes"] == len(text.encode()) - token_bytes(tok)[ids[0, 0]]


def test_bytes_per_token_of_llama_tokenizers():
    from tokenizers import Tokenizer as HF, decoders, models, normalizers

    vocab = {
        t: i
        for i, t in enumerate(
            ["</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a", "旧"]
        )
    }
    hf = HF(models.BPE(vocab, [("▁", "a")], byte_fallback=True, unk_token="</s>"))
    hf.normalizer = normalizers.Replace(" ", "▁")
    hf.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    hf.add_special_tokens(["</s>"])
    tok = Tokenizer(hf, dict(eos_token="</s>"))
    for text in "b a b", "旧 é 🎈a":
        assert token_bytes(tok)[tok.encode(text)].sum() == len(text.encode()), text
    assert token_bytes(tok)[tok.eos_id] == 0


def test_no_bits_per_byte_without_token_lengths(run, file):
    from tokenizers import Tokenizer as HF, models, pre_tokenizers

    hf = HF(models.WordLevel({"</s>": 0, "the": 1, "a": 2}, unk_token="</s>"))
    hf.pre_tokenizer = pre_tokenizers.Whitespace()
    hf.add_special_tokens(["</s>"])
    assert token_bytes(Tokenizer(hf, dict(eos_token="</s>"))) is None
    assert (
        evaluate_on(
            run.model(), file, tokenizer=Tokenizer(hf, dict(eos_token="</s>")), progress=False
        )["bits_per_byte"]
        is None
    )


def test_training_mode_is_restored(file):
    tok = train_tokenizer(["."])
    model = GPT(GPTConfig(vocab_size=tok.vocab_size, **SHAPE)).train()
    first = evaluate_on(model, file, tokenizer=tok, max_sequences=3, device="cpu", progress=False)
    assert model.training and first["tokens"] <= 3 * 128


def test_only_answers_within_the_window_count(run, tmp_path):
    path = tmp_path / "long.jsonl"
    path.write_text(
        json.dumps(
            dict(
                conversations=[
                    dict(role="user", content="why? " * 500),
                    dict(role="assistant", content="so"),
                ]
            )
        ),
        encoding="utf-8",
    )
    with pytest.raises(ValueError, match="nothing to predict within 128 tokens"):
        evaluate_on(run, path, progress=False)
    with pytest.raises(FileNotFoundError):
        evaluate_on(run, tmp_path / "none.jsonl", progress=False)
    with pytest.raises(ValueError):
        evaluate_on(run, "no_such_set", progress=False)


def test_loss_of_an_adapter_with_its_base(run, file, tmp_path):
    from minigpt.checkpoint.store import load_model
    from minigpt.model.adapters import lora
    from minigpt.train.trainer import fit

    tuned = fit(
        lora(load_model(run.path), r=2),
        file,
        tokenizer=run.tokenizer,
        output_dir=tmp_path / "r",
        max_steps=3,
        save_steps=3,
        evaluation_strategy="no",
        batch_size=4,
        max_seq_len=64,
        learning_rate=1e-2,
        num_threads=1,
        progress=False,
        plot_loss=False,
    )
    got = evaluate_on(tuned.path / "checkpoints" / "checkpoint-3", file, progress=False)
    assert math.isclose(
        got["loss"],
        evaluate_on(tuned.model().merged(), file, tokenizer=run.tokenizer, progress=False)["loss"],
        rel_tol=1e-5,
    )
    assert got["loss"] < evaluate_on(run, file, progress=False)["loss"]
