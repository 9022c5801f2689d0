"""The project uses the field's terms: no word of the left column of CONTRIBUTING's glossary.

Notebooks and pages are read completely; of Python files the docstrings, comments, string literals
and names of functions.
"""

import ast
import io
import json
import re
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
UNIT = "nats|tokens|bytes|steps|seconds|ms|MB|GB|times|sequences|lines?|rows"
EACH = "token|second|step|minute|hour|run|row|epoch|parameter|device|character|line|sequence"
AVOID = {  # pattern → a sentence with it
    r"\b(go|goes|went|going) on\b": "the run goes on",
    r"\b(dies|died|dead or alive)\b": "a process that died",
    r"\bdear(er)?\b": "how dear it is",
    r"\bways? out\b": "and the ways out",
    r"\b(is|are) (said|told)\b|\bsays so\b": "is said once",
    r"\bas (it|they) (is|are|was|were)[.,;:)\n]": "stays as it is.",
    r"\bstrangers?\b": "a stranger's file",
    r"\bsomebody\b": "somebody else's package",
    r"\bone behind another\b": "ids one behind another",
    r"\bdialects?\b": "in the dialects of",
    r"\banew\b": "trained anew",
    r"\b(this|the|which) rooms?\b": "this room does",
    r"\band the like\b": "files and the like",
    rf"\b({UNIT}) an? ({EACH})\b(?! has)": "nats a token",
    r"\bin front of\b": "in front of the answer",
    r"\bmirrored\b": "mirrored to Drive",
    r"\b(is|are) learned\b": "only answers are learned",
}
EXAMPLES = {  # (path, pattern): texts that contain the word as an example
    ("nbs/tutorials/prepare_and_inspect_data.ipynb", r"\bdialects?\b"),
}
PAGES = ("README", "ARCHITECTURE", "CHANGELOG")
CODE = ("tests", "bench", "tools", "examples")


def words_of(source):
    "Return the docstrings, comments, string literals and function names of a Python file."
    found, line = [], -1
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            if token.start[0] == line + 1:  # a comment of several lines
                found[-1] += token.string.lstrip("#")
            else:
                found.append(token.string)
            line = token.start[0]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.append(node.value)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.append(node.name.replace("_", " "))
    return "\n".join(" ".join(o.split()) for o in found) + "\n"


@cache
def texts():
    "Return the texts of the project: path in the repository → text."
    found = {}
    for f in sorted((ROOT / "nbs").rglob("*.ipynb")):
        cells = json.loads(f.read_text("utf-8"))["cells"]
        found[f] = "\n".join("".join(c["source"]) for c in cells)
    for f in [*(ROOT / "docs").glob("*.md"), *(ROOT / f"{n}.md" for n in PAGES)]:
        found[f] = f.read_text("utf-8")
    for f in (f for folder in CODE for f in (ROOT / folder).rglob("*.py") if f != Path(__file__)):
        found[f] = words_of(f.read_text("utf-8"))
    return {f.relative_to(ROOT).as_posix(): text for f, text in found.items()}


@pytest.mark.parametrize("pattern", AVOID)
def test_no_word_of_the_left_column(pattern):
    word = re.compile(pattern, re.I)
    assert word.search(AVOID[pattern]), "the pattern does not find its own example"
    found = [
        f"{f}: …{text[max(0, m.start() - 40) : m.end() + 20]!r}"
        for f, text in texts().items()
        if (f, pattern) not in EXAMPLES
        for m in word.finditer(text)
    ]
    assert not found, "\n".join(found)
