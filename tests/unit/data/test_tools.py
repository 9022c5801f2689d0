"Function calls: parsing of model output, and the built-in corpora that contain calls."

import json
from functools import cache

import pytest

hypothesis = pytest.importorskip("hypothesis")
from hypothesis import example, given, strategies as st

from minigpt.data.corpus import TOOLS, call, reasoning
from minigpt.data.readers import parse_conversation
from minigpt.model.generation import parse_tool_calls
from minigpt.tokenizer.bpe import train_tokenizer

pieces = st.lists(
    st.sampled_from(
        [
            "<tool_call>",
            "</tool_call>",
            "\n",
            "{",
            "}",
            '"name": "f"',
            ', "arguments": ',
            "{}",
            "[",
            "]",
            "null",
            "1e999",
            "9" * 5000,
            '"',
            "\\",
            "NaN",
        ]
    )
    | st.text(max_size=8)
).map("".join)
text = st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(
    ["</tool_call>", "<tool_call>{", "\n</tool_call>\n", '\\"}', "<|im_end", "\u2028"]
)
value = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | text,
    lambda x: st.lists(x, max_size=3) | st.dictionaries(text, x, max_size=3),
    max_leaves=8,
)
one = st.fixed_dictionaries(
    dict(
        name=st.from_regex(r"[A-Za-z_][A-Za-z0-9_.-]{0,20}", fullmatch=True),
        arguments=st.dictionaries(text, value, max_size=4),
    )
)
around = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"))


@cache
def tokenizer():
    return train_tokenizer(["."])


def turn(calls, content=""):
    "Return the text of the chat template for an assistant's calls."
    whole = tokenizer().render(
        [dict(role="user", content="?"), dict(role="assistant", content=content, tool_calls=calls)]
    )
    return whole.split("<|im_start|>assistant\n", 1)[1].removesuffix("<|im_end|>\n")


def is_list_of_calls(x):
    return isinstance(x, list) and all(
        set(c) == {"name", "arguments"}
        and isinstance(c["name"], str)
        and isinstance(c["arguments"], dict)
        for c in x
    )


@given(pieces | st.text())
@example("<tool_call>" + "[" * 200_000)
@example("<tool_call>" + '{"a":' * 200_000)
@example("<tool_call>" + "9" * 5000 + "</tool_call>")
def test_every_text_gives_calls_or_a_reason(text):
    try:
        found = parse_tool_calls(text)
    except ValueError as e:
        assert str(e)
    else:
        assert is_list_of_calls(found)


@given(st.lists(one, min_size=1, max_size=3), around, around)
def test_template_output_is_parsed_back(calls, content, after):
    assert parse_tool_calls(turn(calls, content) + after) == calls


@given(st.lists(one, min_size=1, max_size=3), st.data())
def test_truncated_turn_never_gives_another_call(calls, data):
    text = turn(calls)
    cut = text[: data.draw(st.integers(0, len(text) - 1))]
    try:
        found = parse_tool_calls(cut)
    except ValueError:
        return
    assert found == calls[: len(found)] and len(found) < len(calls)


def test_every_built_in_call_and_thought_is_parsed():
    for i in range(2000):
        for messages in (call(i, 7), reasoning(i, 7)):
            row = parse_conversation(dict(conversations=messages), 1)
            assert not row.reason, (i, row.reason, row.detail)
    for i in range(300):
        for m in call(i, 7):
            if "tool_calls" in m:
                assert parse_tool_calls(turn(m["tool_calls"])) == m["tool_calls"]
                for c in m["tool_calls"]:
                    TOOLS[c["name"]][0](**c["arguments"])


def test_tools_match_their_json_schema():
    for name, (f, schema) in TOOLS.items():
        assert (
            json.loads(json.dumps(schema)) == schema
            and schema["name"] == name == f.__name__
            and schema["parameters"]["required"]
        )
