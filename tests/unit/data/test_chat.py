"""Conversations: row formats, loss masks, packing and resuming.

Packing changes no loss, and fine-tuning resumes bit for bit.
"""

import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from minigpt.chat import Chat
from minigpt.data.readers import Row, parse_block, parse_row, read_blocks
from minigpt.data.tokensets import build_tokenset, pack
from minigpt.model.gpt import GPT
from minigpt.tokenizer.bpe import IM_END, Tokenizer, train_tokenizer
from minigpt.train.trainer import fit
from tests.harness import kill_child as child
from tests.recovery.test_faults import AtStep, Losses, PowerCut, power_cut

SHARED = child.ROOT.parent / "shared" / "data"
REAL = ["sft_zh", "sft_en", "identity", "tool_calling", "tool_calling_minimind_str", "reasoning"]


@pytest.fixture(scope="module")
def tok():
    return train_tokenizer(
        ["Questions and answers. 问题和答案。 <think> 1 + 1 = 2 </think>"] * 9, vocab_size=300
    )


def conversation(rng):
    "A conversation of one to four questions."
    out = [dict(role="system", content="Be brief.")] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 4)):
        n = rng.randint(1, 40)
        out += [
            dict(role="user", content=f"{n} 加一?" if n % 2 else f"What follows {n}?"),
            dict(role="assistant", content=f"{n + 1}" + "!" * rng.randint(0, 9)),
        ]
    return dict(conversations=out)


def write(path, n=200, seed=0):
    rng = random.Random(seed)
    path.write_text(
        "".join(json.dumps(conversation(rng), ensure_ascii=False) + "\n" for _ in range(n)),
        encoding="utf-8",
    )
    return path


@pytest.mark.parametrize("name", REAL)
def test_real_rows_are_accepted(name, tok):
    """At least 99.5% are accepted; the ids are those of the rendered text.

    The assistant's text has loss.
    """
    if not (f := SHARED / f"{name}.jsonl").exists():
        pytest.skip(
            "needs real rows, which are not in the repository:"
            f" put {name}.jsonl into ../shared/data"
        )
    rows = [r for b in read_blocks(f) for r in parse_block(b)]
    bad = [r for r in rows if r.reason]
    assert len(bad) <= 0.005 * len(rows), bad[:3]
    for r in random.Random(0).sample(
        [r for r in rows if not r.reason], min(200, len(rows) - len(bad))
    ):
        ids, learn = tok.encode_chat(r.messages)
        text = tok.render(r.messages)
        assert ids.tolist() == tok.encode(text, special=True)
        answers = tok.decode(ids[learn]).split(IM_END)
        assert answers.pop() == "" and len(answers) == sum(
            m["role"] == "assistant" for m in r.messages
        )
        for m, s in zip([m for m in r.messages if m["role"] == "assistant"], answers):
            assert m["content"].lstrip() in s or not m["content"].strip(), (m, s)


@pytest.mark.parametrize("name", ["open_thinking", "enable_thinking"])
def test_template_with_a_thinking_switch(tok, name):
    "As MiniMind's and Qwen3's templates do."
    other = Tokenizer(
        tok.hf,
        tok.config
        | dict(
            chat_template=tok.config["chat_template"]
            + (
                f"{{%- if add_generation_prompt and {name} is defined %}}"
                f"{{{{ '<think>' if {name} else '<think></think>' }}}}{{%- endif %}}"
            )  # noqa: UP032
        ),
    )
    prompt = lambda *thinking: (
        other.decode(other.encode_prompt([dict(role="user", content="1 + 1 = ?")], None, *thinking))
        .rpartition("assistant")[2]
        .strip()
    )
    assert [prompt(), prompt(True), prompt(False)] == ["", "<think>", "<think></think>"]
    chat = Chat(GPT(child.shape(other.vocab_size)), other, thinking=True)
    assert other.decode(chat._prompt([dict(role="user", content="1 + 1 = ?")])).endswith("<think>")


@given(
    st.one_of(
        st.binary(max_size=80),
        st.recursive(
            st.none()
            | st.booleans()
            | st.floats()
            | st.text(max_size=9)
            | st.sampled_from(["user", "assistant", "<|im_end|>", "[{]", '{"name": 1}']),
            lambda x: (
                st.lists(x, max_size=4)
                | st.dictionaries(
                    st.sampled_from(
                        [
                            "text",
                            "conversations",
                            "messages",
                            "role",
                            "from",
                            "content",
                            "value",
                            "tool_calls",
                            "tools",
                            "reasoning_content",
                            "chosen",
                            "rejected",
                            "prompt",
                        ]
                    ),
                    x,
                    max_size=4,
                )
            ),
            max_leaves=12,
        ).map(lambda o: json.dumps(o).encode()),
    )
)
@settings(max_examples=400)
def test_every_line_gives_a_row_or_a_reason(tok, line):
    for row in parse_row(line, 1):
        assert isinstance(row, Row)
        for side in (row.messages, row.rejected):
            if row.reason or side is None:
                continue
            ids, learn = tok.encode_chat(side)
            assert len(ids) == len(learn) and learn.any()
            assert tok.decode(ids) == tok.render(side), (
                "the fast rendering differs from the template"
            )
            if not any(m["content"][:1].isspace() for m in side):
                assert ids.tolist() == tok.encode(tok.render(side), special=True)


@given(st.lists(st.integers(1, 99), max_size=60), st.integers(5, 70))
def test_packing_keeps_every_row(lengths, size):
    rows, starts = pack(np.array(lengths, np.int64), size)
    assert sorted(rows.tolist()) == list(range(len(lengths)))
    packs = [rows[a:b] for a, b in zip(starts, starts[1:])]
    assert all(len(p) and sum(min(lengths[r], size) for r in p) <= size for p in packs)


def test_packed_and_unpacked_loss_are_equal(tok, tmp_path):
    data, _ = build_tokenset(write(tmp_path / "talks.jsonl"), tok, tmp_path / "set", 0.0)
    torch.manual_seed(0)
    model = GPT(child.shape(tok.vocab_size)).eval()
    size = 200
    fullest = np.array(
        sorted(range(data.n_windows(size)), key=lambda i: -len(data.rows_of(i, size)))[:4]
    )
    windows = data.windows(fullest, size)
    for w, packed in enumerate(data.rows_of(i, size) for i in fullest):
        assert len(packed) > 1
        one = {k: torch.from_numpy(v[w : w + 1]) for k, v in windows.items()}
        together = model.loss(**one, n_targets=1)
        alone = sum(
            model.loss(*(torch.from_numpy(x)[None] for x in data.row(int(r), size)), n_targets=1)
            for r in packed
        )
        assert abs(together - alone) < 1e-5 * abs(alone)


def test_long_row_is_truncated_after_an_answer(tok, tmp_path):
    rows = [
        dict(
            conversations=[
                m
                for i in range(9)
                for m in (
                    dict(role="user", content=f"question {i}"),
                    dict(role="assistant", content=f"answer {i}"),
                )
            ]
        ),
        dict(
            conversations=[
                dict(role="user", content="x" * 500),
                dict(role="assistant", content="y"),
            ]
        ),
    ]
    (tmp_path / "long.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    data, _ = build_tokenset(tmp_path / "long.jsonl", tok, tmp_path / "set", 0.0)
    ids, labels = data.row(0, 100)
    assert (
        len(ids) <= 100
        and tok.decode([labels[-1]]) == IM_END
        and data.count_too_long(100) == (2, 1)
        and data.packs(100)[0].tolist() == [0]
    )
    ids, labels = data.row(1, 100)
    assert len(ids) == 100 and (labels == -100).all()


def test_mixing_texts_and_conversations_is_refused(tok, tmp_path):
    f = write(tmp_path / "mixed.jsonl", 30)
    with open(f, "a") as out:
        out.write('{"text": "a text"}\n')
    data, _ = build_tokenset(f, tok, tmp_path / "set", 0.0, progress=False)
    assert data.meta["n_docs"] == 30 and data.meta["refused"]["another format"]["examples"] == [
        (
            "mixed.jsonl line 31: this is a text, and the data begin with a conversation;"
            " they do not mix in one set: give each a file of its own, and `mix` them"
        )
    ]


def test_fine_tuning_resume_is_bit_identical(tmp_path):
    "With dropout, accumulation and an epoch boundary."
    f = write(tmp_path / "talks.jsonl")
    options = dict(child.OPTIONS, max_steps=30, save_steps=5, max_seq_len=64)

    def run_once(name, *callbacks):
        losses = Losses()
        return fit(
            child.shape(), f, output_dir=tmp_path / name, callbacks=[losses, *callbacks], **options
        ), losses.at

    run, whole = run_once("whole")
    assert run.history[-1]["epoch"] > 1 and run.history[-1]["loss"] < run.history[0]["loss"] - 0.5
    with pytest.raises(PowerCut):
        run_once("cut", AtStep(17, power_cut))
    again, rest = run_once("cut")
    assert min(k[0] for k in rest if k[1] == "loss") == 16 and all(
        whole[k] == v for k, v in rest.items()
    )
    assert (tmp_path / "cut" / "model.safetensors").read_bytes() == (
        tmp_path / "whole" / "model.safetensors"
    ).read_bytes()
