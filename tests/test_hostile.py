"""Files that are made to take memory or time, or to say something to a terminal: each ends in a result or in an error that names it, and soon."""
import gzip
import io
import os
import random
import tracemalloc

import pytest
import zstandard
from minigpt import formats
from minigpt.data import sample_texts
from minigpt.formats import DataError, look_at, parse_block, read_blocks
from minigpt.prepare import prepare
from minigpt.quality import analyze


def peak(f):
    "What a call gives, and the memory it takes at most, in MiB"
    tracemalloc.start()
    try: return f(), tracemalloc.get_traced_memory()[1]/2**20
    finally: tracemalloc.stop()


# --- packed data ----------------------------------------------------------------------------------------------------------------
def rows(path): return [r for b in read_blocks(path) for r in parse_block(b)]


def refused(f):
    "What it says that it refuses"
    with pytest.raises(DataError) as e: f()
    return str(e.value)


@pytest.mark.parametrize("packer", ["zstd", "gzip"])
def test_a_line_that_unpacks_to_128_mib(tmp_path, monkeypatch, packer):
    monkeypatch.setattr(formats, "LONGEST", 1 << 20)
    file = tmp_path/"a.jsonl"
    opened = gzip.open(file, "wb", 1) if packer == "gzip" else zstandard.ZstdCompressor().stream_writer(open(file, "wb"))
    with opened as f:
        f.write(b'{"text": "')
        for _ in range(32): f.write(bytes(1 << 22))
    assert file.stat().st_size < 2 << 20
    (look, found, texts), most = peak(lambda: (look_at(file), rows(file), list(sample_texts([file]))))
    assert look.packed == packer and [(r.line, r.reason) for r in found] == [(1, "row too long")] and not texts and most < 16
    if packer == "gzip": return      # the same from here on, and slower
    report, most = peak(lambda: analyze(file))
    assert "1 × row too long" in str(report) and most < 16
    said, most = peak(lambda: refused(lambda: prepare(file, tmp_path/"out.jsonl", progress=False)))
    assert "row too long" in said and most < 16


def test_frames_of_zstd(tmp_path):
    "Unpacked block by block they are what they were packed from, whoever packed them; cut off anywhere but between frames, they are refused"
    rng, file = random.Random(0), tmp_path/"a.txt"
    for i in range(40):
        packed, whole, ends = b"", b"", []
        for _ in range(rng.randint(1, 3)):
            n = rng.choice([0, 1, 100, 131071, 131072, 131073, 300_000])
            data = rng.choice([rng.randbytes(n), bytes(n), b"snow %d " % n*(n//8)])
            c = zstandard.ZstdCompressor(level=rng.choice([-5, 1, 3, 12]), write_checksum=rng.random() < .5, write_content_size=rng.random() < .5)
            if packed: packed += rng.choice([b"", b"\x53\x2a\x4d\x18\7\0\0\0skipped"]); ends.append(len(packed))
            packed += c.compress(data); whole += data; ends.append(len(packed))
        assert io.BufferedReader(formats._Zstd(io.BytesIO(packed)), 1 << 20).read() == whole
        for cut in {rng.randrange(1, len(packed)) for _ in range(9)}-{*ends}:
            file.write_bytes(packed[:cut])
            with pytest.raises((EOFError, zstandard.ZstdError)): io.BufferedReader(formats._Zstd(open(file, "rb")), 1 << 20).read()


def test_an_array_whose_text_has_no_end(tmp_path, monkeypatch):
    "In a text or in an object: named, before all of the file is in memory"
    monkeypatch.setattr(formats, "LONGEST", 1 << 20)
    for head, what in ((b'[\n"', "the text that begins in line 2"), (b'[\n{"text": "', "the object that begins in line 2"), (b'[\n{"text": ["a", "', "the object that begins in line 2")):
        with zstandard.ZstdCompressor().stream_writer(open(tmp_path/"a.json", "wb")) as f: f.write(head); f.write(b"a"*(6 << 20))
        said, most = peak(lambda: refused(lambda: rows(tmp_path/"a.json")))
        assert f"{what} has no end within 1 MiB" in said and most < 8
