"""Files that are meant to take memory or time, or to send sequences to a terminal.

Each gives a result or an error that names it, and soon.
"""

import gzip
import io
import json
import os
import pickle
import random
import shutil
import signal
import tracemalloc
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import orjson
import pytest
import torch
import zstandard
from jinja2.sandbox import ImmutableSandboxedEnvironment
from typer.testing import CliRunner

from minigpt import cli
from minigpt.checkpoint import headers
from minigpt.checkpoint.analysis import analyze as look_into
from minigpt.checkpoint.headers import foreign, interpret_pickle, torch_file
from minigpt.checkpoint.store import (
    CheckpointError,
    CheckpointStore,
    State,
    load_model,
    pack_rng,
    problem,
    read_pickle,
    write_checkpoint,
)
from minigpt.core.files import NotAFile, read_json
from minigpt.data import readers as formats
from minigpt.data.preparation import prepare
from minigpt.data.quality import analyze
from minigpt.data.readers import DataError, data_files, inspect_file, parse_block, read_blocks
from minigpt.data.tokensets import sample_texts
from minigpt.diffusion import TessConfig
from minigpt.model.adapters import lora
from minigpt.model.gpt import GPT, GPTConfig, from_hf, to_hf
from minigpt.run.backup import Backup, read_heartbeat, restore_run
from minigpt.run.metrics import Follower, Metrics, RunLog, read_log, read_metrics
from minigpt.tokenizer.bpe import CHAT_TEMPLATE, Tokenizer, load_tokenizer, train_tokenizer
from minigpt.tokenizer.template import TemplateLimit, render_template
from minigpt.train.trainer import fit


def peak(f):
    "Return the result of a call and its peak memory in MiB."
    tracemalloc.start()
    try:
        return f(), tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()


@contextmanager
def within(seconds=5):
    "Fail on a hang: a blocked open() and an endless Python loop are both interrupted."

    def late(*_):
        raise AssertionError(f"not done in {seconds} seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def show(*command):
    "Return the output of a command, and check that it exits normally."
    result = CliRunner().invoke(cli.app, [*map(str, command)])
    if isinstance(result.exception, (ValueError, TypeError, OSError, RuntimeError)):
        return f"error: {result.exception}"  # main() shows these in one line
    assert not result.exception or isinstance(result.exception, SystemExit), result.exception
    return result.output


# --- packed data ----------------------------------------------------------------------------------
def rows(path):
    return [r for b in read_blocks(path) for r in parse_block(b)]


def refused(f):
    "Return the message of the error."
    with pytest.raises(DataError) as e:
        f()
    return str(e.value)


@pytest.mark.parametrize("packer", ["zstd", "gzip"])
def test_line_that_unpacks_to_128_mib_is_refused(tmp_path, monkeypatch, packer):
    monkeypatch.setattr(formats, "LONGEST", 1 << 20)
    file = tmp_path / "a.jsonl"
    opened = (
        gzip.open(file, "wb", 1)
        if packer == "gzip"
        else zstandard.ZstdCompressor().stream_writer(open(file, "wb"))
    )
    with opened as f:
        f.write(b'{"text": "')
        for _ in range(32):
            f.write(bytes(1 << 22))
    assert file.stat().st_size < 2 << 20
    (look, found, texts), most = peak(
        lambda: (inspect_file(file), rows(file), list(sample_texts([file])))
    )
    assert (
        look.packed == packer
        and [(r.line, r.reason) for r in found] == [(1, "row too long")]
        and not texts
        and most < 16
    )
    if packer == "gzip":
        return  # the same from here on, but slower
    report, most = peak(lambda: analyze(file))
    assert "1 × row too long" in str(report) and most < 16
    reported, most = peak(
        lambda: refused(lambda: prepare(file, tmp_path / "out.jsonl", progress=False))
    )
    assert "row too long" in reported and most < 16


def test_zstd_frames_are_unpacked(tmp_path):
    """Unpacked block by block, they equal the original, whichever program packed them.

    Truncated anywhere but between frames, they are refused.
    """
    rng, file = random.Random(0), tmp_path / "a.txt"
    zstd = lambda f: formats._IteratorStream(f, formats._decompress_zstd(f))
    for _i in range(40):
        packed, whole, ends = b"", b"", []
        for _ in range(rng.randint(1, 3)):
            n = rng.choice([0, 1, 100, 131071, 131072, 131073, 300_000])
            data = rng.choice([rng.randbytes(n), bytes(n), b"snow %d " % n * (n // 8)])
            c = zstandard.ZstdCompressor(
                level=rng.choice([-5, 1, 3, 12]),
                write_checksum=rng.random() < 0.5,
                write_content_size=rng.random() < 0.5,
            )
            if packed:
                packed += rng.choice([b"", b"\x53\x2a\x4d\x18\7\0\0\0skipped"])
                ends.append(len(packed))
            packed += c.compress(data)
            whole += data
            ends.append(len(packed))
        assert io.BufferedReader(zstd(io.BytesIO(packed)), 1 << 20).read() == whole
        for cut in {rng.randrange(1, len(packed)) for _ in range(9)} - {*ends}:
            file.write_bytes(packed[:cut])
            with pytest.raises((EOFError, zstandard.ZstdError)):
                io.BufferedReader(zstd(open(file, "rb")), 1 << 20).read()


def test_unterminated_string_in_an_array_is_refused(tmp_path, monkeypatch):
    "In a text or in an object: it is reported before the whole file is in memory."
    monkeypatch.setattr(formats, "LONGEST", 1 << 20)
    for head, what in (
        (b'[\n"', "the text on line 2"),
        (b'[\n{"text": "', "the object on line 2"),
        (b'[\n{"text": ["a", "', "the object on line 2"),
    ):
        with zstandard.ZstdCompressor().stream_writer(open(tmp_path / "a.json", "wb")) as f:
            f.write(head)
            f.write(b"a" * (6 << 20))
        reported, most = peak(lambda: refused(lambda: rows(tmp_path / "a.json")))
        assert f"{what} has no end within 1 MiB" in reported and most < 8


# --- pipes and devices instead of files -----------------------------------------------------------
SMALL = GPTConfig(vocab_size=300, n_layer=1, dim=16, n_head=2, n_kv_head=1, ffn_dim=32, max_len=64)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    "A run with two checkpoints, the second also as its final model; an adapter; a text."
    d = tmp_path_factory.mktemp("made")
    tok = train_tokenizer(["The old mill stood still. 旧磨坊静静地立着。"] * 9, vocab_size=300)
    (d / "a.txt").write_text("The old mill stood still.\n" * 9)
    model = GPT(SMALL).eval()
    for step in 2, 4:
        state = State(
            SMALL,
            model.weights(),
            tok,
            dict(global_step=step, loss=1.5),
            {},
            ({}, dict(optimizer="AdamW", numbers={}, groups=[])),
            pack_rng(),
        )
        write_checkpoint(d / "run" / "checkpoints" / f"checkpoint-{step}", state)
    tok.save(d / "run" / "tokenizer")
    (d / "run" / "run.json").write_text(
        json.dumps(
            dict(
                train=dict(max_steps=4, save_steps=2),
                max_steps=4,
                model=SMALL.to_dict(),
                attempts=[{}],
                id="1",
            )
        )
    )
    with open(d / "run" / "metrics.jsonl", "w") as f:
        for row in (
            dict(event="start", step=0),
            dict(step=2, loss=5.0, lr=1e-3, sample="The mill"),
            dict(step=4, loss=4.5, eval_loss=4.75),
        ):
            f.write(json.dumps({**row, "attempt": 1, "time": 1.7e9 + row["step"]}) + "\n")
    (d / "run" / "run.log").write_text("2026-11-28 12:00:00 saved\n")
    backup = dict(
        time=1.7e9,
        doing="idle",
        pending=None,
        copied=dict(name="checkpoint-4", step=4),
        confirmed=None,
        server_tells=False,
        failed=None,
        stopped=None,
    )
    (d / "run" / "backup.json").write_text(json.dumps(backup))
    adapted = lora(load_model(d / "run" / "checkpoints" / "checkpoint-4"), r=2)
    write_checkpoint(
        d / "adapter",
        State(
            None,
            adapted.weights(),
            tok,
            dict(global_step=1),
            adapter=adapted.lora.to_peft(str(d / "run" / "checkpoints" / "checkpoint-4")),
        ),
        "final",
    )
    (d / "adapter" / "MANIFEST.json").unlink()
    return d


@pytest.fixture
def copy(run_folder, tmp_path):
    "A copy of it that a test may damage."
    shutil.copytree(run_folder, tmp_path / "made")
    return tmp_path / "made"


def replace_by_pipe(path):
    "A pipe instead of a file, with no process at its other end."
    path.unlink(missing_ok=True)
    os.mkfifo(path)
    return path


def test_pipes_and_devices_as_data_are_refused(tmp_path):
    with within():
        for use in inspect_file, data_files, lambda p: list(sample_texts([p])), analyze:
            with pytest.raises(DataError, match="a.jsonl is a FIFO, not a file"):
                use(replace_by_pipe(tmp_path / "a.jsonl"))
            with pytest.raises(DataError, match="/dev/zero is a device, not a file"):
                use(Path("/dev/zero"))


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "model.safetensors.zst",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "MANIFEST.json",
    ],
)
def test_pipe_in_a_model_directory_is_refused(copy, name):
    path = copy / "run" / "checkpoints" / "checkpoint-4"
    if name != "MANIFEST.json":
        (path / "MANIFEST.json").unlink()
    if name not in ("config.json", "MANIFEST.json"):
        (path / "model.safetensors").unlink()
    replace_by_pipe(path / name)
    with within(), pytest.raises((NotAFile, RuntimeError), match=f"{name} is a FIFO, not a file"):
        load_model(path)
    with within():
        look_into(path)


@pytest.mark.parametrize(
    "name",
    ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", "trainer_state.json"],
)
def test_pipe_in_an_adapter_is_refused(copy, name):
    if name == "adapter_model.bin":
        (copy / "adapter" / "adapter_model.safetensors").unlink()
    replace_by_pipe(copy / "adapter" / name)
    with within(), pytest.raises((NotAFile, RuntimeError), match=f"{name} is a FIFO"):
        load_model(copy / "adapter")


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "chat_template.jinja"])
def test_pipe_in_a_tokenizer_is_refused(copy, name):
    replace_by_pipe(copy / "run" / "tokenizer" / name)
    with within(), pytest.raises(NotAFile, match=f"{name} is a FIFO"):
        load_tokenizer(copy / "run" / "tokenizer")


def test_checkpoint_with_a_pipe_is_skipped(copy):
    "It is skipped, and the previous checkpoint is used."
    store = CheckpointStore(copy / "run" / "checkpoints")
    path, passed = store.folder / "checkpoint-4", []
    manifest = read_json(path / "MANIFEST.json")
    manifest["files"]["pipe.json"] = dict(size=0, xxh3_128="0" * 32)
    (path / "MANIFEST.json").write_bytes(orjson.dumps(manifest))
    replace_by_pipe(path / "pipe.json")
    with within():
        assert "pipe.json is not a file" in str(problem(path))
        assert (
            store.newest(lambda c, why: passed.append((c.step, str(why)))).step == 2
            and "pipe.json is not a file" in passed[0][1]
        )
        replace_by_pipe(path / "MANIFEST.json")
        assert (
            "MANIFEST.json is a FIFO, not a file" in str(problem(path)) and store.newest().step == 2
        )
        assert "MANIFEST.json is a FIFO, not a file" in show("runs", copy / "run")


@pytest.mark.parametrize(
    "name", ["run.json", "metrics.jsonl", "run.log", "backup.json", "heartbeat.json"]
)
def test_pipe_in_a_run_is_reported(copy, name):
    "What reads it reports it, and everything else continues."
    replace_by_pipe(copy / "run" / name)
    with within(20):
        shown = [
            show("runs", copy),
            show("runs", copy / "run"),
            show("monitor", copy / "run", "--once"),
            show("plot", copy / "run", "--output", copy / "a.png"),
        ]
        silent = {
            "run.json": [3],
            "metrics.jsonl": [1],
            "run.log": [0, 1, 2, 3],
            "backup.json": [0, 3],
            "heartbeat.json": [0, 1, 3],
        }[name]
        assert [f"{name} is a FIFO" in s for s in shown] == [i not in silent for i in range(4)]


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.log"])
def test_pipe_in_a_backup_is_reported(copy, name):
    replace_by_pipe(copy / "run" / name)
    with within(20), pytest.raises(NotAFile, match=f"{name} is a FIFO, not a file"):
        restore_run(Backup(copy, copy / "new" / "run"))


def test_pipe_as_lock_is_refused(tmp_path):
    (tmp_path / "run").mkdir()
    replace_by_pipe(tmp_path / "run" / ".lock")
    with (
        within(20),
        pytest.raises(OSError, match="cannot be written: .*lock is a FIFO, not a file"),
    ):
        fit("tiny", "stories", output_dir=tmp_path / "run", progress=False)


def test_pipes_do_not_block_repeated_reads_and_writes(tmp_path):
    pipe = replace_by_pipe(tmp_path / "pipe")
    with within():
        for use in read_metrics, RunLog, Metrics, lambda p: torch_file(p, Counter()):
            with pytest.raises(NotAFile, match="is a FIFO"):
                use(pipe)
        replace_by_pipe(tmp_path / "heartbeat.json")
        with pytest.raises(NotAFile, match="heartbeat.json is a FIFO"):
            read_heartbeat(tmp_path)
        assert (
            read_log(pipe) == [] and not (f := Follower(pipe)).read() and "is a FIFO" in f.problem
        )


# --- headers and pickles that take forever --------------------------------------------------------
def tensors_file(path, header, values=b""):
    "Write a safetensors file by hand."
    head = json.dumps(header).encode()
    path.write_bytes(len(head).to_bytes(8, "little") + head + values)
    return path


def test_header_with_too_many_tensors_is_refused(copy):
    path = copy / "run" / "checkpoints" / "checkpoint-4"
    (path / "MANIFEST.json").unlink()
    file = tensors_file(
        path / "model.safetensors",
        {f"x{i}": dict(dtype="U8", shape=[0], data_offsets=[0, 0]) for i in range(50_001)},
    )
    with within():
        with pytest.raises(CheckpointError, match="more than the limit of 50,000 entries"):
            load_model(path)
        with pytest.raises(ValueError, match="more than the limit of 50,000 entries"):
            look_into(file)
        assert any("more than the limit of 50,000 entries" in p for p in look_into(path).problems)


def test_many_heads_and_embeddings_take_linear_time(tmp_path):
    "Each is inspected once, not against each other, and the one copy is found."
    n = 1000
    names = [f"{i}.head" for i in range(n)] + [f"{i}.emb" for i in range(n)]
    header = {
        k: dict(dtype="U16", shape=[1, 1], data_offsets=[2 * i, 2 * i + 2])
        for i, k in enumerate(names)
    }
    values = b"".join(i.to_bytes(2, "little") for i in range(2 * n - 1)) + (7).to_bytes(2, "little")
    with within(10):
        a = look_into(tensors_file(tmp_path / "a.safetensors", header, values))
    assert [(t.name, t.tied) for t in a.tensors if t.tied] == [
        ("7.head", f"{n - 1}.emb")
    ] and a.params == 2 * n - 1


def test_more_layers_than_tensors_is_refused(copy):
    path = copy / "run" / "checkpoints" / "checkpoint-4"
    (path / "MANIFEST.json").unlink()
    config = read_json(path / "config.json")
    (path / "config.json").write_bytes(orjson.dumps({**config, "num_hidden_layers": 999}))
    with (
        within(),
        pytest.raises(
            CheckpointError,
            match="its configuration has 999 layers, but there are only 11 tensors",
        ),
    ):
        load_model(path)


NESTED = b")" + b"q\0h\0\x86" * 21  # a pair of pairs of pairs …
PICKLES = dict(
    key=(b"}" + NESTED + b"Ns.", "tuples within tuples"),
    in_a_set=(b"cbuiltins\nset\n]" + NESTED + b"a\x85R.", "tuples within tuples"),
    no_function=(b"])R.", "calls something that is not a function"),
    memory=(b"cbuiltins\nbytearray\nJ\0\0\0\x70\x85R.", "asks for 1,879,048,192 bytes"),
    long=(b"]" + b"N0" * 1000 + b".", "more than 1,000 instructions"),
)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("kind", PICKLES)
def test_pickles_that_take_forever_are_refused(tmp_path, monkeypatch, kind, zipped):
    "Instructions that a weights-only unpickler would still execute."
    pickled, why = PICKLES[kind]
    if kind == "long":
        monkeypatch.setattr(headers, "_MAX_LOADED", 1000)
    if zipped:
        with zipfile.ZipFile(tmp_path / "a.pt", "w") as z:
            z.writestr("archive/data.pkl", b"\x80\x02" + pickled)
            z.writestr("archive/version", "3\n")
    else:
        (tmp_path / "a.pt").write_bytes(
            b"".join(pickle.dumps(x, 2) for x in (0x1950A86A20F9469CFC6C, 1001, {}))
            + b"\x80\x02"
            + pickled
        )
    with (
        within(),
        pytest.raises(CheckpointError, match=f"a.pt is not used: .*{why}.*Save its tensors alone"),
    ):
        read_pickle(tmp_path / "a.pt")


def test_view_beyond_its_storage_is_refused(copy):
    path = copy / "run" / "checkpoints" / "checkpoint-4"
    (path / "MANIFEST.json").unlink()
    weights = dict(load_model(path).weights())
    (path / "model.safetensors").unlink()
    torch.save(weights, path / "pytorch_model.bin")
    load_model(path)
    weights["model.embed_tokens.weight"] = torch.zeros(1).expand(300, 16)
    torch.save(weights, path / "pytorch_model.bin")
    with pytest.raises(
        CheckpointError, match="model.embed_tokens.weight claims more values than are stored for it"
    ):
        load_model(path)


# --- sizes that no model has ----------------------------------------------------------------------
FIELDS = dict(
    vocab_size="vocab_size",
    dim="hidden_size",
    n_layer="num_hidden_layers",
    n_head="num_attention_heads",
    n_kv_head="num_key_value_heads",
    head_dim="head_dim",
    ffn_dim="intermediate_size",
    max_len="max_position_embeddings",
)
SIZES = [10**11, 10**400, -1, 0, True, 2.5, float("nan"), "8", [8], {"a": 8}, [[8] * 9] * 9]


@pytest.mark.parametrize("value", SIZES, ids=lambda v: str(v)[:9])
def test_impossible_sizes_of_a_gpt_are_refused(value):
    "The error names the value under the name that the file uses."
    hf = to_hf(SMALL)
    for ours, theirs in FIELDS.items():
        with within(1):
            with pytest.raises(
                ValueError, match=f"^{ours}=.*must be a whole number, at least 1 and at most"
            ):
                GPTConfig(**{**SMALL.to_dict(), ours: value})
            with pytest.raises(
                ValueError,
                match=f"^config.json: {theirs}=.*must be a whole number, at least 1 and at most",
            ):
                from_hf({**hf, theirs: value})


@pytest.mark.parametrize("value", SIZES, ids=lambda v: str(v)[:9])
def test_impossible_sizes_of_an_encoder_are_refused(value):
    shape = TessConfig(vocab_size=300, dim=16, n_layer=1, n_head=2, ffn_dim=32)
    hf = shape.to_hf()
    for ours, theirs in dict(
        FIELDS, type_vocab="type_vocab_size", num_diffusion_steps="num_diffusion_steps"
    ).items():
        if ours in ("n_kv_head", "head_dim"):
            continue
        with within(1):
            if ours != "type_vocab" or value != 0:
                with pytest.raises(ValueError, match=f"^{ours}=.*must be a whole number"):
                    TessConfig(**{**asdict(shape), ours: value})
            with pytest.raises(
                ValueError, match=f"^(config.json: )?{theirs}=.*must be a whole number"
            ):
                from_hf({**hf, theirs: value})


@pytest.mark.parametrize(
    "change",
    [
        dict(rope_theta="big"),
        dict(rope_theta=[1]),
        dict(rope_theta=1e305),
        dict(rope_theta=-1),
        dict(rope_scaling=[1]),
        dict(rope_parameters="x"),
        dict(rope_parameters={"rope_theta": []}),
        dict(layer_types=5),
        dict(layer_types=[["full_attention"]]),
        dict(tie_word_embeddings="false"),
        dict(attention_bias=[]),
        dict(rms_norm_eps="x"),
        dict(rms_norm_eps=0),
        dict(attention_dropout=[1]),
        dict(attention_dropout=2),
        dict(model_type=["llama"]),
        dict(model_type={}),
        dict(vocab_size=None),
    ],
    ids=str,
)
def test_invalid_values_of_a_config_are_refused(copy, change):
    path = copy / "run" / "checkpoints" / "checkpoint-4"
    (path / "MANIFEST.json").unlink()
    (path / "config.json").write_text(json.dumps({**read_json(path / "config.json"), **change}))
    with (
        within(),
        pytest.raises(
            CheckpointError,
            match=f"checkpoint-4 is not used: .*({next(iter(change))}|rope_theta|norm_eps|dropout)",
        ),
    ):
        load_model(path)


def test_sizes_too_large_together_are_refused():
    with pytest.raises(
        ValueError,
        match=r"vocab_size=16,777,216, dim=131,072.*has 2,250,566,402,048 parameters; the limit is",
    ):
        GPTConfig(vocab_size=1 << 24, dim=1 << 17, n_layer=1, n_head=2, n_kv_head=1, ffn_dim=8)
    with pytest.raises(ValueError, match="parameters; the limit is"):
        TessConfig(vocab_size=1 << 24, dim=1 << 17, n_layer=1, n_head=2, ffn_dim=8)


@pytest.mark.parametrize(
    "change",
    [
        dict(r=10**9),
        dict(r=10**5),
        dict(r=True),
        dict(r="8"),
        dict(r=-1),
        dict(r=None),
        dict(lora_alpha="x"),
        dict(lora_alpha=[1]),
        dict(lora_dropout="x"),
        dict(target_modules=5),
        dict(target_modules=[5]),
        dict(peft_type=["LORA"]),
        [],
    ],
    ids=str,
)
def test_invalid_adapter_configs_are_refused(copy, change):
    file = copy / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**read_json(file), **change} if change else []))
    what = {"lora_alpha": "alpha", "lora_dropout": "dropout"}.get(
        k := next(iter(change), "adapter_config.json"), k
    )
    with within(), pytest.raises(CheckpointError, match=f"adapter is not used: .*{what}"):
        load_model(copy / "adapter")


# --- an adapter whose base is an adapter ----------------------------------------------------------
def names_as_base(adapter, where):
    facts = read_json(adapter / "adapter_config.json")
    (adapter / "adapter_config.json").write_text(
        json.dumps({**facts, "base_model_name_or_path": str(where)})
    )


def test_adapter_of_itself_is_refused(copy):
    "Or of another adapter, in a cycle."
    a, b = copy / "adapter", copy / "other"
    shutil.copytree(a, b)
    (copy / "link").symlink_to(a)
    for itself in a, "adapter", "./../made/adapter/../adapter", copy / "link":
        names_as_base(a, itself)
        with pytest.raises(CheckpointError, match="adapter names itself as its base model"):
            load_model(a)
    names_as_base(a, b)
    names_as_base(b, a)
    with pytest.raises(
        CheckpointError,
        match=(
            "adapter is an adapter of .*other, which is an adapter too, and must be a full model"
        ),
    ):
        load_model(a)
    for nothing in "x\0y", "x" * 9000, "x/" * 3000:
        names_as_base(a, nothing)
        with pytest.raises(CheckpointError, match="which is not found. Copy that model"):
            load_model(a)
    names_as_base(a, "adapter")
    shutil.copytree(
        copy / "run" / "checkpoints" / "checkpoint-4", copy / "adapter" / "adapter"
    )  # a base inside it with the same name
    names_as_base(a, "adapter/adapter")
    assert load_model(a).base_path.endswith("adapter/adapter")


# --- chat templates that do not end ---------------------------------------------------------------
BIG = "{% set x = 'a'*10**4 %}"
ENDLESS = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{{ 'x' }}{% endfor %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) if 0 %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    (
        "{% macro f() %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor"
        " %}{% endmacro %}{% set x = f() %}"
    ),
    "{% for x in [1] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "{% for i in range(99999) %}{{ range(9999)|map('string')|join|length }}{% endfor %}",
]
LARGE = [
    "{{ 'a'*10**11 }}",
    "{{ ('a'*10**9)|length }}",
    "{{ [1]*10**9 }}",
    "{{ 'a'.ljust(10**11) }}",
    "{{ 'a'.center(10**11) }}",
    "{{ 'a\t'.expandtabs(10**11) }}",
    "{{ (1).to_bytes(10**11, 'big') }}",
    "{{ 'a'|center(10**11) }}",
    "{{ 'a\n\n'|indent(10**11) }}",
    "{{ [1]|batch(10**8, 1)|list }}",
    "{{ [1]|slice(10**8)|list }}",
    "{{ [1]|tojson(indent=10**11) }}",
    BIG + "{{ x.replace('a', x) }}",
    BIG + "{{ x|replace('a', x) }}",
    BIG + "{{ x.join(x) }}",
    BIG + "{{ x|join(x) }}",
    BIG + "{{ range(9999)|map('string')|join(x) }}",
    BIG + "{{ (x*9999)|list }}",
    BIG + "{{ (x*999).translate({97: x}) }}",
    BIG + "{{ ('a '*10**7).split()|length }}",
    "{% set x = 'snow' %}" + "{% set x = x ~ x %}" * 28,
    "{% set x = 'snow' %}" + "{% set x = x + x %}" * 28,
    "{% set x = 'snow' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 28,
    (
        "{% set ns = namespace(x='snow') %}{% for i in range(28) %}{% set ns.x = ns.x ~ ns.x %}{%"
        " endfor %}"
    ),
    (
        "{% set x = 'a'*10**5 %}{% macro m() %}{% for i in range(99) %}{{ x[1:] }}{% endfor %}{%"
        " endmacro %}{{ m() }}"
    ),
    "{% set x = 'a'*10**5 %}{% for i in range(99) %}{{ x|upper }}{% endfor %}",
    "{% set x = 'a'*10**6 %}{{ [x[1:], x[1:], x[1:], x[1:], x[1:]]|length }}",
]
LARGE += [
    f"{{% set x = [1] %}}{step * 22}{{{{ x }}}}"
    for step in (
        "{% set x = [x, x] %}",
        "{% set x = (x, x) %}",
        "{% set x = {'a': x, 'b': x} %}",
        "{% set x = dict(a=x, b=x) %}",
        "{% set x = [x]*2 %}",
        "{% set x = [x]|batch(2, x)|list %}",
        "{% set x = [x] + [x] %}",
    )
]
LARGE += [
    "{{ 9**(9**9) }}",
    "{% set x = 2**1000 %}" + "{% set x = x*x %}" * 40,
    "{{ '%99999999999d' % 1 }}",
    "{{ '%*d' % (10**11, 1) }}",
    "{{ '%*d'|format(10**11, 1) }}",
    "{{ '{:99999999999}'.format(1) }}",
    "{{ '{0:{1}}'.format(1, 10**11) }}",
    "{{ strftime_now('%1000000000d') }}",
    "{{ a }}" * 30_000,
    "{% autoescape true %}{% endautoescape %}",
]
WRONG = [
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% macro m(n) %}{{ m(varargs, varargs) if n else varargs }}{% endmacro %}{{ m(1, 1) }}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "{{ messages.__class__.__mro__ }}",
    "{{ lipsum(n=10**9) }}",
    "{% include 'x' %}",
    "{{ nothing.x }}",
    "{{",
]


@pytest.fixture(scope="module")
def own_template():
    return train_tokenizer(["The old mill stood still."] * 9, vocab_size=300)


@pytest.mark.parametrize("template", ENDLESS + LARGE + WRONG, ids=lambda t: t[:40])
def test_templates_that_take_forever_are_refused(own_template, monkeypatch, template):
    "An error is raised, also in a thread, soon, and almost no text is created meanwhile."
    monkeypatch.setattr("minigpt.tokenizer.template.SECONDS", 0.05)
    monkeypatch.setattr("minigpt.tokenizer.template._FREE_CHARS", 1 << 22)
    tok = Tokenizer(own_template.hf, {**own_template.config, "chat_template": template})
    with ThreadPoolExecutor(1) as pool, within(20):
        error, most = peak(
            lambda: pool.submit(tok.render, [dict(role="user", content="Snow?")]).exception()
        )
    assert (
        isinstance(error, ValueError)
        and "chat template" in str(error)
        and len(str(error)) < 500
        and most < 100
    )
    assert isinstance(error, TemplateLimit) or template in WRONG


def test_long_conversation_is_rendered():
    "The limit of a template grows with its input."
    messages = [dict(role="user", content="snow" * (1 << 20))] * 9
    assert len(
        render_template(
            "{% for m in messages %}{{ (m.content + 'x')|upper ~ m.content[1:] }}{% endfor %}",
            messages=messages,
        )
    ) == 9 * (8 << 20)
    with pytest.raises(TemplateLimit, match="creates more than"):
        render_template(
            "{% for m in messages %}" + "{{ m.content|upper }}" * 80 + "{% endfor %}",
            messages=messages[:1],
        )


TEMPLATES = [
    (
        "{%- for m in messages %}{%- if loop.first and m.role == 'system' %}{%- set ns ="
        " namespace(s=m.content) %}{{- ns.s ~ '|' ~ ns['s']|length }}{%- else %}{{- '<' + m['role']"
        " + '>' + m.content|trim + '</' ~ m.role ~ '>\\n' }}{%- endif %}{%- endfor %}"
    ),
    (
        "{% macro turn(role, text='') %}<|{{ role }}|>{{ text ~ '\\n' }}{{ varargs|length }}{%"
        " endmacro %}{% for m in messages %}{{ turn(m.role, m.content, 1) }}{% for w in"
        " m.content.split(' ')[:3] %}{{ w|upper }}{{ loop.length }}{{ ', ' if not loop.last }}{%"
        " else %}none{% endfor %}{% endfor %}"
    ),
    (
        "{% for m in messages %}{{ {'a': [1, m.role]}|tojson(indent=2) }}{{ '%s-%d'|format(m.role,"
        " loop.index) }}{{ [m.role, 'x']|join('/') }}{% set x %}{{ m.content|replace('o', '0') }}{%"
        " endset %}{{ x }}{{ '{:>5}'.format(loop.index) }}{{ '%5d' % loop.index }}{{ (1, 2) }}{{"
        " m|dictsort }}{% endfor %}"
    ),
    (
        "{{ messages|map(attribute='role')|join(',') }}{{ messages|selectattr('role', 'equalto',"
        " 'user')|list|length }}{% for g in messages|batch(2) %}{{ g|length }}{% endfor %}{{"
        " messages|slice(2)|list|length }}{% for m in messages[::-1] if m.role != 'tool' %}{{"
        " loop.previtem.role if loop.previtem else '-' }}{{ loop.nextitem.role if loop.nextitem is"
        " defined else '-' }}{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}"
    ),
    (
        "{{ 'a'*3 ~ 2**3 ~ 7 % 3 ~ 1.5*2 }}{{ [1] + [2, 3] }}{{ [[1], [2]]|sum(start=[]) }}{{"
        " 'b'.rjust(4) }}{{ 'a\nb'|indent(2) }}{{ 'x'|center(5) }}{{ '<b>'|e + '<i>' }}{{"
        " '<b>'|safe ~ '<i>' }}{{ undefined_name }}{{ none }}{{ true and [] }}{{ '<a>'|safe +"
        " '<i>' }}"
    ),
    CHAT_TEMPLATE,
]


@pytest.mark.parametrize("template", TEMPLATES, ids=range(len(TEMPLATES)))
def test_valid_templates_equal_plain_jinja(template):
    plain = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    plain.filters["tojson"] = (
        lambda x, ensure_ascii=False, indent=None, separators=None, sort_keys=False: json.dumps(
            x, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )
    )
    rng, plain = random.Random(0), plain.from_string(template)
    for n in [0, 1, 2, 3, 70] * 6:
        messages = [
            dict(
                role=rng.choice(["system", "user", "assistant", "tool"]),
                content=rng.choice(["", " snow on the mill ", "老磨坊", "o" * 5000]),
            )
            for _ in range(n)
        ]
        given = dict(
            messages=messages,
            tools=rng.choice([None, [dict(name="f", parameters={})]]),
            add_generation_prompt=rng.random() < 0.5,
        )
        assert render_template(template, **given) == plain.render(**given)


def changed(folder, change):
    "A small tokenizer whose file is changed."
    train_tokenizer(["The old mill."] * 9, vocab_size=300).save(folder)
    tok = read_json(folder / "tokenizer.json")
    change(tok)
    (folder / "tokenizer.json").write_text(json.dumps(tok))
    return folder


def test_tokenizers_that_take_all_memory_are_refused(tmp_path):
    huge = changed(tmp_path / "a", lambda t: t["model"]["vocab"].update({"mill": 50_000_000}))
    with (
        within(),
        pytest.raises(
            ValueError,
            match=(
                "a/tokenizer.json is not used: a token has the id 50,000,000; the largest allowed"
                " is 16,777,215"
            ),
        ),
    ):
        load_tokenizer(huge)
    double = [dict(type="Replace", pattern=dict(String="a"), content="aa")] * 14
    long = changed(
        tmp_path / "b", lambda t: t.update(normalizer=dict(type="Sequence", normalizers=double))
    )
    with pytest.raises(
        ValueError, match="the tokenizer's normalizer can make a text 16,384 times as long"
    ):
        load_tokenizer(long)
    assert load_tokenizer(
        changed(
            tmp_path / "c",
            lambda t: t.update(normalizer=dict(type="Sequence", normalizers=double[:5])),
        )
    ).encode("a")


@pytest.mark.parametrize("part", ["pre_tokenizer", "normalizer"])
def test_expression_with_too_many_steps_is_refused(tmp_path, part):
    slow = dict(
        pre_tokenizer=dict(
            type="Split", pattern=dict(Regex="(a+)+$"), behavior="Isolated", invert=False
        ),
        normalizer=dict(type="Replace", pattern=dict(Regex="(a+)+$"), content="b"),
    )
    tok = load_tokenizer(changed(tmp_path / "a", lambda t: t.update({part: slow[part]})))
    assert tok.encode("ab")
    for encode in (
        tok.encode,
        tok.begin,
        lambda text: tok.encode_documents([text], [True], [True]),
        lambda text: tok.encode_prompt([dict(role="user", content=text)]),
    ):
        with (
            within(),
            pytest.raises(
                ValueError,
                match=(
                    "the tokenizer fails on .*aaaaa.*: Onig.*retry-limit.*takes too many steps;"
                    " use another tokenizer"
                ),
            ),
        ):
            encode("a" * 60 + "b")


# --- `getattr` in a pickle ------------------------------------------------------------------------
MEMBER, CODE, METHOD = (
    b"ctransformers.trainer_utils\nSchedulerType\nVLINEAR\n",
    b"ctransformers.trainer_utils\nos\nVsystem\n",
    b"ctransformers.training_args\nTrainingArguments\nVto_dict\n",
)


def suspicious_names(*attributes):
    "Return what is suspicious in a training_args.bin that accesses these attributes."
    names = Counter()
    interpret_pickle(
        io.BytesIO(
            b"\x80\x02]"
            + b"".join(b"cbuiltins\ngetattr\n" + a + b"\x86Ra" for a in attributes)
            + b"."
        ),
        names,
    )
    return foreign(names, "training_args.bin")


def test_enum_members_are_accepted():
    "As Python 3.11.0 to 3.11.3 pickle them; any other getattr beside them is reported."
    assert suspicious_names(MEMBER) == suspicious_names(MEMBER, MEMBER) == []
    for other in CODE, METHOD:
        assert (
            suspicious_names(other)
            == suspicious_names(MEMBER, other)
            == suspicious_names(other, MEMBER)
            == ["builtins.getattr"]
        )
