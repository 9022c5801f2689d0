"What a thing is stands in a type or a field: no code reads it out of the words of a message."

import ast

import pytest

from tests.conftest import ROOT

MODULES = [p for p in (ROOT / "minigpt").rglob("*.py") if p.name != "_modidx.py"]
TORCHS = {"is_out_of_memory", "read_pickle"}  # torch tells these by words alone
SEARCHES = {"startswith", "endswith", "find", "search", "match", "fullmatch", "findall"}
WORDS = {"reason", "detail"}  # fields that hold a message


def is_message(node):
    "`str(e)`, or a field such as `defect.detail`"
    if isinstance(node, ast.Call):
        return (
            getattr(node.func, "id", "") == "str"
            and len(node.args) == 1
            and isinstance(node.args[0], ast.Name)
            and node.args[0].id in ("e", "error", "err", "exc")
        )
    return isinstance(node, ast.Attribute) and node.attr in WORDS


def reads_words(node):
    "Does this compare, or search in, a message?"
    if isinstance(node, ast.Compare):
        compares = (ast.In, ast.NotIn, ast.Eq, ast.NotEq)
        sides = [node.left, *node.comparators]
        return isinstance(node.ops[0], compares) and any(map(is_message, sides))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in SEARCHES and any(map(is_message, [node.func.value, *node.args]))
    return False


def found(source):
    "Names of the functions that read words, and the lines"
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and function.name not in TORCHS:
            for node in ast.walk(function):
                if reads_words(node):
                    yield f"{function.name}, line {node.lineno}: {ast.unparse(node)}"


def test_they_are_found():
    code = (
        "def f(e, d):\n a = 'full' in str(e)\n b = str(e).startswith('x')\n"
        " c = re.search('x', str(e))\n g = d.detail == 'y'\n h = d.kind == 'damaged'"
    )
    assert [o.split(":")[0] for o in found(code)] == [f"f, line {i}" for i in (2, 3, 4, 5)]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_message_decides(path):
    assert not [*found(path.read_text(encoding="utf-8"))]
