"""Which code of a notebook its page shows.

A notebook is a lesson and a test. Its page leaves the tests out: statements that assert, and cells
that show nothing and define nothing that a later cell of the page needs.
"""

import ast
import re


def python(source):
    "The statements of a cell; magics and shell lines count as `pass`. None: it does not parse"
    try:
        return ast.parse(re.sub(r"^[%!].*", "pass", source, flags=re.M)).body
    except SyntaxError:
        return None


def asserts(node):
    "Whether a statement asserts something, at any depth"
    calls = (n.func for n in ast.walk(node) if isinstance(n, ast.Call))
    names = (f.id for f in calls if isinstance(f, ast.Name))
    return any(isinstance(n, ast.Assert) for n in ast.walk(node)) or any(
        n.startswith("test_") or n in ("expect_fail", "raises") for n in names
    )


def without_tests(source):
    "The source without the statements that assert; unchanged if it does not parse"
    lines = source.splitlines()
    tests = [n for n in python(source) or () if asserts(n)]
    for n in reversed(tests):
        start = n.lineno - 1
        while start and lines[start - 1].startswith("#"):  # a comment on the test
            start -= 1
        del lines[start : n.end_lineno]
    return re.sub(r"\n{4,}", "\n\n\n", "\n".join(lines)).strip("\n")


def names(source):
    "The names that a cell binds, and those that it reads"
    bound, read = set(), set()
    for n in (n for s in python(source) or () for n in ast.walk(s)):
        if isinstance(n, ast.Name):
            (read if isinstance(n.ctx, ast.Load) else bound).add(n.id)
        elif isinstance(n, (ast.FunctionDef, ast.ClassDef)):
            bound.add(n.name)
        elif isinstance(n, ast.alias):
            bound.add((n.asname or n.name).split(".")[0])
        elif isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name):
            read.add(n.value.id)
    return bound, read


def needed(cells):
    """Which cells a page keeps, of `(source, shows something)` in reading order.

    A cell stays if it shows something or binds a name that a later one reads."""
    keep, wanted = [], set()
    for source, shows in reversed(cells):
        bound, read = names(source)
        stays = bool(source) and (shows or bool(bound & wanted))
        keep.append(stays)
        if stays:
            wanted = (wanted - bound) | read
    return keep[::-1]
