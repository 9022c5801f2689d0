"""Signatures as the documentation site shows them.

nbdev writes a signature with the module before each type, and the comments of the parameters
as comments. Here it becomes a short signature and a table, or code without modules.
"""

import ast
import html
import io
import re
import tokenize

SIGNATURE = re.compile(
    r"```python\n(?P<kind>def|class) (?P<name>[\w.]+)\(\n?(?P<parameters>.*?)\n?\)"
    r"(?P<returns>(?:->[^\n#]*?)?):?(?: # (?P<returned>[^\n]*))?\n```",
    re.S,
)
UNREADABLE = re.compile(r"=<(?:[^<>]|<[^<>]*>)*>")  # a default such as <object object at 0x…>
REST = "**training_options"
TAKES_OPTIONS = ("fit", "resume")  # functions whose **options are those of TrainConfig
EVERY_OPTION = "Every [training option](/options.html)"


def readable(text, options=()):
    """A signature of nbdev in `text`, as a reader wants it.

    Where a command has all `options`, one line stands for them."""
    return SIGNATURE.sub(lambda m: signature(m, set(options)) or m[0], text, count=1)


def signature(m, options):
    "The Markdown of a `SIGNATURE`; None: it does not parse"
    parameters = UNREADABLE.sub("=...", m["parameters"])
    source = f"def f(\n{parameters}\n){m['returns'].strip()}: pass"
    try:
        f = ast.parse(source).body[0]
    except SyntaxError:
        return None
    rows = with_comments(arguments(f.args), comments(source))
    if m["name"] in TAKES_OPTIONS:
        rows = [(n, k, d, t or EVERY_OPTION * (n == "**options")) for n, k, d, t in rows]
    if options and options <= {name for name, *_ in rows}:
        rows = [r for r in rows if r[0] not in options]
        rows.append((REST, "", "", EVERY_OPTION))
    is_class = m["kind"] == "class" or m["name"].split(".")[-1][:1].isupper()
    returns = "" if is_class else short_type(f.returns)
    if not any(r[3] for r in rows) and not m["returned"]:
        return code(m["name"], rows, returns)
    if m["returned"] or returns:
        rows.append(("returns", returns, "", m["returned"] or ""))
    return table(m["name"], [r[0] for r in rows if r[0] != "returns"], rows)


def short_type(node):
    "An annotation without the modules of its names"
    if node is None or ast.unparse(node) in ("NoneType", "None"):  # nbdev's guess from a default
        return ""
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", ast.unparse(node))


def arguments(a):
    "Name with stars, type, default and line of each argument"
    positional = [*a.posonlyargs, *a.args]
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults
    found = [("", p, d) for p, d in zip(positional, defaults)]
    found += [("*", a.vararg, None)] if a.vararg else []
    found += [("", p, d) for p, d in zip(a.kwonlyargs, a.kw_defaults)]
    found += [("**", a.kwarg, None)] if a.kwarg else []
    return [
        (stars + p.arg, short_type(p.annotation), ast.unparse(d) if d else "", p.lineno)
        for stars, p, d in found
    ]


def comments(source):
    "Line to comment"
    return {
        t.start[0]: t.string.lstrip("# ")
        for t in tokenize.generate_tokens(io.StringIO(source).readline)
        if t.type == tokenize.COMMENT
    }


def with_comments(found, by_line):
    "Name, type, default and comment; a comment belongs to the last argument of its line"
    last = {line: name for name, _, _, line in found}
    return [
        (name, kind, default, by_line.get(line, "") if last[line] == name else "")
        for name, kind, default, line in found
    ]


def code(name, rows, returns):
    "A signature without comments, as code"
    one = [
        name + (f": {kind}" if kind else "") + (f" = {default}" if default else "")
        for name, kind, default, _ in rows
    ]
    end = f") -> {returns}" if returns else ")"
    line = f"{name}({', '.join(one)}{end}"
    if len(line) > 88:
        line = "\n".join([f"{name}(", *(f"    {o}," for o in one), end])
    return f"```{{ .python .no-copy }}\n{line}\n```"


def table(name, names, rows):
    "A signature with comments, as names and a table"
    cell = lambda s: s.replace("|", "\\|")
    mono = lambda s: f"<code>{html.escape(cell(s))}</code>" if s else ""
    lines = [
        f"| {mono(n) if n != 'returns' else n} | {cell(text)} | {mono(kind)} | {mono(default)} |"
        for n, kind, default, text in rows
    ]
    head = ["| Parameter | Meaning | Type | Default |", "| - | - | - | - |"]
    return "\n".join([f"`{name}({', '.join(names)})`", "", *head, *lines])
