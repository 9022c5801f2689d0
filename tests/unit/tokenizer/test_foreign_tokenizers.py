"""Tokenizers of other programs:

added tokens, bytes and spaces, and the variables of their templates.
"""

import json
import shutil
from functools import cache

import pytest
import torch
import transformers
from hypothesis import example, given, settings, strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer as HF,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from minigpt.chat import Answer
from minigpt.config.options import TrainConfig
from minigpt.data.tokensets import build_tokenset
from minigpt.model.generation import complete, stream_text, text_pieces
from minigpt.model.gpt import GPT, GPTConfig
from minigpt.run.record import RunRecord
from minigpt.tokenizer import bpe as T
from minigpt.tokenizer.bpe import Tokenizer, load_tokenizer, train_tokenizer
from minigpt.train.evaluation import evaluate_on
from minigpt.train.inputs import open_source

TEXTS = [
    "The cat sat on the mat.\n\nIt was a good cat, and the mat was good too.",
    "One, two, three: 123 cats!",
    "我们去海边。 naïve café",
    "the\n\ncat\n\n\nsat\n\n",
] * 4
SPECIALS = ["<unk>", "<s>", "</s>"]
CONFIG = dict(
    tokenizer_class="PreTrainedTokenizerFast", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
)


def with_bos(tok, eos=False):
    front, back = ("<s>", tok.token_to_id("<s>")), ("</s>", tok.token_to_id("</s>"))
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if eos else "<s> $A", special_tokens=[front, back]
    )
    return tok


@cache
def byte_level(bos=False, eos=False):
    "A tokenizer like that of Llama 3."
    tok = HF(models.BPE())
    tok.pre_tokenizer, tok.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tok.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=SPECIALS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return Tokenizer(with_bos(tok, eos) if bos else tok, CONFIG)


def byte_tokens():
    return [f"<0x{i:02X}>" for i in range(256)]


@cache
def sentencepiece(kind="llama"):
    """A tokenizer like that of Llama 2:

    ▁ for a space, byte tokens; kinds `llama`, `metaspace`, `unigram`.
    """
    pieces = [
        "▁",
        "▁the",
        "▁cat",
        "▁good",
        "\n",
        "\n\n",
        "er",
        *"abcdefghijklmnopqrstuvwxyzTIO.,:!123",
    ]
    if kind == "unigram":
        tok = HF(
            models.Unigram(
                [(t, 0.0) for t in SPECIALS]
                + [(b, -20.0) for b in byte_tokens()]
                + [(p, -float(9 - len(p))) for p in pieces],
                unk_id=0,
                byte_fallback=True,
            )
        )
    else:
        merges = [
            ("e", "r"),
            ("t", "h"),
            ("th", "e"),
            ("▁", "the"),
            ("c", "a"),
            ("ca", "t"),
            ("▁", "cat"),
            ("\n", "\n"),
        ]
        vocab = [
            *SPECIALS,
            *byte_tokens(),
            *dict.fromkeys(
                p for p in [*pieces, *(a + b for a, b in merges)] if p not in ("▁good",)
            ),
        ]
        tok = HF(
            models.BPE(
                {t: i for i, t in enumerate(vocab)},
                merges,
                unk_token="<unk>",
                fuse_unk=True,
                byte_fallback=True,
            )
        )
    if kind == "llama":
        tok.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tok.decoder = decoders.Sequence(
            [
                decoders.Replace("▁", " "),
                decoders.ByteFallback(),
                decoders.Fuse(),
                decoders.Strip(" ", 1, 0),
            ]
        )
    else:
        tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tok.decoder = decoders.Sequence(
            [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="first", split=False)]
        )
    tok.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIALS])
    return Tokenizer(with_bos(tok), CONFIG)


@cache
def word_piece():
    tok = HF(models.WordPiece(unk_token="[UNK]"))
    tok.normalizer, tok.pre_tokenizer, tok.decoder = (
        normalizers.BertNormalizer(),
        pre_tokenizers.BertPreTokenizer(),
        decoders.WordPiece(),
    )
    tok.train_from_iterator(
        TEXTS,
        trainers.WordPieceTrainer(
            vocab_size=120, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"], show_progress=False
        ),
    )
    tok.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    return Tokenizer(
        tok, dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="[SEP]", unk_token="[UNK]")
    )


def model(tok, max_len=64):
    return GPT(
        GPTConfig(
            vocab_size=tok.vocab_size,
            dim=16,
            n_layer=1,
            n_head=2,
            n_kv_head=1,
            ffn_dim=16,
            max_len=max_len,
        )
    )


def load_hf(tok, folder):
    return transformers.PreTrainedTokenizerFast.from_pretrained(tok.save(folder))


# --- what is added to a text ----------------------------------------------------------------------
@pytest.mark.parametrize(
    "make",
    [
        lambda: byte_level(True),
        lambda: byte_level(True, True),
        sentencepiece,
        word_piece,
        byte_level,
    ],
)
def test_added_tokens_equal_transformers(make, tmp_path):
    tok = make()
    tok = Tokenizer(
        tok.hf, tok.config | dict(add_bos_token=False)
    )  # has no effect beside a tokenizer.json
    want = load_hf(tok, tmp_path)("The cat")["input_ids"]
    front, back = tok.adds
    assert [*front, *tok.encode("The cat"), *back] == want
    ids, lengths = tok.encode_documents(
        ["The cat", "sat", ""], [True, False, True], [False, True, True]
    )
    end = [tok.eos_id] if tok.eos_id in back else [*back, tok.eos_id]
    assert ids.tolist() == [
        *front,
        *tok.encode("The cat"),
        *tok.encode("sat"),
        *(back if tok.eos_id in back else end),
        *front,
        *end,
    ]
    assert lengths.sum() == len(ids) and ids.dtype == tok.dtype
    assert ids.tolist().count(tok.eos_id) == 2


def test_every_sequence_has_one_bos(tmp_path):
    tok = byte_level(True)
    bos, eos = tok.id("<s>"), tok.eos_id
    (tmp_path / "a.jsonl").write_text(
        "".join(json.dumps(dict(text=t)) + "\n" for t in ("The cat", "<s>two")), "utf-8"
    )
    (tmp_path / "b.txt").write_text("The cat\n<|endoftext|>\nsat", "utf-8")
    rows, _ = build_tokenset(tmp_path / "a.jsonl", tok, tmp_path / "a", 0.0)
    assert rows.tokens.tolist() == [
        bos,
        *tok.encode("The cat"),
        eos,
        bos,
        *tok.encode("<s>two"),
        eos,
    ]
    text, _ = build_tokenset(tmp_path / "b.txt", tok, tmp_path / "b", 0.0)
    assert text.tokens.tolist() == [
        bos,
        *tok.encode("The cat\n"),
        eos,
        bos,
        *tok.encode("sat"),
        eos,
    ]
    lines, _ = build_tokenset(tmp_path / "b.txt", tok, tmp_path / "c", 0.0, format="lines")
    assert lines.tokens[lines.row_starts()[:-1]].tolist() == [bos] * len(lines.row_starts()[:-1])
    assert (
        evaluate_on(model(tok), tmp_path / "a.jsonl", tokenizer=tok, seq_len=8, progress=False)[
            "tokens"
        ]
        == len(rows) - 1
    )
    assert tok.begin("The cat") == [bos, *tok.encode("The cat")] and tok.begin("") == [bos]
    plain = byte_level()
    assert plain.begin("") == [plain.eos_id] and plain.begin("a") == plain.encode("a")


def test_template_that_writes_bos_has_one(tmp_path):
    tok = byte_level(True)
    tok = Tokenizer(
        tok.hf,
        tok.config
        | dict(
            chat_template=(
                "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token"
                " }}{% endfor %}"
            )
        ),
    )
    ids = tok.encode_prompt([dict(role="user", content="The cat")])
    assert ids.count(tok.id("<s>")) == 1 and ids == load_hf(tok, tmp_path).apply_chat_template(
        [dict(role="user", content="The cat")], tokenize=True, return_dict=False
    )


def test_length_in_tokenizer_json_truncates_nothing(tmp_path):
    hf = HF.from_str(byte_level().hf.to_str())
    hf.enable_truncation(3)
    hf.enable_padding(length=9)
    tok = load_tokenizer(Tokenizer(hf, CONFIG).save(tmp_path))
    assert tok.encode(TEXTS[0]) == byte_level().encode(TEXTS[0]) and tok.encode(
        TEXTS[0], special=True
    ) == byte_level().encode(TEXTS[0])


def test_run_of_an_older_version_keeps_its_tokens(tmp_path):
    tok = byte_level(True)
    older = Tokenizer(tok.hf, tok.config, rules=1)
    (tmp_path / "a.jsonl").write_text(json.dumps(dict(text=TEXTS[0])) + "\n", "utf-8")
    run = tmp_path / "run"
    run.mkdir()
    was, _ = build_tokenset(tmp_path / "a.jsonl", older, run / "data", 0.0)
    assert was.tokens.tolist() == [*tok.encode(TEXTS[0]), tok.eos_id]
    meta = json.loads((run / "data/train/meta.json").read_text("utf-8"))
    del meta["rules"]  # as an older version wrote it
    (run / "data/train/meta.json").write_text(json.dumps(meta), "utf-8")
    tok.save(run / "tokenizer")
    known = dict(
        train={},
        identity=dict(tokenizer=tok.hash, data=was.fingerprint),
        data=dict(source=str(tmp_path / "a.jsonl"), places=dict(train=["data"], valid=None)),
    )
    config = TrainConfig(validation_split=0.0, max_seq_len=8, progress=False)
    opened = lambda: open_source(
        run, RunRecord.from_dict(known), tmp_path / "a.jsonl", None, None, config
    )
    kept = opened()
    assert kept.data.fingerprint == was.fingerprint
    assert kept.tokenizer.rules == 1 and not any(kept.tokenizer.adds)
    shutil.rmtree(run / "data")  # on another machine
    built = opened().data
    assert built.fingerprint == was.fingerprint
    with pytest.raises(ValueError, match="lack the tokens that this tokenizer adds to each .<s>."):
        open_source(tmp_path / "new", None, built, None, tok, config)
    known["identity"]["rules"] = 2
    shutil.rmtree(run / "data")
    with pytest.raises(ValueError, match="data = "):
        opened()
    again, _ = build_tokenset(tmp_path / "a.jsonl", tok, tmp_path / "again", 0.0)
    assert again.tokens[0] == tok.id("<s>")


# --- ids back to text -----------------------------------------------------------------------------
@cache
def gemma():
    """▁ for a space, and no character is dropped at the beginning.

    The decoder replaces letters in the joined text.
    """
    tok = HF.from_str(sentencepiece().hf.to_str())
    tok.normalizer, tok.decoder = (
        normalizers.Replace(" ", "▁"),
        decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]),
    )
    return Tokenizer(tok, CONFIG)


@cache
def rewriting():
    tok = HF.from_str(gemma().hf.to_str())
    tok.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(Regex("the|e c"), ""),
        ]
    )
    return Tokenizer(tok, CONFIG)


@cache
def endings():
    "Words end in </w>, as in GPT-1."
    tok = HF(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.Whitespace(), decoders.BPEDecoder("</w>")
    tok.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=150, special_tokens=SPECIALS, end_of_word_suffix="</w>", show_progress=False
        ),
    )
    return Tokenizer(tok, CONFIG)


@cache
def no_decoder():
    tok = HF.from_str(endings().hf.to_str())
    made = json.loads(tok.to_str()) | dict(decoder=None)
    return Tokenizer(HF.from_str(json.dumps(made)), CONFIG)


KINDS = dict(
    ours=cache(lambda: train_tokenizer(TEXTS, 330)),
    byte_level=byte_level,
    llama=sentencepiece,
    metaspace=lambda: sentencepiece("metaspace"),
    unigram=lambda: sentencepiece("unigram"),
    gemma=gemma,
    rewriting=rewriting,
    word_piece=word_piece,
    endings=endings,
    no_decoder=no_decoder,
)
LETTERS = st.text(
    st.sampled_from(" \n.,'thecatgood▁�<>") | st.characters(exclude_categories=["Cs"]), max_size=12
)


def draw_ids(data, tok):
    "Ids of texts, and ids of no text: control tokens, parts of characters, invalid ids."
    part = st.one_of(
        LETTERS.map(tok.encode),
        st.lists(st.integers(0, tok.vocab_size + 2), max_size=6),
        st.lists(st.sampled_from(sorted(tok.byte_ids) or [0]), max_size=5),
        st.sampled_from("😀我é").map(lambda c: tok.encode(c)[:-1]),
    )
    return [i for p in data.draw(st.lists(part, max_size=4)) for i in p]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_streamed_pieces_equal_the_decoded_text(kind, data):
    tok = KINDS[kind]()
    before, ids = (
        [i for i in tok.encode(data.draw(LETTERS)) if i not in tok.control_ids],
        draw_ids(data, tok),
    )
    assert "".join(text_pieces(tok, ids)) == tok.decode(ids, skip_special=True)
    at_once = tok.decode(before + ids, skip_special=True)
    start = tok.decode(before, skip_special=True)
    if not at_once.startswith(start):
        return  # the ids change the text of the prompt: not a continuation
    pieces = [*text_pieces(tok, ids, after=[0, *before] if 0 in tok.control_ids else before)]
    assert "".join(pieces) == at_once[len(start) :] and all(pieces)
    for k in range(len(ids)):
        assert at_once[len(start) :].startswith("".join(emitted(tok, ids, k, before))), (
            "emitted text was changed"
        )


def emitted(tok, ids, k, before):
    "Return the text that is emitted while only k tokens have arrived."
    out = []

    def arrive():
        yield from ids[:k]
        done.append(True)
        yield from ids[k:]

    done = []
    for p in text_pieces(tok, arrive(), before):
        if done:
            break
        out.append(p)
    return out


@pytest.mark.parametrize("kind", ["byte_level", "llama", "metaspace", "unigram", "gemma"])
def test_incomplete_characters_wait_and_words_do_not(kind):
    tok = KINDS[kind]()
    ids = tok.encode("the 😀 cat")
    whole = tok.decode(ids)
    assert "\ufffd" not in whole and "\ufffd" not in "".join(
        p for k in range(len(ids)) for p in emitted(tok, ids, k, [])
    )
    pieces = [*text_pieces(tok, ids)]
    assert "".join(pieces) == whole and len(pieces) >= 3
    before = tok.encode("the")
    assert "".join(text_pieces(tok, tok.encode("the cat")[len(before) :], after=before)) == " cat"


class Scripted(GPT):
    "A model that gives scripted answers."

    @property
    def head(self):
        return torch.eye(self.config.vocab_size)

    def trunk(self, x, mask=None, cache=None):
        out = torch.zeros(*x.shape[:2], self.config.vocab_size)
        out[:, -1, self.now.pop(0)] = 100.0
        return out


def scripted(tok, ids):
    m = Scripted(model(tok).config)
    m.now = [*ids, tok.eos_id]
    return m


@pytest.mark.parametrize("kind", ["llama", "metaspace", "gemma", "byte_level"])
def test_all_outputs_decode_alike(kind):
    tok = KINDS[kind]()
    tok = Tokenizer(
        tok.hf,
        tok.config
        | dict(chat_template="{{ bos_token }}{% for m in messages %}{{ m.content }}\n{% endfor %}"),
    )
    before = tok.encode("the")
    goes_on = tok.encode("the cat 我😀")[len(before) :]
    how = dict(temperature=0, use_cache=False)
    assert (
        "".join(stream_text(scripted(tok, goes_on), tok, "the", **how))
        == complete(scripted(tok, goes_on), tok, "the", **how)
        == " cat 我😀"
    )
    assert (
        "".join(
            Answer(scripted(tok, goes_on), tok, tok.begin("the"), **how).plain(tok.begin("the"))
        )
        == " cat 我😀"
    )
    answer = tok.encode("cat 我😀")
    assert (
        complete(scripted(tok, answer), tok, [dict(role="user", content="the")], **how)
        == "cat 我😀"
    )
    answer = Answer(
        scripted(tok, answer), tok, tok.encode_prompt([dict(role="user", content="the")]), **how
    )
    assert "".join(p for _, p in answer) == "cat 我😀"


# --- templates ------------------------------------------------------------------------------------
GENERATION = (
    "{{ bos_token }}{{ strftime_now('%Y') }}{% for m in messages %}\n"
    "{% if m.role == 'assistant' %}{% generation %}{% set said = m.content %}{{ said }}"
    "{{ eos_token }}{% endgeneration %}{% else %}{{ m.role }}: {{ m.content }}{{ pad_token }}"
    "{% endif %}{% endfor %}"
)
NAMED = [
    dict(
        name="default", template="{{ eos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    ),
    dict(name="tool_use", template="{{ tools|length }} functions"),
]
TALK = [dict(role="user", content="The cat?"), dict(role="assistant", content="sat.")]


def as_object(token):
    return dict(
        __type="AddedToken",
        content=token,
        lstrip=False,
        normalized=False,
        rstrip=False,
        single_word=False,
        special=True,
    )


@pytest.mark.parametrize("template", [GENERATION, NAMED], ids=["generation", "named"])
@pytest.mark.parametrize(
    "tools",
    [
        None,
        [
            dict(
                type="function",
                function=dict(
                    name="f", description="", parameters=dict(type="object", properties={})
                ),
            )
        ],
    ],
)
def test_templates_equal_transformers(template, tools, tmp_path):
    hf = byte_level().hf
    tok = Tokenizer(
        hf,
        dict(
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token=as_object("<s>"),
            eos_token=as_object("</s>"),
            pad_token=as_object("<unk>"),
            chat_template=template,
        ),
    )
    want = load_hf(tok, tmp_path).apply_chat_template(TALK, tools=tools, tokenize=False)
    assert tok.render(TALK, tools=tools) == want and "{" not in want
    assert load_tokenizer(tmp_path).render(TALK, tools=tools) == want and tok.eos_id == 2


def test_templates_in_separate_files(tmp_path):
    tok = Tokenizer(byte_level().hf, CONFIG)
    tok.save(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(NAMED[0]["template"], "utf-8")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates/tool_use.jinja").write_text(
        NAMED[1]["template"], "utf-8"
    )
    hf = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    for tools in (
        None,
        [dict(type="function", function=dict(name="f", description="", parameters={}))],
    ):
        want = hf.apply_chat_template(TALK, tools=tools, tokenize=False)
        tok = load_tokenizer(tmp_path)
        assert (
            tok.render(TALK, tools=tools)
            == want
            == load_tokenizer(tok.save(tmp_path / "again")).render(TALK, tools=tools)
        )


@pytest.mark.parametrize(
    "template,message",
    [
        ("{% if %}", "line 1: TemplateSyntaxError"),
        ("\n{{ messages[0].content.x.y }}", "UndefinedError"),
        ("{{ 1 // 0 }}", "ZeroDivisionError"),
        ("{{ raise_exception('no') }}", "refuses this conversation: no"),
        ([dict(name="rag", template="x")], 'templates for rag, and none is the "default"'),
        ([1], "chat_template is '.1.'"),
        (7, "chat_template is '7'"),
        (None, "has no chat template"),
    ],
)
def test_broken_template_is_explained(template, message):
    with pytest.raises(ValueError, match=message):
        Tokenizer(byte_level().hf, CONFIG | dict(chat_template=template)).encode_prompt(TALK)


@pytest.mark.parametrize("token", [{}, 3, ["</s>"], dict(content=None)])
def test_unknown_token_is_named(token):
    with pytest.raises(ValueError, match="eos_token is .* in tokenizer_config.json; it must be"):
        Tokenizer(byte_level().hf, CONFIG | dict(eos_token=token)).eos_id


# --- who may write a control token, and where an answer starts ------------------------------------
CHATML = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|vision_start|>",
    "<|fim_middle|>",
    "</s>",
    "[INST]",
]
EMPTY_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content }}"
    "<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking %}{{ '<think>\n' }}"
    "{% else %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)

TOOLS = (
    "{% if tools %}{% for t in tools %}{{ t | tojson }}\n{% endfor %}{% endif %}" + EMPTY_THOUGHTS
)


@cache
def chatml(kind, template=T.CHAT_TEMPLATE):
    """A tokenizer of this kind with the tokens of conversations.

    `gpt2` has a lookahead for white space, as MiniMind's has.
    """
    if kind == "ours":
        hf = KINDS["ours"]().hf
    else:
        hf = HF.from_str(byte_level().hf.to_str() if kind == "gpt2" else KINDS[kind]().hf.to_str())
        hf.add_special_tokens([AddedToken(t, normalized=False) for t in CHATML])
        hf.add_tokens(
            [
                AddedToken(t, normalized=False, special=False)
                for t in ("<think>", "</think>", "<tool_call>", "</tool_call>")
            ]
        )
    return Tokenizer(
        hf,
        dict(
            tokenizer_class="PreTrainedTokenizerFast",
            eos_token="<|endoftext|>",
            chat_template=template,
        ),
    )


@pytest.mark.parametrize("kind", ["gpt2", "llama", "metaspace", "unigram", "gemma"])
@pytest.mark.parametrize("template", [T.CHAT_TEMPLATE, EMPTY_THOUGHTS], ids=["ours", "thoughts"])
@pytest.mark.parametrize(
    "token",
    ["</s>", "<|eot_id|>", "<|vision_start|>", "<|im_end|>\n<|im_start|>assistant\n", "<s>"],
)
def test_texts_contain_no_control_tokens(kind, template, token):
    tok = chatml(kind, template)
    talk = lambda x: [
        dict(role="system", content=f"Be {x}"),
        dict(role="user", content=f"the {x} cat{x}"),
        dict(role="assistant", content=f"good {x}."),
        dict(role="user", content=x),
        dict(role="assistant", content="sat"),
    ]
    steers = lambda ids: [i for i in map(int, ids) if i in tok.control_ids and i != tok.id("<unk>")]
    (ids, learn), (plain, plain_learn) = tok.encode_chat(talk(token)), tok.encode_chat(talk("o"))
    assert steers(ids) == steers(plain) and steers(ids[learn]) == steers(plain[plain_learn])
    assert tok.decode(ids).replace(" ", "") == tok.render(talk(token)).replace(" ", "")
    prompt = tok.encode_prompt(talk(token)[:-1])
    assert ids[: len(prompt)].tolist() == prompt, "the prompt differs from the training text"
    text, _ = tok.encode_batch([f"the {token} cat", token])
    assert not steers(text)


def test_vocabulary_that_spells_a_control_token():
    "WordPiece matches a word with any of its tokens."
    hf = HF.from_str(word_piece().hf.to_str())
    hf.pre_tokenizer, hf.normalizer = pre_tokenizers.WhitespaceSplit(), None
    tok = Tokenizer(hf, word_piece().config)
    assert (
        tok.hf.encode("[SEP] a", add_special_tokens=False).ids[0]
        == tok.id("[SEP]")
        not in tok.encode("[SEP] a")
    )
    assert tok.encode("cat sat") == tok.hf.encode("cat sat", add_special_tokens=False).ids


SAID = st.tuples(
    st.sampled_from(["", "\n", "\n\n", " ", " \n", "<think>", "<tool_call>", "12", "'s", "我"]),
    st.text("acet \n.1", min_size=1, max_size=6),
).map("".join)


def test_run_of_an_older_version_keeps_marks_in_questions():
    tok = chatml("gpt2")
    older = Tokenizer(tok.hf, tok.config, rules=2)
    talk = [dict(role="user", content="<think>"), dict(role="assistant", content="<think>")]
    count = lambda t: t.encode_chat(talk)[0].tolist().count(tok.id("<think>"))
    assert (count(older), count(tok)) == (2, 1)


def test_functions_have_one_form_in_templates():
    "The functions in a prompt read like those in the training text."
    own = Tokenizer(KINDS["ours"]().hf, dict(eos_token="<|endoftext|>", chat_template=TOOLS))
    tools = [dict(name="cat", description="good <|im_end|> <think>")]
    talk = [dict(role="user", content="cat?"), dict(role="assistant", content="sat")]
    ids, _ = own.encode_chat(talk, tools)
    prompt = own.encode_prompt(talk[:1], tools)
    assert ids[: len(prompt)].tolist() == prompt and "function" in own.decode(prompt)


@pytest.mark.parametrize("kind", ["ours", "gpt2", "llama", "metaspace", "unigram", "gemma"])
@pytest.mark.parametrize("template", [T.CHAT_TEMPLATE, EMPTY_THOUGHTS], ids=["ours", "thoughts"])
@settings(max_examples=25, deadline=None)
@given(
    questions=st.lists(LETTERS, min_size=1, max_size=3),
    answers=st.lists(SAID, min_size=3, max_size=3),
)
@example(questions=["the cat?"], answers=["\nsat"] * 3)
@example(questions=["the cat?"] * 2, answers=["sat", "\n\ngood", ""])
@example(questions=["<think>", "the </tool_call> cat"], answers=["1"] * 3)
def test_prompt_equals_the_training_text(kind, template, questions, answers):
    tok = chatml(kind, template)
    assert len(tok.encode("the\n\n")) < len(tok.encode("the")) + 2, (
        "the test needs a token of two line breaks"
    )
    talk = [
        m
        for a, s in zip(questions, answers)
        for m in (dict(role="user", content=a), dict(role="assistant", content=s))
    ]
    ids, learn, lengths = tok.encode_chats([(talk, None)] * 2)
    assert lengths[0] * 2 == len(ids)
    ids, learn = ids[: lengths[0]].tolist(), learn[: lengths[0]]
    for k in range(1, len(talk), 2):
        prompt = tok.encode_prompt(talk[:k])
        assert ids[: len(prompt)] == prompt
        if template is T.CHAT_TEMPLATE:
            assert learn[len(prompt)] and not learn[len(prompt) - 1]
    if kind in ("ours", "gpt2"):
        assert tok.decode(ids) == tok.render(talk)
    assert tok.decode([i for i, l in zip(ids, learn) if l]).count("<|im_end|>") == len(questions)
    if all(s[:1].isalpha() for s in answers):
        assert ids == tok.encode(tok.render(talk), special=True), (
            "must equal apply_chat_template if no token crosses the boundary"
        )
