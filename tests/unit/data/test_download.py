"""Downloads under every fault that a local server can simulate.

The faults are interrupted connections, wrong bytes, a file that changes during the download,
refusals, pages of the hub and of Google Drive, and a killed process. What arrives is correct or is
discarded, what exists is not fetched again, and no good file is lost.
"""

import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from minigpt.data import download
from minigpt.data.download import DownloadError, fetch_drive, fetch_hub, fetch_url, get

ROOT = Path(__file__).resolve().parents[3]
DATA = b"".join(b'{"text":"Entry %06d of the log."}\n' % i for i in range(9000))
OTHER = DATA.replace(b"Entry", b"Other")
N = len(DATA)


def sha(data):
    return hashlib.sha256(data).hexdigest()


def blob(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class File:
    "The content of one address, and how the server misbehaves."

    def __init__(
        self,
        body=DATA,
        *,
        tag="auto",
        ranges=True,
        cuts=(),
        codes=(),
        headers=(),
        length=None,
        honest=True,
        chunked=False,
        to=None,
        if_range=True,
        hold=None,
        then=None,
    ):
        self.body, self.ranges, self.cuts, self.codes = (
            body,
            ranges,
            list(cuts),
            list(codes),
        )  # cuts: bytes before each answer breaks off; codes: (status, headers) first
        self.tag = f'"{hashlib.md5(body).hexdigest()}"' if tag == "auto" else tag
        (
            self.headers,
            self.length,
            self.honest,
            self.chunked,
            self.to,
            self.if_range,
            self.hold,
            self.then,
        ) = (
            dict(headers),
            length,
            honest,
            chunked,
            to,
            if_range,
            hold,
            then,
        )  # then: the content after the first answer


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.close_connection = True
        site = self.server
        file = site.files.get(self.path)
        site.asked.append((self.path, self.headers.get("Range"), dict(self.headers)))
        if file and file.then:
            site.files[self.path] = file.then
        if file and file.codes:
            code, headers, body = (*file.codes.pop(0), b"")[:3]
            return self.answer(code, headers, body)
        if file is None:
            return self.answer(404, {}, b"<!doctype html><p>not found")
        if file.to:
            return self.answer(302, {"Location": file.to, **file.headers}, b"")
        start, wanted, same = (
            0,
            re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""),
            not file.if_range or self.headers.get("If-Range") in (None, file.tag),
        )
        if wanted and file.ranges and same:
            start = int(wanted[1])
            if start >= len(file.body):
                return self.answer(416, {"Content-Range": f"bytes */{len(file.body)}"}, b"")
        part = file.body[start:]
        headers = dict(file.headers)
        if file.tag:
            headers["ETag"] = file.tag
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(file.body) - 1}/{len(file.body)}"
        self.answer(206 if start else 200, headers, part, file)
        return None

    def answer(self, code, headers, body, file=None):
        self.send_response(code)
        for k, v in headers.items():
            self.send_header(k, v)
        stop = file.cuts.pop(0) if file and file.cuts else None
        if file and file.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif not (file and file.length == "none"):
            self.send_header("Content-Length", str(len(body) + (file.length or 0 if file else 0)))
        self.send_header("Connection", "close")
        self.end_headers()
        sent = body if stop is None else body[:stop]
        if file and file.chunked:
            sent = b"%x\r\n%s\r\n" % (len(sent), sent) + (b"0\r\n\r\n" if stop is None else b"")
        self.server.sent += len(sent)
        self.wfile.write(sent)
        if file and file.hold and stop is not None:
            self.wfile.flush()
            file.hold.wait(20)


class Site(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url, self.files, self.asked, self.sent = (
            f"http://127.0.0.1:{self.server_port}",
            {},
            [],
            0,
        )

    def add(self, path="/log.jsonl", *args, **kw):
        self.files[path] = File(*args, **kw)
        return self.url + path

    def ranges(self, path=None):
        return [r for p, r, _ in self.asked if path in (None, p)]

    def handle_error(self, *args):
        pass


@pytest.fixture
def site(monkeypatch):
    for k in ("HF_TOKEN", "HF_ENDPOINT"):
        monkeypatch.delenv(k, raising=False)
    for k in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(k, "127.0.0.1")
    s = Site()
    threading.Thread(target=s.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
    yield s
    s.shutdown()
    s.server_close()


@pytest.fixture
def waits(monkeypatch):
    "Record the waits without waiting."
    res = []
    monkeypatch.setattr(download.time, "sleep", res.append)
    return res


@pytest.fixture(autouse=True)
def short_waits(monkeypatch, waits):
    monkeypatch.setattr(download, "_TIMEOUT", 5)


def fetch(url, to, **kw):
    return fetch_url(url, to, progress=False, **kw)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


# --- complete, verified, and fetched once ---------------------------------------------------------
@pytest.mark.parametrize(
    "kw", [dict(), dict(chunked=True), dict(length="none"), dict(body=b""), dict(tag=None)]
)
def test_file_is_downloaded_completely(site, tmp_path, kw):
    body = kw.get("body", DATA)
    assert (
        fetch(site.add(**kw), tmp_path / "sub" / "a.jsonl", sha256=sha(body).upper())
        == tmp_path / "sub" / "a.jsonl"
    )
    assert (tmp_path / "sub" / "a.jsonl").read_bytes() == body
    assert names(tmp_path / "sub") == [".a.jsonl.source.json", "a.jsonl"]
    assert json.loads((tmp_path / "sub" / ".a.jsonl.source.json").read_text())["sha256"] == sha(
        body
    )
    assert (
        site.asked[0][2]["Accept-Encoding"] == "identity"
    )  # other headers would change sizes and ranges


@pytest.mark.parametrize(
    "known", [dict(), dict(size=N), dict(sha256=sha(DATA)), dict(size=N, sha256=sha(DATA))]
)
def test_fetched_file_is_not_fetched_again(site, tmp_path, known):
    url = site.add()
    for _ in range(3):
        fetch(url, tmp_path / "a", **known)
    assert len(site.asked) == 1


def test_copied_file_is_not_fetched(site, tmp_path):
    url = site.add()
    (tmp_path / "a").write_bytes(DATA)
    fetch(url, tmp_path / "a", size=N, sha256=sha(DATA))
    fetch(url, tmp_path / "a", size=N)
    fetch(url, tmp_path / "a", sha256=sha(DATA))
    assert not site.asked


def test_requested_hash_overrides_the_record(site, tmp_path):
    url = site.add()
    fetch(url, tmp_path / "a")
    site.add(body=OTHER)
    assert fetch(url, tmp_path / "a", sha256=sha(OTHER)).read_bytes() == OTHER


@pytest.mark.parametrize("digits", [40, 64])
def test_only_the_hub_uses_hashes_as_versions(site, tmp_path, digits):
    assert fetch(site.add(tag='"%s"' % ("a" * digits)), tmp_path / "a").read_bytes() == DATA


def test_wrong_file_is_fetched_again(site, tmp_path):
    url = site.add()
    a = tmp_path / "a"
    for _ in range(2):
        a.write_bytes(
            OTHER
        )  # same length: after the first download only the record distinguishes them
        fetch(url, a, **(dict(sha256=sha(DATA)) if not site.asked else {}))
        assert a.read_bytes() == DATA
    a.write_bytes(OTHER)
    fetch(url, a, size=N)
    assert a.read_bytes() == DATA and len(site.asked) == 3


def test_other_url_for_the_same_target_is_fetched(site, tmp_path):
    fetch(site.add("/one"), tmp_path / "a")
    fetch(site.add("/two", OTHER), tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == OTHER


def test_torn_record_is_ignored(site, tmp_path):
    url = site.add()
    fetch(url, tmp_path / "a")
    for text in ("{", "[]", ""):
        (tmp_path / ".a.source.json").write_text(text)
        fetch(url, tmp_path / "a")
    assert len(site.asked) == 4


def test_progress_bar_ends_full(site, tmp_path, monkeypatch):
    bars = []

    class Bar(download.tqdm):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            bars.append(self) if not kw["disable"] else None

    monkeypatch.setattr(download, "tqdm", Bar)
    fetch_url(site.add(cuts=[1000, 2000]), tmp_path / "a")
    fetch_url(site.add("/b", cuts=[1000], ranges=False), tmp_path / "b")
    url = site.add("/c", cuts=[1000] + [0] * 9)
    with pytest.raises(DownloadError):
        fetch(url, tmp_path / "c")
    site.add("/c")
    fetch_url(url, tmp_path / "c")
    assert [(b.n, b.total) for b in bars] == [(N, N)] * 3


# --- interrupted connections ----------------------------------------------------------------------
@pytest.mark.parametrize(
    "kw",
    [
        dict(),
        dict(tag=None, headers={"Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT"}, if_range=False),
    ],
)
def test_only_the_rest_is_requested(site, tmp_path, waits, kw):
    url = site.add(cuts=[100_000, 70_000, 50_000], **kw)
    assert fetch(url, tmp_path / "a").read_bytes() == DATA
    assert (
        site.ranges() == [None, "bytes=100000-", "bytes=170000-", "bytes=220000-"]
        and site.sent == N
    )
    assert {h.get("If-Range") for _, r, h in site.asked if r} == {
        site.files["/log.jsonl"].tag or "Wed, 21 Oct 2015 07:28:00 GMT"
    }
    assert (
        waits == [download._RETRY_DELAYS[0]] * 3
    )  # each attempt made progress, so the count of attempts restarts


def test_interrupted_attempts_with_progress_continue(site, tmp_path):
    "More interruptions than attempts in a row are allowed as long as bytes arrive."
    assert fetch(site.add(cuts=[N // 20] * 19), tmp_path / "a").read_bytes() == DATA
    assert site.sent == N


def test_attempts_without_progress_end(site, tmp_path, waits):
    url = site.add(cuts=[5000] + [0] * 50)
    with pytest.raises(
        DownloadError,
        match=(
            r"(?s)a was not fetched from .*/log.jsonl: .*lost after 4.9 KiB.*6 times in a row.*call"
            r" again.*4.9 KiB are kept"
        ),
    ):
        fetch(url, tmp_path / "a")
    assert (
        waits == list(download._RETRY_DELAYS)
        and (tmp_path / "a.part").stat().st_size == 5000
        and not (tmp_path / "a").exists()
    )
    site.files["/log.jsonl"].cuts.clear()
    site.sent = 0
    assert fetch(url, tmp_path / "a").read_bytes() == DATA and site.sent == N - 5000


def test_interrupted_chunked_answer_is_retried(site, tmp_path):
    assert fetch(site.add(chunked=True, cuts=[7000]), tmp_path / "a").read_bytes() == DATA


def test_missing_server_is_reported(tmp_path, waits, site):
    url = site.add()
    site.shutdown()
    site.server_close()
    with pytest.raises(DownloadError, match="no answer .*refused.*6 times in a row"):
        fetch(url, tmp_path / "a")
    assert names(tmp_path) == []


def test_silent_server_times_out(site, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT", 0.2)
    hold = threading.Event()
    url = site.add(cuts=[9000], hold=hold)
    assert fetch(url, tmp_path / "a").read_bytes() == DATA and site.sent == N
    hold.set()


def test_short_body_is_never_accepted(site, tmp_path):
    url = site.add(length=7, ranges=False)
    (tmp_path / "a").write_bytes(b"good")
    with pytest.raises(DownloadError, match="lost after"):
        fetch(url, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"good"


def test_requested_size_is_checked_without_a_length(site, tmp_path):
    url = site.add(length="none", cuts=[4000])
    assert fetch(url, tmp_path / "a", size=N).read_bytes() == DATA
    url = site.add(length="none", body=DATA[:-5])
    with pytest.raises(DownloadError):
        fetch(url, tmp_path / "b", size=N)
    assert not (tmp_path / "b").exists()


def test_server_without_ranges_starts_over(site, tmp_path):
    assert (
        fetch(site.add(ranges=False, cuts=[100_000, 50_000]), tmp_path / "a").read_bytes() == DATA
    )
    assert site.sent == N + 150_000


def test_server_without_versions_starts_over(site, tmp_path):
    "Nothing shows whether the rest is of the same file: start over, unless a hash is known."
    assert fetch(site.add(tag=None, cuts=[1000]), tmp_path / "a").read_bytes() == DATA
    assert (
        fetch(
            site.add("/b", tag='W/"weak"', if_range=False, cuts=[1000]), tmp_path / "b"
        ).read_bytes()
        == DATA
    )
    assert site.ranges() == [None] * 4
    assert (
        fetch(site.add("/c", tag=None, cuts=[1000]), tmp_path / "c", sha256=sha(DATA)).read_bytes()
        == DATA
    )
    assert site.ranges("/c") == [None, "bytes=1000-"]


@pytest.mark.parametrize("if_range", [True, False])
def test_changed_file_is_not_spliced(site, tmp_path, if_range):
    url = site.add(cuts=[100_000] + [0] * 9)
    with pytest.raises(DownloadError):
        fetch(url, tmp_path / "a")
    site.add(body=OTHER, if_range=if_range)  # as long as the first
    assert fetch(url, tmp_path / "a").read_bytes() == OTHER
    assert site.ranges()[-1] == ("bytes=100000-" if if_range else None)


@pytest.mark.parametrize(
    "now", [OTHER, OTHER[:-100], OTHER + b"more"], ids=["as long", "shorter", "longer"]
)
@pytest.mark.parametrize("if_range", [True, False])
def test_file_that_changes_within_one_call(site, tmp_path, if_range, now):
    url = site.add(cuts=[100_000], then=File(now, if_range=if_range))
    assert fetch(url, tmp_path / "a").read_bytes() == now and site.ranges()[:2] == [
        None,
        "bytes=100000-",
    ]


def test_part_longer_than_the_file_starts_over(site, tmp_path):
    url = site.add(cuts=[100_000] + [0] * 9)
    with pytest.raises(DownloadError):
        fetch(url, tmp_path / "a")
    site.add(body=DATA[:500], tag=site.files["/log.jsonl"].tag)
    assert fetch(url, tmp_path / "a").read_bytes() == DATA[:500]


def test_part_of_another_source_is_not_continued(site, tmp_path):
    one = site.add("/one", OTHER, cuts=[100_000] + [0] * 9)
    with pytest.raises(DownloadError):
        fetch(one, tmp_path / "a")
    assert fetch(site.add("/two", tag=site.files["/one"].tag), tmp_path / "a").read_bytes() == DATA
    assert site.ranges("/two") == [None]


def test_wrong_range_is_not_appended(site, tmp_path, monkeypatch):
    "A 206 with another range is not appended."
    real = Handler.answer

    def answer_shifted(self, code, headers, body, file=None):
        if code == 206:
            headers["Content-Range"], body = f"bytes 5-{N - 1}/{N}", DATA[5:]
        real(self, code, headers, body, file)

    monkeypatch.setattr(Handler, "answer", answer_shifted)
    assert fetch(site.add(cuts=[1000]), tmp_path / "a").read_bytes() == DATA


# --- killed ---------------------------------------------------------------------------------------
CHILD = (
    "import sys; from minigpt.data.download import fetch_url; fetch_url(sys.argv[1], sys.argv[2],"
    " progress=False)"
)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
@pytest.mark.parametrize("have", [1000, N - 1234])
def test_killed_download_resumes(site, tmp_path, have):
    hold, part = threading.Event(), tmp_path / "a.part"
    url = site.add(cuts=[have], hold=hold)
    p = subprocess.Popen([sys.executable, "-c", CHILD, url, tmp_path / "a"], cwd=ROOT)
    end = time.monotonic() + 10
    while (
        not (part.exists() and part.stat().st_size == have)
        and time.monotonic() < end
        and p.poll() is None
    ):
        threading.Event().wait(0.02)
    p.send_signal(signal.SIGKILL)
    p.wait()
    hold.set()
    assert p.returncode == -9 and part.stat().st_size == have
    assert fetch(url, tmp_path / "a").read_bytes() == DATA
    assert site.ranges() == [None, f"bytes={have}-"] and site.sent == N


@pytest.mark.parametrize("moment", ["write_json", "replace"])
def test_stop_between_the_last_byte_and_the_rename(site, tmp_path, monkeypatch, moment):
    class Stop(BaseException):
        pass

    url, real = site.add(), download.write_json
    (tmp_path / "a").write_bytes(b"old")

    def stop(*args, **kw):
        if moment == "write_json" and "source.json" not in str(args[0]):
            return real(*args, **kw)
        raise Stop

    with monkeypatch.context() as m:
        m.setattr(
            *((download, "write_json") if moment == "write_json" else (download.os, "replace")),
            (
                stop
                if moment == "write_json"
                else lambda a, b: os.rename(a, b) if str(b).endswith(".json") else stop(a)
            ),
        )
        with pytest.raises(Stop):
            fetch(url, tmp_path / "a")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert fetch(url, tmp_path / "a").read_bytes() == DATA
    assert len(site.asked) == 1 and names(tmp_path) == [".a.source.json", "a"]


# --- wrong bytes ----------------------------------------------------------------------------------
def test_wrong_bytes_are_discarded(site, tmp_path):
    url = site.add(body=OTHER)
    with pytest.raises(
        DownloadError,
        match=f"its hash is {sha(OTHER)[:12]}…, not {sha(DATA)[:12]}….*It was deleted",
    ):
        fetch(url, tmp_path / "a", sha256=sha(DATA))
    assert names(tmp_path) == []
    site.add()
    assert fetch(url, tmp_path / "a", sha256=sha(DATA)).read_bytes() == DATA


def test_damaged_part_starts_over_at_the_second_call(site, tmp_path):
    url = site.add(cuts=[100_000] + [0] * 9)
    with pytest.raises(DownloadError):
        fetch(url, tmp_path / "a")
    (tmp_path / "a.part").write_bytes(bytes(100_000))
    site.files["/log.jsonl"].cuts.clear()
    with pytest.raises(DownloadError, match="It was deleted"):
        fetch(url, tmp_path / "a", sha256=sha(DATA))
    assert fetch(url, tmp_path / "a", sha256=sha(DATA)).read_bytes() == DATA


def test_wrong_size_is_refused_before_the_download(site, tmp_path):
    with pytest.raises(DownloadError, match=f"the remote file has {N:,} bytes, not 17"):
        fetch(site.add(), tmp_path / "a", size=17)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "page",
    [b"<!DOCTYPE html><html>log in", b"\n  <HTML><body>captcha", b"\xef\xbb\xbf<!doctype HTML>"],
)
def test_html_page_instead_of_data_is_refused(site, tmp_path, page):
    with pytest.raises(DownloadError, match="a web page came in place of the file.*browser"):
        fetch(site.add(body=page), tmp_path / "a")
    assert names(tmp_path) == []
    assert fetch(site.url + "/log.jsonl", tmp_path / "page.html").read_bytes() == page


def test_html_page_instead_of_the_rest_keeps_the_part(site, tmp_path):
    url = site.add(cuts=[100_000] + [0] * 9)
    with pytest.raises(DownloadError):
        fetch(url, tmp_path / "a")
    site.add(body=b"<!doctype html>portal", ranges=False)
    with pytest.raises(DownloadError, match="web page"):
        fetch(url, tmp_path / "a")
    site.add()
    assert fetch(url, tmp_path / "a").read_bytes() == DATA and site.ranges()[-1] == "bytes=100000-"


FAILURES = dict(
    hash=dict(body=OTHER),
    page=dict(body=b"<html>"),
    cut=dict(body=OTHER, cuts=[9] * 60, ranges=False),
    gone=dict(codes=[(404, {})]),
    busy=dict(codes=[(503, {})] * 6),
    closed=dict(codes=[(403, {})]),
)


@pytest.mark.parametrize("kw", FAILURES.values(), ids=FAILURES)
def test_failed_download_keeps_the_good_file(site, tmp_path, kw):
    (tmp_path / "a").write_bytes(b"good")
    with pytest.raises(DownloadError):
        fetch(site.add(**kw), tmp_path / "a", sha256=sha(DATA))
    assert (tmp_path / "a").read_bytes() == b"good"


# --- refusals -------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "code, says",
    [
        (404, "404, there is nothing at this address; compare it letter by letter"),
        (410, "renamed or removed"),
        (401, "401, it is not public"),
        (403, "403, it is not public"),
        (400, "answers 400.*browser"),
    ],
)
def test_permanent_refusals_are_errors(site, tmp_path, waits, code, says):
    url = site.add(codes=[(code, {})])
    with pytest.raises(DownloadError, match=says) as e:
        fetch(url, tmp_path / "a")
    assert url in str(e.value) and len(site.asked) == 1 and not waits


@pytest.mark.parametrize("code", [408, 429, 500, 502, 503, 504])
def test_temporary_refusals_are_retried(site, tmp_path, waits, code):
    assert fetch(site.add(codes=[(code, {})] * 3), tmp_path / "a").read_bytes() == DATA
    assert waits == [1, 2, 4]


def test_retry_after_is_respected(site, tmp_path, waits):
    date = time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + 50))
    fetch(
        site.add(
            codes=[
                (429, {"Retry-After": "17"}),
                (503, {"Retry-After": date}),
                (429, {"Retry-After": "soon"}),
            ]
        ),
        tmp_path / "a",
    )
    assert waits[0] == 17 and 45 < waits[1] <= 50 and waits[2] == 4


def test_retry_after_too_long_is_an_error(site, tmp_path, waits):
    with pytest.raises(
        DownloadError, match="429.*asks to wait for 1 h 0 min; call again after that"
    ):
        fetch(site.add(codes=[(429, {"Retry-After": "3600"})]), tmp_path / "a")
    assert not waits and len(site.asked) == 1


def test_server_that_stays_down_is_an_error(site, tmp_path, waits):
    with pytest.raises(DownloadError, match="answers 500.*6 times in a row"):
        fetch(site.add(codes=[(500, {})] * 99), tmp_path / "a")
    assert len(site.asked) == 6 and waits == list(download._RETRY_DELAYS)


# --- the local side -------------------------------------------------------------------------------
def test_too_little_disk_space_is_refused(site, tmp_path, monkeypatch):
    monkeypatch.setattr(download, "free_space", lambda p: 1000)
    with pytest.raises(
        DownloadError, match="needs 316.4 KiB, but only 1000 B are free; free some space"
    ):
        fetch(site.add(), tmp_path / "a")
    assert names(tmp_path) == []


def test_disk_space_for_the_rest_is_enough(site, tmp_path, monkeypatch):
    monkeypatch.setattr(
        download, "free_space", lambda p: N if not (tmp_path / "a.part").exists() else N - 100_000
    )
    assert fetch(site.add(cuts=[100_000]), tmp_path / "a").read_bytes() == DATA


@pytest.mark.skipif(
    not os.path.exists("/dev/full"),
    reason="/dev/full exists on Linux only",
)
def test_disk_full_during_download(site, tmp_path, waits, monkeypatch):
    monkeypatch.setattr(
        download, "open_new", lambda path, buffering: open("/dev/full", "wb", buffering)
    )  # the download would delete a link there
    with pytest.raises(DownloadError, match="the disk is full; free some space"):
        fetch(site.add(), tmp_path / "a")
    assert not waits and not (tmp_path / "a").exists()


def test_second_download_of_a_file_is_refused(site, tmp_path, monkeypatch):
    url, real = site.add(), download._read_chunk

    def read(res):
        if (tmp_path / "a.part").exists():
            with open(tmp_path / "a.part", "ab") as f:
                f.write(b"of the other process")
        return real(res)

    monkeypatch.setattr(download, "_read_chunk", read)
    with pytest.raises(DownloadError, match="another process is writing a.part"):
        fetch(url, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_bad_arguments_are_refused(tmp_path, site):
    with pytest.raises(DownloadError, match="is a folder; name the file"):
        fetch(site.add(), tmp_path)
    with pytest.raises(ValueError, match="64 hexadecimal digits"):
        fetch(site.add(), tmp_path / "a", sha256="abc")
    with pytest.raises(ValueError, match="http"):
        fetch("file:///etc/hostname", tmp_path / "a")
    with pytest.raises(ValueError, match="must be one of"):
        fetch_hub("o/n", "f", tmp_path / "a", repo_type="data")
    with pytest.raises(FileNotFoundError):
        fetch(site.add(), tmp_path / "not mounted" / "MyDrive" / "a")
    assert not site.asked and names(tmp_path) == []


def test_chinese_url(site, tmp_path):
    site.add("/%E8%AA%9E%E6%96%99%20a.jsonl?x=%20y")
    assert fetch(site.url + "/語料 a.jsonl?x=%20y", tmp_path / "語料.jsonl").read_bytes() == DATA


# --- the hub --------------------------------------------------------------------------------------
def hub(site, body=DATA, *, path="/datasets/o/n/resolve/main/sub/a.jsonl", **kw):
    """A large file: the hub answers with its metadata and redirects to a store.

    The store has its own name for the version.
    """
    site.add(
        path,
        to=site.url + "/store?key=1",
        headers={
            "X-Repo-Commit": "c" * 40,
            "X-Linked-Size": str(len(body)),
            "X-Linked-ETag": f'"{sha(body)}"',
        },
    )
    return site.add("/store?key=1", kw.pop("stored", body), tag=f'"{"e" * 64}"', **kw)


@pytest.fixture
def at_hub(site, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", site.url + "/")
    return site


def from_hub(to, **kw):
    return fetch_hub("o/n", "sub/a.jsonl", to, progress=False, **kw)


def test_hub_large_file(at_hub, tmp_path):
    hub(at_hub, cuts=[100_000])
    assert from_hub(tmp_path / "a").read_bytes() == DATA
    assert at_hub.ranges("/store?key=1") == [None, "bytes=100000-"]
    from_hub(tmp_path / "a")
    assert len(at_hub.asked) == 4


def test_hub_hash_is_checked(at_hub, tmp_path):
    hub(at_hub, stored=OTHER)
    with pytest.raises(DownloadError, match=f"its hash is {sha(OTHER)[:12]}"):
        from_hub(tmp_path / "a")
    assert names(tmp_path) == []


@pytest.mark.parametrize("linked", [True, False])
@pytest.mark.parametrize("good", [True, False])
def test_hub_small_file_is_checked_by_git_hash(at_hub, tmp_path, linked, good):
    etag = blob(DATA if good else OTHER)
    if linked:
        at_hub.add(
            "/o/n/resolve/v%2F1/a%20b.json",
            tag=None,
            headers={"X-Linked-ETag": f'"{etag}"', "X-Linked-Size": str(N)},
        )
    else:
        at_hub.add(
            "/o/n/resolve/v%2F1/a%20b.json", tag=f'W/"{etag}"', headers={"X-Repo-Commit": "c" * 40}
        )
    go = lambda: fetch_hub(
        "o/n", "a b.json", tmp_path / "a", repo_type="model", revision="v/1", progress=False
    )
    if good:
        assert go().read_bytes() == DATA
    else:
        with pytest.raises(DownloadError, match="its hash is"):
            go()


def test_hub_recognizes_a_copy(at_hub, tmp_path):
    hub(at_hub)
    (tmp_path / "a").write_bytes(DATA)
    before = (tmp_path / "a").stat().st_mtime_ns
    from_hub(tmp_path / "a")
    assert (tmp_path / "a").stat().st_mtime_ns == before and names(tmp_path) == [
        ".a.source.json",
        "a",
    ]
    (tmp_path / "b").write_bytes(OTHER)
    assert from_hub(tmp_path / "b").read_bytes() == DATA


def test_hub_mirror_continues_a_download(at_hub, tmp_path, monkeypatch):
    hub(at_hub, cuts=[100_000] + [0] * 9)
    with pytest.raises(DownloadError):
        from_hub(tmp_path / "a")
    at_hub.files["/store?key=1"].cuts.clear()
    at_hub.files["/mirror/datasets/o/n/resolve/main/sub/a.jsonl"] = at_hub.files.pop(
        "/datasets/o/n/resolve/main/sub/a.jsonl"
    )
    monkeypatch.setenv("HF_ENDPOINT", at_hub.url + "/mirror")
    at_hub.sent = 0
    assert from_hub(tmp_path / "a").read_bytes() == DATA and at_hub.sent == N - 100_000


@pytest.mark.parametrize("tag", [None, '"the same"'])
def test_hub_moved_branch_starts_over(at_hub, tmp_path, tag):
    "Even if the store names no version, or a wrong one: the hash of the hub differs."
    hub(at_hub, cuts=[100_000] + [0] * 9)
    at_hub.files["/store?key=1"].tag = tag
    with pytest.raises(DownloadError):
        from_hub(tmp_path / "a")
    hub(at_hub, OTHER)
    at_hub.files["/store?key=1"].tag = tag
    assert from_hub(tmp_path / "a").read_bytes() == OTHER
    assert at_hub.ranges("/store?key=1")[-2:] == ["bytes=100000-", None]


def test_hub_branch_that_moves_within_one_call(at_hub, tmp_path):
    hub(at_hub, cuts=[100_000])
    moved = "/datasets/o/n/resolve/main/sub/a.jsonl"
    at_hub.files["/store?key=1"].then, at_hub.files[moved].then = (
        File(OTHER),
        File(
            to=at_hub.url + "/store?key=1",
            headers={"X-Linked-Size": str(N), "X-Linked-ETag": f'"{sha(OTHER)}"'},
        ),
    )
    assert from_hub(tmp_path / "a").read_bytes() == OTHER


def test_hub_complete_part_is_verified(at_hub, tmp_path, monkeypatch):
    class Stop(BaseException):
        pass

    def stop(*args):
        raise Stop

    hub(at_hub)
    with monkeypatch.context() as m:
        m.setattr(download, "_mismatch", stop)
        with pytest.raises(Stop):
            from_hub(tmp_path / "a")
    (tmp_path / "a.part").write_bytes(OTHER)
    with pytest.raises(DownloadError, match="its hash is"):
        from_hub(tmp_path / "a")
    assert from_hub(tmp_path / "a").read_bytes() == DATA


def test_hub_missing_file_is_named(at_hub, tmp_path):
    with pytest.raises(DownloadError, match="404.*letter by letter"):
        from_hub(tmp_path / "a")
    at_hub.add(
        "/datasets/o/n/resolve/main/sub/a.jsonl",
        codes=[
            (404, {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id: main"})
        ],
    )
    with pytest.raises(DownloadError, match="It says: Invalid rev id: main"):
        from_hub(tmp_path / "a")


@pytest.mark.parametrize("code", [401, 403])
def test_hub_gated_repository_is_explained(at_hub, tmp_path, code):
    at_hub.add(
        "/datasets/o/n/resolve/main/sub/a.jsonl",
        codes=[(code, {"X-Error-Message": "Access is restricted"})],
    )
    with pytest.raises(
        DownloadError,
        match=(
            f"{code}, the repository is private or gated"
            f".*{at_hub.url}/datasets/o/n.*HF_TOKEN.*restricted"
        ),
    ):
        from_hub(tmp_path / "a")


def test_hub_token_is_sent_to_the_hub_only(at_hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    store = Site()
    threading.Thread(
        target=store.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True
    ).start()
    store.add("/f")
    at_hub.add("/datasets/o/n/resolve/main/sub/a.jsonl", to="/renamed")
    at_hub.add("/renamed", to=store.url + "/f")
    assert from_hub(tmp_path / "a").read_bytes() == DATA
    store.shutdown()
    store.server_close()
    assert [h.get("Authorization") for _, _, h in at_hub.asked] == ["Bearer secret"] * 2
    assert [h.get("Authorization") for _, _, h in store.asked] == [None]
    assert "secret" not in "".join(p.read_text() for p in tmp_path.glob(".*"))


@pytest.mark.parametrize("code", [307, 308])
def test_hub_redirects_are_followed(at_hub, tmp_path, code):
    at_hub.add(
        "/datasets/o/n/resolve/main/sub/a.jsonl",
        codes=[(code, {"Location": "/cache", "X-Linked-ETag": f'"{blob(OTHER)}"'})],
    )
    at_hub.add("/cache")
    with pytest.raises(DownloadError, match="its hash is"):
        from_hub(tmp_path / "a")


# --- Google Drive ---------------------------------------------------------------------------------
ID = "1-abc_DEF0123456789ghijkl"
QUOTA = (
    b"<!DOCTYPE html><html><head><title>Google Drive - Quota exceeded</title></head><body><p"
    b' class="uc-error-caption">Sorry, you can&#39;t view or download this file at this time.</p><p'
    b' class="uc-error-subcaption">Too many users have viewed or downloaded this file recently.'
    b" Please try accessing the file again later.</p></body></html>"
)
LOGIN = (
    b"<!doctype html><html><head><title>Sign in - Google Accounts</title><script>var"
    b" quota=1</script></head><body>Sign in to continue to Google Drive</body></html>"
)
DENIED = (
    b"<!DOCTYPE html><html><title>Google Drive - Access Denied</title><body>You need access."
    b" Request access, or switch to an account with permission.</body></html>"
)


@pytest.fixture
def drive(site, monkeypatch):
    pytest.importorskip("gdown", reason="gdown is an extra")
    monkeypatch.setattr(download, "_DRIVE_URL", site.url + "/uc?export=download&id=")
    return site


def from_drive(to, link=ID, **kw):
    return fetch_drive(link, to, progress=False, **kw)


def page(site, body, path=f"/uc?export=download&id={ID}", **kw):
    return site.add(
        path, body, tag=None, headers={"Content-Type": "text/html; charset=utf-8"}, **kw
    )


def confirm(site, action):
    return (
        "<!DOCTYPE html><html><head><title>Google Drive - Virus scan"
        f' warning</title></head><body><a href="{site.url}/login">Sign in</a><p>Google Drive'
        " can&#39;t scan this file for viruses. <span>log.jsonl (1.6G)</span> is too large for"
        " Google to scan for viruses. Would you still like to download this file?</p><form"
        f' id="download-form" action="{action}" method="get"><input type="submit" value="Download'
        f' anyway"/><input type="hidden" name="id" value="{ID}"><input type="hidden" name="confirm"'
        ' value="t"><input type="hidden" name="uuid" value="0-1"></form></body></html>'
    ).encode()


@pytest.mark.parametrize(
    "link",
    [
        ID,
        f"https://drive.google.com/file/d/{ID}/view?usp=sharing",
        f"https://drive.google.com/open?id={ID}",
        f"https://drive.google.com/uc?export=download&id={ID}",
        f"https://drive.google.com/file/u/0/d/{ID}/edit",
    ],
)
def test_drive_small_file(drive, tmp_path, link):
    drive.add(f"/uc?export=download&id={ID}")
    assert from_drive(tmp_path / "a", link).read_bytes() == DATA


def test_drive_large_file_after_the_virus_page(drive, tmp_path):
    """The page comes again before each attempt, and an interrupted download continues.

    The cookie that it sets is sent with the confirmation.
    """
    page(drive, confirm(drive, drive.url + "/download"))
    drive.files[f"/uc?export=download&id={ID}"].headers["Set-Cookie"] = "download_warning=t; Path=/"
    drive.add(
        path := f"/download?id={ID}&confirm=t&uuid=0-1",
        cuts=[100_000],
        tag=None,
        headers={
            "Last-Modified": "Wed, 21 Oct 2015 07:28:00 GMT",
            "Content-Disposition": "attachment",
        },
        if_range=False,
    )
    assert from_drive(tmp_path / "a", size=N).read_bytes() == DATA
    assert drive.ranges(path) == [None, "bytes=100000-"] and all(
        h.get("Cookie") == "download_warning=t" for p, _, h in drive.asked if p == path
    )


def test_drive_confirmation_loop_ends(drive, tmp_path):
    drive.files = {
        k: File(confirm(drive, drive.url + "/download"))
        for k in (f"/uc?export=download&id={ID}", f"/download?id={ID}&confirm=t&uuid=0-1")
    }
    with pytest.raises(DownloadError, match="one web page after the other"):
        from_drive(tmp_path / "a")


@pytest.mark.parametrize("code", [200, 403])
@pytest.mark.parametrize(
    "body, says",
    [
        (QUOTA, "quota.*wait up to 24 hours, or, signed in, make a copy in your own Drive"),
        (LOGIN, "permission denied.*Anyone with the link"),
        (DENIED, "permission denied.*mount Drive"),
        (b"<!doctype html><p>Something new &amp; odd", "'Something new & odd'.*browser"),
    ],
    ids=["quota", "login", "denied", "new"],
)
def test_drive_error_pages_end_the_download(drive, tmp_path, waits, code, body, says):
    page(drive, body, codes=[(code, {"Content-Type": "text/html"}, body)] if code != 200 else [])
    with pytest.raises(DownloadError, match=says):
        from_drive(tmp_path / "a")
    assert names(tmp_path) == [] and not waits and len(drive.asked) == 1


def test_drive_quota_after_the_virus_page(drive, tmp_path):
    page(drive, confirm(drive, drive.url + "/download"))
    page(drive, QUOTA, f"/download?id={ID}&confirm=t&uuid=0-1")
    with pytest.raises(DownloadError, match="wait up to 24 hours"):
        from_drive(tmp_path / "a")


def test_drive_quota_during_download_keeps_the_part(drive, tmp_path):
    drive.add(f"/uc?export=download&id={ID}", cuts=[100_000] + [0] * 9)
    with pytest.raises(DownloadError, match="in a row"):
        from_drive(tmp_path / "a")
    page(drive, QUOTA, ranges=False)
    with pytest.raises(DownloadError, match="24 hours"):
        from_drive(tmp_path / "a")
    drive.add(f"/uc?export=download&id={ID}")
    assert from_drive(tmp_path / "a").read_bytes() == DATA and drive.ranges()[-1] == "bytes=100000-"


def test_drive_no_such_file(drive, tmp_path):
    with pytest.raises(DownloadError, match="404"):
        from_drive(tmp_path / "a")


@pytest.mark.parametrize(
    "link",
    [
        "https://drive.google.com/drive/folders/1-abc_DEF0123456789ghijkl",
        "https://drive.google.com/drive/my-drive",
        "short",
    ],
)
def test_drive_links_without_a_file_are_refused(tmp_path, link):
    with pytest.raises(ValueError, match="Share > Copy link"):
        from_drive(tmp_path / "a", link)


def test_drive_without_gdown_is_explained(drive, tmp_path, monkeypatch):
    page(drive, confirm(drive, drive.url + "/download"))
    monkeypatch.setitem(sys.modules, "gdown.download", None)
    with pytest.raises(ImportError, match=re.escape("'minigpt-notebook[data]'")):
        from_drive(tmp_path / "a")


# --- any source -----------------------------------------------------------------------------------
def test_get_accepts_any_source(site, tmp_path, monkeypatch):
    calls = []
    for name in ("fetch_hub", "fetch_drive", "fetch_url"):
        monkeypatch.setattr(
            download, name, lambda *a, name=name, **k: calls.append((name, *a[:-1], k))
        )
    for source in (
        "hf:o/n/sub/a.jsonl",
        f"https://drive.google.com/file/d/{ID}/view",
        "https://example.com/a?id=drive.google.com",
        "http://example.com/a",
    ):
        get(source, tmp_path / "a", size=3)
    assert calls == [
        ("fetch_hub", "o/n", "sub/a.jsonl", dict(size=3)),
        ("fetch_drive", f"https://drive.google.com/file/d/{ID}/view", dict(size=3)),
        ("fetch_url", "https://example.com/a?id=drive.google.com", dict(size=3)),
        ("fetch_url", "http://example.com/a", dict(size=3)),
    ]
    for source in ("hf:o/n", "hf:o//a", "a.jsonl", "ftp://example.com/a"):
        with pytest.raises(ValueError):
            get(source, tmp_path / "a")


def test_import_is_light():
    code = (
        "import sys, minigpt.data.download; print(*[o for o in ('torch', 'gdown', 'requests',"
        " 'bs4', 'huggingface_hub', 'numpy') if o in sys.modules])"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        == []
    )
