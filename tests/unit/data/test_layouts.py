"""Data formats in the wild: each layout is recognized, or refused by name.

Whatever is skipped is reported.
"""

import json

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from minigpt.data import readers as formats
from minigpt.data.preparation import prepare, prepare_summary
from minigpt.data.quality import analyze, clean
from minigpt.data.readers import (
    DataError,
    count_read,
    inspect_file,
    parse_block,
    parse_row,
    read_blocks,
    read_table,
    reading,
)
from minigpt.data.tokensets import build_tokenset, check_size, data_files
from minigpt.tokenizer.bpe import train_tokenizer
from tests.harness import kill_child as child

U, A = dict(role="user", content="2?"), dict(role="assistant", content="Two.")
CALL = dict(name="f", arguments=dict(a=1))


@pytest.fixture(scope="module")
def tok():
    return train_tokenizer(
        ["Questions and answers. 问题和答案。 <think> 1 + 1 = 2 </think> def f(x): return"] * 9,
        vocab_size=300,
    )


def row(value, **how):
    "The single row of a line."
    (found,) = parse_row(json.dumps(value, ensure_ascii=False).encode(), 1, **how)
    return found


def make_messages(*pairs):
    return [
        dict(role=dict(u="user", a="assistant", s="system", t="tool")[r], content=c)
        for r, c in pairs
    ]


def messages_of(r):
    return [
        dict(
            role=m["role"],
            content=m["content"],
            **{k: m[k] for k in ("reasoning_content", "weight") if k in m},
        )
        for m in r.messages
    ]


def write(path, *rows):
    path.write_text(
        "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8"
    )
    return path


QA, TWO = [("u", "2?"), ("a", "Two.")], [("u", "2?"), ("a", "Two."), ("u", "3?"), ("a", "Three.")]
READ = {  # name → (row, its messages, its skipped columns)
    "firefly": (
        dict(
            conversation_id=1,
            category="x",
            conversation=[dict(human="2?", assistant="Two."), dict(human="3?", assistant="Three.")],
        ),
        TWO,
        ["conversation_id", "category"],
    ),
    "xtuner": (
        dict(conversation=[dict(system="Be short.", input="2?", output="Two.")]),
        [("s", "Be short."), *QA],
        [],
    ),
    "lmsys": (
        dict(conversation_id="x", model="v", conversation=[U, A], turn=1, redacted=False),
        QA,
        ["conversation_id", "model", "turn", "redacted"],
    ),
    "wildchat": (
        dict(conversation=[dict(U, country="DE"), dict(A, toxic=False)], model="m"),
        QA,
        ["model", "country of messages", "toxic of messages"],
    ),
    "ultrachat": (dict(id="0", data=["2?", "Two.", "3?", "Three."]), TWO, ["id"]),
    "pairs": (dict(conversations=[["2?", "Two."], ["3?", "Three."]]), TWO, []),
    "columns": (dict(conversations={"from": ["human", "gpt"], "value": ["2?", "Two."]}), QA, []),
    "json-string": (dict(messages=json.dumps([U, A])), QA, []),
    "input-output": (dict(input="2?", output="Two."), QA, []),
    "flan": (dict(inputs="2?", targets="Two.", task="t"), QA, ["task"]),
    "solution": (dict(problem="2?", solution="Two.", answer="2"), QA, ["answer"]),
    "zh": (dict(问题="2?", 回答="Two."), QA, []),
    "zh-alpaca": (dict(指令="2?", 输入="", 输出="Two."), QA, []),
    "capitals": (dict(Instruction="2?", Response="Two."), QA, []),
    "Question": (dict(Question="2?", Answer="Two."), QA, []),
    "user-assistant": (dict(user="2?", assistant="Two."), QA, []),
    "end-token": (dict(prompt="2?", completion="Two.</s>"), QA, []),
    "end-tokens": (dict(prompt="2?", completion="Two. <|im_end|>\n<|endoftext|>\n"), QA, []),
    "eos": (dict(messages=[U, dict(A, content="Two.<eos>")]), QA, []),
    "parts-value": (
        dict(messages=[dict(role="user", content=[dict(type="text", value="2?")]), A]),
        QA,
        [],
    ),
    "parts-strings": (dict(messages=[dict(role="user", content=["2", "?"]), A]), QA, []),
    "roles": (
        dict(messages=[dict(role="developer", content="s"), U, dict(role="model", content="Two.")]),
        [("s", "s"), *QA],
        [],
    ),
    "chatgpt": (
        dict(
            conversations=[{"from": "human", "value": "2?"}, {"from": "chatgpt", "value": "Two."}]
        ),
        QA,
        [],
    ),
    "text-key": (
        dict(messages=[dict(role="user", text="2?"), dict(role="assistant", text="Two.")]),
        QA,
        [],
    ),
    "null-columns": (
        dict(
            conversations=None,
            messages=[U, A],
            text=None,
            chosen=None,
            rejected=[],
            prompt="",
            source="web",
        ),
        QA,
        ["source"],
    ),
    "null-messages": (
        dict(messages=[], instruction="2?", input=None, output="Two.", history=[], system=None),
        QA,
        [],
    ),
    "refusal": (dict(messages=[U, dict(role="assistant", content=None, refusal="Two.")]), QA, []),
    "viewer": (dict(row_idx=0, row=dict(messages=[U, A]), truncated_cells=[]), QA, []),
    "options": (
        dict(question="2?", options=["1", "2"], answer="B"),
        [("u", "2?\nA. 1\nB. 2"), ("a", "B")],
        [],
    ),
    "options-inside": (
        dict(question="2? A. one B. two", choices=dict(A="one", B="two"), answer="B"),
        [("u", "2? A. one B. two"), ("a", "B")],
        [],
    ),
    "options-arc": (
        dict(question="2?", choices=dict(text=["1", "2"], label=["A", "B"]), answer="B"),
        [("u", "2?\nA. 1\nB. 2"), ("a", "B")],
        [],
    ),
    "zh-prompt": (dict(提示="2?", 回复="Two."), QA, []),
    "zh-exercise": (dict(题目="2?", 解答="Two."), QA, []),
    "q-a": (dict(q="2?", a="Two."), QA, []),
    "langchain": (
        dict(messages=[dict(type="human", content="2?"), dict(type="ai", content="Two.")]),
        QA,
        [],
    ),
    "capital-keys": (
        dict(Messages=[dict(Role="user", Content="2?"), dict(Role="Assistant", Content="Two.")]),
        QA,
        [],
    ),
    "speaker": (
        dict(
            dialogue=[dict(speaker="user", utterance="2?"), dict(speaker="gpt-4", utterance="Two.")]
        ),
        QA,
        [],
    ),
    "belle": (
        dict(instruction="Human:2?\nAssistant:Two.\nHuman:3?\nAssistant:", output="Three."),
        TWO,
        [],
    ),
    "options-columns": (
        dict(Question="2?", A="1", B="2", C="3", Answer="B"),
        [("u", "2?\nA. 1\nB. 2\nC. 3"), ("a", "B")],
        [],
    ),
    "firefly-input": (dict(kind="x", input="2?", target="Two."), QA, ["kind"]),
    "shouting": (dict(INSTRUCTION="2?", RESPONSE="Two.", SOURCE="x"), QA, ["SOURCE"]),
    "lima": (dict(conversations=["2?", "Two."], source="x"), QA, ["source"]),
    "slim-orca": (
        dict(
            conversations=[
                {"from": "human", "value": "2?", "weight": 0},
                {"from": "gpt", "value": "Two.", "weight": 1},
            ]
        ),
        QA,
        [],
    ),
    "answer-in-solution": (dict(question="2?", answer="Two", response="Two."), QA, ["answer"]),
    "system-unused": (
        dict(system="x", messages=[dict(role="system", content="s"), U, A]),
        [("s", "s"), *QA],
        ["system"],
    ),
    "mark-in-capitals": (
        dict(messages=[U, dict(A, content="<Think>x</THINK>Two.")]),
        [("u", "2?"), ("a", "<think>x</think>Two.")],
        [],
    ),
    "wrapped-results": (
        dict(
            messages=[
                U,
                dict(role="assistant", content="", tool_calls=[CALL]),
                dict(
                    role="tool",
                    content=(
                        "<tool_response>\n1\n</tool_response>\n<tool_response>2</tool_response>"
                    ),
                ),
                A,
            ]
        ),
        [("u", "2?"), ("a", ""), ("t", "1"), ("t", "2"), ("a", "Two.")],
        [],
    ),
    "glaive": (
        dict(
            system='SYSTEM: You have functions -\n{\n "name": "f"\n}\n',
            chat="USER: 2?\n\n\nASSISTANT: Two. <|endoftext|>\n\n\n",
        ),
        [("s", "You have functions"), *QA],
        [],
    ),
}


@pytest.mark.parametrize("name", READ)
def test_layout_is_read(name):
    value, want, left = READ[name]
    r = row(value)
    assert (
        not r.reason and messages_of(r) == make_messages(*want) and sorted(r.unread) == sorted(left)
    ), r


def test_text_layouts_are_read():
    for value, want in (
        (dict(Text="雪"), "雪"),
        (dict(title="t", content="雪"), "雪"),
        (dict(正文="雪"), "雪"),
        (dict(text="雪", conversations=None, chosen=[]), "雪"),
        (dict(text="雪", content="other", label=1), "雪"),
        (dict(text="雪", images=["https://a/b.png"]), "雪"),
    ):
        r = row(value)
        assert (r.kind, r.text, r.unread) == (
            "text",
            want,
            tuple(k for k in value if k in ("title", "label", "images") or value[k] == "other"),
        ), value


PAIRS = {
    "hh": dict(
        chosen="\n\nHuman: 2?\n\nAssistant: Two.", rejected="\n\nHuman: 2?\n\nAssistant: 11."
    ),
    "rejected_response": dict(question="2?", response="Two.", rejected_response="11."),
    "rejected_answer": dict(question="2?", answer="Two.", rejected_answer="11."),
    "bad_response": dict(instruction="2?", output="Two.", bad_response="11."),
    "ms-swift": dict(messages=[U, A], rejected_response="11."),
    "better-worse": dict(instruction="2?", input="", output=["Two.", "11."]),
    "better": dict(prompt="2?", better="Two.", worse="11."),
    "null": dict(prompt="2?", chosen="Two.", rejected="11.", messages=None, conversations=[]),
    "sharegpt": dict(
        conversations=[{"from": "human", "value": "2?"}],
        chosen={"from": "gpt", "value": "Two."},
        rejected={"from": "gpt", "value": "11."},
    ),
    "prompt-strip": dict(prompt=" 2?", chosen=[U, A], rejected=[U, dict(A, content="11.")]),
    "hh-prompt": dict(prompt="\n\nHuman: 2?\n\nAssistant:", chosen="Two.", rejected="11."),
}


@pytest.mark.parametrize("name", PAIRS)
def test_preference_layouts_are_read(name):
    r = row(PAIRS[name])
    assert (r.messages, r.rejected) == (
        make_messages(*QA),
        make_messages(("u", "2?"), ("a", "11.")),
    ) and not r.unread, r


REFUSED = {  # name → (row, reason, words of the detail)
    "kto": (dict(prompt="2?", completion="Two.", label=1), "answers with a label", "--map label="),
    "kto-string": (dict(prompt="2?", completion="Two.", label="true"), "answers with a label", ""),
    "kto-messages": (dict(messages=[U, A], label=False), "answers with a label", ""),
    "kto_tag": (dict(conversations=[U, A], kto_tag=True), "answers with a label", "kto_tag"),
    "oasst": (
        dict(message_id="a", parent_id=None, text="hi", role="prompter"),
        "a message of a tree",
        "put each path",
    ),
    "lone": (dict(role="user", content="hi"), "a message alone", "messages"),
    "row-loss": (
        dict(messages=[U, A], train=False),
        "marked as not to be learned",
        "train is False",
    ),
    "row-weight": (
        dict(prompt="2?", completion="Two.", weight=0),
        "marked as not to be learned",
        "",
    ),
    "all-unlearned": (dict(messages=[U, dict(A, weight=0)]), "nothing to learn", ""),
    "half-weight": (
        dict(messages=[U, dict(A, weight=0.5)]),
        "a weight that is neither 0 nor 1",
        "0.5",
    ),
    "thought-of-which": (
        dict(messages=[U, A, U, A], cot="hm"),
        "thoughts that belong to no answer",
        "cot beside 2 answers",
    ),
    "two-thoughts": (
        dict(messages=[U, dict(A, thinking="a", reasoning="b")]),
        "two thoughts",
        "thinking and reasoning",
    ),
    "thought-twice": (
        dict(messages=[U, dict(A, content="<think>a</think>b", reasoning_content="c")]),
        "two thoughts",
        "",
    ),
    "unopened": (dict(messages=[U, dict(A, content="hm</think>Two.")]), "unopened </think>", ""),
    "backwards": (
        dict(messages=[U, dict(A, content="</think>hm<think>")]),
        "unopened </think>",
        "",
    ),
    "images": (
        dict(messages=[U, A], images=["a.png"]),
        "pictures, sound or video",
        "--map images=",
    ),
    "llava": (
        dict(
            image="a.png",
            conversations=[
                {"from": "human", "value": "<image>\n2?"},
                {"from": "gpt", "value": "Two."},
            ],
        ),
        "pictures, sound or video",
        "a.png",
    ),
    "image_url": (
        dict(
            messages=[
                dict(
                    role="user",
                    content=[dict(type="image_url", image_url="x"), dict(type="text", text="2?")],
                ),
                A,
            ]
        ),
        "pictures, sound or video",
        "image_url",
    ),
    "caption": (dict(image="a.png", text="a cat"), "pictures, sound or video", ""),
    "audio": (dict(messages=[U, A], audio="a.wav"), "pictures, sound or video", ""),
    "differ": (
        dict(chosen=[U, A], rejected=[dict(U, content="3?"), A]),
        "prompts that differ",
        "'2?' and '3?'",
    ),
    "differ-system": (
        dict(
            chosen=[dict(role="system", content="a"), U, A],
            rejected=[dict(role="system", content="b"), U, A],
        ),
        "prompts that differ",
        "",
    ),
    "two-answers": (
        dict(question="2?", answer="Two.", response="Zwei."),
        "two answers",
        "--map answer=",
    ),
    "options-number": (
        dict(question="2?", options=[1, 2], answer="B"),
        "options that cannot be read",
        "[1, 2]",
    ),
    "three": (dict(instruction="2?", output=["a", "b", "c"]), "question or answer is no text", ""),
    "unknown": (dict(sentence="x", promt="y"), 'no "text"', "promt is similar to prompt"),
    "notebook": (dict(cells=[], nbformat=4, metadata={}), "a notebook", "nbconvert"),
    "no-content": (dict(messages=[dict(role="user", msg="2?"), A]), "no content", "'msg'"),
    "nameless": (
        dict(messages=[U, dict(role="assistant", content="", tool_calls=[dict(arguments={})])]),
        "broken tools or tool_calls",
        "a call has no name",
    ),
    "arguments": (
        dict(
            messages=[
                U,
                dict(role="assistant", content="", tool_calls=[dict(name="f", arguments="[1]")]),
            ]
        ),
        "broken tools or tool_calls",
        "the arguments of f must be an object",
    ),
    "call-text": (
        dict(
            conversations=[
                {"from": "human", "value": "2?"},
                {"from": "function_call", "value": "f(1)"},
            ]
        ),
        "broken tools or tool_calls",
        "is not valid JSON",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_layout_is_refused_by_name(name):
    value, reason, words = REFUSED[name]
    r = row(value)
    assert r.reason == reason and words in r.detail, r


@pytest.mark.parametrize(
    "value",
    [
        dict(question="2?", reasoning="hm", answer="Two."),
        dict(Question="2?", Complex_CoT="hm", Response="Two."),
        dict(messages=[U, A], cot="hm"),
        dict(question="2?", solution="Two.", thinking_trajectories=["hm"]),
        dict(messages=[U, dict(A, thinking="hm")]),
        dict(messages=[U, dict(A, thought="hm")]),
        dict(
            messages=[
                U,
                dict(
                    role="assistant",
                    content=[dict(type="thinking", thinking="hm"), dict(type="text", text="Two.")],
                ),
            ]
        ),
    ],
    ids=str,
)
def test_thoughts_are_kept(value):
    r = row(value)
    assert messages_of(r) == [U, dict(A, reasoning_content="hm")] and not r.unread


def test_thoughts_other_than_text_are_refused():
    "In a part of the content, beside a field for thoughts."
    part = dict(type="thinking", thinking="hm")
    r = row(dict(messages=[U, dict(A, content=[part], reasoning_content=5)]))
    assert r.reason == "reasoning_content is not a string" and "it is a int" in r.detail


def test_column_can_be_named():
    r = row(dict(q="2?", a="Two.", label=True), columns=dict(prompt="q", completion="a", label=""))
    assert messages_of(r) == [U, A] and r.read == "prompt, completion → messages" and not r.unread
    assert row(dict(body="雪", text="other"), columns=dict(text="body")).text == "雪"


# --- calls ----------------------------------------------------------------------------------------
def test_calls_in_every_format_give_the_same_ids(tok):
    "ShareGPT's role, OpenAI's old field, glaive's mark and xLAM's column give the same ids."
    tools = [dict(name="f", parameters={})]
    want = [U, dict(role="assistant", content="", tool_calls=[CALL])]
    rows = [
        dict(messages=want, tools=tools),
        dict(
            conversations=[
                {"from": "human", "value": "2?"},
                {"from": "function_call", "value": json.dumps(CALL)},
            ],
            tools=json.dumps(tools),
        ),
        dict(
            messages=[
                U,
                dict(
                    role="assistant",
                    content=None,
                    function_call=dict(name="f", arguments='{"a": 1}'),
                ),
            ],
            functions=tools,
        ),
        dict(query="2?", answers=json.dumps([CALL]), tools=json.dumps(tools)),
    ]
    ids = [tok.encode_chat(row(r).messages)[0].tolist() for r in rows]
    assert ids == ids[:1] * 4
    glaive = row(
        dict(
            system="SYSTEM: Use them -\n" + json.dumps(tools[0]),
            chat=(
                "USER: 2?\n\n\nASSISTANT: <functioncall> "
                '{"name": "f", "arguments": \'{"a": 1}\'} <|endoftext|>\n\n\n'
                'FUNCTION RESPONSE: {"x": 1}\n\n\nASSISTANT: Two. <|endoftext|>'
            ),
        )
    )
    assert (
        glaive.messages[0]["tools"] == tools
        and glaive.messages[2]["tool_calls"] == [CALL]
        and messages_of(glaive)[3:] == make_messages(("t", '{"x": 1}'), ("a", "Two."))
    )


def test_text_with_calls_and_parallel_calls(tok):
    r = row(
        dict(
            messages=[
                U,
                dict(
                    role="assistant", content="Wait.", function_call=dict(name="f", arguments="{}")
                ),
            ]
        )
    )
    assert '"name": "f"' in tok.render(r.messages) and "Wait." in tok.render(r.messages)
    both = row(
        dict(
            conversations=[
                {"from": "human", "value": "2?"},
                *[
                    {"from": "function_call", "value": json.dumps(dict(name=n, arguments={}))}
                    for n in "fg"
                ],
                {"from": "observation", "value": "1"},
                {"from": "gpt", "value": "Two."},
            ]
        )
    )
    assert [c["name"] for c in both.messages[1]["tool_calls"]] == ["f", "g"] and len(
        both.messages
    ) == 4


def test_results_are_in_the_order_of_their_calls():
    calls = [dict(id=i, function=dict(name=i, arguments="{}")) for i in "ab"]
    r = row(
        dict(
            messages=[
                U,
                dict(role="assistant", content=None, tool_calls=calls),
                dict(role="tool", tool_call_id="b", content="B"),
                dict(role="tool", tool_call_id="a", content="A"),
                A,
            ]
        )
    )
    assert [m["content"] for m in r.messages[2:4]] == ["A", "B"]


def test_nothing_is_rendered_twice(tok):
    "Functions that the system prompt already lists, calls that the text already contains."
    r = row(
        dict(
            messages=[dict(role="system", content='<tools>\n{"name": "f"}\n</tools>'), U, A],
            tools=[dict(name="f")],
        )
    )
    assert tok.render(r.messages).count('"f"') == 1
    other = row(
        dict(
            messages=[dict(role="system", content='<tools>\n{"name": "f"}\n</tools>'), U, A],
            tools=[dict(name="g")],
        )
    )
    assert '"g"' in tok.render(other.messages)
    r = row(
        dict(
            messages=[
                U,
                dict(
                    role="assistant",
                    content='<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
                    tool_calls=[dict(name="f", arguments={})],
                ),
            ]
        )
    )
    assert tok.render(r.messages).count("<tool_call>") == 1 and "calls written twice" in r.mended


# --- properties -----------------------------------------------------------------------------------
WORDS = st.text(st.sampled_from("abc 雪é\n"), min_size=1, max_size=12).map(lambda s: f"x{s}x")
NAMES = st.text(st.sampled_from("abcdefgh_"), min_size=1, max_size=9)


@given(
    st.lists(WORDS, min_size=2, max_size=8).filter(lambda x: len(x) % 2 == 0),
    st.sampled_from(["openai", "sharegpt", "firefly", "strings", "pairs", "parts"]),
    st.sampled_from(["messages", "conversations", "conversation", "dialogue"]),
    st.booleans(),
)
@settings(max_examples=80)
def test_every_text_of_a_conversation_is_rendered(tok, texts, spelling, key, capital):
    roles = ["user", "assistant"] * len(texts)
    value = dict(
        openai=[dict(role=r, content=t) for r, t in zip(roles, texts)],
        sharegpt=[
            {"from": dict(user="human", assistant="gpt")[r], "value": t}
            for r, t in zip(roles, texts)
        ],
        firefly=[dict(human=a, assistant=b) for a, b in zip(texts[::2], texts[1::2])],
        strings=texts,
        pairs=[list(p) for p in zip(texts[::2], texts[1::2])],
        parts=[dict(role=r, content=[dict(type="text", text=t)]) for r, t in zip(roles, texts)],
    )[spelling]
    r = row({key.title() if capital else key: value})
    text = tok.render(r.messages)
    assert (
        not r.reason
        and all(t in text for t in texts)
        and [m["role"] for m in r.messages] == roles[: len(texts)]
    )


@given(
    st.dictionaries(NAMES, WORDS, min_size=1, max_size=4),
    st.sampled_from(
        [
            dict(text="Q"),
            dict(messages=[U, A]),
            dict(question="2?", answer="Two."),
            dict(prompt="2?", chosen="Two.", rejected="11."),
        ]
    ),
)
@settings(max_examples=150)
def test_skipped_text_is_reported(tok, more, core):
    "A column has loss, or is reported as skipped, or the row is refused."
    r = row({**more, **core})
    if r.reason:
        return
    rendered = (
        "\n".join(tok.render(s) for s in (r.messages, r.rejected) if s) if r.messages else r.text
    )
    for k, v in more.items():
        if k not in core:
            assert k in r.unread or v.strip() in rendered, (k, r)


# --- what is reported about a file ----------------------------------------------------------------
def lines_of(path, **how):
    table = read_table({path: inspect_file(path)})
    for b in read_blocks(path, **how):
        count_read(table, path, [(r.read, r.unread) for r in parse_block(b) if not r.reason])
    return reading(table)


def test_one_line_per_file_is_reported(tok, tmp_path):
    a = write(
        tmp_path / "a.jsonl",
        dict(conversations=[U, A], id=1, source="web"),
        dict(conversations=[U, A], id=2),
    )
    b = tmp_path / "b.txt"
    b.write_bytes("Сегодня очень хорошая погода, и мы пошли в парк.\n".encode("koi8-r") * 3)
    c = tmp_path / "c.txt"
    c.write_text("Snow fell.\n")
    assert lines_of(a) == ["a.jsonl: conversations → messages; left out: id, source"]
    notes = []
    train, _ = build_tokenset(
        [b, c], tok, tmp_path / "set", 0.0, say=lambda note: notes.append(str(note))
    )
    want = [
        "b.txt: plain text; read as KOI8-U, which is a guess: encoding= overrides it",
        "c.txt: plain text",
    ]
    assert notes == want and tok.decode(train.tokens).startswith("Сегодня очень")
    notes.clear()
    build_tokenset([b, c], tok, tmp_path / "set", 0.0, say=lambda note: notes.append(str(note)))
    assert notes == want  # a reused set reports the same
    report = analyze([b, c], near_duplicates=False)
    assert all(w in str(report) for w in want) and [*report["read"]] == [str(b), str(c)]
    assert "a.jsonl: conversations → messages; left out: id, source" in prepare_summary(
        prepare(a, tmp_path / "out.jsonl", tok)
    )
    assert [
        r.text for r in (r for b_ in read_blocks(b, encoding="cp1251") for r in parse_block(b_))
    ][0] != "Сегодня"
    with pytest.raises(ValueError, match="encoding='koi9' must be an encoding that Python knows"):
        inspect_file(b, "koi9")


def test_unused_options_do_not_change_a_set(tok, tmp_path):
    "Unused options are not recorded, so sets of older versions are found again."
    a = write(tmp_path / "a.jsonl", *[dict(text=f"row {i}") for i in range(9)])
    assert build_tokenset(a, tok, tmp_path / "set", 0.0)[0].meta["options"] == dict(
        validation_split=0.0
    )
    assert build_tokenset(
        a, tok, tmp_path / "other", 0.0, encoding="utf-8", columns=dict(text="text")
    )[0].meta["options"] == dict(validation_split=0.0, encoding="utf-8", columns=dict(text="text"))


def test_other_files_in_a_folder_are_reported(tok, tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path / "in/a.jsonl", *[dict(text=f"row {i}") for i in range(9)])
    for n in ("b.csv", "c.parquet", "d.ndjson"):
        (tmp_path / "in" / n).write_text("x")
    (tmp_path / "in/more").mkdir()
    notes = []
    assert [f.name for f in data_files(tmp_path / "in", notes.append)] == [
        "a.jsonl"
    ] and "skipped 4 (b.csv, c.parquet, d.ndjson, more/)" in notes[0]
    build_tokenset(
        tmp_path / "in", tok, tmp_path / "set", 0.0, say=lambda note: notes.append(str(note))
    )
    assert (
        len([s for s in notes if "skipped 4 (" in s]) == 2
        and "skipped 4 (" in str(analyze(tmp_path / "in", near_duplicates=False))
        and "skipped 4 (" in prepare_summary(prepare(tmp_path / "in", tmp_path / "out", tok))
    )
    (tmp_path / "in/a.jsonl").unlink()
    with pytest.raises(
        DataError, match=r"folder without data files.*It holds b.csv, c.parquet, d.ndjson, more/"
    ):
        data_files(tmp_path / "in")


def test_many_refused_rows_are_a_warning(tok, tmp_path):
    good = [dict(text=f"row {i}") for i in range(8)]
    a = write(tmp_path / "a.jsonl", *good, dict(x=1))

    def notes_of(**how):
        notes = []
        build_tokenset(
            a, tok, tmp_path / "set", 0.0, say=lambda note: notes.append(str(note)), **how
        )
        return notes

    first = notes_of()
    assert (
        first[1].startswith("WARNING: 1 of 9 rows are left out, more than a tenth.")
        and "on_bad_row='skip'" in first[1]
        and 'rows refused: 1 × no "text"' in first[1]
    )
    assert notes_of() == first and notes_of(on_bad_row="skip")[1].startswith("rows refused: 1 × ")
    write(a, *good * 2, dict(x=1))
    assert notes_of()[1].startswith("WARNING: rows refused: 1 × ")


# --- files ----------------------------------------------------------------------------------------
def rows_in(path, **how):
    return [r for b in read_blocks(path, **how) for r in parse_block(b)]


JSON_LINES, ARRAY, PRETTY = (
    '{"id": 1, "body": "a"}\n{"id": 2, "body": "b"}\n',
    '[{"text": "a"}, {"text": "b"}]',
    '[\n {\n  "text": "a"\n },\n {"text": "b"}\n]\n',
)


@pytest.mark.parametrize("name", ["a.txt", "a.ndjson", "a.jsonlines", "a", "a.data"])
def test_json_is_read_as_json_under_any_name(name, tmp_path):
    for content, want in (
        (JSON_LINES, ["", ""]),
        (ARRAY, ["a", "b"]),
        (PRETTY, ["a", "b"]),
        ("{'text': 'a'}\n{'text': 'b'}\n", ["a", "b"]),
        ('{"text": "a"}\n{"text": \n{"text": "b"}\n', ["a", "", "b"]),
    ):
        (tmp_path / name).write_text(content)
        assert [r.text for r in rows_in(tmp_path / name)] == want, content
    for text in (
        "[1] A footnote.\nAnd more.\n",
        "{x} is a set\n",
        "[Verse]\nla la\n",
        "{ not json }\n",
        '"quoted"\n',
        "[\n",
    ):
        (tmp_path / "b.txt").write_text(text)
        assert [r.text for r in rows_in(tmp_path / "b.txt")] == [text]


def test_long_first_row_is_read(tmp_path):
    """Longer than the 64 KiB that are inspected.

    JSON lines under .txt, bare lists of messages, and a stray carriage return before every CRLF.
    """
    long = "x" * 100_000
    (tmp_path / "a.txt").write_text(
        json.dumps(dict(text=long)) + "\n" + json.dumps(dict(text="b")) + "\n"
    )
    assert [r.text for r in rows_in(tmp_path / "a.txt")] == [long, "b"]
    (tmp_path / "b.jsonl").write_text(
        "".join(json.dumps([U, dict(A, content=t)]) + "\n" for t in (long, "b"))
    )
    assert [messages_of(r)[1]["content"] for r in rows_in(tmp_path / "b.jsonl")] == [
        long,
        "b",
    ]
    (tmp_path / "c.txt").write_bytes(
        b"x" * 50_000 + b"\r" + b"x" * 50_000 + b"\r\n" + b"next\r\nlast\r\n"
    )
    assert inspect_file(tmp_path / "c.txt").newline == "CRLF" and "".join(
        r.text for r in rows_in(tmp_path / "c.txt")
    ).split("\n")[1:] == ["next", "last", ""]


@pytest.mark.parametrize(
    "text",
    [
        '{"version": 1, "data": [{"text": "a"}, {"text": "b"}]}',
        (
            '{\n "info": {"x": [{"text": "no"}]},\n "rows": [\n  {"text": "a"},\n  {"text": "b"}\n'
            ' ],\n "more": {"text": "no"}\n}\n'
        ),
        '{"examples": [{"text": "a"},\n{"text": "b"}]}\n',
    ],
)
def test_rows_under_a_key_are_read(text, tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text(text)
    assert [r.text for r in rows_in(tmp_path / "a.json")] == ["a", "b"] and inspect_file(
        tmp_path / "a.json"
    ).layout == "inside"
    monkeypatch.setattr(formats, "LONGEST", 60)  # the limit is that of a row, not that of the file
    (tmp_path / "a.json").write_text('{"data": [' + ", ".join(['{"text": "a"}'] * 50) + "]}")
    assert len(rows_in(tmp_path / "a.json")) == 50
    (tmp_path / "b.jsonl").write_text(json.dumps(dict(id=1, data=["2?", "Two."])) + "\n")
    assert messages_of(rows_in(tmp_path / "b.jsonl")[0]) == [U, A]


FILES = {
    "a.ipynb": '{"cells": []}',
    "a.yaml": "- text: a\n",
    "a.yml": "a: b\n",
    "a.srt": "1\n00:00:01,000 --> 00:00:02,000\nHi\n",
    "a.vtt": "WEBVTT\n",
    "a.xml": "<?xml version='1.0'?>\n<a/>",
    "b.txt": "1\r\n00:00:01,000 --> 00:00:02,000\r\nHi\r\n",
    "c.txt": "<?xml version='1.0'?><a/>",
    "d.txt": "WEBVTT\n\n00:01.000 --> 00:02.000\nHi",
    "a.html": "<p>Hi",
}


@pytest.mark.parametrize("name", FILES)
def test_files_of_other_kinds_are_refused_by_name(name, tmp_path):
    (tmp_path / name).write_text(FILES[name], newline="")
    with pytest.raises(
        DataError,
        match=(
            f"{name} is (a notebook|a YAML file|a subtitle file|an XML file|a web page); the model"
            " would train on its .*: "
        ),
    ):
        inspect_file(tmp_path / name)


def test_tab_separated_table_is_for_encoders(tok, tmp_path):
    (tmp_path / "a.tsv").write_text("one\ttwo\nthree\tfour\n")
    for use in (
        lambda f: build_tokenset(f, tok, tmp_path / "set"),
        lambda f: analyze(f, near_duplicates=False),
        lambda f: prepare(f, tmp_path / "out.jsonl", tok),
    ):
        with pytest.raises(
            DataError, match=r"a.tsv is a table; the model would train on its tabs: .*sep='\\t'"
        ):
            use(tmp_path / "a.tsv")
    assert len(build_tokenset(tmp_path / "a.tsv", tok, tmp_path / "set", 0.0, format="lines")[0])


TEXTS = {
    "cp949": "옛날 옛적에 고양이 한 마리가 정원에 살고 있었습니다.",
    "euc_kr": "오늘은 날씨가 매우 좋아서 공원에 놀러 갔습니다.",
    "euc_jp": "今日は天気がとても良いので、公園へ遊びに行きました。",
    "shift_jis": "昔々、庭に一匹の猫が住んでいました。",
    "koi8_r": "Жила-была в саду кошка. Сегодня очень хорошая погода.",
    "cp1251": "Переведите, пожалуйста, следующее предложение.",
    "cp1250": "Dzisiaj jest bardzo ładna pogoda, a żółw śpi.",
    "cp1253": "Μια φορά κι έναν καιρό ζούσε μια γάτα στον κήπο.",
    "cp1254": "Bugün hava çok güzel. Işık söndü, ağaç düştü, şimdi.",
    "cp1255": "היה היה חתול שגר בגינה. היום מזג האוויר יפה מאוד.",
    "cp1256": "الطقس اليوم جميل جدا وذهبنا إلى الحديقة العامة.",
    "cp1252": "Où êtes-vous allé cet été? Le café est fermé.",
    "cp874": "กาลครั้งหนึ่งนานมาแล้วมีแมวตัวหนึ่งอาศัยอยู่ในสวน",
    "tis_620": "วันนี้อากาศดีมาก เราจึงไปเที่ยวสวนสาธารณะ",
    "big5": "從前有一隻貓，住在花園裡。今天天氣很好。",
    "gb18030": "从前有一只猫，住在花园里。今天天气很好。",
    "iso8859_5": "Жила-была в саду кошка. Сегодня хорошо.",
    "cp866": "Сегодня очень хорошая погода, и мы пошли гулять.",
}


@pytest.mark.parametrize("encoding", TEXTS)
def test_encodings_are_guessed(encoding, tmp_path):
    "As a text and as rows, with JSON line ends between the letters."
    text = TEXTS[encoding]
    (tmp_path / "a.txt").write_bytes(f"{text}\n".encode(encoding))
    (tmp_path / "a.jsonl").write_bytes(
        "".join(
            json.dumps(dict(text=f"{text}\n{i} {text}"), ensure_ascii=False) + "\n"
            for i in range(3)
        ).encode(encoding)
    )
    assert inspect_file(tmp_path / "a.txt").guessed and "a guess" in str(
        inspect_file(tmp_path / "a.txt")
    )
    assert [r.text for r in rows_in(tmp_path / "a.txt")] == [text + "\n"] and [
        r.text for r in rows_in(tmp_path / "a.jsonl")
    ] == [f"{text}\n{i} {text}" for i in range(3)]
    assert (
        not inspect_file(tmp_path / "a.txt", encoding).guessed
        and rows_in(tmp_path / "a.txt", encoding=encoding)[0].text == text + "\n"
    )


def test_end_of_text_ends_a_document(tok, tmp_path):
    "In a line of a text, in a row, and in lines; only once if it is at the end."
    (tmp_path / "a.txt").write_text("one<|endoftext|>two\nthree\n<|endoftext|>\nfour")
    (tmp_path / "b.txt").write_text("a b<|endoftext|>c\n")
    assert [(r.line, r.text, r.ends) for r in rows_in(tmp_path / "a.txt")] == [
        (1, "one", True),
        (1, "two\nthree\n", True),
        (4, "four", True),
    ]
    write(
        tmp_path / "a.jsonl", dict(text="a<|endoftext|>b<|endoftext|>"), dict(text="<|endoftext|>")
    )
    assert [(r.text, r.ends, r.reason) for r in rows_in(tmp_path / "a.jsonl")] == [
        ("a", True, ""),
        ("b", True, ""),
        ("", True, "empty text"),
    ]
    ids = np.asarray(
        build_tokenset([tmp_path / "a.jsonl"], tok, tmp_path / "set", 0.0)[0].tokens
    ).tolist()
    assert ids == [*tok.encode("a"), tok.eos_id, *tok.encode("b"), tok.eos_id]
    assert (
        build_tokenset(tmp_path / "b.txt", tok, tmp_path / "lines", 0.0, format="lines")[0].meta[
            "n_docs"
        ]
        == 2
    )
    block = "x" * 70 + "\n"
    (tmp_path / "c.txt").write_text(
        block * 30 + "\n<|endoftext|>\nnext\n"
    )  # a piece ends before the mark, so the mark comes once
    assert [r.text for r in rows_in(tmp_path / "c.txt")] == [block * 30 + "\n", "next\n"] and [
        r.ends for r in rows_in(tmp_path / "c.txt")
    ] == [True, True]


# --- what has loss --------------------------------------------------------------------------------
def text_with_loss(data, tok):
    return tok.decode([t for t, m in zip(data.tokens, data.mask) if m])


def test_messages_of_weight_zero_have_no_loss(tok, tmp_path):
    talks = [
        dict(messages=[U, dict(A, content="No.", **flag), U, dict(A, content="Yes.")])
        for flag in (dict(weight=0), dict(train=False), dict(loss=False), dict(weight=1), {})
    ]
    for i, want in enumerate(["Yes.", "Yes.", "Yes.", "No.Yes.", "No.Yes."]):
        data, _ = build_tokenset(
            write(tmp_path / f"{i}.jsonl", talks[i]), tok, tmp_path / f"s{i}", 0.0
        )
        assert text_with_loss(data, tok).replace("<|im_end|>", "") == want
    made = prepare(tmp_path / "0.jsonl", tmp_path / "out.jsonl", tok, max_seq_len=0)
    data, _ = build_tokenset(made["output"], tok, tmp_path / "again", 0.0)
    assert text_with_loss(data, tok).replace("<|im_end|>", "") == "Yes."


def chat_row(answer):
    return dict(messages=[U, dict(A, content=answer)])


@pytest.fixture
def mixed_rows(tok, tmp_path):
    "A short row, one whose first answer fits, and one whose only answer does not."
    return write(
        tmp_path / "long.jsonl",
        chat_row("Two."),
        dict(messages=[U, A, U, dict(A, content="1 2 " * 60)]),
        chat_row("<think>" + "1 2 " * 60 + "</think>Two."),
    )


def test_long_rows_are_skipped_or_truncated(tok, mixed_rows, tmp_path):
    """They are skipped if no answer ends in time, and otherwise truncated after an answer.

    A set of an older version is unchanged.
    """
    from minigpt.train.trainer import describe_data

    whole, cut, old = (
        build_tokenset(mixed_rows, tok, tmp_path / str(how), 0.0, long_rows=how)[0]
        for how in ("skip", "cut", None)
    )
    assert "long_rows" not in old.meta and len({d.fingerprint for d in (whole, cut, old)}) == 1
    assert sorted(whole.packs(64)[0].tolist()) == [0, 1] and sorted(
        cut.packs(64)[0].tolist()
    ) == sorted(old.packs(64)[0].tolist()) == [0, 1, 2]
    assert all(np.array_equal(a, b) for a, b in zip(cut.packs(64), old.packs(64)))
    assert tok.decode([whole.row(1, 64)[1][-1]]) == "<|im_end|>"
    assert (
        whole.count_too_long(64) == (2, 1)
        and cut.count_cut_inside_answer(64) == 1
        and whole.count_cut_inside_answer(64) == 0
    )
    assert (
        "1 are longer than max_seq_len=64 and truncated after an answer; 1 rows longer than"
        " max_seq_len=64 are left out; long_rows='cut' keeps their beginning"
        in describe_data(whole, 64)[0]
    )
    assert "1 are longer and truncated inside an answer" in describe_data(cut, 64)[0]
    again = [
        build_tokenset(mixed_rows, tok, tmp_path / name, 0.0, long_rows=how)[0].meta.get(
            "long_rows"
        )
        for name, how in (("skip", "cut"), ("None", "skip"))
    ]
    assert again == ["cut", None]  # a set of an older version stays


def test_all_rows_too_long_is_an_error(tok, tmp_path):
    data, _ = build_tokenset(
        write(tmp_path / "a.jsonl", *[chat_row("1 2 " * 60 + str(i)) for i in range(9)]),
        tok,
        tmp_path / "set",
        0.0,
    )
    with pytest.raises(
        DataError,
        match=(
            r"in 9 rows max_seq_len ends before the first answer does \(the rows have [\d,]+ to"
            r" [\d,]+ tokens.*long_rows='cut'"
        ),
    ):
        check_size(data, 1, 64)


def test_pairs_equal_after_truncation_are_skipped(tok, tmp_path):
    same, differ = ("1 2 " * 60 + x for x in "ab"), ("a" + "1 2 " * 60, "b" + "1 2 " * 60)
    pairs = [dict(prompt="2?", chosen=a, rejected=b) for a, b in (tuple(same), differ, ("a", "b"))]
    sets = {
        how: build_tokenset(
            write(tmp_path / "p.jsonl", *pairs), tok, tmp_path / str(how), 0.0, long_rows=how
        )[0]
        for how in ("skip", "cut", None)
    }
    assert {how: sorted(d.packs(64)[0].tolist()) for how, d in sets.items()} == {
        "skip": [2],
        "cut": [1, 2],
        None: [0, 1, 2],
    }


def test_run_of_the_previous_version_keeps_its_rows(tok, tmp_path):
    """Its token set does not record how long rows were treated: they stay truncated.

    The losses are the same; another setting is refused for a new run.
    """
    from minigpt.core.files import read_json, write_json
    from minigpt.train.inputs import ResumeError
    from minigpt.train.trainer import fit

    rows = [chat_row(f"{i} " * (40 if i % 3 else 4)) for i in range(40)]
    data = write(tmp_path / "a.jsonl", *rows)
    options = dict(
        tokenizer=tok,
        max_seq_len=32,
        batch_size=4,
        save_steps=2,
        eval_steps=4,
        logging_steps=1,
        learning_rate=3e-3,
        validation_split=0.0,
        lr_schedule="constant",
        warmup_steps=0,
        num_threads=1,
        tensorboard=False,
        plot_loss=False,
        progress=False,
        device="cpu",
    )
    whole = fit(
        child.shape(tok.vocab_size),
        data,
        output_dir=tmp_path / "whole",
        max_steps=4,
        long_rows="cut",
        **options,
    )
    run = fit(
        child.shape(tok.vocab_size),
        data,
        output_dir=tmp_path / "run",
        max_steps=2,
        long_rows="cut",
        **options,
    )
    with pytest.raises(ResumeError, match="long_rows = cut, and this call has long_rows = skip"):
        fit(child.shape(tok.vocab_size), data, output_dir=tmp_path / "run", max_steps=4, **options)
    for side in ("train", "valid"):
        meta = read_json(run.path / "data" / side / "meta.json")
        for k in ("long_rows", "read", "n_good"):
            meta.pop(k)
        write_json(run.path / "data" / side / "meta.json", meta)
    facts = read_json(run.path / "run.json")
    for k in ("long_rows", "encoding", "columns"):
        facts["train"].pop(k)
    write_json(run.path / "run.json", facts)
    again = fit(
        child.shape(tok.vocab_size), data, output_dir=tmp_path / "run", max_steps=4, **options
    )
    assert [r["loss"] for r in again.history if "loss" in r][-1] == [
        r["loss"] for r in whole.history if "loss" in r
    ][-1]


def test_damaged_list_of_texts_is_named(tok, tmp_path):
    "The error is ours, not NumPy's, which would suggest to unpickle it."
    from minigpt.data.tokensets import open_tokenset

    build_tokenset(
        write(tmp_path / "a.jsonl", chat_row("Two."), chat_row("Three.")),
        tok,
        tmp_path / "set",
        0.0,
    )
    for content in (b"", b"junk that is no array", b"\x80\x04K\x01."):
        (tmp_path / "set/train/docs.npy").write_bytes(content)
        with pytest.raises(DataError, match="docs.npy .*damaged") as e:
            open_tokenset(tmp_path / "set")
        assert "pickle" not in str(e.value)


def test_options_for_files_are_refused_for_a_set(tok, tmp_path):
    from minigpt.train.trainer import fit

    data, _ = build_tokenset(
        write(tmp_path / "a.jsonl", chat_row("Two."), chat_row("Three.")),
        tok,
        tmp_path / "set",
        0.0,
    )
    for option in (dict(encoding="cp1251"), dict(columns="text=body"), dict(long_rows="cut")):
        with pytest.raises(
            ValueError,
            match=f"{next(iter(option))}=.* applies to files, and .* is already a token set",
        ):
            fit(
                child.shape(tok.vocab_size),
                data,
                tokenizer=tok,
                output_dir=tmp_path / "run",
                max_steps=1,
                progress=False,
                **option,
            )


def test_skipped_columns_are_printed(tok, tmp_path, capsys):
    from minigpt.cli import app
    from minigpt.config.options import TrainConfig

    a = write(tmp_path / "a.jsonl", *[dict(body=f"row {i}") for i in range(9)])
    assert (
        TrainConfig(columns=dict(prompt="q", label="")).column_names
        == TrainConfig.make(map="prompt=q, label=").column_names
        == dict(prompt="q", label="")
    )
    with pytest.raises(ValueError, match="columns='text' must be NAME=COLUMN"):
        TrainConfig(columns="text")
    tok.save(tmp_path / "tok")
    app(
        [
            "data",
            "prepare",
            "--input",
            str(a),
            "--output",
            str(tmp_path / "out.jsonl"),
            "--tokenizer",
            str(tmp_path / "tok"),
            "--map",
            "text=body",
        ],
        standalone_mode=False,
    )
    app(
        ["data", "analyze", str(a), "--no-near-duplicates", "--map", "text=body"],
        standalone_mode=False,
    )
    app(
        [
            "train",
            str(a),
            "--output-dir",
            str(tmp_path / "run"),
            "--tokenizer",
            str(tmp_path / "tok"),
            "--map",
            "text=body",
            "--max-steps",
            "1",
            "--max-seq-len",
            "16",
            "--batch-size",
            "1",
            "--no-plot-loss",
            "--no-tensorboard",
            "--device",
            "cpu",
        ],
        standalone_mode=False,
    )
    out = capsys.readouterr().out
    assert (
        len((tmp_path / "out.jsonl").read_text().splitlines()) == 9
        and out.count("a.jsonl: text") >= 2
    )


# --- preparing ------------------------------------------------------------------------------------
CODE = "def f(x):\n    if x:\n        return [x,\n            2]\n\n\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_pieces_of_a_text_have_one_end_of_text(name, tok, tmp_path):
    "The pieces joined are the text, indentation included; preparing twice changes nothing."
    text = "    first = 1\n    second = 2\n" + CODE * 400
    (tmp_path / name).write_text(
        json.dumps(dict(text="\n\n" + text)) + "\n" if name == "a.jsonl" else text
    )
    made = prepare(tmp_path / name, tmp_path / "out.jsonl", tok, max_seq_len=256)
    data, _ = build_tokenset(tmp_path / "out.jsonl", tok, tmp_path / "set", 0.0)
    ids = np.asarray(data.tokens)
    assert (
        made["processed_samples"] > 20
        and (ids == tok.eos_id).sum() == 1 == (ids[-1:] == tok.eos_id).sum()
        and tok.decode(ids[:-1]) == text.rstrip()
    )
    assert max(len(tok.encode(json.loads(l)["text"])) for l in open(tmp_path / "out.jsonl")) <= 260
    again = prepare(tmp_path / "out.jsonl", tmp_path / "again.jsonl", tok, max_seq_len=256)
    assert (tmp_path / "again.jsonl").read_bytes() == (
        tmp_path / "out.jsonl"
    ).read_bytes() and again["changes"] == {}


def test_skipped_piece_ends_the_previous_one(tok, tmp_path):
    write(
        tmp_path / "a.jsonl",
        dict(
            text="A sentence that says something about the mill on the hill.\n\n"
            + "=" * 150
            + "\n\nAnd another sentence, which tells of the river and of the boats."
        ),
    )
    prepare(tmp_path / "a.jsonl", tmp_path / "out.jsonl", tok, max_seq_len=64, quality_filter=True)
    found = [json.loads(l) for l in open(tmp_path / "out.jsonl")]
    assert (
        not any("=" in f["text"] for f in found)
        and found[-1].get("ends", True)
        and any(f.get("ends", True) for f in found[:-1])
    )


def test_indentation_is_kept_and_margins_removed():
    assert (
        clean("\n  \n    x = 1\n    y\n\n") == "    x = 1\n    y"
        and clean("  hello \n") == "hello"
        and clean(" Hello,\nyou") == "Hello,\nyou"
    )


def test_home_folder_is_expanded(tok, tmp_path, monkeypatch):
    from minigpt.data.corpus import write_conversations
    from minigpt.data.tokensets import open_tokenset

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl", *[dict(text=f"row {i}") for i in range(9)])
    build_tokenset("~/a.jsonl", tok, "~/set", 0.0)
    prepare("~/a.jsonl", "~/out.jsonl", tok)
    write_conversations("~/talks.jsonl", 2)
    assert (
        len(open_tokenset("~/set")[0])
        and not (tmp_path / "~").exists()
        and {"set", "out.jsonl", "talks.jsonl"} <= {p.name for p in tmp_path.iterdir()}
    )
