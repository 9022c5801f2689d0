"""Chat and server from outside.

OpenAI's own client, clients that disconnect, invalid requests, a terminal with Ctrl-C, and pipes.
"""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest
import torch
from project import ROOT

from minigpt.chat import Chat, Tools
from minigpt.model.gpt import GPT, GPTConfig
from minigpt.serve import Server
from minigpt.tokenizer.bpe import train_tokenizer
from tests.harness.scripted import Scripted

openai = pytest.importorskip("openai")

CALL = '{"name": "weather", "arguments": {"city": "武汉"}}'
WEATHER = dict(
    type="function",
    function=dict(
        name="weather",
        description="Is it raining?",
        parameters=dict(
            type="object", properties=dict(city=dict(type="string")), required=["city"]
        ),
    ),
)
ASK = [dict(role="user", content="Rain?")]


@pytest.fixture(scope="module")
def tok():
    return train_tokenizer([f"Rain? Is it raining? {CALL} no"] * 9, 400)


@pytest.fixture
def model(tok):
    torch.set_num_threads(1)
    return Scripted(
        GPTConfig(
            vocab_size=tok.vocab_size,
            dim=16,
            n_layer=1,
            n_head=2,
            n_kv_head=1,
            ffn_dim=16,
            max_len=800,
        )
    )


@pytest.fixture
def server(model, tok):
    plain = GPT(model.config).eval()
    with Server(dict(scripted=(model, tok), plain=(plain, tok)), port=0) as s:
        threading.Thread(target=s.serve_forever, args=(0.05,), daemon=True).start()
        yield s
        s.shutdown()


@pytest.fixture
def client(server):
    with openai.OpenAI(base_url=server.url, api_key="none", max_retries=0, timeout=30) as c:
        yield c


def test_models_are_listed(client):
    assert [m.id for m in client.models.list()] == ["scripted", "plain"]
    assert client.models.retrieve("plain").id == "plain"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_complete_and_streamed_answers_are_equal(client, model, tok):
    answer = "<think>\nNo cloud.\n</think>\n\nNo, 不下雨。🌞"
    model.script(tok, answer, answer)
    completion = client.chat.completions.create(model="scripted", messages=ASK)
    message = completion.choices[0].message
    assert (
        message.content,
        message.reasoning_content,
        completion.choices[0].finish_reason,
        message.tool_calls,
    ) == ("No, 不下雨。🌞", "No cloud.", "stop", None)
    assert completion.usage.prompt_tokens == len(
        tok.encode_prompt(ASK)
    ) and completion.usage.completion_tokens == len(tok.encode(answer, special=True))
    chunks = list(
        client.chat.completions.create(
            model="scripted", messages=ASK, stream=True, stream_options=dict(include_usage=True)
        )
    )
    deltas = [c.choices[0].delta for c in chunks if c.choices]
    assert "".join(d.content or "" for d in deltas) == message.content and len(deltas) > 6
    assert "".join(getattr(d, "reasoning_content", None) or "" for d in deltas) == "No cloud."
    assert chunks[-2].choices[0].finish_reason == "stop" and chunks[-1].usage == completion.usage


@pytest.mark.parametrize("stream", [False, True])
def test_function_call_and_its_result(client, model, tok, stream):
    model.script(
        tok,
        f"Let me see.\n<tool_call>\n{CALL}\n</tool_call>\n<tool_call>\n{CALL}\n</tool_call>",
        "No.",
    )
    if stream:
        with client.chat.completions.stream(model="scripted", messages=ASK, tools=[WEATHER]) as s:
            choice = s.get_final_completion().choices[0]
    else:
        choice = client.chat.completions.create(
            model="scripted", messages=ASK, tools=[WEATHER]
        ).choices[0]
    calls = choice.message.tool_calls
    assert (choice.finish_reason, choice.message.content, len(calls)) == (
        "tool_calls",
        "Let me see.",
        2,
    )
    assert [(c.type, c.function.name, json.loads(c.function.arguments)) for c in calls] == [
        ("function", "weather", dict(city="武汉"))
    ] * 2 and calls[0].id != calls[1].id
    back = [
        *ASK,
        choice.message.model_dump(exclude_none=True, exclude={"parsed"}),
        *(
            dict(role="tool", tool_call_id=c.id, content=t)
            for c, t in zip(calls[::-1], ["second", "first"])
        ),
    ]
    again = client.chat.completions.create(model="scripted", messages=back, tools=[WEATHER])
    assert again.choices[0].message.content == "No."
    read = [
        *ASK,
        dict(role="assistant", content="Let me see.", tool_calls=[json.loads(CALL)] * 2),
        dict(role="tool", content="first"),
        dict(role="tool", content="second"),
    ]
    assert again.usage.prompt_tokens == len(tok.encode_prompt(read, [WEATHER["function"]]))


def test_unknown_or_invalid_calls_are_text(client, model, tok):
    whole, broken = f"<tool_call>\n{CALL}\n</tool_call>", '<tool_call>\n{"name": "weath'
    model.script(tok, whole, broken, whole)
    for text, kw in (
        (whole, {}),
        (broken, dict(tools=[WEATHER])),
        (whole, dict(tools=[WEATHER], tool_choice="none")),
    ):
        choice = client.chat.completions.create(model="scripted", messages=ASK, **kw).choices[0]
        assert (choice.message.content, choice.finish_reason, choice.message.tool_calls) == (
            text,
            "stop",
            None,
        )


def test_stop_sequences_end_the_answer(client, model, tok):
    model.script(tok, "one two three", "one two three", "one two three")
    got = [
        client.chat.completions.create(model="scripted", messages=ASK, **kw).choices[0]
        for kw in (dict(stop=["thr", "x"]), dict(max_tokens=2), dict(max_completion_tokens=2))
    ]
    assert [(c.message.content, c.finish_reason) for c in got][0] == ("one two ", "stop")
    assert (
        got[1].finish_reason == got[2].finish_reason == "length"
        and got[1].message.content == got[2].message.content != ""
    )


def test_same_seed_gives_the_same_text(client):
    texts = [
        client.completions.create(
            model="plain", prompt="Rain", max_tokens=20, seed=s, temperature=1
        )
        .choices[0]
        .text
        for s in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]
    pieces = [
        c.choices[0].text
        for c in client.completions.create(
            model="plain", prompt="Rain", max_tokens=20, seed=1, temperature=1, stream=True
        )
    ]
    assert "".join(pieces) == texts[0]


@pytest.mark.parametrize(
    "kw, error, says",
    [
        (dict(n=2), openai.BadRequestError, "n is 2"),
        (dict(logprobs=True), openai.BadRequestError, "logprobs"),
        (dict(temperature=-1), openai.BadRequestError, "temperature"),
        (dict(model="gpt-9"), openai.NotFoundError, "available: scripted, plain"),
        (dict(messages=[]), openai.BadRequestError, "at least one"),
        (dict(messages=[dict(role="robot", content="x")]), openai.BadRequestError, "robot"),
        (dict(tool_choice="required", tools=[WEATHER]), openai.BadRequestError, "tool_choice"),
        (
            dict(
                messages=[
                    dict(role="user", content=[dict(type="image_url", image_url=dict(url="x"))])
                ]
            ),
            openai.BadRequestError,
            "must be a string",
        ),
        (
            dict(
                messages=[
                    *ASK,
                    dict(
                        role="assistant",
                        tool_calls=[
                            dict(
                                id="a",
                                type="function",
                                function=dict(name="weather", arguments="[1]"),
                            )
                        ],
                    ),
                ]
            ),
            openai.BadRequestError,
            "JSON object",
        ),
        (
            dict(messages=[dict(role="user", content="no " * 999)]),
            openai.BadRequestError,
            "at most 799",
        ),
    ],
)
def test_bad_requests_are_refused(client, kw, error, says):
    with pytest.raises(error, match=says) as e:
        client.chat.completions.create(**dict(model="plain", messages=ASK, max_tokens=1) | kw)
    assert e.value.body["type"] == "invalid_request_error"
    if says == "at most 799":
        assert e.value.code == "context_length_exceeded"
    assert (
        client.chat.completions.create(
            model="plain", messages=ASK, max_tokens=1
        ).usage.completion_tokens
        <= 1
    )  # it still runs


def raw(server, text):
    with socket.create_connection(server.server_address, 10) as s:
        s.sendall(text.encode())
        return b"".join(
            iter(lambda: s.recv(4096), b"")
        ).decode()  # the server closes the connection after an error


@pytest.mark.parametrize(
    "head, body, status",
    [
        ("POST /v1/chat/completions", "{", 400),
        ("POST /v1/chat/completions", "[1]", 400),
        ("POST /v1/chat/completions", "[" * 100_000, 400),
        ("POST /v1/nothing", "{}", 404),
        ("GET /", "", 404),
    ],
)
def test_raw_requests_get_their_status(server, head, body, status):
    response = raw(
        server,
        f"{head} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length:"
        f" {len(body)}\r\n\r\n{body}",
    )
    assert response.startswith(f"HTTP/1.1 {status} ") and '"error"' in response


def test_requests_of_web_pages_are_refused(server):
    """A page of another origin cannot send JSON without a preflight request.

    With a host name that points to this machine, it cannot send any request.
    """
    post = (
        "POST /v1/completions HTTP/1.1\r\nHost: {}\r\nContent-Type: {}\r\nContent-Length:"
        " 2\r\n\r\n{{}}"
    )
    assert " 415 " in raw(server, post.format("localhost", "text/plain"))
    assert " 403 " in raw(server, post.format("evil.example:8000", "application/json"))
    assert " 411 " in raw(
        server, post.format("localhost", "application/json").replace("Content-Length: 2\r\n", "")
    )
    assert " 413 " in raw(
        server,
        post.format("localhost", "application/json").replace(
            "Content-Length: 2", "Content-Length: 99999999999"
        ),
    )
    assert "Access-Control" not in raw(
        server,
        "GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nOrigin:"
        " http://evil.example\r\n\r\n",
    )


@pytest.mark.parametrize("stream", [True, False])
def test_disconnected_client_stops_its_answer(server, client, model, tok, stream):
    model.script(tok, "no " * 200, "Yes.", pause=0.02)
    body = json.dumps(dict(model="scripted", messages=ASK, stream=stream))
    s = socket.create_connection(server.server_address, 10)
    s.sendall(
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type:"
        f" application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode()
    )
    while model.steps < 5:
        time.sleep(0.01)
    s.close()
    assert (
        client.chat.completions.create(model="scripted", messages=ASK).choices[0].message.content
        == "Yes."
    )  # waits for the lock
    assert model.steps < 60


def test_requests_run_one_at_a_time(client, model, tok):
    "Two clients at once: each gets its own complete answer."
    model.script(tok, "a" * 30, "a" * 30, pause=0.002)
    got = []

    def ask():
        got.append(
            client.chat.completions.create(model="scripted", messages=ASK)
            .choices[0]
            .message.content
        )

    threads = [threading.Thread(target=ask) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert got == ["a" * 30] * 2


def test_error_during_a_stream_is_reported(client, model, tok):
    model.script(tok, "no no no")
    model.answers[0].pop()  # the script is truncated
    with pytest.raises(openai.APIError, match="IndexError"):
        list(client.chat.completions.create(model="scripted", messages=ASK, stream=True))


# --- chat -----------------------------------------------------------------------------------------
def weather(city: str):
    return dict(rain=city == "Oslo")


def test_invalid_and_endless_calls_end(model, tok):
    call = f"<tool_call>\n{CALL}\n</tool_call>"
    chat = Chat(
        model.script(tok, 'Hm. <tool_call>\n{"name"', call, "No."),
        tok,
        tools=[weather],
        temperature=0,
    )
    events = list(chat.send("Rain?"))
    results = [json.loads(p) for k, p in events if k == "result"]
    assert (
        "not JSON" in results[0]["error"]
        and results[1] == dict(rain=False)
        and chat.messages[-1]["content"] == "No."
    )
    assert chat.messages[-6:-1] == [
        *chat.messages[:1],
        dict(role="assistant", content='Hm. \n<tool_call>\n{"name"'),
        *chat.messages[-4:-1],
    ]
    chat = Chat(model.script(tok, *[call] * 3), tok, tools=[weather], temperature=0, max_rounds=2)
    kinds = [k for k, p in chat.send("Rain?") if p]
    assert kinds == ["call", "result"] * 3 + ["note"]
    assert [m["role"] for m in chat.messages] == [
        "user",
        *["assistant", "tool"] * 3,
        "assistant",
    ] and "limit" in chat.messages[-2]["content"]


def test_tool_result_that_does_not_fit(model, tok):
    def page(city: str):
        return "rain " * 999

    chat = Chat(
        model.script(tok, f"<tool_call>{CALL.replace('weather', 'page')}</tool_call>", "Yes."),
        tok,
        tools=Tools([page], limit=9999),
        temperature=0,
    )
    assert [k for k, p in chat.send("Rain?") if p] == ["call", "result", "note"]
    assert [m["role"] for m in chat.messages] == ["user", "assistant", "tool", "assistant"]
    assert (
        "".join(p for k, p in chat.send("Rain?") if k == "text") == "Yes."
    )  # the text that is too long is left out next time


def test_old_turns_are_dropped_and_the_system_prompt_is_kept(model, tok):
    chat = Chat(
        model.script(tok, *["no " * 40] * 12),
        tok,
        system="Be brief.",
        temperature=0,
        max_new_tokens=60,
    )
    notes = []
    for i in range(12):
        notes += [p for k, p in chat.send(f"Rain on day {i}?") if k == "note"]
        assert len(chat._prompt([])) <= 800
    assert len(chat.messages) == 24 and notes and "no longer sees the first" in notes[0]
    read = tok.decode(chat._prompt([]))
    assert (
        read.startswith("<|im_start|>system\nBe brief.")
        and "day 0?" not in read
        and "day 11?" in read
    )
    before = [*chat.messages]
    with pytest.raises(ValueError, match="max_len is 800; shorten them"):
        list(chat.send("no " * 999))
    assert chat.messages == before and tok.decode(chat._prompt([])) == read


def test_reasoning_opened_by_the_template(model, tok):
    from minigpt.tokenizer.bpe import CHAT_TEMPLATE, Tokenizer

    opened = Tokenizer(
        tok.hf,
        dict(
            tok.config,
            chat_template=CHAT_TEMPLATE.replace(
                "assistant\\n' }}{%- endif %}", "assistant\\n<think>\\n' }}{%- endif %}"
            ),
        ),
    )
    chat = Chat(model.script(tok, "Hm.\n</think>\n\nNo."), opened, temperature=0)
    assert list(dict(chat.send("Rain?"))) == ["thinking", "text"]
    assert chat.messages[-1] == dict(role="assistant", content="No.", reasoning_content="Hm.")


def test_foreign_template_gets_tools_as_in_transformers(tok):
    from minigpt.tokenizer.bpe import Tokenizer

    other = Tokenizer(
        tok.hf,
        dict(
            tok.config,
            chat_template=(
                "{% for t in tools %}{{ t.type }} {{ t.function.name }}{% endfor %}{% for m in"
                " messages %}{{ m.content }}{% endfor %}"
            ),
        ),
    )
    assert (
        other.decode(other.encode_prompt(ASK, Tools([weather]).schemas)) == "function weatherRain?"
    )


def test_used_port_is_reported(server):
    with pytest.raises(OSError, match="choose another port"):
        Server(server.models, port=server.server_address[1])


def test_tool_calls_run_only_their_function(tmp_path):
    tools = Tools([weather])
    for name in "__import__", "open", "call", "weather.__globals__", "", "exec":
        assert "no function" in json.loads(tools.call(name, {}))["error"]

    def leave():
        sys.exit(3)

    def loop():
        x = []
        x.append(x)
        return x

    for f in leave, loop:
        tools.add(f)
        assert "failed" in json.loads(tools.call(f.__name__, {}))["error"]


TALK = """
import sys; sys.path.insert(0, ".")
from minigpt.model.gpt import GPTConfig
from minigpt.tokenizer.bpe import train_tokenizer
from tests.harness.scripted import Scripted
from minigpt.chat import Chat
tok = train_tokenizer(["Rain?"]*9, 300)
model = Scripted(GPTConfig(
    vocab_size=tok.vocab_size, dim=16, n_layer=1, n_head=2, n_kv_head=1, ffn_dim=16, max_len=400))
model = model.script(tok, "no "*90, "Yes \\x1b[2J.", pause=.02)
from minigpt.chat import chat_in_terminal
chat = Chat(model, tok, temperature=0)
chat_in_terminal(chat)
print([len(m["content"]) for m in chat.messages])
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send Ctrl-C to one process alone")
def test_terminal_in_pipes_and_ctrl_c():
    p = subprocess.Popen(
        [sys.executable, "-c", TALK],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        encoding="utf-8",
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
            ),
            "PYTHONUTF8": "1",
        },
    )
    p.stdin.write("Rain?\n")
    p.stdin.flush()
    assert p.stdout.read(6) == "no no "
    p.send_signal(signal.SIGINT)
    out, _ = p.communicate("/help\nRain?\n", timeout=60)
    assert (
        "… stopped" in out
        and "/reset" in out
        and "Yes \ufffd[2J." in out
        and "\x1b" not in out
        and "> " not in out
    )
    lengths = json.loads(out.splitlines()[-1])
    assert len(lengths) == 4 and 6 <= lengths[1] < 270


ENDLESS = """
import torch
from minigpt.model.gpt import GPT, GPTConfig
from minigpt.serve import serve
from minigpt.tokenizer.bpe import train_tokenizer
tok = train_tokenizer(["A server that is stopped. 停。"]*9, vocab_size=280)
model = GPT(GPTConfig(
    vocab_size=tok.vocab_size, dim=16, n_layer=1, n_head=2, n_kv_head=1, ffn_dim=32,
    max_len=1 << 20)).eval()
type(tok).stop_ids = property(lambda self: ())      # an answer without an end
serve({"m": (model, tok)}, port=0, say=lambda line: print(line, flush=True))
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows cannot send Ctrl-C to one process alone")
def test_ctrl_c_during_a_streamed_answer():
    "The client gets an error, and the process exits normally, without an abort of torch's threads."
    p = subprocess.Popen(
        [sys.executable, "-c", ENDLESS],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    try:
        port = int(re.search(r":(\d+)/v1", p.stdout.readline())[1])
        client = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        client.request(
            "POST",
            "/v1/completions",
            json.dumps(dict(model="m", prompt="A", stream=True, max_tokens=1 << 18, logit_bias={})),
            {"Content-Type": "application/json"},
        )
        answer = client.getresponse()
        assert answer.status == 200 and answer.readline().startswith(b"data: ")
        p.send_signal(signal.SIGINT)
        rest = answer.read()
        output = p.communicate(timeout=60)[1]
    finally:
        p.kill()
    assert p.returncode == 0 and "Fatal" not in output and "Traceback" not in output, output
    assert b"this server has been stopped" in rest
