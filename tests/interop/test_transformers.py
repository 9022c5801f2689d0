"""Our checkpoints open in transformers directly: the same logits, greedy text and token ids.

Runs with transformers 5 (`make test`) and with 4.57 (`make compat-transformers`). The weights are
trained a little first: at initialization attention is nearly uniform, so a wrong rotary base, for
example, would hardly show.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer as HFTokenizer, decoders, models, pre_tokenizers, trainers

from minigpt.checkpoint.store import State, load_model, write_checkpoint
from minigpt.model.generation import complete, generate
from minigpt.model.gpt import GPT, GPTConfig, from_hf
from minigpt.tokenizer.bpe import chat_messages, load_tokenizer, train_tokenizer
from minigpt.train.trainer import fit

transformers = pytest.importorskip("transformers")

CORPUS = [
    "The old keeper climbed the stairs at dusk and lit the lamp for the ships that came home late.",
    "Two boats left the harbour before sunrise; only one of them returned with fish.",
    "守塔的老人每天黄昏点亮灯火，等待晚归的船只。",
    "清晨两只小船离开港口，傍晚只有一只满载而归。",
    "def count(ships):\n    return sum(1 for s in ships if s.sails > 2)\n",
    "Numbers: 3, 14, 159, 2653. Done 🚢⛵!",
]
TEXTS = [
    "",
    " ",
    "The keeper's lamp isn't lit.",
    "  two  spaces\tand a tab\r\n\r\nnew line \n",
    "老人说：“船在１２３４年沉了。”",
    "🚢👩‍🚀 e\u0301 ไทย カタカナ العربية \ufffd",
    "for i in range(10):\n\tprint(f'{i:>4}')  # x<=3 && y!=0",
    "1234567 3.14159",
    "<|im_start|>user\nhi<|im_end|>\n<think>a</think><|endoftext|>",
    "</tool_call> <tool_call>  <ultra_think>x</ultra_think>",
    "<|im_end",
    "a<|im_end|> b",
]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": '天气 & "weather" <b>',
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CONVERSATIONS = {
    "one turn": [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Hello."}],
    "system, turns": [
        {"role": "system", "content": "Answer briefly."},
        {"role": "user", "content": "一加一？"},
        {"role": "assistant", "content": "二。"},
        {"role": "user", "content": "  again \n"},
        {"role": "assistant", "content": "\n二！ "},
    ],
    "tools, list": [
        {"role": "system", "content": "", "tools": json.dumps([WEATHER])},
        {"role": "user", "content": "Rain in Wuhan?"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"name": "weather", "arguments": {"city": "武汉", "days": 2}},
                {"name": "weather", "arguments": {}},
            ],
        },
        {"role": "tool", "content": '{"rain": true}'},
        {"role": "tool", "content": '{"rain": null}'},
        {"role": "assistant", "content": "Yes <b>'it'</b> & more."},
    ],
    "tools, string": [
        {"role": "system", "content": "Use tools.", "tools": json.dumps([WEATHER])},
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": json.dumps(
                [{"function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}]
            ),
        },
        {"role": "tool", "content": "no"},
    ],
    "reasoning": [
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "reasoning_content": "Two and two.\n四", "content": "4"},
        {"role": "user", "content": "And 3?"},
        {"role": "assistant", "content": "<think>\nThree.\n</think>\n\n7"},
    ],
    "question": [{"role": "user", "content": "Who are you? <|im_end|>"}],
}


def save_plain(folder, model, tokenizer):
    "Write a weights-only checkpoint, as a run does."
    write_checkpoint(
        folder, State(model.config, model.weights(), tokenizer, dict(global_step=0)), "best"
    )


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(CORPUS * 20, vocab_size=500)


@pytest.fixture(scope="module")
def stream(tokenizer):
    "A few thousand tokens in an order that does not repeat."
    order = torch.randint(len(CORPUS), (200,), generator=torch.Generator().manual_seed(3)).tolist()
    return torch.tensor(
        [i for n in order for i in [*tokenizer.encode(CORPUS[n]), tokenizer.eos_id]]
    )


def trained(config, stream, steps=40):
    torch.manual_seed(0)
    model = GPT(config)
    opt = torch.optim.AdamW(model.parameters(), 5e-3)
    for _step in range(steps):
        at = torch.randint(len(stream) - 129, (4,))
        rows = torch.stack([stream[i : i + 129] for i in at.tolist()])
        loss = model.loss(rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss < 4, "the loss did not fall"
    return model.eval()


@pytest.fixture(
    scope="module",
    params=[
        (qk, theta, tied)
        for qk in (False, True)
        for theta in (10_000.0, 500_000.0)
        for tied in (True, False)
    ],
    ids=lambda p: f"{'qwen3' if p[0] else 'llama'}-{p[1]:.0f}-{'tied' if p[2] else 'untied'}",
)
def saved(request, tmp_path_factory, tokenizer, stream):
    "A trained model and the folder it was saved in."
    qk_norm, theta, tied = request.param
    config = GPTConfig(
        vocab_size=tokenizer.vocab_size,
        dim=64,
        n_layer=2,
        n_head=4,
        n_kv_head=2,
        ffn_dim=128,
        max_len=1024,
        head_dim=24 if qk_norm else None,
        qk_norm=qk_norm,
        rope_theta=theta,
        tied=tied,
    )
    model, folder = trained(config, stream), tmp_path_factory.mktemp("plain")
    save_plain(folder, model, tokenizer)
    return model, folder


def our_logits(model, ids):
    with torch.no_grad():
        return model(ids)


def test_logits_and_greedy_text_are_equal(saved, stream, tokenizer):
    model, folder = saved
    hf, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(hf).__name__ == ("Qwen3ForCausalLM" if model.config.qk_norm else "LlamaForCausalLM")
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert (
        hf.dtype == torch.float32
        and sum(p.numel() for p in hf.parameters()) == model.config.n_params
    )
    hf.eval()
    for n in (8, 700):
        ids = stream[None, :n]
        with torch.no_grad():
            assert (hf(ids).logits - our_logits(model, ids)).abs().max() < 1e-4
    # The check above would detect a wrong rotary base:
    other = (
        GPT(
            GPTConfig.from_dict(
                {**model.config.to_dict(), "rope_theta": 510_000.0 - model.config.rope_theta}
            )
        )
        .load_weights(model.weights())
        .eval()
    )
    assert (
        our_logits(other, stream[None, :700]) - our_logits(model, stream[None, :700])
    ).abs().max() > 1e-2

    prompt = tokenizer.encode("The old")
    text = hf.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
        do_sample=False,
        max_new_tokens=40,
    )[0, len(prompt) :].tolist()
    if text[-1] in tokenizer.stop_ids:
        text.pop()
    assert text == list(
        generate(model, prompt, temperature=0, max_new_tokens=40, stop_ids=tokenizer.stop_ids)
    )
    assert complete(
        model, tokenizer, "The old", temperature=0, max_new_tokens=40
    ) == tokenizer.decode(text, skip_special=True)


def test_checkpoints_of_transformers_open_here(saved, stream, tmp_path):
    model, folder = saved
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    hf.save_pretrained(tmp_path)
    config = from_hf(json.loads((tmp_path / "config.json").read_text(encoding="utf-8")))
    assert config == model.config
    again = GPT(config).load_weights(load_file(tmp_path / "model.safetensors")).eval()
    assert torch.equal(our_logits(again, stream[None, :50]), our_logits(model, stream[None, :50]))


def load_hf(folder):
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    assert isinstance(tok, transformers.PreTrainedTokenizerFast)
    return tok


def assert_same_chat(tokenizer, hf, conversation, name, add_generation_prompt=False):
    "Assert that a conversation has the same ids in both."
    messages, tools = chat_messages(conversation)
    want = hf.apply_chat_template(
        messages,
        tools=tools,
        tokenize=True,
        return_dict=False,
        add_generation_prompt=add_generation_prompt,
    )
    got = tokenizer.encode(
        tokenizer.render(conversation, add_generation_prompt=add_generation_prompt), special=True
    )
    assert got == list(want), (
        f"{name}: {tokenizer.decode(got)!r} here, {hf.decode(want)!r} in transformers"
    )


def test_token_ids_are_equal(saved):
    model, folder = saved
    hf, tokenizer = load_hf(folder), load_tokenizer(folder)
    assert hf.eos_token_id == tokenizer.eos_id and len(hf) == tokenizer.vocab_size
    for text in TEXTS + CORPUS:
        ids = tokenizer.encode(text, special=True)
        assert ids == hf(text)["input_ids"], repr(text)
        assert hf.decode(ids) == tokenizer.decode(ids) == text
    for name, conversation in CONVERSATIONS.items():
        for open_turn in (False, True):
            assert_same_chat(tokenizer, hf, conversation, name, open_turn)


def call_messages(arguments):
    return [
        {"role": "user", "content": "Rain?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "type": "function",
                    "id": "call_1",
                    "function": {"name": "weather", "arguments": arguments},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "no"},
    ]


@pytest.mark.parametrize(
    "arguments",
    [{}, {"city": "武汉", "note": 'x, "y": \\ a/b\n🌧', "n": [1, 2.5, None, {"deep": [True]}]}],
)
def test_openai_calls_are_rendered(saved, arguments):
    """Directly, without calling `chat_messages` first.

    Arguments are an object or JSON, however it is formatted.
    """
    hf, tokenizer = load_hf(saved[1]), load_tokenizer(saved[1])
    for a in (
        arguments,
        json.dumps(arguments),
        json.dumps(arguments, ensure_ascii=False, separators=(",", ":")),
        json.dumps(arguments, indent=2).replace("/", "\\/"),
    ):
        want = tokenizer.encode_chat(call_messages(arguments))[0].tolist()
        assert tokenizer.encode_chat(call_messages(a))[0].tolist() == want
        got = hf.apply_chat_template(call_messages(a), tokenize=True, return_dict=False)
        assert list(got) == want, hf.decode(got)


def test_template_of_older_versions_is_supported(tokenizer):
    "Its tokenizers still work with it, and give the same ids as before, also with fast encoding."
    import hashlib

    from minigpt.tokenizer.bpe import _OWN_TEMPLATES, CHAT_TEMPLATE, Tokenizer

    assert (
        hashlib.md5(_OWN_TEMPLATES[1].encode()).hexdigest() == "874c3684cf717e847fb3208fb7527fc4"
        and tokenizer.config["chat_template"] == CHAT_TEMPLATE
    )
    old = Tokenizer(tokenizer.hf, {**tokenizer.config, "chat_template": _OWN_TEMPLATES[1]})
    assert old.hash == tokenizer.hash
    for conversation in CONVERSATIONS.values():
        assert old.render(conversation) == tokenizer.render(conversation)
        if any(m["role"] == "assistant" for m in conversation):
            assert [x.tolist() for x in old.encode_chat(conversation)] == [
                x.tolist() for x in tokenizer.encode_chat(conversation)
            ]
    marked = [
        {"role": "user", "content": "x<|im_start|>assistant\ny<|im_end|>"},
        {"role": "assistant", "content": "z"},
    ]  # the parts of foreign templates are recognized by these markers
    assert [x.tolist() for x in old.encode_chat(marked)] == [
        x.tolist() for x in tokenizer.encode_chat(marked)
    ]


def test_real_conversations_have_equal_ids(tmp_path, tokenizer, root):
    for folder, qk_norm, rows in ((tmp_path / "llama", False, 300), (tmp_path / "qwen3", True, 30)):
        save_plain(
            folder,
            GPT(
                GPTConfig(
                    vocab_size=tokenizer.vocab_size,
                    dim=8,
                    n_layer=1,
                    n_head=2,
                    n_kv_head=1,
                    ffn_dim=8,
                    qk_norm=qk_norm,
                )
            ),
            tokenizer,
        )
        hf = load_hf(folder)
        for name in (
            "sft_zh",
            "sft_en",
            "tool_calling",
            "tool_calling_minimind_str",
            "reasoning",
            "identity",
        ):
            for path in root.parent.glob(
                f"shared/data/{name}.jsonl"
            ):  # only if that data is available
                with path.open(encoding="utf-8") as f:
                    for n, line in zip(range(1, rows + 1), f):
                        assert_same_chat(
                            tokenizer, hf, json.loads(line)["conversations"], f"{name} line {n}"
                        )


MINIMIND_TEMPLATE = (
    "{% if messages[0]['role'] == 'system' %}{{ '<|im_start|>system\n' + messages[0]['content'] +"
    " '<|im_end|>\n' }}{% else %}{{ '<|im_start|>system\nBe helpful<|im_end|>\n' }}{% endif %}{%"
    " for message in messages %}{% if message['role'] == 'user' %}{{ '<|im_start|>user\n' +"
    " message['content'] + '<|im_end|>\n<|im_start|>assistant\n' }}{% elif message['role'] =="
    " 'assistant' %}{{ message['content'] + '<|im_end|>' + '\n' }}{% endif %}{% endfor %}"
)


def test_minimind_tokenizer_gives_equal_ids(tmp_path):
    """It is built as MiniMind builds its own: byte-level BPE with GPT-2's pattern, special tokens
    first.

    The template itself opens the assistant's turn.
    """
    raw = HFTokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        decoders.ByteLevel(),
    )
    raw.train_from_iterator(
        CORPUS * 20,
        trainers.BpeTrainer(
            vocab_size=450,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    raw.save(str(tmp_path / "tokenizer.json"))
    token = {
        t: {
            "content": t,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": True,
        }
        for t in ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    }
    config = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        add_bos_token=False,
        add_eos_token=False,
        add_prefix_space=False,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
        model_max_length=32768,
        chat_template=MINIMIND_TEMPLATE,
        added_tokens_decoder={str(raw.token_to_id(t)): v for t, v in token.items()},
    )
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer, hf = load_tokenizer(tmp_path), load_hf(tmp_path)
    assert tokenizer.eos_id == hf.eos_token_id == 2 and tokenizer.stop_ids == (0, 2)
    for text in TEXTS + CORPUS:
        ids = tokenizer.encode(text, special=True)
        assert ids == hf(text)["input_ids"] == raw.encode(text, add_special_tokens=False).ids, repr(
            text
        )
        assert tokenizer.decode(ids) == text == tokenizer.decode(tokenizer.encode(text))
    for name in ("one turn", "system, turns", "question"):
        assert_same_chat(tokenizer, hf, CONVERSATIONS[name], name)
    again = load_tokenizer(tokenizer.save(tmp_path / "again"))
    assert again.hash == tokenizer.hash and load_hf(tmp_path / "again")("船 <|im_end|>")[
        "input_ids"
    ] == tokenizer.encode("船 <|im_end|>", special=True)


def test_every_directory_of_a_run_opens_in_transformers(tmp_path):
    "Step checkpoint, best model and the run's own folder, unchanged."
    (tmp_path / "text.txt").write_text(
        "\n\n".join(f"{s} {n}" for n in range(400) for s in CORPUS), encoding="utf-8"
    )
    run = fit(
        GPTConfig(vocab_size=600, dim=32, n_layer=2, n_head=4, n_kv_head=2, ffn_dim=64),
        tmp_path / "text.txt",
        output_dir=tmp_path / "run",
        tokenizer_vocab_size=600,
        max_seq_len=32,
        batch_size=4,
        max_steps=30,
        save_steps=20,
        eval_steps=10,
        validation_split=0.2,
        num_threads=1,
        progress=False,
        plot_loss=False,
    )
    text = "It snowed on the harbour. 船开了。"
    ids = run.tokenizer.encode(text, special=True)
    for folder in (run.path, run.best.path, *(c.path for c in run.checkpoints)):
        assert load_hf(folder)(text)["input_ids"] == ids
        theirs_ = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        with torch.no_grad():
            difference = (
                (theirs_(torch.tensor([ids])).logits - load_model(folder)(torch.tensor([ids])))
                .abs()
                .max()
            )
        assert difference < 1e-4, folder
