"""Build the documentation site in _docs/site from the notebooks: `python tools/docs.py [--serve]`.

nbdev-proc-nbs turns each notebook into a page; the signature of a public symbol becomes a table of
its parameters. Tutorials, README and changelog are copied; the pages in docs/ are written by hand.
mkdocs-material builds the site in strict mode: a broken link or anchor is an error.
"""

import ast
import base64
import html
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from project import ROOT, directives, joined, lessons, settings
from readme import ansi, block

PROC, OUT = ROOT / "_proc", ROOT / "_docs"
SRC = OUT / "src"
GUIDES = {
    "getting-started": "Getting started",
    "colab": "Train on Colab with Drive",
    "data": "Prepare data",
    "fine-tuning": "Fine-tune (SFT, LoRA, DPO)",
    "chat-and-serve": "Chat and serve",
    "checkpoints": "Inspect and export checkpoints",
    "performance": "Performance",
    "migrating": "Migrating",
    "troubleshooting": "Troubleshooting",
}
ABOUT = {
    "commands": "Commands",
    "formats": "Formats",
    "comparison": "Comparison",
}
CHINESE = {
    "zh/index": ("简介", "README.zh.md"),
    "zh/getting-started": ("快速上手", "docs/zh/getting-started.md"),
    "zh/colab": ("在 Colab 上用 Drive 训练", "docs/zh/colab.md"),
    "zh/data": ("准备数据", "docs/zh/data.md"),
    "zh/fine-tuning": ("微调（SFT、LoRA、DPO）", "docs/zh/fine-tuning.md"),
    "zh/migrating": ("迁移指南", "docs/zh/migrating.md"),
    "zh/troubleshooting": ("常见问题", "docs/zh/troubleshooting.md"),
}
WRITTEN = {
    **{g: f"docs/{g}.md" for g in (*GUIDES, *ABOUT)},
    **{page: source for page, (_, source) in CHINESE.items()},
    "changelog": "CHANGELOG.md",
}  # written by hand: page → source
# Each Chinese character is a word. lunr's trimmer knows only Latin letters, so the characters that
# it would remove separate words instead.
SEARCH = {
    "separator": r"""[\s\-.,:;()\[\]"'`=/，。：；、（）“”]+|(?=[\u3000-\u9fff])""",
    "pipeline": ["stemmer", "stopWordFilter"],
}
CSS = (  # long lines of code, names in tables
    ".md-grid {max-width: 76rem} .md-typeset pre > code {font-size: .78em} .md-typeset td code"
    " {white-space: nowrap}\n"
)
TUTORIALS = [
    "quickstart",
    "train_with_drive",
    "resume_after_disconnect",
    "prepare_and_inspect_data",
    "from_zero_to_chat",
    "sft",
    "tool_calling",
    "lora",
    "dpo",
    "diffusion",
    "inspect_checkpoints",
]


def load(path):
    return json.loads(path.read_text(encoding="utf-8"))


def modules():
    "Return module name → notebook, in reading order."
    found = {}
    for p in lessons():
        for c in load(p)["cells"]:
            if c["cell_type"] == "code" and (
                name := directives(joined(c["source"]))[0].get("default_exp")
            ):
                found[name] = p.relative_to(ROOT / "nbs").as_posix()
    return found


def reference(module):
    "Return the page of a module: `train.trainer` is reference/train/trainer.md."
    return f"reference/{module.replace('.', '/')}.md"


def page_of(target):
    "Return the page of a file of nbs/ or of the root, relative to the site's root, or None."
    if target.startswith("nbs/tutorials/"):
        return f"tutorials/{Path(target).stem}.md"
    if target == "nbs/index.ipynb" or target == "README.md":
        return "index.md"
    if target.startswith("nbs/images/"):
        return Path(target).name  # of README; they are copied next to its page
    if page := next((p for p, source in WRITTEN.items() if target == source), None):
        return f"{page}.md"
    name = next((n for n, p in MODULES.items() if target == f"nbs/{p}"), None)
    return name and reference(name)


def relink(text, source, page):
    "Return Markdown in which the links of `source`, a repository path, are relative to `page`."

    def replace_link(link):
        symbol = re.fullmatch(r"/([\w/]+)\.html(#.*)?", link)  # a link of nbdev
        if symbol and (module := symbol[1].replace("/", ".")) in MODULES:
            to_page = posixpath.relpath(reference(module), posixpath.dirname(page))
            return to_page + (symbol[2] or "").lower()
        if re.match(r"[a-z][a-z0-9+.-]*:|#|/", link):
            return link
        path, mark, rest = re.match(r"([^#?]*)([#?]?)(.*)", link, re.S).groups()
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if found := page_of(target):
            return posixpath.relpath(found, posixpath.dirname(page)) + mark + rest
        return f"{settings()['git_url']}/blob/{settings()['branch']}/{target}"

    parts = re.split(r"(^```.*?^```[^\n]*$|`[^`\n]+`)", text, flags=re.M | re.S)
    for i in range(0, len(parts), 2):
        parts[i] = re.sub(r"(\]\()([^)\s]+)", lambda m: m[1] + replace_link(m[2]), parts[i])
    return "".join(parts)


def render_output(o, source, page, pictures, alt=""):
    "Return an output as Markdown; add pictures to `pictures`, path → bytes."
    if o["output_type"] == "stream":
        return (
            ""
            if o.get("name") == "stderr"
            else block(ansi.sub("", joined(o["text"])).strip("\n"), "text")
        )
    data = o.get("data", {})
    if "image/png" in data:
        name = f"{Path(page).stem}-{len(pictures) + 1}.png"
        pictures[f"{posixpath.dirname(page)}/{name}".lstrip("/")] = base64.b64decode(
            joined(data["image/png"])
        )
        return f"![{alt}]({name})"
    if "text/html" in data:
        return (
            '<div class="output">\n'
            + re.sub(r"\n\s*\n", "\n", joined(data["text/html"]))
            + "\n</div>"
        )
    if "text/markdown" in data:
        text = joined(data["text/markdown"]).removeprefix("---\n").strip()
        return relink(with_parameter_table(text), source, page)
    return (
        block(ansi.sub("", joined(data["text/plain"])).strip("\n"), "text")
        if "text/plain" in data
        else ""
    )


SIGNATURE = re.compile(
    r"```python\n(?P<kind>def|class) (?P<name>\w+)\(\n(?P<parameters>.*?)\n\)"
    r"(?P<returns>[^\n#]*?):?(?: # (?P<returned>[^\n]*))?\n```",
    re.S,
)


def with_parameter_table(text):
    "Return a signature with parameter comments as a short signature and a table."
    return SIGNATURE.sub(lambda m: parameter_table(m) or m[0], text, count=1)


def short_type(node):
    "Return an annotation without the modules of its names."
    if node is None or ast.unparse(node) == "NoneType":  # nbdev's guess from a default
        return ""
    return re.sub(r"\b(?:\w+\.)+(?=\w)", "", ast.unparse(node))


def parameter_table(m):
    "Return the table of a `SIGNATURE`; None if it does not parse or has no comments."
    lines = [re.fullmatch(r" *(.*?),?(?: # (.*))?", l) for l in m["parameters"].splitlines()]
    returns = m["returns"].strip()
    try:
        f = ast.parse(f"def f({', '.join(l[1] for l in lines)}){returns}: pass").body[0]
    except SyntaxError:  # a default such as <object object at 0x…>
        return None
    a = f.args
    positional, stars = [*a.posonlyargs, *a.args], [x for x in (a.vararg, a.kwarg) if x]
    defaults = [None] * (len(positional) - len(a.defaults)) + a.defaults
    values = dict(zip([p.arg for p in positional + a.kwonlyargs], defaults + a.kw_defaults))
    types = {p.arg: short_type(p.annotation) for p in positional + a.kwonlyargs + stars}
    cell = lambda s: s.replace("|", "\\|") if s else ""
    code = lambda s: f"<code>{html.escape(cell(s))}</code>" if s else ""
    rows, names = [], []
    for l in lines:
        name = re.match(r"\**\w*", l[1])[0]
        names.append(name)
        if key := name.lstrip("*"):
            default = ast.unparse(values[key]) if values.get(key) else ""
            rows.append([code(name), code(types[key]), code(default), cell(l[2])])
    if m["returned"] or returns:
        rows.append(["returns", code(short_type(f.returns)), "", cell(m["returned"])])
    if not any(r[3] for r in rows):
        return None
    head = ["| Parameter | Type | Default | Meaning |", "| - | - | - | - |"]
    table = [f"| {' | '.join(r)} |" for r in rows]
    return "\n".join([f"`{m['name']}({', '.join(names)})`", "", *head, *table])


def convert(notebook, source, page):
    "Write a page from a notebook."
    parts, pictures = [], {}
    for cell in load(notebook)["cells"]:
        flags, text = directives(joined(cell["source"]))
        if cell["cell_type"] == "raw":  # nbdev's front matter
            facts = yaml.safe_load(text.strip().strip("-"))
            parts += [f"# {facts['title']}", f"> {facts['description']}"]
            parts.append(
                "*This page is the notebook"
                f" [{source}]({settings()['git_url']}/blob/{settings()['branch']}/{source}).*"
            )
        elif "hide" in flags or text.startswith("<!-- WARNING"):
            continue
        elif cell["cell_type"] == "markdown":
            parts.append(relink(text, source, page).strip())
        else:
            if flags.get("echo") != "false" and text:
                parts.append(block(text, "python"))
            if flags.get("output") != "false":
                alt = flags.get("fig-alt", "")
                parts += [
                    render_output(o, source, page, pictures, alt) for o in cell.get("outputs", [])
                ]
    write(page, "\n\n".join(o for o in parts if o) + "\n")
    for name, raw in pictures.items():
        (SRC / name).write_bytes(raw)


def redirect_missing_anchors():
    "Redirect links to symbols without a heading to their page."
    text = {reference(m): (SRC / reference(m)).read_text(encoding="utf-8") for m in MODULES}
    has = {page: {h.lower() for h in re.findall(r"^#+ (\w+)", t, re.M)} for page, t in text.items()}
    for page, t in text.items():

        def replace_link(m, page=page):
            target = posixpath.normpath(posixpath.join(posixpath.dirname(page), m[1]))
            return m[0] if m[2] in has.get(target, ()) else f"({m[1]})"

        write(page, re.sub(r"\(([\w./]+\.md)#([\w.]+)\)", replace_link, t))


def write(page, text):
    (SRC / page).parent.mkdir(parents=True, exist_ok=True)
    (SRC / page).write_text(text, encoding="utf-8")


def title(path):
    return next(
        l[2:]
        for c in load(path)["cells"]
        if c["cell_type"] == "markdown"
        for l in joined(c["source"]).splitlines()
        if l.startswith("# ")
    )


def configuration():
    cfg = settings()
    nav = [
        {"Home": "index.md"},
        {"Guides": [{t: f"{g}.md"} for g, t in GUIDES.items()]},
        {
            "Tutorials": [
                {title(ROOT / f"nbs/tutorials/{t}.ipynb"): f"tutorials/{t}.md"} for t in TUTORIALS
            ]
        },
        {"API reference": [{m: reference(m)} for m in MODULES]},
        {"Reference": [{t: f"{g}.md"} for g, t in ABOUT.items()]},
        {"Changelog": "changelog.md"},
        {"中文": [{t: f"{page}.md"} for page, (t, _) in CHINESE.items()]},
    ]
    palette = [
        {
            "media": f"(prefers-color-scheme: {s})",
            "scheme": c,
            "toggle": {"icon": f"material/weather-{i}", "name": f"to the {o} scheme"},
        }
        for s, c, i, o in (
            ("light", "default", "sunny", "dark"),
            ("dark", "slate", "night", "light"),
        )
    ]
    return {
        "site_name": "minigpt",
        "site_url": cfg["doc_host"] + cfg["doc_baseurl"] if "doc_host" in cfg else cfg["git_url"],
        "repo_url": cfg["git_url"],
        "docs_dir": "src",
        "site_dir": "site",
        "nav": nav,
        "strict": True,
        "plugins": [{"search": SEARCH}],
        "extra_css": ["extra.css"],
        "extra_javascript": ["https://cdn.jsdelivr.net/npm/mathjax@3/es5/tex-mml-chtml.js"],
        "validation": {
            "nav": {"omitted_files": "warn"},
            "links": {"not_found": "warn", "anchors": "warn", "absolute_links": "warn"},
        },
        "theme": {
            "name": "material",
            "font": False,
            "features": [
                "content.code.copy",
                "navigation.instant",
                "navigation.top",
                "search.highlight",
                "toc.follow",
            ],
            "palette": palette,
        },
        "markdown_extensions": [
            "attr_list",
            "md_in_html",
            "tables",
            "admonition",
            {"toc": {"permalink": True, "toc_depth": 3}},
            "pymdownx.superfences",
            {"pymdownx.highlight": {"use_pygments": True}},
            {"pymdownx.arithmatex": {"generic": True}},
        ],
    }


def main():
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}
    done = subprocess.run(
        [
            Path(sys.executable).parent / "nbdev-proc-nbs",
            "--skip-folder-re",
            r"^[_.]|tutorials",
            "--skip-file-re",
            r"^[_.]|index",
        ],
        cwd=ROOT,
        env=env,
        text=True,
        capture_output=True,
    )
    if done.returncode:
        sys.exit(f"nbdev-proc-nbs failed:\n{done.stderr[-3000:]}")
    shutil.rmtree(OUT, ignore_errors=True)
    for name, notebook in MODULES.items():
        convert(PROC / notebook, f"nbs/{notebook}", reference(name))
    redirect_missing_anchors()
    for t in TUTORIALS:
        convert(ROOT / f"nbs/tutorials/{t}.ipynb", f"nbs/tutorials/{t}.ipynb", f"tutorials/{t}.md")
    convert(ROOT / "nbs/index.ipynb", "nbs/index.ipynb", "index.md")
    for page, source in WRITTEN.items():
        write(
            f"{page}.md", relink((ROOT / source).read_text(encoding="utf-8"), source, f"{page}.md")
        )
    write("extra.css", CSS)
    (OUT / "mkdocs.yml").write_text(
        json.dumps(configuration(), indent=1), encoding="utf-8"
    )  # JSON is valid YAML
    sys.exit(
        subprocess.run(
            [
                sys.executable,
                "-m",
                "mkdocs",
                "serve" if "--serve" in sys.argv else "build",
                "-f",
                OUT / "mkdocs.yml",
            ],
            cwd=OUT,
        ).returncode
    )


MODULES = modules()
if __name__ == "__main__":
    main()
