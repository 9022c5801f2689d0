"""A file layer that fails on purpose, below one folder.

Errors at a chosen write, short writes, a folder that vanishes, a slow one, and a server to which
files arrive late. The code under test is not changed: `open` and the functions of `os` are replaced
while a fault is at work.
"""

import builtins
import contextlib
import errno
import hashlib
import io
import os
import pathlib
import random
import shutil
import threading
import time
from pathlib import Path

WRITING = set("wax+")
KEPT = getattr(
    pathlib, "_NormalAccessor", None
)  # Python 3.10: the functions that pathlib found when it was imported, and calls instead


def put(module, name, f):
    "Replace a function, for pathlib too"
    setattr(module, name, f)
    if hasattr(KEPT, name):
        setattr(KEPT, name, staticmethod(f))


class File:
    "An open file whose writes ask the disk first"

    def __init__(self, disk, file, path):
        self.disk, self.file, self.path = disk, file, path

    def write(self, data):
        data = memoryview(data).cast("B") if not isinstance(data, str) else data
        self.disk.strike(f"write {self.path}")
        if self.disk.short and len(data) > 1:
            data = data[: random.Random(len(data)).randrange(1, len(data))]
        n = self.file.write(data)
        self.disk.changed(self.path)
        return n

    def truncate(self, *size):
        self.disk.strike(f"truncate {self.path}")
        n = self.file.truncate(*size)
        self.file.flush()
        self.disk.changed(self.path)
        return n

    def close(self):
        self.file.close()
        self.disk.changed(self.path)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def __iter__(self):
        return iter(self.file)

    def __getattr__(self, name):
        return getattr(self.file, name)


class Disk:
    """What can be wrong with the folder `root`.

    `at` is the number of the write (counted from 0: opening to write, writing, renaming, deleting,
    making, flushing) from which on it fails with `error`, `times` times; `gone` makes every access
    fail; `delay` seconds pass with each write. What stands in `unreadable` (path → errno) cannot be
    opened or listed, nor anything below it.
    """

    def __init__(self, root, error=errno.EIO, at=None, times=1, short=False, delay=0.0):
        self.root, self.error, self.at, self.times, self.short, self.delay = (
            str(root),
            error,
            at,
            times,
            short,
            delay,
        )
        self.count, self.struck, self.gone, self.log = 0, [], False, []
        self.server, self.unreadable = None, {}

    def refuse(self, path, itself=True):
        "Fail where a path, or a folder around it, cannot be read"
        if not self.below(path):
            return
        path = os.path.abspath(os.fspath(path))
        for bad, error in self.unreadable.items():
            if (path == bad and itself) or path.startswith(bad + os.sep):
                raise OSError(error, os.strerror(error), path)

    def below(self, path):
        try:
            path = os.path.abspath(os.fspath(path))
        except TypeError:
            return False  # a file descriptor
        return isinstance(path, str) and (path == self.root or path.startswith(self.root + os.sep))

    def strike(self, what):
        "Count a write, and fail if it is its turn"
        if self.gone:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        n, self.count = self.count, self.count + 1
        if self.delay:
            time.sleep(self.delay)
        if self.at is not None and self.at <= n < self.at + self.times:
            self.struck.append(what)
            raise OSError(self.error, os.strerror(self.error))

    def changed(self, path):
        if self.server:
            self.server.changed(path)

    @contextlib.contextmanager
    def at_work(self):
        "Replace what touches files"
        real = {
            (m, n): getattr(m, n)
            for m, n in [
                (builtins, "open"),
                (io, "open"),
                (os, "mkdir"),
                (os, "rename"),
                (os, "replace"),
                (os, "unlink"),
                (os, "rmdir"),
                (os, "fsync"),
                (os, "stat"),
                (os, "lstat"),
                (os, "scandir"),
            ]
        }

        def opened(file, mode="r", *a, **k):
            if not self.below(file):
                return real[builtins, "open"](file, mode, *a, **k)
            if self.gone:
                raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(file))
            if not WRITING & set(mode):
                self.refuse(file)
                return real[builtins, "open"](file, mode, *a, **k)
            self.strike(f"open {file}")
            f = File(self, real[builtins, "open"](file, mode, *a, **k), os.path.abspath(file))
            self.changed(f.path)
            return f

        def acting(m, name):
            def act(path, *a, **k):
                whole = (
                    os.path.join(os.readlink(f"/proc/self/fd/{k['dir_fd']}"), path)
                    if k.get("dir_fd")
                    else path
                )  # relative to an open folder
                if self.below(whole):
                    self.strike(f"{name} {whole}")
                r = real[m, name](path, *a, **k)
                if self.server and self.below(whole) and name in ("unlink", "rename", "replace"):
                    self.server.moved(whole, a[0] if a else None)
                return r

            return act

        def looking(m, name):
            def look(path=".", *a, **k):
                if self.gone and self.below(path):
                    raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(path))
                self.refuse(path, itself=name == "scandir")
                return real[m, name](path, *a, **k)

            return look

        def fsync(fd):
            try:
                path = os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                path = None
            if path and self.below(path):
                self.strike(f"fsync {path}")
            return real[os, "fsync"](fd)

        new = {
            (builtins, "open"): opened,
            (io, "open"): opened,
            (os, "fsync"): fsync,
            (os, "stat"): looking(os, "stat"),
            (os, "lstat"): looking(os, "lstat"),
            (os, "scandir"): looking(os, "scandir"),
            **{(os, n): acting(os, n) for n in ("mkdir", "rename", "replace", "unlink", "rmdir")},
        }
        for (m, n), f in new.items():
            put(m, n, f)
        try:
            yield self
        finally:
            for (m, n), f in real.items():
                put(m, n, f)


class Server:
    """Google's side: what has arrived there of the files below `root`.

    Files arrive in random order, when `deliver` is called; what is deleted or cut is deleted and
    cut there at once, the worst that can happen. The attributes of DriveFS are set on the files
    themselves.
    """

    def __init__(self, root, there, seed=0):
        self.root, self.there, self.rng, self.waiting, self.lock = (
            Path(root),
            Path(there),
            random.Random(seed),
            set(),
            threading.RLock(),
        )
        self.there.mkdir()

    def changed(self, path):
        with self.lock:
            path = Path(path)
            if not path.exists():
                return
            self.waiting.add(path)
            os.setxattr(path, "user.drive.uncommitted", b"1")
            if (
                path.stat().st_size == 0
                and (f := self.there / path.relative_to(self.root)).exists()
            ):
                f.write_bytes(b"")

    def moved(self, path, to):
        "A file or folder was deleted (`to` None) or renamed"
        with self.lock:
            path = Path(os.path.abspath(path))
            there = self.there / path.relative_to(self.root)
            self.waiting = {
                (
                    p
                    if p != path and path not in p.parents
                    else Path(to) / p.relative_to(path)
                    if to
                    else p
                )
                for p in self.waiting
                if to or p != path
            }
            if to is None:
                there.unlink(missing_ok=True)
            elif there.exists():
                (
                    target := self.there / Path(os.path.abspath(to)).relative_to(self.root)
                ).parent.mkdir(parents=True, exist_ok=True)
                os.replace(there, target)

    def deliver(self, n):
        "Up to `n` files, drawn at random, arrive"
        with self.lock:
            for p in self.rng.sample(sorted(self.waiting), min(n, len(self.waiting))):
                self.waiting.discard(p)
                if not p.exists():
                    continue
                data = p.read_bytes()
                to = self.there / p.relative_to(self.root)
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(data)
                os.setxattr(p, "user.drive.md5", hashlib.md5(data).hexdigest().encode())
                os.setxattr(p, "user.drive.uncommitted", b"0")

    def machine_dies(self, to):
        "Another machine sees what has arrived, and nothing else"
        shutil.copytree(self.there, to)


def keeps_attributes(folder):
    try:
        (f := Path(folder) / "attributes").touch()
        os.setxattr(f, "user.drive.uncommitted", b"1")
        f.unlink()
        return True
    except (OSError, AttributeError):
        return False
