"""Every defect that a data file can have gives a row or a reason, with its line.

Each is written to disk and read through blocks and rows, into a token set and into a report.
"""

import codecs
import copy
import gzip
import json
import os
import random
import re
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings, strategies as st

from minigpt.data import readers as formats
from minigpt.data.quality import analyze
from minigpt.data.readers import DataError, Row, inspect_file, parse_block, parse_row, read_blocks
from minigpt.data.tokensets import build_tokenset
from minigpt.tokenizer.bpe import MARKS, SPECIALS, train_tokenizer
from tests.harness import kill_child as child

SHARED = child.ROOT.parent / "shared" / "data"


@pytest.fixture(scope="module")
def tok():
    return train_tokenizer(
        ["Questions and answers. 问题和答案。 <think> 1 + 1 = 2 </think>"] * 9, vocab_size=300
    )


def rows(path, size=1 << 20, format=None):
    return [r for b in read_blocks(path, size) for r in parse_block(b, format)]


def good(line, text, *mended):
    return line, text, "", mended


def bad(line, reason):
    return line, "", reason, ()


def conversation(*messages, **more):
    return dict(conversations=[*messages], **more)


def message(role, content, **more):
    return dict(role=role, content=content, **more)


def dump(*values):
    return b"".join(json.dumps(v, ensure_ascii=False).encode() + b"\n" for v in values)


USER, ANSWER = message("user", "2?"), message("assistant", "Two.")
CALL = message("assistant", None, tool_calls=[dict(name="f", arguments={"x": 1})])


# --- one file with one defect ---------------------------------------------------------------------
TEXT = {  # name → (file, content, its rows)
    "plain": ("a.jsonl", b'{"text": "a"}\n{"text": "b"}\n', [good(1, "a"), good(2, "b")]),
    "no-line-end": ("a.jsonl", b'{"text": "a"}\n{"text": "b"}', [good(1, "a"), good(2, "b")]),
    "blank-lines": (
        "a.jsonl",
        b'\n \n{"text": "a"}\n\t\n\n{"text": "b"}\n\n',
        [good(3, "a"), good(6, "b")],
    ),
    "bom": (
        "a.jsonl",
        codecs.BOM_UTF8 + b'{"text": "a"}\n' + codecs.BOM_UTF8 + b'{"text": "b"}\n',
        [good(1, "a"), good(2, "b")],
    ),  # the second one, from joined files
    "crlf": (
        "a.jsonl",
        b'{"text": "a\\r\\n"}\r\n\r\n{"text": "b"}\r\n',
        [good(1, "a\r\n"), good(3, "b")],
    ),
    "cr": (
        "a.jsonl",
        b'{"text": "a"}\r\r{"text": 5}\r',
        [good(1, "a"), bad(3, "text is not a string")],
    ),
    "nul-line": (
        "a.jsonl",
        b'{"text": "a"}\n' + bytes(4096) + b'\n{"text": "b"}\n' + bytes(9),
        [good(1, "a"), bad(2, "NUL bytes"), good(3, "b"), bad(4, "NUL bytes")],
    ),
    "nul-inside": (
        "a.jsonl",
        b'{"text": "a\0b"}\n' + dump(*[{"text": "x" * 40}] * 9),
        [good(1, "a\0b", "lenient JSON"), *(good(i, "x" * 40) for i in range(2, 11))],
    ),
    "nul-escaped": ("a.jsonl", b'{"text": "a\\u0000b"}\n', [good(1, "a\0b")]),
    "latin-1-line": (
        "a.jsonl",
        '{"text": "é"}\n{"text": "ü"}\n{"text": "雪"}\n'.encode()
        + '{"text": "café"}\n'.encode("latin-1"),
        [good(1, "é"), good(2, "ü"), good(3, "雪"), bad(4, "not UTF-8")],
    ),
    "mojibake": (
        "a.jsonl",
        '{"text": "Le cafÃ© est fermÃ©."}\n'.encode(),
        [good(1, "Le cafÃ© est fermÃ©.")],
    ),
    "half-a-pair": (
        "a.jsonl",
        b'{"text": "a \\ud83d b"}\n{"text": "\\ud83d\\ude00"}\n{"te\\udc00xt": "c", "text": "d"}\n',
        [good(1, "a \ufffd b", "lone surrogate"), good(2, "😀"), good(3, "d", "lone surrogate")],
    ),
    "surrogate-bytes": (
        "a.jsonl",
        b'{"text": "ok \xe9\x9b\xaa"}\n{"text": "\xed\xa0\xbd"}\n',
        [good(1, "ok 雪"), bad(2, "not UTF-8")],
    ),
    "array": ("a.json", b'[{"text": "a"}, {"text": "b"}]', [good(1, "a"), good(1, "b")]),
    "array-of-lines": (
        "a.jsonl",
        b'[{"text": "a"},\n{"text": 5},\n{"text": "b"}]\n',
        [good(1, "a"), bad(2, "text is not a string"), good(3, "b")],
    ),
    "array-bom-crlf": (
        "a.json",
        codecs.BOM_UTF8 + b'[\r\n  {\r\n    "text": "a"\r\n  },\r\n  {"text": "b"}\r\n]\r\n',
        [good(2, "a"), good(5, "b")],
    ),
    "array-cr": (
        "a.json",
        b'[\r {"text": "a"},\r {"text": "b"}\r]\r',
        [good(2, "a"), good(3, "b")],
    ),
    "pretty": (
        "a.jsonl",
        b'{\n  "text": "a } \\" {"\n}\n{\n  "text": "\\\\"\n}\n',
        [good(1, 'a } " {'), good(4, "\\")],
    ),
    "unclosed-object": (
        "a.json",
        b'[\n{"text": "a"},\n{"text": "b"',
        [good(2, "a"), bad(3, "broken JSON")],
    ),
    "unclosed-string": (
        "a.json",
        b'[\n{"text": "a"},\n{"text": "b}\n]',
        [good(2, "a"), bad(3, "broken JSON")],
    ),
    "two-on-a-line": (
        "a.jsonl",
        b'{"text": "a"} {"text": "b"}{"text": 5},\n{"text": "c"}\n',
        [
            good(1, "a", "several objects on a line"),
            good(1, "b", "several objects on a line"),
            bad(1, "text is not a string"),
            good(2, "c"),
        ],
    ),
    "two-and-a-half": (
        "a.jsonl",
        b'{"text": "a"} {"text": "b\n{"text": "c"}\n',
        [bad(1, "broken JSON"), good(2, "c")],
    ),
    "cut": ("a.jsonl", b'{"text": "a"}\n{"text": "b', [good(1, "a"), bad(2, "broken JSON")]),
    "python": (
        "a.jsonl",
        b"{'text': 'it\\'s', 'id': None, 'ok': True}\n{'text': [1, }\n",
        [good(1, "it's", "Python spelling"), bad(2, "broken JSON")],
    ),
    "python-code": (
        "a.jsonl",
        b"{'text': __import__('os').getcwd()}\n{'text': 'a' 'b'}\n{'text': 'a'*9}\n",
        [bad(1, "broken JSON"), good(2, "ab", "Python spelling"), bad(3, "broken JSON")],
    ),
    "nan": (
        "a.jsonl",
        b'{"text": "a", "x": NaN}\n{"text": "b", "x": [-Infinity]}\n{"text": NaN}\n',
        [
            good(1, "a", "lenient JSON"),
            good(2, "b", "lenient JSON"),
            bad(3, "text is not a string"),
        ],
    ),
    "huge-numbers": (
        "a.jsonl",
        b'{"text": "a", "x": '
        + b"9" * 30
        + b'}\n{"text": "b", "x": -'
        + b"9" * 6000
        + b'}\n{"text": "c", "x": 1e999}\n',
        [good(1, "a"), good(2, "b", "lenient JSON"), good(3, "c", "lenient JSON")],
    ),
    "control": ("a.jsonl", b'{"text": "a\tb\x01c"}\n', [good(1, "a\tb\x01c", "lenient JSON")]),
    "deep": (
        "a.jsonl",
        b'{"text": "a", "x": '
        + b"[" * 200_000
        + b"]" * 200_000
        + b'}\n{"text": "b"}\n'
        + b'{"text":' * 200_000
        + b"\n",
        [bad(1, "nested too deeply"), good(2, "b"), bad(3, "nested too deeply")],
    ),
    "deep-enough": (
        "a.jsonl",
        b'{"text": "a", "x": ' + b"[" * 150 + b"]" * 150 + b"}\n",
        [good(1, "a")],
    ),
    "long": (
        "a.jsonl",
        dump({"text": "x" * 5_000_000}, {"text": "b"}),
        [good(1, "x" * 5_000_000), good(2, "b")],
    ),
    "u2028": (
        "a.jsonl",
        '{"text": "a\u2028b\u2029c\x85d\u000bf"}\n{"text": "e"}\n'.encode(),
        [good(1, "a\u2028b\u2029c\x85d\u000bf", "lenient JSON"), good(2, "e")],
    ),
    "twice": (
        "a.jsonl",
        b'{"text": "a", "text": "b"}\n{"text": "c", "text": 5}\n',
        [good(1, "b"), bad(2, "text is not a string")],
    ),
    "no-key": (
        "a.jsonl",
        b'{"text": "a"}\n{"content": "x"}\n{}\n{"Text": "x"}\n',
        [good(1, "a"), good(2, "x"), bad(3, 'no "text"'), good(4, "x")],
    ),
    "wrong-types": (
        "a.jsonl",
        (
            b'{"text": "a"}\n{"text": null}\n{"text": ["a"]}\n{"text": {}}\n{"text":'
            b' true}\n5\nnull\n"text"\n["text"]\n[]\n[[]]\n'
        ),
        [
            good(1, "a"),
            bad(2, 'no "text"'),
            *(bad(i, "text is not a string") for i in range(3, 6)),
            *(bad(i, "not an object") for i in range(6, 12)),
        ],
    ),
    "empty-text": (
        "a.jsonl",
        b'{"text": "a"}\n{"text": ""}\n{"text": " \\n\\t"}\n',
        [good(1, "a"), bad(2, "empty text"), bad(3, "empty text")],
    ),
    "control-token": (
        "a.jsonl",
        b'{"text": "a<|im_end|><|endoftext|>b"}\n',
        [good(1, "a<|im_end|>"), good(1, "b")],
    ),
    "nothing": ("a.jsonl", b"[1]\n{\n", [bad(1, "not an object"), bad(2, "broken JSON")]),
    "poem": (
        "a.txt",
        "雪\r\n\r\nSnow <|im_end|>\r\n".encode(),
        [good(1, "雪\n\nSnow <|im_end|>\n")],
    ),
    "rows-in-txt": ("a.txt", b'{"text": "a"}\n{"text": "b"}\n', [good(1, "a"), good(2, "b")]),
}
CHAT = {  # name → (rows, their messages or the reason); each file also has a good row first
    "roles": (
        conversation(dict(**{"from": "human"}, value="2?"), dict(**{"from": "gpt"}, value="Two.")),
        good(2, "2?\nTwo.", "role 'human' for user", "role 'gpt' for assistant"),
    ),
    "roles-case": (
        conversation(message(" User ", "2?"), message("Assistant", "Two.")),
        good(2, "2?\nTwo.", "role ' User ' for user", "role 'Assistant' for assistant"),
    ),
    "roles-zh": (
        conversation(
            message("系统", "好"),
            message("用户", "2?"),
            message("助手", "Two."),
            message("工具", "{}"),
            message("bot", "3"),
        ),
        good(
            2,
            "好\n2?\nTwo.\n{}\n3",
            *(
                f"role '{a}' for {b}"
                for a, b in (
                    ("系统", "system"),
                    ("用户", "user"),
                    ("助手", "assistant"),
                    ("工具", "tool"),
                    ("bot", "assistant"),
                )
            ),
        ),
    ),
    "role-unknown": (conversation(USER, message("asistant", "Two.")), bad(2, "unknown role")),
    "role-number": (conversation(message(5, "2?"), ANSWER), bad(2, "unknown role")),
    "role-missing": (conversation(dict(content="2?"), ANSWER), bad(2, "unknown role")),
    "role-null": (conversation(dict(role=None, content="2?"), ANSWER), bad(2, "unknown role")),
    "order": (
        conversation(ANSWER, ANSWER, USER, USER, ANSWER, message("system", "s"), USER),
        good(2, "Two.\nTwo.\n2?\n2?\nTwo.\ns\n2?"),
    ),
    "empty-question": (conversation(message("user", ""), ANSWER), good(2, "Two.")),
    "empty-answer": (conversation(USER, message("assistant", " \n")), bad(2, "empty answer")),
    "null-answer": (conversation(USER, message("assistant", None)), bad(2, "empty answer")),
    "empty-list": (conversation(), bad(2, "conversations are not a list of messages")),
    "a-string": (dict(conversations="hi"), bad(2, "conversations are not a list of messages")),
    "strings": (conversation("hi", "ho"), good(2, "hi\nho")),
    "null": (dict(conversations=None), bad(2, 'no "conversations"')),
    "content-parts": (
        conversation(message("user", [dict(type="text", text="2?")]), ANSWER),
        good(2, "2?\nTwo."),
    ),
    "content-picture": (
        conversation(message("user", [dict(type="image_url", image_url="2?")]), ANSWER),
        bad(2, "pictures, sound or video"),
    ),
    "system-beside": (
        dict(conversation(USER, ANSWER), system="Be short."),
        good(2, "Be short.\n2?\nTwo."),
    ),
    "alpaca": (
        dict(instruction="Add", input="2", output="4"),
        good(2, "Add\n2\n4", "instruction and output as a conversation"),
    ),
    "alpaca-number": (dict(instruction="Add", output=4), bad(2, "question or answer is no text")),
    "dolly": (
        dict(instruction="When?", context="In 2000.", response="2000"),
        good(2, "When?\nIn 2000.\n2000", "instruction and response as a conversation"),
    ),
    "orca": (
        dict(system_prompt="Be short.", question="2?", response="4"),
        good(2, "Be short.\n2?\n4", "question and response as a conversation"),
    ),
    "history-roles": (
        dict(instruction="3?", output="5", history=[USER, ANSWER]),
        good(2, "2?\nTwo.\n3?\n5", "instruction and output as a conversation"),
    ),
    "history-text": (
        dict(instruction="3?", output="5", history="2?"),
        bad(2, "history is no list"),
    ),
    "input-list": (
        dict(instruction="3?", output="5", input=["2?"]),
        bad(2, "input is not a string"),
    ),
    "system-list": (
        dict(conversation(USER, ANSWER), system=["Be short."]),
        bad(2, "system is not a string"),
    ),
    "system-twice": (
        dict(conversation(message("System", "Be long."), USER, ANSWER), system="Be short."),
        good(2, "Be long.\n2?\nTwo.", "role 'System' for system"),
    ),
    "two-questions": (dict(instruction="Add", question="2?", answer="4"), bad(2, "two questions")),
    "kto": (dict(prompt="2?", completion="5", label=False), bad(2, "answers with a label")),
    "content-number": (
        conversation(USER, message("assistant", 2)),
        bad(2, "content is not a string"),
    ),
    "thought-number": (
        conversation(USER, message("assistant", "2", reasoning_content=2)),
        bad(2, "reasoning_content is not a string"),
    ),
    "no-answer": (conversation(USER), bad(2, "nothing to learn")),
    "think": (
        conversation(USER, message("assistant", "<think>hm</think>2")),
        good(2, "2?\n<think>hm</think>2"),
    ),
    "thought": (
        conversation(USER, message("assistant", "", reasoning_content="hm")),
        good(2, "2?\nhm"),
    ),
    "think-unclosed": (
        conversation(USER, message("assistant", "<think>hm 2")),
        bad(2, "unclosed <think>"),
    ),
    "ultra-unclosed": (
        conversation(USER, message("assistant", "<ultra_think>hm</ultra_think><ultra_think>2")),
        bad(2, "unclosed <ultra_think>"),
    ),
    "call-unclosed": (
        conversation(USER, message("assistant", '<tool_call>{"name": "f"}')),
        bad(2, "unclosed <tool_call>"),
    ),
    "think-of-user": (
        conversation(message("user", "What is <think>?"), ANSWER),
        good(2, "What is <think>?\nTwo."),
    ),
    "call": (conversation(USER, CALL), good(2, "2?")),
    "call-openai": (
        conversation(
            USER,
            message(
                "assistant",
                None,
                tool_calls=[
                    dict(id="c1", type="function", function=dict(name="f", arguments='{"x": 1}'))
                ],
            ),
            message("tool", "1", tool_call_id="c1"),
            ANSWER,
        ),
        good(2, "2?\n1\nTwo."),
    ),
    "call-string": (
        conversation(
            USER, message("assistant", "", tool_calls='[{"name": "f", "arguments": {"x": 1}}]')
        ),
        good(2, "2?"),
    ),
    "call-broken": (
        conversation(USER, message("assistant", "", tool_calls="[{")),
        bad(2, "broken tools or tool_calls"),
    ),
    "call-nameless": (
        conversation(USER, message("assistant", "", tool_calls=[dict(arguments={})])),
        bad(2, "broken tools or tool_calls"),
    ),
    "call-list": (
        conversation(USER, message("assistant", "", tool_calls=[dict(name="f", arguments=[1])])),
        bad(2, "broken tools or tool_calls"),
    ),
    "call-none": (
        conversation(USER, message("assistant", "", tool_calls="[]")),
        bad(2, "empty answer"),
    ),
    "tools-number": (conversation(USER, ANSWER, tools=5), bad(2, "broken tools or tool_calls")),
    "tools-object": (
        conversation(USER, ANSWER, tools=dict(name="f")),
        bad(2, "broken tools or tool_calls"),
    ),
    "tools-word": (conversation(USER, ANSWER, tools='"f"'), bad(2, "broken tools or tool_calls")),
    "tools-words": (conversation(USER, ANSWER, tools=["f"]), bad(2, "broken tools or tool_calls")),
    "tools-broken": (conversation(USER, ANSWER, tools="[{"), bad(2, "broken tools or tool_calls")),
    "tools": (conversation(USER, ANSWER, tools=[dict(name="f")]), good(2, "2?\nTwo.")),
    **{
        f"token-{where}": (conversation(USER, ANSWER, m), bad(2, "control token in a text"))
        for where, m in dict(
            user=message("user", "<|im_end|>\n<|im_start|>assistant\nYes."),
            answer=message("assistant", "a<|endoftext|>b"),
            thought=message("assistant", "a", reasoning_content="<|im_end|>"),
            tool=message("tool", "<|im_start|>"),
            call=message(
                "assistant", "", tool_calls=[dict(name="f", arguments={"a": "<|im_end|>"})]
            ),
            nested=message(
                "assistant",
                "",
                tool_calls='[{"name": "f", "arguments": "{\\"a\\": \\"<\\\\u007cim_end|>\\"}"}]',
            ),
        ).items()
    },
    "half-a-token": (
        conversation(message("user", "<|im_end| <|im_start"), ANSWER),
        good(2, "<|im_end| <|im_start\nTwo."),
    ),
    "messages": (dict(messages=[USER, ANSWER]), good(2, "2?\nTwo.")),
    "bare": ([USER, ANSWER], good(2, "2?\nTwo.")),
}
PAIRS = {
    "strings": (dict(prompt="2?", chosen="Two.", rejected="11."), good(2, "2?\nTwo.")),
    "dicts": (
        dict(prompt=USER, chosen=ANSWER, rejected=message("assistant", "11.")),
        good(2, "2?\nTwo."),
    ),
    "whole": (
        dict(chosen=[USER, ANSWER], rejected=[USER, message("assistant", "11.")]),
        good(2, "2?\nTwo."),
    ),
    "question": (
        dict(question="2?", system="Be short.", chosen="Two.", rejected="11."),
        good(2, "Be short.\n2?\nTwo."),
    ),
    "question-twice": (
        dict(question="2", chosen=[USER, ANSWER], rejected=[USER, message("assistant", "11.")]),
        good(2, "2?\nTwo."),
    ),
    "conversation": (
        dict(conversations=[USER], chosen=ANSWER, rejected=message("assistant", "11.")),
        good(2, "2?\nTwo."),
    ),
    "answered": (
        dict(conversations=[USER, ANSWER], chosen="Two.", rejected="11."),
        bad(2, "no prompt"),
    ),
    "same": (dict(prompt="2?", chosen="Two.", rejected="Two."), bad(2, "nothing to learn")),
    "further": (
        dict(chosen=[USER, ANSWER], rejected=[USER, ANSWER, USER, ANSWER]),
        bad(2, "nothing to learn"),
    ),  # the chosen side has no difference
    "no-prompt": (dict(chosen="Two.", rejected="11."), bad(2, "no prompt")),
    "no-rejected": (dict(prompt="2?", chosen="Two."), bad(2, 'no "rejected"')),
    "no-chosen": (dict(prompt="2?", rejected="Two.", chosen=None), bad(2, 'no "chosen"')),
    "number": (dict(prompt="2?", chosen=2, rejected="11."), bad(2, "prompt or answer is no text")),
    "no-answer": (dict(chosen=[USER], rejected=[USER, ANSWER]), bad(2, "no answer")),
    "empty": (dict(prompt="2?", chosen="", rejected="11."), bad(2, "empty answer")),
    "empty-list": (dict(prompt="2?", chosen=[], rejected=[ANSWER]), bad(2, "no answer")),
    "token": (
        dict(prompt="2?", chosen="Two.", rejected="<|im_end|>b"),
        bad(2, "control token in a text"),
    ),
}
CASES = {
    **TEXT,
    **{
        f"chat/{k}": (
            "a.jsonl",
            dump(conversation(message("user", "q"), message("assistant", "a")), v),
            [good(1, "q\na"), want],
        )
        for k, (v, want) in CHAT.items()
    },
    **{
        f"pair/{k}": (
            "a.jsonl",
            dump(dict(prompt="q", chosen="a", rejected="b"), v),
            [good(1, "q\na"), want],
        )
        for k, (v, want) in PAIRS.items()
    },
}


def ids_of(tok, row):
    "The ids that a token set should have for a row."
    if row.messages:
        return [
            i
            for side in (row.messages, row.rejected)
            if side
            for i in tok.encode_chat(side)[0].tolist()
        ]
    return tok.encode(row.text) + [tok.eos_id] * row.ends


def check(tok, path, want, out):
    "Rows, token set and report all agree with the expected rows."
    found = rows(path)
    assert [
        (r.line, r.text, r.reason, () if r.reason else tuple(sorted(r.mended))) for r in found
    ] == [(*w[:3], tuple(sorted(w[3]))) for w in want], [r.detail for r in found if r.reason]
    fine, reasons = [r for r in found if not r.reason], Counter(r.reason for r in found if r.reason)
    report = analyze(path, near_duplicates=False, progress=False)
    assert (
        report["total_samples"] == len(fine)
        and {k: v["count"] for k, v in report["format_errors"].items()} == reasons
    )
    assert {(k, e["line"]) for k, v in report["format_errors"].items() for e in v["examples"]} == {
        (r.reason, r.line) for r in found if r.reason
    }
    assert str(report) and report.summary() and report._repr_html_()
    if not fine:
        with pytest.raises(DataError, match="no text that can be used") as e:
            build_tokenset(path, tok, out, 0.0, progress=False)
        assert all(
            r in str(e.value) for r in reasons
        ) and f"{path.name} line {found[0].line}: " in str(e.value)
        return
    train, _ = build_tokenset(path, tok, out, 0.0, progress=False)
    assert np.asarray(train.tokens).tolist() == [i for r in fine for i in ids_of(tok, r)]
    assert {k: v["count"] for k, v in train.meta["refused"].items()} == reasons and {
        k: v["count"] for k, v in train.meta["mended"].items()
    } == Counter(m for r in fine for m in r.mended)
    for k, v in train.meta["refused"].items():
        assert v["examples"][0].startswith(
            f"{path.name} line {next(r.line for r in found if r.reason == k)}: "
        )
    if reasons:
        first = next(r for r in found if r.reason)
        with pytest.raises(
            DataError, match=re.escape(f"{path.name} line {first.line}: {first.reason}")
        ):
            build_tokenset(
                path, tok, out.with_name("strict"), 0.0, on_bad_row="error", progress=False
            )


@pytest.mark.parametrize("case", CASES)
def test_defect_gives_a_row_or_a_reason(case, tok, tmp_path):
    name, content, want = CASES[case]
    (tmp_path / name).write_bytes(content)
    check(tok, tmp_path / name, want, tmp_path / "set")


def test_formats_give_the_same_ids(tok):
    "OpenAI's nested calls, MiniMind's string and ours; no text becomes a control token."
    calls = [
        parse_row(dump(CHAT[k][0]), 1)[0].messages[:2]
        for k in ("call", "call-openai", "call-string")
    ]
    assert all(
        tok.encode_chat(c)[0].tolist() == tok.encode_chat(calls[0])[0].tolist() for c in calls
    )
    ends = [tok.id(t) for t in SPECIALS]
    assert not {*tok.encode(parse_row(TEXT["control-token"][1], 1)[0].text)} & {*ends}
    ids = tok.encode_chat(parse_row(dump(CHAT["half-a-token"][0]), 1)[0].messages)[0].tolist()
    assert [ids.count(i) for i in ends] == [0, 2, 2]


def test_unusual_orders_and_damaged_texts_are_counted(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(dump(CHAT["order"][0], CHAT["empty-question"][0]))
    troubles = analyze(tmp_path / "a.jsonl", near_duplicates=False)["troubles"]
    assert {k: v["examples"][0]["line"] for k, v in troubles.items() if "quality" not in k} == {
        "the same role twice in a row": 1,
        "does not begin with a question": 1,
        "ends without an answer": 1,
        "an empty message": 2,
    }
    (tmp_path / "b.jsonl").write_bytes(
        TEXT["mojibake"][1] + dump({"text": "a\ufffdé"}, {"text": "e\u0301"}, {"text": "\x01"})
    )
    assert {
        k: v["examples"][0]["line"]
        for k, v in analyze(tmp_path / "b.jsonl", near_duplicates=False)["encoding_issues"].items()
    } == {
        "mojibake": 1,
        "a lost character (�)": 2,
        "not composed (NFC)": 3,
        "control characters": 4,
    }


def test_given_format_refuses_other_formats(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(
        dump({"text": "a"}, conversation(USER, ANSWER), dict(prompt="2?", chosen="a", rejected="b"))
    )
    reasons = {
        f: [r.reason for r in rows(tmp_path / "a.jsonl", format=f)]
        for f in (None, "pretrain", "conversation", "dpo")
    }
    assert reasons == {
        None: ["", "", ""],
        "pretrain": ["", 'no "text"', 'no "text"'],
        "conversation": ['no "conversations"', "", 'no "conversations"'],
        "dpo": ['no "chosen"', 'no "chosen"', ""],
    }
    with pytest.raises(ValueError, match="format='sft' must be one of pretrain, conversation, dpo"):
        rows(tmp_path / "a.jsonl", format="sft")


REFUSED = {
    "zip": ("a.jsonl", b"PK\x03\x04" + bytes(50), "is a zip archive, not text: unpack it"),
    "lfs": (
        "a.jsonl",
        b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 5\n",
        "is a Git LFS pointer, not text: fetch the real file with `git lfs pull`",
    ),
    "parquet": ("a.json", b"PAR1" + bytes(9), "is a Parquet file"),
    "bzip2": ("a.txt", b"BZh91AY&SY", "is a bzip2 archive"),
    "xz": ("a.xz", b"\xfd7zXZ\0", "is an xz archive"),
    "pickle": ("a.jsonl", b"\x80\x04\x95", "a pickle can run code"),
    "page": ("a.jsonl", b"<!doctype HTML><p>", "is a web page"),
    "picture": ("a.txt", b"\x89PNG\r\n\x1a\n", "is a picture, not text"),
    "empty": ("a.txt", b"", "is empty: 0 bytes"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_binary_files_are_refused(case, tok, tmp_path):
    name, content, words = REFUSED[case]
    (tmp_path / name).write_bytes(content)
    for use in (
        inspect_file,
        rows,
        lambda p: analyze(p, near_duplicates=False),
        lambda p: build_tokenset(p, tok, tmp_path / "set"),
    ):
        with pytest.raises(DataError) as e:
            use(tmp_path / name)
        assert str(e.value).startswith(f"{tmp_path / name} ") and words in str(e.value)


def test_text_that_starts_like_an_archive_is_read(tmp_path):
    for begin in ("Bzh is short for Breizh.", "Par1 and par2 are files.", "rar! said the lion."):
        (tmp_path / "a.txt").write_text(begin)
        assert [r.text for r in rows(tmp_path / "a.txt")] == [begin]


# --- encodings, compression, layouts, line ends ---------------------------------------------------
ANY = st.text(
    st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="\ufeff"), max_size=30
).map(lambda s: "x" + s)
OF = {
    "gb18030": st.sampled_from(
        [
            "雪落在磨坊上。",
            "从前有一只猫，住在花园里。",
            "今天天气很好，我们去公园玩。",
            "他说：“你好！”",
            "Snow",
            "fell",
            "on",
            "the",
            "mill.",
            "请将下面的句子翻译成英文",
            "小明有5个苹果",
        ]
    ),
    "cp1252": st.sampled_from(
        [
            "Le café est fermé à midi.",
            "Où êtes-vous allé cet été?",
            "Die Straße führt über die Brücke.",
            "El niño pequeño comió una manzana.",
            "Snow fell on the mill.",
            "C’est déjà l’été – quelle chaleur!",
        ]
    ),
    "utf-16-le": (
        st.text(st.sampled_from("abcdefghij klmnop,.雪落在磨坊éü"), min_size=5, max_size=40).map(
            lambda s: "Snow " + s
        )
    ),
    **dict.fromkeys(("utf-8", "utf-8-sig", "utf-16", "utf-16-be-bom"), ANY),
}
OF["utf-16-be"] = OF["utf-16-le"]
PACK = {
    "": lambda b: b,
    "gzip": gzip.compress,
    "zstd": zstandard.compress,
    "members": lambda b: gzip.compress(b[: len(b) // 2]) + gzip.compress(b[len(b) // 2 :]),
    "frames": lambda b: zstandard.compress(b[:9]) + zstandard.compress(b[9:]),
}


def encoded(text, encoding):
    return (
        codecs.BOM_UTF16_BE + text.encode("utf-16-be")
        if encoding == "utf-16-be-bom"
        else text.encode(encoding)
    )


@pytest.mark.parametrize("encoding", OF)
@given(st.data())
@settings(max_examples=60)
def test_encodings_give_the_same_texts(tmp_path_factory, encoding, data):
    """Each encoding × line end × compression × layout, under any name:

    the same texts from the same lines.
    """
    texts = data.draw(st.lists(OF[encoding], min_size=3, max_size=12)) + {
        "gb18030": ["雪落在磨坊上。"],
        "cp1252": ["Le café est fermé à midi.", "Où êtes-vous?"],
    }.get(encoding, ["end"])
    end, packed, name = (
        data.draw(st.sampled_from(["\n", "\r\n", "\r"])),
        data.draw(st.sampled_from([*PACK])),
        data.draw(
            st.sampled_from(
                ["a.jsonl", "a.txt", "a.json", "a.jsonl.gz", "a.txt.zst", "a.jsonl.zst"]
            )
        ),
    )
    path = tmp_path_factory.getbasetemp() / f"{encoding}-{name}"
    lines = (
        texts if ".txt" in name else [json.dumps({"text": t}, ensure_ascii=False) for t in texts]
    )
    if name == "a.json":
        lines = ["[", *(l + "," for l in lines[:-1]), lines[-1], "]"]
    path.write_bytes(PACK[packed](encoded("".join(l + end for l in lines), encoding)))
    look, found = inspect_file(path), rows(path)
    assert not [r for r in found if r.reason] and (look.newline, look.packed) == (
        {"\n": "LF", "\r\n": "CRLF", "\r": "CR"}[end],
        {"members": "gzip", "frames": "zstd"}.get(packed, packed),
    )
    if ".txt" in name:
        assert [(r.line, r.text, r.ends) for r in found] == [
            (1, "".join(t + "\n" for t in texts), True)
        ]
    else:
        assert [(r.line, r.text) for r in found] == [
            (i, t) for i, t in enumerate(texts, 2 if name == "a.json" else 1)
        ]


def test_chinese_utf_16_without_a_bom(tmp_path):
    "一 is U+4E00: one of its bytes is zero."
    texts = ["天下之事，一言难尽。从前有一座山，山上有一座庙，庙里有一个老和尚。" * 3] * 40
    for encoding in ("utf-16-le", "utf-16-be"):
        (tmp_path / "a.jsonl").write_bytes(
            "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts).encode(
                encoding
            )
        )
        (tmp_path / "a.txt").write_bytes("\n".join(texts).encode(encoding))
        assert [r.text for r in rows(tmp_path / "a.jsonl")] == texts and "".join(
            r.text for r in rows(tmp_path / "a.txt")
        ) == "\n".join(texts)


def test_one_nul_byte_is_not_utf_16(tmp_path):
    for content in (b'{"text": "a\0b"}\n{"text": "c"}\n', b'{"text": "ab\0"}\n{"text": "c"}\n'):
        (tmp_path / "a.jsonl").write_bytes(content)
        assert [r.text.replace("\0", "") for r in rows(tmp_path / "a.jsonl")] == ["ab", "c"]


@pytest.mark.parametrize(
    "encoding,texts",
    [
        ("gb18030", ["Title", "雪落在磨坊上，从前有一只猫。"]),
        ("cp1252", ["Title", "Le café est fermé à midi, où êtes-vous?"]),
    ],
)
def test_last_line_counts_for_the_encoding(tmp_path, encoding, texts):
    "The last line has no line end."
    (tmp_path / "a.txt").write_bytes("\n".join(texts).encode(encoding))
    (tmp_path / "a.jsonl").write_bytes(
        "\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts).encode(encoding)
    )
    assert [r.text for r in rows(tmp_path / "a.txt")] == ["\n".join(texts)] and [
        r.text for r in rows(tmp_path / "a.jsonl")
    ] == texts


def test_truncated_archives_are_reported(tok, tmp_path):
    "At any position: the defect is reported, and the part is not treated as complete."
    whole = dump(*({"text": f"row {i} {random.Random(i).random()}"} for i in range(3000)))
    for name, packed in (
        ("a.jsonl.gz", gzip.compress(whole)),
        ("a.jsonl", gzip.compress(whole)),
        ("a.jsonl.zst", zstandard.compress(whole)),
    ):
        for share in (0.1, 0.5, 0.99):
            (tmp_path / name).write_bytes(packed[: int(len(packed) * share)])
            for use in (
                rows,
                lambda p: build_tokenset(p, tok, tmp_path / "set", progress=False),
                lambda p: analyze(p, near_duplicates=False),
            ):
                with pytest.raises(
                    DataError,
                    match=f"{name} is cut off or damaged after line .*download the file again",
                ):
                    use(tmp_path / name)
    damaged = bytearray(gzip.compress(whole))
    damaged[len(damaged) // 2] ^= 255
    (tmp_path / "b.gz").write_bytes(damaged)
    with pytest.raises(DataError, match="b.gz is cut off or damaged"):
        rows(tmp_path / "b.gz")


# --- arrays ---------------------------------------------------------------------------------------
def difficult_text(rng, n=40):
    return (
        "".join(
            rng.choice(
                [
                    '"',
                    "\\",
                    "{",
                    "}",
                    "[",
                    "]",
                    ",",
                    ":",
                    "\n",
                    "\t",
                    "雪",
                    "😀",
                    "a",
                    '"}',
                    '{"text": "',
                    "\\\\",
                    "\u2028",
                ]
            )
            for _ in range(rng.randint(1, n))
        )
        + "."
    )


def array(rng, n):
    "A JSON array as text, its texts, and the lines where its objects start."
    out, texts, at = ["["], [], []
    for i in range(n):
        texts.append(difficult_text(rng))
        out.append(rng.choice(["", "\n", "\n\n  ", " \r\n\t"]))
        at.append("".join(out).count("\n") + 1 if n < 50 else None)
        out.append(
            json.dumps(
                {"id": {"n": [i, {}]}, "text": texts[-1]},
                indent=rng.choice([None, 0, 1, 4]),
                ensure_ascii=rng.random() < 0.5,
            )
            + rng.choice(["", " ", "\n"])
            + "," * (i < n - 1)
        )
    return "".join(out) + rng.choice(["]", "\n]\n"]), texts, at


@pytest.mark.parametrize("seed", range(12))
def test_arrays_give_all_rows(seed, tmp_path, monkeypatch):
    """Pretty-printed in many ways, braces and quotes in the texts, and chunk borders at every
    position.
    """
    rng = random.Random(seed)
    text, texts, at = array(rng, rng.randint(1, 30))
    assert json.loads(text)
    if rng.random() < 0.5:
        text = "[\n" + text[1:]
        at = [a + 1 for a in at]  # its first line shows that it is an array
    else:
        text = "[{}, " + text[1:]
        texts.insert(0, "")
        at.insert(0, 1)
    (tmp_path / "a.json").write_text(text, encoding="utf-8", newline="")
    whole = rows(tmp_path / "a.json")
    assert [(r.line, r.text) for r in whole] == [*zip(at, texts)] and [
        r.reason for r in whole if r.text == ""
    ] == ['no "text"'] * texts.count("")
    once = formats.open_data

    class SmallReads:
        def __init__(self, f):
            self.f = f

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.f.close()

        def read(self, n):
            return self.f.read(rng.randint(1, 9))

    monkeypatch.setattr(formats, "open_data", lambda *a: SmallReads(once(*a)))
    assert rows(tmp_path / "a.json") == whole == rows(tmp_path / "a.json", size=50)


def test_large_array_is_read(tmp_path):
    "Of several chunks."
    text, texts, _ = array(random.Random(0), 30_000)
    assert len(text.encode()) > 3 << 20
    (tmp_path / "a.json").write_text("[\n" + text[1:], encoding="utf-8", newline="")
    found = rows(tmp_path / "a.json")
    assert [r.text for r in found] == texts and sum(r.line for r in found[-1:]) <= text.count(
        "\n"
    ) + 2
    numbers = [b.numbers for b in read_blocks(tmp_path / "a.json")]
    assert len(numbers) > 2 and sorted(n for b in numbers for n in b) == [
        n for b in numbers for n in b
    ]


@pytest.mark.parametrize(
    "content",
    [
        b'[\n{"text": "a"},\n"\n{"text": "b"},\n{"text": "c"}\n]',
        b'[\n{"text": "a"}, 5, null,\n"a text"\n]',
        b'[\n"a text",\n"another"\n]',
        b'[\n{"text": "a"},\n}, {"text": "b"}\n]',
    ],
    ids=["quote", "values", "strings", "brace"],
)
def test_everything_in_an_array_is_counted(content, tmp_path):
    "Whatever is not an object gets a reason, and so does everything that is lost with it."
    (tmp_path / "a.json").write_bytes(content)
    found = rows(tmp_path / "a.json")
    assert [r for r in found if r.reason], found


def test_array_under_another_extension(tmp_path):
    for name in ("A.JSON", "ROWS.JSONL", "a.jsonl.GZ"):
        (tmp_path / name).write_bytes(
            (gzip.compress if name.endswith("GZ") else bytes)(
                b'[\n  {"text": "a"},\n  {"text": "b"}\n]\n'
            )
        )
        assert [(r.line, r.text) for r in rows(tmp_path / name)] == [(2, "a"), (3, "b")], name


def test_conversation_as_a_bare_list(tmp_path):
    "Alone in its file, it is read as among others."
    for n in (1, 2):
        (tmp_path / "a.jsonl").write_bytes(dump([USER, ANSWER]) * n)
        assert [(r.line, r.kind, r.reason) for r in rows(tmp_path / "a.jsonl")] == [
            (i, "conversation", "") for i in range(1, n + 1)
        ]


# --- long rows ------------------------------------------------------------------------------------
def test_too_long_rows_and_texts(tmp_path, monkeypatch):
    "A row is refused, a text is split between two characters, an unterminated object is an error."
    monkeypatch.setattr(formats, "LONGEST", 1000)
    (tmp_path / "a.jsonl").write_bytes(
        dump(
            {"text": "a"},
            {"text": "x" * 5000},
            {"text": "b"},
            {"text": "x" * 900},
            {"text": "x" * 1000},
        )[:-1]
    )
    assert [(r.line, r.reason, len(r.text)) for r in rows(tmp_path / "a.jsonl")] == [
        (1, "", 1),
        (2, "row too long", 0),
        (3, "", 1),
        (4, "", 900),
        (5, "row too long", 0),
    ]
    text = "😀雪é" * 2000 + "\nnext\n"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    blocks = [*read_blocks(tmp_path / "a.txt")]
    assert (
        "".join(r.text for r in rows(tmp_path / "a.txt")) == text
        and max(len(l) for b in blocks for l in b.lines) < 1004
        and blocks[-1].numbers[-1] == 2
    )
    (tmp_path / "a.json").write_bytes(
        b'[\n{"text": "a"},\n{"text": "b", \n' + b'{"text": "c"},\n' * 100_000
    )
    with pytest.raises(DataError, match="a.json: the object on line 3 has no end"):
        rows(tmp_path / "a.json")


def test_pieces_of_a_text_join_to_the_text(tmp_path, tok):
    "The pieces joined are the text, and a document ends with the file, whatever its last line is."
    rng = random.Random(0)
    for i in range(40):
        text = "".join(
            rng.choice(
                ["\n", "word " * rng.randint(1, 300) + "\n", "雪" * rng.randint(1, 900) + "\n"]
            )
            for _ in range(rng.randint(1, 60))
        ) + rng.choice(["", "\n", "\n\n", "end"])
        if not text:
            continue
        (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
        found = rows(tmp_path / "a.txt", size=rng.choice([100, 5000, 1 << 20]))
        assert "".join(r.text for r in found) == text
        assert [r.ends for r in found] == [False] * (len(found) - 1) + [True], (i, text[-9:])
        assert [r.line for r in found] == [
            1 + "".join(r.text for r in found[:k]).count("\n") for k in range(len(found))
        ]
    (tmp_path / "a.txt").write_text("one\n<|endoftext|>\ntwo\n")
    (tmp_path / "b.txt").write_text("three")
    assert [(r.line, r.text, r.ends) for r in rows(tmp_path / "a.txt")] == [
        (1, "one\n", True),
        (3, "two\n", True),
    ]
    assert np.asarray(
        build_tokenset([tmp_path / "a.txt", tmp_path / "b.txt"], tok, tmp_path / "set", 0.0)[
            0
        ].tokens
    ).tolist() == [i for t in ("one\n", "two\n", "three") for i in tok.encode(t) + [tok.eos_id]]


def test_long_line_takes_little_memory(tmp_path):
    "60 MB in one line are read in a few MB."
    with open(tmp_path / "a.json", "wb") as f:
        f.write(b"[{}")
        for _ in range(60):
            f.write(b"".join([b', {"text": "' + b"x" * 1000 + b'"}'] * 1000))
        f.write(b"]")
    code = (
        "import resource, sys; from minigpt.data.readers import *; m = lambda:"
        " resource.getrusage(resource.RUSAGE_SELF).ru_maxrss>>10; a = m(); print(sum(not r.reason"
        " for b in read_blocks(sys.argv[1]) for r in parse_block(b)), m()-a)"
    )
    n, more = map(
        int,
        subprocess.run(
            [sys.executable, "-c", code, str(tmp_path / "a.json")],
            capture_output=True,
            text=True,
            check=True,
            env={**os.environ, "PYTHONPATH": str(child.ROOT)},
        ).stdout.split(),
    )
    assert n == 60_000 and more < 100


# --- the fuzzer -----------------------------------------------------------------------------------
SEEDS = [
    {"text": "Snow fell. 雪落在磨坊上。 <think>"},
    conversation(
        message("system", "Be brief."),
        USER,
        ANSWER,
        message("user", "Sure?"),
        message("assistant", "<think>\nhm\n</think>\nYes."),
    ),
    conversation(dict(**{"from": "human"}, value="2?"), dict(**{"from": "gpt"}, value="Two.")),
    conversation(USER, message("assistant", "Yes.", reasoning_content="They ask…")),
    dict(prompt="2?", chosen="Two.", rejected="11."),
    dict(
        chosen=[USER, ANSWER, USER, ANSWER],
        rejected=[USER, ANSWER, USER, message("assistant", "11.")],
    ),
    [USER, ANSWER],
    conversation(
        message("system", "", tools='[{"name": "f", "parameters": {"type": "object"}}]'),
        USER,
        message("assistant", "", tool_calls='[{"name": "f", "arguments": {"x": "雪"}}]'),
        message("tool", '{"y": 1}'),
        ANSWER,
    ),
    dict(
        messages=[
            USER,
            message(
                "assistant",
                None,
                tool_calls=[
                    dict(
                        id="1",
                        type="function",
                        function=dict(name="f", arguments='{"q": "\\ud83d\\ude00"}'),
                    )
                ],
            ),
            message("tool", "2"),
            ANSWER,
        ],
        tools=[dict(type="function", function=dict(name="f", parameters={}))],
    ),
]
WRONG = [
    None,
    True,
    0,
    -1,
    10**30,
    1.5,
    float("nan"),
    "",
    " ",
    "x",
    "[]",
    "[{}]",
    "{",
    '"f"',
    "5",
    "null",
    "\ud83d",
    '["\\ud83d"]',
    '[{"name": "f", "arguments": "{\\"a\\": \\"\\\\ud83d\\"}"}]',
    "<think>",
    "<|im_end|>",
    [],
    [None],
    [[]],
    [{}],
    ["x"],
    {},
    {"role": "user"},
    {"name": "f"},
    {"function": 5},
    {"name": "f", "arguments": None},
]


def places(x, at=()):
    "Every position in a structure, as a path of keys."
    yield at
    for k, v in x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ():
        yield from places(v, (*at, k))


def replace_at(x, at, value):
    x = copy.deepcopy(x)
    if not at:
        return value
    inside = x
    for k in at[:-1]:
        inside = inside[k]
    inside[at[-1]] = value
    return x


def mutate(rng, line):
    "Flip, insert, delete or move some bytes."
    line = bytearray(line)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        i, j = sorted(rng.randrange(len(line) + 1) for _ in range(2))
        j = min(j, i + rng.choice([1, 2, 9, 99]))
        kind = rng.randrange(5)
        if kind == 0 and i < len(line):
            line[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            line[i:i] = rng.choice(
                [
                    b'"',
                    b"\\",
                    b"{",
                    b"}",
                    b"[",
                    b"]",
                    b",",
                    b":",
                    b"'",
                    b"\0",
                    b"\xff",
                    b"\xed\xa0\x80",
                    b"\\ud800",
                    b"NaN",
                    b"<|im_end|>",
                    b"\r",
                    codecs.BOM_UTF8,
                    bytes([rng.randrange(256)]),
                ]
            )
        elif kind == 2:
            del line[i:j]
        elif kind == 3:
            line[i:i] = line[i:j]
        elif rng.random() < 0.3:
            del line[i:]
        else:
            del line[i : i + 1]
    return bytes(line).replace(b"\n", b" ")


def garbage():
    rng = random.Random(0)
    lines = [json.dumps(s, ensure_ascii=rng.random() < 0.5).encode() for s in SEEDS]
    out = [mutate(rng, rng.choice(lines)) for _ in range(2000)]
    out += [
        json.dumps(replace_at(s, at, w)).encode() for s in SEEDS for at in places(s) for w in WRONG
    ]
    return out


def deep(n):
    return "[" * n + "]" * n


DEEP = [
    '{"conversations": D}',
    '{"conversations": [{"role": D, "content": "x"}]}',
    '{"conversations": [{"role": "user", "content": D}]}',
    (
        '{"conversations": [{"role": "user", "content": "x", "z": D}, {"role": "assistant",'
        ' "content": "y"}]}'
    ),
    '{"conversations": [{"role": "assistant", "content": "", "tool_calls": D}]}',
    (
        '{"conversations": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f",'
        ' "arguments": {"a": D}}]}]}'
    ),
    '{"conversations": [{"role": "assistant", "content": "y"}], "tools": D}',
    '{"text": D}',
    '{"prompt": D, "chosen": "a", "rejected": "b"}',
    (
        '{"chosen": [{"role": "user", "content": "x", "z": D}, {"role": "assistant", "content":'
        ' "y"}], "rejected": [{"role": "user", "content": "x", "z": D}, {"role": "assistant",'
        ' "content": "z"}]}'
    ),
]


def defect_of(tok, line):
    "Return what is wrong with the result of a line; '' if nothing is."
    try:
        for r in parse_row(line, 7):
            if (
                not isinstance(r, Row)
                or r.line != 7
                or bool(r.reason) == bool(r.text or r.messages)
            ):
                return f"{r}"
            for side in (r.messages, r.rejected):
                if r.reason or side is None:
                    continue
                ids, learn = tok.encode_chat(side)
                whole = tok.encode(tok.render(side), special=True)
                # A mark in a question or a schema is plain letters in the ids, and a token in the
                # text.
                asks = lambda m: m["role"] in ("user", "tool") or m.get("tools")
                asked = "".join(str(m) for m in side if asks(m))
                spelled = any(mark in asked for mark in MARKS)
                same = tok.decode(ids) == tok.decode(whole) if spelled else ids.tolist() == whole
                if not (len(ids) == len(learn) and learn.any() and same):
                    return f"rendering of {side}"
            if not r.reason and not r.messages:
                tok.encode(r.text)
    except Exception as e:
        return f"{type(e).__name__}: {str(e)[:90]}"
    return ""


def test_fuzzed_bytes_give_rows_or_reasons(tok):
    "Any bytes give a row or a reason, and every good row can be encoded."
    crashed = [(line[:200], t) for line in garbage() if (t := defect_of(tok, line))]
    assert not crashed, (len(crashed), Counter(t for _, t in crashed).most_common(5), crashed[:3])


@pytest.mark.parametrize("n", [300, 900, 960, 990, 1005, 1015, 1020, 5000])
def test_deep_nesting_gives_rows_or_reasons(tok, n):
    "Near the limits of Python and of orjson."
    crashed = [
        (line, t) for line in DEEP if (t := defect_of(tok, line.replace("D", deep(n)).encode()))
    ]
    assert not crashed, crashed


def test_fuzzed_files_are_counted_completely(tok, tmp_path):
    "A file of garbage is counted to the last row, and its good rows form a token set."
    lines = [l for l in garbage() if l.strip()]
    random.Random(1).shuffle(lines)
    lines = (
        dump(*[conversation(message("user", "雪" * 40), ANSWER)] * 600).splitlines() + lines
    )  # enough bytes first to make the encoding clear
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = [r for i, l in enumerate(lines, 1) for r in parse_row(l, i)]
    fine, reasons = sum(not r.reason for r in found), Counter(r.reason for r in found if r.reason)
    report = analyze(tmp_path / "a.jsonl", tokenizer=None, progress=False)
    assert (
        report["total_samples"] == fine
        and {k: v["count"] for k, v in report["format_errors"].items()} == reasons
        and fine > 500 < sum(reasons.values())
    )
    train, _ = build_tokenset(tmp_path / "a.jsonl", tok, tmp_path / "set", 0.0, progress=False)
    refused = {k: v["count"] for k, v in train.meta["refused"].items()}
    assert train.meta["n_docs"] + refused.pop("another format") == fine and refused == reasons


def test_sample_of_a_line_with_several_objects(tmp_path):
    "A refused object before a good one."
    (tmp_path / "a.jsonl").write_bytes(b'{"x": 1} {"text": "a text that is good"}\n')
    report = analyze(tmp_path / "a.jsonl", near_duplicates=False)
    assert report["total_samples"] == 1 and [r.text for _, r in report["samples"]] == [
        "a text that is good"
    ]


@pytest.mark.parametrize(
    "name",
    [
        "dpo",
        "dpo_minimind",
        "identity",
        "pretrain_en",
        "pretrain_zh",
        "reasoning",
        "sft_en",
        "sft_zh",
        "tool_calling",
        "tool_calling_minimind_str",
    ],
)
def test_real_files_are_accepted(name, tok):
    "At least 99.5% are accepted, and a sample of them encodes."
    if not (f := SHARED / f"{name}.jsonl").exists():
        pytest.skip(
            "needs real rows, which are not in the repository: put"
            f" {name}.jsonl into ../shared/data"
        )
    found = rows(f)
    fine = [r for r in found if not r.reason]
    assert len(fine) >= 0.995 * len(found) > 0, [
        (r.line, r.reason, r.detail) for r in found if r.reason
    ][:5]
    assert {r.kind for r in fine} == {
        "preference" if "dpo" in name else "text" if "pretrain" in name else "conversation"
    }
    for r in random.Random(0).sample(fine, min(len(fine), 60)):
        for side in (r.messages, r.rejected):
            if side:
                assert tok.encode_chat(side)[1].any()
        if not r.messages:
            assert tok.decode(tok.encode(r.text)) == r.text
