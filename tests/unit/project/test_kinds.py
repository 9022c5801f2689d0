"The kind of a thing is a type or a field: no code decides by the words of a message."

import ast

import pytest

from tests.conftest import ROOT

MODULES = [p for p in (ROOT / "minigpt").rglob("*.py") if p.name != "_modidx.py"]
ALLOWED = {"is_out_of_memory", "read_pickle"}  # torch distinguishes these errors only by their text
SEARCHES = {"startswith", "endswith", "find", "search", "match", "fullmatch", "findall"}
MESSAGE_FIELDS = {"reason", "detail"}  # fields that hold a message


def is_message(node):
    "Whether a node is `str(e)` or a field such as `defect.detail`."
    if isinstance(node, ast.Call):
        return (
            getattr(node.func, "id", "") == "str"
            and len(node.args) == 1
            and isinstance(node.args[0], ast.Name)
            and node.args[0].id in ("e", "error", "err", "exc")
        )
    return isinstance(node, ast.Attribute) and node.attr in MESSAGE_FIELDS


def reads_message(node):
    "Whether a node compares or searches a message."
    if isinstance(node, ast.Compare):
        compares = (ast.In, ast.NotIn, ast.Eq, ast.NotEq)
        sides = [node.left, *node.comparators]
        return isinstance(node.ops[0], compares) and any(map(is_message, sides))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return node.func.attr in SEARCHES and any(map(is_message, [node.func.value, *node.args]))
    return False


def violations(source):
    "Yield the functions that read messages, with line and code."
    for function in ast.walk(ast.parse(source)):
        if isinstance(function, ast.FunctionDef) and function.name not in ALLOWED:
            for node in ast.walk(function):
                if reads_message(node):
                    yield f"{function.name}, line {node.lineno}: {ast.unparse(node)}"


def test_violations_are_found():
    code = (
        "def f(e, d):\n a = 'full' in str(e)\n b = str(e).startswith('x')\n"
        " c = re.search('x', str(e))\n g = d.detail == 'y'\n h = d.kind == 'damaged'"
    )
    assert [o.split(":")[0] for o in violations(code)] == [f"f, line {i}" for i in (2, 3, 4, 5)]


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_no_code_decides_by_a_message(path):
    assert not [*violations(path.read_text(encoding="utf-8"))]
