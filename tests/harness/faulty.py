"""A file layer that fails on purpose below one folder.

It raises errors at chosen writes, writes short, makes a folder vanish or slow, and simulates a
server that files reach late. The code under test is unchanged: `open` and functions of `os` are
patched while a fault is active.
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
PATHLIB_ACCESSOR = getattr(
    pathlib, "_NormalAccessor", None
)  # Python 3.10: pathlib calls the functions that it found on import


def patch(module, name, f):
    "Patch a function, also for pathlib."
    setattr(module, name, f)
    if hasattr(PATHLIB_ACCESSOR, name):
        setattr(PATHLIB_ACCESSOR, name, staticmethod(f))


class File:
    "An open file that reports each write to the disk first."

    def __init__(self, disk, file, path):
        self.disk, self.file, self.path = disk, file, path

    def write(self, data):
        data = memoryview(data).cast("B") if not isinstance(data, str) else data
        self.disk.count_write(f"write {self.path}")
        if self.disk.short and len(data) > 1:
            data = data[: random.Random(len(data)).randrange(1, len(data))]
        n = self.file.write(data)
        self.disk.changed(self.path)
        return n

    def truncate(self, *size):
        self.disk.count_write(f"truncate {self.path}")
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
    """Faults of the folder `root`.

    Writes (opening for writing, writing, renaming, deleting, creating, flushing) are counted from
    0. From number `at` on, `times` of them fail with `error`. `gone` makes every access fail; each
    write takes `delay` seconds longer. Paths in `unreadable` (path → errno), and all below them,
    cannot be opened or listed.
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
        self.count, self.failed, self.gone, self.log = 0, [], False, []
        self.server, self.unreadable = None, {}

    def check_readable(self, path, itself=True):
        "Raise if the path or a folder around it is unreadable."
        if not self.contains(path):
            return
        path = os.path.abspath(os.fspath(path))
        for bad, error in self.unreadable.items():
            if (path == bad and itself) or path.startswith(bad + os.sep):
                raise OSError(error, os.strerror(error), path)

    def contains(self, path):
        try:
            path = os.path.abspath(os.fspath(path))
        except TypeError:
            return False  # a file descriptor
        return isinstance(path, str) and (path == self.root or path.startswith(self.root + os.sep))

    def count_write(self, what):
        "Count a write, and raise if this one must fail."
        if self.gone:
            raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN))
        n, self.count = self.count, self.count + 1
        if self.delay:
            time.sleep(self.delay)
        if self.at is not None and self.at <= n < self.at + self.times:
            self.failed.append(what)
            raise OSError(self.error, os.strerror(self.error))

    def changed(self, path):
        if self.server:
            self.server.changed(path)

    @contextlib.contextmanager
    def active(self):
        "Patch the functions that access files."
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

        def fake_open(file, mode="r", *a, **k):
            if not self.contains(file):
                return real[builtins, "open"](file, mode, *a, **k)
            if self.gone:
                raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(file))
            if not WRITING & set(mode):
                self.check_readable(file)
                return real[builtins, "open"](file, mode, *a, **k)
            self.count_write(f"open {file}")
            f = File(self, real[builtins, "open"](file, mode, *a, **k), os.path.abspath(file))
            self.changed(f.path)
            return f

        def wrap_write(m, name):
            def call(path, *a, **k):
                full = (
                    os.path.join(os.readlink(f"/proc/self/fd/{k['dir_fd']}"), path)
                    if k.get("dir_fd")
                    else path
                )  # relative to an open folder
                if self.contains(full):
                    self.count_write(f"{name} {full}")
                r = real[m, name](path, *a, **k)
                if self.server and self.contains(full) and name in ("unlink", "rename", "replace"):
                    self.server.moved(full, a[0] if a else None)
                return r

            return call

        def wrap_read(m, name):
            def call(path=".", *a, **k):
                if self.gone and self.contains(path):
                    raise OSError(errno.ENOTCONN, os.strerror(errno.ENOTCONN), str(path))
                self.check_readable(path, itself=name == "scandir")
                return real[m, name](path, *a, **k)

            return call

        def fsync(fd):
            try:
                path = os.readlink(f"/proc/self/fd/{fd}")
            except OSError:
                path = None
            if path and self.contains(path):
                self.count_write(f"fsync {path}")
            return real[os, "fsync"](fd)

        new = {
            (builtins, "open"): fake_open,
            (io, "open"): fake_open,
            (os, "fsync"): fsync,
            (os, "stat"): wrap_read(os, "stat"),
            (os, "lstat"): wrap_read(os, "lstat"),
            (os, "scandir"): wrap_read(os, "scandir"),
            **{
                (os, n): wrap_write(os, n)
                for n in ("mkdir", "rename", "replace", "unlink", "rmdir")
            },
        }
        for (m, n), f in new.items():
            patch(m, n, f)
        try:
            yield self
        finally:
            for (m, n), f in real.items():
                patch(m, n, f)


class Server:
    """The cloud side: which files below `root` have arrived there.

    Files arrive in random order when `deliver` is called. Deletions and truncations arrive at once,
    which is the worst case. The attributes of DriveFS are set on the files.
    """

    def __init__(self, root, arrived, seed=0):
        self.root, self.arrived, self.rng, self.waiting, self.lock = (
            Path(root),
            Path(arrived),
            random.Random(seed),
            set(),
            threading.RLock(),
        )
        self.arrived.mkdir()

    def changed(self, path):
        with self.lock:
            path = Path(path)
            if not path.exists():
                return
            self.waiting.add(path)
            os.setxattr(path, "user.drive.uncommitted", b"1")
            if (
                path.stat().st_size == 0
                and (f := self.arrived / path.relative_to(self.root)).exists()
            ):
                f.write_bytes(b"")

    def moved(self, path, to):
        "Record that a file or folder was deleted (`to` is None) or renamed."
        with self.lock:
            path = Path(os.path.abspath(path))
            arrived = self.arrived / path.relative_to(self.root)
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
                arrived.unlink(missing_ok=True)
            elif arrived.exists():
                (
                    target := self.arrived / Path(os.path.abspath(to)).relative_to(self.root)
                ).parent.mkdir(parents=True, exist_ok=True)
                os.replace(arrived, target)

    def deliver(self, n):
        "Let up to `n` files, drawn at random, arrive."
        with self.lock:
            for p in self.rng.sample(sorted(self.waiting), min(n, len(self.waiting))):
                self.waiting.discard(p)
                if not p.exists():
                    continue
                data = p.read_bytes()
                to = self.arrived / p.relative_to(self.root)
                to.parent.mkdir(parents=True, exist_ok=True)
                to.write_bytes(data)
                os.setxattr(p, "user.drive.md5", hashlib.md5(data).hexdigest().encode())
                os.setxattr(p, "user.drive.uncommitted", b"0")

    def copy_to(self, to):
        "Copy what another machine would see: only what has arrived."
        shutil.copytree(self.arrived, to)


def keeps_attributes(folder):
    try:
        (f := Path(folder) / "attributes").touch()
        os.setxattr(f, "user.drive.uncommitted", b"1")
        f.unlink()
        return True
    except (OSError, AttributeError):
        return False
