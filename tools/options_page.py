"""The page of every training option, from `TrainConfig` and the names of other programs.

`minigpt train --help`, `TrainConfig` and this page read the same fields.
"""

import html
import json
import re
import sys

from project import ROOT

sys.path.insert(0, str(ROOT))
from minigpt.config.options import _CHOICES, TrainConfig, other_programs  # noqa: E402

HEAD = """---
hide: [navigation]
search:
  boost: 20
---
# Options

Every option of a training run. Pass one to `fit` as an argument, to `minigpt train` as
`--learning-rate`, or write it into a configuration file as `learning_rate: 3e-4`. `TrainConfig`
checks all of them before training starts.

```python
from minigpt.config import TrainConfig

TrainConfig(learning_rate=3e-4, max_steps=2000)
```

The names of other programs are accepted too, and are renamed. [Migrating](migrating.md) explains
how to move a project.
"""
ELSEWHERE = """## Options of other programs without an equivalent

`fit` refuses these names and says what to use instead.
"""
IGNORED = """## Options of other programs without effect

These are ignored in a configuration file, with the values given.
"""


def option_names():
    return [f.name for groups in TrainConfig.groups().values() for f in groups]


def also_called():
    "Option to the names that other programs give it"
    found = {}
    for other, name in other_programs().aliases.items():
        found.setdefault(name, []).append(other)
    return found


def mono(s):
    return f"<code>{html.escape(s)}</code>"


def entry(f, others):
    "An option; its heading makes the search find it by name, and what belongs to it by content"
    facts = [f"{type(f.default).__name__}, default {mono(repr(f.default))}"]
    if choices := _CHOICES.get(f.name):
        facts.append(f"one of {', '.join(mono(repr(o)) for o in choices)}")
    if others:
        facts.append(f"also called {', '.join(map(mono, others))}")
    help = re.sub(r"`(.+?)`", r"<code>\1</code>", html.escape(f.metadata["help"]))
    return (
        f'<div class="option">\n<h3 id="{f.name}">{mono(f.name)}</h3>\n'
        f'<div><p>{help}</p><p class="facts">{"; ".join(facts)}</p></div>\n</div>'
    )


def group_table(group):
    others = also_called()
    return "\n".join(entry(f, others.get(f.name, [])) for f in group)


def two_columns(head, rows):
    "A Markdown table of names and a text"
    cell = lambda s: s.replace("|", "\\|")
    lines = [f"| {' '.join(f'`{n}`' for n in names.split())} | {cell(t)} |" for names, t in rows]
    return "\n".join([f"| {head[0]} | {head[1]} |", "| - | - |", *lines])


def options_page():
    "The page as Markdown, with links as in the root of the repository"
    parts = [HEAD]
    for title, group in TrainConfig.groups().items():
        parts += [f"## {title}", group_table(group)]
    data = json.loads((ROOT / "minigpt/config/other_programs.json").read_text(encoding="utf-8"))
    parts.append(ELSEWHERE)
    for title, hints in data["elsewhere"].items():
        parts += [
            f"### {title[0].upper()}{title[1:]}",
            two_columns(("Name", "Instead"), hints.items()),
        ]
    parts.append(IGNORED)
    values = lambda v: "any value" if v is None else ", ".join(f"`{json.dumps(o)}`" for o in v)
    rows = [(n, values(v)) for table in data["ignored"].values() for n, v in table.items()]
    parts.append(two_columns(("Name", "Values"), rows))
    return "\n\n".join(parts) + "\n"
