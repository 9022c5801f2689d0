"""Any text round-trips exactly, and tiktoken and Hugging Face tokenizers give the same ids.

tiktoken encodes; other programs read the Hugging Face file.
"""

import json
from functools import cache
from itertools import islice

import pytest
from hypothesis import example, given, settings, strategies as st

from minigpt.tokenizer import bpe as T
from minigpt.tokenizer.bpe import MARKS, SPECIALS, Tokenizer, load_tokenizer, train_tokenizer
from tests.conftest import ROOT

ENGLISH = [
    (
        "The quick brown fox jumps over the lazy dog's back; it wasn't amused, they've said 1,234"
        " times.\n\n"
    ),
    "Once upon a time there was a cat. The cat had 3 hats!\n\tdef f(x): return x+1\n",
    "internationalization and internationally recognised nations' nationalism",
] * 5
CHINESE = [
    "从前有一只猫，它住在花园里。猫喜欢跑，也喜欢睡觉。",
    "今天天气很好，我们去公园玩。公园里有很多花，花园里有很多人。",
    "小狗问：“你在哪里？”小猫说：“我在花园里！”",
] * 5
MIXED = (
    ENGLISH
    + CHINESE
    + [
        "我用 Python 写了 print('你好') 😀👍🏽 — naïve café ไทย ひらがな カタカナ 한국어 العربية",
        "aaaaaaaa aaaa aa  a   \n\n\n \r\n \t\t",
        "α+β≠γ １２３ ½ Ⅷ e\u0301",
    ]
    * 5
)
CORPORA = dict(english=ENGLISH, chinese=CHINESE, mixed=MIXED)
kinds = pytest.mark.parametrize("kind", CORPORA)
SPECIAL_IDS = len(SPECIALS + MARKS)


@cache
def tokenizer(kind):
    return train_tokenizer(CORPORA[kind], 700)


@cache
def real_tokenizer(name):
    "A tokenizer trained on the texts of a shared data set, if that folder exists."
    return train_tokenizer(rows(name, 2000), 4000)


def rows(name, n):
    with open(name, encoding="utf-8") as f:
        return [json.loads(line)["text"] for line in islice(f, n)]


# Any text: characters of every kind, words of the corpora, white space, complete and truncated
# token texts.
PARTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=12),
    st.sampled_from(SPECIALS + MARKS),
    st.sampled_from([t[:-1] for t in SPECIALS + MARKS]),
    st.sampled_from(" ".join(ENGLISH[:3] + CHINESE[:3] + MIXED[-3:]).split(" ")),
    st.text(" \n\r\t\u00a0\u3000\u2028\x85", max_size=5),
    st.text("\x00\x01\x1b\x7f\ufffd\ufeff\u200d\u0301\ufe0f", max_size=4),
    st.text(st.characters(min_codepoint=0x4E00, max_codepoint=0x9FFF), max_size=6),
    st.text("a'sLlVvEe 09١٢", max_size=8),
)
TEXTS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])), st.lists(PARTS, max_size=10).map("".join)
)


@kinds
@settings(max_examples=250)
@given(text=TEXTS)
@example(text="")
@example(text="<|endoftext|>")
@example(text="<think>我</think>\r\n\r\n  x")
@example(text="<<|im_start|><|im_end|>|>\x00\U0010ffff")
@example(text="e\u0301\u0301 \u0e19\u0e49\u0e33 👩‍👩‍👧‍👦 ㅤ")
def test_texts_round_trip_with_equal_ids(kind, text):
    tok = tokenizer(kind)
    plain, special = tok.encode(text), tok.encode(text, special=True)
    assert tok.decode(plain) == text and tok.decode(special) == text
    assert all(i >= SPECIAL_IDS for i in plain), "text was encoded as a special token or a mark"
    assert special == hf_ids(tok, text, special=True)
    if not any(m in text for m in MARKS):
        assert plain == hf_ids(tok, text, special=False)  # always encodes a mark as one token
    assert tok.encode_array(text).dtype == tok.dtype


def hf_ids(tok, text, special):
    tok.hf.encode_special_tokens = not special
    try:
        return tok.hf.encode(text, add_special_tokens=False).ids
    finally:
        tok.hf.encode_special_tokens = False


@kinds
@settings(max_examples=250)
@given(texts=st.lists(TEXTS, max_size=5))
@example(texts=["a  ", "  b", "", "c   d\n   e", " \u3000\u3000我  <|im_end|>   x"])
@example(texts=["a  b", "a" + T._SPACE_MARK + "b", T._SEPARATOR])
def test_batch_encoding_equals_single_encoding(kind, texts):
    tok = tokenizer(kind)
    for special in False, True:
        ids, lengths = tok.encode_batch(texts, special)
        alone = [
            (
                tok._ordinary.encode(t, add_special_tokens=False).ids
                if not special
                else hf_ids(tok, t, True)
            )
            for t in texts
        ]
        assert [
            i.tolist()
            for i in (ids[a : a + n] for a, n in zip(lengths.cumsum() - lengths, lengths))
        ] == alone
        assert len(lengths) == len(texts) and ids.dtype == tok.dtype


def test_mark_with_two_spaces_is_one_token():
    tok = train_tokenizer(MIXED, 700, marks=["[the  end]"])
    text = "is it  [the  end]  yet?"
    assert tok.id("[the  end]") in tok.encode(text, special=True) and tok.encode(
        text, special=True
    ) == hf_ids(tok, text, True)
    assert tok.decode(tok.encode(text)) == text


@cache
def without_tiktoken(kind):
    "The same tokenizer without tiktoken."
    tok = Tokenizer(T.HFTokenizer.from_str(tokenizer(kind).hf.to_str()))
    tok.fast = None
    return tok


@kinds
@settings(max_examples=100)
@given(text=TEXTS)
def test_encoding_without_tiktoken_is_equal(kind, text):
    "The code path of foreign tokenizers."
    a, b = tokenizer(kind), without_tiktoken(kind)
    assert a.encode(text, special=True) == b.encode(text, special=True)
    assert b.decode(b.encode(text)) == text
    if not any(m in text for m in MARKS):
        assert a.encode(text) == b.encode(text)


def test_marks_in_ordinary_text_without_tiktoken():
    text = "he wrote <think> here"
    assert without_tiktoken("mixed").encode(text) == tokenizer("mixed").encode(text)


# --- why both agree -------------------------------------------------------------------------------
def merges(tok):
    "(left, right) in bytes, in order of rank."
    byte_of = T._byte_decoder()
    as_bytes = lambda t: bytes(byte_of[c] for c in t)
    return [
        tuple(map(as_bytes, m if isinstance(m, list) else m.split(" ")))
        for m in tok.json["model"]["merges"]
    ]


def last_pair(token, rank):
    "Merge the bytes of a token by lowest rank, without its own rank; return the remaining parts."
    parts, own = [bytes([b]) for b in token], rank[token]
    while True:
        at = [(rank.get(a + b, own), i) for i, (a, b) in enumerate(zip(parts, parts[1:]))]
        best, i = min(at, default=(own, 0))
        if best >= own:
            return tuple(parts)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def check_merges(tok):
    """Check that every token results from exactly one merge, the one in the list of merges.

    tiktoken joins the two neighbours whose union has the lowest rank; Hugging Face joins the pair
    that comes first in the list of merges. Both are equal if each token results from one pair only,
    and this pair is in the list.
    """
    made = merges(tok)
    rank = {a + b: n for n, (a, b) in enumerate(made)}
    assert len(rank) == len(made), "a token has two merges"
    ids = [tok.fast.encode_single_token(a + b) for a, b in made]
    assert ids == sorted(ids)
    wrong = [(a, b, parts) for a, b in made if (parts := last_pair(a + b, rank)) != (a, b)]
    assert not wrong, wrong[:5]


@kinds
def test_each_token_has_one_merge(kind):
    tok = tokenizer(kind)
    assert tok.fast is not None and len(merges(tok)) > 50
    check_merges(tok)


def test_unordered_merges_use_hugging_face():
    """The merges are not in the order of their ids:

    tiktoken would give other ids, so it is not used.
    """
    made = json.loads(tokenizer("english").hf.to_str())
    made["model"]["merges"][:2] = reversed(made["model"]["merges"][:2])
    other = Tokenizer(T.HFTokenizer.from_str(json.dumps(made)))
    assert other.fast is None and other.decode(other.encode(ENGLISH[0])) == ENGLISH[0]
    made = json.loads(tokenizer("english").hf.to_str())
    made["normalizer"] = {"type": "NFC"}
    assert Tokenizer(T.HFTokenizer.from_str(json.dumps(made))).fast is None


# --- training and saving --------------------------------------------------------------------------
@kinds
def test_training_is_deterministic(kind):
    tok = tokenizer(kind)
    assert [tok.id(t) for t in SPECIALS + MARKS] == list(range(SPECIAL_IDS)) and tok.eos_id == 0
    assert tok.vocab_size <= 700 and tok.vocab_size == len(tok.hf.get_vocab(with_added_tokens=True))
    again = train_tokenizer(CORPORA[kind], 700)
    assert again.hash == tok.hash, (
        "the same texts gave another tokenizer: a run killed before its first save would differ"
    )


@kinds
def test_saved_tokenizer_loads_equal(kind, tmp_path):
    tok = tokenizer(kind)
    got = load_tokenizer(tok.save(tmp_path))
    assert got.hash == tok.hash and got.config == tok.config and got.fast is not None
    for t in CORPORA[kind] + ["<|im_start|>user\nhi<|im_end|>"]:
        assert got.encode(t, special=True) == tok.encode(t, special=True)
    assert not list(tmp_path.glob(".*"))


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match="vocab_size=100 must be at least 267"):
        train_tokenizer(ENGLISH, 100)
    with pytest.raises(ValueError, match="no text to train"):
        train_tokenizer([])
    with pytest.raises(ValueError, match="no text to train"):
        train_tokenizer(["", ""])


# --- real texts -----------------------------------------------------------------------------------
SHARED = sorted((ROOT.parent / "shared" / "data").glob("pretrain_*.jsonl"))


@pytest.mark.skipif(
    not SHARED,
    reason=(
        "needs real texts, which are not in the repository:"
        " put pretrain_*.jsonl into ../shared/data"
    ),
)
@pytest.mark.parametrize("file", SHARED, ids=lambda p: p.stem)
def test_real_texts_round_trip(file):
    tok = real_tokenizer(file)
    check_merges(tok)
    texts = rows(file, 500)
    for special in (False, True):
        tok.hf.encode_special_tokens = not special
        for n, (text, hf) in enumerate(
            zip(texts, tok.hf.encode_batch(texts, add_special_tokens=False)), 1
        ):
            ids = tok.encode(text, special=special)
            assert ids == hf.ids, f"{file.name} line {n}"
            assert special or tok.decode(ids) == text, f"{file.name} line {n}"
    for other in SHARED:  # words that were not in its training data
        tok.hf.encode_special_tokens = True
        for text in rows(other, 100):
            assert tok.encode(text) == tok.hf.encode(text, add_special_tokens=False).ids
